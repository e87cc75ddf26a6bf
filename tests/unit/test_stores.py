"""Blobs, records and settings."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

from workbench.blobs import Blobs
from workbench.config import Config
from workbench.errors import Conflict, Invalid, NotFound
from workbench.records import LEDGERS, Records, alone, reading


@pytest.fixture(params=["folder", "memory"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    url = str(tmp_path / "blobs") if request.param == "folder" else f"memory://{tmp_path.name}"
    return Blobs(url, cache=tmp_path / "cache")


def test_a_blob_is_named_by_its_md5_and_read_back_whole(blobs: Blobs) -> None:
    made = blobs.put(b"pixels")
    assert made.md5 == hashlib.md5(b"pixels").hexdigest() and made.sha256 == hashlib.sha256(b"pixels").hexdigest()
    assert blobs.get(made.md5) == blobs.path(made.md5).read_bytes() == b"pixels"
    assert blobs.put(b"pixels") == made and blobs.exists(made.md5)


def test_a_blob_that_is_missing_or_damaged_says_so(blobs: Blobs) -> None:
    with pytest.raises(NotFound):
        blobs.get("0" * 32)
    with pytest.raises(Invalid):
        blobs.get("../../etc/passwd")
    made = blobs.put(b"pixels")
    if "://" not in blobs.url:
        path = blobs.path(made.md5)
        path.chmod(0o644)
        path.write_bytes(b"pixelz")
        with pytest.raises(Invalid, match="damaged"):
            blobs.get(made.md5)


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(f"sqlite:///{tmp_path / 'r.sqlite'}")


def test_a_frame_has_one_holder_until_the_lease_runs_out(tmp_path: Path) -> None:
    clock = [100.0]
    records = Records(f"sqlite:///{tmp_path / 'r.sqlite'}", clock=lambda: clock[0])
    records.lease("d", "f", "ann", lease_s=60)
    records.lease("d", "f", "ann", lease_s=60)
    with pytest.raises(Conflict, match="ann"):
        records.lease("d", "f", "run:1")
    assert records.lease_many("d", ["f", "g"], "run:1") == {"f": "ann"}
    clock[0] += 61
    records.lease("d", "f", "bob", lease_s=200)
    assert records.leased("d") == {"f": "bob", "g": "run:1"}
    records.release("d", ["f", "g"], "bob")
    assert records.leased("d") == {"g": "run:1"}


def test_of_many_who_want_a_frame_at_once_one_gets_it(records: Records) -> None:
    refused = []
    barrier = threading.Barrier(8)

    def take(who: str) -> None:
        barrier.wait()
        refused.append(bool(records.lease_many("d", ["f"], who)))

    threads = [threading.Thread(target=take, args=(f"p{i}",)) for i in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(refused) == [False] + [True] * 7


def test_a_ledger_keeps_its_order_and_takes_a_key_once(records: Records) -> None:
    assert records.add("reviews", "d", "f", "ann", {"decision": "accepted"}, key="1")
    assert not records.add("reviews", "d", "f", "ann", {"decision": "accepted"}, key="1")
    records.add("reviews", "d", "g", "bob")
    assert [(entry.subject, entry.person) for entry in records.entries("reviews", "d")] == [("g", "bob"), ("f", "ann")]
    assert records.entries("reviews", "d", subject="f")[0].facts == {"decision": "accepted"}


def test_a_reader_does_not_wait_for_a_writer(records: Records) -> None:
    records.add("uploads", "d", "s", "ann")
    with alone(records.engine) as writing:
        writing.execute(LEDGERS["uploads"].delete())
        with reading(records.engine) as connection:
            connection.exec_driver_sql("PRAGMA busy_timeout=0")
            assert connection.execute(sa.select(LEDGERS["uploads"].c.subject)).scalars().all() == ["s"]
    assert records.entries("uploads", "d") == []


def test_the_latest_deployment_counts(records: Records) -> None:
    assert records.deployed("d") is None
    for model in ("student@1", "student@2"):
        records.add("deployments", "d", model, "ann")
    assert records.deployed("d") == "student@2"


def test_the_environment_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text('ui_port = 9001\nperson = "ann"\n')
    config = Config.read(tmp_path, {"WORKBENCH_PERSON": "bob"})
    assert (config.ui_port, config.person, config.service_port) == (9001, "bob", 8600)


@pytest.mark.parametrize("text, complaint", [("ui_prot = 1", "ui_prot"), ("ui_port = 'x'", "whole number"), ("= 3", "TOML")])
def test_a_wrong_setting_is_named_with_its_file(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "settings.toml").write_text(text)
    with pytest.raises(Invalid, match=complaint) as caught:
        Config.read(tmp_path, {})
    assert "settings.toml" in str(caught.value)


def test_no_secret_shows_in_the_text_of_the_settings(tmp_path: Path) -> None:
    config = Config.read(tmp_path, {"WORKBENCH_CVAT_TOKEN": "s3cret", "WORKBENCH_DATABASE_URL": "postgresql://u:s3cret@h/d"})
    assert "s3cret" not in repr(config) and "s3cret" not in str(config)

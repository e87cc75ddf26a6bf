"""EngineCache: what was written here comes back, what was not does not."""

from __future__ import annotations

import json
import logging
import shutil
import stat
import threading
from dataclasses import fields, replace
from pathlib import Path

import pytest

from workbench.inference.engine_cache import EngineCache, EngineKey

KEY = EngineKey("ab" * 32, "tensorrt 11.4.0", "Some GPU", "8.6", "13000 580.1", "1,8,64", "strongly typed")


def files(cache: EngineCache, ending: str) -> list[Path]:
    return sorted(cache.folder.glob(f"*{ending}"))


def test_what_was_written_comes_back_also_to_the_next_process(tmp_path: Path) -> None:
    EngineCache(tmp_path / "engines").write(KEY, b"an engine")
    cache = EngineCache(tmp_path / "engines")
    assert cache.read(KEY) == b"an engine"
    assert cache.read(KEY, "timing") is None
    cache.write(KEY, b"a newer engine")
    assert cache.read(KEY) == b"a newer engine" and len(files(cache, ".engine")) == 1


@pytest.mark.parametrize("field", [field.name for field in fields(EngineKey)])
def test_an_engine_of_another_graph_card_driver_library_or_build_is_not_taken(tmp_path: Path, field: str) -> None:
    cache = EngineCache(tmp_path)
    cache.write(KEY, b"an engine")
    assert cache.read(replace(KEY, **{field: "another"})) is None
    assert cache.read(KEY) == b"an engine"


def test_timings_hold_for_every_graph_on_the_same_card(tmp_path: Path) -> None:
    cache, other = EngineCache(tmp_path), replace(KEY, onnx_sha256="cd" * 32, profile="1,1,1")
    cache.write(KEY.of_timings(), b"timings", "timing")
    assert cache.read(other.of_timings(), "timing") == b"timings"
    assert cache.read(replace(other, gpu="another").of_timings(), "timing") is None


def test_the_folder_is_private(tmp_path: Path) -> None:
    (tmp_path / "engines").mkdir(mode=0o777)
    EngineCache(tmp_path / "engines").write(KEY, b"an engine")
    assert stat.S_IMODE((tmp_path / "engines").stat().st_mode) == 0o700
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in (tmp_path / "engines").iterdir())


@pytest.mark.parametrize("damage", [b"", b"an engina", b"an engine with more"])
def test_a_damaged_engine_is_refused_told_and_taken_away(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    cache = EngineCache(tmp_path)
    cache.write(KEY, b"an engine")
    files(cache, ".engine")[0].write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        assert cache.read(KEY) is None
    assert "sha256" in caplog.text and "built again" in caplog.text
    assert files(cache, ".engine") == files(cache, ".json") == []


def test_an_engine_from_elsewhere_is_refused_although_its_sidecar_fits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    foreign, cache = EngineCache(tmp_path / "foreign"), EngineCache(tmp_path / "ours")
    foreign.write(KEY, b"a program")
    for path in (*files(foreign, ".engine"), *files(foreign, ".json")):
        shutil.copy(path, cache.folder)
    with caplog.at_level(logging.WARNING):
        assert cache.read(KEY) is None
    assert "not written by this workbench" in caplog.text


def test_a_sidecar_that_was_changed_is_refused(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    for change in ({"sha256": "00" * 32}, {"key": {}}, {"seal": ""}, {"seal": None}, {"more": 1}):
        cache.write(KEY, b"an engine")
        sidecar = files(cache, ".json")[0]
        sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), **change}))
        assert cache.read(KEY) is None, change


@pytest.mark.parametrize("content", [b"", b"no json", b"[]", b"null", b"\xff\xfe"])
def test_a_sidecar_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    cache = EngineCache(tmp_path)
    cache.write(KEY, b"an engine")
    files(cache, ".json")[0].write_bytes(content)
    assert cache.read(KEY) is None


def test_a_sealed_engine_under_the_name_of_another_key_is_refused(tmp_path: Path) -> None:
    cache, other = EngineCache(tmp_path), replace(KEY, onnx_sha256="cd" * 32)
    cache.write(KEY, b"an engine")
    for path in (*files(cache, ".engine"), *files(cache, ".json")):
        shutil.copy(path, path.with_name(path.name.replace(KEY.digest[:32], other.digest[:32])))
    assert cache.read(other) is None
    assert cache.read(KEY) == b"an engine"


def test_a_missing_engine_file_means_building_again(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    cache.write(KEY, b"an engine")
    files(cache, ".engine")[0].unlink()
    assert cache.read(KEY) is None


def test_a_write_that_fails_leaves_the_old_engine_and_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = EngineCache(tmp_path)
    cache.write(KEY, b"an engine")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        cache.write(KEY, b"a newer engine")
    assert cache.read(KEY) == b"an engine" and files(cache, "") == sorted(
        [cache.folder / ".secret", *files(cache, ".engine"), *files(cache, ".json")])


def test_readers_and_writers_at_once_never_see_a_mixture(tmp_path: Path) -> None:
    engines = {bytes([number]) * 50_000 for number in range(4)}
    EngineCache(tmp_path).write(KEY, next(iter(engines)))
    seen, wrong = set(), []

    def work(data: bytes) -> None:
        cache = EngineCache(tmp_path)
        for _ in range(10):
            cache.write(KEY, data)
            found = cache.read(KEY)
            # None: another writer has just taken the file away that the sidecar named.
            (seen.add(found) if found in engines else wrong.append(found)) if found is not None else None

    threads = [threading.Thread(target=work, args=(data,)) for data in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and seen

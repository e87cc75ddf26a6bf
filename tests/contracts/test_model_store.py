"""What every ModelStore promises (workbench.ports.ModelStore); another adapter joins by one more parameter."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from doubles import graphs

from workbench.adapters.local_models import LocalModels
from workbench.errors import Conflict, Invalid, NotFound
from workbench.inference.graph import file_record
from workbench.model import ModelCard
from workbench.ports import ModelStore

Stores = Callable[[], ModelStore]


@pytest.fixture(params=["local"])
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> Stores:
    """Opens the same store again at each call, as another process would."""
    return {"local": lambda: LocalModels(tmp_path / "store")}[request.param]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "source"


@pytest.fixture
def card(source: Path) -> ModelCard:
    made = graphs.red_finder(source)
    (source / "labels.txt").write_text("red blue")
    return replace(made, files={**made.files, "labels.txt": file_record(source / "labels.txt")})


def test_a_registered_model_comes_back_with_its_card_and_files(stores: Stores, card: ModelCard, source: Path) -> None:
    assert stores().register(card, source) == card
    assert stores().refs() == ["finder@1"] and stores().card("finder@1") == card
    folder = stores().folder("finder@1")
    assert ModelCard.from_json(json.loads((folder / "card.json").read_text())) == card
    assert all((folder / name).read_bytes() == (source / name).read_bytes() for name in card.files)


def test_references_come_sorted(stores: Stores, card: ModelCard, source: Path) -> None:
    assert stores().refs() == []
    for name, version in (("zebra", "1"), ("ant", "2"), ("ant", "1.0.0")):
        stores().register(replace(card, name=name, version=version), source)
    assert stores().refs() == ["ant@1.0.0", "ant@2", "zebra@1"]


def test_registering_the_same_content_again_changes_nothing(stores: Stores, card: ModelCard, source: Path) -> None:
    stores().register(card, source)
    before = {path: path.stat().st_mtime_ns for path in stores().folder("finder@1").iterdir()}
    assert stores().register(card, source) == card
    assert {path: path.stat().st_mtime_ns for path in stores().folder("finder@1").iterdir()} == before


def test_another_content_under_the_same_reference_is_a_conflict(stores: Stores, card: ModelCard, source: Path) -> None:
    stores().register(card, source)
    with pytest.raises(Conflict, match="finder@1.*new version"):
        stores().register(replace(card, description="another"), source)
    (source / "labels.txt").write_text("blue red")
    other = replace(card, files={**card.files, "labels.txt": file_record(source / "labels.txt")})
    with pytest.raises(Conflict, match="finder@1"):
        stores().register(other, source)
    assert stores().card("finder@1") == card


def test_a_file_with_another_digest_than_its_card_says_is_refused_and_leaves_nothing(
        stores: Stores, card: ModelCard, source: Path, tmp_path: Path) -> None:
    (source / "model.onnx").write_bytes(b"swapped")
    with pytest.raises(Invalid, match="model.onnx.*sha256"):
        stores().register(card, source)
    assert stores().refs() == [] and not _files_below(tmp_path / "store")


def test_a_file_that_is_missing_is_refused_and_leaves_nothing(
    stores: Stores, card: ModelCard, source: Path, tmp_path: Path
) -> None:
    (source / "labels.txt").unlink()
    with pytest.raises(NotFound, match="labels.txt"):
        stores().register(card, source)
    assert stores().refs() == [] and not _files_below(tmp_path / "store")


def test_an_unknown_reference_is_not_found_and_names_what_there_is(
    stores: Stores, card: ModelCard, source: Path
) -> None:
    stores().register(card, source)
    for ask in (stores().card, stores().folder):
        with pytest.raises(NotFound, match="finder@2.*finder@1"):
            ask("finder@2")


@pytest.mark.parametrize("ref", ["../store@1", "finder@..", "finder", "finder@1/../1", "/etc@1", ".half@1", "finder@"])
def test_a_reference_that_would_leave_the_store_is_invalid(stores: Stores, ref: str) -> None:
    for ask in (stores().card, stores().folder):
        with pytest.raises(Invalid, match="name@version"):
            ask(ref)


def test_a_damaged_file_is_found_before_anything_opens_it(stores: Stores, card: ModelCard, source: Path) -> None:
    stores().register(card, source)
    file = stores().folder("finder@1") / "model.onnx"
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(Invalid, match="model.onnx.*sha256"):
        stores().folder("finder@1")


def test_two_that_register_at_once_give_one_version(stores: Stores, card: ModelCard, source: Path) -> None:
    errors: list[Exception] = []

    def register(description: str) -> None:
        try:
            stores().register(replace(card, description=description), source)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=register, args=(text,)) for text in ("same", "same", "other", "same")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Whoever came first stands; the others either found themselves there or were told of the conflict.
    assert {type(error) for error in errors} == {Conflict} and len(errors) in (1, 3)
    assert stores().card("finder@1").description == ("same" if len(errors) == 1 else "other")
    stores().folder("finder@1")


class TestLocalModels:
    def test_a_kill_while_writing_leaves_no_version_and_the_next_try_succeeds(
            self, card: ModelCard, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def killed(*_: object) -> None:
            raise KeyboardInterrupt

        store = LocalModels(tmp_path / "store")
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", killed)
            with pytest.raises(KeyboardInterrupt):
                store.register(card, source)
        assert store.refs() == []
        assert store.register(card, source) == card

    def test_half_written_folders_and_strangers_are_no_versions(
        self, card: ModelCard, source: Path, tmp_path: Path
    ) -> None:
        store = LocalModels(tmp_path / "store")
        store.register(card, source)
        (tmp_path / "store" / ".half-x").mkdir()
        (tmp_path / "store" / ".half-x" / "card.json").write_text("{}")
        (tmp_path / "store" / "finder" / "2").mkdir()
        (tmp_path / "store" / "note.txt").write_text("hello")
        assert store.refs() == ["finder@1"]

    def test_a_damaged_card_is_named(self, card: ModelCard, source: Path, tmp_path: Path) -> None:
        store = LocalModels(tmp_path / "store")
        store.register(card, source)
        file = tmp_path / "store" / "finder" / "1" / "card.json"
        file.chmod(0o644)
        for content in ("{", "[]", "{}"):
            file.write_text(content)
            with pytest.raises(Invalid, match="card"):
                store.card("finder@1")

    def test_a_model_file_called_card_json_is_refused(self, card: ModelCard, source: Path, tmp_path: Path) -> None:
        (source / "card.json").write_text("{}")
        with pytest.raises(Invalid, match="card.json"):
            LocalModels(tmp_path / "store").register(
                replace(card, files={**card.files, "card.json": file_record(source / "card.json")}), source)


def _files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]

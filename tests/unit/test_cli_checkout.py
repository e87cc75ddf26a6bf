"""`workbench checkout`: a version as a training gets it, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from workbench.annotation import Annotation
from workbench.cli import cli
from workbench.config import Config
from workbench.dataset import Frame, LabeledFrame, Manifest
from workbench.errors import Invalid, NotFound, WorkbenchError
from workbench.steps.retrain import lay_out
from workbench.taxonomy import Taxonomy
from workbench.wiring import Workbench

BOX = Annotation("cell", xyxy=(1, 1, 5, 5))


@pytest.fixture
def workbench(tmp_path: Path) -> Workbench:
    """cells@0.1.0: a frame in train, one in val, one in train that nobody looked at."""
    wb = Workbench(Config(home=tmp_path / "home"))
    frames = []
    for name, drawn, split in (("a.png", (BOX,), "train"), ("b/c.png", (), "val"), ("d.png", None, "train")):
        made = wb.blobs.put(name.encode())
        frame = Frame(name, 9, 9, made.md5, made.sha256, made.size_bytes)
        frames.append(LabeledFrame(frame, drawn, split))
    wb.datasets.publish("cells", Manifest(Taxonomy(("cell",)), tuple(frames)), "m", "ada <a@b.org>")
    return wb


def run(workbench: Workbench, *words: object) -> str:
    done = CliRunner().invoke(cli, ["--home", str(workbench.config.home), "checkout", *map(str, words)],
                              standalone_mode=False)
    if done.exception:
        raise done.exception
    return done.output


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_folder_is_what_a_training_gets(workbench: Workbench, tmp_path: Path) -> None:
    lay_out(workbench.datasets.manifest("cells@0.1.0"), workbench.blobs, "cells@0.1.0", tmp_path / "trained on")
    said = run(workbench, "cells", tmp_path / "new" / "data")
    assert "cells@0.1.0 is in" in said and "1 train, 1 val, 0 test frames, 1 labels" in said
    assert tree(tmp_path / "new") == {f"data/{name}": data for name, data in tree(tmp_path / "trained on").items()}
    assert (tmp_path / "new/data/frames/b/c.png").read_bytes() == b"b/c.png"


def test_an_empty_folder_is_filled_and_unlabelled_frames_come_when_asked_for(
        workbench: Workbench, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    run(workbench, "cells@0.1.0", tmp_path / "empty", "--unlabelled")
    listed = json.loads((tmp_path / "empty/unlabelled.json").read_text())["images"]
    assert [one["file_name"] for one in listed] == ["d.png"]
    assert (tmp_path / "empty/frames/d.png").exists()


@pytest.mark.parametrize(("version", "kind", "sentence"), [
    ("nothing", NotFound, "'nothing' does not exist"), ("cells@9.0.0", NotFound, "no version 9.0.0; there are 0.1.0"),
    ("cells@main", Invalid, "must read name@MAJOR.MINOR.PATCH"), ("../cells", Invalid, "must be lower-case letters"),
    ("cells@", Invalid, "must read name@")])
def test_a_version_there_is_not_is_refused_and_nothing_is_made(
        workbench: Workbench, tmp_path: Path, version: str, kind: type[WorkbenchError], sentence: str) -> None:
    with pytest.raises(kind, match=sentence):
        run(workbench, version, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_folder_that_holds_something_stays_as_it_is(workbench: Workbench, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(Invalid, match="mine is not empty, .* Name a folder that is not there yet"):
        run(workbench, "cells", tmp_path / "mine")
    with pytest.raises(Invalid, match="thesis.txt is a file"):
        run(workbench, "cells", tmp_path / "mine/thesis.txt")
    with pytest.raises(Invalid, match="cannot be written: .* Name a folder where you may write"):
        run(workbench, "cells", tmp_path / "mine/thesis.txt/data")
    assert tree(tmp_path / "mine") == {"thesis.txt": b"years of work"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "mine"]


@pytest.mark.parametrize(("damage", "kind", "sentence"), [
    (lambda blob: blob.unlink(), NotFound, "restore the store from its backup"),
    (lambda blob: (blob.chmod(0o644), blob.write_bytes(b"other")), Invalid, "frames/b/c.png of cells@0.1.0 has md5")])
def test_pixels_that_are_gone_or_damaged_leave_no_half_of_a_folder(
        workbench: Workbench, tmp_path: Path, damage, kind: type[WorkbenchError], sentence: str) -> None:
    frame = workbench.datasets.manifest("cells@0.1.0").by_name["b/c.png"].frame
    damage(workbench.blobs.path(frame.blob))
    with pytest.raises(kind, match=sentence):
        run(workbench, "cells", tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_version_without_a_label_to_learn_from_is_refused_as_a_training_would(
        workbench: Workbench, tmp_path: Path) -> None:
    manifest = workbench.datasets.manifest("cells@0.1.0")
    bare = Manifest(manifest.taxonomy, tuple(one for one in manifest.frames if one.frame.name != "a.png"))
    workbench.datasets.publish("bare", bare, "m", "ada <a@b.org>")
    with pytest.raises(Invalid, match="bare@0.1.0 has no label in its train split. Accept labelled frames"):
        run(workbench, "bare", tmp_path / "data")

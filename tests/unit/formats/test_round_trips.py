"""What we write, other people's readers read: Datumaro and pycocotools; and our own readers give it back unchanged."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from workbench.annotation import Annotation
from workbench.blobs import Blobs
from workbench.dataset import Frame, LabeledFrame, Manifest
from workbench.errors import Invalid, NotFound
from workbench.formats import coco, read_labeled_folder, voc, yolo
from workbench.formats.checkout import write_checkout
from workbench.taxonomy import Taxonomy

LABELS = ("dot", "red cell", "Zähler")


def made(blobs: Blobs, name: str, size: tuple[int, int], boxes, split: str | None) -> LabeledFrame:
    out = io.BytesIO()
    shade = sum(name.encode()) % 256
    Image.fromarray(np.full((size[1], size[0], 3), shade, np.uint8)).save(out, "PNG")
    stored = blobs.put(out.getvalue())
    annotations = None if boxes is None else tuple(
        Annotation(label, xyxy, attributes={"difficult": True} if index == 1 else {}) for index, (label, xyxy) in enumerate(boxes))
    return LabeledFrame(Frame(name, *size, blob=stored.md5, sha256=stored.sha256, size_bytes=stored.size_bytes), annotations, split)


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(str(tmp_path / "blobs"))


@pytest.fixture
def manifest(blobs: Blobs) -> Manifest:
    return Manifest(Taxonomy(LABELS), (
        made(blobs, "a.png", (100, 80), [("red cell", (1.5, 2.25, 50.75, 60)), ("dot", (0, 0, 100, 80))], "train"),
        made(blobs, "day 1/b.png", (640, 479), [("Zähler", (600.01, 470.99, 640, 479))], "val"),
        made(blobs, "c.png", (33, 77), [], "test"),
        made(blobs, "d.png", (50, 50), None, "train"),
        made(blobs, "e.png", (60, 50), [("dot", (3, 4, 5.5, 6.25))], "train")))


def drawn(frames) -> dict[str, set | None]:
    """md5 -> {(label, xyxy)}: what must survive, whatever the frame is called."""
    return {one.frame.blob: None if one.annotations is None else {(a.label, a.xyxy) for a in one.annotations} for one in frames}


@pytest.mark.parametrize("format", [coco, yolo, voc])
def test_our_own_reader_gives_back_what_was_written(format, manifest: Manifest, blobs: Blobs, tmp_path: Path) -> None:
    format.write(manifest, blobs, tmp_path / "out")
    taxonomy, frames = read_labeled_folder(tmp_path / "out")
    assert taxonomy == manifest.taxonomy and drawn(frames) == drawn(manifest.frames)
    assert {one.frame.blob: one.split for one in frames} == {one.frame.blob: one.split for one in manifest.frames}
    assert sorted(one.frame.name for one in frames) == ["a.png", "c.png", "d.png", "day 1/b.png", "e.png"]


@pytest.mark.parametrize("format", [coco, voc])
def test_datumaro_reads_what_was_written(format, manifest: Manifest, blobs: Blobs, tmp_path: Path) -> None:
    datumaro = pytest.importorskip("datumaro")
    format.write(manifest, blobs, tmp_path / "out")
    read = datumaro.Dataset.import_from(str(tmp_path / "out"), "coco_instances" if format is coco else "voc")
    names = [label.name for label in read.categories()[datumaro.AnnotationType.label]]
    assert [name for name in names if name in LABELS] == list(LABELS)
    found = {}
    for item in read:
        boxes = {(names[a.label], tuple(round(v, 2) for v in a.points)) for a in item.annotations
                 if a.type == datumaro.AnnotationType.bbox}
        found[item.id, item.subset] = boxes
    expected = {(one.frame.name.removesuffix(".png"), one.split): {(a.label, a.xyxy) for a in one.annotations}
                for one in manifest.labeled}
    assert {key: boxes for key, boxes in found.items() if key in expected} == expected
    assert all(not boxes for key, boxes in found.items() if key not in expected)


@pytest.mark.parametrize(("format", "ours"), [("coco_instances", "coco"), ("voc", "voc"), ("yolo", "yolo")])
def test_what_datumaro_writes_is_read(format: str, ours: str, manifest: Manifest, tmp_path: Path) -> None:
    datumaro = pytest.importorskip("datumaro")
    items = []
    for index, one in enumerate(manifest.labeled):
        media = datumaro.components.media.Image.from_numpy(
            np.full((one.frame.height, one.frame.width, 3), index * 40, np.uint8), ext=".png")
        boxes = [datumaro.Bbox(a.xyxy[0], a.xyxy[1], a.xyxy[2] - a.xyxy[0], a.xyxy[3] - a.xyxy[1], id=index * 10 + at + 1,
                               label=LABELS.index(a.label)) for at, a in enumerate(one.annotations)]
        items.append(datumaro.DatasetItem(f"f{index}", subset="train", media=media, annotations=boxes))
    made = datumaro.Dataset.from_iterable(items, categories=list(LABELS))
    made.export(str(tmp_path / "out"), format, save_media=True)
    _, frames = read_labeled_folder(tmp_path / "out")
    assert len(frames) == 4 and {one.split for one in frames} == {"train"}
    # Datumaro writes no XML for a picture on which nothing is: in VOC that means that nobody looked
    assert [one.annotations is None for one in frames] == [ours == "voc" and not one.annotations for one in manifest.labeled]
    for one, frame in zip(manifest.labeled, frames):
        got, wanted = (sorted((a.label, a.xyxy) for a in given.annotations or ()) for given in (frame, one))
        assert [label for label, _ in got] == [label for label, _ in wanted]
        # Datumaro's darknet YOLO text has six decimals: half a millionth of 640 pixels
        assert np.allclose([xyxy for _, xyxy in got], [xyxy for _, xyxy in wanted], atol=0.011)


def test_a_checkout_is_what_a_training_script_reads(manifest: Manifest, blobs: Blobs, tmp_path: Path) -> None:
    from pycocotools.coco import COCO

    folder = write_checkout(manifest, blobs, tmp_path / "out", ref="cells@0.1.0")
    assert json.loads((folder / "dataset.json").read_text()) == {"ref": "cells@0.1.0", "digest": manifest.digest,
                                                                 "labels": list(LABELS)}
    for split, names in (("train", ["a.png", "e.png"]), ("val", ["day 1/b.png"]), ("test", ["c.png"])):
        read = COCO(str(folder / f"{split}.json"))
        assert [c["id"] for c in read.loadCats(read.getCatIds())] == [0, 1, 2]
        assert [image["file_name"] for image in read.loadImgs(read.getImgIds())] == names
        for image in read.loadImgs(read.getImgIds()):
            assert (folder / "frames" / image["file_name"]).read_bytes() == blobs.get(manifest.by_name[image["file_name"]].frame.blob)
    train = COCO(str(folder / "train.json"))
    first = train.loadAnns(train.getAnnIds(imgIds=[1]))
    assert [(a["category_id"], a["bbox"], a["area"]) for a in first] == [
        (1, [1.5, 2.25, 49.25, 57.75], 2844.1875), (0, [0, 0, 100, 80], 8000)]
    assert not (folder / "frames" / "d.png").exists(), "a frame that nobody looked at is not trained on"


def test_a_checkout_links_pixels_instead_of_copying_them(manifest: Manifest, blobs: Blobs, tmp_path: Path) -> None:
    folder = write_checkout(manifest, blobs, tmp_path / "out")
    assert (folder / "frames" / "a.png").stat().st_ino == blobs.path(manifest.by_name["a.png"].frame.blob).stat().st_ino


def test_a_checkout_goes_into_a_new_folder_and_needs_its_blobs(manifest: Manifest, blobs: Blobs, tmp_path: Path) -> None:
    write_checkout(manifest, blobs, tmp_path / "out")
    with pytest.raises(Invalid, match="not empty"):
        write_checkout(manifest, blobs, tmp_path / "out")
    blobs.path(manifest.by_name["a.png"].frame.blob).unlink()
    with pytest.raises(NotFound):
        write_checkout(manifest, blobs, tmp_path / "other")
    assert not (tmp_path / "other" / "dataset.json").exists()

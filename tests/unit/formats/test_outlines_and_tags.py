"""Polygons, masks and tags: what label files say of them is read, what is wrong is named, what we write others read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as masks
from pycocotools.coco import COCO

from workbench.annotation import Annotation
from workbench.blobs import Blobs
from workbench.dataset import Frame, LabeledFrame, Manifest
from workbench.errors import Invalid
from workbench.formats import coco, read_labeled_folder, yolo
from workbench.formats.checkout import write_checkout
from workbench.formats.labels import polygon_area
from workbench.formats.limits import Limits
from workbench.formats.outlines import decode_rle, joined, of_mask, of_parts
from workbench.formats.source import read_source
from workbench.taxonomy import Taxonomy

SIZE = (100, 80)
TRIANGLE = [10, 10, 50, 10, 10, 40]


def picture(path: Path, shade: int = 0, size: tuple[int, int] = SIZE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), shade % 256, np.uint8)).save(path)
    return path


def filled(*rings: Any, size: tuple[int, int] = SIZE) -> np.ndarray:
    """The pixels inside outlines, by OpenCV with 8 times the resolution: a pixel counts from its half on."""
    fine = np.zeros((size[1] * 8, size[0] * 8), np.uint8)
    cv2.fillPoly(fine, [np.round(np.reshape(ring, (-1, 2)) * 8 - 0.5).astype(np.int32) for ring in rings], 1)
    return (fine.reshape(size[1], 8, size[0], 8).mean(axis=(1, 3)) >= 0.5).astype(np.uint8)


def uncompressed(mask: np.ndarray) -> dict[str, Any]:
    """COCO's run lengths of an (h, w) mask as a list, column by column, zeros first."""
    flat = [0, *mask.T.ravel().tolist()]
    starts = [at for at in range(1, len(flat)) if flat[at] != flat[at - 1]]
    ends = [0, *[at - 1 for at in starts], len(flat) - 1]
    return {"size": list(mask.shape), "counts": np.diff(ends).tolist()}


def compressed(mask: np.ndarray) -> dict[str, Any]:
    run = masks.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(run["size"]), "counts": run["counts"].decode()}


def frames_of(folder: Path, *annotations: dict[str, Any], **image: Any) -> Any:
    """(source, frames) of one picture with COCO annotations."""
    picture(folder / "a.png")
    rows = [{"id": at, "image_id": 1, "category_id": 1, **one} for at, one in enumerate(annotations, 1)]
    (folder / "labels.json").write_text(json.dumps({
        "images": [{"id": 1, "file_name": "a.png", "width": SIZE[0], "height": SIZE[1], **image}], "annotations": rows,
        "categories": [{"id": 1, "name": "cell"}, {"id": 2, "name": "dot"}]}))
    return read_source(folder), read_labeled_folder(folder)[1]


class TestCoco:
    def test_a_polygon_is_read_with_the_box_around_it(self, tmp_path: Path) -> None:
        source, (frame,) = frames_of(tmp_path, {"segmentation": [TRIANGLE], "bbox": [10, 10, 40, 30]})
        (drawn,) = frame.annotations
        assert (drawn.xyxy, drawn.polygon) == ((10, 10, 50, 40), ((10, 10), (50, 10), (10, 40)))
        assert source.format == "coco" and not source.refused and not source.warnings

    def test_a_polygon_needs_no_bbox_and_a_box_written_as_a_polygon_stays_a_box(self, tmp_path: Path) -> None:
        rectangle = [5, 5, 20, 5, 20, 15, 5, 15, 5, 5]
        _, (frame,) = frames_of(tmp_path, {"segmentation": [TRIANGLE]},
                                {"segmentation": [rectangle], "bbox": [5, 5, 15, 10]},
                                {"segmentation": [], "bbox": [1, 1, 3, 3]})
        assert [(one.xyxy, one.polygon is not None) for one in frame.annotations] == [
            ((10, 10, 50, 40), True), ((5, 5, 20, 15), False), ((1, 1, 4, 4), False)]

    @pytest.mark.parametrize("written", [uncompressed, compressed])
    def test_a_mask_becomes_the_outline_of_exactly_its_pixels(self, tmp_path: Path, written: Any) -> None:
        mask = cv2.circle(np.zeros((80, 100), np.uint8), (40, 40), 20, 1, -1)
        cv2.circle(mask, (40, 40), 8, 0, -1)  # a hole
        mask[5:9, 70:90] = 1  # and a part of its own
        _, (frame,) = frames_of(tmp_path, {"segmentation": written(mask), "iscrowd": 0})
        (drawn,) = frame.annotations
        assert polygon_area(drawn.polygon) == mask.sum() and drawn.xyxy == (20, 5, 90, 61)
        assert (filled(drawn.polygon) == mask).all()

    def test_parts_are_joined_and_overlapping_ones_counted_once(self, tmp_path: Path) -> None:
        parts = [[10, 10, 30, 10, 30, 30, 10, 30], [50, 50, 70, 50, 70, 60]]
        over = [[10, 10, 30, 10, 30, 30, 10, 30], [20, 20, 40, 20, 40, 40, 20, 40]]
        _, (frame,) = frames_of(tmp_path, {"segmentation": parts}, {"segmentation": over})
        apart, together = frame.annotations
        assert polygon_area(apart.polygon) == pytest.approx(400 + 100) and apart.xyxy == (10, 10, 70, 60)
        assert polygon_area(together.polygon) == pytest.approx(700, rel=0.02)
        np.testing.assert_allclose(together.xyxy, (10, 10, 40, 40), atol=0.2)

    def test_tags_of_a_picture_are_read_by_id_and_by_name(self, tmp_path: Path) -> None:
        source, (frame,) = frames_of(tmp_path, {"bbox": [1, 2, 3, 4]}, tags=[2, "cell", 2])
        assert [(one.label, one.xyxy) for one in frame.annotations] == [
            ("cell", (1, 2, 4, 6)), ("dot", None), ("cell", None)]
        assert not source.refused

    def test_tags_alone_are_labels_and_an_empty_list_means_that_somebody_looked(self, tmp_path: Path) -> None:
        for name in ("a", "b", "c"):
            picture(tmp_path / f"{name}.png", ord(name))
        (tmp_path / "tags.json").write_text(json.dumps({
            "images": [{"id": 1, "file_name": "a.png", "tags": [7]}, {"id": 2, "file_name": "b.png", "tags": []},
                       {"id": 3, "file_name": "c.png"}], "categories": [{"id": 7, "name": "day"}]}))
        _, frames = read_labeled_folder(tmp_path)
        assert [None if one.annotations is None else [tag.label for tag in one.annotations] for one in frames] == [
            ["day"], [], None]

    @pytest.mark.parametrize(("wrong", "said"), [
        ([[1, 2, 3, 4]], "at least three points"), ([[1, 2, 3, 4, 5]], "at least three points"), ("x", "neither a mask"),
        ([["a", 2, 30, 4, 50, 60]], "not a finite number"), ([[1, 1, 2, 2, 3, 3]], "has no area"),
        ([[200, 200, 300, 200, 300, 300]], "100% outside"), ([[float("nan"), 2, 30, 4, 50, 60]], "not a finite number"),
        ([[1, 2, float("inf"), 4, 50, 60], TRIANGLE], "not a finite number"), ([None], "neither a mask"),
        ({"size": [80, 100], "counts": [1, 2]}, "3 pixels together, the size \\[80, 100\\] has 8000"),
        ({"size": [80, 100], "counts": "\x01"}, "no run-length encoding"), ({"size": [0, 1], "counts": []}, "size"),
        ({"size": [80, 100], "counts": "oooooooooo"}, "no run-length encoding"),
        ({"size": [10, 10], "counts": [50, 50]}, "its mask is for 10 x 10 pixels"), ({"counts": [1]}, "has the size None"),
        ({"size": [99999, 99999], "counts": [99999 * 99999]}, "larger than any picture"),
        ({"size": [80, 100], "counts": [8000]}, "mask is empty"), ({"size": [80, 100], "counts": None}, "neither a string"),
        ({"size": [80, 100], "counts": [-1, 8001]}, "neither a string"),
    ])
    def test_a_bad_outline_is_refused_by_its_annotation_and_the_others_go_on(self, tmp_path: Path, wrong: Any,
                                                                            said: str) -> None:
        from workbench.formats.labels import place
        source, (frame,) = frames_of(tmp_path, {"segmentation": wrong}, {"segmentation": [TRIANGLE]})
        placed = place(source.images[0].labels, "a.png", SIZE, SIZE, 1, "human:ann")
        refused = {**source.refused, **placed.refused}
        assert list(refused) == ["labels.json annotation 1"] and len(frame.annotations) == 1
        with pytest.raises(AssertionError, match=said):
            raise AssertionError(refused["labels.json annotation 1"])

    def test_a_bad_outline_beside_a_good_box_leaves_the_box_and_says_so(self, tmp_path: Path) -> None:
        source, (frame,) = frames_of(tmp_path, {"segmentation": [[1, 2]], "bbox": [1, 2, 3, 4]})
        assert frame.annotations[0].xyxy == (1, 2, 4, 6) and frame.annotations[0].polygon is None
        assert "its bbox is taken instead" in source.warnings["labels.json annotation 1"]

    @pytest.mark.parametrize(("tags", "place", "said"), [
        ("day", "labels.json image a.png tags", "instead of a list of category ids"),
        ({"1": 1}, "labels.json image a.png tags", "instead of a list"), ([9], "labels.json image a.png tags 9", "is no category"),
        ([True], "labels.json image a.png tags True", "is no category"), ([[1]], "labels.json image a.png tags [1]", "is no category"),
        (["day"], "labels.json image a.png tags day", "known: 1, 2")])
    def test_bad_tags_are_refused_with_their_picture(self, tmp_path: Path, tags: Any, place: str, said: str) -> None:
        source, (frame,) = frames_of(tmp_path, {"segmentation": [TRIANGLE]}, tags=tags)
        assert said in source.refused[place] and len(frame.annotations) == 1

    def test_a_polygon_that_leaves_the_picture_is_cut_to_it(self, tmp_path: Path) -> None:
        _, (frame,) = frames_of(tmp_path, {"segmentation": [[-10, 10, 40, 10, 40, 30, -10, 30]]})
        assert frame.annotations[0].xyxy == (0, 10, 40, 30) and polygon_area(frame.annotations[0].polygon) == 800


class TestYolo:
    def folder(self, root: Path, line: str) -> Path:
        picture(root / "images" / "a.png")
        (root / "labels").mkdir()
        (root / "labels" / "a.txt").write_text(line)
        (root / "data.yaml").write_text(yaml.safe_dump({"names": ["cell", "dot"]}))
        return root

    def test_polygons_and_boxes_stand_in_one_file(self, tmp_path: Path) -> None:
        source = read_source(self.folder(tmp_path, "1 .1 .125 .5 .125 .1 .5\n0 .5 .5 .2 .25\n"))
        _, (frame,) = read_labeled_folder(tmp_path)
        assert [(one.label, one.polygon, one.xyxy) for one in frame.annotations] == [
            ("dot", ((10, 10), (50, 10), (10, 40)), (10, 10, 50, 40)), ("cell", None, (40, 30, 60, 50))]
        assert not source.refused

    @pytest.mark.parametrize(("line", "said"), [
        ("0 .1 .1 .2 .1 .2 .2 .3", "has 8 numbers"), ("0 .1 .1 .2 .1", None), ("0 .1 .1 .2 .1 .2 1.7", "outside 0..1"),
        ("0 .1 .1 .2 .1 .2 nan", "outside 0..1"), ("7 .1 .1 .2 .1 .2 .2", "names class '7'")])
    def test_a_bad_polygon_is_refused_by_its_line(self, tmp_path: Path, line: str, said: str | None) -> None:
        source = read_source(self.folder(tmp_path, f"{line}\n1 .1 .125 .5 .125 .1 .5\n"))
        assert list(source.refused) == ([] if said is None else ["labels/a.txt line 1"])
        assert said is None or said in source.refused["labels/a.txt line 1"]
        assert source.images[0].labels.boxes[-1].polygon is not None


class TestFoldersOfClasses:
    def made(self, root: Path, *paths: str) -> Path:
        for at, path in enumerate(paths):
            picture(root / path, at * 7)
        return root

    def test_pictures_are_tagged_with_the_folder_below_their_split(self, tmp_path: Path) -> None:
        self.made(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", "train/dog/3.jpg", "val/cat/4.jpg", "test/dog/5.jpg")
        source = read_source(tmp_path)
        taxonomy, frames = read_labeled_folder(tmp_path)
        assert source.format == "folders" and taxonomy.labels == ("cat", "dog")
        assert sorted((one.frame.name, one.annotations[0].label, one.split) for one in frames) == [
            ("cat/1.jpg", "cat", "train"), ("cat/4.jpg", "cat", "val"), ("dog/2.jpg", "dog", "train"),
            ("dog/3.jpg", "dog", "train"), ("dog/5.jpg", "dog", "test")]
        assert all(one.annotations[0].xyxy is None for one in frames)
        assert "tagged with its folder's name: cat, dog" in source.warnings["folders"]

    def test_the_data_set_may_lie_in_one_more_folder_and_its_test_pictures_without_answers(self, tmp_path: Path) -> None:
        self.made(tmp_path, "pets/train/cat/1.jpg", "pets/train/dog/2.jpg", "pets/valid/dog/3.jpg", "pets/test/4.jpg")
        (tmp_path / "pets" / "README.md").write_text("pets")
        _, frames = read_labeled_folder(tmp_path)
        assert {Path(one.frame.name).name: (one.split, one.annotations and one.annotations[0].label) for one in frames} == {
            "1.jpg": ("train", "cat"), "2.jpg": ("train", "dog"), "3.jpg": ("val", "dog"), "4.jpg": ("test", None)}

    @pytest.mark.parametrize("paths", [
        ("monday/1.jpg", "tuesday/2.jpg"),  # how people sort pictures
        ("site a/cam 1/1.jpg", "site b/cam 1/2.jpg"),
        ("train/1.jpg", "val/2.jpg"), ("train/images/1.jpg", "val/images/2.jpg"),
        ("train/video 1/1.jpg", "train/video 2/2.jpg", "val/video 3/3.jpg"),  # each video in one split
        ("train/day/1.jpg", "val/day/2.jpg"),  # one class says nothing
        ("train/cat/1.jpg", "train/dog/2.jpg", "elsewhere/3.jpg"), ("train/a/b/1.jpg", "train/c/d/2.jpg"),
        ("train/images/1.jpg", "train/masks/2.jpg"), ("1.jpg", "2.jpg"),
    ])
    def test_pictures_sorted_into_folders_are_not_taken_for_labels(self, tmp_path: Path, paths: tuple[str, ...]) -> None:
        source = read_source(self.made(tmp_path, *paths))
        assert source.format == "images" and source.taxonomy.labels == ()
        assert all(one.labels.boxes is None for one in source.images)

    def test_where_folders_may_be_labels_the_way_to_say_so_is_told(self, tmp_path: Path) -> None:
        source = read_source(self.made(tmp_path, "cat/1.jpg", "dog/2.jpg"))
        assert "put them below train/ (train/cat/...)" in source.warnings["folders"]

    def test_label_files_win_over_folders(self, tmp_path: Path) -> None:
        self.made(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg")
        (tmp_path / "labels.json").write_text(json.dumps({
            "images": [{"id": 1, "file_name": "train/cat/1.jpg"}], "categories": [{"id": 1, "name": "eye"}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5]}]}))
        source = read_source(tmp_path)
        assert source.format == "coco" and source.taxonomy.labels == ("eye",)

    def test_a_folder_whose_name_is_no_label_is_refused_and_its_pictures_come_without(self, tmp_path: Path) -> None:
        source = read_source(self.made(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", "train/a\u200bb/3.jpg"))
        assert "is no usable label" in source.refused["train/a\u200bb"]
        assert [one.labels.boxes is None for one in source.images].count(True) == 1

    def test_an_archive_of_classes_is_read_too(self, tmp_path: Path) -> None:
        self.made(tmp_path / "in", "train/cat/1.jpg", "train/dog/2.jpg")
        packed = shutil.make_archive(str(tmp_path / "pets"), "zip", tmp_path / "in")
        assert read_labeled_folder(Path(packed), Limits())[0].labels == ("cat", "dog")


@pytest.fixture
def manifest(tmp_path: Path) -> tuple[Manifest, Blobs]:
    blobs = Blobs(str(tmp_path / "blobs"))

    def frame(name: str, annotations: tuple[Annotation, ...] | None, split: str) -> LabeledFrame:
        made = blobs.put(picture(tmp_path / "made" / name, sum(name.encode())).read_bytes())
        return LabeledFrame(Frame(name, *SIZE, made.md5, made.sha256, made.size_bytes), annotations, split)

    mask = filled([20, 20, 60, 20, 60, 50])
    points = ((10.0, 10.0), (50.25, 10.0), (10.0, 40.5))
    return Manifest(Taxonomy(("dot", "cell")), (
        frame("a.png", (Annotation("cell", polygon=points), Annotation("dot", (1, 2, 30, 40)), Annotation("dot")), "train"),
        frame("b.png", (Annotation("cell", mask=compressed(mask)),), "train"),
        frame("c.png", (Annotation("dot"), Annotation("cell")), "val"), frame("d.png", (), "test"),
        frame("e.png", None, "train"))), blobs


class TestWritten:
    def test_pycocotools_opens_a_checkout_with_polygons_masks_and_tags(self, manifest: Any, tmp_path: Path) -> None:
        given, blobs = manifest
        folder = write_checkout(given, blobs, tmp_path / "out", ref="shapes@0.1.0")
        train = COCO(str(folder / "train.json"))
        assert {one["file_name"]: one["tags"] for one in train.imgs.values()} == {"a.png": [0], "b.png": []}
        polygon, box, mask = (train.anns[at] for at in (1, 2, 3))
        assert polygon["segmentation"] == [[10, 10, 50.25, 10, 10, 40.5]] and polygon["category_id"] == 1
        assert polygon["bbox"] == [10, 10, 40.25, 30.5] and polygon["area"] == pytest.approx(40.25 * 30.5 / 2)
        assert abs(int(train.annToMask(polygon).sum()) - polygon["area"]) < 40  # the pixels on its rim
        assert (box["segmentation"], box["area"]) == ([], 29 * 38)
        wanted = filled([20, 20, 60, 20, 60, 50])
        assert (train.annToMask(mask) == wanted).all() and mask["area"] == wanted.sum()
        ys, xs = np.nonzero(wanted)
        assert mask["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
        val = json.loads((folder / "val.json").read_text())
        assert [one["tags"] for one in val["images"]] == [[0, 1]] and val["annotations"] == []

    def test_what_we_write_as_coco_comes_back_with_polygons_and_tags(self, manifest: Any, tmp_path: Path) -> None:
        given, blobs = manifest
        coco.write(given, blobs, tmp_path / "out")
        taxonomy, frames = read_labeled_folder(tmp_path / "out")
        back = {one.frame.name: one for one in frames}
        first = {(a.label, a.xyxy, a.polygon) for a in back["a.png"].annotations}
        assert taxonomy == given.taxonomy and first == {
            ("cell", (10, 10, 50.25, 40.5), ((10, 10), (50.25, 10), (10, 40.5))), ("dot", (1, 2, 30, 40), None),
            ("dot", None, None)}
        (mask,) = back["b.png"].annotations
        assert (filled(mask.polygon) == filled([20, 20, 60, 20, 60, 50])).all()
        assert {a.label for a in back["c.png"].annotations} == {"dot", "cell"} and back["d.png"].annotations == ()
        assert back["e.png"].annotations is None

    def test_what_we_write_as_yolo_comes_back_with_polygons(self, manifest: Any, tmp_path: Path) -> None:
        given, blobs = manifest
        yolo.write(given, blobs, tmp_path / "out")
        _, frames = read_labeled_folder(tmp_path / "out")
        first = next(one for one in frames if one.frame.name == "a.png")
        assert {(a.label, a.polygon is None) for a in first.annotations} == {("cell", False), ("dot", True)}
        (polygon,) = (a.polygon for a in first.annotations if a.polygon)
        np.testing.assert_allclose(polygon, ((10, 10), (50.25, 10), (10, 40.5)), atol=0.011)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 0.9))
def test_any_mask_survives_the_way_to_an_outline_and_back(seed: int, share: float) -> None:
    """Specks, holes in holes, one-pixel bridges: pycocotools' run lengths in, the same pixels out."""
    dice = np.random.default_rng(seed)
    mask = (cv2.blur(dice.random((24, 31)), (3, 3)) < share * 0.7 + 0.15).astype(np.uint8)
    for run in (compressed(mask), uncompressed(mask)):
        assert (decode_rle(run) == mask).all()
    if not mask.any():
        with pytest.raises(Invalid, match="mask is empty"):
            of_mask(mask)
        return
    ring = of_mask(mask)
    assert (filled(ring, size=(31, 24)) == mask).all() or len(ring) > 400  # MOST_RINGS leaves specks out
    assert polygon_area(ring.tolist()) <= mask.sum() + 1e-6


def test_the_specks_of_a_noisy_mask_are_left_out_instead_of_an_endless_outline() -> None:
    mask = np.zeros((200, 200), np.uint8)
    mask[::4, ::4] = 1
    mask[50:150, 50:150] = 1
    ring = of_mask(mask)
    assert 10_000 <= polygon_area(ring.tolist()) <= 10_064 and len(ring) < 1000


def test_a_ring_of_one_part_is_that_part_and_a_hole_takes_its_area_away() -> None:
    square = np.array([(0, 0), (10, 0), (10, 10), (0, 10)], float)
    hole = np.array([(2, 2), (2, 4), (4, 4), (4, 2)], float)
    assert (joined([square]) == square).all() and polygon_area(joined([square, hole]).tolist()) == 96
    assert polygon_area(of_parts([square, square + 20]).tolist()) == 200

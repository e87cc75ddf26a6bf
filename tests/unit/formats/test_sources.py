"""COCO, YOLO and VOC folders, and which of them a folder is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from workbench.errors import Invalid, NotFound
from workbench.formats import read_labeled_folder, write_coco_folder
from workbench.formats.source import Source, names_of, open_source, read_source, split_of


def picture(path: Path, number: int = 0, size: tuple[int, int] = (100, 80)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), number % 256, np.uint8)).save(path)
    return path


def coco(images=None, annotations=(), categories=({"id": 1, "name": "cell"}, {"id": 2, "name": "dot"})) -> dict:
    images = images or [{"id": 1, "file_name": "a.jpg", "width": 100, "height": 80},
                        {"id": 2, "file_name": "b.jpg", "width": 100, "height": 80}]
    return {"images": list(images), "annotations": list(annotations), "categories": list(categories)}


def box(key: int, image: int = 1, category: object = 1, bbox: object = (10, 10, 20, 20), **more) -> dict:
    return {"id": key, "image_id": image, "category_id": category, "bbox": bbox if not isinstance(bbox, tuple) else list(bbox),
            **more}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, name in enumerate(("a.jpg", "b.jpg", "c.jpg")):
        picture(tmp_path / "images" / name, index * 60)
    return tmp_path


def boxes_of(source: Source) -> dict[str, list[tuple] | None]:
    """name -> [(label, values)], None where nobody looked."""
    return {one.name: None if one.labels.boxes is None else [(b.label, b.values) for b in one.labels.boxes]
            for one in source.images}


# COCO

def test_coco_tells_labelled_empty_and_unseen_pictures_apart(folder: Path) -> None:
    (folder / "labels.json").write_text(json.dumps(coco(annotations=[box(1)])))
    source = read_source(folder)
    assert source.format == "coco" and source.taxonomy.labels == ("cell", "dot") and not source.refused
    assert boxes_of(source) == {"a.jpg": [("cell", (10, 10, 30, 30))], "b.jpg": [], "c.jpg": None}


def test_coco_without_annotations_means_that_nobody_looked(folder: Path) -> None:
    content = coco()
    del content["annotations"]
    (folder / "labels.json").write_text(json.dumps(content))
    assert boxes_of(read_source(folder)) == {"a.jpg": None, "b.jpg": None, "c.jpg": None}


@pytest.mark.parametrize(("annotation", "where", "why"), [
    (box(7, category=9), "annotation 7", "unknown category '9'"),
    (box(7, category=None), "annotation 7", "unknown category"),
    (box(7, image=77), "annotation 7", "belongs to image '77', which the file does not list"),
    (box(1), "annotation 1 (entry 2)", "an id that another annotation has already"),
    (box(7, bbox=[1, 2, 3]), "annotation 7", "no bbox of four numbers"),
    (box(7, bbox=None), "annotation 7", "no bbox of four numbers"),
    ("nonsense", "annotation entry 2", "is not an object"),
])
def test_a_bad_coco_annotation_is_refused_by_its_id_and_the_rest_goes_on(folder: Path, annotation: object, where: str,
                                                                         why: str) -> None:
    (folder / "labels.json").write_text(json.dumps(coco(annotations=[box(1), annotation, box(3, image=2)])))
    source = read_source(folder)
    assert list(source.refused) == [f"labels.json {where}"] and why in source.refused[f"labels.json {where}"]
    assert [len(boxes or ()) for boxes in boxes_of(source).values()] == [1, 1, 0]


@pytest.mark.parametrize(("bbox", "why"), [
    ([float("nan"), 1, 5, 5], "not a finite number"), (["x", 1, 5, 5], "not a finite number"), ([1, 1, 0, 5], "no area"),
    ([90, 70, 100, 100], "outside the picture of 100 x 80"),
])
def test_a_coco_box_that_cannot_be_is_refused_when_it_meets_its_picture(folder: Path, bbox: list, why: str) -> None:
    (folder / "labels.json").write_text(json.dumps(coco(annotations=[box(1), box(2, bbox=bbox)])))
    _, frames = read_labeled_folder(folder)
    assert len(frames[0].annotations) == 1
    from workbench.formats.labels import place
    refused = place(read_source(folder).images[0].labels, "a.jpg", (100, 80), (100, 80), 1, "human:ana").refused
    assert why in refused["labels.json annotation 2"]


def test_coco_images_without_a_file_or_listed_twice_are_refused(folder: Path) -> None:
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "gone.jpg"}, {"id": 1, "file_name": "b.jpg"},
              {"id": 4, "file_name": "a.jpg"}, {"id": 5, "file_name": "../../etc/passwd"}, {"file_name": "c.jpg"}]
    (folder / "labels.json").write_text(json.dumps(coco(images, [box(1), box(2, image=2), box(3, image=4)])))
    source = read_source(folder)
    assert {key: value.split(";")[0] for key, value in source.refused.items()} == {
        "labels.json image gone.jpg": "its file is not in the upload (or several could be meant)",
        "labels.json image b.jpg": "has id 1, which images/a.jpg has already",
        "labels.json image a.jpg": "is listed twice",
        "labels.json image ../../etc/passwd": "its file is not in the upload (or several could be meant)",
        "labels.json image entry 6": "has no id or no file_name"}
    assert boxes_of(source)["a.jpg"] == [("cell", (10, 10, 30, 30))]


def test_a_json_that_is_cut_off_is_named_and_the_pictures_go_on(folder: Path) -> None:
    (folder / "labels.json").write_text(json.dumps(coco(annotations=[box(1)]))[:-20])
    source = read_source(folder)
    assert source.format == "images" and "is not JSON" in source.refused["labels.json"] and len(source.images) == 3


def test_a_json_that_nests_without_end_is_named(folder: Path) -> None:
    (folder / "labels.json").write_text("[" * 100_000)
    assert "is not JSON" in read_source(folder).refused["labels.json"]


def test_coco_categories_are_ordered_by_id_and_unusable_ones_refused(folder: Path) -> None:
    categories = [{"id": 9, "name": "late"}, {"id": 3, "name": " early "}, {"id": 9, "name": "twice"}, {"id": 4, "name": ""}]
    (folder / "labels.json").write_text(json.dumps(coco(annotations=[box(1, category=4)], categories=categories)))
    source = read_source(folder)
    assert source.taxonomy.labels == ("early", "late")
    assert sorted(source.refused) == ["labels.json category 4", "labels.json category 9"]


def test_a_crowd_region_is_left_out_with_a_warning(folder: Path) -> None:
    (folder / "labels.json").write_text(json.dumps(coco(annotations=[box(1, iscrowd=1), box(2)])))
    source = read_source(folder)
    assert "crowd" in source.warnings["labels.json annotation 1"] and len(boxes_of(source)["a.jpg"]) == 1


def test_coco_splits_are_in_the_names_of_files_or_folders(tmp_path: Path) -> None:
    for split, name in (("train2017", "1.jpg"), ("val2017", "2.jpg")):
        picture(tmp_path / split / name)
        content = coco([{"id": 1, "file_name": name}])
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    picture(tmp_path / "train2017" / "unlisted.jpg")
    source = read_source(tmp_path)
    assert {one.name: one.labels.split for one in source.images} == {"1.jpg": "train", "2.jpg": "val", "unlisted.jpg": "train"}
    assert {one.name: one.labels.boxes for one in source.images} == {"1.jpg": (), "2.jpg": (), "unlisted.jpg": None}


def test_roboflow_s_coco_layout_is_read(tmp_path: Path) -> None:
    for index, split in enumerate(("train", "valid", "test")):
        picture(tmp_path / "export" / split / f"{split}.jpg", index)
        content = coco([{"id": 0, "file_name": f"{split}.jpg"}], [box(0, image=0)])
        (tmp_path / "export" / split / "_annotations.coco.json").write_text(json.dumps(content))
    source = read_source(tmp_path)
    assert {one.name: (one.labels.split, len(one.labels.boxes)) for one in source.images} == {
        "train.jpg": ("train", 1), "valid.jpg": ("val", 1), "test.jpg": ("test", 1)}


# YOLO

def yolo(folder: Path, config: dict | None = None, **texts: str) -> Path:
    (folder / "data.yaml").write_text(yaml.safe_dump(config or {"names": ["cell", "dot"]}))
    for name, text in texts.items():
        (folder / "labels").mkdir(exist_ok=True)
        (folder / "labels" / f"{name}.txt").write_text(text)
    return folder


def test_yolo_tells_labelled_empty_and_unseen_pictures_apart(folder: Path) -> None:
    source = read_source(yolo(folder, a="1 0.5 0.5 0.2 0.25\n\n0 0.1 0.1 0.1 0.1\n", b=""))
    assert source.format == "yolo" and source.taxonomy.labels == ("cell", "dot") and not source.refused
    assert boxes_of(source) == {"a.jpg": [("dot", (.5, .5, .2, .25)), ("cell", (.1, .1, .1, .1))], "b.jpg": [], "c.jpg": None}
    _, frames = read_labeled_folder(folder)
    assert sorted(a.xyxy for a in frames[0].annotations) == [(5, 4, 15, 12), (40, 30, 60, 50)]


@pytest.mark.parametrize(("line", "why"), [
    ("0 0.5 0.5 0.2", "has 4 numbers"), ("0 0.5 0.5 0.2 0.2 0.9", "has 6 numbers"),
    ("0 .1 .1 .2 .1 .2 .2 .3", "has 8 numbers"), ("5 0.5 0.5 0.2 0.2", "names class '5', but the classes are 0, 1"),
    ("0.5 0.5 0.5 0.2 0.2", "names class '0.5'"), ("cell 0.5 0.5 0.2 0.2", "names class 'cell'"),
    ("0 50 40 20 20", "outside 0..1"), ("0 -0.1 0.5 0.2 0.2", "outside 0..1"), ("0 nan 0.5 0.2 0.2", "outside 0..1"),
    ("0 x 0.5 0.2 0.2", "outside 0..1"),
])
def test_a_bad_yolo_line_is_refused_by_its_number_and_the_others_go_on(folder: Path, line: str, why: str) -> None:
    source = read_source(yolo(folder, a=f"0 0.5 0.5 0.2 0.2\n{line}\n1 0.5 0.5 0.1 0.1\n"))
    assert list(source.refused) == ["labels/a.txt line 2"] and why in source.refused["labels/a.txt line 2"]
    assert len(boxes_of(source)["a.jpg"]) == 2


def test_yolo_labels_without_a_picture_or_not_in_utf8_are_refused(folder: Path) -> None:
    yolo(folder, ghost="0 0.5 0.5 0.2 0.2")
    (folder / "labels" / "a.txt").write_bytes(b"0 0.5 0.5 0.2 \xff\xfe")
    source = read_source(folder)
    assert "no picture" in source.refused["labels/ghost.txt"] and "not UTF-8" in source.refused["labels/a.txt"]
    assert boxes_of(source)["a.jpg"] is None


def test_yolo_splits_come_from_data_yaml(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        picture(tmp_path / split / "images" / f"{split}.jpg", len(split))
        (tmp_path / split / "labels").mkdir()
        (tmp_path / split / "labels" / f"{split}.txt").write_text("0 0.5 0.5 0.2 0.2")
    picture(tmp_path / "held" / "images" / "h.jpg", 99)
    yolo(tmp_path, {"path": "/somewhere/else", "train": "../train/images", "val": "../valid/images", "test": ["held/images"],
                    "names": {0: "cell"}})
    source = read_source(tmp_path)
    assert {one.path: (one.labels.split, one.labels.boxes is not None) for one in source.images} == {
        "train/images/train.jpg": ("train", True), "valid/images/valid.jpg": ("val", True), "held/images/h.jpg": ("test", False)}


def test_yolo_splits_may_be_lists_of_pictures(folder: Path) -> None:
    (folder / "test.txt").write_text("./images/c.jpg\n")
    yolo(folder, {"train": "images", "test": "test.txt", "names": ["cell"]}, a="")
    splits = {one.name: one.labels.split for one in read_source(folder).images}
    assert splits == {"a.jpg": "train", "b.jpg": "train", "c.jpg": "train"}, "what is trained on is no test"
    yolo(folder, {"test": "test.txt", "names": ["cell"]}, a="")
    assert {one.name: one.labels.split for one in read_source(folder).images}["c.jpg"] == "test"


def test_plain_yolo_folders_take_their_names_from_classes_txt(folder: Path) -> None:
    (folder / "labels").mkdir()
    (folder / "labels" / "a.txt").write_text("1 0.5 0.5 0.2 0.2")
    (folder / "classes.txt").write_text("cell\ndot\n")
    source = read_source(folder)
    assert source.format == "yolo" and boxes_of(source)["a.jpg"] == [("dot", (.5, .5, .2, .2))]


def test_yolo_labels_without_names_are_invalid(folder: Path) -> None:
    (folder / "labels").mkdir()
    (folder / "labels" / "a.txt").write_text("1 0.5 0.5 0.2 0.2")
    with pytest.raises(Invalid, match="without class names"):
        read_source(folder)


def test_a_data_yaml_that_is_no_yaml_is_named(folder: Path) -> None:
    (folder / "data.yaml").write_text("names: [cell\n")
    (folder / "classes.txt").write_text("cell\n")
    assert "is not YAML" in read_source(folder).refused["data.yaml"]


# VOC

VOC = """<annotation><filename>{name}</filename><size><width>100</width><height>80</height><depth>3</depth></size>{objects}
</annotation>"""
OBJECT = """<object><name>{label}</name><truncated>1</truncated><difficult>0</difficult><bndbox><xmin>{0}</xmin><ymin>{1}</ymin>
<xmax>{2}</xmax><ymax>{3}</ymax></bndbox></object>"""


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    for index, name in enumerate(("a", "b", "c")):
        picture(tmp_path / "JPEGImages" / f"{name}.jpg", index * 60)
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "Annotations" / "a.xml").write_text(VOC.format(name="a.jpg", objects=OBJECT.format(10, 20, 30, 40, label="dot")))
    (tmp_path / "Annotations" / "b.xml").write_text(VOC.format(name="b.jpg", objects=""))
    return tmp_path


def test_voc_tells_labelled_empty_and_unseen_pictures_apart(voc: Path) -> None:
    source = read_source(voc)
    assert source.format == "voc" and source.taxonomy.labels == ("dot",) and not source.refused and not source.warnings
    assert boxes_of(source) == {"a.jpg": [("dot", (10, 20, 30, 40))], "b.jpg": [], "c.jpg": None}
    assert source.images[0].labels.boxes[0].attributes == {"truncated": True}


def test_voc_image_sets_are_splits_and_training_wins_over_test(voc: Path) -> None:
    sets = voc / "ImageSets" / "Main"
    (sets / "train.txt").write_text("a\n")
    (sets / "trainval.txt").write_text("a\nb\n")
    (sets / "test.txt").write_text("c 1\na\nghost\n")
    source = read_source(voc)
    assert {one.name: one.labels.split for one in source.images} == {"a.jpg": "train", "b.jpg": "train", "c.jpg": "test"}
    assert {key: value.split(";")[0] for key, value in source.warnings.items()} == {
        "ImageSets/Main/test.txt a": "stands in the train list too",
        "ImageSets/Main/test.txt ghost": "names a picture that is not there."}


@pytest.mark.parametrize(("text", "why"), [
    ('<!DOCTYPE a [<!ENTITY x "boom">]><annotation><filename>&x;</filename></annotation>', "declares an XML entity"),
    ('<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation>&x;</annotation>', "declares an XML entity"),
    ('<!DOCTYPE a [<!ENTITY a "1"><!ENTITY b "&a;&a;&a;">]><annotation>&b;</annotation>', "declares an XML entity"),
    ("<annotation><object>", "is not XML"), ("", "is not XML"), ("<html></html>", "is no VOC annotation"),
])
def test_a_voc_xml_that_cannot_be_trusted_or_read_is_named_and_its_picture_goes_on(voc: Path, text: str, why: str) -> None:
    (voc / "Annotations" / "c.xml").write_text(text)
    source = read_source(voc)
    assert list(source.refused) == ["Annotations/c.xml"] and why in source.refused["Annotations/c.xml"]
    assert boxes_of(source) == {"a.jpg": [("dot", (10, 20, 30, 40))], "b.jpg": [], "c.jpg": None}


def test_an_inverted_voc_box_is_refused_and_the_others_go_on(voc: Path) -> None:
    objects = OBJECT.format(30, 20, 10, 40, label="dot") + OBJECT.format(1, 1, 9, 9, label="dot")
    (voc / "Annotations" / "c.xml").write_text(VOC.format(name="c.jpg", objects=objects))
    _, frames = read_labeled_folder(voc)
    assert [a.xyxy for a in frames[2].annotations] == [(1, 1, 9, 9)]


def test_voc_objects_without_a_name_or_a_box_are_refused(voc: Path) -> None:
    objects = "<object><name> </name></object><object><name>dot</name></object>"
    (voc / "Annotations" / "c.xml").write_text(VOC.format(name="c.jpg", objects=objects))
    refused = read_source(voc).refused
    assert "no usable <name>" in refused["Annotations/c.xml object 1"] and "no <bndbox>" in refused["Annotations/c.xml object 2"]


def test_a_voc_xml_without_size_gives_a_warning_and_one_without_picture_is_refused(voc: Path) -> None:
    (voc / "Annotations" / "c.xml").write_text("<annotation>" + OBJECT.format(1, 1, 9, 9, label="dot") + "</annotation>")
    (voc / "Annotations" / "ghost.xml").write_text(VOC.format(name="ghost.jpg", objects=""))
    source = read_source(voc)
    assert "no <size>" in source.warnings["Annotations/c.xml"] and boxes_of(source)["c.jpg"] == [("dot", (1, 1, 9, 9))]
    assert "no picture for these labels (ghost.jpg)" in source.refused["Annotations/ghost.xml"]


def test_a_voc_xml_in_another_encoding_is_read(voc: Path) -> None:
    text = '<?xml version="1.0" encoding="ISO-8859-1"?>' + VOC.format(name="c.jpg", objects=OBJECT.format(1, 1, 9, 9, label="Zähler"))
    (voc / "Annotations" / "c.xml").write_bytes(text.encode("latin-1"))
    assert boxes_of(read_source(voc))["c.jpg"] == [("Zähler", (1, 1, 9, 9))]


# Folders

def test_a_folder_of_pictures_has_no_labels_and_names_what_is_no_picture(folder: Path) -> None:
    (folder / "images" / "notes.txt").write_text("hello")
    (folder / "README.md").write_text("about")
    (folder / ".hidden").write_text("x")
    shutil.copy(folder / "images" / "a.jpg", folder / "images" / "without_suffix")
    source = read_source(folder)
    assert source.format == "images" and [one.name for one in source.images] == ["a.jpg", "b.jpg", "c.jpg", "without_suffix"]
    assert list(source.refused) == ["images/notes.txt"] and "is not an image" in source.refused["images/notes.txt"]


def test_labels_of_two_formats_at_once_are_invalid(voc: Path) -> None:
    (voc / "labels.json").write_text(json.dumps(coco()))
    with pytest.raises(Invalid, match="COCO and VOC"):
        read_source(voc)


@pytest.mark.parametrize("wrapped", ["", "one", "one/two"])
def test_a_data_set_may_lie_in_further_folders(tmp_path: Path, voc: Path, wrapped: str) -> None:
    place = tmp_path / "outer"
    shutil.copytree(voc, place / wrapped, ignore=lambda folder, names: {"outer"})
    (place / wrapped / "ImageSets" / "Main" / "test.txt").write_text("a\n")
    source = read_source(place)
    assert [(one.name, one.labels.split) for one in source.images] == [("a.jpg", "test"), ("b.jpg", None), ("c.jpg", None)]
    assert boxes_of(source)["a.jpg"] == [("dot", (10, 20, 30, 40))]


def test_one_picture_is_a_source_and_nothing_is_none(folder: Path) -> None:
    with open_source(folder / "images" / "a.jpg") as source:
        assert [one.name for one in source.images] == ["a.jpg"]
    with pytest.raises(NotFound), open_source(folder / "gone"):
        pass
    (folder / "x.txt").write_text("x")
    with pytest.raises(Invalid, match="neither a zip nor a tar"), open_source(folder / "x.txt"):
        pass


def test_frame_names_are_the_users_without_the_folders_that_only_sort() -> None:
    assert names_of(("data/images/train/a.jpg", "data/images/val/b.jpg")) == {
        "data/images/train/a.jpg": "a.jpg", "data/images/val/b.jpg": "b.jpg"}
    assert names_of(("images/train/a.jpg", "images/val/a.jpg")) == {
        "images/train/a.jpg": "train/a.jpg", "images/val/a.jpg": "val/a.jpg"}
    assert names_of(("day1/a.jpg", "day2/a.jpg")) == {"day1/a.jpg": "day1/a.jpg", "day2/a.jpg": "day2/a.jpg"}
    assert names_of(("x/a\\b\n.jpg",)) == {"x/a\\b\n.jpg": "a_b_.jpg"}
    assert split_of("images/val2017/x.jpg") == "val" and split_of("train.jpg") is None


def test_a_labelled_folder_can_be_split_up_and_written_again(voc: Path, tmp_path: Path) -> None:
    taxonomy, frames = read_labeled_folder(voc)
    write_coco_folder(tmp_path / "out", taxonomy, {"train": frames[:1], "test": frames[1:]}, voc)
    again, read = read_labeled_folder(tmp_path / "out")
    assert again == taxonomy and [one.split for one in read] == ["train", "test", "test"]
    assert [(one.frame, one.annotations) for one in read] == [(one.frame, one.annotations) for one in frames]


def test_bccd_is_read_whole(shared: Path) -> None:
    source = read_source(shared / "data" / "bccd")
    assert source.format == "voc" and source.taxonomy.labels == ("Platelets", "RBC", "WBC")
    assert len(source.images) == 364 and sum(len(one.labels.boxes) for one in source.images) == 4888
    splits = [one.labels.split for one in source.images]
    assert [splits.count(split) for split in ("train", "val", "test")] == [205, 87, 72]
    assert not source.refused and not source.warnings and source.images[0].name == "BloodImage_00000.jpg"
    _, frames = read_labeled_folder(shared / "data" / "bccd")
    # two of the labels are single points, (504, 337) in 00338 and (181, 329) in 00343: no box can be made of them
    assert sum(len(one.annotations) for one in frames) == 4886

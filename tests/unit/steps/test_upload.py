"""The upload step on the real blob store and the real git data sets; one test with the real working copy."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from workbench.adapters.git_datasets import GitDatasets
from workbench.blobs import Blobs
from workbench.dataset import LabeledFrame, Manifest
from workbench.errors import Cancelled, Invalid, NotFound
from workbench.formats.limits import Limits
from workbench.ports import Quiet
from workbench.steps.upload import LISTED, UploadReport, upload


@dataclass
class Place:
    store: GitDatasets
    blobs: Blobs
    job: Quiet

    def upload(self, source: Path, dataset: str = "cells", server=None, **options) -> UploadReport:
        self.job = Quiet()
        return upload(dataset, source, store=self.store, server=server, blobs=self.blobs, job=self.job, person="ana", **options)

    def frames(self, ref: str) -> dict[str, LabeledFrame]:
        return self.store.manifest(ref).by_name


@pytest.fixture
def place(tmp_path: Path) -> Place:
    blobs = Blobs(str(tmp_path / "home" / "blobs"))
    return Place(GitDatasets(tmp_path / "home" / "datasets", blobs), blobs, Quiet())


def jpeg(number: int = 0, size: tuple[int, int] = (100, 80), **options) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (size[1] // 10, size[0] // 10, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels.repeat(10, 0).repeat(10, 1)).save(out, "JPEG", **options)
    return out.getvalue()


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def coco(boxes: dict[str, list], split: str = "") -> str:
    images = [{"id": index, "file_name": name, "width": 100, "height": 80} for index, name in enumerate(boxes)]
    annotations = [{"image_id": index, "category_id": 0, "bbox": bbox} for index, rows in enumerate(boxes.values()) for bbox in rows]
    for key, annotation in enumerate(annotations):
        annotation["id"] = key
    return json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 0, "name": "cell"}]})


def stored(place: Place) -> list[Path]:
    return [path for path in Path(place.blobs.url).rglob("*") if path.is_file()]


def test_a_folder_of_pictures_becomes_the_first_version(place: Place, tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"a.jpg": jpeg(1), "day/b.jpg": jpeg(2)})
    report = place.upload(source)
    assert (report.version, report.added, report.boxes, report.labels, report.format) == ("cells@0.1.0", 2, 0, [], "images")
    frames = place.frames(report.version)
    assert sorted(frames) == ["a.jpg", "day/b.jpg"] and all(one.annotations is None and one.split for one in frames.values())
    assert place.blobs.get(frames["a.jpg"].frame.blob) == jpeg(1)
    assert (frames["a.jpg"].frame.width, frames["a.jpg"].frame.height) == (100, 80)
    json.dumps(report.to_json())


def test_a_coco_data_set_brings_labels_and_who_gave_them(place: Place, tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"a.jpg": jpeg(1), "b.jpg": jpeg(2), "c.jpg": jpeg(3),
                                     "val.json": coco({"a.jpg": [[1, 2, 30, 40]], "b.jpg": []})})
    report = place.upload(source)
    frames = place.frames(report.version)
    assert (report.boxes, report.labels) == (1, ["cell"])
    assert [(a.label, a.xyxy, a.source) for a in frames["a.jpg"].annotations] == [("cell", (1, 2, 31, 42), "human:ana")]
    assert frames["b.jpg"].annotations == () and frames["c.jpg"].annotations is None
    assert frames["a.jpg"].split == frames["b.jpg"].split == "val"


def test_the_same_upload_again_changes_nothing(place: Place, tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"a.jpg": jpeg(1), "b.jpg": jpeg(2), "l.json": coco({"a.jpg": [[1, 2, 30, 40]]})})
    first = place.upload(source)
    second = place.upload(source)
    assert second.version == first.version and len(place.store.versions("cells")) == 1
    assert (second.added, second.duplicates, second.conflicts) == (0, {"a.jpg": "a.jpg", "b.jpg": "b.jpg"}, {})


def test_uploading_into_two_data_sets_gives_the_same_content(place: Place, tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"a.jpg": jpeg(1), "l.json": coco({"a.jpg": [[1, 2, 30, 40]]})})
    one, other = place.upload(source, "one"), place.upload(source, "other")
    assert place.store.version(one.version).digest == place.store.version(other.version).digest


def test_a_later_upload_adds_to_what_is_there(place: Place, tmp_path: Path) -> None:
    place.upload(write(tmp_path / "one", {"a.jpg": jpeg(1), "l.json": coco({"a.jpg": [[1, 2, 30, 40]]})}))
    report = place.upload(write(tmp_path / "two", {"b.jpg": jpeg(2), "copy of a.jpg": jpeg(1)}))
    assert report.version != "cells@0.1.0" and report.added == 1 and report.duplicates == {"copy of a.jpg": "a.jpg"}
    frames = place.frames(report.version)
    assert sorted(frames) == ["a.jpg", "b.jpg"] and len(frames["a.jpg"].annotations) == 1
    assert sorted(place.frames("cells@0.1.0")) == ["a.jpg"]


def test_labels_are_taken_for_a_frame_that_nobody_labelled(place: Place, tmp_path: Path) -> None:
    place.upload(write(tmp_path / "one", {"a.jpg": jpeg(1)}), split="test")
    report = place.upload(write(tmp_path / "two", {"x.jpg": jpeg(1), "train.json": coco({"x.jpg": [[1, 2, 30, 40]]})}))
    frame = place.frames(report.version)["a.jpg"]
    assert report.labeled == ["a.jpg"] and report.boxes == 1 and len(frame.annotations) == 1
    assert frame.split == "test" and "stays there" in report.warnings["x.jpg"], "a frame keeps its split"


def test_other_labels_for_a_labelled_frame_are_a_conflict_and_left_alone(place: Place, tmp_path: Path) -> None:
    first = place.upload(write(tmp_path / "one", {"a.jpg": jpeg(1), "l.json": coco({"a.jpg": [[1, 2, 30, 40]]})}))
    report = place.upload(write(tmp_path / "two", {"a.jpg": jpeg(1), "l.json": coco({"a.jpg": [[5, 5, 9, 9]]})}))
    assert report.version == first.version and "other labels already" in report.conflicts["a.jpg"]


def test_the_same_picture_twice_in_one_upload_is_stored_once_with_the_labels_of_either(place: Place, tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"a.jpg": jpeg(1), "b.jpg": jpeg(1), "l.json": coco({"b.jpg": [[1, 2, 30, 40]]})})
    report = place.upload(source)
    assert report.added == 1 and report.duplicates == {"b.jpg": "a.jpg"} and report.boxes == 1
    assert len(place.frames(report.version)["a.jpg"].annotations) == 1


def test_a_name_that_another_picture_has_gets_part_of_its_md5(place: Place, tmp_path: Path) -> None:
    place.upload(write(tmp_path / "one", {"a.jpg": jpeg(1)}))
    source = write(tmp_path / "two", {"a.jpg": jpeg(2)})
    report = place.upload(source)
    (name,) = set(place.frames(report.version)) - {"a.jpg"}
    assert name == f"a-{place.frames(report.version)[name].frame.blob[:8]}.jpg" and name in report.warnings["a.jpg"]
    assert place.upload(source).version == report.version


def test_splits_come_from_the_format_then_the_argument_then_the_pixels(place: Place, tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"a.jpg": jpeg(1), "b.jpg": jpeg(2), "val.json": coco({"a.jpg": []})})
    assert {name: one.split for name, one in place.frames(place.upload(source, "one", split="test").version).items()} == {
        "a.jpg": "val", "b.jpg": "test"}
    assert place.frames(place.upload(source, "two").version)["b.jpg"].split in ("train", "val", "test")
    with pytest.raises(Invalid, match="Split 'dev'"):
        place.upload(source, "three", split="dev")


def test_a_turned_photograph_is_stored_upright_with_its_boxes(place: Place, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: shown turned clockwise, 80 x 100
    raw = json.loads(coco({"a.jpg": [[10, 20, 30, 40]]}))
    source = write(tmp_path / "in", {"a.jpg": jpeg(1, exif=exif.tobytes()), "l.json": json.dumps(raw)})
    report = place.upload(source)
    frame = place.frames(report.version)["a.jpg"]
    assert report.turned == 1 and (frame.frame.width, frame.frame.height, frame.frame.orientation) == (80, 100, 6)
    assert frame.annotations[0].xyxy == (20, 10, 60, 40), "drawn on the unturned 100 x 80, as the file says"
    assert Image.open(io.BytesIO(place.blobs.get(frame.frame.blob))).size == (80, 100)


# Bad input: each is named with its reason, and the rest of the upload proceeds.

def hundred_megapixels() -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = zlib.compress(bytes(10_000 * 1_251), 1)  # 1 bit a pixel, 10,000 rows of 10,000
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 10_000, 10_000, 1, 0, 0, 0, 0)) + chunk(b"IDAT", rows)
            + chunk(b"IEND", b""))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("data", "why"), [
    (b"this is no image", "is not an image"), (jpeg(9)[:-300], "damaged or truncated"), (b"", "0 bytes"),
    (hundred_megapixels(), "100 megapixels"),
], ids=["not an image", "truncated", "0 bytes", "100 megapixels"])
def test_a_bad_picture_is_named_with_its_reason_and_the_rest_proceeds(place: Place, tmp_path: Path, data: bytes, why: str) -> None:
    source = write(tmp_path / "in", {"a.jpg": jpeg(1), "bad.jpg": data, "z.jpg": jpeg(2)})
    report = place.upload(source)
    assert list(report.refused) == ["bad.jpg"] and why in report.refused["bad.jpg"]
    assert place.job.failed == report.refused
    assert sorted(place.frames(report.version)) == ["a.jpg", "z.jpg"] and report.added == 2


@pytest.mark.parametrize(("bbox", "why"), [([90, 70, 100, 100], "outside the picture"), ([float("nan"), 2, 3, 4], "not a finite")])
def test_a_bad_coco_box_is_named_and_the_picture_goes_on_with_its_others(place: Place, tmp_path: Path, bbox: list, why: str) -> None:
    source = write(tmp_path / "in", {"a.jpg": jpeg(1), "l.json": coco({"a.jpg": [[1, 2, 30, 40], bbox]})})
    report = place.upload(source)
    assert why in report.refused["l.json annotation 1"] == place.job.failed["l.json annotation 1"]
    assert len(place.frames(report.version)["a.jpg"].annotations) == 1


def test_an_unknown_category_a_short_yolo_line_and_an_xml_entity_are_named(place: Place, tmp_path: Path) -> None:
    content = json.loads(coco({"a.jpg": [[1, 2, 30, 40], [1, 2, 9, 9]]}))
    content["annotations"][1]["category_id"] = 5
    report = place.upload(write(tmp_path / "c", {"a.jpg": jpeg(1), "l.json": json.dumps(content)}), "coco")
    assert "unknown category" in place.job.failed["l.json annotation 1"] and report.boxes == 1
    report = place.upload(write(tmp_path / "y", {"images/a.jpg": jpeg(1), "classes.txt": "cell", "labels/a.txt":
                                                 "0 .5 .5 .1\n0 .5 .5 .1 .1"}), "yolo")
    assert "has 4 numbers" in place.job.failed["labels/a.txt line 1"] and report.boxes == 1
    entity = '<!DOCTYPE a [<!ENTITY x "b">]><annotation><filename>&x;</filename></annotation>'
    report = place.upload(write(tmp_path / "v", {"JPEGImages/a.jpg": jpeg(1), "Annotations/a.xml": entity}), "voc")
    assert "XML entity" in place.job.failed["Annotations/a.xml"]
    assert place.frames(report.version)["a.jpg"].annotations is None


def test_a_zip_with_evil_entries_gives_its_good_ones_and_leaves_nothing_behind(place: Place, tmp_path: Path) -> None:
    packed = tmp_path / "in.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("set/a.jpg", jpeg(1))
        made.writestr("../evil.jpg", jpeg(2))
        link = zipfile.ZipInfo("set/link.jpg")
        link.external_attr = 0o120777 << 16
        made.writestr(link, "/etc/passwd")
        made.writestr("set/bomb.jpg", bytes(64 << 20))
    report = place.upload(packed)
    assert sorted(report.refused) == ["../evil.jpg", "set/bomb.jpg", "set/link.jpg"] and report.added == 1
    assert list(place.frames(report.version)) == ["a.jpg"] and not list(tmp_path.rglob("evil.jpg"))


def test_nothing_usable_is_invalid_and_makes_no_data_set(place: Place, tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"a.jpg": b"", "b.jpg": b"text"})
    with pytest.raises(Invalid, match=r"in has no picture that can be used\. a\.jpg: the file has 0 bytes.*b\.jpg"):
        place.upload(source)
    assert place.store.names() == [] and stored(place) == [] and len(place.job.failed) == 2
    with pytest.raises(Invalid, match="It is empty"):
        place.upload(write(tmp_path / "empty", {"x/.keep": b""}))
    with pytest.raises(NotFound):
        place.upload(tmp_path / "gone")
    with pytest.raises(Invalid, match="Data set name"):
        place.upload(source, "Not A Name")


def test_a_cancelled_upload_publishes_nothing(place: Place, tmp_path: Path) -> None:
    class Cancelling(Quiet):
        def check(self) -> None:
            if self.done >= 2:
                raise Cancelled("Cancelled by ana.")

    source = write(tmp_path / "in", {f"{index}.jpg": jpeg(index) for index in range(5)})
    with pytest.raises(Cancelled):
        upload("cells", source, store=place.store, server=None, blobs=place.blobs, job=Cancelling(), person="ana")
    assert place.store.names() == []
    assert place.upload(source).added == 5


KILLED = """
import os, sys
from pathlib import Path
from workbench.adapters.git_datasets import GitDatasets
from workbench.blobs import Blobs
from workbench.ports import Quiet
from workbench.steps.upload import upload

class Killed(Quiet):
    def progress(self, done, total, note=""):
        if (note, done) == (sys.argv[3], int(sys.argv[4])):
            os.kill(os.getpid(), 9)

home, source = Path(sys.argv[1]), Path(sys.argv[2])
blobs = Blobs(str(home / "blobs"))
upload("cells", source, store=GitDatasets(home / "datasets", blobs), server=None, blobs=blobs, job=Killed(), person="ana")
"""


@pytest.mark.parametrize(("note", "done"), [("reading pictures", 0), ("reading pictures", 4), ("publishing", 6)])
def test_an_upload_killed_at_any_moment_ends_like_an_undisturbed_one(place: Place, tmp_path: Path, note: str, done: int) -> None:
    source = write(tmp_path / "in", {f"{index}.jpg": jpeg(index) for index in range(6)} | {"l.json": coco({"0.jpg": [[1, 2, 3, 4]]})})
    undisturbed = place.store.version(place.upload(source, "undisturbed").version)
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "home"), str(source), note, str(done)], timeout=120)
    assert ended.returncode == -9 and "cells" not in place.store.names()
    version = place.store.version(place.upload(source).version)
    assert (version.version, version.digest) == (undisturbed.version, undisturbed.digest)
    assert not [path for path in stored(place) if path.name.startswith(".half-")]


def test_a_long_list_of_failures_is_told_in_part_with_its_count(place: Place, tmp_path: Path) -> None:
    lines = "\n".join(["0 .5 .5 .1"] * (LISTED + 5))
    report = place.upload(write(tmp_path / "in", {"images/a.jpg": jpeg(1), "classes.txt": "cell", "labels/a.txt": lines}))
    told = report.to_json()
    assert len(report.refused) == told["refused_count"] == LISTED + 5 and len(told["refused"]) == LISTED == len(place.job.failed)


def test_memory_stays_flat_and_thousands_of_pictures_take_seconds(place: Place, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (480, 640, 3), np.uint8)
    for index in range(60):
        Image.fromarray(np.roll(noise, index, axis=1)).save(folder / f"{index:03}.jpg", quality=95)
    size = sum(path.stat().st_size for path in folder.iterdir())
    tracemalloc.start()
    place.upload(folder, limits=Limits())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 15e6 and peak < size / 3, "all files at once would be more than their sum"
    began = time.process_time()
    place.upload(folder, "again")
    # 300 KB of noise a picture, ten times what a photograph of this size has, still decodes at 100 a second and core
    assert 60 / (time.process_time() - began) > 30


def test_bccd_is_uploaded_whole(place: Place, shared: Path) -> None:
    report = place.upload(shared / "data" / "bccd", "bccd")
    assert (report.version, report.added, report.boxes, report.format) == ("bccd@0.1.0", 364, 4886, "voc")
    # two labels of the data set are single points (x1 = x2, y1 = y2): named, left out, the rest of their pictures is kept
    assert sorted(report.refused) == ["BCCD/Annotations/BloodImage_00338.xml object 13", "BCCD/Annotations/BloodImage_00343.xml object 4"]
    assert all("has no area" in reason for reason in report.refused.values())
    manifest: Manifest = place.store.manifest(report.version)
    assert [len(manifest.split(split)) for split in ("train", "val", "test")] == [205, 87, 72]


def test_the_working_copy_gets_the_frames_and_a_person_s_work_in_it_wins(place: Place, tmp_path: Path) -> None:
    from dataclasses import replace

    from parts_mongo import mongod

    from workbench.adapters.fiftyone import FiftyOneServer
    from workbench.annotation import Annotation

    with mongod(tmp_path / "mongo") as mongo:
        server = FiftyOneServer(mongo_url=mongo, app_url="http://127.0.0.1:1")
        source = write(tmp_path / "one", {"a.jpg": jpeg(1), "b.jpg": jpeg(2), "c.jpg": jpeg(3), "d.jpg": jpeg(4),
                                          "l.json": coco({"a.jpg": [[1, 2, 30, 40]]})})
        place.upload(source, server=server)
        assert server.task("cells").by_status["accepted"] == 1 and server.frame_names("cells", "new") == ["b.jpg", "c.jpg", "d.jpg"]

        begun = server.read("cells", ["b.jpg"])["b.jpg"]
        drawn = Annotation("cell", (1, 1, 9, 9), source="human:bo")
        assert server.write("cells", [replace(begun, annotations=(drawn,), status="annotated")]) == []
        labels = coco({"b.jpg": [[5, 5, 50, 50]], "c.jpg": [[6, 6, 60, 60]]})
        report = place.upload(write(tmp_path / "two", {"b.jpg": jpeg(2), "c.jpg": jpeg(3), "e.jpg": jpeg(5), "l.json": labels}),
                              server=server)
        assert "is being labelled in the working copy" in report.conflicts["b.jpg"] and report.labeled == ["c.jpg"]
        frames = server.read("cells", ["b.jpg", "c.jpg", "e.jpg"])
        assert [a.xyxy for a in frames["b.jpg"].annotations] == [(1, 1, 9, 9)] and frames["b.jpg"].status == "annotated"
        assert [a.xyxy for a in frames["c.jpg"].annotations] == [(6, 6, 66, 66)] and frames["c.jpg"].status == "accepted"
        assert frames["e.jpg"].status == "new"
        assert place.frames(report.version)["b.jpg"].annotations is None

        server.delete_task("cells")  # as after a kill between publishing and filling
        again = place.upload(source, server=server)
        assert again.version == report.version and server.task("cells").by_status == {
            "new": 3, "annotated": 0, "accepted": 2, "rejected": 0}


def test_a_file_name_that_is_no_text_is_taken_under_a_name_that_is(place: Place, tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"good.jpg": jpeg(1)})
    for name, data in ((b"caf\xe9.jpg", jpeg(2)), (b"bad\xe9.jpg", b"text")):
        Path(os.fsdecode(os.path.join(os.fsencode(source), name))).write_bytes(data)
    report = place.upload(source)
    assert sorted(place.frames(report.version)) == ["caf_.jpg", "good.jpg"] and list(report.refused) == ["bad_.jpg"]
    json.dumps(report.to_json(), ensure_ascii=False).encode()


@pytest.mark.parametrize("name", ["classes.txt", "train.txt", "labels/a.txt"])
def test_yolo_text_that_is_not_utf8_is_named(place: Place, tmp_path: Path, name: str) -> None:
    files = {"images/a.jpg": jpeg(1), "obj.names": "cell", "labels/a.txt": "0 .5 .5 .1 .1", name: b"\xff\xfe\x00"}
    try:
        refused = place.upload(write(tmp_path / "in", files)).refused
    except Invalid as error:
        assert name == "classes.txt" and "without class names" in str(error)
    else:
        assert "not UTF-8" in refused[name]

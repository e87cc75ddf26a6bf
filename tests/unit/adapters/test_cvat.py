"""CVAT's adapter over the double: what people do there is found, what goes wrong is told, nothing is lost or doubled."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco

PROJECT = Path(__file__).resolve().parents[3]
for folder in (PROJECT, PROJECT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from doubles.cvat import EXPIRED, LOGIN, READ_ONLY, READ_WRITE, CvatDouble, cvat  # noqa: E402
from workbench.adapters.cvat import Connection, CvatServer, masks, state  # noqa: E402
from workbench.adapters.cvat.uploads import file_name  # noqa: E402
from workbench.annotation import Annotation, machine_annotation_id  # noqa: E402
from workbench.dataset import Frame, LabeledFrame  # noqa: E402
from workbench.errors import Conflict, Invalid, NotFound, Unavailable  # noqa: E402
from workbench.records import Records  # noqa: E402
from workbench.run import WorkingFrame, propose, settle, touch, undo  # noqa: E402
from workbench.taxonomy import Taxonomy  # noqa: E402

CELLS = Taxonomy(("RBC", "WBC", "Platelets"))
NAMES = [f"{n:03}.jpg" for n in range(20)]


@pytest.fixture
def double() -> Iterator[CvatDouble]:
    with cvat() as served:
        yield served


@pytest.fixture
def engine(tmp_path: Path) -> object:
    return Records(f"sqlite:///{tmp_path}/records.sqlite").engine


@pytest.fixture
def server(double: CvatDouble, engine: object) -> CvatServer:
    return connected(double, engine)


@pytest.fixture
def pixels(tmp_path: Path) -> Path:
    path = tmp_path / "cdef0123456789"
    Image.new("RGB", (640, 480), "grey").save(path, "JPEG")
    return path


def connected(double: CvatDouble, engine: object, token: str = READ_WRITE, **more: object) -> CvatServer:
    return CvatServer(Connection(double.url, token, pause=lambda seconds: None), engine, **more)


def frame(name: str, width: int = 640, height: int = 480) -> Frame:
    return Frame(name, width, height, "0" * 32)


def box(label: str = "RBC", xyxy: tuple[float, ...] = (10.0, 20.0, 110.5, 220.25), **fields: object) -> Annotation:
    return Annotation(label, xyxy=xyxy, **fields)


def machine(name: str, count: int = 4, run: str = "r1") -> tuple[Annotation, ...]:
    return tuple(box("RBC", (100.0 * n, 50, 100.0 * n + 80, 150), source="model:m@1", confidence=round(0.9 - n / 10, 2),
                     id=machine_annotation_id(run, name, n), attributes={"run_id": run}) for n in range(count))


def opened(server: CvatServer, pixels: Path, *names: str) -> None:
    server.open_task("cells", CELLS)
    assert server.add_frames("cells", [(LabeledFrame(frame(name)), pixels) for name in names]) == len(names)


def one(server: CvatServer, name: str = "a.jpg") -> WorkingFrame:
    return server.read("cells", [name])[name]


def annotated(server: CvatServer, name: str = "a.jpg", run: str = "r1") -> WorkingFrame:
    assert server.write("cells", [propose(one(server, name), run, "model:m@1", machine(name, run=run))]) == []
    return one(server, name)


def shapes(double: CvatDouble) -> list[dict]:
    return [record for stored in double.state.records.values() for record in stored["shapes"]]


# What people do in CVAT


def test_what_a_person_drew_moved_relabelled_and_copied_in_cvat_is_found(server: CvatServer, double: CvatDouble,
                                                                         pixels: Path) -> None:
    opened(server, pixels, "a.jpg", "b.jpg")
    annotated(server)
    stale = one(server)
    job, stored = next(iter(double.state.records.items()))
    moved, relabelled, deleted, untouched = stored["shapes"]
    labels = {label["name"]: label for label in double.state.labels.values()}
    moved["points"] = [320, 240, 480, 360]
    relabelled["label_id"] = labels["WBC"]["id"]
    names = {spec["id"]: spec["name"] for label in labels.values() for spec in label["attributes"]}
    of = {spec["name"]: spec["id"] for spec in labels["WBC"]["attributes"]}
    relabelled["attributes"] = [{**one, "spec_id": of[names[one["spec_id"]]]} for one in relabelled["attributes"]]
    stored["shapes"].remove(deleted)
    base = {**untouched, "attributes": [], "source": "manual", "score": 1.0}
    stored["shapes"] += [
        {**base, "id": 900, "label_id": labels["Platelets"]["id"], "points": [-5, -5, 64, 48]},
        {**untouched, "id": 901, "points": [500, 300, 600, 400]},  # pasted elsewhere, with its attributes
        {**untouched, "id": 902},  # pasted in place: nobody can tell it from the other
        {**untouched, "id": 903, "frame": 1},  # propagated to the next frame
        {**base, "id": 904, "points": [700, 10, 800, 50]},  # outside the frame
        {**base, "id": 905, "type": "points", "points": [1, 1]},  # no annotation can hold it
        {**base, "id": 906, "rotation": 90.0, "points": [100, 100, 200, 140]},
        {**base, "id": 907, "type": "ellipse", "points": [300, 200, 340, 180]}]
    assert server.write("cells", [stale]) == ["a.jpg"]
    working = one(server)
    found, ids = touch(working), [a.id for a in machine("a.jpg")]
    assert [a.id for a in found.machine] == [ids[3]] and [a.id for a in found.deleted] == [ids[2]]
    drawn = [a for a in found.human if a.source == "human:unknown"]
    assert [(a.label, a.xyxy) for a in drawn if a.xyxy] == [("Platelets", (0.0, 0.0, 64.0, 48.0)), ("RBC", (500, 300, 600, 400))]
    turned, ellipse = (a.polygon for a in drawn if a.polygon)
    assert set(turned) == {(130, 70), (130, 170), (170, 170), (170, 70)}
    assert len(ellipse) == 36 and ellipse[0] == (340, 200) and ellipse[9] == (300, 220)
    assert {a.id: (a.label, a.xyxy) for a in found.human if a.id in ids} == {
        ids[0]: ("RBC", (320, 240, 480, 360)), ids[1]: ("WBC", (100, 50, 180, 150))}
    propagated, = one(server, "b.jpg").annotations
    assert propagated.source == "human:unknown" and propagated.id not in ids
    # Signed and accepted here: the same ids, what nobody can hold still there, the copy in place gone.
    assert server.write("cells", [replace(working, annotations=settle(working, "ann"), status="accepted")]) == []
    signed = one(server)
    assert {a.id for a in signed.annotations} == {a.id for a in working.annotations}
    assert {a.source for a in signed.annotations if a.id in {d.id for d in drawn}} == {"human:ann"}
    assert {record["id"] for record in stored["shapes"]} >= {904, 905} and 902 not in {r["id"] for r in stored["shapes"]}
    assert job


def test_an_update_keeps_what_people_set_in_cvat(server: CvatServer, double: CvatDouble, pixels: Path) -> None:
    opened(server, pixels, "a.jpg")
    annotated(server)
    label = next(label for label in double.state.labels.values() if label["name"] == "RBC")
    label["attributes"].append({"id": 777, "name": "blurred", "mutable": True, "input_type": "checkbox", "default_value": "false",
                                "values": ["false"]})
    record = shapes(double)[0]
    record.update(group=5, occluded=True, z_order=3)
    record["attributes"].append({"spec_id": 777, "value": "true"})
    working = one(server)
    moved = replace(working.annotations[0], xyxy=(1, 2, 30, 40))
    assert server.write("cells", [replace(working, annotations=(moved, *working.annotations[1:]))]) == []
    after = next(one for one in shapes(double) if one["points"] == [1, 2, 30, 40])
    assert (after["id"], after["group"], after["occluded"], after["z_order"]) == (record["id"], 5, True, 3)
    assert {"spec_id": 777, "value": "true"} in after["attributes"]
    assert len(double.calls("PATCH", "action=update")) == 1 and not double.calls("PATCH", "action=delete")


def test_the_job_decides_for_its_frames_until_somebody_decides_here(server: CvatServer, double: CvatDouble, pixels: Path) -> None:
    opened(server, pixels, "a.jpg", "b.jpg")
    annotated(server)
    people = server.people("cells")
    job, = people.jobs()
    people.set_job(job.id, state="completed")
    assert one(server).status == "annotated"  # handed on, not accepted
    people.set_job(job.id, "acceptance", "completed", "worker1")
    accepted = server.read("cells", ["a.jpg", "b.jpg"])
    assert [(w.status, w.reviewed_by) for w in accepted.values()] == [("accepted", "worker1")] * 2
    assert accepted["b.jpg"].annotations == ()  # people looked, and nothing is there
    assert server.frame_names("cells", "accepted") == ["a.jpg", "b.jpg"]
    assert server.write("cells", [replace(accepted["a.jpg"], status="annotated", reviewed_by="")]) == []
    assert (one(server).status, one(server, "b.jpg").status) == ("annotated", "accepted")
    people.set_job(job.id, state="rejected")
    assert server.task("cells").by_status["rejected"] == 2
    people.set_job(job.id, "annotation", "in progress")
    assert (one(server).status, one(server, "b.jpg").status, one(server, "b.jpg").annotations) == ("annotated", "new", None)


def test_a_decision_of_the_job_between_reading_and_writing_is_seen(server: CvatServer, pixels: Path) -> None:
    opened(server, pixels, "a.jpg")
    before = one(server)
    people = server.people("cells")
    people.set_job(people.jobs()[0].id, "acceptance", "completed")
    assert server.write("cells", [replace(before, annotations=machine("a.jpg"))]) == ["a.jpg"]
    assert one(server).annotations == ()


def test_a_label_that_a_person_added_in_cvat_is_a_label_of_the_task(server: CvatServer, double: CvatDouble, pixels: Path) -> None:
    opened(server, pixels, "a.jpg")
    project = server.project("cells")
    double.state.change_project(project, {"labels": [{"name": "Blast", "type": "any", "color": "#123456"}]})
    assert server.task("cells").labels == (*CELLS.labels, "Blast")
    drawn = box("Blast", source="human:ann", attributes={"n": 1})
    assert server.write("cells", [replace(one(server), annotations=(drawn,))]) == []
    assert one(server).annotations == (drawn,)
    assert next(label["color"] for label in double.state.labels.values() if label["name"] == "Blast") == "#123456"


def test_attributes_that_somebody_typed_over_cost_only_who_drew_it(server: CvatServer, double: CvatDouble, pixels: Path) -> None:
    opened(server, pixels, "a.jpg")
    annotated(server)
    for record in shapes(double):
        for each in record["attributes"]:
            each["value"] = "{oops" if each["value"] else ""
    found = one(server).annotations
    assert len(found) == 4 and {a.source for a in found} == {"human:unknown"}


def test_score_model_and_run_stay_on_every_box_also_where_cvat_keeps_no_score(server: CvatServer, double: CvatDouble,
                                                                              pixels: Path) -> None:
    opened(server, pixels, "a.jpg")
    annotated(server)
    record = next(record for record in shapes(double) if record["points"][0] == 0)
    assert (record["source"], record["score"]) == ("auto", 0.9)
    specs = {spec["id"]: spec["name"] for label in double.state.labels.values() for spec in label["attributes"]}
    shown = {specs[each["spec_id"]]: each["value"] for each in record["attributes"]}
    assert (shown["wb_source"], shown["wb_score"], shown["wb_run"]) == ("model:m@1", "0.9", "r1")
    for each in shapes(double):
        each.update(score=1.0, source="file")
    back = one(server).annotations
    assert [(a.source, a.confidence, a.attributes) for a in back] == [
        (a.source, pytest.approx(a.confidence), a.attributes) for a in machine("a.jpg")]


def test_what_cvat_s_own_models_drew_is_kept_as_work_no_run_of_ours_made(server: CvatServer, double: CvatDouble,
                                                                         pixels: Path) -> None:
    opened(server, pixels, "a.jpg")
    label = next(iter(double.state.labels.values()))["id"]
    double.state.write([1], {"shapes": [{"type": "rectangle", "frame": 0, "label_id": label, "points": [1, 2, 50, 60],
                                         "source": "auto", "score": 0.4}]}, "create")
    drawn, = one(server).annotations
    assert (drawn.source, drawn.confidence) == ("model:cvat@unknown", 0.4)
    assert annotated(server).annotations[0] == drawn
    assert undo(one(server), "r1").annotations == (drawn,)


# Round trips


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(0.02, 0.98))
def test_masks_survive_the_trip_exactly_and_are_those_of_pycocotools(width: int, height: int, seed: int, share: float) -> None:
    inside = np.random.default_rng(seed).random((height, width)) < share
    inside[-1, 0] = True
    encoded = coco.encode(np.asfortranarray(inside.astype(np.uint8)))
    mask = {"size": [height, width], "counts": encoded["counts"].decode()}
    points = masks.to_points(mask)
    assert masks.to_coco(points, width, height) == mask
    left, top, right, bottom = map(int, points[-4:])
    rows, columns = np.nonzero(inside)
    assert (left, top, right, bottom) == (columns.min(), rows.min(), columns.max(), rows.max())


def test_a_recorded_mask_is_read_as_drawn() -> None:
    """d_annotations:6: six background, two foreground, four background pixels in a box 4 wide and 3 high."""
    mask = masks.to_coco([0, 6, 2, 4, 10, 12, 13, 14], 96, 64)
    inside = coco.decode({"size": mask["size"], "counts": mask["counts"].encode()})
    assert np.argwhere(inside).tolist() == [[12, 10], [12, 11], [12, 12], [12, 13], [13, 10], [13, 11], [14, 10], [14, 11],
                                            [14, 12], [14, 13]]
    assert masks.to_coco([0, 12, 200, 200, 203, 202], 96, 64) is None  # outside the frame: d_annotations 38


def test_a_mask_and_its_box_survive_and_a_redrawn_polygon_takes_its_box_along(server: CvatServer, double: CvatDouble,
                                                                             pixels: Path) -> None:
    opened(server, pixels, "a.jpg")
    inside = np.zeros((480, 640), np.uint8)
    inside[30:60, 40:90] = 1
    mask = {"size": [480, 640], "counts": coco.encode(np.asfortranarray(inside))["counts"].decode()}
    drawn = (Annotation("RBC", mask=mask, xyxy=(40, 30, 90, 60), source="human:ann", track_id=3),
             Annotation("WBC", mask=mask, source="human:ann"),
             Annotation("WBC", polygon=((1, 1), (9, 1), (9, 9)), xyxy=(0, 0, 10, 10), source="human:ann"))
    assert server.write("cells", [replace(one(server), annotations=drawn)]) == []
    assert one(server).annotations == drawn
    next(record for record in shapes(double) if record["type"] == "polygon")["points"] = [1, 1, 20, 1, 20, 30]
    assert one(server).annotations[2].xyxy == (1, 1, 20, 30)


@pytest.mark.parametrize("annotation,words", [
    (box("Blast"), "Blast.*RBC, WBC, Platelets"), (box(xyxy=(0.0, 0.0, 641.0, 10.0)), "leaves the frame"),
    (box(xyxy=(5.0, 5.0, 5.001, 10.0)), "too small"), (box(attributes={"score": float("nan")}), "a.jpg.*JSON"),
    (box(attributes={"text": "x" * 5000}), "5[0-9]{3} characters; CVAT keeps 4096"),
    (Annotation("RBC", mask={"size": [4, 4], "counts": "0"}), "size"),
    (Annotation("RBC", mask={"size": [480, 640], "counts": "05"}), "must fill it")])
def test_what_cannot_be_kept_is_refused_before_anything_is_written(server: CvatServer, double: CvatDouble, pixels: Path,
                                                                   annotation: Annotation, words: str) -> None:
    opened(server, pixels, "a.jpg", "b.jpg")
    before = server.read("cells", ["a.jpg", "b.jpg"])
    with pytest.raises(Invalid, match=words):
        server.write("cells", [replace(before["b.jpg"], annotations=(box(),)), replace(before["a.jpg"], annotations=(annotation,))])
    assert server.read("cells", ["a.jpg", "b.jpg"]) == before
    assert double.calls("PATCH", "annotations") == []


def test_blanks_at_the_ends_of_a_name_survive_although_cvat_cuts_them(server: CvatServer, pixels: Path) -> None:
    opened(server, pixels, "a.jpg")
    drawn = (box(source="human: ann "), box("WBC", source='human:"q"', attributes={"run_id": " r "}))
    assert server.write("cells", [replace(one(server), annotations=drawn)]) == []
    assert one(server).annotations == drawn


def test_a_label_cvat_cannot_hold_and_an_order_that_does_not_exist_are_refused(server: CvatServer) -> None:
    with pytest.raises(Invalid, match="65 characters; CVAT keeps 64"):
        server.open_task("cells", Taxonomy(("x" * 65,)))
    server.open_task("cells", CELLS)
    with pytest.raises(Invalid, match="Order 'size'"):
        server.frame_names("cells", order="size")
    with pytest.raises(Invalid, match="Status 'done'"):
        server.frame_names("cells", "done")


# Uploads


def test_frames_keep_order_and_names_and_lie_in_jobs_of_the_chosen_size(double: CvatDouble, engine: object, pixels: Path) -> None:
    server = connected(double, engine, job_size=2)
    opened(server, pixels, "z/1.jpg", "a/1.jpg", "ä.jpg", "noending")
    task, = double.state.tasks.values()
    names = [one["name"] for one in task["frames"]]
    assert names[0].startswith("z_1-") and names[1].startswith("a_1-") and len(set(names)) == 4
    assert all(name.isascii() and name.endswith(".jpg") for name in names)
    assert [(job.first, job.last) for job in server.people("cells").jobs()] == [(0, 1), (2, 3)]
    assert server.review_url("cells", "ä.jpg") == f"{double.url}/tasks/1/jobs/2?frame=2"
    server.add_frames("cells", [(LabeledFrame(frame("later.jpg")), pixels)])
    assert server.review_url("cells", "later.jpg") == f"{double.url}/tasks/2/jobs/3?frame=0"
    assert server.frame_names("cells") == ["a/1.jpg", "later.jpg", "noending", "z/1.jpg", "ä.jpg"]


def test_a_plain_name_stays_as_it_is_and_two_frames_never_share_one(pixels: Path) -> None:
    assert file_name("img_001.jpg", pixels) == "img_001.jpg"
    assert file_name("a/1.jpg", pixels) != file_name("a_1.jpg", pixels) and file_name("1", pixels).endswith(".jpg")
    assert len(file_name("x" * 400 + ".png", pixels)) < 130


def test_many_frames_go_in_several_requests_and_each_once(server: CvatServer, double: CvatDouble, pixels: Path) -> None:
    opened(server, pixels, *(f"{n:03}.jpg" for n in range(230)))
    uploads = [call for call in double.calls("POST", "data") if call[2] == 200]
    assert len(uploads) == 3 and max(Counter(double.state.received).values()) == 1
    assert len(double.state.received) == 230 and len(double.calls("POST", "/api/tasks$")) == 1


@pytest.mark.parametrize("kind", ["lost", 500, "silence"])
def test_a_broken_upload_goes_on_without_sending_a_frame_twice(server: CvatServer, double: CvatDouble, pixels: Path,
                                                               kind: str | int) -> None:
    server.open_task("cells", CELLS)
    asked = []
    double.before = lambda method, path: asked.append(path) or (
        double.fail("POST", "/data", kind) if method == "POST" and len([p for p in asked if "/data/" in p]) == 3 else None)
    frames = [(LabeledFrame(frame(f"{n:03}.jpg"), (box(id=f"b{n}"),) if n % 50 == 0 else None), pixels) for n in range(250)]
    assert server.add_frames("cells", frames) == 250
    assert max(Counter(double.state.received).values()) == 1 and len(double.state.received) == 250
    read = server.read("cells", server.frame_names("cells"))
    assert len(read) == 250 and [a.id for w in read.values() for a in w.annotations or ()] == [f"b{n}" for n in range(0, 250, 50)]


def test_a_picture_that_cvat_refuses_is_named_and_the_others_are_in(server: CvatServer, double: CvatDouble, pixels: Path,
                                                                    tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"no picture at all")
    server.open_task("cells", CELLS)
    with pytest.raises(Invalid, match="refused 1 of the pictures, first 'b.jpg'.*failed to parse.*upload again"):
        server.add_frames("cells", [(LabeledFrame(frame(name)), broken if name == "b.jpg" else pixels)
                                    for name in ("a.jpg", "b.jpg", "c.jpg")])
    assert server.frame_names("cells") == ["a.jpg", "c.jpg"] and len(double.state.tasks) == 1
    assert server.add_frames("cells", [(LabeledFrame(frame("b.jpg")), pixels)]) == 1


def test_missing_pixels_and_a_request_too_large_say_what_to_do(server: CvatServer, double: CvatDouble, pixels: Path,
                                                               tmp_path: Path) -> None:
    server.open_task("cells", CELLS)
    with pytest.raises(Invalid, match="'a.jpg' are not at.*blob store"):
        server.add_frames("cells", [(LabeledFrame(frame("a.jpg")), tmp_path / "absent")])
    double.fail("POST", "/data/", 413)
    with pytest.raises(Invalid, match="413.*client_max_body_size"):
        server.add_frames("cells", [(LabeledFrame(frame("a.jpg")), pixels)])
    assert server.add_frames("cells", [(LabeledFrame(frame("a.jpg")), pixels)]) == 1
    assert len(double.state.tasks) == 1


# What goes wrong


@pytest.mark.parametrize("token,words", [
    ("nonsense", "wrong, expired or revoked.*cvat_token"), (EXPIRED, "wrong, expired or revoked.*cvat_token"),
    ("b" * 40, "wrong, expired or revoked"), ("", "cvat_token"), (READ_ONLY, "may only read.*read and write.*cvat_token")])
def test_a_token_that_does_not_do_is_told_apart(double: CvatDouble, engine: object, token: str, words: str) -> None:
    with pytest.raises(Invalid, match=words):
        connected(double, engine, token).open_task("cells", CELLS)
    assert double.state.projects == {}


def test_a_login_token_works_and_a_read_only_one_reads(double: CvatDouble, engine: object, pixels: Path) -> None:
    opened(connected(double, engine, LOGIN), pixels, "a.jpg")
    reader = connected(double, engine, READ_ONLY)
    working = one(reader)
    with pytest.raises(Invalid, match="may only read"):
        reader.write("cells", [replace(working, annotations=(box(),))])
    assert one(reader).annotations is None
    assert one(connected(double, engine)).annotations is None


@pytest.mark.parametrize("version,is_known", [("2.40.0", True), ("2.89.1", True), ("2.39.9", False), ("2.90.0", False),
                                              ("3.0.0", False)])
def test_a_version_it_does_not_know_is_said_not_guessed(engine: object, version: str, is_known: bool) -> None:
    with cvat(version) as double:
        server = connected(double, engine)
        if is_known:
            assert server.tasks() == [] and server.connection.version == version
            return
        with pytest.raises(Invalid, match=f"version {version}; this workbench knows 2.40 to 2.89"):
            server.open_task("cells", CELLS)
        assert [call[1] for call in double.journal] == ["/api/server/about"]


def test_addresses_that_are_no_cvat_are_told(double: CvatDouble, engine: object) -> None:
    double.fail("GET", "about", "html")
    with pytest.raises(Invalid, match="not as CVAT's API does.*cvat_url"):
        connected(double, engine).open_task("cells", CELLS)
    with pytest.raises(Invalid, match="cvat_url"):
        Connection("cvat.example", READ_WRITE)
    with pytest.raises(Invalid, match="not as CVAT's API does"):
        CvatServer(Connection(f"{double.url}/somewhere", READ_WRITE), engine).open_task("cells", CELLS)
    gone = CvatServer(Connection("http://127.0.0.1:9", READ_WRITE, pause=lambda seconds: None), engine)
    with pytest.raises(Unavailable, match="does not answer.*cvat_url"):
        gone.open_task("cells", CELLS)


@pytest.mark.parametrize("kind", [500, 502, 429, "half", "lost", "silence"])
def test_a_reading_that_fails_passingly_is_repeated(server: CvatServer, double: CvatDouble, pixels: Path, kind: str | int) -> None:
    opened(server, pixels, "a.jpg")
    before = annotated(server)
    double.fail("GET", "annotations", kind, times=2)
    assert one(server) == before


def test_a_server_that_keeps_failing_or_answers_a_page_is_told(server: CvatServer, double: CvatDouble, pixels: Path) -> None:
    opened(server, pixels, "a.jpg")
    double.fail("GET", "annotations", 500, times=99)
    with pytest.raises(Unavailable, match="no number.*delete the annotations of that job"):
        one(server)
    double.faults.clear()
    double.fail("GET", "annotations", "html")
    with pytest.raises(Invalid, match="sign-in must let /api through"):
        one(server)
    double.faults.clear()
    double.fail("GET", "annotations", 429, times=99)
    with pytest.raises(Unavailable, match="less often.*Wait"):
        one(server)


@pytest.mark.parametrize("action", ["create", "update", "delete"])
@pytest.mark.parametrize("kind", [500, "lost", "half", "silence", "drop"])
def test_a_write_whose_answer_is_lost_is_carried_out_once(server: CvatServer, double: CvatDouble, pixels: Path, action: str,
                                                          kind: str | int) -> None:
    opened(server, pixels, "a.jpg", "b.jpg")
    annotated(server)
    working = one(server)
    first, second, third, _ = working.annotations
    wanted = (replace(first, label="WBC"), second, third, box("Platelets", id="new1"), Annotation("WBC", id="new2"))
    double.fail("PATCH", f"action={action}", kind)
    assert server.write("cells", [replace(working, annotations=wanted)]) == []
    assert one(server).annotations == wanted
    assert len(shapes(double)) == 4 and len(double.state.records[1]["tags"]) == 1


def test_a_write_that_cvat_refuses_half_way_is_taken_back(server: CvatServer, double: CvatDouble, pixels: Path) -> None:
    opened(server, pixels, "a.jpg")
    before = annotated(server)
    double.fail("PATCH", "action=update", 413)
    changed = (replace(before.annotations[0], label="WBC"), *before.annotations[1:], box("Platelets"))
    with pytest.raises(Invalid, match="413"):
        server.write("cells", [replace(before, annotations=changed, status="accepted")])
    after = one(server)
    assert (after.annotations, after.status, after.runs) == (before.annotations, "annotated", before.runs)
    assert len(shapes(double)) == 4


def test_a_write_to_a_server_that_stays_away_is_carried_through_by_the_next_reader(server: CvatServer, double: CvatDouble,
                                                                                   engine: object, pixels: Path) -> None:
    opened(server, pixels, "a.jpg")
    working = propose(one(server), "r1", "model:m@1", machine("a.jpg"))
    double.fail("PATCH", "action=create", 500, times=99)
    with pytest.raises(Unavailable, match="500.*try again"):
        server.write("cells", [working])
    double.faults.clear()
    # A person was quicker than the next reader.
    label = next(iter(double.state.labels.values()))["id"]
    double.state.write([1], {"shapes": [{"type": "rectangle", "frame": 0, "label_id": label, "points": [1, 2, 50, 60]}]}, "create")
    read = one(connected(double, engine))
    assert [a.id for a in read.annotations[:4]] == [a.id for a in machine("a.jpg")] and read.runs == working.runs
    assert [a.source for a in read.annotations[4:]] == ["human:unknown"]


def test_a_label_that_was_deleted_in_cvat_is_told_and_blocks_nothing(server: CvatServer, double: CvatDouble, pixels: Path) -> None:
    opened(server, pixels, "a.jpg")
    working = propose(one(server), "r1", "model:m@1", machine("a.jpg"))
    double.state.delete_label(1)
    with pytest.raises(Invalid, match="'RBC'.*knows WBC, Platelets.*Add the label"):
        server.write("cells", [working])
    assert one(server).annotations is None
    server.open_task("cells", CELLS)
    assert server.write("cells", [working]) == [] and len(one(server).annotations) == 4


def test_a_task_and_a_project_that_were_deleted_in_cvat_are_told(server: CvatServer, double: CvatDouble, pixels: Path) -> None:
    opened(server, pixels, "a.jpg")
    server.add_frames("cells", [(LabeledFrame(frame("b.jpg")), pixels)])
    working = one(server)
    double.state.delete_task(1)
    assert server.frame_names("cells") == ["b.jpg"] and server.read("cells", ["a.jpg"]) == {}
    with pytest.raises(NotFound, match="task 1, which held 'a.jpg' of cells, was deleted in CVAT. Upload"):
        server.write("cells", [replace(working, annotations=(box(),))])
    with pytest.raises(NotFound, match="was deleted in CVAT"):
        server.review_url("cells", "a.jpg")
    assert server.add_frames("cells", [(LabeledFrame(frame("a.jpg")), pixels), (LabeledFrame(frame("b.jpg")), pixels)]) == 1
    assert server.frame_names("cells") == ["a.jpg", "b.jpg"]
    double.state.delete_project(server.project("cells"))
    with pytest.raises(NotFound, match="was deleted in CVAT.*published versions are kept"):
        server.frame_names("cells")
    assert server.tasks() == []
    opened(server, pixels, "a.jpg", "b.jpg")


def test_a_task_deleted_in_the_middle_of_a_write_is_told(server: CvatServer, double: CvatDouble, pixels: Path) -> None:
    opened(server, pixels, "a.jpg")
    working = replace(one(server), annotations=(box(),))
    double.before = lambda method, path: double.state.delete_task(1) if method == "PATCH" else None
    with pytest.raises(NotFound, match="deleted in CVAT while it was written to"):
        server.write("cells", [working])


def test_a_deletion_whose_answer_is_lost_is_done(server: CvatServer, double: CvatDouble, pixels: Path) -> None:
    opened(server, pixels, "a.jpg")
    double.fail("DELETE", "projects", "lost")
    server.delete_task("cells")
    assert double.state.projects == {} and server.tasks() == []


def test_jobs_and_tasks_of_others_are_not_touched(server: CvatServer, double: CvatDouble, pixels: Path) -> None:
    opened(server, pixels, "a.jpg")
    server.open_task("others", CELLS)
    server.add_frames("others", [(LabeledFrame(frame("a.jpg")), pixels)])
    people, foreign = server.people("cells"), server.people("others").jobs()[0]
    for call in (lambda: people.set_job(foreign.id, state="completed"), lambda: people.add_issue(foreign.id, 0, (1, 1, 2, 2), "m"),
                 lambda: people.make_ground_truth(foreign.task_id, [0]), lambda: people.measure_quality(foreign.task_id)):
        with pytest.raises(NotFound, match="another project"):
            call()
    assert server.people("others").jobs() == [foreign]
    # A task that a person made in our project is left alone.
    double.state.make_task({"name": "cells by hand", "project_id": server.project("cells")})
    server.add_frames("cells", [(LabeledFrame(frame("b.jpg")), pixels)])
    assert server.frame_names("cells") == ["a.jpg", "b.jpg"] and len(double.state.tasks) == 4


def test_a_project_that_is_not_ours_is_not_taken(server: CvatServer, double: CvatDouble, engine: object, pixels: Path) -> None:
    foreign = double.state.make_project({"name": "cells", "labels": [{"name": "car"}]})["id"]
    with pytest.raises(Conflict, match=f"number {foreign}.*did not make"):
        server.open_task("cells", CELLS)
    with pytest.raises(NotFound):
        server.delete_task("cells")
    assert foreign in double.state.projects and server.tasks() == []
    double.state.make_project({"name": "left"})  # an empty one is what a kill leaves
    server.open_task("left", CELLS)
    assert len(double.state.projects) == 2
    with cvat() as other, pytest.raises(Conflict, match="cvat_url"):
        connected(other, engine).task("left")


# Jobs, issues, quality


def test_jobs_are_moved_on_issues_written_and_quality_measured(server: CvatServer, pixels: Path) -> None:
    opened(server, pixels, "a.jpg", "b.jpg")
    annotated(server)
    people = server.people("cells")
    job, = people.jobs()
    assert (job.stage, job.state, job.assignee, job.frames, job.is_accepted) == ("annotation", "new", "", 2, False)
    assert people.set_job(job.id, assignee="worker1", state="completed").assignee == "worker1"
    moved = people.set_job(job.id, stage="validation")
    assert (moved.stage, moved.state) == ("validation", "completed")  # CVAT alone would have reset it
    assert people.set_job(job.id, assignee="").assignee == "" and people.set_job(job.id) == people.jobs()[0]
    for wrong, words in (({"stage": "review"}, "Stage 'review'"), ({"state": "done"}, "State 'done'"),
                         ({"assignee": "nobody"}, "no user 'nobody'")):
        with pytest.raises(Invalid, match=words):
            people.set_job(job.id, **wrong)
    issue = people.add_issue(job.id, 1, (1, 1, 5, 5), "box is loose")
    with pytest.raises(Invalid, match="frame of 0 to 1"):
        people.add_issue(job.id, 7, (1, 1, 5, 5), "m")
    assert [(one.id, one.frame, one.message, one.is_resolved) for one in people.issues()] == [(issue, 1, "box is loose", False)]
    people.resolve_issue(issue)
    assert people.issues(is_resolved=False) == [] and len(people.issues()) == 1
    with pytest.raises(Conflict, match="ground truth job"):
        people.measure_quality(job.task_id)
    truth = people.make_ground_truth(job.task_id, [0])
    assert people.make_ground_truth(job.task_id, [0]) == truth and truth.type == "ground_truth"
    people.set_job(truth.id, "acceptance", "completed")
    report = people.measure_quality(job.task_id)
    assert (report.task_id, report.frames, report.precision) == (job.task_id, 1, 0.0)
    assert people.quality(job.task_id) == [report]
    assert len(one(server).annotations) == 4 and server.frame_names("cells") == ["a.jpg", "b.jpg"]


# Several processes, and kills


CHILD = """
import sys
from pathlib import Path
from workbench.adapters.cvat import Connection, CvatServer
from workbench.annotation import Annotation
from workbench.dataset import Frame, LabeledFrame
from workbench.records import Records
from workbench.run import propose
from workbench.taxonomy import Taxonomy
from dataclasses import replace
url, database, pixels, what, me = sys.argv[1:]
server = CvatServer(Connection(url, "rw.secret"), Records(database).engine, job_size=4)
names = [f"{n:03}.jpg" for n in range(20)]
def frames():
    for n, name in enumerate(names):
        drawn = (Annotation("RBC", xyxy=(1, 2, 30, 40), source="human:ann", id=f"given{n}"),) if n % 5 == 0 else None
        yield LabeledFrame(Frame(name, 640, 480, "0" * 32), drawn), Path(pixels)
if what == "fill":
    server.open_task("cells", Taxonomy(("RBC", me)))
    print("added", server.add_frames("cells", frames()))
if what == "write":
    for name in names:
        while True:
            working = server.read("cells", [name])[name]
            if not server.write("cells", [replace(working, annotations=(working.annotations or ()) + (
                    Annotation(me, xyxy=(1, 2, 30, 40), id=f"{me}{name}"),))]):
                break
if what == "run":
    for start in range(0, 20, 5):
        read = server.read("cells", names[start:start + 5])
        server.write("cells", [propose(one, "r1", "model:m@1", tuple(
            Annotation("RBC", xyxy=(100.0 * n, 50, 100.0 * n + 80, 150), source="model:m@1", confidence=0.5, id=f"{name}/{n}")
            for n in range(3))) for name, one in read.items()])
print("done")
"""


def child(double: CvatDouble, tmp_path: Path, pixels: Path, what: str, me: str = "ann") -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", CHILD, double.url, f"sqlite:///{tmp_path}/records.sqlite", str(pixels), what, me],
                            cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_open_fill_and_write_one_task(server: CvatServer, double: CvatDouble, tmp_path: Path, pixels: Path) -> None:
    for what in ("fill", "write"):
        processes = [child(double, tmp_path, pixels, what, me) for me in ("ann", "bob")]
        outputs = [process.communicate(timeout=240) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
        if what == "fill":
            assert sorted(output.split()[1] for output, _ in outputs) == ["0", "20"]
    read = server.read("cells", server.frame_names("cells"))
    assert len(read) == 20 and len(double.state.projects) == 1 and max(Counter(double.state.received).values()) == 1
    assert all({"ann", "bob"} <= {a.label for a in working.annotations} for working in read.values())
    assert all(len({a.id for a in working.annotations}) == len(working.annotations) for working in read.values())
    assert len(shapes(double)) == 44


@pytest.mark.parametrize("what,method,path,at,is_carried_out", [
    ("fill", "POST", "projects$", 1, True), ("fill", "PATCH", "projects/1$", 1, True), ("fill", "POST", "tasks$", 1, True),
    ("fill", "POST", "data", 1, True), ("fill", "POST", "data", 2, False), ("fill", "POST", "data", 2, True),
    ("fill", "POST", "data", 3, True), ("fill", "GET", "meta", 1, True), ("fill", "PATCH", "create", 1, True),
    ("run", "PATCH", "create", 1, False), ("run", "PATCH", "create", 3, True), ("run", "GET", "labels", 4, True)])
def test_a_kill_at_any_request_ends_as_if_nothing_had_been(double: CvatDouble, engine: object, tmp_path: Path, pixels: Path, what: str,
                                                           method: str, path: str, at: int, is_carried_out: bool) -> None:
    """Killed at its `at`-th request of this kind, before or after the server carried that request out."""
    server = connected(double, engine, job_size=4)
    if what == "run":
        server.open_task("cells", CELLS)
        given = {name: (box(source="human:ann", id=f"given{n}"),) for n, name in enumerate(NAMES) if n % 5 == 0}
        assert server.add_frames("cells", [(LabeledFrame(frame(name), given.get(name)), pixels) for name in NAMES]) == 20
    asked, running = [], child(double, tmp_path, pixels, what)

    def kill(called: str, address: str) -> None:
        if called == method and re.search(path, address):
            asked.append(address)
        if len(asked) == at and running.poll() is None:
            if not is_carried_out:
                double.fail(called, ".", "silence")
            os.kill(running.pid, signal.SIGKILL)
            running.wait(30)

    double.before = kill
    output, errors = running.communicate(timeout=120)
    assert running.returncode == -signal.SIGKILL, (output, errors, asked)
    double.before = lambda method, path: None
    start = time.monotonic()
    output, errors = child(double, tmp_path, pixels, what).communicate(timeout=120)
    assert output.split()[-1:] == ["done"], errors[-2000:]
    assert time.monotonic() - start < 60  # the dead process's lock is taken over at once
    read = server.read("cells", server.frame_names("cells"))
    assert list(read) == NAMES and max(Counter(double.state.received).values()) == 1
    assert [name for name, working in read.items() if working.status == "accepted"] == NAMES[::5]
    for n, (name, working) in enumerate(read.items()):
        ids = [f"given{n}"] if n % 5 == 0 else [f"{name}/{k}" for k in range(3)] if what == "run" else []
        assert [a.id for a in working.annotations or ()] == ids
    assert len(shapes(double)) == 4 + (48 if what == "run" else 0)
    assert len(double.state.projects) == 1 and len([task for task in double.state.tasks.values() if task["size"]]) == 1


@pytest.mark.parametrize("machine_name,process,age_s,is_free", [
    ("another", "1|5.00", -1, True), ("another", "1|5.00", 60, False), (socket.gethostname(), "999999|5.00", 60, True),
    (socket.gethostname(), f"{os.getpid()}|5.00", 60, True),  # a number given to another process since
    (socket.gethostname(), f"{os.getpid()}|{psutil.Process().create_time():.2f}", -1, False)])
def test_a_lock_is_taken_over_from_the_dead_only(engine: object, monkeypatch: pytest.MonkeyPatch, machine_name: str, process: str,
                                                 age_s: float, is_free: bool) -> None:
    monkeypatch.setattr(state, "WAIT_S", 0.2)
    state.State(engine)
    with engine.begin() as connection:
        connection.execute(state.locks.insert(), {"name": "write:cells", "holder": f"{machine_name}|{process}|x",
                                                  "until": time.time() + age_s})
    if is_free:
        with state.State(engine).lock("write:cells") as renew:
            renew()
        return
    with pytest.raises(Unavailable, match="Another process has been writing to CVAT"), state.State(engine).lock("write:cells"):
        pass


def test_nothing_that_is_no_number_reaches_the_wire(server: CvatServer, double: CvatDouble) -> None:
    server.open_task("cells", CELLS)
    calls = len(double.journal)
    with pytest.raises(Invalid, match="finite numbers"):
        server.connection.call("PATCH", "/api/tasks/1/annotations", {"shapes": [{"points": [float("inf")]}]})
    assert len(double.journal) == calls
    assert json.dumps(shapes(double)) == "[]"

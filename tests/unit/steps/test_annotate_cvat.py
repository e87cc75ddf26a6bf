"""The annotate step on a CVAT task: batches, kills, people's work in CVAT, exact undo, two runs at once."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from doubles import graphs
from doubles.cvat import READ_ONLY, READ_WRITE, CvatDouble, cvat

from workbench.adapters.cvat import Connection, CvatServer
from workbench.adapters.local_models import LocalModels
from workbench.adapters.onnxruntime import OnnxRuntime
from workbench.annotation import Annotation
from workbench.blobs import Blobs
from workbench.certificates import Certificates
from workbench.dataset import Frame, LabeledFrame
from workbench.errors import Invalid, NotFound
from workbench.ports import Quiet
from workbench.records import Records
from workbench.steps.annotate import AnnotateReport, annotate, undo_run
from workbench.taxonomy import Taxonomy

PROJECT = Path(__file__).resolve().parents[3]
RED, BLUE = (255, 0, 0), (0, 0, 255)
NAMES = [f"f{number:02}.png" for number in range(12)]
# What red_finder draws around the cells that are painted below.
RED_BOX, BLUE_BOX = (4, 4, 20, 20), (36, 12, 52, 28)
AGAIN = ("new", "annotated")


@dataclass
class Bench:
    """A double of CVAT with twelve pictures in one task of jobs of five, and the parts a run needs."""

    folder: Path
    double: CvatDouble
    records: Records

    @property
    def server(self) -> CvatServer:
        """A new one each time, as each process has its own."""
        return self.with_token(READ_WRITE)

    def with_token(self, token: str) -> CvatServer:
        connection = Connection(self.double.url, token, pause=lambda seconds: None)
        return CvatServer(connection, self.records.engine, job_size=5)

    def run(self, run_id: str = "run1", server: CvatServer | None = None, **more: Any) -> AnnotateReport:
        return annotate("squares", "finder@1", run_id=run_id, server=server or self.server, records=self.records,
                        models=LocalModels(self.folder / "models"), blobs=Blobs(str(self.folder / "blobs")),
                        certificates=Certificates(self.records, self.folder / "key"), job=Quiet(),
                        open_backend=lambda graph: OnnxRuntime(graph, threads=1), **more)

    def undo(self, run_id: str = "run1") -> int:
        return undo_run("squares", run_id, server=self.server, records=self.records, job=Quiet()).frames

    def stored(self) -> list[tuple[Any, ...]]:
        """(frame's name, our id, label id, points, source, score) of every drawing in CVAT."""
        own = {spec["id"] for label in self.double.state.labels.values() for spec in label["attributes"]
               if spec["name"] == "wb_id"}
        names = {job: self.double.state.tasks[one["task_id"]]["frames"] for job, one in self.double.state.jobs.items()}
        return sorted((names[job][one["frame"]]["name"],
                       next((a["value"] for a in one["attributes"] if a["spec_id"] in own), ""),
                       one["label_id"], tuple(one["points"]), one["source"], one["score"])
                      for job, records in self.double.state.records.items() for one in records["shapes"])

    def kept(self) -> dict[str, Any]:
        """All of every frame but its revision and the order of its drawings."""
        read = self.server.read("squares", NAMES)
        return {name: (sorted(json.dumps(a.to_json(), sort_keys=True) for a in one.annotations or ()),
                       one.annotations is None, [run.to_json() for run in one.runs], one.status)
                for name, one in read.items()}

    def in_cvat(self, name: str, action: str, **changes: Any) -> None:
        """What a person's browser sends: the first drawing of a frame changed or deleted, or a new one."""
        task = next(iter(self.double.state.tasks))
        stored = self.server.connection.get(f"/api/tasks/{task}/annotations")["shapes"]
        number = NAMES.index(name)
        label = next(key for key, one in self.double.state.labels.items() if one["name"] == "blue")
        record = {"type": "rectangle", "label_id": label, "frame": number, "source": "manual"}
        if action != "create":
            record = next(one for one in stored if one["frame"] == number)
        self.server.connection.call("PATCH", f"/api/tasks/{task}/annotations",
                                    {"shapes": [{**record, **changes}], "tags": []}, {"action": action})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cvat-runs")
    LocalModels(folder / "models").register(graphs.red_finder(folder / "finder"), folder / "finder")
    return folder


@pytest.fixture
def bench(models: Path, tmp_path: Path) -> Iterator[Bench]:
    """Of four pictures in a row one has a red square, one a blue one, one both, one nothing."""
    with cvat() as double:
        bench = Bench(models, double, Records(f"sqlite:///{tmp_path}/records.sqlite"))
        blobs, frames = Blobs(str(models / "blobs")), []
        for number, name in enumerate(NAMES):
            image = np.full((64, 64, 3), number, np.uint8)
            if number % 4 in (0, 2):
                image[8:16, 8:16] = RED
            if number % 4 in (1, 2):
                image[16:24, 40:48] = BLUE
            made = blobs.put(cv2.imencode(".png", image[:, :, ::-1])[1].tobytes())
            frame = Frame(name, 64, 64, made.md5, made.sha256, made.size_bytes)
            frames.append((LabeledFrame(frame), blobs.path(made.md5)))
        bench.server.open_task("squares", Taxonomy(("red", "blue")))
        assert bench.server.add_frames("squares", frames) == len(NAMES)
        yield bench


def test_a_run_writes_many_frames_at_once_and_takes_no_pixels_from_cvat(bench: Bench) -> None:
    report = bench.run()
    assert (report.frames, report.boxes, report.by_label, report.failed, report.skipped) == (
        12, 12, {"blue": 6, "red": 6}, 0, {})
    assert len(bench.double.calls("PATCH", "action=create")) == 1
    assert bench.double.calls("GET", "type=(chunk|frame)") == bench.double.calls("PATCH", "update|delete") == []
    assert {one[3:5] for one in bench.stored()} == {(RED_BOX, "auto"), (BLUE_BOX, "auto")}
    assert all(0.99 < score <= 1 for *_, score in bench.stored())
    assert bench.run().detected == 0 and len(bench.double.calls("PATCH", "annotations")) == 1  # a repeat writes nothing


def test_a_rerun_replaces_only_what_machines_drew_and_no_person_touched(bench: Bench) -> None:
    bench.run()
    bench.in_cvat("f00.png", "update", points=[5, 5, 21, 21])      # moved
    bench.in_cvat("f04.png", "delete")                             # removed
    bench.in_cvat("f03.png", "create", points=[30, 30, 50, 50])    # drawn
    bench.in_cvat("f01.png", "create", points=[1, 40, 20, 60])     # drawn beside the machine's
    report = bench.run("run2", statuses=AGAIN)
    read = bench.server.read("squares", NAMES)
    assert report.frames == 12 and {name: [(a.xyxy, a.attributes.get("run_id")) for a in read[name].annotations]
                                    for name in ("f00.png", "f01.png", "f03.png", "f04.png", "f08.png")} == {
        "f00.png": [((5, 5, 21, 21), "run1")], "f01.png": [((1, 40, 20, 60), None), (BLUE_BOX, "run2")],
        "f03.png": [((30, 30, 50, 50), None)], "f04.png": [], "f08.png": [(RED_BOX, "run2")]}
    assert len(bench.stored()) == len({own or name for name, own, *_ in bench.stored()}) == 13


def test_undoing_a_run_restores_what_stood_there_to_the_last_drawing(bench: Bench) -> None:
    bench.run()
    bench.in_cvat("f03.png", "create", points=[30, 30, 50, 50])
    bench.in_cvat("f08.png", "update", points=[5, 5, 21, 21])
    kept, stored = bench.kept(), bench.stored()
    bench.run("run2", statuses=AGAIN)
    assert bench.stored() != stored
    assert bench.undo("run2") == 12 and bench.kept() == kept
    # CVAT's own words of a drawing that was taken away and came back are the same too.
    assert bench.stored() == stored
    assert bench.undo("run2") == 0 and bench.undo("run1") == 12
    read = bench.server.read("squares", NAMES)
    left = {name: [a.xyxy for a in one.annotations] for name, one in read.items() if one.annotations}
    assert left == {"f03.png": [(30, 30, 50, 50)], "f08.png": [(5, 5, 21, 21)]} and len(bench.stored()) == 2


def test_work_that_a_person_saves_after_the_run_read_the_frame_stays(bench: Bench) -> None:
    """Saved while the model looks: the write is refused for that frame, which is read again."""
    bench.run()
    saved, server, write = [], bench.server, CvatServer.write

    def late(dataset: str, frames: Any) -> list[str]:
        if not saved:
            saved.append("moved")
            bench.in_cvat("f00.png", "update", points=[5, 5, 21, 21])
        return write(server, dataset, frames)

    server.write = late
    report = bench.run("run2", server=server, statuses=AGAIN)
    read = bench.server.read("squares", NAMES)
    assert saved == ["moved"] and report.frames == 12 and report.skipped == {}
    assert [(a.xyxy, a.attributes["run_id"]) for a in read["f00.png"].annotations] == [((5, 5, 21, 21), "run1")]
    assert len(bench.stored()) == 12


def test_two_runs_on_one_task_at_once_leave_every_frame_as_one_of_them_drew_it(bench: Bench) -> None:
    bench.double.cost_s = lambda method, path, size: 0.003
    reports: dict[str, AnnotateReport] = {}
    threads = [threading.Thread(target=lambda run=run: reports.update({run: bench.run(run, statuses=AGAIN, batch=2)}))
               for run in ("run1", "run2")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    reasons = {reason for one in reports.values() for reason in one.skipped}
    assert set(reports) == {"run1", "run2"}
    assert reasons <= {"held by run:run1", "held by run:run2", "changed meanwhile"}
    read, stored = bench.server.read("squares", NAMES), bench.stored()
    for number, name in enumerate(NAMES):
        drawn = read[name].annotations
        assert len(drawn) == (1, 1, 2, 0)[number % 4] and len({a.attributes["run_id"] for a in drawn}) <= 1
        assert sorted(a.id for a in drawn) == sorted(own for held, own, *_ in stored if held == name)
        assert read[name].status == "annotated" and len(read[name].runs) in (1, 2)
    assert sum(one.frames for one in reports.values()) == sum(len(one.runs) for one in read.values())
    for run in ("run2", "run1", "run2"):  # whichever came last on a frame goes first
        bench.undo(run)
    assert bench.stored() == [] and all(one.annotations is None for one in bench.server.read("squares", NAMES).values())


CHILD = """
import sys
from pathlib import Path
from workbench.adapters.cvat import Connection, CvatServer
from workbench.adapters.local_models import LocalModels
from workbench.adapters.onnxruntime import OnnxRuntime
from workbench.blobs import Blobs
from workbench.certificates import Certificates
from workbench.ports import Quiet
from workbench.records import Records
from workbench.steps.annotate import annotate
folder, url, token, database = sys.argv[1:]
records, folder = Records(database), Path(folder)
annotate("squares", "finder@1", run_id="run2", records=records, models=LocalModels(folder / "models"), job=Quiet(),
         server=CvatServer(Connection(url, token), records.engine, job_size=5), blobs=Blobs(str(folder / "blobs")),
         certificates=Certificates(records, folder / "key"), statuses=("new", "annotated"), batch=4,
         open_backend=lambda graph: OnnxRuntime(graph, threads=1))
"""


@pytest.mark.parametrize("path,at,is_carried_out", [
    ("action=create", 2, True), ("action=delete", 1, False), ("jobs/", 3, True)])
def test_a_run_killed_in_the_middle_and_repeated_ends_like_an_undisturbed_one(
        bench: Bench, path: str, at: int, is_carried_out: bool) -> None:
    """kill -9 at the `at`-th such request of a run that replaces an earlier one beside people's work."""
    bench.run()
    bench.in_cvat("f00.png", "update", points=[5, 5, 21, 21])
    bench.in_cvat("f03.png", "create", points=[30, 30, 50, 50])
    bench.run("run2", statuses=AGAIN, batch=4)
    kept, stored = bench.kept(), bench.stored()
    assert bench.undo("run2") == 12
    with bench.records.engine.begin() as connection:  # as if it had never been
        connection.exec_driver_sql("delete from machine_runs where subject = 'run2'")
    asked: list[str] = []
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(bench.folder), bench.double.url, READ_WRITE,
                              str(bench.records.engine.url)], cwd=PROJECT, stderr=subprocess.PIPE, text=True,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})

    def kill(method: str, address: str) -> None:
        asked.extend([address] if re.search(path, address) else [])
        if len(asked) == at and child.poll() is None:
            if not is_carried_out:
                bench.double.fail(method, ".", "silence")
            child.send_signal(signal.SIGKILL)
            child.wait(30)

    bench.double.before = kill
    _, errors = child.communicate(timeout=120)
    bench.double.before = lambda method, path: None
    assert child.returncode == -signal.SIGKILL, errors[-2000:]
    assert bench.kept() != kept  # it really was in the middle
    report = bench.run("run2", statuses=AGAIN, batch=4)
    assert bench.kept() == kept and bench.stored() == stored and report.frames == 12
    assert bench.records.leased("squares") == {}


def test_a_run_on_a_task_that_is_deleted_meanwhile_says_so_and_keeps_the_rest(bench: Bench) -> None:
    task = next(iter(bench.double.state.tasks))

    def delete(method: str, path: str) -> None:
        if method == "PATCH" and len(bench.double.calls("PATCH", "create")) == 1:
            bench.double.state.tasks.get(task) and bench.double.state.delete_task(task)

    bench.double.before = delete
    with pytest.raises(NotFound, match="deleted in CVAT"):
        bench.run(batch=5)
    assert bench.records.leased("squares") == {}


def test_a_read_only_token_is_told_before_anything_is_drawn(bench: Bench) -> None:
    with pytest.raises(Invalid, match="may only read"):
        bench.run(server=bench.with_token(READ_ONLY))
    assert bench.stored() == [] and bench.records.leased("squares") == {}
    assert bench.run().frames == 12  # the same run goes on with a token that may write


def test_labels_the_project_lacks_are_left_out_and_none_in_common_is_told(bench: Bench) -> None:
    label = next(key for key, one in bench.double.state.labels.items() if one["name"] == "red")
    bench.double.state.labels[label]["name"] = "crimson"
    assert bench.run().left_out == {"red": 6}
    blue = next(key for key, one in bench.double.state.labels.items() if one["name"] == "blue")
    bench.double.state.labels[blue]["name"] = "navy"
    with pytest.raises(Invalid, match="share no label"):
        bench.run("run2", statuses=AGAIN)


def test_a_box_that_cvat_kept_carries_model_run_and_score(bench: Bench) -> None:
    bench.run()
    (drawn,) = bench.server.read("squares", ["f00.png"])["f00.png"].annotations
    assert isinstance(drawn, Annotation) and (drawn.source, drawn.attributes) == ("model:finder@1", {"run_id": "run1"})
    score = next(score for name, *_, score in bench.stored() if name == "f00.png")
    assert drawn.confidence == pytest.approx(score, abs=1e-4)

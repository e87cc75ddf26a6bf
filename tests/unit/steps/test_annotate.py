"""A model draws, people's work stays, kills change nothing, and every run can be taken back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from doubles import graphs
from doubles.annotation_server import MemoryServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workbench.adapters.local_models import LocalModels
from workbench.adapters.onnxruntime import OnnxRuntime
from workbench.annotation import Annotation
from workbench.blobs import Blobs
from workbench.certificates import Certificates
from workbench.dataset import Frame, LabeledFrame
from workbench.errors import Cancelled, Conflict, Invalid, NotFound
from workbench.ports import Quiet
from workbench.records import Records
from workbench.run import WorkingFrame, touch
from workbench.steps.annotate import AnnotateReport, annotate, preview_labels, undo_run
from workbench.taxonomy import Taxonomy

RED, BLUE = (255, 0, 0), (0, 0, 255)
COLOURS = Taxonomy(("red", "blue"))
# Cell (column, row) of 8 px -> the box that red_finder draws around its middle.
FOUND = {(1, 1): (4, 4, 20, 20), (5, 2): (36, 12, 52, 28)}


@dataclass(frozen=True)
class Stores:
    models: LocalModels
    blobs: Blobs
    frames: tuple[LabeledFrame, ...]
    certificates: Certificates


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Stores:
    """Seven pictures: a red square, a blue one, both, or nothing, in turn; and the finder of red and blue squares."""
    folder = tmp_path_factory.mktemp("annotate")
    models, blobs = LocalModels(folder / "models"), Blobs(str(folder / "blobs"))
    models.register(graphs.red_finder(folder / "finder"), folder / "finder")
    frames = []
    for number in range(7):
        image = np.full((64, 64, 3), number, np.uint8)
        if number % 4 in (0, 2):
            image[8:16, 8:16] = RED
        if number % 4 in (1, 2):
            image[16:24, 40:48] = BLUE
        made = blobs.put(cv2.imencode(".png", image[:, :, ::-1])[1].tobytes())
        frames.append(LabeledFrame(Frame(f"f{number}.png", 64, 64, made.md5, made.sha256, made.size_bytes)))
    return Stores(models, blobs, tuple(frames), Certificates(Records("sqlite://"), folder / "key"))


@pytest.fixture
def server(stores: Stores) -> MemoryServer:
    return filled(stores)


@pytest.fixture
def records() -> Records:
    return Records("sqlite://")


def filled(stores: Stores, taxonomy: Taxonomy = COLOURS) -> MemoryServer:
    server = MemoryServer()
    server.open_task("squares", taxonomy)
    server.add_frames("squares", [(one, Path("unused")) for one in stores.frames])
    return server


def run(
    stores: Stores, server: Any, records: Any, run_id: str = "run1", job: Any = None, **more: Any
) -> AnnotateReport:
    more = {"batch": 2, "blobs": stores.blobs, "certificates": stores.certificates, **more}
    return annotate("squares", "finder@1", run_id=run_id, server=server, models=stores.models, records=records,
                    open_backend=lambda path: OnnxRuntime(path, threads=1), job=job or Quiet(), **more)


def state(server: MemoryServer) -> dict[str, Any]:
    """Everything that is kept of every frame, but the revision."""
    return {
        name: replace(working, revision="")
        for name, working in server.read("squares", server.frame_names("squares")).items()
    }


def test_every_frame_gets_the_boxes_the_model_sees(stores: Stores, server: MemoryServer, records: Records) -> None:
    job = Quiet()
    report = run(stores, server, records, job=job)
    assert (report.frames, report.boxes, report.by_label, report.failed) == (7, 8, {"blue": 4, "red": 4}, 0)
    assert report.skipped == report.left_out == {} and report.unmatched_labels == () and report.detected == 7
    assert report.backend["backend"] == "onnxruntime" and report.images_per_s > 0
    drawn = server.read("squares", ["f2.png"])["f2.png"]
    assert drawn.status == "annotated" and {(a.label, a.xyxy) for a in drawn.annotations} == {
        ("red", FOUND[1, 1]), ("blue", FOUND[5, 2])}
    assert {(a.source, a.attributes["run_id"], a.is_machine) for a in drawn.annotations} == {
        ("model:finder@1", "run1", True)
    }
    assert all(0.99 < a.confidence <= 1 for a in drawn.annotations)
    # Looked at and nothing found is not the same as never looked at.
    assert server.read("squares", ["f3.png"])["f3.png"].annotations == ()
    assert (job.done, job.total, job.failed) == (7, 7, {}) and records.leased("squares") == {}
    entries = records.entries("machine_runs", "squares", "run1")
    assert (
        entries[0].facts["boxes"] == 8 and entries[0].facts["is_finished"] and entries[-1].facts["model"] == "finder@1"
    )


def test_repeating_a_finished_run_changes_nothing(stores: Stores, server: MemoryServer, records: Records) -> None:
    first, before = run(stores, server, records), state(server)
    again = run(stores, server, records)
    assert state(server) == before and (again.frames, again.boxes, again.by_label) == (
        first.frames,
        first.boxes,
        first.by_label,
    )
    assert again.detected == 0 and len(records.entries("machine_runs", "squares")) == 2


def test_a_second_run_replaces_the_first_one_s_boxes(stores: Stores, server: MemoryServer, records: Records) -> None:
    run(stores, server, records)
    assert run(stores, server, records, run_id="run2").frames == 0  # no frame is new any more
    report = run(stores, server, records, run_id="run3", statuses=("new", "annotated"), renames={"red": "blue"})
    assert report.by_label == {"blue": 8}
    assert {a.attributes["run_id"] for one in state(server).values() for a in one.annotations} == {"run3"}


class TestLabels:
    def test_boxes_of_labels_that_do_not_match_are_left_out_and_counted(self, stores: Stores, records: Records) -> None:
        server = filled(stores, Taxonomy(("blue", "green")))
        report = run(stores, server, records)
        assert (report.by_label, report.left_out, report.unmatched_labels) == ({"blue": 4}, {"red": 4}, ("red",))

    def test_a_person_may_map_them(self, stores: Stores, records: Records) -> None:
        report = run(stores, filled(stores, Taxonomy(("blue", "green"))), records, renames={"red": "green"})
        assert report.by_label == {"blue": 4, "green": 4} and report.left_out == {}

    def test_a_data_set_without_labels_takes_the_model_s(self, stores: Stores, records: Records) -> None:
        server = filled(stores, Taxonomy(()))
        assert run(stores, server, records).boxes == 8 and server.task("squares").labels == ("red", "blue")

    def test_a_model_that_knows_none_of_them_writes_nothing(self, stores: Stores, records: Records) -> None:
        server = filled(stores, Taxonomy(("cat",)))
        before = state(server)
        with pytest.raises(Invalid, match="share no label: the model knows red, blue, the data set cat"):
            run(stores, server, records)
        with pytest.raises(Invalid, match="Cannot map"):
            run(stores, server, records, renames={"red": "dog"})
        assert state(server) == before and records.entries("machine_runs") == []

    def test_the_preview_tells_what_matches(self, stores: Stores) -> None:
        card = stores.models.card("finder@1")
        labels = preview_labels(card, Taxonomy(("blue", "green")))
        assert (labels.pairs, labels.unmatched, labels.unreached) == ({"blue": "blue"}, ("red",), ("green",))
        assert preview_labels(card, Taxonomy(())).pairs == {"red": "red", "blue": "blue"}


class TestPeople:
    def test_frames_that_a_person_holds_are_left_alone(
        self, stores: Stores, server: MemoryServer, records: Records
    ) -> None:
        before = state(server)
        records.lease("squares", "f1.png", "ann")
        report = run(stores, server, records)
        assert report.skipped == {"held by ann": 1} and report.frames == 6
        assert state(server)["f1.png"] == before["f1.png"] and records.leased("squares") == {"f1.png": "ann"}

    def test_a_frame_that_was_accepted_while_the_model_looked_is_left_alone(self, stores: Stores, server: MemoryServer,
                                                                            records: Records) -> None:
        class Meanwhile(Quiet):
            def check(self) -> None:
                now = server.read("squares", ["f6.png"])["f6.png"]
                if not now.is_reviewed:
                    server.write("squares", [replace(now, annotations=(), status="accepted", reviewed_by="ann")])

        report = run(stores, server, records, job=Meanwhile())
        assert report.skipped == {"reviewed": 1} and report.frames == 6
        assert (state(server)["f6.png"].annotations, state(server)["f6.png"].status) == ((), "accepted")

    def test_a_frame_that_changes_between_reading_and_writing_is_tried_again(self, stores: Stores, server: MemoryServer,
                                                                             records: Records) -> None:
        hand = Annotation("green", (30, 40, 60, 60), source="human:ann")
        server.open_task("squares", Taxonomy(("green",)))
        report = run(stores, Interfering(server, "f0.png", hand, times=1), records)
        assert report.frames == 7 and report.skipped == {}
        assert hand in state(server)["f0.png"].annotations and len(state(server)["f0.png"].annotations) == 2

    def test_a_frame_that_keeps_changing_is_given_up_and_told(
        self, stores: Stores, server: MemoryServer, records: Records
    ) -> None:
        hand = Annotation("green", (30, 40, 60, 60), source="human:ann")
        server.open_task("squares", Taxonomy(("green",)))
        report = run(stores, Interfering(server, "f0.png", hand, times=9), records)
        assert report.frames == 6 and report.skipped == {"changed meanwhile": 1}
        assert state(server)["f0.png"].annotations == (hand,) and records.leased("squares") == {}


class Interfering:
    """A server in which somebody draws on one frame just before it is written."""

    def __init__(self, server: MemoryServer, name: str, hand: Annotation, times: int) -> None:
        self._server, self._name, self._hand, self._times = server, name, hand, times

    def __getattr__(self, method: str) -> Any:
        return getattr(self._server, method)

    def write(self, dataset: str, frames: list[WorkingFrame]) -> list[str]:
        if self._times and any(one.frame.name == self._name for one in frames):
            self._times -= 1
            now = self._server.read(dataset, [self._name])[self._name]
            drawn = tuple(a for a in now.annotations or () if a.id != self._hand.id) + (self._hand,)
            self._server.write(dataset, [replace(now, annotations=drawn, status="annotated")])
        return self._server.write(dataset, frames)


class TestBadInput:
    def test_pixels_that_cannot_be_read_fail_alone(
        self, stores: Stores, server: MemoryServer, records: Records, tmp_path: Path
    ) -> None:
        blobs = Blobs(str(tmp_path / "blobs"))
        for one in stores.frames[1:]:
            blobs.put(stores.blobs.get(one.frame.blob))
        broken = blobs.path(stores.frames[2].frame.blob)
        broken.chmod(0o644)
        broken.write_bytes(b"damaged")
        text = blobs.put(b"no image")
        server.add_frames("squares", [(LabeledFrame(Frame("text.png", 64, 64, text.md5)), Path("unused"))])
        job = Quiet()
        report = run(stores, server, records, job=job, blobs=blobs)
        assert (report.frames, report.failed) == (5, 3) and (job.done, job.total) == (8, 8)
        assert set(job.failed) == {"f0.png", "f2.png", "text.png"}
        assert (
            "not in" in job.failed["f0.png"]
            and "damaged" in job.failed["f2.png"]
            and "decoded" in job.failed["text.png"]
        )
        assert server.read("squares", ["f0.png"])["f0.png"].status == "new"

    def test_an_unknown_model_or_data_set_is_not_found(
        self, stores: Stores, server: MemoryServer, records: Records
    ) -> None:
        with pytest.raises(NotFound, match="nobody@1"):
            annotate(
                "squares",
                "nobody@1",
                run_id="r",
                server=server,
                models=stores.models,
                blobs=stores.blobs,
                records=records,
                open_backend=OnnxRuntime,
                certificates=stores.certificates,
                job=Quiet(),
            )
        with pytest.raises(NotFound, match="circles"):
            annotate(
                "circles",
                "finder@1",
                run_id="r",
                server=server,
                models=stores.models,
                blobs=stores.blobs,
                records=records,
                open_backend=OnnxRuntime,
                certificates=stores.certificates,
                job=Quiet(),
            )

    @pytest.mark.parametrize("statuses", [("accepted",), ("new", "rejected"), ()])
    def test_reviewed_frames_cannot_be_asked_for(self, stores: Stores, server: MemoryServer, records: Records,
                                                 statuses: tuple[str, ...]) -> None:
        with pytest.raises(Invalid, match="new or annotated"):
            run(stores, server, records, statuses=statuses)

    def test_a_run_id_belongs_to_one_run(self, stores: Stores, server: MemoryServer, records: Records) -> None:
        run(stores, server, records)
        with pytest.raises(Conflict, match="run1"):
            run(stores, server, records, confidence=0.9)

    def test_cancelling_stops_between_batches_and_going_on_completes(
        self, stores: Stores, server: MemoryServer, records: Records
    ) -> None:
        class Impatient(Quiet):
            def check(self) -> None:
                if self.done >= 2:
                    raise Cancelled("enough")

        with pytest.raises(Cancelled):
            run(stores, server, records, job=Impatient())
        assert len(server.frame_names("squares", "annotated")) == 2 and records.leased("squares") == {}
        assert run(stores, server, records).frames == 7


class Killed(BaseException):
    """kill -9, as far as a test can have it: nothing of ours catches it."""


class Fragile:
    """Passes calls on to a part and dies at the n-th call of those that share a countdown."""

    def __init__(self, part: Any, countdown: list[int], after: bool) -> None:
        self._part, self._countdown, self._after = part, countdown, after

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._part, name)
        if not callable(value):
            return value

        def call(*args: Any, **more: Any) -> Any:
            self._countdown[0] -= 1
            if self._countdown[0] == 0 and not self._after:
                raise Killed
            result = value(*args, **more)
            if self._countdown[0] == 0:
                raise Killed
            return result
        return call


@pytest.fixture(scope="module")
def undisturbed(stores: Stores) -> Iterator[tuple[AnnotateReport, dict[str, WorkingFrame]]]:
    server = filled(stores)
    report = run(stores, server, Records("sqlite://"))
    yield report, state(server)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kills=st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=4), batch=st.integers(1, 4))
def test_a_run_killed_anywhere_and_repeated_ends_like_an_undisturbed_one(
    stores: Stores,
    undisturbed: tuple[AnnotateReport, dict[str, WorkingFrame]],
    kills: list[tuple[int, bool]],
    batch: int,
) -> None:
    server, records = filled(stores), Records("sqlite://")
    for at, after in kills:
        countdown = [at]
        try:
            run(stores, Fragile(server, countdown, after), Fragile(records, countdown, after), batch=batch,
                job=Fragile(Quiet(), countdown, after))
        except Killed:
            continue
    report = run(stores, server, records, batch=batch)
    expected, frames = undisturbed
    assert state(server) == frames
    assert (report.frames, report.boxes, report.by_label) == (expected.frames, expected.boxes, expected.by_label)
    assert records.leased("squares") == {}
    started = [entry for entry in records.entries("machine_runs") if "is_finished" not in entry.facts]
    assert len(started) == 1 and len(records.entries("machine_runs")) == 2


def hands(draw: st.DrawFn, number: int) -> tuple[Annotation, ...]:
    """What a person drew: a few boxes, some of them where the model will look."""
    spots = draw(
        st.lists(
            st.sampled_from([(4, 4, 20, 20), (36, 12, 52, 28), (6, 4, 22, 20), (30, 40, 60, 60)]),
            max_size=3,
            unique=True,
        )
    )
    return tuple(Annotation(draw(st.sampled_from(COLOURS.labels)), spot, source="human:ann", id=f"hand{number}-{index}")
                 for index, spot in enumerate(spots))


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[str, tuple[Annotation, ...]]]:
    """For each of the seven frames what happened before the run: nothing, a drawing, a decision or an open editor."""
    return [
        (draw(st.sampled_from(["nothing", "drawn", "accepted", "rejected", "held"])), hands(draw, number))
        for number in range(7)
    ]


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=histories(), kill=st.integers(1, 40), moved=st.booleans())
def test_human_work_is_never_changed_and_undoing_restores_every_frame(
        stores: Stores, history: list[tuple[str, tuple[Annotation, ...]]], kill: int, moved: bool) -> None:
    server, records = filled(stores), Records("sqlite://")
    for one, (what, drawn) in zip(stores.frames, history):
        name = one.frame.name
        if what == "held":
            records.lease("squares", name, "ann")
        elif what != "nothing":
            server.write("squares", [replace(server.read("squares", [name])[name], annotations=drawn,
                                             status="annotated" if what == "drawn" else what)])
    before = state(server)
    countdown = [kill]
    try:
        run(stores, Fragile(server, countdown, False), records, statuses=("new", "annotated"))
    except Killed:
        run(stores, server, records, statuses=("new", "annotated"))
    after = state(server)
    for one, (what, _) in zip(stores.frames, history):
        name = one.frame.name
        if what in ("accepted", "rejected", "held"):
            assert after[name] == before[name]
        else:
            assert touch(after[name]).human == (before[name].annotations or ())
            assert all(run.run_id == "run1" for run in after[name].runs) and after[name].status == "annotated"
    if moved:  # a person touches one of the run's boxes: that one stays theirs through the undo
        name = next((n for n in after if after[n].status == "annotated" and touch(after[n]).machine), None)
        if name is None:
            return
        working = server.read("squares", [name])[name]
        box = touch(working).machine[0]
        fixed = replace(
            box, xyxy=tuple(value + 1 for value in box.xyxy), attributes={**box.attributes, "touched_by": "human:ann"}
        )
        server.write(
            "squares",
            [replace(working, annotations=tuple(fixed if a.id == box.id else a for a in working.annotations))],
        )
        undo_run("squares", "run1", server=server, records=records, job=Quiet())
        assert fixed in state(server)[name].annotations
        return
    countdown = [kill]
    try:
        undo_run("squares", "run1", server=Fragile(server, countdown, True), records=records, job=Quiet(), batch=2)
    except Killed:
        undo_run("squares", "run1", server=server, records=records, job=Quiet(), batch=2)
    assert state(server) == before


class TestUndo:
    def test_a_run_is_taken_back_once_and_for_all(self, stores: Stores, server: MemoryServer, records: Records) -> None:
        before = state(server)
        run(stores, server, records)
        report = undo_run("squares", "run1", server=server, records=records, job=Quiet())
        assert (report.frames, report.skipped) == (7, {}) and state(server) == before
        assert undo_run("squares", "run1", server=server, records=records, job=Quiet()).frames == 0
        with pytest.raises(Conflict, match="taken back"):
            run(stores, server, records)

    def test_reviewed_and_held_frames_stay_and_are_counted(
        self, stores: Stores, server: MemoryServer, records: Records
    ) -> None:
        run(stores, server, records)
        accepted = server.read("squares", ["f0.png"])["f0.png"]
        server.write("squares", [replace(accepted, status="accepted", reviewed_by="ann")])
        records.lease("squares", "f1.png", "ann")
        report = undo_run("squares", "run1", server=server, records=records, job=Quiet())
        assert report.frames == 5 and report.skipped == {"held by ann": 1, "reviewed": 1}
        records.release("squares", ["f1.png"], "ann")
        assert undo_run("squares", "run1", server=server, records=records, job=Quiet()).frames == 1
        assert server.frame_names("squares", "annotated") == [] and server.frame_names("squares", "accepted") == [
            "f0.png"
        ]

    def test_a_later_run_has_to_go_first(self, stores: Stores, server: MemoryServer, records: Records) -> None:
        before = state(server)
        run(stores, server, records)
        run(stores, server, records, run_id="run2", statuses=("annotated",))
        job = Quiet()
        report = undo_run("squares", "run1", server=server, records=records, job=job)
        assert report.frames == 0 and report.skipped == {"a later run": 7} and "run2" in job.failed["f0.png"]
        undo_run("squares", "run2", server=server, records=records, job=Quiet())
        assert (
            undo_run("squares", "run1", server=server, records=records, job=Quiet()).frames == 7
            and state(server) == before
        )

    def test_a_run_that_never_was_is_invalid(self, server: MemoryServer, records: Records) -> None:
        with pytest.raises(Invalid, match="no machine run 'ghost'"):
            undo_run("squares", "ghost", server=server, records=records, job=Quiet())

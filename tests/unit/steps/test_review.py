"""Review: leases, decisions, who touched what, and the reviewer who knows the truth."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent.parent.parent
if str(PROJECT / "tests") not in sys.path:
    sys.path.insert(0, str(PROJECT / "tests"))

from doubles.annotation_server import MemoryServer  # noqa: E402
from workbench.annotation import Annotation, machine_annotation_id  # noqa: E402
from workbench.dataset import Frame, LabeledFrame  # noqa: E402
from workbench.errors import Cancelled, Conflict, Invalid, NotFound  # noqa: E402
from workbench.ports import Quiet  # noqa: E402
from workbench.records import LEASE_S, Records  # noqa: E402
from workbench.run import NO_LABEL, WorkingFrame, propose  # noqa: E402
from workbench.steps import review  # noqa: E402
from workbench.taxonomy import Taxonomy  # noqa: E402

NAMES = ("a.jpg", "b.jpg", "c.jpg", "d.jpg")


class Clock:
    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def records(tmp_path: Path, clock: Clock) -> Records:
    return Records(f"sqlite:///{tmp_path / 'records.sqlite'}", clock)


@pytest.fixture
def server() -> MemoryServer:
    """Four new frames; a machine drew two boxes on each of the first three, less sure from frame to frame."""
    server = MemoryServer()
    server.open_task("cells", Taxonomy(("RBC", "WBC")))
    server.add_frames("cells", [(LabeledFrame(Frame(name, 640, 480, "0" * 32)), Path("none")) for name in NAMES])
    for name, confidence in zip(NAMES[:3], (0.9, 0.8, 0.7)):
        assert server.write("cells", [propose(one(server, name), "r1", "model:m@1", boxes(name, confidence))]) == []
    return server


def boxes(name: str, confidence: float) -> tuple[Annotation, ...]:
    return tuple(Annotation("RBC", xyxy=(100.0 * n, 50, 100.0 * n + 80, 130), source="model:m@1", confidence=confidence,
                            id=machine_annotation_id("r1", name, n)) for n in range(2))


def one(server: MemoryServer, name: str) -> WorkingFrame:
    return server.read("cells", [name])[name]


def edit(server: MemoryServer, name: str, change: Callable[[tuple[Annotation, ...]], tuple[Annotation, ...]]) -> None:
    """What the annotation app does: changes the drawings and nothing else."""
    working = one(server, name)
    assert server.write("cells", [replace(working, annotations=change(working.annotations or ()))]) == []


def decide(server: MemoryServer, records: Records, name: str, decision: str, person: str = "ann", **more: float) -> WorkingFrame:
    return review.decide("cells", name, decision, person=person, server=server, records=records, **more)


def test_accepting_signs_what_the_person_drew_and_touched_and_writes_who_and_when(server: MemoryServer, records: Records) -> None:
    def drawn_in_the_app(annotations: tuple[Annotation, ...]) -> tuple[Annotation, ...]:
        return (annotations[0], replace(annotations[1], xyxy=(110, 50, 190, 130)), Annotation("WBC", xyxy=(300, 300, 380, 380), id="new"))

    edit(server, "a.jpg", drawn_in_the_app)
    after = decide(server, records, "a.jpg", "accepted", seconds=4.26)
    stored = one(server, "a.jpg")
    assert stored.annotations == after.annotations
    untouched, moved, drawn = stored.annotations
    assert untouched == boxes("a.jpg", 0.9)[0]
    assert (moved.source, moved.attributes) == ("model:m@1", {"touched_by": "human:ann"})
    assert (drawn.source, drawn.confidence) == ("human:ann", None)
    assert (stored.status, stored.reviewed_by) == ("accepted", "ann") and stored.reviewed_at > "2026"
    entry, = review.history("cells", "a.jpg", records=records)
    assert (entry.person, entry.facts) == ("ann", {"decision": "accepted", "before": "annotated", "boxes": 3, "drawn": 1, "touched": 1,
                                                   "deleted": 0, "seconds": 4.3})


def test_accepting_a_frame_nobody_drew_on_makes_it_background_and_rejecting_it_does_not(server: MemoryServer, records: Records) -> None:
    assert decide(server, records, "d.jpg", "rejected").annotations is None
    assert decide(server, records, "d.jpg", "reopen").status == "new"
    assert decide(server, records, "d.jpg", "accepted").annotations == ()


def test_a_decision_can_be_taken_back_and_the_ledger_keeps_both(server: MemoryServer, records: Records) -> None:
    before = one(server, "a.jpg")
    decide(server, records, "a.jpg", "accepted")
    reopened = decide(server, records, "a.jpg", "reopen", person="bob")
    assert (reopened.status, reopened.reviewed_by, reopened.reviewed_at) == ("annotated", "", "")
    assert reopened.annotations == before.annotations
    assert [(e.person, e.facts["decision"]) for e in review.history("cells", records=records)] == [("bob", "reopen"), ("ann", "accepted")]


def test_two_people_do_not_get_the_same_frame(server: MemoryServer, records: Records, clock: Clock) -> None:
    parts = {"server": server, "records": records}
    review.open_frame("cells", "a.jpg", "ann", **parts)
    with pytest.raises(Conflict, match="ann"):
        review.open_frame("cells", "a.jpg", "bob", **parts)
    with pytest.raises(Conflict, match="ann"):
        decide(server, records, "a.jpg", "accepted", person="bob")
    assert one(server, "a.jpg").status == "annotated"
    assert review.next_frame("cells", None, "bob", **parts) == "b.jpg"
    clock.at += LEASE_S + 1
    assert review.open_frame("cells", "a.jpg", "bob", **parts).frame.name == "a.jpg"


def test_a_frame_that_a_machine_run_holds_cannot_be_decided(server: MemoryServer, records: Records) -> None:
    records.lease("cells", "a.jpg", "run r2")
    with pytest.raises(Conflict, match="run r2"):
        decide(server, records, "a.jpg", "accepted")


def test_deciding_keeps_a_lease_the_person_had_and_leaves_none_otherwise(server: MemoryServer, records: Records) -> None:
    decide(server, records, "b.jpg", "accepted")
    assert records.leased("cells") == {}
    review.open_frame("cells", "a.jpg", "ann", server=server, records=records)
    decide(server, records, "a.jpg", "accepted")
    assert records.leased("cells") == {"a.jpg": "ann"}
    review.close_frame("cells", "a.jpg", "ann", server=server, records=records)
    assert records.leased("cells") == {}


class Interrupted(MemoryServer):
    """The app saves an edit between our reading and our writing, as often as told."""

    def __init__(self, server: MemoryServer, times: int) -> None:
        self.__dict__.update(server.__dict__)
        self.times = times

    def write(self, dataset: str, frames: list[WorkingFrame]) -> list[str]:
        if self.times:
            self.times -= 1
            now = one(self, frames[0].frame.name)
            drawn = Annotation("WBC", xyxy=(300 + self.times, 300, 450, 380), id=f"late{self.times}")
            assert super().write(dataset, [replace(now, annotations=(*now.annotations, drawn))]) == []
        return super().write(dataset, frames)


def test_an_edit_the_app_saves_while_a_decision_is_written_is_not_lost(server: MemoryServer, records: Records) -> None:
    decide(Interrupted(server, 2), records, "a.jpg", "accepted")
    stored = one(server, "a.jpg")
    assert stored.status == "accepted"
    assert [(a.id, a.source) for a in stored.annotations[2:]] == [("late1", "human:ann"), ("late0", "human:ann")]


def test_a_frame_that_never_holds_still_is_a_conflict(server: MemoryServer, records: Records) -> None:
    with pytest.raises(Conflict, match="changed by somebody else"):
        decide(Interrupted(server, 100), records, "a.jpg", "accepted")
    assert review.history("cells", records=records) == [] and records.leased("cells") == {}


def test_what_the_app_saved_after_the_decision_is_signed_when_the_frame_is_closed(server: MemoryServer, records: Records) -> None:
    parts = {"server": server, "records": records}
    review.open_frame("cells", "a.jpg", "ann", **parts)
    decide(server, records, "a.jpg", "accepted")
    edit(server, "a.jpg", lambda drawn: (*drawn, Annotation("WBC", xyxy=(300, 300, 380, 380), id="late")))
    review.close_frame("cells", "a.jpg", "ann", **parts)
    assert one(server, "a.jpg").annotations[-1].source == "human:ann"


def test_closing_a_frame_that_somebody_else_has_by_now_changes_nothing(server: MemoryServer, records: Records, clock: Clock) -> None:
    parts = {"server": server, "records": records}
    review.open_frame("cells", "a.jpg", "ann", **parts)
    clock.at += LEASE_S + 1
    review.open_frame("cells", "a.jpg", "bob", **parts)
    review.close_frame("cells", "a.jpg", "ann", **parts)
    assert records.leased("cells") == {"a.jpg": "bob"}


def test_the_next_frame_goes_round_and_leaves_out_what_is_reviewed(server: MemoryServer, records: Records) -> None:
    parts = {"server": server, "records": records}
    assert [review.next_frame("cells", after, "ann", **parts) for after in (None, "a.jpg", "c.jpg", "d.jpg")] == [
        "a.jpg", "b.jpg", "d.jpg", "a.jpg"]
    decide(server, records, "b.jpg", "accepted")
    assert review.next_frame("cells", "a.jpg", "ann", **parts) == "c.jpg"
    for name in ("a.jpg", "c.jpg", "d.jpg"):
        decide(server, records, name, "rejected")
    assert review.next_frame("cells", "a.jpg", "ann", **parts) is None


def test_the_least_confident_frame_can_come_first(server: MemoryServer, records: Records) -> None:
    parts = {"server": server, "records": records, "order": "confidence"}
    assert review.next_frame("cells", None, "ann", **parts) == "c.jpg"
    assert review.next_frame("cells", "c.jpg", "ann", **parts) == "b.jpg"
    decide(server, records, "c.jpg", "accepted")
    assert review.next_frame("cells", "c.jpg", "ann", **parts) == "b.jpg"


@pytest.mark.parametrize("label,words", [(NO_LABEL, "without a label"), ("Blast", "'Blast'")])
def test_a_box_whose_label_the_data_set_does_not_have_cannot_be_accepted(server: MemoryServer, records: Records, label: str, words: str) -> None:
    edit(server, "a.jpg", lambda drawn: (*drawn, Annotation(label, xyxy=(300, 300, 380, 380))))
    with pytest.raises(Invalid, match=words):
        decide(server, records, "a.jpg", "accepted")
    assert one(server, "a.jpg").status == "annotated" and review.history("cells", records=records) == []
    assert decide(server, records, "a.jpg", "rejected").status == "rejected"


def test_a_wrong_decision_a_missing_frame_and_a_missing_name_are_told(server: MemoryServer, records: Records) -> None:
    with pytest.raises(Invalid, match="'maybe' must be one of"):
        decide(server, records, "a.jpg", "maybe")
    with pytest.raises(Invalid, match="needs a name"):
        decide(server, records, "a.jpg", "accepted", person=" ")
    with pytest.raises(NotFound, match="z.jpg"):
        decide(server, records, "z.jpg", "accepted")
    with pytest.raises(NotFound, match="z.jpg"):
        review.open_frame("cells", "z.jpg", "ann", server=server, records=records)
    assert records.leased("cells") == {}


# Frame a: both boxes right. b: one right, one 100 px away from the truth. c: one of two is spurious. d: drawn from scratch.
TRUTH = {
    "a.jpg": tuple(Annotation("RBC", xyxy=(100.0 * n, 50, 100.0 * n + 80, 130), source="human:truth") for n in range(2)),
    "b.jpg": (Annotation("RBC", xyxy=(0, 50, 80, 130), source="human:truth"), Annotation("WBC", xyxy=(100, 50, 180, 130), source="human:truth")),
    "c.jpg": (Annotation("RBC", xyxy=(0, 50, 80, 130), source="human:truth"),),
    "d.jpg": (Annotation("WBC", xyxy=(10, 10, 90, 90), source="human:truth"),),
}
COUNTS = {"boxes_total": 6, "untouched": 4, "moved": 0, "relabelled": 1, "deleted": 1, "drawn": 1, "touched": 3}


def correct(server: MemoryServer, records: Records, job: Quiet, truth: dict = TRUTH) -> dict:
    return review.correct_from("cells", truth, person="oracle", server=server, records=records, job=job).to_json()


def test_a_reviewer_who_knows_the_truth_touches_only_what_is_wrong(server: MemoryServer, records: Records) -> None:
    job = Quiet("j1")
    assert correct(server, records, job) == COUNTS
    read = server.read("cells", NAMES)
    assert {working.status for working in read.values()} == {"accepted"}
    assert {working.reviewed_by for working in read.values()} == {"oracle"}
    assert [(a.label, a.source, a.attributes) for a in read["b.jpg"].annotations] == [
        ("RBC", "model:m@1", {}), ("WBC", "model:m@1", {"touched_by": "human:oracle"})]
    assert [(a.label, a.source) for a in read["d.jpg"].annotations] == [("WBC", "human:oracle")]
    assert [len(read[name].annotations) for name in NAMES] == [2, 2, 1, 1]
    assert (job.done, job.total, job.failed) == (4, 4, {}) and records.leased("cells") == {}


def test_repeating_a_correction_gives_the_same_effort_and_changes_nothing(server: MemoryServer, records: Records) -> None:
    correct(server, records, Quiet("j1"))
    before = server.read("cells", NAMES)
    assert correct(server, records, Quiet("j1")) == COUNTS
    assert server.read("cells", NAMES) == before
    assert len(review.history("cells", records=records)) == 4
    # Another job finds nothing left to do, and counts nothing twice.
    assert correct(server, records, Quiet("j2"))["boxes_total"] == 0


class Killed(MemoryServer):
    """Dies at its n-th write, before or after the batch is stored."""

    def __init__(self, server: MemoryServer, is_stored: bool) -> None:
        self.__dict__.update(server.__dict__)
        self.is_stored = is_stored

    def write(self, dataset: str, frames: list[WorkingFrame]) -> list[str]:
        if self.is_stored:
            super().write(dataset, frames[:2])
        raise KeyboardInterrupt


@pytest.mark.parametrize("is_stored", [False, True])
def test_a_correction_killed_while_writing_ends_as_an_undisturbed_one(server: MemoryServer, records: Records, tmp_path: Path, is_stored: bool,
                                                                      ) -> None:
    with pytest.raises(KeyboardInterrupt):
        correct(Killed(server, is_stored), records, Quiet("j1"))
    assert correct(server, records, Quiet("j1")) == COUNTS
    ids = {name: [a.id for a in working.annotations] for name, working in server.read("cells", NAMES).items()}
    assert ids["d.jpg"] == [machine_annotation_id("j1", "d.jpg", 0)]
    assert len(review.history("cells", records=records)) == 4


def test_frames_held_by_others_or_missing_are_failed_items_and_the_rest_goes_on(server: MemoryServer, records: Records) -> None:
    records.lease("cells", "a.jpg", "bob")
    job = Quiet("j1")
    assert correct(server, records, job, {**TRUTH, "z.jpg": ()})["boxes_total"] == 4
    assert "bob" in job.failed["a.jpg"] and "no such frame" in job.failed["z.jpg"]
    assert one(server, "a.jpg").status == "annotated"


def test_a_correction_stops_when_it_is_cancelled(server: MemoryServer, records: Records) -> None:
    class Stopped(Quiet):
        def check(self) -> None:
            raise Cancelled("Stopped by ann.")

    with pytest.raises(Cancelled):
        correct(server, records, Stopped("j1"))
    assert records.leased("cells") == {} and one(server, "a.jpg").status == "annotated"

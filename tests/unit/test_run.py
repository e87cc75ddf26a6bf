"""Machine runs and people on one frame: human work stays, runs can be undone exactly. Random histories try to break it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.annotation import Annotation, is_same_drawing, machine_annotation_id
from workbench.dataset import Frame
from workbench.errors import Conflict
from workbench.run import RunWrite, WorkingFrame, propose, settle, touch, undo

FRAME = Frame("a.jpg", 100, 80, "0" * 32)
HUMAN_ACTIONS = ("draw", "move", "relabel", "delete")


def machine(run: str, index: int, xyxy: tuple[float, ...], label: str = "RBC", confidence: float = 0.8) -> Annotation:
    return Annotation(label, xyxy=xyxy, source="model:m@1", confidence=confidence,
                      id=machine_annotation_id(run, FRAME.name, index))


def by_id(working: WorkingFrame) -> dict[str, Annotation] | None:
    return None if working.annotations is None else {a.id: a for a in working.annotations}


@dataclass
class History:
    """Plays events on a frame and remembers what people did, told apart from the rules that are being tested."""

    working: WorkingFrame = field(default_factory=lambda: WorkingFrame(FRAME))
    drawn: dict[str, Annotation] = field(default_factory=dict)  # what people drew or changed, as they left it
    deleted: list[Annotation] = field(default_factory=list)  # machine boxes as they stood when a person deleted them
    before: dict[str, WorkingFrame] = field(default_factory=dict)  # run id -> the frame before that run
    quiet_since: list[str] = field(default_factory=list)  # runs after which no person did anything
    count: int = 0

    def play(self, kind: str, at: int, box: tuple[float, ...], label: str) -> None:
        drawn = list(self.working.annotations or ())
        target = drawn[at % len(drawn)] if drawn else None
        if kind == "run":
            self.count += 1
            name = f"run{self.count}"
            self.before[name] = self.working
            self.working = propose(self.working, name, "model:m@1", (machine(name, 0, box, label), machine(name, 1, SPOT)))
            if self.working is not self.before[name]:
                self.quiet_since.append(name)
        elif kind == "undo":
            self._undo()
        elif kind == "draw" and not self.working.is_reviewed:
            self.count += 1
            self._person(Annotation(label, xyxy=box, id=f"drawn{self.count}"), drawn)
        elif kind == "move" and target and not self.working.is_reviewed:
            # at least 5 px away, so that a move can never be one that nobody would see
            x1, y1, x2, y2 = target.xyxy
            self._person(replace(target, xyxy=(x1 - 5, y1 - 5, x2 - 5, y2 - 5) if x1 > 30 else (x1 + 5, y1, x2 + 5, y2)),
                         [a for a in drawn if a.id != target.id])
        elif kind == "relabel" and target and not self.working.is_reviewed:
            self._person(replace(target, label="WBC" if target.label != "WBC" else "Platelets"),
                         [a for a in drawn if a.id != target.id])
        elif kind == "delete" and target and not self.working.is_reviewed:
            if target.id not in self.drawn:
                self.deleted.append(target)
            self.drawn.pop(target.id, None)
            self.quiet_since = []
            self.working = replace(self.working, annotations=tuple(a for a in drawn if a.id != target.id))
        elif kind in ("accepted", "rejected"):
            signed = settle(self.working, "ann")
            self.working = replace(self.working, annotations=signed if self.working.annotations is not None else None, status=kind)
            self.quiet_since = []
        elif kind == "reopen" and self.working.is_reviewed:
            self.working = replace(self.working, status="annotated")

    def _person(self, made: Annotation, others: list[Annotation]) -> None:
        written = {a.id: a for run in self.working.runs for a in run.added}.get(made.id)
        if written is not None and is_same_drawing(made, written) and made.is_machine:
            # Put back exactly as the machine drew it, and nobody signed it in between: it is the machine's again.
            self.drawn.pop(made.id, None)
        else:
            self.drawn[made.id] = made
        self.quiet_since = []
        self.working = replace(self.working, annotations=(*others, made))

    def _undo(self) -> None:
        standing = [run.run_id for run in self.working.runs if not run.is_undone]
        if not standing:
            return
        was = self.working
        if len(standing) > 1 and not was.is_reviewed:
            with pytest.raises(Conflict, match="Undo that one first"):
                undo(was, standing[0])
        self.working = undo(was, standing[-1])
        if was.is_reviewed:
            assert self.working == was
        elif standing[-1] in self.quiet_since:
            assert by_id(self.working) == by_id(self.before[standing[-1]])
            assert self.working.runs == self.before[standing[-1]].runs
            assert self.working.status == self.before[standing[-1]].status
            self.quiet_since.remove(standing[-1])

    def check(self) -> None:
        now = by_id(self.working)
        for key, left in self.drawn.items():
            assert now is not None and key in now, f"{left} is gone"
            assert is_same_drawing(now[key], left)
        found = {a.id for a in touch(self.working).human}
        assert set(self.drawn) <= found
        for gone in self.deleted:
            assert now is None or gone.id not in now, f"{gone} came back"
        for annotation in settle(self.working, "ann"):
            if annotation.id in self.drawn:
                assert annotation.source == "human:ann" or annotation.attributes["touched_by"] == "human:ann"


SPOT = (50.0, 40.0, 70.0, 60.0)  # every run finds this one
BOXES = st.tuples(st.integers(0, 60), st.integers(10, 40), st.integers(8, 30), st.integers(8, 30)).map(
    lambda v: (float(v[0]), float(v[1]), float(v[0] + v[2]), float(v[1] + v[3])))
EVENTS = st.lists(st.tuples(st.sampled_from(("run", "run", "undo", "undo", *HUMAN_ACTIONS, "accepted", "rejected", "reopen")),
                            st.integers(0, 20), BOXES, st.sampled_from(("RBC", "WBC"))), max_size=14)


@settings(max_examples=600, deadline=None)
@given(EVENTS)
def test_no_history_of_runs_and_undos_changes_what_a_person_drew_touched_or_deleted(events: list) -> None:
    history = History()
    for event in events:
        history.play(*event)
        history.check()


@settings(max_examples=200, deadline=None)
@given(EVENTS, BOXES)
def test_a_run_that_is_repeated_after_a_crash_changes_nothing(events: list, box: tuple) -> None:
    history = History()
    for event in events:
        history.play(*event)
    once = propose(history.working, "again", "model:m@2", (machine("again", 0, box),))
    assert propose(once, "again", "model:m@2", (machine("again", 0, box), machine("again", 1, SPOT))) == once
    taken_back = undo(once, "again")
    assert undo(taken_back, "again") == taken_back


@settings(max_examples=200, deadline=None)
@given(EVENTS, BOXES)
def test_undoing_the_last_run_gives_exactly_the_frame_before_it_also_through_json(events: list, box: tuple) -> None:
    history = History()
    for event in events:
        history.play(*event)
    before = history.working
    after = propose(before, "last", "model:m@2", (machine("last", 0, box),))
    stored = replace(after, runs=tuple(RunWrite.from_json(run.to_json()) for run in after.runs))
    restored = undo(stored, "last")
    assert by_id(restored) == by_id(before)
    assert (restored.status, restored.runs) == (before.status, before.runs)


@settings(max_examples=200, deadline=None)
@given(EVENTS)
def test_a_box_that_a_person_deleted_is_not_proposed_again(events: list) -> None:
    history = History()
    for event in events:
        history.play(*event)
    if not history.deleted or history.working.is_reviewed:
        return
    gone = history.deleted[-1]
    again = propose(history.working, "again", "model:m@2", (machine("again", 0, gone.xyxy, gone.label),))
    assert "again" in {run.run_id for run in again.runs}
    assert machine_annotation_id("again", FRAME.name, 0) not in (by_id(again) or {})


def test_a_frame_nobody_looked_at_is_not_background_after_a_run_was_undone() -> None:
    working = propose(WorkingFrame(FRAME), "r1", "model:m@1", ())
    assert working.annotations == () and working.status == "annotated"
    assert undo(working, "r1") == WorkingFrame(FRAME)


def test_a_frame_with_nothing_on_it_stays_background_after_a_run_was_undone() -> None:
    empty = WorkingFrame(FRAME, annotations=(), status="annotated")
    assert undo(propose(empty, "r1", "model:m@1", (machine("r1", 0, SPOT),)), "r1") == empty


def test_a_frame_whose_boxes_a_person_deleted_was_looked_at_also_after_undo() -> None:
    working = propose(WorkingFrame(FRAME), "r1", "model:m@1", (machine("r1", 0, SPOT),))
    assert undo(replace(working, annotations=()), "r1").annotations == ()


def test_runs_are_undone_one_after_the_other_although_people_touched_their_boxes() -> None:
    first = propose(WorkingFrame(FRAME), "r1", "model:m@1", (machine("r1", 0, SPOT),))
    second = propose(first, "r2", "model:m@2", (machine("r2", 0, (0, 0, 20, 20)),))
    moved = replace(second, annotations=(replace(second.annotations[0], xyxy=(5, 5, 25, 25)),))
    undone = undo(undo(moved, "r2"), "r1")
    assert [(a.source, a.xyxy) for a in undone.annotations] == [("model:m@1", (5, 5, 25, 25))]
    assert [(run.run_id, run.is_undone) for run in undone.runs] == [("r2", True)]


def test_a_reviewed_frame_is_left_alone_by_runs_and_by_undo() -> None:
    accepted = replace(propose(WorkingFrame(FRAME), "r1", "model:m@1", (machine("r1", 0, SPOT),)), status="accepted")
    assert propose(accepted, "r2", "model:m@1", (machine("r2", 0, SPOT),)) == accepted
    assert undo(accepted, "r1") == accepted


def test_a_proposal_over_a_person_s_box_is_dropped_from_iou_one_half_on() -> None:
    # 20 x 20 at the same place, 20 wide and 10 high inside it: intersection 200, union 400, IoU exactly 0.5.
    drawn = WorkingFrame(FRAME, annotations=(Annotation("WBC", xyxy=(10, 10, 30, 30), id="mine"),))
    half = propose(drawn, "r1", "model:m@1", (machine("r1", 0, (10, 10, 30, 20)),))
    less = propose(drawn, "r2", "model:m@1", (machine("r2", 0, (10, 10, 30, 19.9)),))
    assert [a.id for a in half.annotations] == ["mine"]
    assert len(less.annotations) == 2


def test_the_boxes_a_run_replaced_come_back_when_it_is_undone() -> None:
    first = propose(WorkingFrame(FRAME), "r1", "model:m@1", (machine("r1", 0, SPOT),))
    second = propose(first, "r2", "model:m@2", (machine("r2", 0, (50, 40, 71, 61)),))
    assert [a.id for a in second.annotations] == [machine_annotation_id("r2", FRAME.name, 0)]
    assert undo(second, "r2") == first


def test_what_a_run_replaced_does_not_come_back_over_what_a_person_made_of_its_successor() -> None:
    first = propose(WorkingFrame(FRAME), "r1", "model:m@1", (machine("r1", 0, SPOT),))
    second = propose(first, "r2", "model:m@2", (machine("r2", 0, (50, 40, 71, 61)),))
    moved = replace(second, annotations=(replace(second.annotations[0], xyxy=(52, 42, 73, 63)),))
    assert [a.xyxy for a in undo(moved, "r2").annotations] == [(52, 42, 73, 63)]
    assert undo(replace(second, annotations=()), "r2").annotations == ()


def test_a_touched_box_still_says_model_and_person_after_its_run_was_undone() -> None:
    working = propose(WorkingFrame(FRAME), "r1", "model:m@1", (machine("r1", 0, SPOT),))
    moved = replace(working, annotations=(replace(working.annotations[0], xyxy=(52, 42, 73, 63)),))
    signed, = settle(undo(moved, "r1"), "ann")
    assert (signed.source, signed.attributes) == ("model:m@1", {"touched_by": "human:ann"})


def test_settling_signs_new_and_changed_boxes_and_only_those() -> None:
    working = propose(WorkingFrame(FRAME), "r1", "model:m@1",
                      (machine("r1", 0, SPOT), machine("r1", 1, (0, 0, 20, 20)), machine("r1", 2, (75, 0, 95, 20))))
    kept, moved, relabelled = working.annotations
    edited = replace(working, annotations=(
        kept, replace(moved, xyxy=(0, 0, 20, 20.2)), replace(relabelled, label="WBC"), Annotation("WBC", xyxy=(0, 50, 9, 60), id="new")))
    signed = {a.id: a for a in settle(edited, "ann")}
    assert signed[kept.id] == kept
    assert signed[moved.id].attributes == {"touched_by": "human:ann"} and signed[moved.id].source == "model:m@1"
    assert signed[relabelled.id].attributes == {"touched_by": "human:ann"}
    assert signed["new"].source == "human:ann" and signed["new"].confidence is None
    assert settle(replace(edited, annotations=tuple(signed.values())), "bob") == tuple(signed.values())


def test_a_change_smaller_than_anyone_can_see_is_not_a_touch() -> None:
    working = propose(WorkingFrame(FRAME), "r1", "model:m@1", (machine("r1", 0, SPOT),))
    nudged = replace(working, annotations=(replace(working.annotations[0], xyxy=(50.04, 40, 70, 60)),))
    assert len(touch(nudged).machine) == 1
    assert len(touch(replace(working, annotations=(replace(working.annotations[0], xyxy=(50.06, 40, 70, 60)),))).human) == 1


def test_a_proposal_is_cut_to_the_frame_and_dropped_when_nothing_is_left() -> None:
    working = propose(WorkingFrame(FRAME), "r1", "model:m@1",
                      (machine("r1", 0, (-5, 70.123, 20, 90)), machine("r1", 1, (100.5, 0, 120, 20))))
    assert [a.xyxy for a in working.annotations] == [(0, 70.12, 20, 80)]


def test_a_tag_that_a_person_deleted_is_not_proposed_again() -> None:
    tag = Annotation("night", source="model:m@1", confidence=0.9, id="t1")
    working = propose(WorkingFrame(FRAME), "r1", "model:m@1", (tag,))
    again = propose(replace(working, annotations=()), "r2", "model:m@1", (replace(tag, id="t2"), replace(tag, id="t3", label="rain")))
    assert [a.label for a in again.annotations] == ["rain"]


def test_a_proposal_over_a_person_s_polygon_is_the_same_object() -> None:
    drawn = WorkingFrame(FRAME, annotations=(Annotation("WBC", polygon=((10, 10), (30, 10), (30, 30), (10, 30)), id="mine"),))
    assert [a.id for a in propose(drawn, "r1", "model:m@1", (machine("r1", 0, (10, 10, 30, 30)),)).annotations] == ["mine"]

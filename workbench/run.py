"""What machine runs do to a frame under work: pure rules that keep human work and can be undone exactly.

The working copy keeps, beside a frame's annotations, the list of what each run added and removed. A person's work is
whatever differs from that list, so it is found even where the annotation server records no author.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from workbench.annotation import DECIMALS, Annotation, is_same_drawing
from workbench.boxes import clip, iou
from workbench.dataset import Frame
from workbench.errors import Conflict

# A proposal that overlaps a person's box this much is the same object; 0.5 is the match threshold of PASCAL VOC.
SAME_OBJECT_IOU = 0.5
STATUSES = ("new", "annotated", "accepted", "rejected")
# The label of what a person drew and has not named yet; no taxonomy has it, so such a frame cannot be accepted.
NO_LABEL = "(no label)"


@dataclass(frozen=True)
class RunWrite:
    """What one machine run did to one frame.

    added, removed  what it drew, and the machine boxes it replaced
    was_unseen      the frame had no annotations before (None, not ())
    was_status      the frame's status before
    is_undone       taken back; kept with `added` cut to what a person had changed or deleted, so that the deleted does
                    not come back and the changed still says which model drew it
    """

    run_id: str
    source: str
    added: tuple[Annotation, ...]
    removed: tuple[Annotation, ...]
    was_unseen: bool
    was_status: str = "new"
    is_undone: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"run_id": self.run_id, "source": self.source, "was_unseen": self.was_unseen,
                "was_status": self.was_status, "is_undone": self.is_undone,
                "added": [a.to_json() for a in self.added], "removed": [a.to_json() for a in self.removed]}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> RunWrite:
        return cls(record["run_id"], record["source"], tuple(map(Annotation.from_json, record["added"])),
                   tuple(map(Annotation.from_json, record["removed"])), record["was_unseen"],
                   record.get("was_status", "new"), record.get("is_undone", False))


@dataclass(frozen=True)
class WorkingFrame:
    """A frame in a working copy.

    annotations  as they are drawn now; None: nobody looked
    runs         what machine runs did, oldest first
    status       "new", "annotated" (by a machine, or by a person who has not decided), "accepted", "rejected"
    revision     opaque; a write with a stale one is a Conflict
    """

    frame: Frame
    annotations: tuple[Annotation, ...] | None = None
    runs: tuple[RunWrite, ...] = ()
    status: str = "new"
    split: str | None = None
    reviewed_by: str = ""
    reviewed_at: str = ""
    revision: str = ""

    @property
    def is_reviewed(self) -> bool:
        return self.status in ("accepted", "rejected")


@dataclass(frozen=True)
class Touch:
    """Who made what stands on a frame now: `human` drawn or changed by a person, `machine` as a run left it,
    `deleted` what a run drew and a person removed."""

    human: tuple[Annotation, ...]
    machine: tuple[Annotation, ...]
    deleted: tuple[Annotation, ...]


def written_by_machines(working: WorkingFrame) -> dict[str, Annotation]:
    """id -> annotation that machine runs left standing, whatever people did afterwards."""
    standing: dict[str, Annotation] = {}
    for run in working.runs:
        for annotation in run.removed:
            standing.pop(annotation.id, None)
        standing.update({annotation.id: annotation for annotation in run.added})
    return standing


def touch(working: WorkingFrame) -> Touch:
    """Splits a frame's annotations by comparing them with what the machines wrote."""
    written = written_by_machines(working)
    human, machine = [], []
    for annotation in working.annotations or ():
        original = written.get(annotation.id)
        is_untouched = original is not None and is_same_drawing(annotation, original) and annotation.is_machine
        (machine if is_untouched else human).append(annotation)
    present = {annotation.id for annotation in working.annotations or ()}
    return Touch(tuple(human), tuple(machine), tuple(a for key, a in written.items() if key not in present))


def propose(working: WorkingFrame, run_id: str, source: str, proposals: tuple[Annotation, ...]) -> WorkingFrame:
    """A machine run's result for one frame: machine boxes nobody touched are replaced, all human work stays.

    A proposal is dropped where a person drew or changed a box, or deleted one of the same label, at IoU >=
    SAME_OBJECT_IOU (a tag: where a person set or deleted the same one). Proposals are cut to the frame. A reviewed
    frame, and one this run wrote before (a repeat after a crash), come back unchanged.
    """
    if working.is_reviewed or any(run.run_id == run_id for run in working.runs):
        return working
    now = touch(working)
    cut = [_in_frame(proposal, working.frame) for proposal in proposals]
    kept = [a for a in cut if a is not None and not _stands_among(a, now.human)
            and not _stands_among(a, tuple(d for d in now.deleted if d.label == a.label))]
    write = RunWrite(run_id, source, tuple(kept), now.machine, was_unseen=working.annotations is None,
                     was_status=working.status)
    return replace(working, annotations=now.human + tuple(kept), runs=working.runs + (write,), status="annotated")


def undo(working: WorkingFrame, run_id: str) -> WorkingFrame:
    """Takes one run back: exactly the frame before it, with what people did since kept.

    What the run had replaced comes back, except where a person changed or deleted what replaced it. A frame reviewed
    since, or never written by the run, comes back unchanged. Raises Conflict when a later run wrote to the frame: undo
    that one first.
    """
    at = next((index for index, run in enumerate(working.runs) if run.run_id == run_id and not run.is_undone), None)
    if at is None or working.is_reviewed:
        return working
    later = [run.run_id for run in working.runs[at + 1:] if not run.is_undone]
    if later:
        raise Conflict(f"{working.frame.name}: run {later[-1]} came after {run_id}. Undo that one first.")
    run, now = working.runs[at], touch(working)
    added = {annotation.id for annotation in run.added}
    changed = tuple(a for a in now.human if a.id in added)
    deleted = tuple(a for a in now.deleted if a.id in added)
    restored = tuple(a for a in run.removed if not _stands_among(a, changed + deleted))
    annotations = now.human + tuple(a for a in now.machine if a.id not in added) + restored
    touched = {annotation.id for annotation in changed + deleted}
    left = replace(run, added=tuple(a for a in run.added if a.id in touched), removed=(), is_undone=True)
    is_unseen = run.was_unseen and not annotations and not deleted
    return replace(working, annotations=None if is_unseen else annotations, status=run.was_status,
                   runs=working.runs[:at] + ((left,) if touched else ()) + working.runs[at + 1:])


def settle(working: WorkingFrame, person: str) -> tuple[Annotation, ...]:
    """The frame's annotations with the person's part signed: new boxes are theirs, changed ones say who did it."""
    written = written_by_machines(working)
    settled = []
    for annotation in working.annotations or ():
        original = written.get(annotation.id)
        if original is None:
            settled.append(annotation if annotation.source != "human:unknown"
                           else replace(annotation, source=f"human:{person}", confidence=None))
        elif not is_same_drawing(annotation, original) and "touched_by" not in annotation.attributes:
            settled.append(replace(annotation, attributes={**annotation.attributes, "touched_by": f"human:{person}"}))
        else:
            settled.append(annotation)
    return tuple(settled)


def _in_frame(proposal: Annotation, frame: Frame) -> Annotation | None:
    """A box cut to the frame and rounded as it is published; None when nothing of it is left."""
    if proposal.xyxy is None:
        return proposal
    cut = clip(np.array([proposal.xyxy]), frame.width, frame.height)[0]
    box = tuple(round(float(value), DECIMALS) for value in cut)
    return replace(proposal, xyxy=box) if box[2] > box[0] and box[3] > box[1] else None


def _stands_among(one: Annotation, others: tuple[Annotation, ...]) -> bool:
    """Whether one of the others is the same object: its box overlaps enough, whatever its label; a tag: the same."""
    box = _box(one)
    boxes = [_box(other) for other in others]
    if box is None:
        return any(around is None and is_same_drawing(one, other) for around, other in zip(boxes, others))
    boxes = [around for around in boxes if around is not None]
    return bool(boxes) and bool((iou(np.array([box]), np.array(boxes)) >= SAME_OBJECT_IOU).any())


def _box(annotation: Annotation) -> tuple[float, float, float, float] | None:
    if annotation.xyxy is not None or annotation.polygon is None:
        return annotation.xyxy
    xs, ys = zip(*annotation.polygon)
    return min(xs), min(ys), max(xs), max(ys)

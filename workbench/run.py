"""What machine runs do to a frame under work: pure rules that keep human work and can be undone exactly.

The working copy keeps, beside a frame's annotations, the list of what each run added and removed. A person's work is
whatever differs from that list, so it is found even where the annotation server records no author.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from workbench.annotation import Annotation, is_same_drawing
from workbench.boxes import iou
from workbench.dataset import Frame
from workbench.errors import Conflict

# A proposal that overlaps a person's box this much is the same object; 0.5 is the match threshold of PASCAL VOC.
SAME_OBJECT_IOU = 0.5
STATUSES = ("new", "annotated", "accepted", "rejected")


@dataclass(frozen=True)
class RunWrite:
    """What one machine run did to one frame. `looked` tells a frame that had no annotations before (None) from ()."""

    run_id: str
    source: str
    added: tuple[Annotation, ...]
    removed: tuple[Annotation, ...]
    was_unseen: bool

    def to_json(self) -> dict[str, Any]:
        return {"run_id": self.run_id, "source": self.source, "was_unseen": self.was_unseen,
                "added": [a.to_json() for a in self.added], "removed": [a.to_json() for a in self.removed]}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> RunWrite:
        return cls(record["run_id"], record["source"], tuple(map(Annotation.from_json, record["added"])),
                   tuple(map(Annotation.from_json, record["removed"])), record["was_unseen"])


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
    SAME_OBJECT_IOU. A reviewed frame, and one this run wrote before (a repeat after a crash), come back unchanged.
    """
    if working.is_reviewed or any(run.run_id == run_id for run in working.runs):
        return working
    now = touch(working)
    kept = [a for a in proposals
            if not _overlaps(a, now.human) and not _overlaps(a, tuple(d for d in now.deleted if d.label == a.label))]
    write = RunWrite(run_id, source, tuple(kept), now.machine, was_unseen=working.annotations is None)
    return replace(working, annotations=now.human + tuple(kept), runs=working.runs + (write,), status="annotated")


def undo(working: WorkingFrame, run_id: str) -> WorkingFrame:
    """Takes one run back: exactly the frame before it, with what people did since kept.

    A frame reviewed since, or never written by the run, comes back unchanged. Raises Conflict when a later run wrote
    to the frame: undo that one first.
    """
    positions = [index for index, run in enumerate(working.runs) if run.run_id == run_id]
    if not positions or working.is_reviewed:
        return working
    if positions[0] != len(working.runs) - 1:
        raise Conflict(f"{working.frame.name}: run {working.runs[-1].run_id} came after {run_id}. Undo that one first.")
    run, now = working.runs[-1], touch(working)
    added = {annotation.id for annotation in run.added}
    stays = tuple(a for a in now.machine if a.id not in added)
    annotations = now.human + stays + run.removed
    is_unseen = run.was_unseen and not annotations and not any(a.id in added for a in now.deleted)
    status = "annotated" if (working.runs[:-1] or annotations) else "new"
    return replace(working, annotations=None if is_unseen else annotations, runs=working.runs[:-1],
                   status="new" if is_unseen else status)


def settle(working: WorkingFrame, person: str) -> tuple[Annotation, ...]:
    """The frame's annotations with the person's part signed: new boxes are theirs, changed ones say who touched them."""
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


def _overlaps(proposal: Annotation, others: tuple[Annotation, ...]) -> bool:
    boxes = [other.xyxy for other in others if other.xyxy is not None]
    if proposal.xyxy is None or not boxes:
        return False
    return bool((iou(np.array([proposal.xyxy]), np.array(boxes)) >= SAME_OBJECT_IOU).any())

"""One frame: its row here, its job and drawings in CVAT, and the WorkingFrame they make together."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from workbench.adapters.cvat import shapes
from workbench.adapters.cvat.state import Row, with_write
from workbench.adapters.cvat.uploads import file_name
from workbench.dataset import LabeledFrame
from workbench.errors import Invalid
from workbench.run import STATUSES, WorkingFrame


def new_row(labeled: LabeledFrame, path: Path, labels: shapes.Labels) -> Row:
    if not Path(path).is_file():
        raise Invalid(f"The pixels of {labeled.frame.name!r} are not at {path}. Check the blob store.")
    status = "new" if labeled.annotations is None else "accepted"
    working = WorkingFrame(labeled.frame, labeled.annotations, status=status, split=labeled.split,
                           reviewed_by=labeled.reviewed_by)
    check(working, labels)
    row = Row(labeled.frame, file_name(labeled.frame.name, Path(path)))
    return begun(row, working, None, shapes.Drawn({}, {}))


def check(working: WorkingFrame, labels: shapes.Labels) -> None:
    """Raises Invalid for what CVAT could not keep, before anything is written."""
    name = working.frame.name
    if working.status not in STATUSES:
        raise Invalid(f"Status {working.status!r} of {name!r} must be one of {', '.join(STATUSES)}.")
    annotations = working.annotations or ()
    if len({one.id for one in annotations}) < len(annotations):
        raise Invalid(f"{name!r} has two annotations with one id. Give each its own.")
    for annotation in annotations:
        shapes.to_record(annotation, working.frame, 0, labels)


def begun(row: Row, working: WorkingFrame, job: dict[str, Any] | None, now: shapes.Drawn) -> Row:
    """The row as it is once the write is done, with what has yet to be drawn as `pending`."""
    after = tuple(working.annotations or ())
    before = tuple(now.annotations.values())
    is_same = {a.id: a.to_json() for a in before} == {a.id: a.to_json() for a in after} and not now.copies
    certain = [a.confidence for a in after if a.is_machine and a.confidence is not None]
    return with_write(
        row, status=working.status, split=working.split, reviewed_by=working.reviewed_by,
        reviewed_at=working.reviewed_at, runs=working.runs, is_unseen=working.annotations is None,
        ids=tuple(a.id for a in after), least_confidence=min(certain, default=1.0),
        decided_in=decision(job)[1] if job else "", pending=None if is_same else (before, after))


def working_frame(row: Row, job: dict[str, Any], now: shapes.Drawn) -> WorkingFrame:
    status, (decided, mark) = row.status, decision(job)
    reviewed_by, reviewed_at = row.reviewed_by, row.reviewed_at
    if decided and mark != row.decided_in:
        status, reviewed_at = decided, job.get("updated_date") or ""
        reviewed_by = (job.get("assignee") or {}).get("username") or "cvat"
    order = {key: index for index, key in enumerate(row.ids)}
    annotations = tuple(sorted(now.annotations.values(), key=lambda one: order.get(one.id, len(order))))
    # Accepted by its job without a drawing: people looked, and nothing is there.
    is_unseen = row.is_unseen and not annotations and status in (row.status, "rejected")
    return WorkingFrame(row.frame, None if is_unseen else annotations, row.runs, status, row.split, reviewed_by,
                        reviewed_at, revision(row, job, now))


def revision(row: Row, job: dict[str, Any], now: shapes.Drawn) -> str:
    """Changes with every write of ours, every drawing somebody changes in CVAT, and every decision of the job."""
    whole = hashlib.sha256(json.dumps([now.records, now.copies], sort_keys=True).encode()).hexdigest()[:24]
    return f"{row.write_id}/{whole}/{decision(job)[1]}"


def decision(job: dict[str, Any]) -> tuple[str, str]:
    """(the status a CVAT job gives its frames, a mark of that decision), ("", "") while it has decided nothing."""
    stage, state = job.get("stage"), job.get("state")
    if stage == "acceptance" and state == "completed":
        return "accepted", f"{job['id']}:{stage}:{state}"
    if state == "rejected":
        return "rejected", f"{job['id']}:{stage}:{state}"
    return "", ""


def status_of(written: str, decided_in: str, job: dict[str, Any]) -> str:
    decided, mark = decision(job)
    return decided if decided and mark != decided_in else written


def job_of(jobs: dict[int, list[dict[str, Any]]], task_id: int | None, number: int | None) -> dict[str, Any] | None:
    if task_id is None or number is None:
        return None
    return next((job for job in jobs.get(task_id, ()) if job["start_frame"] <= number <= job["stop_frame"]), None)

"""Review: people decide on frames, one at a time, each held by one person while it is open."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from workbench.annotation import Annotation, machine_annotation_id
from workbench.errors import Conflict, Invalid, NotFound
from workbench.evaluation.effort import Effort, corrected, effort
from workbench.ports import AnnotationServer, Job
from workbench.records import Entry, Records, now
from workbench.run import NO_LABEL, WorkingFrame, settle, touch, written_by_machines

DECISIONS = ("accepted", "rejected", "reopen")
# The annotation app may save between our reading and our writing; it saves at most every 2 s, so one more try is the
# rule and the fifth says that something else keeps writing.
ATTEMPTS = 5
# FiftyOne's app saves an edit 1 to 3 s after it was made (measured: 1.3 s for a new box); a decision waits so long.
APP_SAVE_S = 3.5
BATCH = 100


def open_frame(dataset: str, frame: str, person: str, *, server: AnnotationServer, records: Records) -> WorkingFrame:
    """Takes or renews the lease of a frame and returns it as it stands. Raises Conflict while somebody else has it."""
    _check_person(person)
    records.lease(dataset, frame, person)
    try:
        return _read(dataset, frame, server)
    except NotFound:
        records.release(dataset, [frame], person)
        raise


def close_frame(dataset: str, frame: str, person: str, *, server: AnnotationServer, records: Records) -> None:
    """Gives the lease back. What the annotation app saved after the person's decision is signed first."""
    _check_person(person)
    if records.leased(dataset).get(frame) != person:
        return

    def signed(working: WorkingFrame) -> WorkingFrame:
        is_mine = working.is_reviewed and working.reviewed_by == person and working.annotations is not None
        return replace(working, annotations=settle(working, person)) if is_mine else working

    try:
        _change(dataset, frame, signed, server)
    finally:
        records.release(dataset, [frame], person)


def decide(dataset: str, frame: str, decision: str, *, person: str, server: AnnotationServer, records: Records,
           seconds: float | None = None) -> WorkingFrame:
    """Accepts, rejects or reopens a frame; what the person drew or touched is signed with their name.

    seconds  how long the person looked, for the ledger

    An accepted frame that nobody drew on is background. Raises Conflict while another person or a machine run holds
    the frame, Invalid for accepting a box whose label the data set does not have. A lease that the person had stays.
    """
    _check_person(person)
    if decision not in DECISIONS:
        raise Invalid(f"Decision {decision!r} must be one of {', '.join(DECISIONS)}.")
    had_lease = records.leased(dataset).get(frame) == person
    records.lease(dataset, frame, person)
    try:
        before, after = _change(dataset, frame, lambda working: _decided(working, decision, person), server,
                                labels=server.task(dataset).labels if decision == "accepted" else None)
        facts = {"decision": decision, "before": before.status, **counts(after)}
        if seconds is not None:
            facts["seconds"] = round(seconds, 1)
        records.add("reviews", dataset, frame, person, facts)
    finally:
        if not had_lease:
            records.release(dataset, [frame], person)
    return after


def next_frame(dataset: str, after: str | None, person: str, *, server: AnnotationServer, records: Records,
               order: str = "name", statuses: Sequence[str] = ("annotated", "new")) -> str | None:
    """The next frame to review that nobody else holds, going round at the end; None when there is none.

    order  "name", or "confidence": the frame with the least confident machine box first
    """
    _check_person(person)
    names = [name for status in statuses for name in server.frame_names(dataset, status, order)]
    if order == "name":
        names.sort()
        start = bisect_right(names, after or "")
    else:
        start = names.index(after) + 1 if after in names else 0
    held = records.leased(dataset)
    return next((name for name in names[start:] + names[:start] if held.get(name, person) == person), None)


def history(dataset: str, frame: str | None = None, *, records: Records, limit: int = 50) -> list[Entry]:
    """Who decided what and when, newest first."""
    return records.entries("reviews", dataset, frame, limit=limit)


def correct_from(dataset: str, truth: Mapping[str, Sequence[Annotation]], *, person: str, server: AnnotationServer,
                 records: Records, job: Job) -> Effort:
    """Stands in for a reviewer who knows the truth: corrects each frame with the least effort and accepts it.

    truth  frame name -> what is really there

    Returns the effort over all frames. Can be repeated: a frame's effort is in the ledger before the frame is written,
    and a frame that is reviewed already stays as it is. A frame that is not there, or is held by somebody else, is a
    failed item.
    """
    _check_person(person)
    holder, names = f"{person} (job {job.id})", sorted(truth)
    spent = {entry.subject: entry.facts["effort"] for entry in records.entries("reviews", dataset, limit=10**9)
             if entry.facts.get("job") == job.id}
    for start in range(0, len(names), BATCH):
        job.check()
        job.progress(start, len(names))
        batch = names[start:start + BATCH]
        refused = records.lease_many(dataset, batch, holder)
        for name, other in refused.items():
            job.fail_item(name, f"{other} is working on it. Run the correction again when they are done.")
        try:
            pending = [name for name in batch if name not in refused]
            for _ in range(ATTEMPTS):
                read = server.read(dataset, pending)
                for name in set(pending) - set(read):
                    job.fail_item(name, f"Data set {dataset} has no such frame in its working copy.")
                writes = []
                for working in read.values():
                    if working.is_reviewed:
                        continue
                    name = working.frame.name
                    fixed = _corrected(working, truth[name], person, job.id)
                    facts = {"decision": "accepted", "before": working.status, "job": job.id, **counts(fixed),
                             "effort": effort(working.annotations or (), truth[name]).to_json()}
                    records.add("reviews", dataset, name, person, facts, key=f"correct:{job.id}:{name}")
                    spent.setdefault(name, facts["effort"])
                    writes.append(fixed)
                pending = server.write(dataset, writes)
                if not pending:
                    break
            for name in pending:
                job.fail_item(name, "The frame changed while it was being corrected. Run the correction again.")
        finally:
            records.release(dataset, batch, holder)
    job.progress(len(names), len(names))
    kinds = ("boxes_total", "untouched", "moved", "relabelled", "deleted", "drawn")
    return sum((Effort(**{name: one[name] for name in kinds}) for one in spent.values()), Effort())


def _decided(working: WorkingFrame, decision: str, person: str) -> WorkingFrame:
    if decision == "reopen":
        is_untouched = working.annotations is None and not working.runs
        return replace(working, status="new" if is_untouched else "annotated", reviewed_by="", reviewed_at="")
    annotations = None if working.annotations is None else settle(working, person)
    if decision == "accepted" and annotations is None:
        annotations = ()
    return replace(working, annotations=annotations, status=decision, reviewed_by=person, reviewed_at=now())


def _corrected(working: WorkingFrame, truth: Sequence[Annotation], person: str, job_id: str) -> WorkingFrame:
    proposed = {annotation.id for annotation in working.annotations or ()}
    fixed = corrected(working.annotations or (), truth, person)
    # The same ids again when the job is repeated after a crash.
    drawn = tuple(a if a.id in proposed else replace(a, id=machine_annotation_id(job_id, working.frame.name, index))
                  for index, a in enumerate(fixed))
    return _decided(replace(working, annotations=drawn), "accepted", person)


def _change(dataset: str, frame: str, change: Callable[[WorkingFrame], WorkingFrame], server: AnnotationServer,
            labels: Sequence[str] | None = None) -> tuple[WorkingFrame, WorkingFrame]:
    """Reads, changes and writes a frame; when it was changed in between, from the start. Returns (before, after)."""
    for _ in range(ATTEMPTS):
        before = _read(dataset, frame, server)
        after = change(before)
        if labels is not None:
            _check_labels(after, labels)
        if after == before or not server.write(dataset, [after]):
            return before, after
    raise Conflict(f"{frame} was changed by somebody else {ATTEMPTS} times in a row. Look who has it open, then decide "
                   "again.")


def _read(dataset: str, frame: str, server: AnnotationServer) -> WorkingFrame:
    read = server.read(dataset, [frame])
    if frame not in read:
        raise NotFound(f"Data set {dataset} has no frame {frame!r} in its working copy.")
    return read[frame]


def _check_labels(working: WorkingFrame, labels: Sequence[str]) -> None:
    for annotation in working.annotations or ():
        if annotation.label == NO_LABEL:
            raise Invalid(f"{working.frame.name} has a box without a label. Give it one, or delete it, then accept "
                          "the frame.")
        if annotation.label not in labels:
            raise Invalid(f"{working.frame.name} has a box labelled {annotation.label!r}, which the data set does not "
                          f"have ({', '.join(labels)}). Choose one of these, or add the label.")


def _check_person(person: str) -> None:
    if not person.strip():
        raise Invalid("A review needs a name. Say who you are in the sidebar, or with the setting 'person'.")


def counts(working: WorkingFrame) -> dict[str, Any]:
    """What people did to a frame, counted for the ledger."""
    written, made = written_by_machines(working), touch(working)
    drawn = sum(annotation.id not in written for annotation in made.human)
    return {"boxes": len(working.annotations or ()), "drawn": drawn, "touched": len(made.human) - drawn,
            "deleted": len(made.deleted)}

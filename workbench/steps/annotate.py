"""Annotate: a model draws on frames nobody has decided on; human work stays, and every run can be taken back."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from workbench.annotation import DECIMALS, Annotation, machine_annotation_id
from workbench.blobs import Blobs
from workbench.boxes import Detections
from workbench.certificates import Certificates
from workbench.dataset import Frame
from workbench.errors import Conflict, Invalid, WorkbenchError
from workbench.inference.detector import OpenBackend
from workbench.inference.pipeline import AHEAD, detect_frames
from workbench.inference.probe import Plan
from workbench.inference.tiling import Tiling
from workbench.model import ModelCard
from workbench.ports import AnnotationServer, Job, ModelStore
from workbench.records import Records
from workbench.run import WorkingFrame, propose, undo
from workbench.steps.quantize import open_annotator
from workbench.taxonomy import LabelMap, Taxonomy

# Frames read at once when only their runs and pixels' names are looked up: about a second's work for the server.
READ = 200
# From so many waiting frames on the seconds that measuring a plan takes pay off.
MANY = 200


@dataclass(frozen=True)
class AnnotateReport:
    """What a run drew; counts cover the whole run, also what earlier attempts of it did, unless they say otherwise.

    task        what the model draws: "boxes", "polygons" or "tags"
    frames      frames the run wrote to (those without a box too)
    boxes       boxes, polygons or tags it drew, by_label each label's part
    failed      frames whose pixels could not be read
    skipped     reason -> frames left alone: "reviewed", "held by <who>", "changed meanwhile"
    left_out    model label that the data set lacks -> boxes not drawn, of this attempt
    detected    frames that went through the model in this attempt, in `seconds`
    """

    dataset: str
    model: str
    run_id: str
    frames: int
    boxes: int
    failed: int
    by_label: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    unmatched_labels: tuple[str, ...] = ()
    backend: dict[str, str] = field(default_factory=dict)
    detected: int = 0
    seconds: float = 0.0
    images_per_s: float = 0.0
    task: str = "boxes"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "unmatched_labels": list(self.unmatched_labels)}


@dataclass(frozen=True)
class UndoReport:
    """frames: taken back by this call. skipped: reason -> frames left alone: "reviewed", "held by <who>",
    "changed meanwhile", "a later run"."""

    dataset: str
    run_id: str
    frames: int
    skipped: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def preview_labels(card: ModelCard, taxonomy: Taxonomy, renames: dict[str, str] | None = None) -> LabelMap:
    """Which of the model's labels become which of the data set's, and which are left out.

    A data set without labels takes the model's own. Raises Invalid for a rename of a label that does not exist.
    """
    return card.labels.map_to(taxonomy if len(taxonomy) else card.labels, renames)


def tiles(card: ModelCard, tiling: dict[str, Any] | None) -> Tiling | None:
    """The tiling a run was asked for. Raises Invalid for one that makes no sense or does not go with the model."""
    if not tiling:
        return None
    strange = sorted(set(tiling) - {"size", "overlap", "whole"})
    if strange or "size" not in tiling:
        raise Invalid(f"Tiling takes size, overlap and whole, got {', '.join(map(str, tiling))}. Give its size.")
    if card.task != "boxes":
        raise Invalid(f"{card.ref} draws {card.task}; only models that draw boxes can look at tiles. Leave tiling off.")
    return Tiling(**tiling)


def drawing(card: ModelCard, found: Detections, index: int) -> dict[str, Any]:
    """The geometry of one detection as fields of Annotation, rounded as it is published: a box, a polygon with its box,
    or nothing for a tag, which is about the whole frame."""
    if card.task == "tags":
        return {}
    shape: dict[str, Any] = {"xyxy": tuple(round(float(value), DECIMALS) for value in found.xyxy[index])}
    if found.polygons is not None:
        corners = found.polygons[index]
        shape["polygon"] = tuple((round(float(x), DECIMALS), round(float(y), DECIMALS)) for x, y in corners)
    return shape


def annotate(dataset: str, model: str, *, run_id: str, server: AnnotationServer, models: ModelStore, blobs: Blobs,
             records: Records, open_backend: OpenBackend, certificates: Certificates, job: Job,
             statuses: Sequence[str] = ("new",), confidence: float | None = None,
             renames: dict[str, str] | None = None, tiling: dict[str, Any] | None = None, batch: int = 0,
             plan_for: Callable[[ModelCard, Path], Plan] | None = None) -> AnnotateReport:
    """Runs a model over the frames of the given statuses and writes what it proposes.

    run_id      names this run: repeating it goes on where it stopped and draws every box once, with the same ids
    statuses    of "new" and "annotated"; reviewed frames are never touched
    confidence  least confidence of a box, for all labels; None: as the model's card says
    renames     model label -> data set label, where the names differ
    tiling      {"size", "overlap"} of inference.tiling.Tiling: also look at each frame piece by piece, for small
                objects in large frames; for models that draw boxes
    batch       frames written at once: what a kill costs at most; 0: as many as suit the server
    plan_for    how the model runs fastest here (inference.probe), asked when MANY frames wait; `open_backend` then
                takes `streams` and `batch` by name. None: one frame a run

    A frame that a person holds or has reviewed meanwhile is skipped and counted; one whose pixels cannot be read is a
    failed item. Raises Invalid when no label of the model fits the data set, the model does not fit its card, or it is
    an INT8 version without a valid certificate on this device (nothing is written then), Conflict when the run id belongs
    to another run, NotFound, Cancelled.
    """
    wrong = sorted(set(statuses) - {"new", "annotated"})
    if wrong or not statuses:
        raise Invalid(
            f"A machine run works on new or annotated frames, not on {', '.join(map(repr, wrong)) or 'none'}."
        )
    card = models.card(model)
    pieces = tiles(card, tiling)
    task = server.task(dataset)
    taxonomy = Taxonomy(task.labels)
    labels = preview_labels(card, taxonomy, renames)
    if not labels.pairs:
        raise Invalid(
            f"{model} and data set {dataset} share no label: the model knows {_some(card.labels)}, the data set "
            f"{_some(taxonomy)}. Map labels by hand (renames), or add the model's labels to the data set."
        )
    tally, holder, started = _Tally(labels), f"run:{run_id}", time.monotonic()
    thresholds = {} if confidence is None else {"confidence": confidence, "confidence_by_label": {}}
    plan = Plan()
    if plan_for is not None and sum(task.by_status.get(status, 0) for status in statuses) >= MANY:
        plan = plan_for(card, models.folder(model))
        open_backend = plan.opening(open_backend)
    with open_annotator(model, models=models, open_backend=open_backend, certificates=certificates, batch=plan.batch,
                        **thresholds) as detector:
        is_repeat = _begin(
            records,
            dataset,
            run_id,
            {"model": model, "statuses": sorted(statuses), "confidence": confidence, "renames": renames or {},
             "tiling": tiling},
            card.source,
        )
        if not len(taxonomy):
            server.open_task(dataset, card.labels)
        if is_repeat:
            # Its frames have left the statuses asked for, so they are looked for everywhere.
            for working in _read_all(server, dataset, job):
                tally.count(working, run_id)
            _release_all(records, dataset, holder)
        names = sorted(
            {name for status in statuses for name in server.frame_names(dataset, status)} - tally.written.keys()
        )
        before, total = len(tally.written), len(tally.written) + len(names)
        job.progress(before, total, model)
        # The next write is detected while this one waits for the server.
        size = batch or server.write_batch
        stream = detect_frames(detector, _pixels(server, dataset, names, tally), lambda frame: blobs.get(frame.blob),
                               batch=plan.batch, ahead=max(AHEAD, size), tiling=pieces)
        for group in _groups(stream, size):
            job.check()
            proposals, read = {}, {working.frame.name: working for working, _ in group}
            for name, (_, found) in zip(read, group):
                if isinstance(found, WorkbenchError):
                    job.fail_item(name, str(found))
                    tally.failed += 1
                else:
                    proposals[name] = _annotations(found, card, labels, run_id, name, tally)
            written = _write(server, records, dataset, holder, proposals, tally.skipped,
                             lambda working: propose(working, run_id, card.source, proposals[working.frame.name]), read)
            for working in written:
                tally.count(working, run_id)
            job.progress(before + tally.failed + tally.detected, total, model)
        report = tally.report(dataset, model, run_id, vars(detector.report), time.monotonic() - started, card.task)
    records.add(
        "machine_runs",
        dataset,
        run_id,
        card.source,
        {"is_finished": True, **report.to_json()},
        key=f"{run_id}/finished",
    )
    return report


def undo_run(
    dataset: str, run_id: str, *, server: AnnotationServer, records: Records, job: Job, batch: int = 100
) -> UndoReport:
    """Takes a run back on every frame nobody has reviewed since; what people did since stays.

    Can be repeated: frames that were taken back before are no longer the run's. Raises Invalid for a run that the data
    set never had.
    """
    if not records.entries("machine_runs", dataset, run_id, limit=1):
        raise Invalid(f"Data set {dataset} has no machine run {run_id!r}; the annotate page lists its runs.")
    holder = f"undo:{run_id}"
    _release_all(records, dataset, holder)
    names = [working.frame.name for working in _read_all(server, dataset, job)
             if any(run.run_id == run_id and not run.is_undone for run in working.runs)]
    skipped: Counter[str] = Counter()

    def taken_back(working: WorkingFrame) -> WorkingFrame:
        try:
            return undo(working, run_id)
        except Conflict as error:
            job.fail_item(working.frame.name, str(error))
            skipped["a later run"] += 1
            return working

    done = 0
    for group in _groups(names, batch):
        job.check()
        done += len(_write(server, records, dataset, holder, group, skipped, taken_back))
        job.progress(done + skipped.total(), len(names), run_id)
    # Frames that were held or lie under a later run can be taken back later, so the run is not over with before.
    if skipped.total() == skipped["reviewed"]:
        records.add("machine_runs", dataset, run_id, "", {"undone": run_id}, key=f"{run_id}/undone")
    return UndoReport(dataset, run_id, done, dict(skipped))


class _Tally:
    """Counts while a run goes on."""

    def __init__(self, labels: LabelMap) -> None:
        self.labels = labels
        self.written: dict[str, Counter[str]] = {}
        self.skipped: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.failed = self.detected = 0

    def count(self, working: WorkingFrame, run_id: str) -> None:
        """Counts what the run drew on a frame, if it did."""
        for run in working.runs:
            if run.run_id == run_id:
                self.written[working.frame.name] = Counter(annotation.label for annotation in run.added)

    def report(self, dataset: str, model: str, run_id: str, backend: dict[str, str], seconds: float,
               task: str) -> AnnotateReport:
        by_label = sum(self.written.values(), Counter())
        return AnnotateReport(
            dataset, model, run_id, len(self.written), by_label.total(), self.failed, dict(sorted(by_label.items())),
            dict(sorted(self.skipped.items())), dict(sorted(self.left_out.items())), self.labels.unmatched, backend,
            self.detected, round(seconds, 3), round(self.detected / seconds, 2) if seconds > 0 else 0.0, task)


def _begin(records: Records, dataset: str, run_id: str, facts: dict[str, Any], source: str) -> bool:
    """Enters the run into the ledger; True when it is there already and this is a repeat of it."""
    if records.add("machine_runs", dataset, run_id, source, facts, key=run_id):
        return False
    entries = records.entries("machine_runs", dataset, run_id)
    if not entries or {name: entries[-1].facts.get(name) for name in facts} != facts:
        raise Conflict(f"Run {run_id} exists already with another model, data set or settings. Start a new run.")
    if any("undone" in entry.facts for entry in entries):
        raise Conflict(f"Run {run_id} was taken back. Start a new run.")
    return True


def _pixels(server: AnnotationServer, dataset: str, names: list[str],
            tally: _Tally) -> Iterator[tuple[WorkingFrame, Frame]]:
    for group in _groups(names, READ):
        for working in server.read(dataset, group).values():
            if working.is_reviewed:
                tally.skipped["reviewed"] += 1
            else:
                yield working, working.frame


def _annotations(
    found: Detections, card: ModelCard, labels: LabelMap, run_id: str, name: str, tally: _Tally
) -> tuple[Annotation, ...]:
    """Detections as annotations of the data set; the index in the id counts all that was found, drawn or left out."""
    tally.detected += 1
    proposals = []
    for index, (class_id, confidence) in enumerate(zip(found.class_id, found.confidence)):
        ours = card.labels.labels[class_id]
        label = labels(ours)
        if label is None:
            tally.left_out[ours] += 1
            continue
        proposals.append(Annotation(label, **drawing(card, found, index), source=card.source,
                                    confidence=round(float(confidence), 4), attributes={"run_id": run_id},
                                    id=machine_annotation_id(run_id, name, index)))
    return tuple(proposals)


def _write(
    server: AnnotationServer,
    records: Records,
    dataset: str,
    holder: str,
    names: Iterable[str],
    skipped: Counter[str],
    change: Callable[[WorkingFrame], WorkingFrame],
    read: Mapping[str, WorkingFrame] | None = None,
) -> list[WorkingFrame]:
    """Changes frames under a lease each; returns those it wrote.

    The lease covers writing, not the detection before: a person who opens a frame meanwhile is not kept waiting, and
    the run skips their frame. `read` is how the frames were read a moment ago: the server refuses what has changed
    since. Those, and all without `read`, are read afresh; one that still changed in between is tried once more.
    """
    names, written = list(names), []
    refused = records.lease_many(dataset, names, holder)
    skipped.update(f"held by {who}" for who in refused.values())
    pending = [name for name in names if name not in refused]
    try:
        for attempt in range(2 if read is None else 3):
            stand = server.read(dataset, pending) if attempt or read is None else {name: read[name] for name in pending}
            changed = []
            for working in stand.values():
                after = change(working)
                if after is not working:
                    changed.append(after)
                elif working.is_reviewed:
                    skipped["reviewed"] += 1
            pending = server.write(dataset, changed) if changed else []
            written += [one for one in changed if one.frame.name not in pending]
            if not pending:
                break
        skipped.update("changed meanwhile" for _ in pending)
    finally:
        records.release(dataset, names, holder)
    return written


def _release_all(records: Records, dataset: str, holder: str) -> None:
    """Gives back what a killed attempt still holds, so that people need not wait for its leases to run out."""
    records.release(dataset, [name for name, who in records.leased(dataset).items() if who == holder], holder)


def _read_all(server: AnnotationServer, dataset: str, job: Job) -> Iterator[WorkingFrame]:
    for group in _groups(server.frame_names(dataset), READ):
        job.check()
        yield from server.read(dataset, group).values()


def _groups(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    group = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _some(taxonomy: Taxonomy, most: int = 10) -> str:
    more = f" and {len(taxonomy) - most} more" if len(taxonomy) > most else ""
    return ", ".join(taxonomy.labels[:most]) + more if len(taxonomy) else "none"

"""Version: the working copy becomes the next published version of its data set."""

from __future__ import annotations

from dataclasses import dataclass, replace

from workbench.annotation import Annotation, is_same_drawing
from workbench.dataset import DatasetVersion, Diff, LabeledFrame, Manifest, assign_splits, diff, next_version
from workbench.errors import Conflict, Invalid, NotFound
from workbench.ports import AnnotationServer, DatasetStore, Job
from workbench.run import WorkingFrame, settle
from workbench.taxonomy import Taxonomy

BATCH = 256
ATTEMPTS = 3
# What a version takes from the working copy: frames a person accepted, or also what a machine drew and nobody reviewed.
INCLUDE = {"accepted": ("accepted",), "annotated": ("accepted", "annotated")}


@dataclass(frozen=True)
class Published(DatasetVersion):
    """The version that is the latest now, and what this call changed; nothing, when there was nothing new."""

    changed: Diff | None = None


@dataclass(frozen=True)
class Pending:
    """Names of the accepted frames whose labels no version has yet: the next one will."""

    frames: tuple[str, ...]


def version(dataset: str, *, server: AnnotationServer, store: DatasetStore, job: Job, person: str, message: str,
            bump: str | None = None, include: str = "accepted") -> Published:
    """Publishes the working copy; calling it again without new work returns the version there is.

    Accepted frames go in with their annotations, the person's part signed; every other frame of the working copy as
    None (nobody looked). Frames of the latest version that are not in the working copy stay as they were published. A
    published frame keeps its split, and boxes nobody moved keep their published numbers and author.

    Raises NotFound without a working copy, Invalid without frames or for another `include`, Conflict when others
    keep publishing the data set meanwhile, Cancelled when a person cancelled the job.
    """
    if include not in INCLUDE:
        raise Invalid(f"include must be one of {', '.join(INCLUDE)}, got {include!r}.")
    labels = server.task(dataset).labels
    working = _read(dataset, server, job)
    for attempt in range(ATTEMPTS):
        latest, before = _latest(dataset, store)
        manifest = _merge(before, working, labels, INCLUDE[include], person)
        if not manifest.frames:
            raise Invalid(f"Data set {dataset} has no frames; upload some before publishing a version.")
        job.check()
        try:
            made = store.publish(dataset, manifest, message, person, bump=bump, after=latest)
        except Conflict:
            # Somebody published (an upload, say) since `before` was read: their frames must go into ours.
            if attempt == ATTEMPTS - 1:
                raise
            job.log(f"{dataset} got another version meanwhile; making this one again from it.")
            continue
        break
    changed = diff(before, manifest)
    job.log(f"{made.ref}: {made.labeled} of {made.frames} frames labelled, {made.boxes} boxes; {_told(changed)}.")
    return Published(**vars(made), changed=changed)


@dataclass(frozen=True)
class Planned:
    """What `version` would do now. after, next: numbers of the latest and of the next version, "" for none."""

    after: str
    next: str
    changed: Diff


def planned(dataset: str, *, server: AnnotationServer, store: DatasetStore, job: Job, person: str) -> Planned:
    """Reads the whole working copy and tells what the next version would change; nothing is published."""
    labels = server.task(dataset).labels
    working = _read(dataset, server, job)
    latest, before = _latest(dataset, store)
    changed = diff(before, _merge(before, working, labels, INCLUDE["accepted"], person))
    return Planned(latest, "" if changed.is_empty else next_version(latest or None, changed.bump), changed)


def pending(dataset: str, server: AnnotationServer, store: DatasetStore) -> Pending:
    """What would be new; labels that were changed on a published frame are found only by publishing."""
    _, before = _latest(dataset, store)
    published = {one.frame.name for one in before.labeled}
    return Pending(tuple(name for name in server.frame_names(dataset, "accepted") if name not in published))


def _latest(dataset: str, store: DatasetStore) -> tuple[str, Manifest]:
    """The latest version's number and content; "" and an empty manifest when there is none yet."""
    try:
        versions = store.versions(dataset)
    except NotFound:
        versions = []
    if not versions:
        return "", Manifest(Taxonomy(()))
    return versions[0].version, store.manifest(versions[0].ref)


def _read(dataset: str, server: AnnotationServer, job: Job) -> list[WorkingFrame]:
    names, working = server.frame_names(dataset), []
    for start in range(0, len(names), BATCH):
        job.check()
        working += server.read(dataset, names[start:start + BATCH]).values()
        job.progress(min(start + BATCH, len(names)), len(names), "read")
    return working


def _merge(before: Manifest, working: list[WorkingFrame], labels: tuple[str, ...], statuses: tuple[str, ...],
           person: str) -> Manifest:
    frames = dict(before.by_name)
    for one in working:
        was = before.by_name.get(one.frame.name)
        if one.status == "new" and not one.runs and was is not None:
            # An upload that was killed before it told the working copy: what is published stays.
            continue
        reviewed_by = one.reviewed_by or (was.reviewed_by if was is not None else "")
        frames[one.frame.name] = LabeledFrame(
            # The published record has what a working copy need not keep, such as the sha256.
            frame=was.frame if was is not None and was.frame.blob == one.frame.blob else one.frame,
            annotations=_signed(one, was, person) if one.status in statuses else None,
            split=was.split if was is not None and was.split else one.split,
            reviewed_by=reviewed_by if one.status == "accepted" else "")
    return Manifest(before.taxonomy.with_labels(labels), assign_splits(frames.values()))


def _signed(one: WorkingFrame, was: LabeledFrame | None, person: str) -> tuple[Annotation, ...]:
    """The settled annotations, with those that are as they were published exactly as published.

    Otherwise the last digit that a trip through relative coordinates moved, or another publisher's name on a box whose
    author was unknown, would make a version out of nothing.
    """
    published = {annotation.id: annotation for annotation in was.annotations or ()} if was is not None else {}
    signed = []
    for drawn, settled in zip(one.annotations or (), settle(one, one.reviewed_by or person)):
        known = published.get(drawn.id)
        if known is not None and is_same_drawing(settled, known):
            source = known.source if drawn.source == "human:unknown" else settled.source
            settled = replace(settled, xyxy=known.xyxy, polygon=known.polygon, source=source)
        signed.append(settled)
    return tuple(signed)


def _told(changed: Diff) -> str:
    if changed.is_empty:
        return "nothing changed"
    counts = {"frames added": changed.frames_added, "frames removed": changed.frames_removed,
              "frames changed": changed.frames_relabeled, "boxes added": changed.boxes_added,
              "boxes removed": changed.boxes_removed, "boxes changed": changed.boxes_changed,
              "labels added": changed.labels_added, "labels removed": changed.labels_removed}
    return ", ".join(f"{len(what)} {name}" for name, what in counts.items() if what)

"""Upload: a folder, an archive, or a data set of a known format becomes the first, or the next, version of a data set."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from workbench.annotation import Annotation
from workbench.blobs import Blobs
from workbench.dataset import SPLITS, Frame, LabeledFrame, Manifest, assign_splits, check_dataset_name
from workbench.errors import Conflict, Invalid
from workbench.formats.images import frame_of, read_file
from workbench.formats.labels import place
from workbench.formats.limits import Limits
from workbench.formats.source import Source, SourceImage, open_source, printable
from workbench.ports import AnnotationServer, DatasetStore, Job
from workbench.run import WorkingFrame
from workbench.taxonomy import Taxonomy

# So many names a list are told one by one; beyond it a report is read by nobody and only fills the databases.
LISTED = 1000
BATCH = 200
ATTEMPTS = 5  # at publishing, while others publish the same data set
MAX_NAME = 480  # what workbench.records keeps a frame's name in, less the md5 that a taken name gets


@dataclass
class UploadReport:
    """What an upload did; all lists are by file or frame name.

    version     reference of the version the data set has now
    format      "images", "coco", "yolo", "voc" or "folders"
    added       number of new frames; boxes: on them and on frames that got their first labels; labels: the taxonomy
    labeled     names of frames that were there, unlabelled, and got the labels of this upload
    duplicates  file -> the frame that has the same bytes
    conflicts   file -> why its labels were left alone
    refused     file (and place in it) -> why it was left out; warnings likewise for what was taken, but changed
    turned      number of pictures that were turned upright as their EXIF orientation says
    """

    version: str = ""
    format: str = "images"
    added: int = 0
    boxes: int = 0
    turned: int = 0
    labels: list[str] = field(default_factory=list)
    labeled: list[str] = field(default_factory=list)
    duplicates: dict[str, str] = field(default_factory=dict)
    conflicts: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    warnings: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON values: the first LISTED of every list, and `<list>_count` with how many there are."""
        record = asdict(self)
        for name, value in list(record.items()):
            if isinstance(value, dict):
                record[f"{name}_count"] = len(value)
                record[name] = dict(list(value.items())[:LISTED])
        record["labeled_count"], record["labeled"] = len(self.labeled), self.labeled[:LISTED]
        return record


def upload(dataset: str, source: Path, *, store: DatasetStore, server: AnnotationServer | None, blobs: Blobs, job: Job,
           person: str, split: str | None = None, limits: Limits = Limits()) -> UploadReport:
    """Stores the pixels of all good pictures, publishes one version at the end, then adds them to the working copy.

    A picture whose bytes the data set has already is listed as a duplicate. Its labels are taken when nobody has
    labelled that frame, in the version and in the working copy; otherwise, when they differ, they are a conflict and
    left alone. Splits come from the format, else from `split`, else from the pixels; a frame keeps the one it has. A
    frame name that is taken by another picture gets part of the md5 appended.

    Repeated after a kill it ends in the same version. Raises Invalid when not one picture is usable, and then no data
    set is made; NotFound when there is no such source; Cancelled when the job was cancelled: nothing is published then.
    """
    check_dataset_name(dataset)
    if split not in (None, *SPLITS):
        raise Invalid(f"Split {split!r} must be one of {', '.join(SPLITS)}, or be left out.")
    report = UploadReport()
    with open_source(source, limits, job.check) as opened:
        report.format = opened.format
        report.refused = {printable(name): reason for name, reason in opened.refused.items()}
        report.warnings = {printable(name): reason for name, reason in opened.warnings.items()}
        stored = list(_store(opened, blobs, job, limits, report))
    for name, reason in list(report.refused.items())[:LISTED]:
        job.fail_item(name, reason)
    if not stored:
        first = "; ".join(f"{name}: {reason}" for name, reason in list(report.refused.items())[:3])
        raise Invalid(f"{Path(source).name} has no picture that can be used. {first or 'It is empty.'}")
    job.progress(len(opened.images), len(opened.images), "publishing")
    report, manifest, given = _publish(dataset, opened.taxonomy, stored, person, split, report, store, server, job,
                                       f"Upload of {Path(source).name}")
    report.labels = list(manifest.taxonomy.labels)
    if server is not None:
        _fill(dataset, manifest, given, server, blobs, job, report)
    job.log(f"{report.version}: {report.added} frames added, {len(report.labeled)} labelled, {len(report.duplicates)} "
            f"there already, {len(report.refused)} refused")
    return report


def _publish(dataset: str, taxonomy: Taxonomy, stored: list[_Stored], person: str, split: str | None,
             read: UploadReport, store: DatasetStore, server: AnnotationServer | None, job: Job,
             message: str) -> tuple[UploadReport, Manifest, dict[str, tuple[Annotation, ...]]]:
    """Joins the pictures to the latest version and publishes; again from the start when somebody published between."""
    for attempt in range(ATTEMPTS):
        report = copy.deepcopy(read)
        published = store.versions(dataset)[:1] if dataset in store.names() else []
        base = store.manifest(published[0].ref) if published else Manifest(Taxonomy(()))
        manifest, given = _merge(base, taxonomy, stored, person, split, report, dataset, server)
        job.check()
        try:
            report.version = store.publish(dataset, manifest, f"{message}: {report.added} frames, {report.boxes} boxes",
                                           person, after=published[0].version if published else "").ref
            break
        except Conflict:
            if attempt == ATTEMPTS - 1:
                raise
            job.log(f"{dataset} got another version meanwhile; joining this upload to it.")
    for name, reason in list(report.refused.items())[len(read.refused):][:LISTED]:
        job.fail_item(name, reason)
    return report, manifest, given


@dataclass(frozen=True)
class _Stored:
    """A picture whose pixels are stored; everything about it but the pixels."""

    image: SourceImage
    frame: Frame
    file_size: tuple[int, int]


def _store(source: Source, blobs: Blobs, job: Job, limits: Limits, report: UploadReport) -> Iterator[_Stored]:
    """One picture at a time: read, checked, stored as a blob."""
    for index, image in enumerate(source.images):
        job.check()
        job.progress(index, len(source.images), "reading pictures")
        try:
            yield _store_one(source, image, blobs, limits, report)
        except Invalid as error:
            report.refused[image.shown] = str(error)


def _store_one(source: Source, image: SourceImage, blobs: Blobs, limits: Limits, report: UploadReport) -> _Stored:
    if len(image.name) > MAX_NAME:
        raise Invalid(f"has a path of more than {MAX_NAME} characters; shorten it.")
    picture = read_file(source.root / image.path, limits)
    if picture.notes:
        report.warnings[image.shown] = " ".join(picture.notes)
    made = blobs.put(picture.data)
    report.turned += picture.orientation != 1
    return _Stored(image, frame_of(image.name, picture, made), picture.file_size)


def _merge(base: Manifest, taxonomy: Taxonomy, stored: list[_Stored], person: str, split: str | None,
           report: UploadReport, dataset: str,
           server: AnnotationServer | None) -> tuple[Manifest, dict[str, tuple[Annotation, ...]]]:
    """The base with what the upload brings, and {frame name: labels it gave to frames that were there}."""
    frames = dict(base.by_name)
    by_md5 = {one.frame.blob: name for name, one in frames.items()}
    given: dict[str, tuple[Annotation, ...]] = {}
    relabeled = [by_md5[one.frame.blob] for one in stored if one.image.labels.boxes is not None
                 and one.frame.blob in by_md5 and frames[by_md5[one.frame.blob]].annotations is None]
    at_work = _at_work(dataset, relabeled, server)
    for one in stored:
        there = frames.get(by_md5.get(one.frame.blob, ""))
        name = there.frame.name if there else _free_name(one, frames, report)
        placed = place(one.image.labels, name, (one.frame.width, one.frame.height), one.file_size,
                       one.frame.orientation, f"human:{person}")
        report.refused |= {printable(where): reason for where, reason in placed.refused.items()}
        report.warnings |= {printable(where): reason for where, reason in placed.warnings.items()}
        if there is None:
            frame = replace(one.frame, name=name)
            (frames[name],) = assign_splits([LabeledFrame(frame, placed.annotations, one.image.labels.split or split)])
            by_md5[frame.blob] = name
            report.added += 1
            report.boxes += len(placed.annotations or ())
            continue
        report.duplicates[one.image.shown] = name
        told = one.image.labels.split
        if told and there.split and told != there.split:
            report.warnings.setdefault(one.image.shown, f"the same picture is in {there.split} as {name} and stays "
                                                        "there.")
        if placed.annotations is None:
            continue
        begun = at_work.get(name) if there.annotations is None else None
        if begun is not None and _drawn(begun.annotations or ()) != _drawn(placed.annotations):
            report.conflicts[one.image.shown] = (f"{name} is being labelled in the working copy; the upload's labels "
                                                 "are left.")
        elif there.annotations is None:
            frames[name] = replace(there, annotations=placed.annotations)
            report.boxes += len(placed.annotations)
            report.labeled += [name] if name in base.by_name else []
            given[name] = placed.annotations
        elif _drawn(there.annotations) == _drawn(placed.annotations):
            given[name] = there.annotations
        else:
            report.conflicts[one.image.shown] = (f"{name} has other labels already; they are kept, the upload's are "
                                                 "left out.")
    return Manifest(base.taxonomy.with_labels(taxonomy.labels), tuple(frames.values())), given


def _free_name(one: _Stored, frames: dict[str, LabeledFrame], report: UploadReport) -> str:
    name = one.frame.name
    if name not in frames:
        return name
    path = PurePosixPath(name)
    free = str(path.with_name(f"{path.stem}-{one.frame.blob[:8]}{path.suffix}"))
    report.warnings.setdefault(one.image.shown, f"the name {name} is taken by another picture; this one is called "
                                                f"{free}.")
    return free


def _drawn(annotations: tuple[Annotation, ...]) -> set[tuple[Any, ...]]:
    return {(annotation.label, annotation.xyxy, annotation.polygon) for annotation in annotations}


def _at_work(dataset: str, names: Sequence[str], server: AnnotationServer | None) -> dict[str, WorkingFrame]:
    """Those of the frames that a person or a model has begun to label in the working copy."""
    if server is None or not names or all(task.dataset != dataset for task in server.tasks()):
        return {}
    found: dict[str, WorkingFrame] = {}
    for start in range(0, len(names), BATCH):
        found |= server.read(dataset, names[start:start + BATCH])
    return {name: one for name, one in found.items() if not _is_new(one)}


def _is_new(working: WorkingFrame) -> bool:
    return working.status == "new" and not working.annotations and not working.runs


def _fill(dataset: str, manifest: Manifest, given: dict[str, tuple[Annotation, ...]], server: AnnotationServer,
          blobs: Blobs, job: Job, report: UploadReport) -> None:
    """Brings the working copy up to the version: frames it lacks, and labels for frames that were new in it."""
    server.open_task(dataset, manifest.taxonomy)
    there = set(server.frame_names(dataset))
    missing = [one for one in manifest.frames if one.frame.name not in there]
    for start in range(0, len(missing), BATCH):
        job.check()
        job.progress(start, len(missing), "filling the working copy")
        server.add_frames(dataset, ((one, blobs.path(one.frame.blob)) for one in missing[start:start + BATCH]))
    names = sorted(name for name in given if name in there)
    for start in range(0, len(names), BATCH):
        job.check()
        found = server.read(dataset, names[start:start + BATCH])
        late = server.write(dataset, [replace(one, annotations=given[name], status="accepted")
                                      for name, one in found.items() if _is_new(one)])
        for name in late:
            report.conflicts[name] = ("somebody began to label it in the working copy meanwhile; their work is kept "
                                      "there.")
    job.progress(len(manifest.frames), len(manifest.frames), "done")

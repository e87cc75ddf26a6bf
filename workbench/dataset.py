"""Frame, LabeledFrame, Manifest, DatasetVersion, Diff: the records of a data set; pixels live in the blob store."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from workbench.annotation import Annotation
from workbench.errors import Invalid
from workbench.taxonomy import Taxonomy

SPLITS = ("train", "val", "test")
DATASET_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
VERSION = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)")


def check_dataset_name(name: str) -> str:
    """Raises Invalid unless the name is safe in a URL, a folder and a git repository."""
    if not DATASET_NAME.fullmatch(name):
        raise Invalid(f"Data set name {name!r} must be lower-case letters, digits, - or _, at most 63 of them.")
    return name


@dataclass(frozen=True)
class Frame:
    """The record of one image.

    name         relative POSIX path, unique in its data set
    width        in pixels, after the EXIF orientation was applied
    height       in pixels, likewise
    blob         md5 (hex) of the stored image file
    orientation  the EXIF orientation (1..8) the uploaded file had; 1 means nothing had to be turned
    video        (blob md5, frame index, time in s) of the video it was cut from, or None
    """

    name: str
    width: int
    height: int
    blob: str
    sha256: str = ""
    size_bytes: int = 0
    orientation: int = 1
    video: tuple[str, int, float] | None = None

    def __post_init__(self) -> None:
        parts = PurePosixPath(self.name).parts
        if not parts or self.name.startswith("/") or ".." in parts or "\\" in self.name or not self.name.isprintable():
            raise Invalid(f"Frame name {self.name!r} must be a relative path without '..'.")
        if self.width < 1 or self.height < 1:
            raise Invalid(f"Frame {self.name!r} has no pixels ({self.width} x {self.height}).")

    def to_json(self) -> dict[str, Any]:
        record: dict[str, Any] = {"name": self.name, "width": self.width, "height": self.height, "md5": self.blob,
                                  "sha256": self.sha256, "size_bytes": self.size_bytes}
        if self.orientation != 1:
            record["orientation"] = self.orientation
        if self.video is not None:
            record["video"] = list(self.video)
        return record

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Frame:
        video = record.get("video")
        return cls(name=record["name"], width=record["width"], height=record["height"], blob=record["md5"],
                   sha256=record.get("sha256", ""), size_bytes=record.get("size_bytes", 0),
                   orientation=record.get("orientation", 1), video=tuple(video) if video else None)


@dataclass(frozen=True)
class LabeledFrame:
    """A frame and what is known about it: annotations None = nobody looked, () = looked, nothing there."""

    frame: Frame
    annotations: tuple[Annotation, ...] | None = None
    split: str | None = None
    reviewed_by: str = ""

    def __post_init__(self) -> None:
        if self.annotations is not None:
            object.__setattr__(self, "annotations", tuple(self.annotations))
        if self.split is not None and self.split not in SPLITS:
            raise Invalid(f"Split {self.split!r} of {self.frame.name!r} must be one of {', '.join(SPLITS)}.")

    def to_json(self) -> dict[str, Any]:
        record = self.frame.to_json()
        record["split"] = self.split
        if self.reviewed_by:
            record["reviewed_by"] = self.reviewed_by
        record["annotations"] = None
        if self.annotations is not None:
            record["annotations"] = [a.to_json() for a in sorted(self.annotations, key=lambda a: a.id)]
        return record

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> LabeledFrame:
        drawn = record.get("annotations")
        return cls(frame=Frame.from_json(record), split=record.get("split"), reviewed_by=record.get("reviewed_by", ""),
                   annotations=None if drawn is None else tuple(Annotation.from_json(a) for a in drawn))


@dataclass(frozen=True)
class Manifest:
    """All of one version's content in canonical form: frames sorted by name; same content, same digest.

    Raises Invalid when a name stands twice, an annotation's label is not in the taxonomy or its box leaves the frame.
    """

    taxonomy: Taxonomy
    frames: tuple[LabeledFrame, ...] = ()

    def __post_init__(self) -> None:
        frames = tuple(sorted(self.frames, key=lambda labeled: labeled.frame.name))
        object.__setattr__(self, "frames", frames)
        for one, following in zip(frames, frames[1:]):
            if one.frame.name == following.frame.name:
                raise Invalid(f"Frame {one.frame.name!r} stands twice in the manifest.")
        for labeled in frames:
            for annotation in labeled.annotations or ():
                if annotation.label not in self.taxonomy:
                    raise Invalid(f"{labeled.frame.name}: label {annotation.label!r} is not in the taxonomy "
                                  f"({', '.join(self.taxonomy.labels)}). Add the label or map it.")
                box = annotation.xyxy
                if box and (min(box[:2]) < -0.5 or box[2] > labeled.frame.width + 0.5
                            or box[3] > labeled.frame.height + 0.5):
                    raise Invalid(f"{labeled.frame.name}: box {box} of {annotation.label!r} leaves the frame "
                                  f"({labeled.frame.width} x {labeled.frame.height}).")

    @cached_property
    def by_name(self) -> dict[str, LabeledFrame]:
        return {labeled.frame.name: labeled for labeled in self.frames}

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) over the canonical lines."""
        whole = hashlib.sha256()
        for line in self.to_lines():
            whole.update(line.encode() + b"\n")
        return whole.hexdigest()

    def to_lines(self) -> Iterable[str]:
        """The taxonomy, then one JSON object a frame: the diffable text that a git repository keeps."""
        yield _canonical({"taxonomy": list(self.taxonomy.labels)})
        for labeled in self.frames:
            yield _canonical(labeled.to_json())

    @classmethod
    def from_lines(cls, lines: Iterable[str]) -> Manifest:
        rows = [json.loads(line) for line in lines if line.strip()]
        if not rows or "taxonomy" not in rows[0]:
            raise Invalid("A manifest must begin with a line that holds its taxonomy.")
        return cls(Taxonomy(tuple(rows[0]["taxonomy"])), tuple(LabeledFrame.from_json(row) for row in rows[1:]))

    def split(self, name: str, labeled_only: bool = True) -> tuple[LabeledFrame, ...]:
        """The frames of a split; those nobody looked at are left out unless asked for."""
        return tuple(one for one in self.frames
                     if one.split == name and (one.annotations is not None or not labeled_only))

    @property
    def labeled(self) -> tuple[LabeledFrame, ...]:
        return tuple(one for one in self.frames if one.annotations is not None)

    @property
    def box_count(self) -> int:
        return sum(len(one.annotations or ()) for one in self.frames)


@dataclass(frozen=True)
class DatasetVersion:
    """One immutable, published version: `cells@1.4.0`."""

    dataset: str
    version: str
    digest: str
    commit: str
    message: str = ""
    author: str = ""
    created_at: str = ""
    frames: int = 0
    labeled: int = 0
    boxes: int = 0
    labels: tuple[str, ...] = field(default_factory=tuple)

    @property
    def ref(self) -> str:
        return f"{self.dataset}@{self.version}"


@dataclass(frozen=True)
class Diff:
    """What changed from one manifest to another: frame names, and (frame name, annotation id) pairs."""

    frames_added: tuple[str, ...]
    frames_removed: tuple[str, ...]
    frames_relabeled: tuple[str, ...]
    boxes_added: tuple[tuple[str, str], ...]
    boxes_removed: tuple[tuple[str, str], ...]
    boxes_changed: tuple[tuple[str, str], ...]
    labels_added: tuple[str, ...]
    labels_removed: tuple[str, ...]

    @property
    def is_empty(self) -> bool:
        return not any(getattr(self, name) for name in self.__dataclass_fields__)

    @property
    def bump(self) -> str:
        """Which part of the version number moves: labels gone "major", labels or boxes moved "minor", else "patch"."""
        if self.labels_removed:
            return "major"
        if self.frames_relabeled or self.frames_removed or self.labels_added:
            return "minor"
        return "patch"


def diff(old: Manifest, new: Manifest) -> Diff:
    before, after = old.by_name, new.by_name
    added, removed, changed, relabeled = [], [], [], []
    for name in sorted(before.keys() & after.keys()):
        was, now = before[name], after[name]
        was_boxes = {a.id: a.to_json() for a in was.annotations or ()}
        now_boxes = {a.id: a.to_json() for a in now.annotations or ()}
        if was.to_json() != now.to_json():
            relabeled.append(name)
        added += [(name, key) for key in sorted(now_boxes.keys() - was_boxes.keys())]
        removed += [(name, key) for key in sorted(was_boxes.keys() - now_boxes.keys())]
        changed += [(name, key) for key in sorted(now_boxes.keys() & was_boxes.keys())
                    if now_boxes[key] != was_boxes[key]]
    for name in sorted(after.keys() - before.keys()):
        added += [(name, a.id) for a in after[name].annotations or ()]
    for name in sorted(before.keys() - after.keys()):
        removed += [(name, a.id) for a in before[name].annotations or ()]
    return Diff(
        frames_added=tuple(sorted(after.keys() - before.keys())),
        frames_removed=tuple(sorted(before.keys() - after.keys())),
        frames_relabeled=tuple(relabeled),
        boxes_added=tuple(added), boxes_removed=tuple(removed), boxes_changed=tuple(changed),
        labels_added=tuple(label for label in new.taxonomy.labels if label not in old.taxonomy),
        labels_removed=tuple(label for label in old.taxonomy.labels if label not in new.taxonomy),
    )


def next_version(latest: str | None, bump: str) -> str:
    """0.1.0 comes first; then major, minor or patch moves as semantic versioning says."""
    if latest is None:
        return "0.1.0"
    match = VERSION.fullmatch(latest)
    if not match:
        raise Invalid(f"Version {latest!r} must read MAJOR.MINOR.PATCH.")
    major, minor, patch = map(int, match.groups())
    return {"major": f"{major + 1}.0.0", "minor": f"{major}.{minor + 1}.0", "patch": f"{major}.{minor}.{patch + 1}"}[bump]


def parse_ref(ref: str) -> tuple[str, str]:
    """`cells@1.4.0` -> ("cells", "1.4.0"). Raises Invalid for another form."""
    name, _, version = ref.partition("@")
    check_dataset_name(name)
    if not VERSION.fullmatch(version):
        raise Invalid(f"Data set reference {ref!r} must read name@MAJOR.MINOR.PATCH.")
    return name, version


def assign_splits(frames: Iterable[LabeledFrame], val: float = 0.1, test: float = 0.2) -> tuple[LabeledFrame, ...]:
    """Gives every frame without a split one, by its pixels alone: the same picture never changes sides.

    The md5 of the pixels, read as a fraction of its range, falls below `test`, below `test + val`, or above.
    """
    return tuple(one if one.split else replace(one, split=_split_of(one.frame.blob, val, test)) for one in frames)


def _split_of(md5: str, val: float, test: float) -> str:
    # A second hash, so that the first two digits (the blob's folder) and the split are independent.
    share = int(hashlib.sha256(md5.encode()).hexdigest()[:8], 16) / 0xFFFFFFFF
    return "test" if share < test else "val" if share < test + val else "train"


def _canonical(record: dict[str, Any]) -> str:
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

"""Annotation: one thing drawn on a frame, with who drew it; its id is ours and survives every round trip."""

from __future__ import annotations

import hashlib
import math
import uuid
from dataclasses import dataclass, field
from typing import Any

from workbench.errors import Invalid

# Coordinates are compared and published at a hundredth of a pixel: finer than any annotator's hand, coarser than the
# error of a trip through relative coordinates (about 1e-13) or a float32 (about 1e-4 at 4,000 px).
DECIMALS = 2
SAME_PX = 0.05


@dataclass(frozen=True)
class Annotation:
    """A labelled box, polygon, mask or tag.

    label       a name of the data set's taxonomy
    xyxy        (x1, y1, x2, y2) in pixels of the frame, or None
    polygon     ((x, y), ...) in pixels, or None
    mask        COCO run-length encoding {"size": [height, width], "counts": str}, or None; all three None: a tag
    source      "human:<who>" or "model:<name>@<version>": who drew it
    confidence  0..1 for a machine, None for a person
    attributes  plain JSON values; "touched_by" names the person who changed a machine's box
    id          ours, unique within a data set

    Raises Invalid for a NaN, an infinity, an empty label, an inverted box or a source of another form.
    """

    label: str
    xyxy: tuple[float, float, float, float] | None = None
    polygon: tuple[tuple[float, float], ...] | None = None
    mask: dict[str, Any] | None = None
    track_id: int | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    source: str = "human:unknown"
    confidence: float | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        if not self.label:
            raise Invalid("An annotation needs a label.")
        if self.source.partition(":")[0] not in ("human", "model") or not self.source.partition(":")[2]:
            raise Invalid(f"Source {self.source!r} must read 'human:<who>' or 'model:<name>@<version>'.")
        if self.xyxy is not None:
            box = tuple(float(value) for value in self.xyxy)
            if len(box) != 4 or not all(map(math.isfinite, box)):
                raise Invalid(f"Box {self.xyxy!r} of {self.label!r} must be four finite numbers x1, y1, x2, y2.")
            if box[2] <= box[0] or box[3] <= box[1]:
                raise Invalid(f"Box {box} of {self.label!r} has no area: x2 must exceed x1 and y2 must exceed y1.")
            object.__setattr__(self, "xyxy", box)
        if self.polygon is not None:
            points = tuple((float(x), float(y)) for x, y in self.polygon)
            if len(points) < 3 or not all(math.isfinite(value) for point in points for value in point):
                raise Invalid(f"Polygon of {self.label!r} must have at least three finite points.")
            object.__setattr__(self, "polygon", points)
        if self.confidence is not None and not 0 <= self.confidence <= 1:
            raise Invalid(f"Confidence {self.confidence!r} of {self.label!r} must lie in 0..1.")

    @property
    def is_machine(self) -> bool:
        """Drawn by a model and, as far as this record says, never touched by a person."""
        return self.source.startswith("model:") and "touched_by" not in self.attributes

    def to_json(self) -> dict[str, Any]:
        """Canonical form: coordinates at DECIMALS, confidence at 4 decimals, absent fields left out."""
        record: dict[str, Any] = {"id": self.id, "label": self.label, "source": self.source}
        if self.xyxy is not None:
            record["xyxy"] = [round(value, DECIMALS) for value in self.xyxy]
        if self.polygon is not None:
            record["polygon"] = [[round(x, DECIMALS), round(y, DECIMALS)] for x, y in self.polygon]
        if self.mask is not None:
            record["mask"] = self.mask
        if self.track_id is not None:
            record["track_id"] = self.track_id
        if self.confidence is not None:
            record["confidence"] = round(self.confidence, 4)
        if self.attributes:
            record["attributes"] = self.attributes
        return record

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Annotation:
        return cls(
            label=record["label"],
            xyxy=tuple(record["xyxy"]) if record.get("xyxy") is not None else None,
            polygon=tuple((x, y) for x, y in record["polygon"]) if record.get("polygon") is not None else None,
            mask=record.get("mask"),
            track_id=record.get("track_id"),
            attributes=dict(record.get("attributes") or {}),
            source=record["source"],
            confidence=record.get("confidence"),
            id=record["id"],
        )


def machine_annotation_id(run_id: str, frame: str, index: int) -> str:
    """The id of the index-th box a run draws on a frame: the same again when the run is repeated after a crash."""
    return hashlib.sha256(f"{run_id}\0{frame}\0{index}".encode()).hexdigest()[:32]


def is_same_drawing(one: Annotation, other: Annotation) -> bool:
    """Whether label and geometry agree within SAME_PX: what a person must change for the box to count as touched."""
    if one.label != other.label or one.mask != other.mask or (one.xyxy is None) != (other.xyxy is None):
        return False
    if (one.polygon is None) != (other.polygon is None):
        return False
    if one.xyxy is not None and any(abs(a - b) > SAME_PX for a, b in zip(one.xyxy, other.xyxy)):
        return False
    if one.polygon is not None:
        if len(one.polygon) != len(other.polygon):
            return False
        return all(abs(a - b) <= SAME_PX for p, q in zip(one.polygon, other.polygon) for a, b in zip(p, q))
    return True

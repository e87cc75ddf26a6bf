"""What label files say, before and after it is held against the picture it is about.

Every reader gives `Labels`; `place` turns one picture's part of them into annotations, by the same rules for all:

- a box or polygon that leaves the picture by at most ROUNDING_PX a side is cut to it without a word (tools round);
- one of which at least half lies inside is cut and gives a warning; any other is refused;
- a tag is about the whole picture and always fits;
- so is one with NaN or infinity, one without area, and one of an unknown label;
- a refused box is listed, and the picture goes on with its other boxes;
- labels that were made for a picture of another size are refused as a whole: they belong to another picture.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from workbench.annotation import DECIMALS, Annotation
from workbench.errors import Invalid
from workbench.taxonomy import Taxonomy

ROUNDING_PX = 1.0
MIN_INSIDE = 0.5  # share of a box's area that must lie in the picture


@dataclass(frozen=True)
class LabelBox:
    """One box, polygon or tag as a label file has it.

    values       x1, y1, x2, y2 in pixels, or, where `is_relative`, centre x, centre y, width, height in 0..1; None for a
                 polygon or a tag
    where        the file and the place in it, for messages: "labels/a.txt line 3"
    polygon      ((x, y), ...) in pixels, or in 0..1 where `is_relative`; with neither this nor values it is a tag
    """

    label: str
    values: tuple[float, float, float, float] | None
    where: str
    is_relative: bool = False
    attributes: Mapping[str, Any] = field(default_factory=dict)
    polygon: tuple[tuple[float, float], ...] | None = None


@dataclass(frozen=True)
class ImageLabels:
    """What label files say about one picture.

    boxes  boxes, polygons and tags; None: no label file mentions it (nobody looked); (): one does, and has none
    split  "train", "val", "test", or None when the format does not say
    size   (width, height) the labels were made for, or None when the format does not say
    where  the label file, for messages
    """

    boxes: tuple[LabelBox, ...] | None = None
    split: str | None = None
    size: tuple[int, int] | None = None
    where: str = ""


@dataclass
class Labels:
    """All that a format's label files say: `images` by the picture's path, and what could not be used, by name."""

    taxonomy: Taxonomy = Taxonomy(())
    images: dict[str, ImageLabels] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    warnings: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Placed:
    """Annotations that fit the picture (None: nobody looked), and what was refused or changed, by place."""

    annotations: tuple[Annotation, ...] | None
    refused: dict[str, str]
    warnings: dict[str, str]


def place(labels: ImageLabels, name: str, size: tuple[int, int], file_size: tuple[int, int], orientation: int,
          source: str) -> Placed:
    """One picture's labels as annotations of the upright picture.

    name         the frame's name; with index, label and box it gives each annotation's id, so that the same labels
                 uploaded again are the same content
    size         (width, height) upright; file_size before it was turned; orientation: its EXIF orientation
    source       who drew them, "human:<who>"
    """
    if labels.boxes is None:
        return Placed(None, {}, {})
    refused, warnings, annotations = {}, {}, []
    turned = labels.size == file_size != size
    if labels.size not in (None, size) and not turned:
        claimed, real = (f"{one[0]} x {one[1]}" for one in (labels.size, size))
        return Placed(None, {f"{labels.where} ({name})": f"its labels are for a picture of {claimed} pixels, the file "
                             f"has {real}; they are left out, the picture is taken without labels."}, {})
    seen = set()
    for index, box in enumerate(labels.boxes):
        try:
            fit = _fit if box.polygon is None else _fit_polygon
            xyxy, polygon, warning = fit(box, size, file_size, orientation if turned else 1)
        except Invalid as error:
            refused[box.where] = str(error)
            continue
        if (box.label, xyxy, polygon) in seen:
            kind = "polygon" if polygon else "box" if xyxy else "tag"
            warnings[box.where] = f"repeats a {kind} of {box.label!r}; it is taken once."
            continue
        seen.add((box.label, xyxy, polygon))
        if warning:
            warnings[box.where] = warning
        annotations.append(Annotation(label=box.label, xyxy=xyxy, polygon=polygon, attributes=dict(box.attributes),
                                      source=source, id=_id(name, index, box.label, xyxy, polygon)))
    return Placed(tuple(annotations), refused, warnings)


def number(value: object) -> float:
    """A JSON or text value as a float, NaN where it is none: `place` then refuses the box by its place."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def usable_label(name: object) -> str | None:
    """The label without blanks at its ends, or None when no taxonomy can hold it."""
    try:
        return Taxonomy((str(name).strip(),)).labels[0] if isinstance(name, (str, int, float)) else None
    except Invalid:
        return None


Fitted = tuple[tuple[float, ...] | None, tuple[tuple[float, float], ...] | None, str]


def _fit(box: LabelBox, size: tuple[int, int], file_size: tuple[int, int], orientation: int) -> Fitted:
    """The box in the upright picture, cut to it at DECIMALS, no polygon, and a warning or ""; no box for a tag. Raises
    Invalid with the reason."""
    if box.values is None:
        return None, None, ""
    values = box.values
    if not all(map(math.isfinite, values)):
        raise Invalid(f"the box of {box.label!r} has a value that is not a finite number; the box is left out.")
    if box.is_relative:
        x, y, w, h = values
        values = ((x - w / 2) * size[0], (y - h / 2) * size[1], (x + w / 2) * size[0], (y + h / 2) * size[1])
    x1, y1, x2, y2 = _turn(values, file_size, orientation)
    shown = ", ".join(f"{value:g}" for value in (x1, y1, x2, y2))
    area = (x2 - x1) * (y2 - y1)
    if x2 <= x1 or y2 <= y1 or area == 0:
        raise Invalid(f"the box ({shown}) of {box.label!r} has no area: its right and bottom must lie beyond its left "
                      "and top; the box is left out.")
    width, height = size
    inside = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
    share = max(inside[2] - inside[0], 0) * max(inside[3] - inside[1], 0) / area
    out = max(-x1, -y1, x2 - width, y2 - height)
    cut = tuple(round(value, DECIMALS) for value in inside)
    if share == 0 or (share < MIN_INSIDE and out > ROUNDING_PX):
        raise Invalid(f"the box ({shown}) of {box.label!r} lies {1 - share:.0%} outside the picture of {width} x "
                      f"{height} pixels; the box is left out.")
    if cut[2] <= cut[0] or cut[3] <= cut[1]:
        raise Invalid(f"the box ({shown}) of {box.label!r} is less than a hundredth of a pixel wide; the box is left "
                      "out.")
    if out > ROUNDING_PX:
        return cut, None, (f"the box ({shown}) of {box.label!r} leaves the picture of {width} x {height} pixels by "
                           f"{out:.1f}; it was cut to it.")
    return cut, None, ""


def _fit_polygon(box: LabelBox, size: tuple[int, int], file_size: tuple[int, int], orientation: int) -> Fitted:
    """The box around the polygon in the upright picture, the polygon cut to it at DECIMALS, and a warning or ""."""
    if not all(math.isfinite(value) for point in box.polygon for value in point):
        raise Invalid(f"the polygon of {box.label!r} has a value that is not a finite number; it is left out.")
    gain = size if box.is_relative else (1, 1)
    points = [_turn((x * gain[0], y * gain[1]) * 2, file_size, orientation)[:2] for x, y in box.polygon]
    area = polygon_area(points)
    if not area:
        raise Invalid(f"the polygon of {box.label!r} has no area: its {len(points)} points lie on one line; it is left "
                      "out.")
    out = max(max(-x, -y, x - size[0], y - size[1]) for x, y in points)
    inside = _cut_polygon(points, size) if out > 0 else points
    share = polygon_area(inside) / area
    if share == 0 or (share < MIN_INSIDE and out > ROUNDING_PX):
        raise Invalid(f"the polygon of {box.label!r} lies {1 - share:.0%} outside the picture of {size[0]} x {size[1]} "
                      "pixels; it is left out.")
    rounded = [(round(x, DECIMALS), round(y, DECIMALS)) for x, y in inside]
    polygon = tuple(point for at, point in enumerate(rounded) if point != rounded[at - 1])
    if not polygon_area(polygon):
        raise Invalid(f"the polygon of {box.label!r} is less than a hundredth of a pixel wide; it is left out.")
    xs, ys = zip(*polygon)
    warning = (f"the polygon of {box.label!r} leaves the picture of {size[0]} x {size[1]} pixels by {out:.1f}; it was "
               "cut to it.") if out > ROUNDING_PX else ""
    return (min(xs), min(ys), max(xs), max(ys)), polygon, warning


def polygon_area(points: Sequence[tuple[float, float]]) -> float:
    """In square pixels, by the shoelace formula; of a ring with holes joined into it without the holes."""
    return abs(sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in zip(points, [*points[1:], *points[:1]]))) / 2


def _cut_polygon(points: Sequence[tuple[float, float]], size: tuple[int, int]) -> list[tuple[float, float]]:
    """What of a polygon lies in the picture (Sutherland and Hodgman, Reentrant polygon clipping, 1974)."""
    for axis in (0, 1):
        for side, sign in ((0.0, 1), (float(size[axis]), -1)):
            cut: list[tuple[float, float]] = []
            for one, other in zip([*points[-1:], *points[:-1]], points):
                before, after = sign * (one[axis] - side), sign * (other[axis] - side)
                if (before < 0) != (after < 0):
                    share = before / (before - after)
                    crossing = [a + share * (b - a) for a, b in zip(one, other)]
                    crossing[axis] = side
                    cut.append(tuple(crossing))
                if after >= 0:
                    cut.append(other)
            points = cut
    return list(points)


def _turn(xyxy: tuple[float, ...], size: tuple[int, int], orientation: int) -> tuple[float, float, float, float]:
    """A box drawn on the file's own pixels, in the upright picture (EXIF 2.32, 4.6.4, tag 274)."""
    (x1, y1, x2, y2), (w, h) = xyxy, size
    return {
        1: (x1, y1, x2, y2), 2: (w - x2, y1, w - x1, y2),
        3: (w - x2, h - y2, w - x1, h - y1), 4: (x1, h - y2, x2, h - y1),
        5: (y1, x1, y2, x2), 6: (h - y2, x1, h - y1, x2),
        7: (h - y2, w - x2, h - y1, w - x1), 8: (y1, w - x2, y2, w - x1),
    }[orientation]


def _id(name: str, index: int, label: str, xyxy: tuple[float, ...] | None,
        polygon: tuple[tuple[float, float], ...] | None) -> str:
    values = [value for point in polygon for value in point] if polygon else xyxy or ()
    box = ",".join(f"{value:.{DECIMALS}f}" for value in values)
    return hashlib.sha256(f"upload\0{name}\0{index}\0{label}\0{box}".encode()).hexdigest()[:32]

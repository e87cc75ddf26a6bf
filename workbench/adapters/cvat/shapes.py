"""An annotation as CVAT keeps it, and back.

Every label of our projects has type "any" and five text attributes: `wb_id` our id, `wb_source` the model's version or
the person, `wb_score` the confidence, `wb_run` the run's id, `wb_details` the rest as JSON. They survive the editor, an
export, and a server that keeps no score. CVAT's own `source` and `score` are set beside them for its pages and filters.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from workbench.adapters.cvat import masks
from workbench.annotation import DECIMALS, Annotation
from workbench.dataset import Frame
from workbench.errors import Invalid
from workbench.run import NO_LABEL

ATTRIBUTES = ("wb_id", "wb_source", "wb_score", "wb_run", "wb_details")
VALUE = 4096  # characters an attribute holds (AttributeVal of CVAT's OpenAPI file)
LABEL = 64  # characters a label's name holds (Label of CVAT's OpenAPI file)
EDGE_PX = 0.5  # how far a box may leave its frame, as workbench.dataset.Manifest allows
ELLIPSE_POINTS = 36


@dataclass(frozen=True)
class Labels:
    """The labels of a project: name -> CVAT's id, and per label id the attribute's name -> id."""

    ids: dict[str, int]
    specs: dict[int, dict[str, int]]

    @classmethod
    def read(cls, records: Iterable[dict[str, Any]]) -> Labels:
        own = [one for one in sorted(records, key=lambda one: one["id"]) if not one.get("has_parent")]
        return cls({one["name"]: one["id"] for one in own},
                   {one["id"]: {each["name"]: each["id"] for each in one.get("attributes") or ()} for one in own})

    @property
    def names(self) -> dict[int, str]:
        return {number: name for name, number in self.ids.items()}


@dataclass(frozen=True)
class Drawn:
    """What stands on a frame in CVAT. copies: shapes that repeat another one exactly, left by an interrupted write."""

    annotations: dict[str, Annotation]
    records: dict[str, dict[str, Any]]
    copies: tuple[dict[str, Any], ...] = ()


def label_spec(name: str) -> dict[str, Any]:
    """A label as it is sent. Raises Invalid for a name that CVAT cannot hold."""
    if len(name) > LABEL:
        raise Invalid(f"Label {name!r} has {len(name)} characters; CVAT keeps {LABEL}. Shorten it.")
    return {"name": name, "type": "any", "attributes": attribute_specs()}


def attribute_specs() -> list[dict[str, Any]]:
    return [{"name": name, "mutable": False, "input_type": "text", "values": [""], "default_value": ""}
            for name in ATTRIBUTES]


def to_record(annotation: Annotation, frame: Frame, number: int, labels: Labels) -> dict[str, Any]:
    """CVAT's shape, or tag (without "type"), of one annotation; `number` is the frame's number in its task.

    Attributes without a value are left out: each costs CVAT a row, and it reads back as the default, which is "".
    Raises Invalid for what CVAT cannot keep: a label the project lacks, a box outside the frame, attributes that are
    not JSON or too long.
    """
    if annotation.label not in labels.ids:
        what = "a box without a label" if annotation.label == NO_LABEL else f"label {annotation.label!r}"
        raise Invalid(f"{frame.name!r} has {what}; the CVAT project knows {', '.join(labels.ids) or 'none'}. Add the "
                      "label to the data set, or choose another one.")
    label_id = labels.ids[annotation.label]
    specs, values = labels.specs[label_id], _values(annotation, frame)
    attributes = [{"spec_id": specs[name], "value": value} for name, value in values.items() if name in specs and value]
    record = {"label_id": label_id, "frame": number, "group": 0, "attributes": attributes,
              "source": "auto" if annotation.is_machine else "manual"}
    points = _points(annotation, frame)
    if points is None:
        return record
    kind, numbers = points
    # CVAT's own score is never absent: a person's drawing has 1.
    score = 1.0 if annotation.confidence is None else round(annotation.confidence, 4)
    return {**record, "type": kind, "points": numbers, "score": score, "occluded": False, "outside": False,
            "z_order": 0, "rotation": 0.0, "elements": []}


def drawn(records: Iterable[tuple[str, dict[str, Any]]], frame: Frame, labels: Labels, known: set[str]) -> Drawn:
    """What stands on a frame, by our id.

    records  ("shapes" or "tags", CVAT's record) of the frame
    known    our ids that were ever written to this frame

    A record without our id was drawn by a person just now; so was one whose id is not of this frame, or stands on it
    twice: CVAT's copy, paste and propagate take the attributes along. It gets an id from CVAT's number of it, the same
    on every read. Drawings that no annotation can hold (points, polylines, cuboids, skeletons, what lies wholly outside
    the frame) are left out here and never touched there.
    """
    annotations: dict[str, Annotation] = {}
    kept: dict[str, dict[str, Any]] = {}
    copies = []
    for kind, record in sorted(records, key=lambda one: (one[0], one[1]["id"])):
        values = _read_values(record, labels)
        geometry = _geometry(kind, record, frame, values)
        if geometry is None or record["label_id"] not in labels.names:
            continue
        own, drawn_id = values["wb_id"], drawn_in_cvat(kind, record["id"])
        if own in annotations and _annotation(own, record, geometry, labels, values) == annotations[own]:
            copies.append({**record, "kind": kind})
            continue
        is_ours = bool(own) and own not in annotations and (own in known or own == drawn_id)
        annotation = _annotation(own, record, geometry, labels, values) if is_ours else _by_a_person(
            drawn_id, record, geometry, labels)
        annotations[annotation.id] = annotation
        kept[annotation.id] = {**record, "kind": kind}
    return Drawn(annotations, kept, tuple(copies))


def drawn_in_cvat(kind: str, number: int) -> str:
    """Our id of what somebody drew in CVAT, from CVAT's number of it."""
    return hashlib.sha256(f"cvat\0{kind}\0{number}".encode()).hexdigest()[:32]


def _values(annotation: Annotation, frame: Frame) -> dict[str, str]:
    """Attribute name -> text."""
    rest = dict(annotation.attributes)
    run = rest.pop("run_id", "") if isinstance(rest.get("run_id"), str) else ""
    details: dict[str, Any] = {"attributes": rest} if rest else {}
    if annotation.track_id is not None:
        details["track_id"] = annotation.track_id
    if annotation.xyxy is not None and (annotation.polygon is not None or annotation.mask is not None):
        # The box beside a polygon or mask, and the drawing it belongs to: a person who changes that knows of no box.
        details["xyxy"] = [round(value, DECIMALS) for value in annotation.xyxy]
        details["of"] = _digest(annotation)
    try:
        text = json.dumps(details, allow_nan=False) if details else ""
    except (TypeError, ValueError) as error:
        raise Invalid(f"{frame.name!r}: attributes of {annotation.label!r} are not JSON ({error}).") from error
    score = "" if annotation.confidence is None else str(round(annotation.confidence, 4))
    found = dict(zip(ATTRIBUTES, (annotation.id, _text(annotation.source), score, _text(run), text)))
    for name, value in found.items():
        if len(value) > VALUE:
            raise Invalid(f"{frame.name!r}: {name} of {annotation.label!r} has {len(value)} characters; CVAT keeps "
                          f"{VALUE} of an attribute. Shorten the annotation's attributes.")
    return found


def _text(value: str) -> str:
    """CVAT cuts blanks off both ends of a text, so such a one travels as JSON."""
    return json.dumps(value) if value != value.strip() or value.startswith('"') else value


def _read_values(record: dict[str, Any], labels: Labels) -> dict[str, str]:
    names = {number: name for name, number in labels.specs.get(record["label_id"], {}).items()}
    given = {names.get(each["spec_id"]): each["value"] for each in record.get("attributes") or ()}
    return {name: given.get(name) or "" for name in ATTRIBUTES}


def _points(annotation: Annotation, frame: Frame) -> tuple[str, list[float]] | None:
    """(CVAT's type, points), None for a tag."""
    if annotation.mask is not None:
        if list(annotation.mask.get("size", ())) != [frame.height, frame.width]:
            raise Invalid(f"{frame.name!r}: a mask of {annotation.label!r} has size {annotation.mask.get('size')}, the "
                          f"frame [{frame.height}, {frame.width}]. Make the mask as large as its frame.")
        return "mask", masks.to_points(annotation.mask)
    if annotation.polygon is not None:
        return "polygon", [round(value, DECIMALS) for point in annotation.polygon for value in point]
    if annotation.xyxy is None:
        return None
    x1, y1, x2, y2 = box = [round(value, DECIMALS) for value in annotation.xyxy]
    is_inside = min(x1, y1) >= -EDGE_PX and x2 <= frame.width + EDGE_PX and y2 <= frame.height + EDGE_PX
    if not is_inside or x2 <= x1 or y2 <= y1:
        raise Invalid(f"{frame.name!r}: box {annotation.xyxy} of {annotation.label!r} leaves the frame ({frame.width} "
                      f"x {frame.height}) or is too small to be seen. Cut it to the frame first.")
    return "rectangle", box


def _geometry(kind: str, record: dict[str, Any], frame: Frame, values: dict[str, str]) -> dict[str, Any] | None:
    """The geometry fields of an annotation; None for what none can hold or nobody can see."""
    if kind == "tags":
        return {}
    points = record.get("points") or []
    if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in points):
        raise Invalid(f"{frame.name!r} holds a drawing with coordinates {points!r}. Delete it in CVAT.")
    if record["type"] == "rectangle" and not record.get("rotation"):
        x1, x2 = sorted((points[0], points[2]))
        y1, y2 = sorted((points[1], points[3]))
        box = tuple(round(value, 6) for value in _cut((x1, y1, x2, y2), frame))
        x1, y1, x2, y2 = (round(value, DECIMALS) for value in box)
        has_area = x2 > x1 and y2 > y1
        return {"xyxy": box} if has_area else None
    if record["type"] == "mask":
        mask = masks.to_coco(points, frame.width, frame.height)
        return None if mask is None else _with_box({"mask": mask}, values)
    outline = _outline(record["type"], points, record.get("rotation") or 0.0)
    if len(outline) < 3:
        return None
    cut = [_cut(point, frame) for point in outline]
    xs, ys = zip(*cut)
    if max(xs) <= min(xs) or max(ys) <= min(ys):
        return None
    return _with_box({"polygon": tuple(cut)}, values)


def _with_box(geometry: dict[str, Any], values: dict[str, str]) -> dict[str, Any]:
    """Adds the box that was written beside a polygon or mask, or the one around it when it was changed since."""
    details = _details(values)
    if "xyxy" not in details:
        return geometry
    if details.get("of") == _digest(Annotation("any", **geometry)):
        return {**geometry, "xyxy": tuple(details["xyxy"])}
    if "mask" in geometry:
        return geometry
    xs, ys = zip(*geometry["polygon"])
    return {**geometry, "xyxy": (min(xs), min(ys), max(xs), max(ys))}


def _outline(kind: str, points: list[float], rotation: float) -> list[tuple[float, float]]:
    """Polygons as they are; turned rectangles and ellipses (centre, right edge, top edge) as polygons; else nothing."""
    if kind == "polygon":
        return list(zip(points[0::2], points[1::2]))
    if kind == "rectangle":
        x1, y1, x2, y2 = points
        corners, centre = [(x1, y1), (x2, y1), (x2, y2), (x1, y2)], ((x1 + x2) / 2, (y1 + y2) / 2)
    elif kind == "ellipse":
        x, y, right, top = points
        steps = [2 * math.pi * step / ELLIPSE_POINTS for step in range(ELLIPSE_POINTS)]
        corners, centre = [(x + (right - x) * math.cos(a), y + (y - top) * math.sin(a)) for a in steps], (x, y)
    else:
        return []
    sine, cosine = math.sin(math.radians(rotation)), math.cos(math.radians(rotation))
    return [(round(centre[0] + (x - centre[0]) * cosine - (y - centre[1]) * sine, DECIMALS),
             round(centre[1] + (x - centre[0]) * sine + (y - centre[1]) * cosine, DECIMALS)) for x, y in corners]


def _cut(values: tuple[float, ...], frame: Frame) -> tuple[float, ...]:
    """Pixels x, y, x, y ..., cut to the frame when one leaves it by more than a published box may."""
    sides = [(frame.width, frame.height)[index % 2] for index in range(len(values))]
    if any(not -EDGE_PX <= value <= side + EDGE_PX for value, side in zip(values, sides)):
        values = tuple(min(max(value, 0.0), float(side)) for value, side in zip(values, sides))
    return values


def _annotation(own: str, record: dict[str, Any], geometry: dict[str, Any], labels: Labels,
                values: dict[str, str]) -> Annotation:
    details = _details(values)
    attributes = dict(details.get("attributes") or {})
    if values["wb_run"]:
        attributes["run_id"] = _plain(values["wb_run"])
    by_hand = _by_a_person(own, record, geometry, labels)
    try:
        return replace(by_hand, source=_plain(values["wb_source"]) or by_hand.source, attributes=attributes,
                       confidence=float(values["wb_score"]) if values["wb_score"] else None,
                       track_id=details.get("track_id"))
    except (Invalid, ValueError):
        # Somebody typed over our attributes in CVAT: the drawing stays, who made it is not known any more.
        return by_hand


def _by_a_person(drawn_id: str, record: dict[str, Any], geometry: dict[str, Any], labels: Labels) -> Annotation:
    """What CVAT alone says. A drawing by CVAT's own automatic annotation counts as work that no run of ours made."""
    is_machine = record.get("source") == "auto" and not any(each["value"] for each in record.get("attributes") or ())
    return Annotation(labels.names[record["label_id"]], **geometry, id=drawn_id,
                      source="model:cvat@unknown" if is_machine else "human:unknown",
                      confidence=record.get("score") if is_machine else None)


def _plain(text: str) -> str:
    if text.startswith('"'):
        try:
            return str(json.loads(text))
        except ValueError:
            return text
    return text


def _details(values: dict[str, str]) -> dict[str, Any]:
    try:
        found = json.loads(values["wb_details"]) if values["wb_details"] else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _digest(annotation: Annotation) -> str:
    text = json.dumps([annotation.mask, [[round(v, DECIMALS) for v in point] for point in annotation.polygon or ()]])
    return hashlib.sha256(text.encode()).hexdigest()[:16]

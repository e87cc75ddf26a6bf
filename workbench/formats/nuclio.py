"""CVAT's serverless functions, as the Nuclio dashboard describes them and as they answer.

The keys are those of the recorded traffic of CVAT 2.73 (g_nuclio_side): a function object without metadata.annotations,
spec.description or status makes CVAT's whole list fail for everybody.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

from workbench.annotation import DECIMALS
from workbench.boxes import Detections, clip
from workbench.errors import Invalid
from workbench.model import ModelCard

DETECTOR, TRACKER = "detector", "tracker"
# What a model of each task can draw in CVAT; the first is the default.
DRAWS = {"boxes": ("rectangle",), "polygons": ("polygon", "mask"), "tags": ("tag",)}
# Nuclio's names are Kubernetes labels: 63 letters, digits and '-'. CVAT takes these and more.
NAME_LENGTH, DIGEST = 63, 6
# Text attributes that labels of our CVAT projects have: CVAT itself forgets a function's confidence.
ATTRIBUTES = ("wb_source", "wb_score")
# CVAT takes masks as one number a pixel: more than this in a frame are over a hundred megabytes of JSON.
MOST_MASK_PX = 50_000_000
# Parts of a pixel in cv2.fillPoly's coordinates: 2 ** SHIFT.
SHIFT = 4


@dataclass(frozen=True)
class Function:
    """A model version as CVAT knows it.

    kind     "detector" or "tracker"
    draws    of a detector: one of DRAWS of its card's task
    renames  the model's label -> the label in CVAT, where they differ
    """

    model: str
    kind: str = DETECTOR
    draws: str = ""
    renames: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in (DETECTOR, TRACKER):
            raise Invalid(f"A function's kind must be detector or tracker, got {self.kind!r}.")

    @property
    def name(self) -> str:
        """The same for the same model version and kind, always; another where two only look alike (a.b@1, a-b@1)."""
        digest = hashlib.sha256(f"{self.kind}:{self.model}".encode()).hexdigest()[:DIGEST]
        readable = re.sub(r"[^a-z0-9]+", "-", self.model.lower()).strip("-")
        tail = f"{'-tracker' * (self.kind == TRACKER)}-{digest}"
        return readable[: NAME_LENGTH - len(tail)].strip("-") + tail

    def check(self, card: ModelCard) -> None:
        """Raises Invalid when the model cannot be this function."""
        if self.kind == TRACKER and card.task == "tags":
            raise Invalid(f"{card.ref} tags whole pictures, so it follows nothing. Deploy it as a detector.")
        if self.kind == DETECTOR and self.draws not in DRAWS[card.task]:
            raise Invalid(f"{card.ref} draws {' or '.join(DRAWS[card.task])} in CVAT, not {self.draws!r}.")
        strange = sorted(set(self.renames) - set(card.labels.labels))
        if strange:
            raise Invalid(
                f"{card.ref} has no label {', '.join(map(repr, strange))}; it knows {', '.join(card.labels.labels)}."
            )

    def described(self, card: ModelCard, port: int) -> dict[str, Any]:
        """The function object of GET /api/functions. Raises Invalid when the model cannot be this function."""
        self.check(card)
        said = {
            "name": card.ref + " (tracker)" * (self.kind == TRACKER),
            "type": self.kind,
            "framework": "onnx",
            "version": "1",
        }
        if self.kind == TRACKER:
            said |= {"spec": "", "supported_shape_types": "rectangle"}
        else:
            names = dict.fromkeys(self.renames.get(label, label) for label in card.labels.labels)
            said["spec"] = json.dumps(
                [
                    {
                        "id": number,
                        "name": name,
                        "type": self.draws,
                        "attributes": [{"name": each, "input_type": "text", "values": []} for each in ATTRIBUTES],
                    }
                    for number, name in enumerate(names)
                ]
            )
        return {
            "metadata": {
                "name": self.name,
                "namespace": "nuclio",
                "labels": {"nuclio.io/project-name": "cvat"},
                "annotations": said,
            },
            "spec": {
                "description": card.description or f"{card.ref} of the workbench",
                "runtime": "python:3.11",
                "handler": "main:handler",
            },
            "status": {"state": "ready", "httpPort": port},
        }


def answer(function: Function, card: ModelCard, found: Detections, size: tuple[int, int]) -> list[dict[str, Any]]:
    """What a detector found, as CVAT takes it: numbers finite, rounded and inside the image of `size` (width, height),
    point counts right; what is nothing then is left out. Most confident first.

    Raises Invalid when its masks are more than CVAT can take in.
    """
    items, pixels = [], 0
    boxes = np.round(clip(found.xyxy, *size).astype(float), DECIMALS)
    for at in np.argsort(-found.confidence, kind="stable").tolist():
        label, score = card.labels.labels[found.class_id[at]], round(float(found.confidence[at]), 4)
        item: dict[str, Any] = {
            "label": function.renames.get(label, label),
            "type": function.draws,
            "confidence": score,
            "attributes": [
                {"name": name, "value": value}
                for name, value in zip(ATTRIBUTES, (card.source, f"{score:g}"), strict=True)
            ],
        }
        if function.draws == "rectangle":
            x1, y1, x2, y2 = boxes[at].tolist()
            if x1 >= x2 or y1 >= y2:
                continue
            item["points"] = [x1, y1, x2, y2]
        elif function.draws != "tag":
            polygon = _polygon(found, at, size)
            if polygon is None:
                continue
            item["points"] = polygon.ravel().tolist()
            if function.draws == "mask":
                mask = _mask(polygon, size)
                if mask is None:
                    continue
                item["mask"] = mask
                pixels += len(mask)
                if pixels > MOST_MASK_PX:
                    raise Invalid(
                        f"{card.ref} found masks of over {MOST_MASK_PX / 1e6:g} megapixels in one frame, more "
                        "than CVAT takes in. Deploy it with polygons, or raise the threshold."
                    )
        items.append(item)
    return items


def _polygon(found: Detections, at: int, size: tuple[int, int]) -> np.ndarray | None:
    """(k, 2) x, y inside the image, k >= 3; None when nothing is left of it."""
    if found.polygons is None:
        x1, y1, x2, y2 = found.xyxy[at]
        corners = np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)], float)
    else:
        corners = np.asarray(found.polygons[at], float)
    if not np.isfinite(corners).all():
        raise Invalid("A polygon holds a NaN or an infinity; the model's output is broken.")
    corners = np.round(np.clip(corners, 0, size), DECIMALS)
    corners = corners[(corners != np.roll(corners, 1, axis=0)).any(axis=1)]
    return corners if len(corners) >= 3 and cv2.contourArea(corners.astype(np.float32)) > 0 else None


def _mask(polygon: np.ndarray, size: tuple[int, int]) -> list[int] | None:
    """0 or 1 for each pixel of the bounding box, row by row, then its left, top, right and bottom pixel (inclusive)."""
    x1, y1 = np.floor(polygon.min(axis=0)).astype(int)
    x2, y2 = np.minimum(np.ceil(polygon.max(axis=0)).astype(int), size)
    inside = np.zeros((y2 - y1, x2 - x1), np.uint8)
    # A pixel's middle is half a pixel right of and below its corner.
    middles = np.round((polygon - (x1 + 0.5, y1 + 0.5)) * 2**SHIFT).astype(np.int32)
    cv2.fillPoly(inside, [middles], 1, shift=SHIFT)
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    if not len(rows):
        return None
    top, bottom, left, right = rows[0], rows[-1], columns[0], columns[-1]
    cropped = inside[top : bottom + 1, left : right + 1]
    return [*cropped.ravel().tolist(), *(int(one) for one in (x1 + left, y1 + top, x1 + right, y1 + bottom))]

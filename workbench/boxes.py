"""Boxes as numpy arrays, and Detections: what a detector says about one frame."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from workbench.errors import Invalid


@dataclass(frozen=True)
class Detections:
    """Parallel arrays for one frame, in the frame's own pixels.

    xyxy        (n, 4) float32
    class_id    (n,) int32, an index into the model's taxonomy
    confidence  (n,) float32 in 0..1
    masks       (n, H, W) bool, or None
    polygons    n arrays (k, 2) of x, y: the outline of each, from a model that makes masks; or None

    Raises Invalid when shapes disagree or a value is NaN or infinite.
    """

    xyxy: np.ndarray
    class_id: np.ndarray
    confidence: np.ndarray
    masks: np.ndarray | None = None
    polygons: tuple[np.ndarray, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "xyxy", np.asarray(self.xyxy, np.float32))
        object.__setattr__(self, "class_id", np.asarray(self.class_id, np.int32))
        object.__setattr__(self, "confidence", np.asarray(self.confidence, np.float32))
        if self.xyxy.ndim != 2 or self.xyxy.shape[1] != 4:
            raise Invalid(f"xyxy must have shape (n, 4), got {self.xyxy.shape}")
        n = len(self.xyxy)
        if self.class_id.shape != (n,) or self.confidence.shape != (n,):
            raise Invalid(f"class_id {self.class_id.shape} and confidence {self.confidence.shape} must have shape ({n},)")
        if self.polygons is not None and len(self.polygons) != n:
            raise Invalid(f"There must be one polygon for each of {n} boxes, got {len(self.polygons)}.")
        if not np.isfinite(self.xyxy).all() or not np.isfinite(self.confidence).all():
            raise Invalid("Detections hold a NaN or an infinity; the model's output is broken.")

    def __len__(self) -> int:
        return len(self.xyxy)

    def __getitem__(self, index: np.ndarray | slice) -> Detections:
        masks = None if self.masks is None else self.masks[index]
        polygons = self.polygons
        if polygons is not None:
            polygons = tuple(polygons[at] for at in np.atleast_1d(np.arange(len(self))[index]))
        return Detections(self.xyxy[index], self.class_id[index], self.confidence[index], masks, polygons)

    @classmethod
    def empty(cls) -> Detections:
        return cls(np.zeros((0, 4)), np.zeros(0), np.zeros(0))


def xywh_to_xyxy(boxes: np.ndarray) -> np.ndarray:
    """(n, 4) x, y of the top left corner, width, height -> (n, 4) x1, y1, x2, y2."""
    boxes = np.asarray(boxes, float).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def xyxy_to_xywh(boxes: np.ndarray) -> np.ndarray:
    boxes = np.asarray(boxes, float).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def cxcywh_to_xyxy(boxes: np.ndarray) -> np.ndarray:
    """(n, 4) centre x, centre y, width, height -> (n, 4) x1, y1, x2, y2."""
    boxes = np.asarray(boxes, float).reshape(-1, 4)
    half = boxes[:, 2:] / 2
    return np.concatenate([boxes[:, :2] - half, boxes[:, :2] + half], axis=1)


def clip(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    """(n, 4) xyxy cut to the frame."""
    return np.clip(np.asarray(boxes).reshape(-1, 4), 0, [width, height, width, height])


def iou(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Intersection over union of every pair: (n, 4) and (m, 4) xyxy -> (n, m), 0 where the union is empty."""
    one, other = np.asarray(one, float).reshape(-1, 4), np.asarray(other, float).reshape(-1, 4)
    top_left = np.maximum(one[:, None, :2], other[None, :, :2])
    bottom_right = np.minimum(one[:, None, 2:], other[None, :, 2:])
    overlap = np.clip(bottom_right - top_left, 0, None).prod(axis=2)
    area_one = (one[:, 2:] - one[:, :2]).prod(axis=1)
    area_other = (other[:, 2:] - other[:, :2]).prod(axis=1)
    union = area_one[:, None] + area_other[None, :] - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)

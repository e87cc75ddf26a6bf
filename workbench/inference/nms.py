"""Non-maximum suppression inside each class."""

from __future__ import annotations

import cv2
import numpy as np

# More candidates than this add nothing but time: torchvision's FCOS keeps 1,000 per level before NMS.
MAX_CANDIDATES = 1000
MAX_DETECTIONS = 300


def nms(
    boxes: np.ndarray, scores: np.ndarray, class_ids: np.ndarray, iou: float, max_detections: int = MAX_DETECTIONS
) -> np.ndarray:
    """Indices of the boxes that stay, highest score first: greedy, a box goes when a better one of its class overlaps
    it by more than `iou`.

    boxes (n, 4) xyxy, scores (n,), class_ids (n,).
    """
    if not len(boxes):
        return np.zeros(0, int)
    boxes = np.asarray(boxes, float)
    xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    # OpenCV drops scores <= its threshold, so the threshold lies below all of them.
    kept = cv2.dnn.NMSBoxesBatched(
        xywh, np.asarray(scores, np.float32), np.asarray(class_ids, np.int32), -1.0, float(iou)
    )
    return np.asarray(kept, int).reshape(-1)[:max_detections]


def best(scores: np.ndarray, least: np.ndarray, most: int = MAX_CANDIDATES) -> tuple[np.ndarray, np.ndarray]:
    """The (point, class_id) pairs of scores (A, C) above `least` (C,), at most `most` of them, best first.

    Equal scores keep the order of points and classes, so that the choice is the same on every run.
    """
    # One number for all, and one dimension, is several times as fast as a threshold of its own for every column.
    points, class_ids = np.divmod(np.flatnonzero(scores > least.min()), len(least))
    passes = scores[points, class_ids] > least[class_ids]
    points, class_ids = points[passes], class_ids[passes]
    order = np.argsort(-scores[points, class_ids], kind="stable")[:most]
    return points[order], class_ids[order]

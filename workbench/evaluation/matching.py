"""One-to-one matching of two sets of labelled boxes on one frame: what belongs together, at the least work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from workbench.annotation import Annotation
from workbench.boxes import iou

# Two boxes that overlap this much are about the same object (PASCAL VOC, Everingham et al., 2010, section 4.2).
SAME_OBJECT_IOU = 0.5


@dataclass(frozen=True)
class Pair:
    """The one-th box of the first set belongs to the other-th of the second."""

    one: int
    other: int
    iou: float
    is_same_label: bool


def box_of(annotation: Annotation) -> tuple[float, float, float, float] | None:
    """Its box, or the box around its polygon; None for a mask alone or a tag."""
    if annotation.xyxy is not None:
        return annotation.xyxy
    if annotation.polygon is not None:
        xs, ys = zip(*annotation.polygon)
        return min(xs), min(ys), max(xs), max(ys)
    return None


def match(one: np.ndarray, one_labels: Sequence[str], other: np.ndarray, other_labels: Sequence[str],
          good_iou: float = SAME_OBJECT_IOU) -> list[Pair]:
    """Pairs boxes (n, 4) with boxes (m, 4), both xyxy, at IoU >= SAME_OBJECT_IOU; sorted by `one`.

    Each pair is worth 2 when it is good (same label and IoU >= good_iou) and 1 otherwise; the pairing of the highest
    total worth is taken (Hungarian algorithm), among equals the one of same labels, then of the higher IoU.
    """
    from scipy.optimize import linear_sum_assignment

    if not len(one) or not len(other):
        return []
    overlap = iou(one, other)
    same = np.array(one_labels, object)[:, None] == np.array(other_labels, object)[None, :]
    worth = 1.0 + (same & (overlap >= good_iou))
    # All ties together stay below half a unit, so that they never outweigh the worth of one pair.
    ties = (2 * same + overlap) / (6 * (min(overlap.shape) + 1))
    value = np.where(overlap >= SAME_OBJECT_IOU, worth + ties, 0.0)
    rows, columns = linear_sum_assignment(value, maximize=True)
    return [Pair(int(row), int(column), float(overlap[row, column]), bool(same[row, column]))
            for row, column in zip(rows, columns) if value[row, column] > 0]

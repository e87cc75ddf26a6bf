"""Agreement of two sets of boxes on the same frames: two models with each other, or a model with the reviewers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from workbench.annotation import Annotation
from workbench.evaluation.matching import SAME_OBJECT_IOU, box_of, match


@dataclass(frozen=True)
class Agreement:
    """Counts of boxes (and boxes around polygons): both found the same thing, at IoU >= 0.5 and with the same label; or
    only one of the two did. mislabelled: pairs with two labels, which are in `only_first` and in `only_second`.

    precision, recall, accuracy  of the first against the second, as CVAT's quality report counts them: the share of the
                                 first's boxes that is right, of the second's that was found, and of all things (a
                                 mislabelled pair is one thing). None where there is nothing to divide by.
    """

    frames: int = 0
    both: int = 0
    only_first: int = 0
    only_second: int = 0
    mislabelled: int = 0

    @property
    def precision(self) -> float | None:
        return _share(self.both, self.both + self.only_first)

    @property
    def recall(self) -> float | None:
        return _share(self.both, self.both + self.only_second)

    @property
    def accuracy(self) -> float | None:
        return _share(self.both, self.both + self.only_first + self.only_second - self.mislabelled)

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(**{name: value + getattr(other, name) for name, value in asdict(self).items()})

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "precision": self.precision, "recall": self.recall, "accuracy": self.accuracy}


def agreement(first: Sequence[Annotation], second: Sequence[Annotation]) -> Agreement:
    """Of one frame. Tags and bare masks have no box and are not counted."""
    one, other = ([annotation for annotation in part if box_of(annotation) is not None] for part in (first, second))
    pairs = match(_boxes(one), [a.label for a in one], _boxes(other), [a.label for a in other], good_iou=SAME_OBJECT_IOU)
    both = sum(pair.is_same_label for pair in pairs)
    return Agreement(1, both, len(one) - both, len(other) - both, len(pairs) - both)


def agreements(first: Mapping[str, Sequence[Annotation]], second: Mapping[str, Sequence[Annotation]]) -> Agreement:
    """Over the frames that both know, by name."""
    return sum((agreement(first[name], second[name]) for name in first.keys() & second.keys()), Agreement())


def disagreement(first: Sequence[Annotation], second: Sequence[Annotation]) -> float:
    """0 where two models found the same boxes on a frame (or both none), 1 where they share none: the share of all
    their boxes without a partner, 1 - Dice."""
    counted = agreement(first, second)
    alone = counted.only_first + counted.only_second
    return alone / (alone + 2 * counted.both) if alone else 0.0


def _boxes(annotations: Sequence[Annotation]) -> np.ndarray:
    return np.array([box_of(a) for a in annotations], float).reshape(-1, 4)


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None

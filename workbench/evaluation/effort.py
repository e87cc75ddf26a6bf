"""Effort: how many boxes a person has to touch to turn what a machine proposed into the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from workbench.annotation import Annotation, is_same_drawing
from workbench.evaluation.matching import Pair, box_of, match

# From this IoU with the truth on, a reviewer leaves a box as it is: our definition, measured on nobody. On a cell of
# 100 px it is a shift of 8 px on both axes.
SAME_IOU = 0.7
THRESHOLDS = tuple(round(0.05 + 0.025 * step, 3) for step in range(38))  # 0.05 .. 0.975


@dataclass(frozen=True)
class Effort:
    """Boxes by what a reviewer does with them; each box counts once.

    boxes_total  boxes of the truth: what drawing from scratch would take
    untouched    proposals that stay: paired with a true box of the same label at IoU >= same_iou
    moved        same label, IoU from 0.5 up to same_iou: the reviewer pulls an edge
    relabelled   IoU >= 0.5 with a true box of another label (moved as well or not)
    deleted      proposals without a true box
    drawn        true boxes without a proposal
    """

    boxes_total: int = 0
    untouched: int = 0
    moved: int = 0
    relabelled: int = 0
    deleted: int = 0
    drawn: int = 0

    @property
    def touched(self) -> int:
        return self.moved + self.relabelled + self.deleted + self.drawn

    def __add__(self, other: Effort) -> Effort:
        return Effort(**{name: value + getattr(other, name) for name, value in asdict(self).items()})

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "touched": self.touched}


def effort(proposed: Mapping[str, Sequence[Annotation]] | Sequence[Annotation],
           truth: Mapping[str, Sequence[Annotation]] | Sequence[Annotation], same_iou: float = SAME_IOU) -> Effort:
    """The least effort that turns `proposed` into `truth`, for one frame or for {frame name: annotations}.

    Boxes are paired per frame so that the number of touched boxes is smallest (matching.match). A frame of the truth
    without a proposal counts as drawn from scratch; a proposal on a frame the truth does not know is not counted, for
    nobody knows what is right there. Only boxes (and boxes around polygons) count.
    """
    if isinstance(truth, Mapping):
        return sum((effort(proposed.get(name) or (), truth[name], same_iou) for name in truth), Effort())
    proposed, truth = _boxed(proposed), _boxed(truth)
    pairs = _pairs(proposed, truth, same_iou)
    untouched = sum(_is_untouched(pair, same_iou) for pair in pairs)
    relabelled = sum(not pair.is_same_label for pair in pairs)
    return Effort(boxes_total=len(truth), untouched=untouched, moved=len(pairs) - untouched - relabelled,
                  relabelled=relabelled, deleted=len(proposed) - len(pairs), drawn=len(truth) - len(pairs))


def least_effort(proposed: Mapping[str, Sequence[Annotation]], truth: Mapping[str, Sequence[Annotation]],
                 same_iou: float = SAME_IOU) -> tuple[float, Effort]:
    """The confidence from which on a model's boxes are worth proposing, and the effort that is left then.

    Of THRESHOLDS the one whose effort touches the fewest boxes, the middle one of equals, for a few frames tell no
    more. A useless model then proposes next to nothing and a person draws from scratch: on the frames it was chosen on
    a threshold never makes more work than no model.

    proposed  {frame name: boxes with their confidences}; truth likewise
    """
    def left(threshold: float) -> Effort:
        return effort({name: [a for a in boxes if (a.confidence or 0) >= threshold] for name, boxes in proposed.items()},
                      truth, same_iou)

    tried = {threshold: left(threshold) for threshold in THRESHOLDS}
    least = min(one.touched for one in tried.values())
    equals = [threshold for threshold, one in tried.items() if one.touched == least]
    best = equals[len(equals) // 2]
    return best, tried[best]


def corrected(proposed: Sequence[Annotation], truth: Sequence[Annotation], person: str,
              same_iou: float = SAME_IOU) -> tuple[Annotation, ...]:
    """What a reviewer with the truth in mind leaves on one frame, doing no more than `effort` counts.

    Boxes that need no touch stay exactly as they are; moved and relabelled ones keep their id, source and confidence,
    take label and geometry of the truth and say who touched them; wrong ones are gone; missing ones are new, drawn by
    the person. Where the truth and a touched box are the same drawing, nothing is written. Anything that has no box
    (a tag, a mask) stays.
    """
    boxed, wanted = _boxed(proposed), _boxed(truth)
    pairs = _pairs(boxed, wanted, same_iou)
    result = [annotation for annotation in proposed if box_of(annotation) is None]
    for pair in pairs:
        mine, right = boxed[pair.one], wanted[pair.other]
        if not _is_untouched(pair, same_iou):
            fixed = replace(mine, label=right.label, xyxy=right.xyxy, polygon=right.polygon, mask=right.mask)
            if not is_same_drawing(fixed, mine):
                mine = replace(fixed, attributes={**mine.attributes, "touched_by": f"human:{person}"})
        result.append(mine)
    paired = {pair.other for pair in pairs}
    result += [
        Annotation(
            right.label,
            xyxy=right.xyxy,
            polygon=right.polygon,
            mask=right.mask,
            source=f"human:{person}",
            attributes=dict(right.attributes),
        )
        for index, right in enumerate(wanted)
        if index not in paired
    ]
    return tuple(result)


def _boxed(annotations: Sequence[Annotation]) -> list[Annotation]:
    return [annotation for annotation in annotations if box_of(annotation) is not None]


def _pairs(proposed: list[Annotation], truth: list[Annotation], same_iou: float) -> list[Pair]:
    return match(
        np.array([box_of(a) for a in proposed], float).reshape(-1, 4),
        [a.label for a in proposed],
        np.array([box_of(a) for a in truth], float).reshape(-1, 4),
        [a.label for a in truth],
        good_iou=same_iou,
    )


def _is_untouched(pair: Pair, same_iou: float) -> bool:
    return pair.is_same_label and pair.iou >= same_iou

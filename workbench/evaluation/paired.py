"""Paired bootstrap: how far chance alone reaches in the difference of two models measured on the same frames."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from workbench.annotation import Annotation
from workbench.boxes import Detections, iou
from workbench.evaluation.matching import box_of
from workbench.taxonomy import Taxonomy

RESAMPLES = 300
# COCO's IoU thresholds, recall grid and most detections of a label on a frame (pycocotools, cocoeval.py, Params).
IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MOST = 100


def differences(truth: Mapping[str, Sequence[Annotation]], one: Mapping[str, Detections],
                other: Mapping[str, Detections], taxonomy: Taxonomy, seed: int = 0,
                ious: int = len(IOUS)) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(RESAMPLES,) differences `one` - `other` of mAP, and label -> the same of its AP, for labels the truth has.

    truth, one, other  frame name -> annotations; detections down to a low confidence, class_id indexes `taxonomy`
    ious               how many of IOUS count: all for mAP@[.5:.95], 1 for mAP@.5

    Each is over one draw of the frames with replacement, the same draws for both (paired bootstrap; Efron and
    Tibshirani, 1993, chapter 13). NaN where a draw has no frame with the label, for mAP: with any label.
    """
    figures = (box_figure(truth, boxes, taxonomy, ious) for boxes in (one, other))
    return drawn(*figures, len(truth), seed)


# (frames,) how often each frame is there -> the figure over them, and label -> its part; NaN where they do not tell.
Figure = Callable[[np.ndarray], tuple[float, dict[str, float]]]


def box_figure(truth: Mapping[str, Sequence[Annotation]], found: Mapping[str, Detections], taxonomy: Taxonomy,
               ious: int = len(IOUS)) -> Figure:
    """mAP over draws of the frames by name, and each label's AP, of the labels that the truth has; `found` and `ious`
    as `differences` takes them."""
    names = sorted(truth)
    made = {label: matches([truth[name] for name in names], [found.get(name) for name in names], label, class_id)
            for class_id, label in enumerate(taxonomy.labels)}
    there = {label: one for label, one in made.items() if one.truth.any()}
    return lambda weights: mean_and_parts({label: one.average_precision(weights, ious) for label, one in there.items()})


def drawn(one: Figure, other: Figure, frames: int, seed: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(RESAMPLES,) differences `one` - `other`, and label -> the same of its part, each over one draw of the frames with
    replacement, the same draws for both."""
    draws = np.random.default_rng(seed).multinomial(frames, np.full(frames, 1 / frames), RESAMPLES)
    pairs = [(one(draw), other(draw)) for draw in draws]
    overall = np.array([first[0] - second[0] for first, second in pairs])
    return overall, {label: np.array([first[1][label] - second[1][label] for first, second in pairs])
                     for label in pairs[0][0][1]}


def mean_and_parts(parts: dict[str, float]) -> tuple[float, dict[str, float]]:
    """The mean over labels; a draw without a label's frames says nothing about it, as in COCO's mean over labels."""
    known = [value for value in parts.values() if value == value]
    return (sum(known) / len(known) if known else float("nan")), parts


def interval(values: np.ndarray) -> list[float]:
    """[low, high]: the middle 95 % of the draws (percentile interval; Efron and Tibshirani, 1993, chapter 13)."""
    return [float(np.nanpercentile(values, share)) for share in (2.5, 97.5)]


@dataclass(frozen=True)
class Matches:
    """One label's detections over all frames, best first.

    frame  (n,) index of the frame;  hit, counts (10, n) bool per IoU threshold: is it a hit, does it count at all
    truth  (frames,) number of true boxes of the label
    """

    frame: np.ndarray
    hit: np.ndarray
    counts: np.ndarray
    truth: np.ndarray

    def average_precision(self, weights: np.ndarray, ious: int = len(IOUS)) -> float:
        """AP over the first `ious` thresholds (all: AP@[.5:.95], 1: AP@.5) when frame i is there weights[i] times; NaN
        when the label is on none of them."""
        positives = float(weights @ self.truth)
        if not positives:
            return float("nan")
        weight = weights[self.frame]
        hits = np.cumsum(self.hit[:ious] * weight, axis=1)
        seen = np.cumsum(self.counts[:ious] * weight, axis=1)
        precision = hits / np.maximum(seen, 1)
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        total = 0.0
        for recall, envelope in zip(hits / positives, precision):
            at = np.searchsorted(recall, RECALLS, side="left")
            total += float(envelope[at[at < len(envelope)]].sum())
        return total / (ious * len(RECALLS))


def matches(truth: Sequence[Sequence[Annotation]], found: Sequence[Detections | None], label: str,
             class_id: int) -> Matches:
    """Matches as COCO does (cocoeval.py, evaluateImg): best first, each to the free true box it overlaps most; what
    only lies on a crowd does not count."""
    frames, confidences, hits, counts, numbers = [], [], [], [], []
    for index, (annotations, given) in enumerate(zip(truth, found)):
        boxed = [(box_of(one), bool(one.attributes.get("iscrowd"))) for one in annotations
                 if one.label == label and box_of(one) is not None]
        true = np.array([box for box, is_crowd in boxed if not is_crowd], float).reshape(-1, 4)
        crowd = np.array([box for box, is_crowd in boxed if is_crowd], float).reshape(-1, 4)
        numbers.append(len(true))
        mine = np.nonzero(given.class_id == class_id)[0] if given is not None else []
        if not len(mine):
            continue
        mine = mine[np.argsort(-given.confidence[mine], kind="stable")][:MOST]
        boxes = given.xyxy[mine].astype(float)
        overlap = iou(boxes, true)
        on_crowd = _covered(boxes, crowd)
        taken = np.zeros((len(IOUS), len(true)), bool)
        # pycocotools compares with min(threshold, 1 - 1e-10), so an overlap of exactly the threshold matches.
        for row, inside in zip(overlap, on_crowd):
            free = np.where(~taken & (row[None] >= IOUS[:, None]), row[None], -1.0)
            target = free.argmax(axis=1) if len(true) else np.zeros(len(IOUS), int)
            is_hit = free[np.arange(len(IOUS)), target] >= 0 if len(true) else np.zeros(len(IOUS), bool)
            taken[np.nonzero(is_hit)[0], target[is_hit]] = True
            hits.append(is_hit)
            counts.append(is_hit | (inside < IOUS))
        frames += [index] * len(mine)
        confidences += given.confidence[mine].tolist()
    order = np.argsort(-np.array(confidences), kind="stable")
    hit = np.array(hits, bool).reshape(-1, len(IOUS)).T
    count = np.array(counts, bool).reshape(-1, len(IOUS)).T
    return Matches(np.array(frames, int)[order], hit[:, order], count[:, order], np.array(numbers))


def _covered(boxes: np.ndarray, crowds: np.ndarray) -> np.ndarray:
    """(n,) the largest share of each box's area that one crowd covers."""
    if not len(crowds):
        return np.zeros(len(boxes))
    sides = np.minimum(boxes[:, None, 2:], crowds[None, :, 2:]) - np.maximum(boxes[:, None, :2], crowds[None, :, :2])
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return (np.clip(sides, 0, None).prod(axis=2) / np.maximum(area, 1e-9)[:, None]).max(axis=1)

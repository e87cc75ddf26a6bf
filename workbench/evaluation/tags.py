"""Tags: how well a model says what a whole frame shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from workbench.annotation import Annotation
from workbench.boxes import Detections
from workbench.errors import Invalid
from workbench.evaluation.effort import THRESHOLDS
from workbench.evaluation.metrics import DEFAULT_CONFIDENCE
from workbench.taxonomy import Taxonomy

RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class TagMetrics:
    """What `score_tags` measured. Values lie in 0..1; means are over the labels that the truth has.

    accuracy      share of the tagged frames whose surest label is one of their tags (top-1 accuracy)
    macro_f1      mean F1 of the labels that are set
    map           mean over labels of the area below precision and recall, frames ranked by the label's confidence
    per_class     label -> {"f1", "precision", "recall", "ap", "accuracy": share of its frames that have it for their
                  surest label, "truth", "detections"}
    curves        label -> {"precision": 101 values at recall 0, 0.01 .. 1}
    confusion     (labels + 1) x (labels + 1) counts: rows are the truth, columns what is set, the last of both is
                  "none"; a missed and a spurious label of one frame, where each is the only one, are one confusion
    truth         number of tags; detections: of those set
    is_exclusive  the model sets its surest label and no other; else all labels at or above `confidence`
    """

    labels: tuple[str, ...]
    frames: int
    truth: int
    detections: int
    accuracy: float
    macro_f1: float
    map: float
    per_class: dict[str, dict[str, float]]
    curves: dict[str, dict[str, list[float]]]
    confusion: tuple[tuple[int, ...], ...]
    confidence: float
    is_exclusive: bool

    @property
    def values(self) -> dict[str, float]:
        """Metric -> value over all labels."""
        return {"accuracy": self.accuracy, "macro_f1": self.macro_f1, "map": self.map}

    def by_label(self, metric: str) -> dict[str, float]:
        """Label -> its part in one of `values`."""
        key = {"accuracy": "accuracy", "macro_f1": "f1", "map": "ap"}[metric]
        return {label: row[key] for label, row in self.per_class.items()}

    def logged(self) -> dict[str, float]:
        return {**self.values, **{f"f1/{label}": value for label, value in self.by_label("macro_f1").items()}}

    def is_shown(self, found: Detections) -> np.ndarray:
        """(n,) which of a frame's tags, surest first, are set."""
        if self.is_exclusive:
            return np.arange(len(found)) == found.confidence.argmax() if len(found) else np.zeros(0, bool)
        return found.confidence >= np.float32(self.confidence)

    def to_json(self) -> dict[str, Any]:
        return {"task": "tags", **asdict(self)}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> TagMetrics:
        return cls(**{**{name: value for name, value in record.items() if name != "task"},
                      "labels": tuple(record["labels"]), "confusion": tuple(map(tuple, record["confusion"]))})


def is_tag(annotation: Annotation) -> bool:
    return annotation.xyxy is None and annotation.polygon is None and annotation.mask is None


@dataclass(frozen=True)
class TagTable:
    """Frames (rows) and labels (columns): `truth` (n, C) whether a frame has the tag, `scores` (n, C) the model's
    confidence, 0 where it gives none, `is_set` (n, C) what it sets. Each figure is over frames that are there
    weights[i] times: (C,) a label, NaN where none of them has it."""

    truth: np.ndarray
    scores: np.ndarray
    is_set: np.ndarray

    def accuracy(self, weights: np.ndarray) -> float:
        hits = (self._surest & self.truth).any(axis=1)
        tagged = weights * self.truth.any(axis=1)
        return float(tagged @ hits / tagged.sum()) if tagged.sum() else float("nan")

    def accuracies(self, weights: np.ndarray) -> np.ndarray:
        return _share(weights @ (self._surest & self.truth), weights @ self.truth)

    def f1(self, weights: np.ndarray) -> np.ndarray:
        """2 hits / (truth + set)."""
        truth = weights @ self.truth
        both = np.where(truth > 0, truth + weights @ self.is_set, 0)
        return _share(2 * (weights @ (self.truth & self.is_set)), both)

    def average_precision(self, weights: np.ndarray) -> np.ndarray:
        """Sum of precision times what recall gains, threshold by threshold, without interpolation (Zhu, 2004, as
        scikit-learn's average_precision_score)."""
        return np.array([self._curve(label, weights)[0] for label in range(self.truth.shape[1])])

    def precision_at(self, label: int) -> list[float]:
        """At RECALLS, the best precision of any threshold that recalls so much."""
        _, recall, precision = self._curve(label, np.ones(len(self.truth)))
        best = np.maximum.accumulate(precision[::-1])[::-1]
        return best[np.minimum(np.searchsorted(recall, RECALLS - 1e-9), len(best) - 1)].tolist()

    @property
    def _surest(self) -> np.ndarray:
        best = np.zeros(self.scores.shape, bool)
        best[np.arange(len(best)), self.scores.argmax(axis=1)] = True
        return best & (self.scores > 0)

    def _curve(self, label: int, weights: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        order = np.argsort(-self.scores[:, label], kind="stable")
        scores, weight = self.scores[order, label], weights[order].astype(float)
        hits, seen = np.cumsum(weight * self.truth[order, label]), np.cumsum(weight)
        # A threshold takes all frames of that confidence, so only the last of equal ones counts.
        last = np.append(scores[1:] != scores[:-1], True) & (seen > 0)
        if not hits[-1]:
            return float("nan"), np.zeros(1), np.zeros(1)
        recall, precision = hits[last] / hits[-1], hits[last] / seen[last]
        return float(np.diff(recall, prepend=0) @ precision), recall, precision


def table(truth: Mapping[str, Sequence[Annotation]], found: Mapping[str, Detections], taxonomy: Taxonomy,
          confidence: float, is_exclusive: bool) -> TagTable:
    """Frames by name; what is no tag is left out. `found` has class ids of the taxonomy."""
    names = sorted(truth)
    wanted, scores = (np.zeros((len(names), len(taxonomy)), kind) for kind in (bool, np.float32))
    for row, name in enumerate(names):
        for annotation in truth[name]:
            if is_tag(annotation):
                wanted[row, taxonomy.class_id(annotation.label)] = True
        given = found.get(name)
        if given is not None:
            np.maximum.at(scores[row], given.class_id, given.confidence)
    made = TagTable(wanted, scores, scores >= np.float32(confidence))
    return TagTable(wanted, scores, made._surest) if is_exclusive else made


def score_tags(truth: Mapping[str, Sequence[Annotation]], found: Mapping[str, Detections], taxonomy: Taxonomy,
               confidence: float = DEFAULT_CONFIDENCE, is_exclusive: bool = True) -> TagMetrics:
    """Scores tags against the truth of the same frames.

    truth  frame name -> its annotations, () where somebody looked and set none; boxes, polygons and masks are left out
    found  frame name -> the confidence of every label, class_id indexes `taxonomy`; a frame without an entry has none

    Raises Invalid for a truth without any tag.
    """
    tags = table(truth, found, taxonomy, confidence, is_exclusive)
    if not tags.truth.any():
        raise Invalid(f"None of the {len(truth)} frames has a tag, so nothing can be scored. Tag some first.")
    every = np.ones(len(truth))
    f1, aps, accuracies = tags.f1(every), tags.average_precision(every), tags.accuracies(every)
    counts, drawn = tags.truth.sum(axis=0), tags.is_set.sum(axis=0)
    hits = (tags.truth & tags.is_set).sum(axis=0)
    there = [index for index in range(len(taxonomy)) if counts[index]]
    per_class = {taxonomy.labels[index]: {
        "f1": float(f1[index]), "precision": float(hits[index] / max(drawn[index], 1)),
        "recall": float(hits[index] / counts[index]), "ap": float(aps[index]), "accuracy": float(accuracies[index]),
        "truth": int(counts[index]), "detections": int(drawn[index])} for index in there}
    return TagMetrics(
        labels=taxonomy.labels, frames=len(truth), truth=int(counts.sum()), detections=int(drawn.sum()),
        accuracy=tags.accuracy(every), macro_f1=float(np.nanmean(f1)), map=float(np.nanmean(aps)), per_class=per_class,
        curves={taxonomy.labels[index]: {"precision": tags.precision_at(index)} for index in there},
        confusion=_confusion(tags), confidence=float(confidence), is_exclusive=is_exclusive)


def least_touched(tags: TagTable) -> tuple[float, int]:
    """(confidence, touches): from which confidence on a model's tags are worth proposing, and how many a person then
    sets, changes or removes. Of effort.THRESHOLDS the one with the fewest touches, the middle one of equals.

    A missed tag and a spurious one on the same frame are one touch, for one is changed into the other.
    """
    def touches(threshold: float) -> int:
        proposed = tags.is_set & (tags.scores >= np.float32(threshold))
        missed, spurious = ((one & ~other).sum(axis=1) for one, other in ((tags.truth, proposed), (proposed, tags.truth)))
        return int(np.maximum(missed, spurious).sum())

    tried = {threshold: touches(threshold) for threshold in THRESHOLDS}
    equals = [threshold for threshold, count in tried.items() if count == min(tried.values())]
    return equals[len(equals) // 2], min(tried.values())


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=np.asarray(whole) > 0)


def _confusion(tags: TagTable) -> tuple[tuple[int, ...], ...]:
    none = tags.truth.shape[1]
    counts = np.zeros((none + 1, none + 1), int)
    for wanted, given in zip(tags.truth, tags.is_set):
        both, missed, spurious = (np.nonzero(one)[0] for one in (wanted & given, wanted & ~given, given & ~wanted))
        counts[both, both] += 1
        if len(missed) == len(spurious) == 1:
            counts[missed, spurious] += 1
        else:
            counts[missed, none] += 1
            counts[none, spurious] += 1
    return tuple(map(tuple, counts.tolist()))

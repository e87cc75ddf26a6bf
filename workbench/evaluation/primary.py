"""The metrics that promotion may decide by: which task each is for, and each over any draw of the frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from workbench.annotation import Annotation
from workbench.boxes import Detections
from workbench.dataset import LabeledFrame
from workbench.evaluation.matching import box_of
from workbench.evaluation.metrics import Metrics
from workbench.evaluation.paired import IOUS, Figure, box_figure, mean_and_parts
from workbench.evaluation.regions import has_regions, pixels
from workbench.evaluation.tags import TagMetrics, is_tag, table
from workbench.taxonomy import Taxonomy

# Metric -> what a model must draw to have it. More of each is better. Polygons have boxes around them, too.
PRIMARY: Mapping[str, str] = {"map_50_95": "boxes", "map_50": "boxes", "miou": "polygons", "accuracy": "tags",
                              "macro_f1": "tags", "map": "tags"}
Scored = Metrics | TagMetrics


def scored_from(record: dict[str, Any]) -> Scored:
    """What `to_json` of either kind gave."""
    return (TagMetrics if record.get("task") == "tags" else Metrics).from_json(record)


def task_of(frames: Sequence[LabeledFrame]) -> str:
    """What people drew on frames, so what a model of theirs is to draw: "tags" where all are tags of whole frames,
    "polygons" where all have an outline, "boxes" else, also where nobody has drawn yet."""
    drawn = [one for frame in frames for one in frame.annotations or ()]
    if drawn and all(map(is_tag, drawn)):
        return "tags"
    return "polygons" if drawn and all(one.polygon is not None or one.mask is not None for one in drawn) else "boxes"


def default_metric(task: str, frames: Sequence[LabeledFrame]) -> str:
    """What decides between models of a task (families.TASKS) where nobody says: of tags accuracy, where no frame has
    several, else map; of polygons miou, where the truth has some; of all others map_50_95."""
    if task == "tags":
        several = any(sum(map(is_tag, one.annotations or ())) > 1 for one in frames)
        return "map" if several else "accuracy"
    return "miou" if task == "polygons" and any(has_regions(one.annotations) for one in frames) else "map_50_95"


def counts(metric: str, annotation: Annotation) -> bool:
    """Whether an annotation of the truth takes part in a metric."""
    return is_tag(annotation) if PRIMARY[metric] == "tags" else box_of(annotation) is not None


def figure(metric: str, frames: Sequence[LabeledFrame], found: Mapping[str, Detections], scored: Scored,
           taxonomy: Taxonomy) -> Figure:
    """One of PRIMARY over draws of `frames`, which go in the order of their names.

    found, scored  what the evaluation of the model gave: confidence and kind of tags are those it was scored with
    """
    frames = sorted(frames, key=lambda one: one.frame.name)
    truth = {one.frame.name: one.annotations or () for one in frames}
    if PRIMARY[metric] == "boxes":
        return box_figure(truth, found, taxonomy, 1 if metric == "map_50" else len(IOUS))
    if metric == "miou":
        counted = pixels(frames, found, taxonomy, scored.confidence)
        return lambda weights: mean_and_parts(_parts(counted.iou(weights), taxonomy))
    tags = table(truth, found, taxonomy, scored.confidence, scored.is_exclusive)
    if metric == "accuracy":
        return lambda weights: (tags.accuracy(weights), _parts(tags.accuracies(weights), taxonomy))
    each = tags.f1 if metric == "macro_f1" else tags.average_precision
    return lambda weights: mean_and_parts(_parts(each(weights), taxonomy))


def _parts(values: np.ndarray, taxonomy: Taxonomy) -> dict[str, float]:
    return dict(zip(taxonomy.labels, map(float, values)))

"""Student and teacher side by side: accuracy on the same frames, size, parameters, latency."""
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from distillation.teacher import Teacher
from training import plots
from training.coco import Data
from training.detection import coco_metrics, detect

# The student's figure, the teacher's is "teacher_" and the same; how it is called, and its unit.
FIGURES = (("map_50_95", "mAP@[.5:.95]", 1), ("parameter_count", "parameters, millions", 1e6), ("size_mb", "file, MB", 1),
           ("latency_ms", "a frame on this CPU, ms", 1))


def beside(teacher: Teacher, made: Any, data: Data, student: nn.Module) -> dict[str, Any]:
    """The teacher's figures, "teacher_map_50_95", "teacher_map_50" on the frames that the student is scored on (test, or
    val where there is no test), and "agreement_map_50": the student's mAP@.5 when the teacher's boxes, from the
    confidence of its best F1 on, are taken for the truth."""
    found = teacher.figures()
    samples = data.test or data.val
    if not samples:
        return found
    seen = [teacher.label(sample, data.labels) for sample in samples]
    metrics = coco_metrics(samples, seen, data.labels)
    least = metrics["best_f1_confidence"]
    truth = [dataclasses.replace(sample, boxes=boxes[scores >= least], class_ids=ids[scores >= least],
                                 crowds=np.zeros((scores >= least).sum(), bool))
             for sample, (boxes, scores, ids) in zip(samples, seen)]
    agreed = coco_metrics(truth, detect(student, made.decode, samples, made.images), data.labels)
    return {**found, "teacher_map_50_95": metrics["map_50_95"], "teacher_map_50": metrics["map_50"],
            "agreement_map_50": agreed["map_50"]}


def draw(file: Path, metrics: Mapping[str, Any]) -> None:
    """A panel a figure, with the teacher's bar beside the student's."""
    plots.bars(file, "Student and teacher", ("student", "teacher"), [
        (name, [metrics[key] / unit, metrics[f"teacher_{key}"] / unit]) for key, name, unit in FIGURES
        if key in metrics and f"teacher_{key}" in metrics])

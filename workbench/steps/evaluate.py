"""Evaluate: a model's score on one split of a published version, measured now by our own inference."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from workbench.annotation import DECIMALS
from workbench.blobs import Blobs
from workbench.boxes import Detections
from workbench.dataset import SPLITS, LabeledFrame, parse_ref
from workbench.errors import Invalid, WorkbenchError
from workbench.evaluation.metrics import DEFAULT_CONFIDENCE, score
from workbench.evaluation.primary import Scored, counts, default_metric
from workbench.evaluation.regions import has_regions, score_regions, with_outlines
from workbench.evaluation.tags import score_tags
from workbench.inference.detector import Detector, OpenBackend
from workbench.inference.families import settings
from workbench.inference.pipeline import detect_frames
from workbench.model import ModelCard
from workbench.ports import DatasetStore, Job, ModelStore, Tracker
from workbench.taxonomy import Taxonomy

# Average precision needs the unsure boxes too. 0.01 costs less than 0.001 mAP against 0 and keeps a frame's list short.
LEAST_CONFIDENCE = 0.01


@dataclass(frozen=True)
class Evaluation:
    """A model's score on a split.

    metrics           of boxes and polygons, or of tags
    found             frame name -> Detections down to `least_confidence`, class_id indexes metrics.labels; of tags every
                      label with its confidence
    unmatched_labels  the model's labels that the data set lacks: their boxes are not scored
    unreached_labels  the data set's labels that the model never gives: their AP is 0
    run_id            the tracker's run, "" without a tracker
    """

    model: str
    version: str
    digest: str
    split: str
    metrics: Scored
    found: dict[str, Detections]
    seconds: float
    backend: dict[str, str]
    least_confidence: float = LEAST_CONFIDENCE
    unmatched_labels: tuple[str, ...] = ()
    unreached_labels: tuple[str, ...] = ()
    run_id: str = ""

    def to_json(self, with_boxes: bool = True) -> dict[str, Any]:
        """Plain JSON; "found" has what the model draws at its operating point: frame name ->
        [[x1, y1, x2, y2, label, confidence], ...], of a polygon followed by [x1, y1, x2, y2, ...] of its corners."""
        record = {name: getattr(self, name) for name in ("model", "version", "digest", "split", "seconds", "backend",
                                                         "least_confidence", "run_id")}
        record |= {"metrics": self.metrics.to_json(), "unmatched_labels": list(self.unmatched_labels),
                   "unreached_labels": list(self.unreached_labels)}
        if with_boxes:
            record["found"] = {
                name: _rows(boxes[self.metrics.is_shown(boxes)], self.metrics.labels)
                for name, boxes in self.found.items()
            }
        return record


def evaluate(model: str, version: str, split: str, *, models: ModelStore, store: DatasetStore, blobs: Blobs,
             open_backend: OpenBackend, tracker: Tracker | None, job: Job) -> Evaluation:
    """Runs a model over the labelled frames of a split and scores it.

    model, version  references, student@3 and cells@1.0.0
    split           train, val or test
    tracker         keeps the result as a run of the experiment <data set>/evaluations; the same job again finds its
                    run. None: nothing is kept

    Frames nobody looked at take no part. A model that draws boxes is scored by its boxes (of the truth's polygons the
    box around them), one that draws polygons also pixel by pixel where the truth has polygons, one that sets tags by
    its tags. Raises Invalid when the split has nothing of that kind, a frame cannot be read (a score on fewer frames
    would be another score), or the model shares no label with the data set.
    """
    started = time.monotonic()
    card, folder = models.card(model), models.folder(model)
    frames, taxonomy = labelled_split(card, version, split, store)
    record, labels = store.version(version), card.labels.map_to(taxonomy)
    translate = class_ids(card.labels, labels, taxonomy)
    found: dict[str, Detections] = {}
    asked, least = telling_all(card)
    with Detector(asked, folder, open_backend, confidence=least, confidence_by_label={}) as detector:
        backend = vars(detector.report)
        stream = detect_frames(
            detector, ((one.frame.name, one.frame) for one in frames), lambda frame: blobs.get(frame.blob)
        )
        for name, detections in stream:
            job.check()
            if isinstance(detections, WorkbenchError):
                job.fail_item(name, str(detections))
                raise Invalid(f"{version} cannot be evaluated: {detections}") from detections
            found[name] = translated(detections, translate)
            job.progress(len(found), len(frames), f"{model} on {version}/{split}")
    metrics = scored(card, frames, found, taxonomy)
    evaluation = Evaluation(
        model,
        version,
        record.digest,
        split,
        metrics,
        found,
        round(time.monotonic() - started, 3),
        backend,
        unmatched_labels=labels.unmatched,
        unreached_labels=labels.unreached,
        least_confidence=least,
    )
    if tracker is None:
        return evaluation
    return _tracked(evaluation, tracker, job)


def labelled_split(card: ModelCard, version: str, split: str,
                   store: DatasetStore) -> tuple[tuple[LabeledFrame, ...], Taxonomy]:
    """The frames of a split that somebody looked at, masks as outlines, and the data set's labels.

    Raises Invalid for a split that does not exist or has nothing of what the model draws, and when the model knows none
    of the labels.
    """
    if split not in SPLITS:
        raise Invalid(f"Split {split!r} must be one of {', '.join(SPLITS)}.")
    manifest = store.manifest(version)
    frames = with_outlines(manifest.split(split))
    metric = default_metric(card.task, frames)
    if not any(counts(metric, annotation) for one in frames for annotation in one.annotations or ()):
        kind = "tagged frame" if card.task == "tags" else "labelled box"
        raise Invalid(f"{version} has no {kind} in its {split} split, and {card.ref} draws {card.task}. Review frames "
                      "of that split and publish a version.")
    if not card.labels.map_to(manifest.taxonomy).pairs:
        raise Invalid(f"{card.ref} knows none of the labels of {version}: {', '.join(card.labels.labels[:10])} against "
                      f"{', '.join(manifest.taxonomy.labels[:10])}. Choose a model that was trained for this data.")
    return frames, manifest.taxonomy


def telling_all(card: ModelCard) -> tuple[ModelCard, float]:
    """The card and the least confidence with which a model tells all that scoring asks for: also the unsure boxes, and
    of tags the confidence of every label."""
    if card.task == "tags":
        return replace(card, decoder={**card.decoder, "top_k": len(card.labels)}), 0.0
    return card, LEAST_CONFIDENCE


def class_ids(ours: Taxonomy, labels: Callable[[str], str | None], theirs: Taxonomy) -> np.ndarray:
    """(len(ours),) class id in `theirs` of each of our labels, -1 where a label has no target."""
    targets = [labels(label) for label in ours.labels]
    return np.array([-1 if target is None else theirs.class_id(target) for target in targets])


def translated(detections: Detections, translate: np.ndarray) -> Detections:
    """Detections with the class ids of another taxonomy; those without a target are left out."""
    ids = translate[detections.class_id]
    kept = ids >= 0
    return replace(detections[kept], class_id=ids[kept])


def scored(card: ModelCard, frames: Sequence[LabeledFrame], found: dict[str, Detections],
           taxonomy: Taxonomy) -> Scored:
    """The score of what a model draws, by its task, at its card's confidence; found: as in Evaluation."""
    truth = {one.frame.name: one.annotations for one in frames}
    confidence = card.decoder.get("confidence", DEFAULT_CONFIDENCE)
    if card.task == "tags":
        return score_tags(truth, found, taxonomy, confidence, is_exclusive(card))
    boxes = score(truth, found, taxonomy, confidence)
    if card.task != "polygons" or not any(map(has_regions, truth.values())):
        return boxes
    # Regions of a semantic model join things of one label that touch.
    has_instances = card.decoder["name"] != "semantic"
    return replace(boxes, regions=score_regions(frames, found, taxonomy, confidence, has_instances))


def is_exclusive(card: ModelCard) -> bool:
    """Whether a model that tags sets one label a frame and no more (inference/heads.py, classification)."""
    given = settings(card.decoder)
    return given.get("top_k", 1 if given["score"] == "softmax" else None) == 1


def _rows(found: Detections, labels: Sequence[str]) -> list[list[Any]]:
    polygons = found.polygons or [()] * len(found)
    return [[*(round(float(value), DECIMALS) for value in xyxy), labels[class_id], round(float(confidence), 4),
             *([[round(float(value), DECIMALS) for value in polygon.ravel()]] if len(polygon) else [])]
            for xyxy, class_id, confidence, polygon in zip(found.xyxy, found.class_id, found.confidence, polygons)]


def _tracked(evaluation: Evaluation, tracker: Tracker, job: Job) -> Evaluation:
    dataset, _ = parse_ref(evaluation.version)
    metrics = evaluation.metrics
    tags = {
        "model": evaluation.model,
        "version": evaluation.version,
        "digest": evaluation.digest,
        "split": evaluation.split,
    }
    # One job may evaluate several models (a promotion does), so the model is part of the run's identity.
    run_id = tracker.start_run(
        f"{dataset}/evaluations",
        f"{evaluation.model} on {evaluation.version}/{evaluation.split}",
        {**tags, "job": f"{job.id}:{evaluation.model}:{evaluation.version}/{evaluation.split}"},
    )
    kept = Evaluation(**{**vars(evaluation), "run_id": run_id})
    values = {_metric_name(name): value for name, value in metrics.logged().items() if value == value}
    values |= {"seconds": evaluation.seconds}
    # What ran it goes to the tags: a repeat elsewhere may change it, and the tracker's parameters never change.
    tracker.log(
        run_id,
        params={
            **tags,
            "frames": metrics.frames,
            "truth": metrics.truth,
            "confidence": metrics.confidence,
            "least_confidence": evaluation.least_confidence,
        },
        metrics=values,
        tags=evaluation.backend,
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "evaluation.json"
        file.write_text(json.dumps(kept.to_json(), ensure_ascii=False, allow_nan=False))
        tracker.log_files(run_id, file, "evaluation")
    tracker.finish_run(run_id, "FINISHED")
    return kept


def _metric_name(name: str) -> str:
    """MLflow takes letters, digits, _ - . blanks and / in the name of a metric; "ap/<label>" has one of these of ours."""
    kind, slash, label = name.partition("/")
    return kind + slash + re.sub(r"[^\w\-. ]", "_", label, flags=re.ASCII)

"""Metrics: how well detections agree with the truth, by COCO's rules and by counting at one threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from workbench.annotation import Annotation
from workbench.boxes import Detections, iou, xyxy_to_xywh
from workbench.errors import Invalid
from workbench.evaluation.matching import SAME_OBJECT_IOU, box_of, match
from workbench.evaluation.regions import RegionMetrics
from workbench.taxonomy import Taxonomy

# COCO's twelve numbers in the order of pycocotools' COCOeval.summarize.
COCO_NAMES = ("map_50_95", "map_50", "map_75", "map_small", "map_medium", "map_large",
              "ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large")
RECALL_GRID = 101
DEFAULT_CONFIDENCE = 0.3


@dataclass(frozen=True)
class Metrics:
    """What `score` measured. Values lie in 0..1.

    coco             COCO_NAMES -> value, None where nothing of that size exists; at most 100 boxes a frame count
    per_class        label -> {"ap", "ap50", "truth", "detections", "best_f1", "best_confidence"}, of labels the truth
                     has; ap is over IoU .5:.95; detections counts those at or above `confidence`; best_confidence is
                     the threshold of the highest F1 at IoU 0.5
    curves           label -> {"precision": 101 values at recall 0, 0.01 .. 1 and IoU 0.5, "confidence": the threshold
                     there}
    confusion        (labels + 1) x (labels + 1) counts at IoU 0.5 and `confidence`: rows are the truth, columns the
                     prediction, the last of both is "nothing there"
    confidence       the operating threshold of `confusion` and the counts
    best_confidence  the one threshold for all labels with the highest F1 over all boxes (best_f1)
    regions          of a model that draws polygons on frames whose truth has some; all else is about the boxes around
    """

    labels: tuple[str, ...]
    frames: int
    truth: int
    detections: int
    coco: dict[str, float | None]
    per_class: dict[str, dict[str, float]]
    curves: dict[str, dict[str, list[float]]]
    confusion: tuple[tuple[int, ...], ...]
    confidence: float
    best_confidence: float
    best_f1: float
    regions: RegionMetrics | None = None

    @property
    def values(self) -> dict[str, float]:
        """Metric -> value over all labels."""
        masks = {} if self.regions is None else {
            "miou": self.regions.miou, **{f"mask_{name}": value for name, value in self.regions.coco.items()}}
        return {"map_50_95": self.map_50_95, "map_50": self.map_50, **masks}

    def by_label(self, metric: str) -> dict[str, float]:
        """Label -> its part in map_50_95, map_50 or miou."""
        if metric == "miou":
            return self.regions.iou
        return {label: row[{"map_50_95": "ap", "map_50": "ap50"}[metric]] for label, row in self.per_class.items()}

    def logged(self) -> dict[str, float]:
        """All numbers worth a line in a table of runs."""
        values = {name: value for name, value in self.coco.items() if value is not None}
        values |= {f"ap/{label}": row["ap"] for label, row in self.per_class.items()} | self.values
        if self.regions is not None:
            values |= {f"iou/{label}": value for label, value in self.regions.iou.items()}
        return values | {"best_f1": self.best_f1, "best_confidence": self.best_confidence}

    def is_shown(self, found: Detections) -> np.ndarray:
        """(n,) which detections of a frame lie at or above the operating threshold."""
        return found.confidence >= np.float32(self.confidence)

    @property
    def map_50_95(self) -> float:
        return self.coco["map_50_95"] or 0.0

    @property
    def map_50(self) -> float:
        return self.coco["map_50"] or 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Metrics:
        regions = record.get("regions")
        return cls(**{**record, "labels": tuple(record["labels"]), "confusion": tuple(map(tuple, record["confusion"])),
                      "regions": None if regions is None else RegionMetrics.from_json(regions)})


def score(truth: Mapping[str, Sequence[Annotation] | None], found: Mapping[str, Detections | Sequence[Annotation]],
          taxonomy: Taxonomy, confidence: float = DEFAULT_CONFIDENCE) -> Metrics:
    """Scores detections against the truth of the same frames.

    truth       frame name -> its annotations; () is a frame where somebody looked and nothing was there. An annotation
                with the attribute "iscrowd" is ignored as COCO ignores crowds; masks alone and tags are left out.
    found       frame name -> Detections whose class_id indexes `taxonomy`, or annotations with a confidence; a frame
                without an entry has no detections. Give them down to a low confidence: what is missing costs recall.
    confidence  the operating threshold for counts and confusion

    Raises Invalid for a frame whose truth is None (nobody looked, so it is no truth), a detection on a frame that is
    not in `truth`, a label outside the taxonomy, and a truth without any box.
    """
    unseen = [name for name, annotations in truth.items() if annotations is None]
    if unseen:
        raise Invalid(
            f"{len(unseen)} frames have no truth because nobody looked at them, e.g. {unseen[0]}. Review them or leave "
            "them out of the evaluation."
        )
    strangers = sorted(found.keys() - truth.keys())
    if strangers:
        raise Invalid(f"There are detections on {len(strangers)} frames that are not evaluated, e.g. {strangers[0]}.")
    names = sorted(truth)
    confidence = float(np.float32(confidence))  # as the detections hold theirs
    wanted = [_of_annotations(truth[name], taxonomy) for name in names]
    given = [_of_found(found.get(name, ()), taxonomy) for name in names]
    if not any(len(boxes.xyxy) for boxes in wanted):
        raise Invalid(
            f"None of the {len(names)} frames has a labelled box, so nothing can be scored. Label some first."
        )
    evaluation = _coco(wanted, given, len(taxonomy))
    precision, thresholds = evaluation.eval["precision"], evaluation.eval["scores"]
    per_class, curves, pooled = {}, {}, []
    for class_id, label in enumerate(taxonomy.labels):
        hits, count = _hits(wanted, given, class_id)
        pooled.append((hits, count))
        if not any((boxes.class_id == class_id).any() for boxes in wanted):
            continue
        best_confidence, best_f1 = _best_f1([(hits, count)])
        # Axes: IoU threshold, recall, class, area (0: all), most detections (2: 100).
        per_class[label] = {
            "ap": _mean(precision[:, :, class_id, 0, 2]), "ap50": _mean(precision[0, :, class_id, 0, 2]),
            "truth": count, "detections": int((hits[:, 0] >= confidence).sum()),
            "best_f1": best_f1, "best_confidence": best_confidence}
        curves[label] = {"precision": np.maximum(precision[0, :, class_id, 0, 2], 0).tolist(),
                         "confidence": np.maximum(thresholds[0, :, class_id, 0, 2], 0).tolist()}
    best_confidence, best_f1 = _best_f1(pooled)
    stats = [float(value) for value in evaluation.stats[:12]]
    return Metrics(
        labels=taxonomy.labels, frames=len(names), truth=sum(count for _, count in pooled),
        detections=sum(int((boxes.confidence >= confidence).sum()) for boxes in given),
        coco={name: None if value < 0 else value for name, value in zip(COCO_NAMES, stats, strict=True)},
        per_class=per_class, curves=curves, confusion=_confusion(wanted, given, taxonomy, confidence),
        confidence=float(confidence), best_confidence=best_confidence, best_f1=best_f1)


@dataclass(frozen=True)
class _Boxes:
    """One frame: xyxy (n, 4) float64, class_id (n,), confidence (n,), is_crowd (n,)."""

    xyxy: np.ndarray
    class_id: np.ndarray
    confidence: np.ndarray
    is_crowd: np.ndarray


def _of_annotations(annotations: Sequence[Annotation], taxonomy: Taxonomy) -> _Boxes:
    boxed = [(box_of(annotation), annotation) for annotation in annotations]
    boxed = [(box, annotation) for box, annotation in boxed if box is not None]
    return _Boxes(
        np.array([box for box, _ in boxed], float).reshape(-1, 4),
        np.array([taxonomy.class_id(annotation.label) for _, annotation in boxed], int),
        np.array([1.0 if annotation.confidence is None else annotation.confidence for _, annotation in boxed]),
        np.array([bool(annotation.attributes.get("iscrowd")) for _, annotation in boxed], bool),
    )


def _of_found(found: Detections | Sequence[Annotation], taxonomy: Taxonomy) -> _Boxes:
    if not isinstance(found, Detections):
        return _of_annotations(found, taxonomy)
    if len(found) and not 0 <= found.class_id.min() <= found.class_id.max() < len(taxonomy):
        raise Invalid(
            f"Detections have class ids {found.class_id.min()}..{found.class_id.max()}, the taxonomy has "
            f"{len(taxonomy)} labels. Map the model's labels onto the data set's first."
        )
    return _Boxes(found.xyxy.astype(float), found.class_id.astype(int), found.confidence.astype(float),
                  np.zeros(len(found), bool))


def _coco(wanted: list[_Boxes], given: list[_Boxes], classes: int) -> Any:
    from faster_coco_eval import COCO, COCOeval_faster

    annotations, results = [], []
    for image_id, (truth, found) in enumerate(zip(wanted, given), start=1):
        for xywh, class_id, is_crowd in zip(
            xyxy_to_xywh(truth.xyxy).tolist(), truth.class_id.tolist(), truth.is_crowd.tolist()
        ):
            # An id of 0 would read as "no match" in the evaluation, so ids start at 1.
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": class_id + 1,
                    "bbox": xywh,
                    "area": xywh[2] * xywh[3],
                    "iscrowd": int(is_crowd),
                }
            )
        for xywh, class_id, value in zip(
            xyxy_to_xywh(found.xyxy).tolist(), found.class_id.tolist(), found.confidence.tolist()
        ):
            results.append({"image_id": image_id, "category_id": class_id + 1, "bbox": xywh, "score": value})
    ground = COCO({"info": {}, "images": [{"id": i + 1} for i in range(len(wanted))], "annotations": annotations,
                   "categories": [{"id": i + 1, "name": str(i)} for i in range(classes)]})
    evaluation = COCOeval_faster(ground, ground.loadRes(results), iouType="bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def _mean(precision: np.ndarray) -> float:
    """COCO marks cells of classes without truth by -1."""
    known = precision[precision > -1]
    return float(known.mean()) if len(known) else 0.0


def _hits(wanted: list[_Boxes], given: list[_Boxes], class_id: int) -> tuple[np.ndarray, int]:
    """((n, 2) confidence and 1 for a hit or 0, number of true boxes) of one class at IoU 0.5, greedy by confidence as
    COCO matches; a detection on a crowd counts neither way."""
    rows, count = [], 0
    for truth, found in zip(wanted, given):
        mine = found.class_id == class_id
        same = truth.class_id == class_id
        true, crowd = truth.xyxy[same & ~truth.is_crowd], truth.xyxy[same & truth.is_crowd]
        boxes, confidences = found.xyxy[mine], found.confidence[mine]
        count += len(true)
        overlap, on_crowd = iou(boxes, true), iou(boxes, crowd)
        for index in np.argsort(-confidences, kind="stable"):
            target = int(overlap[index].argmax()) if len(true) else -1
            is_hit = target >= 0 and overlap[index, target] >= SAME_OBJECT_IOU
            if is_hit:
                overlap[:, target] = -1.0  # taken
            elif (on_crowd[index] >= SAME_OBJECT_IOU).any():
                continue
            rows.append((confidences[index], float(is_hit)))
    return np.array(rows, float).reshape(-1, 2), count


def _best_f1(classes: list[tuple[np.ndarray, int]]) -> tuple[float, float]:
    """(confidence, F1) where F1 = 2 hits / (truth + detections) is highest when all detections at or above count; among
    equals the lowest confidence. (1, 0) when no threshold hits anything."""
    hits = np.concatenate([rows for rows, _ in classes]) if classes else np.zeros((0, 2))
    count = sum(number for _, number in classes)
    if not hits[:, 1].any():
        return 1.0, 0.0
    hits = hits[np.argsort(-hits[:, 0], kind="stable")]
    # A threshold takes all detections of that confidence, so F1 only counts at the last of equal ones.
    is_last = np.append(hits[1:, 0] != hits[:-1, 0], True)
    f1 = np.where(is_last, 2 * hits[:, 1].cumsum() / (count + np.arange(1, len(hits) + 1)), -1.0)
    best = int(np.nonzero(f1 >= f1.max() - 1e-12)[0][-1])
    return float(hits[best, 0]), float(f1[best])


def _confusion(
    wanted: list[_Boxes], given: list[_Boxes], taxonomy: Taxonomy, confidence: float
) -> tuple[tuple[int, ...], ...]:
    nothing = len(taxonomy)
    counts = np.zeros((nothing + 1, nothing + 1), int)
    for truth, found in zip(wanted, given):
        is_true, is_sure = ~truth.is_crowd, found.confidence >= confidence
        true, crowd = truth.xyxy[is_true], truth.xyxy[truth.is_crowd]
        true_ids, found_ids, boxes = truth.class_id[is_true], found.class_id[is_sure], found.xyxy[is_sure]
        pairs = match(true, true_ids, boxes, found_ids)
        for pair in pairs:
            counts[true_ids[pair.one], found_ids[pair.other]] += 1
        for index in set(range(len(true))) - {pair.one for pair in pairs}:
            counts[true_ids[index], nothing] += 1
        on_crowd = (iou(boxes, crowd) >= SAME_OBJECT_IOU).any(axis=1)
        for index in set(range(len(boxes))) - {pair.other for pair in pairs}:
            if not on_crowd[index]:
                counts[nothing, found_ids[index]] += 1
    return tuple(map(tuple, counts.tolist()))

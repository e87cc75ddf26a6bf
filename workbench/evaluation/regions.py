"""Regions: how well polygons agree with the truth, pixel by pixel on the frame, and as COCO scores masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from workbench.annotation import Annotation
from workbench.boxes import Detections
from workbench.dataset import Frame, LabeledFrame
from workbench.errors import Invalid
from workbench.formats.outlines import decode_rle, of_mask
from workbench.taxonomy import Taxonomy


@dataclass(frozen=True)
class RegionMetrics:
    """What `score_regions` measured, beside the boxes around the same polygons. Values lie in 0..1.

    miou       mean over the labels that the truth has of their IoU: pixels of all frames that both call the label, by
               those that one of them does. The background is no label.
    iou        label -> its IoU
    confusion  (labels + 1) x (labels + 1) pixels: rows are the truth, columns the prediction, the last of both is the
               background
    coco       {"map_50_95", "map_50"} of the masks one by one, where the model tells one thing from the next; else {}
    ap         label -> its AP@[.5:.95] likewise
    """

    miou: float
    iou: dict[str, float]
    confusion: tuple[tuple[int, ...], ...]
    coco: dict[str, float]
    ap: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> RegionMetrics:
        return cls(**{**record, "confusion": tuple(map(tuple, record["confusion"]))})


@dataclass(frozen=True)
class Pixels:
    """(frames, C + 1, C + 1) pixels of each frame: truth in rows, prediction in columns, the background last."""

    confusion: np.ndarray

    def iou(self, weights: np.ndarray) -> np.ndarray:
        """(C,) IoU of each label over frames that are there weights[i] times; NaN where none of them has it."""
        whole = np.tensordot(weights, self.confusion, axes=1)
        both, truth = np.diag(whole), whole.sum(axis=1)
        union = truth + whole.sum(axis=0) - both
        return np.divide(both, union, out=np.full(len(both), np.nan), where=truth > 0)[:-1]


def has_regions(annotations: Sequence[Annotation] | None) -> bool:
    return any(one.polygon is not None for one in annotations or ())


def with_outlines(frames: Sequence[LabeledFrame]) -> tuple[LabeledFrame, ...]:
    """The frames with a polygon in place of every mask, so that all scores see it; an empty mask is left out."""
    def outlined(annotation: Annotation) -> Annotation | None:
        if annotation.mask is None or annotation.polygon is not None:
            return annotation
        mask = decode_rle(annotation.mask)
        return replace(annotation, polygon=tuple(map(tuple, of_mask(mask).tolist())), mask=None) if mask.any() else None

    return tuple(one if all(drawn.mask is None for drawn in one.annotations or ()) else replace(
        one, annotations=tuple(made for drawn in one.annotations if (made := outlined(drawn)) is not None))
        for one in frames)


def pixels(frames: Sequence[LabeledFrame], found: Mapping[str, Detections], taxonomy: Taxonomy,
           confidence: float = 0.0) -> Pixels:
    """Every pixel has one label: of overlapping polygons the smaller one lies on top, so that a bird is seen before the
    sky. A box of the truth among polygons counts as its rectangle.

    found  frame name -> Detections with polygons; those below `confidence` are left out
    """
    kinds = len(taxonomy) + 1
    rows = []
    for one in frames:
        given = found.get(one.frame.name)
        rings = [(taxonomy.class_id(drawn.label), ring) for drawn in one.annotations or ()
                 if (ring := _ring(drawn)) is not None]
        truth = _painted(rings, one.frame, kinds - 1)
        drawn = _painted(_rings(given, confidence), one.frame, kinds - 1)
        rows.append(np.bincount((truth.astype(np.int64) * kinds + drawn).ravel(), minlength=kinds ** 2))
    return Pixels(np.array(rows, float).reshape(-1, kinds, kinds))


def score_regions(frames: Sequence[LabeledFrame], found: Mapping[str, Detections], taxonomy: Taxonomy,
                  confidence: float, has_instances: bool = True) -> RegionMetrics:
    """Scores polygons against the truth of the same frames.

    found          frame name -> Detections down to a low confidence, class_id indexes `taxonomy`
    confidence     from which on a polygon counts for pixels; masks one by one are ranked by it
    has_instances  False for a model whose regions join things that touch: scoring them one by one says nothing

    Raises Invalid for a truth without any polygon or box.
    """
    counted = pixels(frames, found, taxonomy, confidence)
    ious = counted.iou(np.ones(len(frames)))
    if np.isnan(ious).all():
        raise Invalid(f"None of the {len(frames)} frames has a labelled region, so nothing can be scored. Draw some "
                      "first.")
    coco, ap = _coco(frames, found, taxonomy) if has_instances else ({}, {})
    whole = counted.confusion.sum(axis=0).astype(int)
    return RegionMetrics(
        float(np.nanmean(ious)), {label: float(value) for label, value in zip(taxonomy.labels, ious) if value == value},
        tuple(map(tuple, whole.tolist())), coco, ap)


def _ring(annotation: Annotation) -> np.ndarray | None:
    """(n, 2) outline of an annotation, None for a tag."""
    if annotation.polygon is not None:
        return np.array(annotation.polygon, float)
    if annotation.xyxy is not None:
        x1, y1, x2, y2 = annotation.xyxy
        return np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)], float)
    return None


def _rings(found: Detections | None, confidence: float) -> list[tuple[int, np.ndarray]]:
    if found is None or found.polygons is None:
        return []
    return [(int(class_id), np.asarray(ring, float)) for class_id, ring, sure
            in zip(found.class_id, found.polygons, found.confidence) if sure >= np.float32(confidence)]


def _painted(rings: list[tuple[int, np.ndarray]], frame: Frame, background: int) -> np.ndarray:
    """(height, width) class id of every pixel."""
    from faster_coco_eval.core import mask as masks

    canvas = np.full((frame.height, frame.width), background, np.int32)
    cut = []
    for class_id, ring in rings:
        x1, y1 = np.clip(np.floor(ring.min(axis=0)), 0, (frame.width, frame.height)).astype(int)
        x2, y2 = np.clip(np.ceil(ring.max(axis=0)), 0, (frame.width, frame.height)).astype(int)
        if x2 > x1 and y2 > y1:
            # Only the part around it is made into pixels; a shift by whole pixels changes none of them.
            run = masks.frPyObjects([(ring - (x1, y1)).ravel().tolist()], int(y2 - y1), int(x2 - x1))
            cut.append((int(masks.area(run)[0]), class_id, (slice(y1, y2), slice(x1, x2)), run))
    for _, class_id, place, run in sorted(cut, key=lambda one: -one[0]):
        canvas[place][masks.decode(run)[:, :, 0] > 0] = class_id
    return canvas


def _coco(frames: Sequence[LabeledFrame], found: Mapping[str, Detections],
          taxonomy: Taxonomy) -> tuple[dict[str, float], dict[str, float]]:
    from faster_coco_eval import COCO, COCOeval_faster
    from faster_coco_eval.core import mask as masks

    images, annotations, results = [], [], []
    for image_id, one in enumerate(frames, 1):
        size = one.frame.height, one.frame.width
        images.append({"id": image_id, "height": size[0], "width": size[1]})

        def run(ring: np.ndarray) -> Any:
            return masks.frPyObjects([ring.ravel().tolist()], *size)[0]

        for drawn in one.annotations or ():
            if (ring := _ring(drawn)) is not None:
                shape = run(ring)
                annotations.append({
                    "id": len(annotations) + 1, "image_id": image_id, "segmentation": shape,
                    "category_id": taxonomy.class_id(drawn.label) + 1, "area": float(masks.area(shape)),
                    "bbox": masks.toBbox(shape).tolist(), "iscrowd": int(bool(drawn.attributes.get("iscrowd")))})
        given = found.get(one.frame.name)
        for (class_id, ring), sure in zip(_rings(given, 0.0), () if given is None else given.confidence.tolist()):
            results.append({"image_id": image_id, "category_id": class_id + 1, "segmentation": run(ring), "score": sure})
    ground = COCO({"info": {}, "images": images, "annotations": annotations,
                   "categories": [{"id": index, "name": str(index)} for index in range(1, len(taxonomy) + 1)]})
    evaluation = COCOeval_faster(ground, ground.loadRes(results), iouType="segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    precision = evaluation.eval["precision"]
    known = {one["category_id"] - 1 for one in annotations}
    # Axes: IoU threshold, recall, class, area (0: all), most detections (the last: 100).
    ap = {taxonomy.labels[index]: float(np.maximum(precision[:, :, index, 0, -1], 0).mean()) for index in sorted(known)}
    return {"map_50_95": max(0.0, float(evaluation.stats[0])), "map_50": max(0.0, float(evaluation.stats[1]))}, ap

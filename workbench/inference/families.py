"""The families of heads a model card may name: what each draws, its settings, and which of them make sense."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from workbench.errors import Invalid

TASKS = ("boxes", "polygons", "tags")


@dataclass(frozen=True)
class Family:
    """A kind of raw outputs and how it is read.

    task        what it draws: one of TASKS
    suppresses  whether its boxes overlap and go through NMS
    defaults    settings of the card's decoder that may be left out
    scores      the ways its scores may be meant (the setting `score`), the first one is the default
    """

    task: str = "boxes"
    suppresses: bool = True
    defaults: Mapping[str, Any] = field(default_factory=dict)
    scores: tuple[str, ...] = ()


YOLO_STRIDES = (8, 16, 32)
FAMILIES: Mapping[str, Family] = {
    "yolox": Family(defaults={"strides": YOLO_STRIDES}),
    # reg_max is 7 in NanoDet-Plus' configs (config/nanodet-plus-m_416.yml).
    "nanodet": Family(defaults={"strides": (8, 16, 32, 64), "reg_max": 7, "centre": 0}),
    # Points in the middle of their cells, as in the paper; torchvision's FCOS has them at corners: "centre": 0.
    "fcos": Family(
        defaults={"strides": YOLO_STRIDES, "centre": 0.5},
        scores=("sqrt(sigmoid(cls)*sigmoid(ctr))", "sigmoid(cls)*sigmoid(ctr)"),
    ),
    "yolov5": Family(defaults={"strides": YOLO_STRIDES, "anchors_per_cell": 3}),
    "yolov8": Family(defaults={"strides": YOLO_STRIDES}),
    "yolov8_seg": Family("polygons", defaults={"strides": YOLO_STRIDES}),
    # torchvision, models/detection/retinanet.py (_default_anchorgen, BoxCoder of RetinaNetRegressionHead).
    "retinanet": Family(
        defaults={
            "strides": (8, 16, 32, 64, 128),
            "aspect_ratios": (0.5, 1.0, 2.0),
            "weights": (1.0, 1.0, 1.0, 1.0),
            "sizes": tuple(
                (side, int(side * 2 ** (1 / 3)), int(side * 2 ** (2 / 3))) for side in (32, 64, 128, 256, 512)
            ),
        }
    ),
    # torchvision, models/detection/ssd.py (ssd300_vgg16, SSD.__init__); Liu et al., SSD, 2016, has the same numbers.
    "ssd": Family(
        defaults={
            "strides": (8, 16, 32, 64, 100, 300),
            "aspect_ratios": ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,)),
            "scales": (0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05),
            "weights": (10.0, 10.0, 5.0, 5.0),
        }
    ),
    "detr": Family(suppresses=False, scores=("softmax", "sigmoid")),
    # Boxes that the graph decoded itself. NMS of what a graph suppressed already changes nothing at the same IoU; with
    # "iou": 1 there is none.
    "detections": Family(),
    "classification": Family("tags", suppresses=False, scores=("softmax", "sigmoid", "probabilities")),
    # Regions of fewer canvas pixels are specks that no person would draw.
    "semantic": Family("polygons", suppresses=False, defaults={"min_area": 64}),
}


def settings(decoder: Mapping[str, Any]) -> dict[str, Any]:
    """The card's decoder with its family's defaults below it."""
    family = FAMILIES[decoder["name"]]
    return {**({"score": family.scores[0]} if family.scores else {}), **family.defaults, **decoder}


def check_decoder(decoder: Mapping[str, Any], labels: tuple[str, ...], where: str) -> None:
    """Raises Invalid, naming the setting, what it must be and what it is. where: "Model student@3", for the text."""
    if decoder.get("name") not in FAMILIES:
        raise Invalid(f"{where} names decoder {decoder.get('name')!r}; known are {', '.join(FAMILIES)}.")
    family, given = FAMILIES[decoder["name"]], settings(decoder)
    levels = len(given["strides"]) if _is_list(given.get("strides")) else 0
    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "confidence": (_is_share, "lie in 0..1"),
        "iou": (_is_share, "lie in 0..1"),
        "confidence_by_label": (
            lambda value: (
                isinstance(value, Mapping) and set(value) <= set(labels) and all(map(_is_share, value.values()))
            ),
            "give labels of the model a number in 0..1",
        ),
        "max_candidates": (_is_count, "be a whole number above 0"),
        "max_detections": (_is_count, "be a whole number above 0"),
        "strides": (lambda value: levels > 0 and all(map(_is_count, value)), "be whole numbers of pixels above 0"),
        "steps": (lambda value: _are_positive(value, levels), f"be {levels} numbers of pixels above 0, one a stride"),
        "reg_max": (_is_count, "be a whole number above 0"),
        "anchors_per_cell": (_is_count, "be a whole number above 0"),
        "centre": (_is_share, "lie in 0..1 (0: corner of its cell, 0.5: its middle)"),
        "sizes": (
            lambda value: _is_list(value) and len(value) == levels and all(map(_are_positive, value)),
            f"be {levels} lists of sides in pixels, one a stride",
        ),
        "aspect_ratios": (
            lambda value: (
                _are_positive(value)
                if decoder["name"] == "retinanet"
                else _is_list(value) and len(value) == levels and all(_are_positive(one, least=0) for one in value)
            ),
            "be height / width ratios above 0"
            if decoder["name"] == "retinanet"
            else f"be {levels} lists of ratios above 0, one a stride",
        ),
        "scales": (
            lambda value: _are_positive(value, levels + 1),
            f"be {levels + 1} shares of the input's side, one a stride and one more",
        ),
        "weights": (lambda value: _are_positive(value, 4), "be four numbers above 0 (x, y, width, height)"),
        "columns": (
            lambda value: (
                _is_list(value)
                and len(value) == len(labels) == len(set(value))
                and all(_is_whole(one) for one in value)
            ),
            f"be {len(labels)} different columns from 0, one a label",
        ),
        "background": (lambda value: value is None or _is_whole(value), "be a class id, or null for none"),
        "top_k": (_is_count, "be a whole number above 0"),
        "min_area": (lambda value: _is_number(value) and value >= 0, "be a number of pixels from 0"),
        "outputs": (
            lambda value: isinstance(value, Mapping) and all(isinstance(one, str) for one in value.values()),
            "give outputs of the graph by name",
        ),
        "score": (
            lambda value: _plain(value) in family.scores or not family.scores,
            f"be one of {', '.join(family.scores)}",
        ),
    }
    for name, (is_right, wanted) in rules.items():
        if name in given and not is_right(given[name]):
            raise Invalid(f"{where}: decoder {name} {given[name]!r} must {wanted}. Correct its card.")


def _plain(score: Any) -> str:
    return score.replace(" ", "") if isinstance(score, str) else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_count(value: Any) -> bool:
    return _is_whole(value) and value > 0


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _are_positive(value: Any, count: int | None = None, least: int = 1) -> bool:
    return (
        _is_list(value)
        and len(value) >= least
        and count in (None, len(value))
        and all(_is_number(one) and one > 0 for one in value)
    )

"""Heads with anchors: RetinaNet and SSD, as torchvision trains and exports them; every number can stand in the card."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from workbench.boxes import cxcywh_to_xyxy
from workbench.inference.candidates import (
    Candidates,
    Outputs,
    cells,
    columns_of,
    likely,
    misfit,
    named_outputs,
    select,
    sigmoid,
    softmax,
)
from workbench.inference.families import settings
from workbench.model import ModelCard

# BoxCoder's limit of log width and height: torchvision, models/detection/_utils.py, bbox_xform_clip.
MAX_LOG_SIDE = math.log(1000 / 16)
NAMES = {"cls": "cls_logits", "box": "bbox_regression"}


def retinanet(card: ModelCard, outputs: Outputs, least: np.ndarray) -> list[Candidates]:
    """cls (N, A, C) logits and box (N, A, 4) offsets of the anchors; score = sigmoid(cls).

    torchvision, models/detection/retinanet.py, postprocess_detections (Lin et al., Focal Loss, 2017).
    """
    anchors = retinanet_anchors(card)
    logits, offsets, columns = _raw(card, outputs, len(anchors), spare=0)
    weights = settings(card.decoder)["weights"]

    def found(logits: np.ndarray, offsets: np.ndarray) -> Candidates:
        rows = likely(logits, least)
        return select(card, sigmoid(logits[rows]), lambda at: moved(anchors[at], offsets[at], weights), least, rows)[0]

    return [found(*one) for one in zip(logits[..., columns], offsets)]


def ssd(card: ModelCard, outputs: Outputs, least: np.ndarray) -> list[Candidates]:
    """cls (N, A, 1 + C) logits whose first column is the background, and box (N, A, 4) offsets of the default boxes;
    score = softmax(cls). `weights` are the inverse variances: 10, 10, 5, 5 stand for 0.1, 0.1, 0.2, 0.2.

    torchvision, models/detection/ssd.py, postprocess_detections (Liu et al., SSD, 2016).
    """
    boxes = default_boxes(card)
    logits, offsets, columns = _raw(card, outputs, len(boxes), spare=1)
    weights = settings(card.decoder)["weights"]

    def found(logits: np.ndarray, offsets: np.ndarray) -> Candidates:
        scores = softmax(logits)[:, columns]
        return select(card, scores, lambda at: moved(boxes[at], offsets[at], weights), least)[0]

    return [found(*one) for one in zip(logits, offsets)]


def moved(anchors: np.ndarray, offsets: np.ndarray, weights: tuple[float, ...]) -> np.ndarray:
    """(k, 4) xyxy anchors and (k, 4) dx, dy, dlog w, dlog h, each times its weight -> (k, 4) xyxy.

    torchvision, models/detection/_utils.py, BoxCoder.decode_single.
    """
    sides = anchors[:, 2:] - anchors[:, :2]
    offsets = offsets / np.array(weights)
    centres = offsets[:, :2] * sides + anchors[:, :2] + sides / 2
    return cxcywh_to_xyxy(np.concatenate([centres, np.exp(np.minimum(offsets[:, 2:], MAX_LOG_SIDE)) * sides], axis=1))


def retinanet_anchors(card: ModelCard) -> np.ndarray:
    """(A, 4) xyxy in canvas pixels: at every cell's corner, all sizes of the first ratio, then of the next.

    torchvision, models/detection/anchor_utils.py, AnchorGenerator: sides are rounded to whole pixels, cells lie
    side // cells apart; `steps` in the card says other distances (detectron2 and MMDetection take the strides).
    """
    given = settings(card.decoder)
    return _retinanet_anchors(
        card.input.size,
        tuple(cells(card)),
        _frozen(given["sizes"]),
        _frozen(given["aspect_ratios"]),
        _frozen(given.get("steps")),
    )


@lru_cache(maxsize=8)
def _retinanet_anchors(size: tuple[int, int], levels: tuple, sizes: tuple, ratios: tuple, steps: Any) -> np.ndarray:
    found = []
    tall = np.sqrt(np.array(ratios, float))
    for level, (columns, rows) in enumerate(levels):
        half = np.stack([np.outer(1 / tall, sizes[level]).ravel(), np.outer(tall, sizes[level]).ravel()], axis=1) / 2
        shapes = np.concatenate([-half, half], axis=1).round()
        across, down = (steps[level],) * 2 if steps else (size[0] // columns, size[1] // rows)
        found.append(_at_every_cell(shapes, np.arange(columns) * across, np.arange(rows) * down))
    return _read_only(np.concatenate(found))


def default_boxes(card: ModelCard) -> np.ndarray:
    """(A, 4) xyxy in canvas pixels around the middle of every cell.

    A level with scale s and the next one s' has squares of s and sqrt(s * s') of the canvas, then for each ratio r
    boxes of s * sqrt(r) by s / sqrt(r) and the other way round; sides are cut to the canvas (torchvision,
    models/detection/anchor_utils.py, DefaultBoxGenerator). Cells lie `steps` pixels apart; without them they fill the
    canvas evenly. SSD300's own steps are its strides.
    """
    given = settings(card.decoder)
    steps = given.get("steps") or (given["strides"] if "strides" not in card.decoder else None)
    return _default_boxes(
        card.input.size, tuple(cells(card)), _frozen(given["scales"]), _frozen(given["aspect_ratios"]), _frozen(steps)
    )


@lru_cache(maxsize=8)
def _default_boxes(size: tuple[int, int], levels: tuple, scales: tuple, ratios: tuple, steps: Any) -> np.ndarray:
    found = []
    for level, (columns, rows) in enumerate(levels):
        scale, between = scales[level], math.sqrt(scales[level] * scales[level + 1])
        sides = [(scale, scale), (between, between)]
        for ratio in ratios[level]:
            wide, tall = scale * math.sqrt(ratio), scale / math.sqrt(ratio)
            sides += [(wide, tall), (tall, wide)]
        half = np.minimum(np.array(sides), 1) * size / 2
        across, down = (steps[level],) * 2 if steps else (size[0] / columns, size[1] / rows)
        shapes = np.concatenate([-half, half], axis=1)
        found.append(_at_every_cell(shapes, (np.arange(columns) + 0.5) * across, (np.arange(rows) + 0.5) * down))
    return _read_only(np.concatenate(found))


def _at_every_cell(shapes: np.ndarray, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """(k, 4) boxes around the origin -> (rows * columns * k, 4), row by row."""
    across, down = np.meshgrid(xs, ys)
    places = np.stack([across, down, across, down], axis=2).reshape(-1, 1, 4)
    return (places + shapes).reshape(-1, 4)


def _raw(card: ModelCard, outputs: Outputs, count: int, spare: int) -> tuple[np.ndarray, np.ndarray, Any]:
    (logits, offsets), expected = named_outputs(
        card, outputs, NAMES, [f"(n, {count}, {len(card.labels) + spare})", f"(n, {count}, 4), a row an anchor"]
    )
    columns = columns_of(card, logits.shape[-1], spare=spare, first=spare) if logits.ndim == 3 else None
    if columns is None or logits.shape[1] != count or offsets.shape != (*logits.shape[:2], 4):
        raise misfit(card, outputs, expected)
    return logits, offsets, columns


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False  # it is shared between calls
    return array

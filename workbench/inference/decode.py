"""Decoders: a detector's raw outputs into boxes on its canvas, one per family of heads."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from workbench.boxes import Detections
from workbench.errors import Invalid
from workbench.inference.nms import MAX_CANDIDATES, best
from workbench.model import ModelCard

Outputs = dict[str, np.ndarray]

# A side of exp(10) = 22,026 strides is beyond any frame; the limit keeps exp finite whatever the weights are.
MAX_LOG_SIDE = 10.0
STRIDES = {"yolox": (8, 16, 32), "nanodet": (8, 16, 32, 64), "fcos": (8, 16, 32)}
FCOS_SCORES = {"sqrt(sigmoid(cls)*sigmoid(ctr))": np.sqrt, "sigmoid(cls)*sigmoid(ctr)": np.asarray}


def decode(card: ModelCard, outputs: Outputs, least: np.ndarray) -> list[Detections]:
    """One Detections per image of the batch, in canvas pixels, best first, before NMS.

    outputs  what Backend.run returned
    least    (C,) the confidence a box of each class must exceed

    Raises Invalid, naming the model's file and what was expected, when the outputs do not fit the card's decoder,
    labels and input size, or hold a NaN or an infinity.
    """
    for name, output in outputs.items():
        if not np.isfinite(output).all():
            raise Invalid(f"{card.onnx} of {card.ref}: output {name!r} holds a NaN or an infinity; the weights or the "
                          "input's scale, mean and std are broken. Export the model again or mend its card.")
    return _DECODERS[card.decoder["name"]](card, outputs, least)


def points(card: ModelCard, centre: float) -> tuple[np.ndarray, np.ndarray]:
    """Where a head looks: (A, 2) x, y in canvas pixels and (A,) strides, level after level, each row by row.

    centre  0.5 for points in the middle of their cell, 0 for its top left corner
    """
    positions, strides = [], []
    for stride in strides_of(card):
        columns, rows = (math.ceil(side / stride) for side in card.input.size)
        xs, ys = np.meshgrid(np.arange(columns), np.arange(rows))
        positions.append((np.stack([xs.ravel(), ys.ravel()], axis=1) + centre) * stride)
        strides.append(np.full(columns * rows, float(stride)))
    return np.concatenate(positions), np.concatenate(strides)


def strides_of(card: ModelCard) -> tuple[int, ...]:
    strides = card.decoder.get("strides", STRIDES[card.decoder["name"]])
    if not strides or not all(isinstance(stride, int) and stride > 0 for stride in strides):
        raise Invalid(f"Model {card.ref}: decoder strides {strides!r} must be whole numbers of pixels above 0.")
    return tuple(strides)


def _yolox(card: ModelCard, outputs: Outputs, least: np.ndarray) -> list[Detections]:
    """(N, A, 5 + C): x, y as offsets of the cell, log width and height in strides, objectness, class scores (both after
    their sigmoid); score = objectness * class score (YOLOX, demo_utils.py demo_postprocess, yolo_head.py)."""
    corners, strides = points(card, centre=0)
    output = _only(card, outputs, len(corners), 5 + len(card.labels))
    found = []
    for raw in output:
        def boxes(at: np.ndarray, raw: np.ndarray = raw) -> np.ndarray:
            centres = raw[at, :2] * strides[at, None] + corners[at]
            half = np.exp(np.minimum(raw[at, 2:4], MAX_LOG_SIDE)) * strides[at, None] / 2
            return np.concatenate([centres - half, centres + half], axis=1)
        found.append(_select(card, raw[:, 5:] * raw[:, 4:5], boxes, least))
    return found


def _nanodet(card: ModelCard, outputs: Outputs, least: np.ndarray) -> list[Detections]:
    """(N, A, C + 4 * (reg_max + 1)): class scores after their sigmoid, then for left, top, right, bottom a distribution
    over 0..reg_max strides, whose mean is the distance from the point (column * stride, row * stride).

    NanoDet-Plus, nanodet_plus_head.py: get_single_level_center_priors puts points at corners of cells, not in their
    middle; _forward_onnx applies the sigmoid; levels are ceil(side / stride) cells wide; reg_max is 7 in its configs.
    """
    corners, strides = points(card, centre=0)
    bins = int(card.decoder.get("reg_max", 7)) + 1
    output = _only(card, outputs, len(corners), len(card.labels) + 4 * bins)
    steps = np.arange(bins)
    found = []
    for raw in output:
        def boxes(at: np.ndarray, raw: np.ndarray = raw) -> np.ndarray:
            logits = raw[at, len(card.labels):].reshape(-1, 4, bins)
            shares = np.exp(logits - logits.max(axis=2, keepdims=True))
            distances = (shares @ steps) / shares.sum(axis=2) * strides[at, None]
            return np.concatenate([corners[at] - distances[:, :2], corners[at] + distances[:, 2:]], axis=1)
        found.append(_select(card, raw[:, :len(card.labels)], boxes, least))
    return found


def _fcos(card: ModelCard, outputs: Outputs, least: np.ndarray) -> list[Detections]:
    """cls (N, A, C) and ctr (N, A, 1) logits, box (N, A, 4) left, top, right, bottom in strides from the middle of the
    cell (Tian et al., FCOS, 2019); score as decoder["score"] says, default sqrt(sigmoid(cls) * sigmoid(ctr)) as
    torchvision's FCOS has it."""
    names = {"cls": "cls_logits", "box": "bbox_regression", "ctr": "bbox_ctrness", **card.decoder.get("outputs", {})}
    score = card.decoder.get("score", "sqrt(sigmoid(cls)*sigmoid(ctr))").replace(" ", "")
    if score not in FCOS_SCORES:
        raise Invalid(f"Model {card.ref}: decoder score {score!r} must be one of {', '.join(FCOS_SCORES)}.")
    centres, strides = points(card, centre=0.5)
    wanted = {names["cls"]: len(card.labels), names["box"]: 4, names["ctr"]: 1}
    for name, columns in wanted.items():
        if name not in outputs or outputs[name].ndim != 3 or outputs[name].shape[1:] != (len(centres), columns):
            raise _misfit(card, outputs, " and ".join(f"{n} (n, {len(centres)}, {c})" for n, c in wanted.items()))
    found = []
    for logits, distances, centredness in zip(*(outputs[name] for name in wanted)):
        def boxes(at: np.ndarray, distances: np.ndarray = distances) -> np.ndarray:
            pixels = distances[at] * strides[at, None]
            return np.concatenate([centres[at] - pixels[:, :2], centres[at] + pixels[:, 2:]], axis=1)
        scores = FCOS_SCORES[score](_sigmoid(logits) * _sigmoid(centredness))
        found.append(_select(card, scores, boxes, least))
    return found


_DECODERS: dict[str, Callable[[ModelCard, Outputs, np.ndarray], list[Detections]]] = {
    "yolox": _yolox, "nanodet": _nanodet, "fcos": _fcos}


def _select(
    card: ModelCard, scores: np.ndarray, boxes: Callable[[np.ndarray], np.ndarray], least: np.ndarray
) -> Detections:
    if len(scores) and (scores.min() < 0 or scores.max() > 1 + 1e-3):
        raise Invalid(f"{card.onnx} of {card.ref}: scores reach from {scores.min():.3g} to {scores.max():.3g}, the "
                      f"{card.decoder['name']} decoder expects 0..1. Export the model with its sigmoid inside.")
    at, class_ids = best(scores, least, int(card.decoder.get("max_candidates", MAX_CANDIDATES)))
    return Detections(boxes(at), class_ids, np.minimum(scores[at, class_ids], 1))


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    # Beyond +-80 a float32 sigmoid is 0 or 1 anyway, and exp stays finite.
    return 1 / (1 + np.exp(-np.clip(logits, -80, 80)))


def _only(card: ModelCard, outputs: Outputs, rows: int, columns: int) -> np.ndarray:
    fitting = [output for output in outputs.values() if output.ndim == 3 and output.shape[1:] == (rows, columns)]
    if len(outputs) != 1 or not fitting:
        raise _misfit(card, outputs, f"one output (n, {rows}, {columns})")
    return fitting[0]


def _misfit(card: ModelCard, outputs: Outputs, expected: str) -> Invalid:
    given = ", ".join(f"{name} {output.shape}" for name, output in outputs.items())
    return Invalid(
        f"{card.onnx} of {card.ref} does not fit the {card.decoder['name']} decoder: for input "
        f"{card.input.size[0]}x{card.input.size[1]}, strides {', '.join(map(str, strides_of(card)))} and "
        f"{len(card.labels)} labels it expects {expected}, the graph gives {given}. Correct the card's decoder, "
        "labels or input size."
    )

"""Heads without anchors: what they give, into candidates on the canvas, one function a family.

Formulas come from the papers and from permissively licensed code, named at each; YOLOv5 and v8 are read from the shape
of their exports and their public documentation.
"""

from __future__ import annotations

import numpy as np

from workbench.boxes import cxcywh_to_xyxy
from workbench.errors import Invalid
from workbench.inference.candidates import (
    Candidates,
    Outputs,
    cells,
    check_scores,
    columns_of,
    likely,
    misfit,
    named_outputs,
    only,
    points,
    select,
    sigmoid,
    softmax,
)
from workbench.inference.families import settings
from workbench.inference.nms import MAX_CANDIDATES, best
from workbench.model import ModelCard

# A side of exp(10) = 22,026 strides is beyond any frame; the limit keeps exp finite whatever the weights are.
MAX_LOG_SIDE = 10.0


def yolox(card: ModelCard, outputs: Outputs, least: np.ndarray) -> list[Candidates]:
    """(N, A, 5 + C): x, y as offsets of the cell, log width and height in strides, objectness, class scores (both after
    their sigmoid); score = objectness * class score (YOLOX, demo_utils.py demo_postprocess, yolo_head.py)."""
    corners, strides = points(card, centre=0)
    output = only(card, outputs, len(corners), 5 + len(card.labels))

    def found(raw: np.ndarray) -> Candidates:
        def boxes(at: np.ndarray) -> np.ndarray:
            centres = raw[at, :2] * strides[at, None] + corners[at]
            half = np.exp(np.minimum(raw[at, 2:4], MAX_LOG_SIDE)) * strides[at, None] / 2
            return np.concatenate([centres - half, centres + half], axis=1)

        return _with_objectness(card, raw, boxes, least)

    return [found(raw) for raw in output]


def nanodet(card: ModelCard, outputs: Outputs, least: np.ndarray) -> list[Candidates]:
    """(N, A, C + 4 * (reg_max + 1)): class scores after their sigmoid, then for left, top, right, bottom a distribution
    over 0..reg_max strides (GFL, Li et al., 2020), whose mean is the distance from the point; or scores and
    distributions as outputs of their own, over all levels or level by level, told apart by their shapes.

    NanoDet-Plus, nanodet_plus_head.py: get_single_level_center_priors puts points at corners of cells, not in their
    middle; _forward_onnx applies the sigmoid; levels are ceil(side / stride) cells wide. The NanoDet before Plus has
    them in the middle (nanodet_head.py, get_single_level_center_point): "centre": 0.5.
    """
    given = settings(card.decoder)
    places, strides = points(card, float(given["centre"]))
    bins, classes = given["reg_max"] + 1, len(card.labels)
    scores, distributions = _scores_and_distributions(card, outputs, len(places), classes, 4 * bins)
    steps = np.arange(bins)

    def found(scores: np.ndarray, distributions: np.ndarray) -> Candidates:
        def boxes(at: np.ndarray) -> np.ndarray:
            shares = softmax(distributions[at].reshape(-1, 4, bins))
            distances = (shares @ steps) * strides[at, None]
            return np.concatenate([places[at] - distances[:, :2], places[at] + distances[:, 2:]], axis=1)

        return select(card, scores, boxes, least)[0]

    return [found(*one) for one in zip(scores, distributions)]


def _scores_and_distributions(
    card: ModelCard, outputs: Outputs, count: int, classes: int, sides: int
) -> tuple[np.ndarray, np.ndarray]:
    """(N, A, classes) and (N, A, sides) from one output, from two, or from two a level."""
    if len(outputs) == 1:
        output = only(card, outputs, count, classes + sides)
        return output[..., :classes], output[..., classes:]
    levels = [count] if len(outputs) == 2 else [columns * rows for columns, rows in cells(card)]
    left, parts = list(outputs.values()), ([], [])
    for level in levels:
        for part, width in zip(parts, (classes, sides)):
            at = next((at for at, one in enumerate(left) if one.ndim == 3 and one.shape[1:] == (level, width)), None)
            if at is not None:
                part.append(left.pop(at))
    if left or any(len(part) != len(levels) for part in parts):
        raise misfit(
            card,
            outputs,
            f"one output (n, {count}, {classes + sides}), or for each level (n, cells, {classes}) "
            f"and (n, cells, {sides}), with {', '.join(map(str, levels))} cells",
        )
    return np.concatenate(parts[0], axis=1), np.concatenate(parts[1], axis=1)


def fcos(card: ModelCard, outputs: Outputs, least: np.ndarray) -> list[Candidates]:
    """cls (N, A, C) and ctr (N, A, 1) logits, box (N, A, 4) left, top, right, bottom in strides from the point, which
    `centre` puts in the middle of its cell (0.5: Tian et al., FCOS, 2019) or at its corner (0: torchvision,
    models/detection/fcos.py); score as `score` says, default sqrt(sigmoid(cls) * sigmoid(ctr)) as torchvision."""
    given = settings(card.decoder)
    places, strides = points(card, float(given["centre"]))
    is_root = given["score"].replace(" ", "").startswith("sqrt")
    names = {"cls": "cls_logits", "box": "bbox_regression", "ctr": "bbox_ctrness"}
    (logits, distances, centredness), wanted = named_outputs(
        card, outputs, names, [f"(n, {len(places)}, {width})" for width in (len(card.labels), 4, 1)]
    )
    columns = columns_of(card, logits.shape[2]) if logits.ndim == 3 else None
    for output, width in ((logits, logits.shape[-1]), (distances, 4), (centredness, 1)):
        if columns is None or output.ndim != 3 or output.shape[1:] != (len(places), width):
            raise misfit(card, outputs, wanted)

    def found(logits: np.ndarray, distances: np.ndarray, centredness: np.ndarray) -> Candidates:
        def boxes(at: np.ndarray) -> np.ndarray:
            pixels = distances[at] * strides[at, None]
            return np.concatenate([places[at] - pixels[:, :2], places[at] + pixels[:, 2:]], axis=1)

        # Centre-ness is at most 1, so a class score below the threshold (its square under a root) cannot pass.
        rows = likely(logits, least**2 if is_root else least)
        scores = sigmoid(logits[rows]) * sigmoid(centredness[rows])
        return select(card, np.sqrt(scores) if is_root else scores, boxes, least, rows)[0]

    return [found(*one) for one in zip(logits[..., columns], distances, centredness)]


def yolov5(card: ModelCard, outputs: Outputs, least: np.ndarray) -> list[Candidates]:
    """(N, A, 5 + C): centre x, y, width, height in canvas pixels, objectness, class scores, all as the exported graph
    decoded them; score = objectness * class score. A counts `anchors_per_cell` anchors at every cell of every level."""
    count = len(points(card, 0)[0]) * settings(card.decoder)["anchors_per_cell"]
    output = only(card, outputs, count, 5 + len(card.labels))
    return [_with_objectness(card, raw, lambda at, raw=raw: cxcywh_to_xyxy(raw[at, :4]), least) for raw in output]


def yolov8(card: ModelCard, outputs: Outputs, least: np.ndarray) -> list[Candidates]:
    """(N, 4 + C, A), or (N, A, 4 + C): centre x, y, width, height in canvas pixels, class scores after their sigmoid,
    no objectness; v8, v9 and v11 exports are read the same way."""
    count, width = len(points(card, 0)[0]), 4 + len(card.labels)
    if len(outputs) != 1:
        raise misfit(card, outputs, f"one output (n, {width}, {count})")
    return [rows_of_boxes(card, raw, least)[0] for raw in upright(card, outputs, next(iter(outputs.values())), width)]


def upright(card: ModelCard, outputs: Outputs, output: np.ndarray, width: int) -> np.ndarray:
    """(N, A, width), from that or from (N, width, A), the published order, which is taken where both would fit."""
    count = len(points(card, 0)[0])
    if output.ndim == 3 and output.shape[1:] == (width, count):
        return output.transpose(0, 2, 1)
    if output.ndim == 3 and output.shape[1:] == (count, width):
        return output
    raise misfit(card, outputs, f"(n, {width}, {count}) or (n, {count}, {width})")


def rows_of_boxes(card: ModelCard, raw: np.ndarray, least: np.ndarray) -> tuple[Candidates, np.ndarray]:
    """Candidates of (A, 4 + C ...) rows and the row of each."""
    return select(card, raw[:, 4 : 4 + len(card.labels)], lambda at: cxcywh_to_xyxy(raw[at, :4]), least)


def detr(card: ModelCard, outputs: Outputs, least: np.ndarray) -> list[Candidates]:
    """pred_logits (N, Q, C + 1) and pred_boxes (N, Q, 4) centre x, y, width, height as shares of the canvas.

    "softmax": the last column is "no object" and a query says its best label (Carion et al., DETR, 2020; detr.py
    PostProcess). "sigmoid": C columns, the best of all (query, label) pairs (Deformable DETR, RT-DETR; PostProcess of
    deformable_detr.py). No NMS: the queries were trained to be different objects.
    """
    is_softmax = settings(card.decoder)["score"] == "softmax"
    (logits, boxes), expected = named_outputs(
        card,
        outputs,
        {"cls": "pred_logits", "box": "pred_boxes"},
        [f"(n, q, {len(card.labels) + is_softmax})", "(n, q, 4)"],
    )
    columns = columns_of(card, logits.shape[-1], spare=int(is_softmax)) if logits.ndim == 3 else None
    if columns is None or boxes.shape != (*logits.shape[:2], 4):
        raise misfit(card, outputs, expected)
    canvas = np.tile(card.input.size, 2)

    def found(logits: np.ndarray, boxes: np.ndarray) -> Candidates:
        if is_softmax:
            scores = softmax(logits)[:, columns]
            scores = np.where(scores == scores.max(axis=1, keepdims=True), scores, 0)
        else:
            scores = sigmoid(logits)[:, columns]
        return select(card, scores, lambda at: cxcywh_to_xyxy(boxes[at]) * canvas, least)[0]

    if boxes.size and (boxes.min() < -1 or boxes.max() > 2):
        raise Invalid(
            f"{card.onnx} of {card.ref}: boxes reach from {boxes.min():.3g} to {boxes.max():.3g}, the detr "
            "decoder expects shares of the image, 0..1. Export the model without its scaling to pixels."
        )
    return [found(*one) for one in zip(logits, boxes)]


def detections(card: ModelCard, outputs: Outputs, least: np.ndarray) -> list[Candidates]:
    """boxes (N, K, 4) xyxy in canvas pixels, scores (N, K) in 0..1, labels (N, K) class ids from 0: what a graph that
    decodes itself gives (two-stage detectors, exports with NMS inside). Rows that say nothing have a score of 0."""
    (boxes, scores, labels), expected = named_outputs(
        card, outputs, {"box": "boxes", "score": "scores", "label": "labels"}, ["(n, k, 4)", "(n, k)", "(n, k)"])
    if boxes.ndim != 3 or boxes.shape[2] != 4 or scores.shape != boxes.shape[:2] or labels.shape != scores.shape:
        raise misfit(card, outputs, expected)
    ids = labels.astype(np.int64)
    is_said = scores > 0
    if (ids != labels)[is_said].any() or (ids < 0)[is_said].any() or (ids >= len(card.labels))[is_said].any():
        raise Invalid(f"{card.onnx} of {card.ref}: its labels reach from {labels[is_said].min():g} to "
                      f"{labels[is_said].max():g}, the card has {len(card.labels)} labels and expects whole numbers from 0. "
                      "Correct the card's labels or the graph.")

    def found(boxes: np.ndarray, scores: np.ndarray, ids: np.ndarray) -> Candidates:
        rows = np.nonzero(scores > least.min())[0]
        by_label = np.zeros((len(rows), len(card.labels)), np.float32)
        by_label[np.arange(len(rows)), ids[rows]] = scores[rows]
        return select(card, by_label, lambda at: boxes[at], least, rows)[0]

    return [found(*one) for one in zip(boxes, scores, ids)]


def classification(card: ModelCard, outputs: Outputs, least: np.ndarray) -> list[Candidates]:
    """(N, C) logits or probabilities of the whole frame; each candidate has the whole canvas for its box.

    `score`: "softmax" (one label applies), "sigmoid" (any number do), "probabilities" (the graph made them already).
    `top_k`: at most so many tags; default 1 with softmax, else all above their threshold.
    """
    given = settings(card.decoder)
    output = next(iter(outputs.values()))
    flat = output.reshape(len(output), -1) if output.ndim >= 2 else output
    columns = columns_of(card, flat.shape[1]) if flat.ndim == 2 and len(outputs) == 1 else None
    if columns is None or any(side != 1 for side in output.shape[2:]):
        raise misfit(card, outputs, f"one output (n, {len(card.labels)})")
    scores = {"softmax": softmax, "sigmoid": sigmoid, "probabilities": np.asarray}[given["score"]](flat)[:, columns]
    check_scores(card, scores)
    most = int(given.get("top_k", 1 if given["score"] == "softmax" else MAX_CANDIDATES))
    found = []
    for row in scores:
        _, class_ids = best(row[None], least, most)
        whole = np.tile([0, 0, *card.input.size], (len(class_ids), 1))
        found.append(Candidates(whole, class_ids, np.minimum(row[class_ids], 1)))
    return found


def _with_objectness(card: ModelCard, raw: np.ndarray, boxes, least: np.ndarray) -> Candidates:
    """Candidates of (A, 5 + C) rows whose score is objectness * class score."""
    check_scores(card, raw[:, 4:])
    rows = np.nonzero(raw[:, 4] > least.min())[0]  # class scores are at most 1
    return select(card, raw[rows, 5:] * raw[rows, 4:5], boxes, least, rows)[0]

"""Masks: instance and semantic heads into candidates, and masks on a model's canvas into polygons on the frame."""

from __future__ import annotations

import cv2
import numpy as np

from workbench.boxes import Detections
from workbench.errors import Invalid
from workbench.inference.candidates import (
    Candidates,
    Outputs,
    misfit,
    points,
    sigmoid,
    softmax,
)
from workbench.inference.families import settings
from workbench.inference.heads import rows_of_boxes, upright
from workbench.inference.letterbox import Letterbox
from workbench.inference.nms import MAX_DETECTIONS
from workbench.model import ModelCard

# How far a polygon may lie from the outline of its mask: what nobody can see.
SIMPLIFY_PX = 1.0
# Masks of smaller things are traced finer than a pixel, so that the stairs of a slanted edge stay small beside them.
FINE_SIDE_PX, FINEST = 512, 4
# The class id that PASCAL VOC, Cityscapes and ADE20K give pixels that count as nothing.
IGNORED = 255


def yolov8_seg(card: ModelCard, outputs: Outputs, least: np.ndarray) -> list[Candidates]:
    """One output (N, 4 + C + M, A), or its last two axes swapped, and M prototypes (N, M, h, w) over the whole canvas.

    The first 4 + C columns are those of yolov8; a mask's logits are its M coefficients times the prototypes, cut to its
    box (Bolya et al., YOLACT, 2019, section 3.1).
    """
    count, classes = len(points(card, 0)[0]), len(card.labels)
    expected = f"(n, {4 + classes} + m, {count}) and prototypes (n, m, h, w)"
    flat = [output for output in outputs.values() if output.ndim == 3]
    prototypes = [output for output in outputs.values() if output.ndim == 4]
    if len(outputs) != 2 or len(flat) != 1 or len(prototypes) != 1 or not _covers(card, prototypes[0]):
        raise misfit(card, outputs, expected)
    kinds = prototypes[0].shape[1]

    def found(raw: np.ndarray, prototypes: np.ndarray) -> Candidates:
        boxes, at = rows_of_boxes(card, raw, least)
        coefficients = raw[at, 4 + classes :]
        return Candidates(
            boxes.xyxy,
            boxes.class_id,
            boxes.confidence,
            mask=lambda index: np.tensordot(coefficients[index], prototypes, axes=1),
        )

    return [found(*one) for one in zip(upright(card, outputs, flat[0], 4 + classes + kinds), prototypes[0])]


def semantic(card: ModelCard, outputs: Outputs, least: np.ndarray) -> list[Candidates]:
    """(N, K, h, w) logits, or class ids (N, h, w) or (N, 1, h, w), over the whole canvas: each connected region of a
    label is one candidate, its confidence the mean probability of its pixels (1 for class ids).

    K is C, or C + 1 with a background; one channel for one label is its sigmoid's logit. `background`: the id that is
    no label, default 0 for class ids and where K = C + 1, null for none; the labels' ids follow in their order, or are
    `columns`. Id 255 is nothing.
    """
    output, classes = next(iter(outputs.values())), len(card.labels)
    is_ids = output.ndim == 3 or output.ndim == 4 and output.shape[1] == 1 and classes > 1
    background = card.decoder.get("background", 0 if is_ids or output.shape[1] == classes + 1 else None)
    named = card.decoder.get("columns") or [one for one in range(classes + 1) if one != background][:classes]
    kinds = max(*named, -1 if background is None else background) + 1
    is_fitting = (
        is_ids
        or output.ndim == 4
        and (output.shape[1] == kinds or "columns" in card.decoder and output.shape[1] > kinds)
    )
    if len(outputs) != 1 or output.ndim not in (3, 4) or not is_fitting or not _covers(card, output):
        raise misfit(card, outputs, f"one output (n, {classes}, h, w), (n, {classes + 1}, h, w) or (n, h, w)")
    found = []
    for raw in output:
        if is_ids:
            ids, certain = _ids(card, raw.reshape(raw.shape[-2:]), kinds - 1), None
        elif len(raw) == 1:
            certain = sigmoid(raw[0])
            ids = np.where(certain > 0.5, named[0], -1)
        else:
            ids = raw.argmax(axis=0)
            certain = softmax(raw, axis=0).max(axis=0)
        found.append(_regions(card, ids, certain, named, least))
    return found


def outlined(
    card: ModelCard, candidates: Candidates, kept: np.ndarray, boxes: np.ndarray, box: Letterbox
) -> Detections:
    """The kept candidates as Detections in the frame, with polygons where the model makes masks.

    kept   indices that NMS left
    boxes  (n, 4) xyxy in the frame of all candidates

    A mask that is empty inside its box draws nothing, so its candidate is left out.
    """
    if candidates.mask is None:
        return Detections(boxes[kept], candidates.class_id[kept], candidates.confidence[kept])
    polygons = [polygon_of(candidates.mask(int(index)), boxes[index], box, card.input.size) for index in kept]
    there = np.array([polygon is not None for polygon in polygons], bool)
    kept = np.asarray(kept, int)[there]
    return Detections(
        boxes[kept],
        candidates.class_id[kept],
        candidates.confidence[kept],
        polygons=tuple(polygon for polygon in polygons if polygon is not None),
    )


def polygon_of(mask: np.ndarray, xyxy: np.ndarray, box: Letterbox, canvas: tuple[int, int]) -> np.ndarray | None:
    """The largest outer outline of what is above 0 in a mask, as (k, 2) x, y in pixels of the frame, or None.

    mask    (h, w) float32 over the whole canvas, at any resolution
    xyxy    the box in the frame that it is cut to
    canvas  (width, height) in pixels

    The mask is interpolated at the middle of every frame pixel (of every part of one, for small things), through the
    letterbox's own numbers; the outline runs along the pixels' edges and is simplified within SIMPLIFY_PX.
    """
    x1, y1, x2, y2 = np.round(xyxy).astype(int)
    width, height = max(1, x2 - x1), max(1, y2 - y1)
    fine = min(FINEST, max(1, FINE_SIDE_PX // max(width, height)))
    rows = []
    for start, scale, offset, side, cells in zip((x1, y1), box.scale, box.offset, canvas, mask.shape[::-1]):
        # Part i of the frame has its middle at start + (i + 0.5) / fine; the mask's cell j has its at (j + 0.5) * side
        # / cells on the canvas.
        gain = scale * cells / side
        rows.append((gain / fine, (start + 0.5 / fine) * gain + offset * cells / side - 0.5))
    to_mask = np.array([[rows[0][0], 0, rows[0][1]], [0, rows[1][0], rows[1][1]]])
    values = cv2.warpAffine(
        np.asarray(mask, np.float32),
        to_mask,
        (width * fine, height * fine),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    # A corner between pixels belongs to the thing when one of the four around it does, so that the outline of corners
    # surrounds the pixels instead of joining their middles.
    corners = cv2.dilate(
        np.pad((values > 0).astype(np.uint8), ((0, 1), (0, 1))), np.ones((2, 2), np.uint8), anchor=(1, 1)
    )
    outlines, _ = cv2.findContours(corners, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    if not outlines:
        return None
    largest = max(outlines, key=cv2.contourArea)
    outline = cv2.approxPolyDP(largest, SIMPLIFY_PX * fine, True).reshape(-1, 2)
    if len(outline) < 3:  # thinner than the simplification
        outline = largest.reshape(-1, 2)
    return (outline / fine + (x1, y1)).astype(np.float32) if len(outline) >= 3 else None


def _regions(
    card: ModelCard, ids: np.ndarray, certain: np.ndarray | None, named: list[int], least: np.ndarray
) -> Candidates:
    """Connected regions (8 neighbours) of each label in (h, w) class ids, the surest and largest first."""
    height, width = ids.shape
    across, down = card.input.size[0] / width, card.input.size[1] / height
    smallest = settings(card.decoder)["min_area"] / (across * down)
    rows, marked = [], []
    for class_id, column in enumerate(named):
        count, regions, stats, _ = cv2.connectedComponentsWithStats((ids == column).astype(np.uint8), connectivity=8)
        sums = np.bincount(regions.ravel(), None if certain is None else certain.ravel(), count)
        for region in range(1, count):
            x, y, w, h, area = stats[region]
            confidence = sums[region] / area
            if area >= smallest and confidence > least[class_id]:
                rows.append((confidence, area, class_id, (x * across, y * down, (x + w) * across, (y + h) * down)))
                marked.append((regions, region))
    order = sorted(range(len(rows)), key=lambda at: (-rows[at][0], -rows[at][1]))
    order = order[: int(card.decoder.get("max_detections", MAX_DETECTIONS))]
    return Candidates(
        np.array([rows[at][3] for at in order], np.float32).reshape(-1, 4),
        np.array([rows[at][2] for at in order], int),
        np.minimum([rows[at][0] for at in order], 1),
        mask=lambda index: np.where(
            marked[order[index]][0] == marked[order[index]][1], np.float32(0.5), np.float32(-0.5)
        ),
    )


def _ids(card: ModelCard, raw: np.ndarray, highest: int) -> np.ndarray:
    """Class ids as whole numbers, -1 where they are ignored."""
    ids = np.where((raw == IGNORED) & (highest < IGNORED), -1, raw)
    if (ids != np.round(ids)).any() or ids.min() < -1 or ids.max() > highest:
        raise Invalid(
            f"{card.onnx} of {card.ref}: class ids reach from {ids.min():g} to {ids.max():g}, the card's labels "
            f"and background stand for whole numbers 0..{highest}. Correct its labels, columns or background."
        )
    return ids.astype(int)


def _covers(card: ModelCard, output: np.ndarray) -> bool:
    """Whether a map has the shape of the canvas: a cell as wide as high, within one cell of rounding."""
    (width, height), (rows, columns) = card.input.size, output.shape[-2:]
    return min(rows, columns) > 1 and abs(width / columns - height / rows) <= max(width / columns, height / rows) / min(
        rows, columns
    )

"""What every decoder needs: candidates from scores, points of a grid, the fit of a graph's outputs to its card."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from workbench.boxes import Detections
from workbench.errors import Invalid
from workbench.inference.families import settings
from workbench.inference.nms import MAX_CANDIDATES, best
from workbench.model import ModelCard

Outputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Candidates(Detections):
    """Detections on a model's canvas, best first, before NMS.

    mask  index -> (h, w) float32 over the whole canvas at any resolution, above 0 inside the thing; None: boxes only
    """

    mask: Callable[[int], np.ndarray] | None = None


def select(
    card: ModelCard,
    scores: np.ndarray,
    boxes: Callable[[np.ndarray], np.ndarray],
    least: np.ndarray,
    rows: np.ndarray | None = None,
) -> tuple[Candidates, np.ndarray]:
    """The best candidates of scores (A, C) in 0..1 above `least` (C,), and the point (A) each came from.

    boxes  indices of points -> (k, 4) xyxy in canvas pixels; only asked for the candidates
    rows   the point of each row of `scores`, where only some points are scored

    Raises Invalid for a score outside 0..1.
    """
    # What follows looks at every score several times; in rows apart from each other that takes four times as long.
    scores = np.ascontiguousarray(scores)
    check_scores(card, scores)
    at, class_ids = best(scores, least, int(card.decoder.get("max_candidates", MAX_CANDIDATES)))
    confidence, at = np.minimum(scores[at, class_ids], 1), at if rows is None else rows[at]
    return Candidates(boxes(at), class_ids, confidence), at


def check_scores(card: ModelCard, scores: np.ndarray) -> None:
    if scores.size and (scores.min() < 0 or scores.max() > 1 + 1e-3):
        raise Invalid(
            f"{card.onnx} of {card.ref}: scores reach from {scores.min():.3g} to {scores.max():.3g}, the "
            f"{card.decoder['name']} decoder expects 0..1. Export the model with its sigmoid inside."
        )


def likely(logits: np.ndarray, least: np.ndarray) -> np.ndarray:
    """The rows of (A, C) logits in which some sigmoid exceeds its `least`: comparing logits spares exponentials."""
    with np.errstate(divide="ignore"):
        floor = np.log(least) - np.log1p(-least)
    # A hair lower, so that rounding never drops what the score itself would keep.
    rows = np.flatnonzero(logits >= (floor - 1e-3).astype(np.float32)) // len(least)
    # Few pass, so dropping repetitions is far cheaper than asking every row for any().
    return rows[np.diff(rows, prepend=-1) > 0]


def sigmoid(logits: np.ndarray) -> np.ndarray:
    # Beyond +-80 a float32 sigmoid is 0 or 1 anyway, and exp stays finite.
    return 1 / (1 + np.exp(-np.clip(logits, -80, 80)))


def softmax(logits: np.ndarray, axis: int = -1) -> np.ndarray:
    shares = np.exp(logits - logits.max(axis=axis, keepdims=True))
    return shares / shares.sum(axis=axis, keepdims=True)


def strides_of(card: ModelCard) -> tuple[int, ...]:
    return tuple(settings(card.decoder)["strides"])


def cells(card: ModelCard) -> list[tuple[int, int]]:
    """(columns, rows) of each level: a side that its stride does not divide has one cell more."""
    return [tuple(math.ceil(side / stride) for side in card.input.size) for stride in strides_of(card)]


def points(card: ModelCard, centre: float) -> tuple[np.ndarray, np.ndarray]:
    """Where a head looks: (A, 2) x, y in canvas pixels and (A,) strides, level after level, each row by row.

    centre  0.5 for points in the middle of their cell, 0 for its top left corner
    """
    return _points(tuple(cells(card)), strides_of(card), centre)


@lru_cache(maxsize=32)
def _points(
    levels: tuple[tuple[int, int], ...], strides: tuple[int, ...], centre: float
) -> tuple[np.ndarray, np.ndarray]:
    positions, steps = [], []
    for (columns, rows), stride in zip(levels, strides):
        xs, ys = np.meshgrid(np.arange(columns), np.arange(rows))
        positions.append((np.stack([xs.ravel(), ys.ravel()], axis=1) + centre) * stride)
        steps.append(np.full(columns * rows, float(stride)))
    found = np.concatenate(positions), np.concatenate(steps)
    for array in found:
        array.flags.writeable = False  # they are shared between calls
    return found


def columns_of(card: ModelCard, width: int, spare: int = 0, first: int = 0) -> np.ndarray | slice | None:
    """Which of `width` score columns each label has; None when the card does not fit them.

    spare, first  how many columns belong to no label where the card names none (background, "no object"), and where
                  the labels' begin then
    """
    named = card.decoder.get("columns")
    if named is not None:
        return np.array(named) if max(named) < width else None
    return slice(first, first + len(card.labels)) if width == len(card.labels) + spare else None


def named_outputs(
    card: ModelCard, outputs: Outputs, names: dict[str, str], shapes: Sequence[str]
) -> tuple[list[np.ndarray], str]:
    """Outputs in the order of `names` (part of the head -> its usual name), by the card's own names where it has some;
    and what is expected of them, for the text of an error."""
    wanted = [{**names, **card.decoder.get("outputs", {})}[part] for part in names]
    expected = " and ".join(f"{name} {shape}" for name, shape in zip(wanted, shapes))
    if any(name not in outputs for name in wanted):
        raise misfit(card, outputs, expected)
    return [outputs[name] for name in wanted], expected


def only(card: ModelCard, outputs: Outputs, rows: int, columns: int) -> np.ndarray:
    fitting = [output for output in outputs.values() if output.ndim == 3 and output.shape[1:] == (rows, columns)]
    if len(outputs) != 1 or not fitting:
        raise misfit(card, outputs, f"one output (n, {rows}, {columns})")
    return fitting[0]


def misfit(card: ModelCard, outputs: Outputs, expected: str) -> Invalid:
    given = ", ".join(f"{name} {output.shape}" for name, output in outputs.items())
    strides = settings(card.decoder).get("strides", ())
    said = f", strides {', '.join(map(str, strides))}" if strides else ""
    return Invalid(
        f"{card.onnx} of {card.ref} does not fit the {card.decoder['name']} decoder: for input "
        f"{card.input.size[0]}x{card.input.size[1]}{said} and {len(card.labels)} labels it expects {expected}, the "
        f"graph gives {given}. Correct the card's decoder, labels or input size."
    )

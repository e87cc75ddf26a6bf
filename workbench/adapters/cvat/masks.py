"""A COCO run-length mask of a frame <-> the points of a CVAT mask.

COCO: column by column over the whole frame, the counts packed into text (pycocotools, maskApi.c, rleToString).
CVAT: row by row over the bounding box, [background, foreground, background, ..., left, top, right, bottom], the last
two inclusive (CVAT documentation, "mask" of the annotation format; recorded in d_annotations: line 6).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from workbench.errors import Invalid


def to_points(mask: dict[str, Any]) -> list[float]:
    """The points of CVAT for a COCO mask. Raises Invalid for one that is empty or does not fill its size."""
    height, width = mask["size"]
    counts = _unpack(mask["counts"])
    if sum(counts) != height * width or min(counts, default=0) < 0:
        raise Invalid(f"A mask of {height} x {width} has runs of {sum(counts)} pixels; they must fill it.")
    inside = np.repeat(np.arange(len(counts)) % 2, counts).astype(bool).reshape(width, height).T
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    if not len(rows):
        raise Invalid("A mask has no pixel; delete the annotation instead.")
    top, bottom, left, right = rows[0], rows[-1], columns[0], columns[-1]
    runs = _runs(inside[top:bottom + 1, left:right + 1].ravel())
    return [float(value) for value in (*runs, left, top, right, bottom)]


def to_coco(points: Sequence[float], width: int, height: int) -> dict[str, Any] | None:
    """The COCO mask of a frame for CVAT's points, cut to the frame; None when nothing of it lies there.

    CVAT stores runs that do not fill their box as they came (recorded: d_annotations_update 13); missing ones are
    background, surplus ones are left out.
    """
    if len(points) < 5 or not np.isfinite(points).all():
        return None
    *runs, left, top, right, bottom = (int(value) for value in points)
    if right < left or bottom < top or min(runs) < 0:
        return None
    size = (bottom - top + 1, right - left + 1)
    if size[0] * size[1] > 4 * max(width, height) ** 2:
        return None
    flat = np.repeat(np.arange(len(runs)) % 2, np.minimum(runs, size[0] * size[1])).astype(bool)[:size[0] * size[1]]
    box = np.zeros(size[0] * size[1], bool)
    box[:len(flat)] = flat
    inside = np.zeros((height, width), bool)
    y1, x1, y2, x2 = max(top, 0), max(left, 0), min(bottom + 1, height), min(right + 1, width)
    if y2 <= y1 or x2 <= x1:
        return None
    inside[y1:y2, x1:x2] = box.reshape(size)[y1 - top:y2 - top, x1 - left:x2 - left]
    if not inside.any():
        return None
    return {"size": [height, width], "counts": _pack(_runs(inside.T.ravel()))}


def _runs(flat: np.ndarray) -> list[int]:
    """Lengths of the runs of a boolean row, beginning with background (0 when there is none)."""
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate(([0], edges, [len(flat)]))).tolist()
    return [0, *runs] if flat[0] else runs


def _pack(counts: Sequence[int]) -> str:
    """pycocotools' rleToString: from the third on each count is the difference to the one two before it, in groups of
    5 bits with a sign, lowest first, bit 6 for "more follows", shifted into printable characters by 48."""
    text = []
    for index, count in enumerate(counts):
        value = count - counts[index - 2] if index > 2 else count
        is_more = True
        while is_more:
            bits = value & 0x1F
            value >>= 5
            is_more = value != (-1 if bits & 0x10 else 0)
            text.append(chr((bits | 0x20 if is_more else bits) + 48))
    return "".join(text)


def _unpack(text: str | Sequence[int]) -> list[int]:
    if not isinstance(text, str):
        return [int(value) for value in text]
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise Invalid("A mask's counts hold characters that no COCO mask has.")
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            if bits & 0x10:
                value -= 1 << shift
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value = shift = 0
    return counts

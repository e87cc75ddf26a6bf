"""Outlines: COCO masks and shapes of several parts as the one closed polygon that an annotation has.

Parts and holes are joined into one ring by two edges that lie on each other, at the closest two points, as YOLO's
converters do it (Ultralytics, data/converter.py, merge_multi_segment). The edges have no area; a hole runs the other way
round, so that it stays empty under either rule of filling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from workbench.errors import Invalid

# Of more parts (the specks of a noisy mask) the largest are taken.
MOST_RINGS = 64
MOST_PIXELS, MOST_SIDE = 50_000_000, 4096


def joined(rings: Sequence[np.ndarray]) -> np.ndarray:
    """(n, 2) one ring of several (k, 2) rings; the largest begins, each of the others is joined at its closest point."""
    from scipy.spatial import cKDTree

    whole, *others = sorted(rings, key=lambda ring: -abs(_signed_area(ring)))
    for ring in others[:MOST_RINGS - 1]:
        distances, nearest = cKDTree(ring).query(whole)
        at = int(distances.argmin())
        turned = np.roll(ring, -int(nearest[at]), axis=0)
        whole = np.concatenate([whole[:at + 1], turned, turned[:1], whole[at:]])
    return whole


def of_parts(parts: Sequence[np.ndarray]) -> np.ndarray:
    """(n, 2) one ring around all (k, 2) parts of a thing, none of which is a hole; where parts overlap, around both."""
    rings = [ring if _signed_area(ring) > 0 else ring[::-1] for ring in parts if abs(_signed_area(ring)) > 0]
    if not rings:
        return np.asarray(parts[0], float)
    if len(rings) > 1 and any(_overlap(one, other) for at, one in enumerate(rings) for other in rings[:at]):
        low = np.min([ring.min(axis=0) for ring in rings], axis=0)
        sides = np.max([ring.max(axis=0) for ring in rings], axis=0) - low
        # fillPoly draws the border's pixels whole; at this scale that is half of what nobody can see.
        fine = min(8.0, MOST_SIDE / sides.max())
        mask = np.zeros(np.ceil(sides[::-1] * fine).astype(int) + 1, np.uint8)
        for ring in rings:
            cv2.fillPoly(mask, [np.round((ring - low) * fine - 0.5).astype(np.int32)], 1)
        return of_mask(mask) / fine + low
    return joined(rings)


def of_mask(mask: np.ndarray) -> np.ndarray:
    """(n, 2) one ring around what is above 0 in an (h, w) mask, along the edges of its pixels, with its holes and its
    parts (8 neighbours). Raises Invalid for an empty mask."""
    ys, xs = np.nonzero(mask)
    if not len(xs):
        raise Invalid("its mask is empty")
    low = np.array([xs.min(), ys.min()])
    inside = (mask[low[1]:ys.max() + 1, low[0]:xs.max() + 1] > 0).astype(np.uint8)
    # Every pixel becomes four, so that even a single one has an outline with an area.
    found, tree = cv2.findContours(inside.repeat(2, 0).repeat(2, 1), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    rings = []
    for contour, (_, _, _, parent) in zip(found, tree[0]):
        ring = _on_edges(contour.reshape(-1, 2)) + low
        # Parts run one way round, holes the other.
        rings.append(ring if (_signed_area(ring) > 0) == (parent < 0) else ring[::-1])
    return joined(rings)


def decode_rle(rle: dict[str, Any]) -> np.ndarray:
    """(h, w) uint8 mask of COCO's run-length encoding, runs column by column from zeros on, as a list of counts or as
    pycocotools' string (cocodataset/cocoapi, common/maskApi.c, rleFrString). Raises Invalid with the reason."""
    size, counts = rle.get("size"), rle.get("counts")
    if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
        raise Invalid(f"its mask has the size {str(size)[:40]} instead of [height, width]")
    if size[0] * size[1] > MOST_PIXELS:
        raise Invalid(f"its mask of {size[1]} x {size[0]} pixels is larger than any picture that is taken")
    if isinstance(counts, str):
        counts = _counts(counts)
    if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
        raise Invalid("its mask's counts are neither a string nor a list of whole numbers from 0 on")
    if sum(counts) != size[0] * size[1]:
        raise Invalid(f"its mask's counts are {sum(counts)} pixels together, the size [{size[0]}, {size[1]}] has "
                      f"{size[0] * size[1]}")
    values = np.repeat(np.arange(len(counts)) % 2, counts).astype(np.uint8)
    return values.reshape(size[1], size[0]).T


def _counts(text: str) -> list[int]:
    """Whole numbers in groups of 5 bits, a sixth for "more follows", from the third number on less the last but one."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            raise Invalid("its mask's string is no run-length encoding")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise Invalid("its mask's string ends in the middle of a number")
    return counts


def _on_edges(ring: np.ndarray) -> np.ndarray:
    """An outline through the middles of quarter pixels, moved onto the edges of the pixels, without the points that lie
    on a straight line. Around a hole the outline runs through the quarters around it, so that the same edges come out."""
    # Of pixel k the quarters are 2 k, at its edge k, and 2 k + 1, at its edge k + 1.
    corners = (ring + 1) // 2
    corners = corners[(corners != np.roll(corners, 1, axis=0)).any(axis=1)]
    before, after = corners - np.roll(corners, 1, axis=0), np.roll(corners, -1, axis=0) - corners
    return corners[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]].astype(float)


def _signed_area(ring: np.ndarray) -> float:
    x, y = np.asarray(ring, float).T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def _overlap(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether a corner of one of two polygons lies inside the other."""
    if (one.max(axis=0) <= other.min(axis=0)).any() or (other.max(axis=0) <= one.min(axis=0)).any():
        return False
    return any(cv2.pointPolygonTest(ring.astype(np.float32), tuple(map(float, point)), False) > 0
               for ring, points in ((one, other), (other, one)) for point in points)

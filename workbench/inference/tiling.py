"""Tiling: a large frame looked at piece by piece, so that small objects are large enough for the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from workbench.boxes import Detections
from workbench.errors import Invalid
from workbench.inference.detector import Detector
from workbench.inference.nms import nms

# Within so many pixels of an inner border of its tile a box may be a part of a larger object.
BORDER_PX = 4.0
# A part goes when so much of it lies in a whole box of its label: what the tile saw of that object.
COVERED = 0.7
# Two parts are one object when, along their common border, they span the same stretch by at least this IoU.
SAME_STRETCH = 0.5


@dataclass(frozen=True)
class Tiling:
    """How a frame is cut.

    size     side of a tile in pixels of the frame
    overlap  share of a tile that the next one repeats, 0..0.9: an object smaller than that is whole in one of them
    whole    also look at the whole frame, for objects larger than a tile

    Raises Invalid for other values.
    """

    size: int
    overlap: float = 0.2
    whole: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or not 32 <= self.size <= 8192:
            raise Invalid(f"Tile size {self.size!r} must be a whole number of pixels, 32..8192.")
        if isinstance(self.overlap, bool) or not isinstance(self.overlap, (int, float)) or not 0 <= self.overlap <= 0.9:
            raise Invalid(f"Tile overlap {self.overlap!r} must be a share of the tile, 0..0.9.")

    def tiles(self, width: int, height: int) -> list[tuple[int, int, int, int]]:
        """(x1, y1, x2, y2) of the tiles that cover a frame, row by row; the last ones end at its border. A frame that
        is no larger than a tile is one tile."""
        return [(x, y, min(x + self.size, width), min(y + self.size, height))
                for y in self._starts(height) for x in self._starts(width)]

    def _starts(self, side: int) -> list[int]:
        if side <= self.size:
            return [0]
        step = max(1, round(self.size * (1 - self.overlap)))
        # Spread evenly, so that the last overlap is not larger than the others.
        count = -(-(side - self.size) // step) + 1
        return [round(index * (side - self.size) / (count - 1)) for index in range(count)]


def detect_tiles(detector: Detector, image: np.ndarray, tiling: Tiling, batch: int = 1) -> Detections:
    """What a detector finds in an (H, W, 3) uint8 RGB image cut into tiles, in the image's pixels, best first.

    batch  tiles a run of the graph

    Raises Invalid for a model that does not draw boxes.
    """
    if detector.card.task != "boxes":
        raise Invalid(f"{detector.card.ref} draws {detector.card.task}; only models that draw boxes can look at tiles. "
                      "Leave tiling off.")
    height, width = image.shape[:2]
    tiles = tiling.tiles(width, height)
    views = tiles + [(0, 0, width, height)] * (tiling.whole and len(tiles) > 1)
    found: list[Detections] = []
    for start in range(0, len(views), batch):
        part = [detector.prepare(np.ascontiguousarray(image[y1:y2, x1:x2]))
                for x1, y1, x2, y2 in views[start:start + batch]]
        filled = part + [part[-1]] * (batch - len(part)) if detector.batch_is_dynamic else part
        found += detector.detect_prepared(filled)[:len(part)]
    return merge(found, views, (width, height), detector.iou, detector.most)


def merge(found: Sequence[Detections], views: Sequence[tuple[int, int, int, int]], size: tuple[int, int],
          threshold: float, most: int | None = None) -> Detections:
    """Detections of overlapping views of one frame as the frame's own.

    found      one per view, in the view's pixels
    views      (x1, y1, x2, y2) in the frame
    size       (width, height) of the frame
    threshold  IoU above which the worse of two boxes of a label goes
    most       boxes kept at most in each view; a frame may have so many for each

    A box that ends at an inner border of its view may be a part. It goes where a whole box of its label covers it;
    parts that meet across a border become one box with the best of their confidences; others stay as they are.
    """
    boxes = [one.xyxy + np.array(view[:2] * 2, np.float32) for one, view in zip(found, views, strict=True)]
    every = _Boxes(np.concatenate(boxes), np.concatenate([one.class_id for one in found]),
                   np.concatenate([one.confidence for one in found]),
                   np.concatenate([_cut(box, view, size) for box, view in zip(boxes, views)]))
    is_part = every.cut.any(axis=1)
    # Apart from each other, so that a part with a higher confidence does not put a whole box out.
    whole, parts = (one.at(nms(one.xyxy, one.confidence, one.class_id, threshold, len(one.xyxy)))
                    for one in (every.at(~is_part), every.at(is_part)))
    joined = _joined(parts.at(~_covered(parts, whole)))
    xyxy = np.concatenate([whole.xyxy, joined.xyxy])
    class_id = np.concatenate([whole.class_id, joined.class_id])
    confidence = np.concatenate([whole.confidence, joined.confidence])
    order = nms(xyxy, confidence, class_id, threshold, len(xyxy) if most is None else most * len(views))
    return Detections(xyxy[order], class_id[order], confidence[order])


@dataclass(frozen=True)
class _Boxes:
    """cut: (n, 4) bool, which of x1, y1, x2, y2 may be the view's border instead of the object's."""

    xyxy: np.ndarray
    class_id: np.ndarray
    confidence: np.ndarray
    cut: np.ndarray

    def at(self, index: np.ndarray) -> _Boxes:
        return _Boxes(self.xyxy[index], self.class_id[index], self.confidence[index], self.cut[index])


def _cut(boxes: np.ndarray, view: tuple[int, int, int, int], size: tuple[int, int]) -> np.ndarray:
    border = np.array(view, float)
    # The frame's own border cuts nothing that anybody could see.
    is_inner = np.array([view[0] > 0, view[1] > 0, view[2] < size[0], view[3] < size[1]])
    return (np.abs(boxes - border) <= BORDER_PX) & is_inner


def _covered(parts: _Boxes, whole: _Boxes) -> np.ndarray:
    top_left = np.maximum(parts.xyxy[:, None, :2], whole.xyxy[None, :, :2])
    bottom_right = np.minimum(parts.xyxy[:, None, 2:], whole.xyxy[None, :, 2:])
    shared = np.clip(bottom_right - top_left, 0, None).prod(axis=2)
    area = np.maximum((parts.xyxy[:, 2:] - parts.xyxy[:, :2]).prod(axis=1), 1e-6)
    same = parts.class_id[:, None] == whole.class_id[None]
    return ((shared / area[:, None] >= COVERED) & same).any(axis=1)


def _joined(parts: _Boxes) -> _Boxes:
    """Parts that meet become their hull, the best fitting first, until none meet any more: an object may lie across
    more than two tiles."""
    while len(parts.xyxy) > 1:
        fit = _fit(parts)
        one, other = np.unravel_index(fit.argmax(), fit.shape)
        if fit[one, other] < SAME_STRETCH:
            break
        hull = _hull(parts.at(np.array([one])), parts.at(np.array([other])))
        rest = parts.at(np.delete(np.arange(len(parts.xyxy)), [one, other]))
        parts = _Boxes(*(np.concatenate([getattr(hull, name), getattr(rest, name)])
                         for name in ("xyxy", "class_id", "confidence", "cut")))
    return parts


def _fit(parts: _Boxes) -> np.ndarray:
    """(n, n): how well box j goes on where box i was cut at its right or lower side, as the IoU of the stretches they
    span along that border; 0 where it does not."""
    found = np.zeros((len(parts.xyxy), len(parts.xyxy)))
    for axis in (0, 1):
        start, end = parts.xyxy[:, axis].astype(float), parts.xyxy[:, axis + 2].astype(float)
        low, high = parts.xyxy[:, 1 - axis].astype(float), parts.xyxy[:, 3 - axis].astype(float)
        shared = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)
        spanned = np.maximum(high[:, None], high) - np.minimum(low[:, None], low)
        goes_on = (parts.cut[:, None, axis + 2] & parts.cut[None, :, axis] & (start[:, None] <= start)
                   & (start <= end[:, None] + 2 * BORDER_PX) & (parts.class_id[:, None] == parts.class_id))
        np.fill_diagonal(goes_on, False)
        found = np.maximum(found, np.where(goes_on, np.clip(shared, 0, None) / np.maximum(spanned, 1e-6), 0))
    return found


def _hull(one: _Boxes, other: _Boxes) -> _Boxes:
    """A side of the hull is cut where the box that reaches further there is."""
    from_one = np.concatenate([one.xyxy[:, :2] <= other.xyxy[:, :2], one.xyxy[:, 2:] >= other.xyxy[:, 2:]], axis=1)
    return _Boxes(np.where(from_one, one.xyxy, other.xyxy), one.class_id, np.maximum(one.confidence, other.confidence),
                  np.where(from_one, one.cut, other.cut))

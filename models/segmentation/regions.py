"""Labelled regions as COCO writes them, polygons or run lengths, and the map of class ids they paint on a frame."""
import dataclasses

import numpy as np

from training.errors import DataError

# Class id of pixels that count as nothing, as in PASCAL VOC, Cityscapes and ADE20K.
IGNORED = 255
BACKGROUND = 0


@dataclasses.dataclass(frozen=True)
class Region:
    """One labelled region of a frame, in its pixels.

    class_id  0..C-1, in taxonomy order
    polygons  arrays (k, 2) of x, y, k >= 3; their union is the region
    counts    COCO's run lengths instead: pixels down the columns, off and on by turns; None without
    xyxy      the box around it, all there is of an annotation without polygons or run lengths
    """

    class_id: int
    polygons: tuple[np.ndarray, ...]
    counts: np.ndarray | None
    xyxy: np.ndarray

    @property
    def is_drawn(self) -> bool:
        return bool(self.polygons) or self.counts is not None

    def mask(self, width: int, height: int) -> np.ndarray:
        """(height, width) bool: the pixels whose middles lie inside; of a box alone, those it touches."""
        from skimage.draw import polygon

        inside = np.zeros((height, width), bool)
        if self.counts is not None:
            values = np.arange(len(self.counts)) % 2 == 1
            return np.repeat(values, self.counts).reshape(width, height).T
        for one in self.polygons:
            # skimage's pixel (row, column) has its middle at whole numbers, a frame's at halves.
            inside[polygon(one[:, 1] - 0.5, one[:, 0] - 0.5, inside.shape)] = True
        if not self.is_drawn:
            x1, y1 = np.floor(self.xyxy[:2]).astype(int).clip(0)
            x2, y2 = np.ceil(self.xyxy[2:]).astype(int)
            inside[y1:y2, x1:x2] = True
        return inside


def read_region(annotation: dict, width: int, height: int, where: str) -> Region:
    """An annotation of train.json. where: "annotation 7 of train.json (frame a.png)", for the text of an error.

    Raises DataError for a polygon of fewer than three points or an odd number of coordinates, for run lengths of
    another size than the frame or that do not add up to it, and for what is neither.
    """
    drawn = annotation.get("segmentation") or []
    x, y, w, h = (float(side) for side in annotation["bbox"])
    xyxy = np.array([x, y, x + w, y + h], np.float32)
    class_id = int(annotation["category_id"])
    if isinstance(drawn, dict):
        return Region(class_id, (), _counts(drawn, width, height, where), xyxy)
    if not isinstance(drawn, list) or not all(isinstance(one, (list, tuple)) for one in drawn):
        raise DataError(f"{where}: segmentation must be a list of polygons or {{size, counts}}, got "
                        f"{str(drawn)[:80]}. Draw it again and publish a version.")
    polygons = []
    for one in drawn:
        if len(one) < 6 or len(one) % 2:
            raise DataError(f"{where}: a polygon needs three points or more, x and y each; this one has {len(one)} "
                            "numbers. Draw it again and publish a version.")
        try:
            points = np.array(one, np.float64).reshape(-1, 2)
        except (TypeError, ValueError):
            points = np.array([[np.nan, np.nan]])
        if not np.isfinite(points).all():
            raise DataError(f"{where}: a polygon holds what is no finite number. Draw it again and publish a version.")
        polygons.append(points)
    return Region(class_id, tuple(polygons), None, xyxy)


def label_map(regions: tuple[Region, ...], width: int, height: int) -> np.ndarray:
    """(height, width) uint8: 0 background, 1 + class_id, IGNORED where only a box is known.

    Smaller regions lie on top of larger ones, for what lies in front mostly covers the less; what was drawn always
    lies on top of a box that nobody drew an outline in.
    """
    painted = np.full((height, width), BACKGROUND, np.uint8)
    masks = [(one, one.mask(width, height)) for one in regions]
    for region, mask in sorted(masks, key=lambda pair: (pair[0].is_drawn, -int(pair[1].sum()))):
        painted[mask] = region.class_id + 1 if region.is_drawn else IGNORED
    return painted


def _counts(drawn: dict, width: int, height: int, where: str) -> np.ndarray:
    size, counts = drawn.get("size"), drawn.get("counts")
    if not isinstance(size, (list, tuple)) or list(size) != [height, width]:
        raise DataError(f"{where}: its run lengths are for a frame of [height, width] = {size}, the frame has "
                        f"[{height}, {width}]. Draw it again and publish a version.")
    try:
        runs = _uncompressed(counts) if isinstance(counts, (str, bytes)) else [int(run) for run in counts]
    except (TypeError, ValueError, IndexError) as error:
        raise DataError(f"{where}: its run lengths cannot be read ({error}). Draw it again and publish a "
                        "version.") from error
    if min(runs, default=0) < 0 or sum(runs) != width * height:
        raise DataError(f"{where}: its run lengths add up to {sum(runs)} pixels, the frame has {width * height}. Draw "
                        "it again and publish a version.")
    return np.array(runs, np.int64)


def _uncompressed(counts: str | bytes) -> list[int]:
    """COCO's compressed run lengths (cocoapi, common/maskApi.c, rleFrString): six bits a character, from 48 on, five of
    them value, the sixth "there is more", lowest first, sign extended; from the fourth run on, differences to the run
    two before."""
    text = counts.encode("ascii") if isinstance(counts, str) else counts
    runs: list[int] = []
    at = 0
    while at < len(text):
        value, shift, is_more = 0, 0, True
        while is_more:
            bits = text[at] - 48
            if not 0 <= bits < 64:
                raise ValueError(f"character {chr(text[at])!r} at {at} is none of theirs")
            value |= (bits & 31) << shift
            is_more, shift, at = bool(bits & 32), shift + 5, at + 1
            if not is_more and bits & 16:
                value |= -1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    return runs

"""Frames and the class ids painted on them: read, checked, letterboxed, and drawn as augmented batches."""
import dataclasses
from pathlib import Path

import cv2
import numpy as np

from segmentation.network import STRIDE
from segmentation.regions import BACKGROUND, IGNORED, Region, label_map, read_region
from training.coco import Data, Sample, read_data
from training.errors import DataError
from training.images import Augmentation, Images, random_view, recoloured, warped
from training.output import say


@dataclasses.dataclass(frozen=True)
class Painted:
    """A data set of labelled regions. regions: of each frame, by its path."""

    data: Data
    regions: dict[Path, tuple[Region, ...]]


def read_painted(folder: Path, holdout: float, seed: int) -> Painted:
    """The data set with every region checked, before anything is trained. Raises DataError, also when train has neither
    a polygon nor a mask, or more labels than a byte has values for."""
    data = read_data(folder, holdout, seed)
    if len(data.labels) >= IGNORED:
        raise DataError(f"{folder / 'train.json'} has {len(data.labels)} categories, {IGNORED - 1} are the most. "
                        "Merge some.")
    regions = {sample.path: tuple(
        read_region(record, sample.width, sample.height,
                    f"Annotation {record.get('id')} of frame {sample.path.name} in {folder}")
        for record in sample.records) for sample in [*data.train, *data.val, *data.test]}
    of_train = [one for sample in data.train for one in regions[sample.path]]
    boxes = sum(not one.is_drawn for one in of_train)
    if boxes == len(of_train):
        raise DataError(f"No frame of {folder / 'train.json'} has a polygon or a mask ({boxes} boxes), so there is no "
                        "outline to learn. Draw polygons or masks, accept the frames and publish a version.")
    if boxes:
        say(f"{boxes} of {len(of_train)} training annotations are boxes without an outline: what lies in them is left "
            "open")
    drawn = {one.class_id for one in of_train if one.is_drawn}
    for class_id, label in enumerate(data.labels):
        if class_id not in drawn:
            say(f"{label} has no polygon or mask in train: it cannot be learned")
    return Painted(data, regions)


class Paintings:
    """Class ids of frames, kept in memory as far as their Images keep the pixels."""

    def __init__(self, painted: Painted, images: Images, size: tuple[int, int], budget_bytes: int = 1 << 30):
        self._painted, self._images, self._size = painted, images, size
        self._budget_bytes = budget_bytes
        self._kept: dict[Path, np.ndarray] = {}

    def batch(self, samples: list[Sample], augmentation: Augmentation,
              seed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """One augmented batch: (n, height, width, 3) uint8, and class ids (n, height / STRIDE, width / STRIDE) uint8
        with 0 for the background and what lies outside the frame. The same arguments always give the same batch."""
        canvases, targets = [], []
        room = (self._size[0] // STRIDE, self._size[1] // STRIDE)
        for position, sample in enumerate(samples):
            rng = np.random.default_rng((*seed, position))
            image, _ = self._images.get(sample)
            matrix = random_view((image.shape[1], image.shape[0]), self._size, self._size, augmentation, rng)
            canvases.append(recoloured(warped(image, matrix, self._size), augmentation.colour, rng))
            smaller = np.diag([1 / STRIDE, 1 / STRIDE, 1.0]) @ matrix
            targets.append(warped(self._of(sample, image.shape[:2]), smaller, room, cv2.INTER_NEAREST, BACKGROUND))
        return np.stack(canvases), np.stack(targets)

    def letterboxed(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """The (height, width, 3) canvas exactly as the finished model will get the frame, and the class ids (h, w) of
        the part at its top left that shows the frame."""
        canvas, scale = self._images.letterboxed(sample)
        fitted = [max(1, min(most, round(side * scale)))
                  for side, most in zip((sample.width, sample.height), self._size)]
        return canvas, _resized(self.whole(sample), (fitted[0], fitted[1]))

    def whole(self, sample: Sample) -> np.ndarray:
        """(H, W) class ids of the frame's own pixels."""
        return label_map(self._painted.regions[sample.path], sample.width, sample.height)

    def _of(self, sample: Sample, shape: tuple[int, int]) -> np.ndarray:
        if sample.path in self._kept:
            return self._kept[sample.path]
        ids = _resized(self.whole(sample), shape[::-1])
        if self._budget_bytes >= ids.nbytes:
            self._budget_bytes -= ids.nbytes
            self._kept[sample.path] = ids
        return ids


def _resized(ids: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Class ids at another (width, height): of the pixel at each new pixel's middle."""
    return cv2.resize(ids, size, interpolation=cv2.INTER_NEAREST_EXACT)

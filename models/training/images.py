"""Letterboxes frames and draws augmented training batches.

Images are (height, width, 3) uint8 RGB, boxes are xyxy float32 in pixels, sizes are (width, height).
"""
import argparse
import dataclasses
from pathlib import Path

import cv2
import numpy as np

from training.coco import Data, Sample
from training.errors import DataError
from training.output import say
from training.process import whole

# The grey YOLO models pad with (YOLOv5, utils/augmentations.py); the same value is written into card.json.
PAD_VALUE = 114
# A box that an augmentation cuts keeps its label while this share of it is still visible: people label cells and
# signs that the image border cuts in half, but hardly ever a sliver.
MIN_VISIBLE = 0.3


def add_options(parser: argparse.ArgumentParser, with_mosaic: bool = True) -> None:
    """The parameters of input size and augmentation; mosaic is for recipes that learn boxes."""
    add = parser.add_argument
    add("--width", type=whole, default=0, help="network input in pixels, rounded up to 32; 0: from the data's aspect ratio")
    add("--height", type=whole, default=0, help="see --width")
    add("--long_side", type=whole, default=384, help="the longer side in pixels when --width and --height are 0")
    add("--hflip", type=float, default=0, help="probability of a left-right flip; wrong for digits and text")
    add("--vflip", type=float, default=0,
        help="probability of an up-down flip; right for microscopes and satellites only")
    add("--rot90", type=float, default=0, help="probability of a quarter turn")
    if with_mosaic:
        add("--mosaic", type=float, default=0.5, help="probability of composing four frames into one")
    add("--scale_min", type=float, default=0.7, help="smallest random zoom")
    add("--scale_max", type=float, default=1.4, help="largest random zoom")
    add("--colour", type=float, default=0.2, help="strength of brightness, contrast and colour changes")


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How training images are varied. Flips and turns default to never: they are wrong for digits and text.

    hflip, vflip, rot90, mosaic  probabilities in 0..1
    scale_min, scale_max         range of the random zoom, relative to the letterboxed size
    colour                       strength of brightness, contrast and colour-cast changes; 0.2 means up to +-20 %
    """

    hflip: float = 0.0
    vflip: float = 0.0
    rot90: float = 0.0
    mosaic: float = 0.5
    scale_min: float = 0.7
    scale_max: float = 1.4
    colour: float = 0.2

    def gentle(self) -> "Augmentation":
        """The variant for the last epochs: no mosaic and half the zoom range, so training ends on real-looking frames."""
        return dataclasses.replace(
            self, mosaic=0.0, scale_min=self.scale_min**0.5, scale_max=self.scale_max**0.5, colour=self.colour / 2
        )

    @classmethod
    def of(cls, options: argparse.Namespace) -> "Augmentation":
        return cls(**{field.name: getattr(options, field.name) for field in dataclasses.fields(cls)
                      if hasattr(options, field.name)})


def choose_size(samples: list[Sample], width: int, height: int, long_side: int) -> tuple[int, int]:
    """The network's input (width, height), both multiples of 32; given sides win over the data's median aspect ratio."""
    if width and height:
        size = (width, height)
    else:
        aspect = float(np.median([s.width / s.height for s in samples]))
        # Enlarging small frames costs time and shows nothing new.
        long = width or height or min(long_side, int(np.median([max(s.width, s.height) for s in samples])))
        if width or (not height and aspect >= 1):
            size = (long, long / aspect)
        else:
            size = (long * aspect, long)
    # Rounded up: a too small side would shrink the other one too. 1e-6 forgives float noise of the division.
    return tuple(max(64, 32 * int(np.ceil(side / 32 - 1e-6))) for side in size)


def input_size(data: Data, options: argparse.Namespace) -> tuple[int, int]:
    """`choose_size` as the parameters of `add_options` ask, said with the numbers of frames and labels."""
    size = choose_size(data.train, options.width, options.height, options.long_side)
    say(f"{data.counts[0]} train, {data.counts[1]} val, {data.counts[2]} test frames, {len(data.labels)} labels, input "
        f"{size[0]}x{size[1]}")
    return size


def read_image(path: Path) -> np.ndarray:
    """The (H, W, 3) uint8 RGB pixels of a file. Raises DataError when it cannot be decoded."""
    # IGNORE_ORIENTATION: boxes are drawn on the stored pixels.
    pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None:
        raise DataError(f"{path} cannot be decoded as an image. Replace the file or remove its frame from the data set.")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def letterbox(image: np.ndarray, size: tuple[int, int], pad: int = PAD_VALUE) -> tuple[np.ndarray, float]:
    """Fits an image into `size` (width, height) without changing its aspect ratio, top-left, padded right and below.

    Returns the (height, width, 3) uint8 canvas and the scale: canvas pixels per image pixel.
    """
    height, width = image.shape[:2]
    scale = min(size[0] / width, size[1] / height)
    fitted = (max(1, min(size[0], round(width * scale))), max(1, min(size[1], round(height * scale))))
    canvas = np.full((size[1], size[0], 3), pad, np.uint8)
    canvas[: fitted[1], : fitted[0]] = cv2.resize(image, fitted, interpolation=cv2.INTER_LINEAR)
    return canvas, scale


class Images:
    """Decoded images, kept in memory up to `budget_bytes`; beyond it they are decoded again at each use."""

    def __init__(self, size: tuple[int, int], budget_bytes: int = 3 << 30):
        self._size = size
        self._budget_bytes = budget_bytes
        self._kept: dict[tuple, tuple[np.ndarray, float]] = {}

    def get(self, sample: Sample) -> tuple[np.ndarray, float]:
        """The image to draw training batches from, and how many of its pixels one original pixel is (mostly 1).

        Pixels beyond twice the network's input are never seen, so huge photographs are kept smaller; INTER_LINEAR
        because that is how `letterbox` will show them to the trained model.
        """
        return self._keep(("whole", sample.path), lambda: self._reduced(sample))

    def letterboxed(self, sample: Sample) -> tuple[np.ndarray, float]:
        """The image exactly as the finished model will get it: `letterbox` of the original pixels, and its scale."""
        return self._keep(("letterboxed", sample.path), lambda: letterbox(_checked(sample), self._size))

    def _keep(self, key, make):
        if key in self._kept:
            return self._kept[key]
        entry = make()
        if self._budget_bytes >= entry[0].nbytes:
            self._budget_bytes -= entry[0].nbytes
            self._kept[key] = entry
        return entry

    def _reduced(self, sample):
        image = _checked(sample)
        scale = 2 * max(self._size[0] / sample.width, self._size[1] / sample.height)
        if scale < 1:
            fitted = (max(1, round(sample.width * scale)), max(1, round(sample.height * scale)))
            image = cv2.resize(image, fitted, interpolation=cv2.INTER_LINEAR)
        return image, image.shape[1] / sample.width


def _checked(sample: Sample) -> np.ndarray:
    image = read_image(sample.path)
    if image.shape[:2] != (sample.height, sample.width):
        raise DataError(
            f"{sample.path} is {image.shape[1]}x{image.shape[0]} px, its record says {sample.width}x{sample.height}."
            " Export the data set again."
        )
    return image


def training_batch(
    samples: list[Sample], images: Images, indices: np.ndarray, size: tuple[int, int], augmentation: Augmentation,
    seed: tuple[int, ...],
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Draws one augmented batch; the same arguments always give the same batch.

    indices  which samples; seed  integers that make this batch's randomness its own (seed, epoch, step)
    Returns (N, height, width, 3) uint8 and, per image, (boxes (n, 4) xyxy in canvas pixels, class_ids (n,)).
    """
    canvases, targets = [], []
    for position, index in enumerate(indices):
        rng = np.random.default_rng((*seed, position))
        chosen = [int(index)]
        if rng.random() < augmentation.mosaic:
            chosen += rng.integers(0, len(samples), 3).tolist()
        canvas, boxes, class_ids = _draw([samples[i] for i in chosen], images, size, augmentation, rng)
        canvases.append(canvas)
        targets.append((boxes, class_ids))
    return np.stack(canvases), targets


def _draw(samples, images, size, augmentation, rng):
    """One canvas from one sample, or from four around a random centre (mosaic: Bochkovskiy et al., YOLOv4, 2020)."""
    canvas = np.full((size[1], size[0], 3), PAD_VALUE, np.uint8)
    if len(samples) == 1:
        quarters = [(0, 0, size[0], size[1])]
    else:
        x, y = (int(side * rng.uniform(0.3, 0.7)) for side in size)
        quarters = [(0, 0, x, y), (x, 0, size[0], y), (0, y, x, size[1]), (x, y, size[0], size[1])]
    all_boxes, all_ids = [], []
    for sample, quarter in zip(samples, quarters):
        pixels, boxes, class_ids = _place(sample, images, size, quarter, augmentation, rng)
        canvas[quarter[1] : quarter[3], quarter[0] : quarter[2]] = pixels
        all_boxes.append(boxes)
        all_ids.append(class_ids)
    return recoloured(canvas, augmentation.colour, rng), np.concatenate(all_boxes), np.concatenate(all_ids)


def _place(sample, images, size, quarter, augmentation, rng):
    """Zooms, flips, turns and shifts one sample into a rectangle of the canvas; returns pixels, boxes, class ids."""
    image, reduced = images.get(sample)
    room = (quarter[2] - quarter[0], quarter[3] - quarter[1])
    matrix = random_view((image.shape[1], image.shape[0]), size, room, augmentation, rng)
    pixels = warped(image, matrix, room)
    is_used = ~sample.crowds
    boxes, class_ids = sample.boxes[is_used] * reduced, sample.class_ids[is_used]
    corners = boxes.reshape(-1, 2, 2) @ matrix[:2, :2].T + matrix[:2, 2]
    moved = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    clipped = moved.clip(0, [*room, *room])
    sides, full = clipped[:, 2:] - clipped[:, :2], moved[:, 2:] - moved[:, :2]
    is_kept = (sides.prod(axis=1) >= MIN_VISIBLE * full.prod(axis=1)) & (sides >= 2).all(axis=1)
    clipped = clipped[is_kept] + [quarter[0], quarter[1], quarter[0], quarter[1]]
    return pixels, clipped.astype(np.float32).reshape(-1, 4), class_ids[is_kept]


def random_view(image_size: tuple[int, int], size: tuple[int, int], room: tuple[int, int], augmentation: Augmentation,
                rng: np.random.Generator) -> np.ndarray:
    """A random zoom, flip, turn and shift: the (3, 3) matrix from image to canvas, both measured at pixels' edges.

    image_size, size, room  (width, height) of the image, of the network's input, and of the part of it to fill
    """
    width, height = image_size
    turns = int(rng.random() < augmentation.rot90)
    across = rng.random() < augmentation.hflip
    down = rng.random() < augmentation.vflip
    seen = (height, width) if turns else (width, height)
    zoom = np.exp(rng.uniform(np.log(augmentation.scale_min), np.log(augmentation.scale_max)))
    scale = min(size[0] / seen[0], size[1] / seen[1]) * zoom
    # Anywhere that shows as much as possible: a larger image is cropped, a smaller one lies somewhere inside.
    shift = [rng.uniform(min(0, room[i] - seen[i] * scale), max(0, room[i] - seen[i] * scale)) for i in (0, 1)]
    matrix = np.array([[scale, 0, shift[0]], [0, scale, shift[1]], [0, 0, 1]])
    if across:
        matrix = matrix @ np.array([[-1, 0, seen[0]], [0, 1, 0], [0, 0, 1.0]])
    if down:
        matrix = matrix @ np.array([[1, 0, 0], [0, -1, seen[1]], [0, 0, 1.0]])
    if turns:
        matrix = matrix @ np.array([[0, -1, height], [1, 0, 0], [0, 0, 1.0]])
    return matrix


def warped(image: np.ndarray, matrix: np.ndarray, room: tuple[int, int], interpolation: int = cv2.INTER_LINEAR,
           fill: int = PAD_VALUE) -> np.ndarray:
    """The image on a canvas of (width, height) `room` as a matrix of `random_view` places it; `fill` where it ends."""
    # `matrix` maps pixel edges; warpAffine counts pixel centres, which lie half a pixel further on both sides.
    centres = np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1]]) @ matrix @ np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    return cv2.warpAffine(image, centres[:2], room, flags=interpolation, borderMode=cv2.BORDER_CONSTANT,
                          borderValue=(fill,) * 3)


def recoloured(canvas: np.ndarray, strength: float, rng) -> np.ndarray:
    """Random brightness, contrast and colour cast through one 256-entry table per channel."""
    if strength <= 0:
        return canvas
    gain = 1 + strength * rng.uniform(-1, 1)
    casts = 1 + strength / 2 * rng.uniform(-1, 1, 3)
    contrast = 1 + strength * rng.uniform(-1, 1)
    levels = np.arange(256.0)
    table = np.stack([(levels * gain * cast - 128) * contrast + 128 for cast in casts], axis=1)
    return cv2.LUT(canvas, table.clip(0, 255).round().astype(np.uint8).reshape(1, 256, 3))

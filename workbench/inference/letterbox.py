"""Letterbox: an image fitted into a model's input, and the way back for boxes."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from workbench.boxes import clip
from workbench.errors import Invalid


@dataclass(frozen=True)
class Letterbox:
    """The map between an image and the canvas it was drawn on.

    scale       canvas pixels per image pixel, (across, down); they differ by the rounding to whole pixels
    offset      (x, y) of the image's top left corner on the canvas
    image_size  (width, height) in pixels
    """

    scale: tuple[float, float]
    offset: tuple[int, int]
    image_size: tuple[int, int]

    def to_image(self, boxes: np.ndarray) -> np.ndarray:
        """(n, 4) xyxy on the canvas -> (n, 4) xyxy in the image, clipped to it."""
        boxes = np.asarray(boxes, float).reshape(-1, 4)
        return clip((boxes - self.offset * 2) / (self.scale * 2), *self.image_size)

    def to_canvas(self, boxes: np.ndarray) -> np.ndarray:
        """(n, 4) xyxy in the image -> (n, 4) xyxy on the canvas."""
        return np.asarray(boxes, float).reshape(-1, 4) * (self.scale * 2) + self.offset * 2


def fit(image_size: tuple[int, int], size: tuple[int, int], padding: str) -> tuple[tuple[int, int], Letterbox]:
    """Where an image of (width, height) comes to lie on a canvas of (width, height): its size there, and the map.

    Raises Invalid for another padding than those of `letterbox`, and when a side of `size` is not positive.
    """
    if min(size) < 1:
        raise Invalid(f"Canvas size {size} must be (width, height), both positive.")
    width, height = image_size
    if padding == "stretch":
        fitted = (size[0], size[1])
    elif padding in ("topleft", "centre"):
        scale = min(size[0] / width, size[1] / height)
        fitted = tuple(min(most, max(1, round(side * scale))) for side, most in zip((width, height), size))
    else:
        raise Invalid(f"Padding {padding!r} must be topleft, centre or stretch.")
    offset = ((size[0] - fitted[0]) // 2, (size[1] - fitted[1]) // 2) if padding == "centre" else (0, 0)
    # cv2.resize maps side to side, so the exact scale is the one of the rounded sides.
    return fitted, Letterbox((fitted[0] / width, fitted[1] / height), offset, (width, height))


def letterbox(
    image: np.ndarray, size: tuple[int, int], padding: str = "topleft", pad: int = 114,
    image_size: tuple[int, int] | None = None,
) -> tuple[np.ndarray, Letterbox]:
    """Fits an image into `size` without changing its aspect ratio (unless `padding` is "stretch").

    image       (H, W, 3) uint8 RGB
    size        (width, height) in pixels
    padding     "topleft": image at the top left; "centre": border on both sides; "stretch": each side on its own
    pad         grey value of the border; 114 is what YOLO models are trained with (YOLOv5, utils/augmentations.py)
    image_size  (width, height) of the image that `image` shows as a whole, if it was reduced when it was decoded

    Returns the (height, width, 3) uint8 canvas and the Letterbox that maps boxes back to the image.
    Raises Invalid for another padding, shape or dtype, and when a side of `size` is not positive.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise Invalid(f"An image must have shape (H, W, 3) and dtype uint8, got {image.shape} {image.dtype}.")
    given = (image.shape[1], image.shape[0])
    fitted, box = fit(image_size or given, size, padding)
    resized = image if fitted == given else cv2.resize(image, fitted, interpolation=cv2.INTER_LINEAR)
    if fitted == tuple(size) and resized is not image:
        return resized, box
    canvas = np.full((size[1], size[0], 3), pad, np.uint8)
    x, y = box.offset
    canvas[y:y + fitted[1], x:x + fitted[0]] = resized
    return canvas, box

"""The quick-start data set: real handwritten digits on real photographs, with exact boxes; nothing is downloaded.

The digits are the 1,797 of scikit-learn (UCI Optical Recognition of Handwritten Digits; CC BY 4.0), the photographs
those that lie in scikit-image's wheel. No digit and no photograph is in two splits: a score on the test
split is one on handwriting and surroundings that were never seen.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from workbench.annotation import Annotation
from workbench.dataset import SPLITS, Frame, LabeledFrame
from workbench.errors import Invalid
from workbench.formats.checkout import coco_document
from workbench.taxonomy import Taxonomy

LABELS = tuple("0123456789")
# Whole photographs by split. Left out: drawings, text pages, and what is too small; the two of the stereo pair show one
# scene and stay together.
PHOTOGRAPHS = {
    "train": ("astronaut.png", "coffee.png", "motorcycle_left.png", "motorcycle_right.png", "camera.png", "coins.png",
              "ihc.png", "grass.png", "hubble_deep_field.jpg"),
    "val": ("rocket.jpg", "brick.png", "cell.png"),
    "test": ("chelsea.png", "retina.jpg", "gravel.png", "moon.png"),
}
# Neighbours in scikit-learn's list were written by the same hand: each split takes one stretch of it.
DIGITS = {"train": (0.0, 0.65), "val": (0.65, 0.75), "test": (0.75, 1.0)}
HEIGHT_PX = (24, 46)
A_FRAME = (3, 8)  # digits a frame, both included
MARK = "quickstart.json"
# The ink's opacity from which a pixel counts as digit: boxes are as tight as a careful annotator's.
VISIBLE = 0.35
MAX_OVERLAP = 0.02  # of the smaller box
ROOM_PX = 2


@dataclass(frozen=True)
class _Plan:
    seed: int
    train: int
    val: int
    test: int
    unlabeled: int
    size: tuple[int, int]


def generate(folder: Path, seed: int = 0, train: int = 220, val: int = 40, test: int = 60, unlabeled: int = 0,
             size: tuple[int, int] = (320, 240)) -> Path:
    """Writes a COCO data set of `train` + `val` + `test` JPEG frames of `size` (width, height); the same arguments (and
    library versions) give the same bytes.

    images/<split>/digits_<split>_0001.jpg, annotations/instances_<split>.json. The last `unlabeled` frames of the train
    split are in no annotation file; their truth is in truth.json: {"frames": {name: [{"label", "xyxy"}, ...]}}.

    Complete or not there: it is written beside and moved into place; one that is there with the same arguments is kept.
    Raises Invalid when `folder` holds something else, or the numbers make no sense.
    """
    plan = _Plan(seed, train, val, test, unlabeled, (int(size[0]), int(size[1])))
    if min(train, val, test, unlabeled) < 0 or unlabeled > train or train + val + test < 1:
        raise Invalid(f"Cannot make {train} + {val} + {test} frames with {unlabeled} of the first unlabelled.")
    if min(plan.size) < 3 * HEIGHT_PX[1]:
        raise Invalid(f"Frames of {size} are too small for the digits; a side needs at least {3 * HEIGHT_PX[1]} "
                      "pixels.")
    mark = {"made_by": "workbench.quickstart", "seed": seed, "train": train, "val": val, "test": test,
            "unlabeled": unlabeled, "size": list(plan.size)}
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARK).is_file():
            raise Invalid(f"{folder} holds something else; give an empty folder, or one that does not exist.")
        if json.loads((folder / MARK).read_text()) == mark:
            return folder
    half = folder.with_name(f".{folder.name}.half-{os.getpid()}")
    shutil.rmtree(half, ignore_errors=True)
    try:
        _write(half, plan)
        (half / MARK).write_text(json.dumps(mark))
        shutil.rmtree(folder, ignore_errors=True)
        half.replace(folder)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return folder


def draw_frame(split: str, index: int, seed: int = 0,
               size: tuple[int, int] = (320, 240)) -> tuple[np.ndarray, list[Any]]:
    """One frame: (height, width, 3) uint8 RGB pixels and [(label, (x1, y1, x2, y2)), ...]."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    canvas = _background(split, rng, size).astype(np.float32)
    images, targets = _digits()
    first, last = (int(share * len(images)) for share in DIGITS[split])
    boxes: list[Any] = []
    for _ in range(int(rng.integers(A_FRAME[0], A_FRAME[1] + 1))):
        which = int(rng.integers(first, last))
        ink = _ink(images[which], rng)
        xyxy = _free_place(ink.shape, [box for _, box in boxes], size, rng)
        if xyxy is None:
            continue
        x1, y1, x2, y2 = xyxy
        patch = canvas[y1 - ROOM_PX:y2 + ROOM_PX, x1 - ROOM_PX:x2 + ROOM_PX]
        patch[:] = patch + (_colour(patch, rng) - patch) * ink[..., None]
        boxes.append((LABELS[targets[which]], (x1, y1, x2, y2)))
    noise = rng.normal(0, 3, canvas.shape[:2])[..., None]  # the grain of a camera, over photograph and ink alike
    return np.clip(canvas + noise, 0, 255).astype(np.uint8), boxes


def _write(folder: Path, plan: _Plan) -> None:
    (folder / "annotations").mkdir(parents=True)
    truth: dict[str, Any] = {}
    for split in SPLITS:
        count = getattr(plan, split)
        shown = []
        for index in range(count):
            pixels, boxes = draw_frame(split, index, plan.seed, plan.size)
            name = f"digits_{split}_{index + 1:04d}.jpg"
            path = folder / "images" / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes())
            if split == "train" and index >= count - plan.unlabeled:
                truth[name] = [{"label": label, "xyxy": list(box)} for label, box in boxes]
                continue
            frame = Frame(name, *plan.size, blob="0" * 32)
            shown.append(LabeledFrame(frame, tuple(Annotation(label, box) for label, box in boxes), split))
        if count:
            document = coco_document(Taxonomy(LABELS), shown)
            (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))
    if plan.unlabeled:
        (folder / "truth.json").write_text(json.dumps({"frames": truth}))


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8) float32 ink in 0..1, and (1797,) int labels."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return (bunch.images / 16).astype(np.float32), bunch.target


@cache
def _photograph(name: str) -> np.ndarray:
    """(H, W, 3) uint8 RGB from scikit-image's wheel."""
    import skimage

    path = Path(skimage.__file__).parent / "data" / name
    pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def _background(split: str, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A random crop of one of the split's photographs, resized, mirrored at random, a little flatter than it was."""
    photograph = _photograph(PHOTOGRAPHS[split][int(rng.integers(len(PHOTOGRAPHS[split])))])
    height, width = photograph.shape[:2]
    largest = min(width / size[0], height / size[1])
    scale = largest * rng.uniform(0.6, 1.0)
    crop = int(size[0] * scale), int(size[1] * scale)
    x, y = int(rng.integers(width - crop[0] + 1)), int(rng.integers(height - crop[1] + 1))
    pixels = photograph[y:y + crop[1], x:x + crop[0]]
    pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale > 1 else cv2.INTER_LINEAR)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    mean = pixels.mean(axis=(0, 1))
    return (pixels - mean) * rng.uniform(0.65, 0.95) + mean


def _ink(digit: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One digit as opacity 0..1, scaled, turned a little, cut to what is visible plus ROOM_PX on each side."""
    height = rng.uniform(*HEIGHT_PX)
    factor = height / 8
    wide = factor * rng.uniform(0.85, 1.15)
    pad = 2
    side = int(np.ceil(8 * max(factor, wide) * 1.35)) + 2 * (pad + ROOM_PX)
    angle, centre = np.deg2rad(rng.uniform(-12, 12)), side / 2
    cos, sin = np.cos(angle), np.sin(angle)
    # From the 8 x 8 grid (pixel centres, middle 3.5) to the canvas: stretched, then turned.
    matrix = np.array([[cos * wide, -sin * factor, 0], [sin * wide, cos * factor, 0]])
    matrix[:, 2] = centre - matrix[:, :2] @ [3.5, 3.5]
    grown = cv2.warpAffine(digit, matrix, (side, side), flags=cv2.INTER_CUBIC)
    # A steeper edge than the 8 x 8 grid has: strokes of a pen instead of a blur.
    opacity = np.clip((grown - 0.25) / 0.4, 0, 1)
    rows, columns = np.flatnonzero((opacity >= VISIBLE).any(axis=1)), np.flatnonzero((opacity >= VISIBLE).any(axis=0))
    return opacity[rows[0] - ROOM_PX:rows[-1] + 1 + ROOM_PX, columns[0] - ROOM_PX:columns[-1] + 1 + ROOM_PX]


def _free_place(shape: tuple[int, ...], taken: list[tuple[int, ...]], size: tuple[int, int],
                rng: np.random.Generator) -> tuple[int, int, int, int] | None:
    """The box of an ink patch (ROOM_PX smaller than it on each side) somewhere it hardly overlaps others, or None."""
    height, width = shape
    for _ in range(30):
        x = int(rng.integers(0, size[0] - width + 1)) + ROOM_PX
        y = int(rng.integers(0, size[1] - height + 1)) + ROOM_PX
        box = (x, y, x + width - 2 * ROOM_PX, y + height - 2 * ROOM_PX)
        if all(_overlap(box, other) <= MAX_OVERLAP for other in taken):
            return box
    return None


def _overlap(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return max(width, 0) * max(height, 0) / smaller


def _colour(patch: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An ink that stands out from what is below it: bright on dark, dark on bright, with a tint of its own."""
    grey = float(patch.mean())
    target = grey + rng.uniform(110, 170) if grey < 115 else grey - rng.uniform(110, 170)
    return np.clip(target + rng.uniform(-45, 45, 3), 0, 255).astype(np.float32)

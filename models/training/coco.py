"""Reads the data set a recipe gets: COCO detection files and their frames. Boxes are xyxy float32 in pixels."""
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from training.errors import DataError
from training.output import read_json, say


@dataclasses.dataclass(frozen=True)
class Sample:
    """One labelled frame: where it is, its size in pixels and its boxes in original image pixels.

    boxes (n, 4) xyxy float32; class_ids (n,) int64; crowds (n,) bool: regions that are not trained on;
    records (n,) the annotations as the COCO file has them; tags: the class ids of the frame as a whole, None where
    nobody looked for any.
    """

    image_id: int
    path: Path
    width: int
    height: int
    boxes: np.ndarray
    class_ids: np.ndarray
    crowds: np.ndarray
    records: tuple[dict[str, Any], ...] = ()
    tags: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set as a training uses it; record is dataset.json ({"ref", "digest"})."""

    train: list[Sample]
    val: list[Sample]
    test: list[Sample]
    labels: list[str]
    record: dict[str, Any]

    @property
    def counts(self) -> tuple[int, int, int]:
        return len(self.train), len(self.val), len(self.test)


def read_data(folder: Path, holdout: float, seed: int, is_usable: Callable[[Sample], bool] = lambda sample: True) -> Data:
    """All of a `data` folder; without val.json a share `holdout` of train is kept for validation, which is said.

    is_usable  which frames a recipe can learn from; the others are left out, which is said

    Raises DataError when train is absent or empty, what read_coco raises, and when the splits' labels differ.
    """
    splits = {split: _usable(*read_coco(folder, split), split, is_usable) for split in ("train", "val", "test")}
    train, labels = splits["train"]
    val, test = splits["val"][0], splits["test"][0]
    if not train:
        raise DataError(f"{folder / 'train.json'} is absent or lists no frames. Publish a data set version with a train "
                        "split.")
    if not labels:
        raise DataError(f"{folder / 'train.json'} names no category. Publish a data set version with labels.")
    for split in ("val", "test"):
        if splits[split][0] and splits[split][1] != labels:
            raise DataError(f"Taxonomy mismatch: train.json knows {labels}, {split}.json knows {splits[split][1]}. Export "
                            "both from one version.")
    if not val:
        train, val = hold_out(train, holdout, seed)
        say(f"val.json is absent or empty: {len(val)} of the training frames are held out for validation (seed {seed})")
    if not test:
        say("test.json is absent or empty: final figures are those of validation")
    record = read_json(folder / "dataset.json") or {"ref": "unknown", "digest": "unknown"}
    return Data(train, val, test, labels, record)


def _usable(samples: list[Sample], labels: list[str], split: str,
            is_usable: Callable[[Sample], bool]) -> tuple[list[Sample], list[str]]:
    kept = [sample for sample in samples if is_usable(sample)]
    if len(kept) < len(samples):
        say(f"{len(samples) - len(kept)} of {len(samples)} frames of {split} carry nothing to learn from: left out")
    return kept, labels


def read_coco(folder: Path, split: str) -> tuple[list[Sample], list[str]]:
    """Reads `<folder>/<split>.json`; returns its samples and the label names in class-id order.

    An absent file is an empty split: ([], []). Raises DataError when a frame file is missing, when category ids are not
    0..C-1, or when an annotation points nowhere.
    """
    file = folder / f"{split}.json"
    if not file.is_file():
        return [], []
    try:
        coco = json.loads(file.read_text())
        categories = sorted(coco.get("categories", []), key=lambda category: category["id"])
        labels = [category["name"] for category in categories]
        ids = [category["id"] for category in categories]
        images = coco.get("images", [])
        annotations = coco.get("annotations", [])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file} is not a COCO detection file: {error!r}. Export the data set again.") from error
    if not images:
        return [], labels
    if ids != list(range(len(ids))):
        raise DataError(f"Category ids in {file} must be 0..{len(ids) - 1}, got {ids}. Renumber them in taxonomy order.")
    by_image: dict[int, list[dict]] = {image["id"]: [] for image in images}
    for annotation in annotations:
        if annotation["image_id"] not in by_image:
            raise DataError(f"Annotation {annotation.get('id')} in {file} names image {annotation['image_id']}, which is "
                            "not listed. Export the data set again.")
        if not 0 <= annotation["category_id"] < len(ids):
            raise DataError(f"Annotation {annotation.get('id')} in {file} has category {annotation['category_id']}, "
                            f"expected 0..{len(ids) - 1}. Export the data set again.")
        by_image[annotation["image_id"]].append(annotation)
    samples, missing = [], []
    for image in images:
        path = folder / "frames" / image["file_name"]
        if not path.resolve().is_relative_to((folder / "frames").resolve()) and not path.is_symlink():
            raise DataError(f"{file} names a frame outside {folder / 'frames'}: {image['file_name']}. Export it again.")
        if not path.is_file():
            missing.append(image["file_name"])
            continue
        samples.append(_sample(image, path, by_image[image["id"]], file, len(ids)))
    if missing:
        raise DataError(
            f"{len(missing)} of {len(images)} frames of {file} are not in {folder / 'frames'}, first: {missing[0]}. "
            "Fetch the data set's frames again."
        )
    return samples, labels


def _sample(image: dict, path: Path, annotations: list[dict], file: Path, class_count: int) -> Sample:
    width, height = int(image["width"]), int(image["height"])
    xywh = np.array([a["bbox"] for a in annotations], np.float32).reshape(-1, 4)
    if not np.isfinite(xywh).all():
        raise DataError(f"A box of {image['file_name']} in {file} is not finite. Correct it and publish a new version.")
    boxes = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    boxes = boxes.clip(0, [width, height, width, height]).astype(np.float32)
    is_drawn = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(axis=1)
    class_ids = np.array([a["category_id"] for a in annotations], np.int64)
    crowds = np.array([bool(a.get("iscrowd", 0)) for a in annotations], bool)
    records = tuple(annotation for annotation, drawn in zip(annotations, is_drawn) if drawn)
    tags = image.get("tags")
    if tags is not None and not (isinstance(tags, list) and all(tag in range(class_count) for tag in tags)):
        raise DataError(f"Tags of {image['file_name']} in {file} must be a list of category ids 0..{class_count - 1}, got "
                        f"{str(tags)[:80]}. Export the data set again.")
    return Sample(int(image["id"]), path, width, height, boxes[is_drawn], class_ids[is_drawn], crowds[is_drawn], records,
                  None if tags is None else tuple(sorted(set(tags))))


def hold_out(samples: list[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Splits samples into (train, val) by seed; val gets `share` of them, at least one when there are two or more."""
    if share <= 0 or len(samples) < 2:
        return samples, []
    order = np.random.default_rng(seed).permutation(len(samples))
    count = min(max(1, round(share * len(samples))), len(samples) - 1)
    held = set(order[:count].tolist())
    return [s for i, s in enumerate(samples) if i not in held], [s for i, s in enumerate(samples) if i in held]

"""Reads the tags of frames, decides whether one or several apply, and draws the batches that are learned from."""
import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import nn

from training.coco import Data, Sample, read_coco, read_data
from training.errors import DataError
from training.images import Augmentation, Images, random_view, recoloured, warped
from training.output import say

KINDS = ("single", "multi")


@dataclasses.dataclass(frozen=True)
class Tagged:
    """A data set of tagged frames.

    labels     those that are a tag of some frame, in taxonomy order
    is_single  exactly one of them applies to a frame
    """

    data: Data
    labels: list[str]
    is_single: bool

    def truth(self, samples: list[Sample]) -> np.ndarray:
        """(n, C) bool: which labels are tags of which frames."""
        columns = [self.data.labels.index(label) for label in self.labels]
        return np.array([[column in sample.tags for column in columns] for sample in samples], bool).reshape(
            len(samples), len(columns))


def read_tagged(folder: Path, kind: str, holdout: float, seed: int) -> Tagged:
    """The data set, with `kind` "single", "multi", or "auto": single unless a frame has two tags or more, or there is
    one label only, which some labelled frames lack.

    Frames that nobody labelled are left out; with one label a frame so are those without. Raises DataError when no
    frame of train has a tag, when the tags leave nothing to tell apart, and for a frame of several tags with kind
    "single".
    """
    splits = {split: read_coco(folder, split) for split in ("train", "val", "test")}
    labels = splits["train"][1]
    labelled = [sample for samples, _ in splits.values() for sample in samples if sample.tags is not None]
    if not any(sample.tags for sample in splits["train"][0]):
        raise DataError(f"No frame of {folder / 'train.json'} has a tag, so there is nothing to learn. Tag whole "
                        "frames, accept them and publish a version; boxes are learned by the detection recipes.")
    used = sorted({tag for sample in labelled for tag in sample.tags})
    several = next((sample for sample in labelled if len(sample.tags) > 1), None)
    is_single = kind == "single" or kind == "auto" and several is None and not (
        len(used) == 1 and any(not sample.tags for sample in labelled))
    if is_single and several is not None:
        names = ", ".join(labels[tag] for tag in several.tags)
        raise DataError(f"Frame {several.path.name} has the tags {names}, with kind=single it may have one. "
                        "Take tags away and publish a version, or train with kind=multi.")
    data = read_data(folder, holdout, seed, lambda sample: bool(sample.tags) if is_single else sample.tags is not None)
    tagged = Tagged(data, [labels[tag] for tag in used], is_single)
    truth = tagged.truth(data.train)
    if not (truth.any(0) & ~truth.all(0)).any():
        raise DataError(f"All {len(truth)} training frames have the same tags ({', '.join(tagged.labels)}): there is "
                        "nothing to tell apart. Tag frames that differ, accept them and publish a version.")
    chosen = "one label a frame (softmax)" if is_single else "any number of labels a frame (sigmoid)"
    say(f"{chosen}{'' if kind != 'auto' else ', decided by the data'}: {', '.join(tagged.labels)}")
    for label, has_some in zip(tagged.labels, truth.any(0)):
        if not has_some:
            say(f"{label} is a tag of no training frame: it cannot be learned")
    return tagged


def views(samples: list[Sample], images: Images, size: tuple[int, int], augmentation: Augmentation,
          seed: tuple[int, ...]) -> np.ndarray:
    """(n, height, width, 3) uint8: one random view of each frame; the same arguments always give the same ones."""
    canvases = []
    for position, sample in enumerate(samples):
        rng = np.random.default_rng((*seed, position))
        image, _ = images.get(sample)
        matrix = random_view((image.shape[1], image.shape[0]), size, size, augmentation, rng)
        canvases.append(recoloured(warped(image, matrix, size), augmentation.colour, rng))
    return np.stack(canvases)


def plain(samples: list[Sample], images: Images) -> np.ndarray:
    """(n, height, width, 3) uint8: the frames exactly as the finished model will get them."""
    return np.stack([images.letterboxed(sample)[0] for sample in samples])


class Features:
    """What a frozen backbone sees in frames, computed once: the frame itself and `count - 1` random views of it."""

    def __init__(self, model: nn.Module, samples: list[Sample], images: Images, size: tuple[int, int],
                 augmentation: Augmentation, count: int, seed: int, batch_size: int = 16):
        device = next(model.parameters()).device
        model.eval()
        self._kept = []
        with torch.inference_mode():
            for view in range(count):
                rows = []
                for start in range(0, len(samples), batch_size):
                    chunk = samples[start:start + batch_size]
                    canvases = plain(chunk, images) if view == 0 else views(chunk, images, size, augmentation,
                                                                            (seed, view, start))
                    rows.append(model.features(torch.from_numpy(canvases).to(device)).float().cpu())
                self._kept.append(torch.cat(rows) if rows else torch.zeros(0, model.linear.in_features))
        # Inference tensors cannot take part in a training step.
        self._kept = [rows.clone() for rows in self._kept]

    def get(self, indices: np.ndarray, seed: tuple[int, ...]) -> torch.Tensor:
        """(n, F) features of frames, each of a view that the seed picks."""
        picked = np.random.default_rng(seed).integers(0, len(self._kept), len(indices))
        return torch.stack([self._kept[view][index] for view, index in zip(picked, indices)])

    def all(self) -> torch.Tensor:
        """(n, F) of the frames themselves."""
        return self._kept[0]

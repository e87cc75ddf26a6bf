"""Calibration: which frames show a model what it will see, and how far each of its activations reaches on them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from workbench.annotation import Annotation
from workbench.errors import Invalid

METHODS = ("entropy", "percentile", "minmax")
# Fewer frames leave the tails of activations to chance: TensorRT's guide and OpenVINO's NNCF both ask for some hundred.
LEAST_FRAMES = 16
DEFAULT_FRAMES = 100
# The share of values an activation's range holds (ONNX Runtime's calibrate.py, PercentileCalibrater, has the same).
PERCENTILE = 99.99
# Histogram of TensorRT's entropy calibration: 2048 bins for 128 levels of magnitude (Migacz, 8-bit Inference with
# TensorRT, GTC 2017).
BINS, LEVELS = 2048, 128
# Values of one activation on one frame that enter its histogram; the largest is always taken whole.
SAMPLE = 100_000
GROUPS = 8


def embed(image: np.ndarray) -> np.ndarray:
    """What a (H, W, 3) uint8 RGB image looks like in 60 numbers: means and spreads of colour and of edges in each cell
    of a 4 x 3 grid, plus how bright it is. Cheap, and alike for frames of one scene, light or microscope."""
    small = cv2.resize(image, (64, 48), interpolation=cv2.INTER_AREA)
    lab = cv2.cvtColor(small, cv2.COLOR_RGB2LAB).astype(np.float32)
    edges = np.abs(cv2.Laplacian(lab[..., 0], cv2.CV_32F))
    planes = np.dstack([lab, edges]).reshape(3, 16, 4, 16, 4)
    means = planes.mean(axis=(1, 3))
    spread = planes[..., 0].std(axis=(1, 3))
    return np.concatenate([means.ravel(), spread.ravel()]) / 255


def choose(labels: Sequence[Collection[str]], embeddings: np.ndarray, count: int, seed: int) -> list[int]:
    """Indices of `count` frames, balanced by what they show and by what they look like; the same for the same seed.

    labels      of each frame, one entry an object; empty where nothing or nobody knows
    embeddings  (n, d) of the same frames, from `embed`

    Frames are grouped by k-means over their embeddings. Groups take turns; each gives the frame whose labels were
    chosen least so far. Raises Invalid for fewer than LEAST_FRAMES frames.
    """
    from sklearn.cluster import KMeans

    if min(count, len(labels)) < LEAST_FRAMES:
        raise Invalid(f"{min(count, len(labels))} frames are too few to calibrate int8 ranges; {LEAST_FRAMES} are the "
                      "least, some hundred are better. Upload more frames to the train or val split, and "
                      "publish a version.")
    random = np.random.default_rng(seed)
    kinds = min(GROUPS, len(np.unique(embeddings, axis=0)))
    groups = KMeans(kinds, n_init=3, random_state=seed).fit_predict(embeddings)
    waiting = {group: [int(index) for index in random.permutation(np.nonzero(groups == group)[0])]
               for group in sorted(set(groups))}
    shown: Counter[str] = Counter()
    chosen: list[int] = []
    while len(chosen) < min(count, len(labels)):
        for group in sorted(waiting):
            if not waiting[group] or len(chosen) >= count:
                continue
            # Rarest label first; frames without labels wait until those with one are as many.
            best = min(waiting[group], key=lambda index: min((shown[label] for label in labels[index]),
                                                             default=shown[""]))
            waiting[group].remove(best)
            shown.update(set(labels[best]) or {""})
            chosen.append(best)
    return chosen


def digest(blobs: Iterable[str], seed: int, method: str) -> str:
    """sha256 (hex) over the calibration: its frames' md5s, the seed, the kind of ranges."""
    record = {"frames": sorted(blobs), "seed": seed, "ranges": method}
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def check_frames(annotations: Mapping[str, Sequence[Annotation] | None], blobs: Mapping[str, str],
                 known: Collection[str], held_out: Mapping[str, str], model: str) -> None:
    """Raises Invalid for calibration frames with labels the model does not know, and for frames (by their pixels) that
    the certificate is going to be measured on.

    annotations, blobs  frame name -> annotations, md5, of the calibration frames
    held_out            md5 -> frame name of the frames kept for the certificate
    """
    for name, drawn in annotations.items():
        strange = sorted({one.label for one in drawn or ()} - set(known))
        if strange:
            raise Invalid(f"{name} has the label {strange[0]!r}, which {model} does not know (it knows "
                          f"{', '.join(list(known)[:10])}). Calibrate on a version labelled in the model's taxonomy.")
    for name, blob in blobs.items():
        if blob in held_out:
            raise Invalid(f"{name} has the same pixels as {held_out[blob]}, on which the certificate is measured. Give "
                          "both the same split, publish a version and calibrate on that.")


class Ranges:
    """Collects how far tensors reach: a histogram of magnitudes each, whose reach doubles when a value falls
    outside."""

    def __init__(self) -> None:
        self._reach: dict[str, float] = {}
        self._counts: dict[str, np.ndarray] = {}
        self._largest: dict[str, float] = {}
        self._ends: dict[str, tuple[float, float]] = {}

    def see(self, tensors: Mapping[str, np.ndarray], frame: str) -> None:
        """Raises Invalid, naming the frame, when a tensor holds a NaN or an infinity."""
        for name, values in tensors.items():
            magnitudes = np.abs(values).ravel()
            largest = float(magnitudes.max(initial=0.0))
            if not np.isfinite(largest):
                raise Invalid(f"Calibration on {frame}: tensor {name!r} holds a NaN or an infinity. The FP32 model is "
                              "broken on this frame; export it again or leave the frame out.")
            low, high = self._ends.get(name, (np.inf, -np.inf))
            self._ends[name] = min(low, float(values.min())), max(high, float(values.max()))
            # A whole step over a prime distance, so that no row or channel of the tensor is favoured.
            step = max(1, len(magnitudes) // SAMPLE) | 1
            self._add(name, magnitudes[::step], largest)

    def _add(self, name: str, magnitudes: np.ndarray, largest: float) -> None:
        counts = self._counts.setdefault(name, np.zeros(BINS, np.int64))
        reach = self._reach.get(name, 0.0) or max(largest, 1e-6)
        while reach < largest:
            folded = np.zeros_like(counts)
            folded[:BINS // 2] = counts.reshape(-1, 2).sum(axis=1)
            counts, reach = folded, reach * 2
        bins = np.minimum((magnitudes * (BINS / reach)).astype(np.int64), BINS - 1)
        self._counts[name] = counts + np.bincount(bins, minlength=BINS)
        self._reach[name] = reach
        self._largest[name] = max(self._largest.get(name, 0.0), largest)

    def of(self, method: str) -> dict[str, tuple[float, float]]:
        """Tensor -> the (lowest, highest) value int8 is to hold, by one of METHODS."""
        found = {}
        for name, (low, high) in self._ends.items():
            limit = min(self._largest[name], self._limit(method, name))
            found[name] = (max(low, -limit), min(high, limit))
        return found

    def _limit(self, method: str, name: str) -> float:
        counts, width = self._counts[name], self._reach[name] / BINS
        if method == "minmax":
            return self._largest[name]
        if method == "percentile":
            return float(np.searchsorted(counts.cumsum(), counts.sum() * PERCENTILE / 100) + 1) * width
        return float(_least_divergence(counts)) * width


def _least_divergence(counts: np.ndarray) -> int:
    """How many bins int8 should cover so that the distribution loses least (Migacz, GTC 2017: KL divergence between
    what lies within, outliers moved to its last bin, and its LEVELS-level version). Bin 0 is left out: zeros after a
    Relu cost nothing wherever the range ends."""
    counts = counts.astype(float).copy()
    counts[0] = 0
    last = int(np.nonzero(counts)[0][-1]) + 1 if counts.any() else BINS
    best, least = last, np.inf
    for bins in range(LEVELS, last + 16, 16):
        bins = min(bins, last)
        within = counts[:bins]
        reference = within.copy()
        reference[-1] += counts[bins:].sum()
        level = np.arange(bins) * LEVELS // bins
        filled = within > 0
        sums = np.bincount(level, within, LEVELS)
        share = np.bincount(level, filled, LEVELS)
        spread = np.where(filled, sums[level] / np.maximum(share[level], 1), 0)
        if not spread.any():
            continue
        p, q = reference / reference.sum(), spread / spread.sum()
        # A bin that only outliers fill has no counterpart; the small floor keeps its cost finite.
        divergence = float((p[p > 0] * np.log(p[p > 0] / np.maximum(q[p > 0], 1e-9))).sum())
        if divergence < least:
            best, least = bins, divergence
    return best


def observed(model: Any, tensors: Iterable[str]) -> Any:
    """The same graph with `tensors` among its outputs, for a backend to show them."""
    import onnx
    from onnx import TensorProto, helper

    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    there = {value.name for value in shown.graph.output}
    shown.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
                              for name in tensors if name not in there)
    return shown

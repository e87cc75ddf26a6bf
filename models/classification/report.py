"""What a training of tags leaves behind: figures of val and test, model.onnx with its card, pictures."""
import argparse
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import nn

from classification.network import LICENCES
from classification.scores import best_threshold, confusion, scores
from classification.tags import Tagged, plain
from training import distributed, plots
from training.coco import Sample
from training.export import export_onnx, write_model
from training.images import Images
from training.loop import Course
from training.state import State

FIGURES = {"accuracy": "accuracy", "macro_f1": "macro F1", "map": "mAP"}
SHOWN = 8
# px of a line on the sheet of predictions, and of its bars.
LINE, BAR = 24, 160


@torch.inference_mode()
def chances_of(model: nn.Module, inputs: torch.Tensor, is_single: bool) -> np.ndarray:
    """(n, C) chances in 0..1 of (n, H, W, 3) uint8 images or of their features."""
    logits = model(inputs.to(distributed.device())).float().cpu()
    return (logits.softmax(1) if is_single else logits.sigmoid()).numpy()


def chances_of_frames(model: nn.Module, samples: list[Sample], images: Images, is_single: bool,
                      batch_size: int = 16) -> np.ndarray:
    """(n, C) chances of frames as the finished model will get them."""
    return np.concatenate([chances_of(model, torch.from_numpy(plain(samples[i:i + batch_size], images)), is_single)
                           for i in range(0, len(samples), batch_size)])


def write_results(model: nn.Module, state: State, options: argparse.Namespace, course: Course, tagged: Tagged,
                  images: Images) -> dict[str, Any]:
    """Scores val and test with the published weights, exports, writes card.json, draws; returns metrics.json's content.

    Where any number of labels apply, the threshold is the one that was best on val, also on test.
    """
    folder = options.output / "plots"
    folder.mkdir(exist_ok=True)
    model.to(distributed.device())
    is_single, labels = tagged.is_single, tagged.labels
    threshold = None if is_single else 0.5
    metrics: dict[str, Any] = {"kind": "single" if is_single else "multi"}
    shown = None
    for split in ("val", "test"):
        samples = getattr(tagged.data, split)
        if not samples:
            continue
        chances, truth = chances_of_frames(model, samples, images, is_single), tagged.truth(samples)
        if split == "val" and not is_single:
            threshold = best_threshold(chances, truth)
        found = scores(chances, truth, labels, threshold)
        shown = samples, chances, truth, found.pop("pr")
        metrics[split] = {**found, "frames": len(samples), **({} if is_single else {"best_f1_confidence": threshold})}
        metrics.update(split=split, per_class=found["per_class"], **{name: found[name] for name in FIGURES})
    decoder = {"name": "classification", "score": "softmax" if is_single else "sigmoid",
               # One label applies for certain: the likeliest is set whatever its chance.
               "confidence": 0.0 if is_single else threshold}
    write_model(model, state, options, course, metrics, about={name: metrics.get(name) for name in FIGURES},
                export=lambda model, size, file: export_onnx(model, size, file, ["logits"]), decoder=decoder,
                licence=LICENCES[options.architecture], note="The normalisation is inside the graph.")
    plots.history(folder, state.history, FIGURES)
    if shown:
        samples, chances, truth, curves = shown
        title = f"{metrics['split']}, {'the likeliest label' if is_single else f'labels above {threshold:.2f}'}"
        names = labels if is_single else [*labels, "nothing"]
        counts = confusion(chances, truth, threshold)[:len(names), :len(names)]
        plots.confusion(folder / "confusion.png", counts, names, title)
        plots.curves(folder / "pr.png", "Precision and recall of each label", "recall", "precision",
                     [(label, *curve) for label, curve in curves.items()], limits=(0, 1.02))
        if metrics["per_class"]:
            plots.table(folder / "per_class.png", metrics["per_class"], title)
        _draw(folder / "predictions.png", samples, chances, truth, labels, threshold)
    return metrics


def _draw(file: Path, samples: list[Sample], chances: np.ndarray, truth: np.ndarray, labels: list[str],
          threshold: float | None) -> None:
    """Frames with their likeliest labels: first those the model is most wrong about, then some of all."""
    wrong = np.abs(chances - truth).max(1)
    worst = [int(at) for at in np.argsort(-wrong, kind="stable")[:SHOWN // 2]]
    spread = [int(at) for at in np.linspace(0, len(samples) - 1, SHOWN).round()]
    pairs = []
    for at in list(dict.fromkeys([*worst, *spread]))[:SHOWN]:
        left = plots.tile(samples[at], np.zeros((0, 4)), [], np.zeros(0, int), len(labels))
        right = np.full((max(left.shape[0], 6 * LINE), plots.TILE, 3), 255, np.uint8)
        most = np.argsort(-chances[at], kind="stable")[:max(1, right.shape[0] // LINE - 1)]
        for row, k in enumerate(most):
            is_set = chances[at, k] > threshold if threshold is not None else row == 0
            y = row * LINE + 4
            colour = (0, 150, 90) if truth[at, k] else (210, 90, 0) if is_set else (170, 170, 170)
            cv2.rectangle(right, (8, y), (8 + int(BAR * chances[at, k]), y + LINE - 8), colour, -1)
            mark = (": right" if is_set else ": missed") if truth[at, k] else ": wrong" if is_set else ""
            plots.write(right, f"{chances[at, k]:.2f} {labels[k]}{mark}", (BAR + 16, y + LINE - 11), (0, 0, 0), 0.45)
        if right.shape[0] > left.shape[0]:
            left = np.concatenate([left, np.full((right.shape[0] - left.shape[0], *left.shape[1:]), 255, np.uint8)])
        pairs.append(np.concatenate([left, right], axis=1))
    plots.sheet(file, pairs, ("frame", "the model's chances"))

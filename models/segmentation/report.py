"""What a training of regions leaves behind: figures of val and test, model.onnx with its card, pictures."""
import argparse
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import nn
from torch.nn.functional import interpolate

from segmentation.network import STRIDE
from segmentation.overlap import confusion, overlap
from segmentation.painting import Painted, Paintings
from segmentation.regions import BACKGROUND, IGNORED
from training import distributed, plots
from training.coco import Sample
from training.detection import Found, coco_metrics
from training.export import export_onnx, write_model
from training.loop import Course
from training.state import State

FIGURES = {"miou": "mean IoU", "pixel_accuracy": "pixel accuracy"}
# The workbench's semantic decoder: regions of fewer canvas pixels are specks that no person would draw.
MIN_AREA = 64
CONFIDENCE = 0.5
SHOWN = 6


@torch.inference_mode()
def logits_of(model: nn.Module, canvas: np.ndarray) -> torch.Tensor:
    """(K, h, w) of one (H, W, 3) uint8 canvas, on the CPU."""
    return model(torch.from_numpy(canvas[None]).to(distributed.device()))[0].float().cpu()


def ids_of(logits: torch.Tensor) -> np.ndarray:
    """(H, W) class ids of the canvas' pixels, 0 the background."""
    return interpolate(logits[None], scale_factor=float(STRIDE), mode="bilinear",
                       align_corners=False)[0].argmax(0).numpy()


def look(model: nn.Module, samples: list[Sample], paintings: Paintings,
         labels: list[str]) -> tuple[dict, np.ndarray, list[Found]]:
    """What a network (in eval mode) makes of frames: overlap.overlap of it, the (1 + C, 1 + C) pixel counts that it
    comes from, and the boxes around the regions of each frame."""
    counts, found = np.zeros((1 + len(labels),) * 2, np.int64), []
    for sample in samples:
        canvas, truth = paintings.letterboxed(sample)
        logits = logits_of(model, canvas)
        counts += confusion(ids_of(logits)[:truth.shape[0], :truth.shape[1]], truth, len(counts))
        scale = min(canvas.shape[1] / sample.width, canvas.shape[0] / sample.height)
        found.append(regions_of(logits, scale, (sample.width, sample.height)))
    return overlap(counts, labels), counts, found


def regions_of(logits: torch.Tensor, scale: float, image_size: tuple[int, int]) -> Found:
    """Boxes (n, 4) xyxy in the frame's pixels around the connected regions of (K, h, w) logits, their scores (the mean
    probability of their cells) and class ids, best first: what the card's semantic decoder makes of them."""
    chances, ids = logits.softmax(0).max(0)
    rows = []
    for class_id in range(len(logits) - 1):
        mask = (ids.numpy() == class_id + 1).astype(np.uint8)
        count, regions, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
        sums = np.bincount(regions.ravel(), chances.numpy().ravel(), count)
        rows += [(sums[k] / stats[k, 4], class_id, *stats[k, :4]) for k in range(1, count)
                 if stats[k, 4] * STRIDE**2 >= MIN_AREA]
    found = np.array(sorted(rows, reverse=True), np.float32).reshape(-1, 6)
    xyxy = np.concatenate([found[:, 2:4], found[:, 2:4] + found[:, 4:6]], axis=1) * STRIDE / scale
    return (xyxy.clip(0, [*image_size, *image_size]).astype(np.float32), found[:, 0].clip(0, 1),
            found[:, 1].astype(np.int64))


def write_results(model: nn.Module, state: State, options: argparse.Namespace, course: Course, painted: Painted,
                  paintings: Paintings) -> dict[str, Any]:
    """Scores val and test with the published weights, exports, writes card.json, draws; returns metrics.json's content:
    "val" and "test" with overlap's figures and the boxes' mAP, and those of the last of them at the top."""
    folder, labels = options.output / "plots", course.labels
    folder.mkdir(exist_ok=True)
    model.to(distributed.device())
    metrics: dict[str, Any] = {}
    shown = None
    for split in ("val", "test"):
        samples = getattr(painted.data, split)
        if not samples:
            continue
        found, counts, regions = look(model, samples, paintings, labels)
        boxes = coco_metrics(samples, regions, labels)
        metrics[split] = {**found, **{name: boxes[name] for name in ("map_50_95", "map_50")}, "frames": len(samples)}
        metrics.update({name: value for name, value in metrics[split].items() if name != "frames"}, split=split)
        shown = samples, counts
    if shown:
        samples, counts = shown
        shares = np.round(100 * counts / np.maximum(1, counts.sum(1, keepdims=True))).astype(int)
        plots.confusion(folder / "confusion.png", shares, ["background", *labels],
                        f"{metrics['split']}, % of the pixels people drew")
        if metrics["per_class"]:
            plots.table(folder / "per_class.png", metrics["per_class"], f"{metrics['split']}, by pixels")
        _draw(folder / "predictions.png", model, samples, paintings, labels)
    write_model(model, state, options, course, metrics, about={name: metrics.get(name) for name in FIGURES},
                export=lambda model, size, file: export_onnx(model, size, file, ["logits"]),
                decoder={"name": "semantic", "background": 0, "confidence": CONFIDENCE, "min_area": MIN_AREA},
                licence="Apache-2.0", note="(x-127)/128 is inside the graph.")
    plots.history(folder, state.history, FIGURES)
    return metrics


def _draw(file: Path, model: nn.Module, samples: list[Sample], paintings: Paintings, labels: list[str]) -> None:
    """A sheet of frames spread over the split: left what people drew, right what the model found."""
    pairs = []
    for at in sorted({int(place) for place in np.linspace(0, len(samples) - 1, SHOWN).round()}):
        canvas, truth = paintings.letterboxed(samples[at])
        found = ids_of(logits_of(model, canvas))[:truth.shape[0], :truth.shape[1]]
        pairs.append(np.concatenate([_overlay(canvas[:truth.shape[0], :truth.shape[1]], ids, labels)
                                     for ids in (truth, found)], axis=1))
    plots.sheet(file, pairs, ("people drew", "the model found"))


def _overlay(image: np.ndarray, ids: np.ndarray, labels: list[str]) -> np.ndarray:
    """A tile with each label's pixels in its colour and its name; what counts as nothing is grey."""
    height = max(1, round(plots.TILE * image.shape[0] / image.shape[1]))
    width, height = (plots.TILE, height) if height <= plots.TILE else (
        max(1, round(plots.TILE * image.shape[1] / image.shape[0])), plots.TILE)
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    ids = cv2.resize(ids.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    tile = np.full((height, plots.TILE, 3), plots.GREY, np.uint8)
    tile[:, :width] = image
    for k in np.unique(ids[ids != BACKGROUND]):
        mask = ids == k
        colour = (128, 128, 128) if k == IGNORED else plots.colour_of(int(k) - 1, len(labels))
        tile[:, :width][mask] = (0.55 * image[mask] + 0.45 * np.array(colour)).astype(np.uint8)
        outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(tile, outlines, -1, colour, 1)
        x, y, _, _ = cv2.boundingRect(max(outlines, key=cv2.contourArea))
        plots.write(tile, "not known" if k == IGNORED else labels[k - 1], (x + 2, max(12, y - 3)), colour, 0.4)
    return tile

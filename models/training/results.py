"""What a detection recipe leaves behind: model.onnx checked and measured, card.json, figures and pictures."""
import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from training import plots
from training.card import agreement
from training.coco import Data
from training.detection import CONFIDENCE, Decode, coco_metrics, confusion, detect, per_class
from training.export import write_model
from training.images import Images
from training.loop import Course
from training.state import State

FIGURES = {"map_50_95": "mAP@[.5:.95]", "map_50": "mAP@.5"}


def figures(model: nn.Module, decode: Decode, data: Data, images: Images) -> dict[str, float]:
    """What the loop's `validate` returns for a detector."""
    metrics = coco_metrics(data.val, detect(model, decode, data.val, images), data.labels)
    return {name: metrics[name] for name in FIGURES}


def write_results(
    model: nn.Module, state: State, options: argparse.Namespace, course: Course, data: Data, images: Images, *,
    decode: Decode, export: Callable[[nn.Module, tuple[int, int], Path], None], decoder: dict[str, Any], licence: str,
    note: str, compare: Callable[[nn.Module, tuple[int, int], Path], float | None] = agreement,
    further: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Scores val and test with the published weights, exports, compares, measures, writes card.json, draws.

    decode   as in detection.Decode; decoder: what the card says of it; note: what is inside the graph
    compare  the largest difference between the file's and the network's outputs; raises TrainingError when too large
    further  figures for both metrics.json and the card

    Returns the final metrics: "val" and "test" with coco_metrics' figures, and those of the last of them at the top.
    """
    folder = options.output / "plots"
    folder.mkdir(exist_ok=True)
    metrics: dict[str, Any] = dict(further or {})
    shown = None
    for split in ("val", "test"):
        samples = getattr(data, split)
        if not samples:
            continue
        found = detect(model, decode, samples, images)
        result = coco_metrics(samples, found, data.labels)
        shown = samples, found, result.pop("pr")
        metrics[split] = {**result, "frames": len(samples)}
        metrics.update(split=split, map_50_95=result["map_50_95"], map_50=result["map_50"])
    final = metrics.get(metrics.get("split"), {})
    about = {key: final.get(key) for key in ("ap", "best_f1", "best_f1_confidence")}
    about |= {key: metrics.get(key) for key in FIGURES}
    write_model(model, state, options, course, metrics, about={**about, **(further or {})},
                export=export, decoder=decoder, licence=licence, note=note, compare=compare)
    plots.history(folder, state.history, FIGURES)
    if shown:
        samples, found, pr = shown
        confidence = max(final["best_f1_confidence"], CONFIDENCE)
        counts = confusion(samples, found, len(data.labels), confidence)
        rows = per_class(counts, final, data.labels)
        metrics["per_class"] = rows
        plots.precision_recall(folder / "pr.png", pr)
        plots.confusion(folder / "confusion.png", counts, [*data.labels, "nothing"],
                        f"{metrics['split']}, confidence {confidence:.2f}, IoU 0.5")
        plots.table(folder / "per_class.png", rows, f"{metrics['split']}, precision and recall at {confidence:.2f}")
        plots.predictions(folder / "predictions.png", samples, found, data.labels, confidence)
    return metrics

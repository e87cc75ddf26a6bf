"""The end of every training: the network as ONNX, compared, measured and described by its card."""
import argparse
import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training.card import agreement, measure, write_card
from training.loop import Course
from training.output import say
from training.state import State


def export_onnx(model: nn.Module, size: tuple[int, int], file: Path, outputs: Sequence[str], any_batch: bool = True) -> None:
    """Writes the network as ONNX opset 18: `images` (N, H, W, 3) uint8 in, `outputs` out; N free, or 1.

    The exporter's optimiser folds every batch norm that follows a convolution of its own; INT8 needs it so.
    """
    model = copy.deepcopy(model).cpu().eval().to(memory_format=torch.contiguous_format)
    # A batch of 1 would be taken for a constant.
    images = torch.zeros(2 if any_batch else 1, size[1], size[0], 3, dtype=torch.uint8)
    free = ({0: torch.export.Dim("batch", min=1, max=1024)},) if any_batch else None
    program = torch.onnx.export(
        model, (images,), dynamo=True, opset_version=18, input_names=["images"], output_names=list(outputs),
        dynamic_shapes=free, optimize=True, verbose=False)
    partial = file.with_suffix(".partial.onnx")
    program.save(str(partial), external_data=False)
    partial.replace(file)


def write_model(
    model: nn.Module, state: State, options: argparse.Namespace, course: Course, metrics: dict[str, Any], *,
    export: Callable[[nn.Module, tuple[int, int], Path], None], decoder: dict[str, Any], licence: str, note: str,
    about: dict[str, Any], compare: Callable[[nn.Module, tuple[int, int], Path], float | None] = agreement,
) -> None:
    """Writes model.onnx and card.json for the published weights, and what was measured of the file into `metrics`.

    decoder  what the card says of it; note: what is inside the graph; about: figures that the card says
    compare  the largest difference between the file's and the network's outputs; raises TrainingError when too large
    """
    file = options.output / "model.onnx"
    model.cpu()
    export(model, course.size, file)
    metrics.update(onnx_difference=compare(model, course.size, file), **measure(model, course.size, file))
    name = options.name if options.name != "none" else str(course.dataset.get("ref", "detector")).split("@")[0]
    measured = ("parameter_count", "size_mb", "latency_ms", "latency_on")
    write_card(options.output, name, course.size, course.labels, decoder, licence, course.dataset, {
        **about, **{key: metrics[key] for key in ("split", *measured) if key in metrics}, "epochs": state.epoch,
        "start_from": course.start_from}, note)
    say(f"model.onnx: {metrics['size_mb']:.1f} MB, {metrics['parameter_count'] / 1e6:.2f} million parameters, "
        f"{metrics.get('latency_ms', float('nan')):.1f} ms a frame")

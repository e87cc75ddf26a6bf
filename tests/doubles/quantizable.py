"""Models of each task with layers worth quantising, built by hand so that what they find is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from doubles.graphs import save
from workbench.inference.graph import file_record
from workbench.model import InputSpec, ModelCard
from workbench.taxonomy import Taxonomy


# Colours in the order of the labels red, blue, dark: how much each of R, G, B speaks for it.
MIX = np.array([(1, -0.5, -0.5), (-0.5, -0.5, 1), (0, 0, 0)], np.float32).reshape(3, 3, 1, 1)


def _trunk(scale: float, hard: bool = False) -> tuple[list[Any], dict[str, np.ndarray]]:
    """Nodes and constants of three convolutions, from "images" (n, H, W, 3) uint8 to "colours" (n, 3, H, W): the same
    pixels times `scale`.

    hard  "third" has one weight, of a channel that is always 0, that drowns the others: in int8 they are all 0
    """
    count = 6 + hard
    spread = np.zeros((count, 3, 3, 3), np.float32)
    back = np.zeros((3, count, 1, 1), np.float32)
    for channel in range(3):
        # Each colour as a positive and a negative half, put together again behind the Relu: x = relu(x) - relu(-x).
        spread[channel, channel, 1, 1], spread[3 + channel, channel, 1, 1] = scale, -scale
        back[channel, channel], back[channel, 3 + channel] = 1, -1
    back[:, 6:] = 1000
    each = np.zeros((count, 1, 3, 3), np.float32)
    each[:6, 0, 1, 1] = 1
    nodes = [
        helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["x"], ["chw"], perm=[0, 3, 1, 2]),
        helper.make_node("Sub", ["chw", "middle"], ["centred"]),
        helper.make_node("Conv", ["centred", "spread", "none"], ["halves"], pads=[1] * 4, name="first"),
        helper.make_node("Relu", ["halves"], ["kept"]),
        helper.make_node("Conv", ["kept", "each"], ["same"], pads=[1] * 4, group=count, name="second"),
        helper.make_node("Conv", ["same", "back", "shift"], ["colours"], name="third")]
    return nodes, {"middle": np.float32(127.5), "spread": spread, "none": np.zeros(count, np.float32), "each": each,
                   "back": back, "shift": np.full(3, 127.5 * scale, np.float32)}


def _card(folder: Path, nodes: list[Any], constants: dict[str, np.ndarray], outputs: list[str], side: int, name: str,
          labels: tuple[str, ...], decoder: dict[str, Any], **spec: Any) -> ModelCard:
    folder.mkdir(parents=True, exist_ok=True)
    path = save(folder / "model.onnx", nodes, {"images": (["n", side, side, 3], "uint8")}, outputs, constants)
    return ModelCard(name, "1", InputSpec(size=(side, side), **spec), decoder, Taxonomy(labels),
                     {"model.onnx": file_record(path)}, licence="Apache-2.0")


def deep_tags(folder: Path, side: int = 64, name: str = "tags", hard: bool = False, **decoder: Any) -> ModelCard:
    """doubles.graphs.red_tags behind the three convolutions: red, blue or dark by the mean of all pixels."""
    nodes, constants = _trunk(1 / 255, hard)
    nodes += [helper.make_node("GlobalAveragePool", ["colours"], ["pooled"]),
              helper.make_node("Conv", ["pooled", "mix", "bias"], ["logits"], name="head")]
    constants |= {"mix": MIX * 16, "bias": np.array([0, 0, 2], np.float32)}
    return _card(folder, nodes, constants, ["logits"], side, name, ("red", "blue", "dark"),
                 {"name": "classification", "confidence": 0.5, **decoder}, padding="stretch")


def deep_masks(folder: Path, side: int = 64, name: str = "masks", hard: bool = False,
               as_ids: bool = False) -> ModelCard:
    """doubles.graphs.red_masks behind the three convolutions: regions of red and blue, 8 px a cell.

    as_ids  the graph gives class ids instead of logits
    """
    nodes, constants = _trunk(1 / 255, hard)
    nodes += [helper.make_node("AveragePool", ["colours"], ["pooled"], kernel_shape=[8, 8], strides=[8, 8]),
              helper.make_node("Conv", ["pooled", "mix", "bias"], ["maps"], name="head")]
    if as_ids:
        nodes += [helper.make_node("ArgMax", ["maps"], ["best"], axis=1, keepdims=0),
                  helper.make_node("Cast", ["best"], ["ids"], to=TensorProto.FLOAT)]
    constants |= {"mix": MIX[[2, 0, 1]] * 16, "bias": np.array([8, 0, 0], np.float32)}
    return _card(folder, nodes, constants, ["ids" if as_ids else "maps"], side, name, ("red", "blue"),
                 {"name": "semantic", "confidence": 0.5}, pad=0)


def deep_instances(folder: Path, side: int = 64, name: str = "things") -> ModelCard:
    """deep_finder's squares with a mask each, as yolov8_seg gives them: one prototype, positive where a cell is red or
    blue."""
    cells, (nodes, constants) = side // 8, _trunk(1 / 255)
    nodes += [
        helper.make_node("AveragePool", ["colours"], ["pooled"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Conv", ["pooled", "mix", "bias"], ["maps"], name="head"),
        helper.make_node("Sigmoid", ["maps"], ["sure"]),
        helper.make_node("Reshape", ["sure", "flat"], ["scores"]),
        helper.make_node("ReduceMax", ["maps"], ["prototypes"], axes=[1], keepdims=1),
        helper.make_node("ReduceMax", ["scores"], ["surest"], axes=[1], keepdims=1),
        helper.make_node("Mul", ["surest", "zero"], ["nought"]),
        helper.make_node("Add", ["nought", "around"], ["boxes"]),
        helper.make_node("Add", ["nought", "one"], ["coefficients"]),
        helper.make_node("Concat", ["boxes", "scores", "coefficients"], ["found"], axis=1)]
    rows, columns = np.mgrid[:cells, :cells] * 8.0 + 4
    around = np.stack([columns.ravel(), rows.ravel(), *np.full((2, cells * cells), 16.0)])[None].astype(np.float32)
    constants |= {"mix": MIX[:2] * 255 / 8, "bias": np.full(2, -4, np.float32), "around": around, "zero": np.float32(0),
                  "flat": np.array([0, 2, cells * cells], np.int64), "one": np.float32(1)}
    return _card(folder, nodes, constants, ["found", "prototypes"], side, name, ("red", "blue"),
                 {"name": "yolov8_seg", "strides": [8], "confidence": 0.5, "iou": 0.3})


def deep_finder(folder: Path, labels: tuple[str, ...] = ("red", "blue"), side: int = 64, scale: float = 1 / 255,
                name: str = "deep", poison: bool = False, hard: bool = False) -> ModelCard:
    """doubles.graphs.red_finder with three convolutions before its head: 8 px squares of mostly red are its first
    label, mostly blue the second, each with a box of two cells around the cell's middle. Returns its card.

    hard    see _trunk
    poison  a picture whose first pixel is pure green makes a NaN in the middle of the graph
    """
    cells = side // 8
    mix = np.zeros((len(labels), 3, 1, 1), np.float32)
    mix[0, :, 0, 0] = (1, -0.5, -0.5)
    if len(labels) > 1:
        mix[1, :, 0, 0] = (-0.5, -0.5, 1)
    nodes, constants = _trunk(scale, hard)
    nodes += [
        helper.make_node("AveragePool", ["colours"], ["pooled"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Conv", ["pooled", "mix", "bias"], ["maps"], name="head"),
        helper.make_node("Reshape", ["maps", "flat"], ["flattened"]),
        helper.make_node("Transpose", ["flattened"], ["cls_logits"], perm=[0, 2, 1]),
        helper.make_node("ReduceMax", ["cls_logits"], ["largest"], axes=[2], keepdims=1),
        helper.make_node("Mul", ["largest", "zero"], ["nought"]),
        helper.make_node("Add", ["nought", "ones"], ["bbox_regression"]),
        helper.make_node("Add", ["nought", "twenty"], ["bbox_ctrness"])]
    constants |= {
        "mix": mix / (8 * scale), "bias": np.full(len(labels), -4, np.float32),
        "flat": np.array([0, len(labels), cells * cells], np.int64), "zero": np.float32(0),
        "ones": np.ones((1, 1, 4), np.float32), "twenty": np.float32(20)}
    if poison:
        # log of (255 - green of the first pixel) * 0 + ... : log(0) * 0 is NaN, log of anything else times 0 is 0.
        nodes[3:3] = [
            helper.make_node("Slice", ["chw", "at", "end", "axes"], ["pixel"]),
            helper.make_node("Sub", ["full", "pixel"], ["rest"]), helper.make_node("Log", ["rest"], ["logged"]),
            helper.make_node("Mul", ["logged", "zero"], ["poison"]),
            helper.make_node("Add", ["centred", "poison"], ["poisoned"])]
        nodes[8].input[0] = "poisoned"
        constants |= {"at": np.array([1, 0, 0], np.int64), "end": np.array([2, 1, 1], np.int64),
                      "axes": np.array([1, 2, 3], np.int64), "full": np.float32(255)}
    folder.mkdir(parents=True, exist_ok=True)
    path = save(folder / "model.onnx", nodes, {"images": (["n", side, side, 3], "uint8")},
                ["cls_logits", "bbox_regression", "bbox_ctrness"], constants)
    return ModelCard(name, "1", InputSpec(size=(side, side)),
                     {"name": "fcos", "strides": [8], "confidence": 0.5, "iou": 0.3}, Taxonomy(labels),
                     {"model.onnx": file_record(path)}, licence="Apache-2.0")

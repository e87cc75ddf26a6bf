"""A detector with layers worth quantising, built by hand so that what it finds is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

from doubles.graphs import save
from workbench.inference.graph import file_record
from workbench.model import InputSpec, ModelCard
from workbench.taxonomy import Taxonomy


def deep_finder(folder: Path, labels: tuple[str, ...] = ("red", "blue"), side: int = 64, scale: float = 1 / 255,
                name: str = "deep", poison: bool = False) -> ModelCard:
    """doubles.graphs.red_finder with three convolutions before its head: 8 px squares of mostly red are its first
    label, mostly blue the second, each with a box of two cells around the cell's middle. Returns its card.

    poison  a picture whose first pixel is pure green makes a NaN in the middle of the graph
    """
    cells = side // 8
    mix = np.zeros((len(labels), 3, 1, 1), np.float32)
    mix[0, :, 0, 0] = (1, -0.5, -0.5)
    if len(labels) > 1:
        mix[1, :, 0, 0] = (-0.5, -0.5, 1)
    spread = np.zeros((6, 3, 3, 3), np.float32)
    back = np.zeros((3, 6, 1, 1), np.float32)
    for channel in range(3):
        # Each colour as a positive and a negative half, put together again behind the Relu: x = relu(x) - relu(-x).
        spread[channel, channel, 1, 1], spread[3 + channel, channel, 1, 1] = scale, -scale
        back[channel, channel], back[channel, 3 + channel] = 1, -1
    each = np.zeros((6, 1, 3, 3), np.float32)
    each[:, 0, 1, 1] = 1
    nodes = [
        helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["x"], ["chw"], perm=[0, 3, 1, 2]),
        helper.make_node("Sub", ["chw", "middle"], ["centred"]),
        helper.make_node("Conv", ["centred", "spread", "none"], ["halves"], pads=[1] * 4, name="first"),
        helper.make_node("Relu", ["halves"], ["kept"]),
        helper.make_node("Conv", ["kept", "each"], ["same"], pads=[1] * 4, group=6, name="second"),
        helper.make_node("Conv", ["same", "back", "shift"], ["colours"], name="third"),
        helper.make_node("AveragePool", ["colours"], ["pooled"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Conv", ["pooled", "mix", "bias"], ["maps"], name="head"),
        helper.make_node("Reshape", ["maps", "flat"], ["flattened"]),
        helper.make_node("Transpose", ["flattened"], ["cls_logits"], perm=[0, 2, 1]),
        helper.make_node("ReduceMax", ["cls_logits"], ["largest"], axes=[2], keepdims=1),
        helper.make_node("Mul", ["largest", "zero"], ["nought"]),
        helper.make_node("Add", ["nought", "ones"], ["bbox_regression"]),
        helper.make_node("Add", ["nought", "twenty"], ["bbox_ctrness"])]
    constants = {
        "middle": np.float32(127.5), "spread": spread, "none": np.zeros(6, np.float32), "each": each, "back": back,
        "shift": np.full(3, 127.5 * scale, np.float32), "mix": mix / (8 * scale),
        "bias": np.full(len(labels), -4, np.float32), "flat": np.array([0, len(labels), cells * cells], np.int64),
        "zero": np.float32(0), "ones": np.ones((1, 1, 4), np.float32), "twenty": np.float32(20)}
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

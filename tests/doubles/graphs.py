"""Tiny ONNX graphs for tests, built by hand so that every number of their results is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from workbench.inference.graph import file_record
from workbench.model import InputSpec, ModelCard
from workbench.taxonomy import Taxonomy

TYPES = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8, "int64": TensorProto.INT64}


def save(path: Path, nodes: list[onnx.NodeProto], inputs: dict[str, tuple[list[Any], str]], outputs: list[str],
         constants: dict[str, np.ndarray]) -> Path:
    """inputs: name -> (shape with strings for free sides, dtype)."""
    graph = helper.make_graph(
        nodes, "tiny",
        [helper.make_tensor_value_info(name, TYPES[dtype], shape) for name, (shape, dtype) in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(path))
    return path


def affine(path: Path, batch: int | str = "n") -> Path:
    """images (batch, 2, 2, 3) uint8 -> "double" = 2x and "next" = x + 1, the latter an integer in the graph."""
    nodes = [helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT),
             helper.make_node("Mul", ["x", "two"], ["double"]),
             helper.make_node("Add", ["x", "one"], ["next"])]
    return save(path, nodes, {"images": ([batch, 2, 2, 3], "uint8")}, ["double", "next"],
                {"two": np.float32(2), "one": np.float32(1)})


def shuffled(path: Path, order: list[int]) -> Path:
    """images (1, C, 4, 4) float32 -> its channels in `order`, then weighed 1, 10, 100, ... and summed: (1, 1, 4, 4)."""
    count = len(order)
    weights = (10.0 ** np.arange(count, dtype=np.float32)).reshape(1, count, 1, 1)
    nodes = [
        helper.make_node("Conv", ["images", "same"], ["kept"]),
        helper.make_node("Gather", ["kept", "order"], ["shuffled"], axis=1),
        helper.make_node("Conv", ["shuffled", "weights"], ["sum"]),
    ]
    return save(
        path,
        nodes,
        {"images": ([1, count, 4, 4], "float32")},
        ["sum"],
        {
            "same": np.eye(count, dtype=np.float32).reshape(count, count, 1, 1),
            "order": np.array(order, np.int64),
            "weights": weights,
        },
    )


def red_finder(
    folder: Path, labels: tuple[str, ...] = ("red", "blue"), side: int = 64, batch: int | str = "n"
) -> ModelCard:
    """A detector of the fcos family that really looks: at every stride-8 cell whose pixels are mostly red it finds the
    first label, mostly blue the second, each with a box of two cells around the cell's middle. Returns its card.

    Its logits are (own colour - other colours' mean) / 8, so pure red (255, 0, 0) scores sigmoid(31.9 - 4).
    """
    cells = side // 8
    mix = np.zeros((len(labels), 3, 1, 1), np.float32)
    mix[0, :, 0, 0] = (1, -0.5, -0.5)
    if len(labels) > 1:
        mix[1, :, 0, 0] = (-0.5, -0.5, 1)
    nodes = [
        helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["x"], ["chw"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["chw"], ["pooled"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Conv", ["pooled", "mix", "bias"], ["maps"]),
        helper.make_node("Reshape", ["maps", "flat"], ["flattened"]),
        helper.make_node("Transpose", ["flattened"], ["cls_logits"], perm=[0, 2, 1]),
        # Boxes and centre-ness are the same everywhere: 1 stride to each side, sigmoid(20).
        helper.make_node("ReduceMax", ["cls_logits"], ["largest"], axes=[2], keepdims=1),
        helper.make_node("Mul", ["largest", "zero"], ["nought"]),
        helper.make_node("Add", ["nought", "ones"], ["bbox_regression"]),
        helper.make_node("Add", ["nought", "twenty"], ["bbox_ctrness"])]
    folder.mkdir(parents=True, exist_ok=True)
    path = save(folder / "model.onnx", nodes, {"images": ([batch, side, side, 3], "uint8")},
                ["cls_logits", "bbox_regression", "bbox_ctrness"],
                {"mix": mix / 8, "bias": np.full(len(labels), -4, np.float32),
                 "flat": np.array([0, len(labels), cells * cells], np.int64), "zero": np.float32(0),
                 "ones": np.ones((1, 1, 4), np.float32), "twenty": np.float32(20)})
    return ModelCard("finder", "1", InputSpec(size=(side, side)),
                     {"name": "fcos", "strides": [8], "confidence": 0.5, "iou": 0.3}, Taxonomy(labels),
                     {"model.onnx": file_record(path)}, licence="Apache-2.0")


def red_masks(folder: Path, side: int = 256) -> ModelCard:
    """A semantic model that really looks: (n, 3, side / 8, side / 8) logits of background, red and blue, each cell by
    the mean of its pixels. Returns its card."""
    nodes = [
        helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["x"], ["chw"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["chw"], ["pooled"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Conv", ["pooled", "mix", "bias"], ["maps"])]
    mix = np.array([(0, 0, 0), (1, -0.5, -0.5), (-0.5, -0.5, 1)], np.float32).reshape(3, 3, 1, 1)
    folder.mkdir(parents=True, exist_ok=True)
    path = save(folder / "model.onnx", nodes, {"images": (["n", side, side, 3], "uint8")}, ["maps"],
                {"mix": mix / 16, "bias": np.array([8, 0, 0], np.float32)})
    return ModelCard("masks", "1", InputSpec(size=(side, side), pad=0), {"name": "semantic", "confidence": 0.5},
                     Taxonomy(("red", "blue")), {"model.onnx": file_record(path)}, licence="Apache-2.0")


def red_tags(folder: Path, side: int = 32) -> ModelCard:
    """A classifier that really looks: logits of red, blue and dark by the mean of all pixels. Returns its card."""
    nodes = [
        helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["x"], ["chw"], perm=[0, 3, 1, 2]),
        helper.make_node("GlobalAveragePool", ["chw"], ["pooled"]),
        helper.make_node("Conv", ["pooled", "mix", "bias"], ["logits"])]
    mix = np.array([(1, -0.5, -0.5), (-0.5, -0.5, 1), (0, 0, 0)], np.float32).reshape(3, 3, 1, 1)
    folder.mkdir(parents=True, exist_ok=True)
    path = save(folder / "model.onnx", nodes, {"images": (["n", side, side, 3], "uint8")}, ["logits"],
                {"mix": mix, "bias": np.array([0, 0, 2], np.float32)})
    return ModelCard("tags", "1", InputSpec(size=(side, side), padding="stretch"),
                     {"name": "classification", "confidence": 0.5}, Taxonomy(("red", "blue", "dark")),
                     {"model.onnx": file_record(path)}, licence="Apache-2.0")


def chw_tags(folder: Path, side: int = 32) -> Path:
    """red_tags' graph as frameworks export a classifier: (n, 3, side, side) float32 of ImageNet's scale. Returns its file."""
    nodes = [helper.make_node("GlobalAveragePool", ["images"], ["pooled"]),
             helper.make_node("Conv", ["pooled", "mix", "bias"], ["maps"]),
             helper.make_node("Flatten", ["maps"], ["logits"])]
    mix = np.array([(4, -2, -2), (-2, -2, 4), (0, 0, 0)], np.float32).reshape(3, 3, 1, 1)
    folder.mkdir(parents=True, exist_ok=True)
    return save(folder / "model.onnx", nodes, {"images": (["n", 3, side, side], "float32")}, ["logits"],
                {"mix": mix, "bias": np.array([0, 0, 1], np.float32)})

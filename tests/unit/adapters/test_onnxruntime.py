"""What the ONNX Runtime adapter makes of Q/DQ graphs before it opens them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from doubles import graphs, quantized
from onnx import TensorProto, helper, numpy_helper

from workbench.adapters.onnxruntime import unsigned_activations


def zero_points(model: onnx.ModelProto) -> dict[str, int]:
    """Node name -> data type of its zero point."""
    constants = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return {node.name: constants[node.input[2]] for node in model.graph.node
            if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2}


def numbers(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    """Node by node, as the graph is written: no optimisation puts Q, DQ and convolution together."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})[0]


@pytest.mark.parametrize("zero", [0, -128, 7, 127])
def test_signed_activations_become_unsigned_with_the_same_numbers(tmp_path: Path, zero: int) -> None:
    model = onnx.load(quantized.convolution(tmp_path / "q.onnx", zero=zero))
    before = model.SerializeToString()
    made = unsigned_activations(model)
    assert zero_points(made) == {"q": TensorProto.UINT8, "dq": TensorProto.UINT8, "dq_w": TensorProto.INT8}
    images = np.random.default_rng(0).normal(0, 8, (2, 3, 16, 16)).astype(np.float32)
    np.testing.assert_array_equal(numbers(made, images), numbers(model, images))
    assert model.SerializeToString() == before


def test_what_is_unsigned_already_stays_as_it_is(tmp_path: Path) -> None:
    model = onnx.load(quantized.convolution(tmp_path / "q.onnx", kind=np.uint8, zero=128))
    assert unsigned_activations(model).SerializeToString() == model.SerializeToString()


def test_values_that_something_else_reads_as_int8_keep_their_meaning(tmp_path: Path) -> None:
    """A Pad fills with 0, which would be another number around 128."""
    nodes = [helper.make_node("QuantizeLinear", ["images", "s", "z"], ["q"], name="q"),
             helper.make_node("Pad", ["q", "pads"], ["padded"]),
             helper.make_node("DequantizeLinear", ["padded", "s", "z"], ["found"], name="dq")]
    path = graphs.save(tmp_path / "m.onnx", nodes, {"images": ([1, 4], "float32")}, ["found"],
                       {"s": np.float32(1), "z": np.int8(0), "pads": np.array([0, 1, 0, 1], np.int64)})
    model = onnx.load(path)
    assert zero_points(unsigned_activations(model)) == {"q": TensorProto.INT8, "dq": TensorProto.INT8}


def test_a_zero_point_shared_with_weights_stays_signed_for_them(tmp_path: Path) -> None:
    model = onnx.load(quantized.convolution(tmp_path / "q.onnx"))
    shared = numpy_helper.from_array(np.zeros(8, np.int8), "z8")
    model.graph.initializer.append(shared)
    for node in model.graph.node:
        if node.name == "dq_w":
            node.input[2] = "z8"
    made = unsigned_activations(model)
    assert zero_points(made)["dq_w"] == TensorProto.INT8 and zero_points(made)["q"] == TensorProto.UINT8

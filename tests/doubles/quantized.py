"""A convolution with Q/DQ nodes in the dialects that exporters write, by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from doubles import graphs
from onnx import helper


def convolution(path: Path, *, kind: type = np.int8, zero: int = 0, bias: type = np.float32) -> Path:
    """images (n, 3, 16, 16) float32 -> QuantizeLinear "q", DequantizeLinear "dq", Conv "conv" of int8 weights "dq_w".

    kind  of the activations' zero point; zero  its value; bias  np.int32: the bias comes from a DequantizeLinear "dq_b"
    """
    constants = {"s": np.float32(0.1), "z": kind(zero), "b": np.zeros(8, np.float32),
                 "w": np.random.default_rng(0).integers(-127, 128, (8, 3, 3, 3)).astype(np.int8),
                 "w_s": np.full(8, 0.01, np.float32), "w_z": np.zeros(8, np.int8)}
    nodes = [helper.make_node("QuantizeLinear", ["images", "s", "z"], ["x_q"], name="q"),
             helper.make_node("DequantizeLinear", ["x_q", "s", "z"], ["x"], name="dq"),
             helper.make_node("DequantizeLinear", ["w", "w_s", "w_z"], ["w_f"], name="dq_w", axis=0)]
    if bias is np.int32:
        constants |= {"b_i": np.zeros(8, np.int32), "b_s": np.full(8, 0.001, np.float32)}
        nodes.append(helper.make_node("DequantizeLinear", ["b_i", "b_s"], ["b_f"], name="dq_b", axis=0))
    given = ["x", "w_f", "b_f" if bias is np.int32 else "b"]
    nodes += [helper.make_node("Conv", given, ["y"], name="conv", pads=[1] * 4),
              helper.make_node("Relu", ["y"], ["found"])]
    used = {name for node in nodes for name in node.input}
    return graphs.save(path, nodes, {"images": (["n", 3, 16, 16], "float32")}, ["found"],
                       {name: value for name, value in constants.items() if name in used})

"""The unsigned dialect of a Q/DQ graph, which CPUs run; files keep the signed one, the only one TensorRT takes."""

from __future__ import annotations

from typing import Any

import numpy as np


def unsigned_activations(model: Any) -> Any:
    """A Q/DQ graph whose activations are uint8 around 128 instead of int8 around 0: the same numbers, since
    round(x / scale) is saturated to -128..127 in the one and to 0..255, 128 higher, in the other.

    CPUs multiply unsigned activations by signed weights. For signed activations ONNX Runtime is 1.5 to 3 times slower,
    and OpenVINO (2026.4) wrong: it runs a convolution that reads a Concat of them on values cut at 0. What is not
    plainly quantised and dequantised stays as it is.
    """
    from onnx import TensorProto, numpy_helper

    made = type(model)()
    made.CopyFrom(model)
    graph = made.graph
    zeros = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.INT8}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in graph.output}
    unsigned: dict[str, str] = {}
    for node in graph.node:
        group = [node, *readers.get(node.output[0], [])]
        # Where anything else reads the int8 values (a Pad, a Clip), their meaning would change.
        if node.op_type != "QuantizeLinear" or node.output[0] in outputs or any(
                len(one.input) < 3 or one.input[2] not in zeros for one in group) or any(
                one.op_type != "DequantizeLinear" for one in group[1:]):
            continue
        for one in group:
            zero = zeros[one.input[2]]
            if zero.name not in unsigned:
                unsigned[zero.name] = f"{zero.name}_unsigned"
                values = (numpy_helper.to_array(zero).astype(np.int16) + 128).astype(np.uint8)
                graph.initializer.append(numpy_helper.from_array(values, unsigned[zero.name]))
            one.input[2] = unsigned[zero.name]
    del graph.value_info[:]
    return made

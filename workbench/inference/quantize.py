"""Quantize: a detector's graph with explicit QuantizeLinear / DequantizeLinear nodes, one file for every backend.

Weights are per-channel symmetric int8, activations per-tensor symmetric int8 (zero point 0), biases and the head's
output convolutions float. TensorRT takes nothing else: no int32 bias, no zero point other than 0.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from workbench.errors import Invalid
from workbench.inference import rewrite
from workbench.inference.rewrite import attribute, replace

# Symmetric int8 leaves -128 unused, so that weights and their negatives are treated alike (Jacob et al., 2018).
LEVELS = 127
# Operations whose second input is weights.
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Operations that only move or choose values: what comes out lies on the grid of what went in.
MOVING = ("MaxPool", "Reshape", "Transpose", "Slice", "Split", "Gather", "Squeeze", "Unsqueeze", "Flatten", "Identity",
          "Concat", "DepthToSpace", "SpaceToDepth", "Expand", "Tile")
# Parts of the names of operations that compute with integers, ONNX' own and ONNX Runtime's (docs/ContribOperators.md).
INTEGER = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantize", "Integer", "QLinear", "QGemm", "QAttention", "NBits")
# A scale below the smallest normal float32 would divide by zero on some devices.
LEAST_RANGE = 1e-12


@dataclass(frozen=True)
class Plan:
    """What of a prepared graph becomes int8.

    layers   names of the nodes that compute in int8, in the order of the graph
    sites    groups of tensors that are quantised; those of one group meet in a Concat and share one scale
    readers  of each group, the layers that read it
    head     names of the layers that make the outputs: they stay float
    """

    layers: tuple[str, ...]
    sites: tuple[tuple[str, ...], ...]
    readers: tuple[tuple[str, ...], ...]
    head: tuple[str, ...]


def is_quantized(model: Any) -> bool:
    """Whether an onnx.ModelProto holds quantised operations, its subgraphs and functions included."""
    return any(part in node.op_type for node in _all_nodes(model) for part in INTEGER)


def prepare(model: Any) -> Any:
    """The same computation, rewritten for int8 (see rewrite.py) and ready to be planned. Raises Invalid for a graph
    that is quantised already or has an opset below 13 and cannot be converted."""
    if is_quantized(model):
        raise Invalid("The graph is quantised already (it holds Q/DQ or integer operations). Start from its FP32 file.")
    prepared = rewrite.prepare(model)
    rewrite.fold_focus(prepared)
    rewrite.absorb_shuffles(prepared)
    return prepared


def plan(model: Any, float_layers: Collection[str] = ()) -> Plan:
    """Which layers of a prepared graph compute in int8 and which tensors are quantised for that.

    float_layers  names of nodes that stay float beside the head

    Raises Invalid when nothing is left to quantise.
    """
    graph = model.graph
    maker = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    head = _head(graph, maker, constants)
    weighted = [node for node in graph.node if _weights(node, constants)]
    layers = [node for node in weighted if node.name not in head and node.name not in float_layers]
    if not layers:
        raise Invalid(
            f"The graph has nothing to quantise: {len(weighted)} of its layers have constant weights, {len(head)} of "
            f"them make the outputs and stay float, {len(set(float_layers) - head)} were asked to. Weights that are "
            "computed at run time cannot be quantised; export the model with its weights as constants.")
    parent: dict[str, str] = {}

    def root(tensor: str) -> str:
        while parent.setdefault(tensor, tensor) != tensor:
            tensor = parent[tensor]
        return tensor

    def climb(tensor: str) -> list[str]:
        """The tensors that have to be quantised so that `tensor` lies on their common grid."""
        node = maker.get(tensor)
        if node is None or not _moves(node):
            return [tensor]
        above = node.input if node.op_type == "Concat" else node.input[:1]
        if any(name in constants for name in above):
            return [tensor]
        return [found for name in above for found in climb(name)]

    needed = {node.name: climb(node.input[0]) for node in layers}
    for together in needed.values():
        for tensor in together:
            parent[root(tensor)] = root(together[0])
    groups: dict[str, list[str]] = {}
    readers: dict[str, list[str]] = {}
    for name, together in needed.items():
        groups.setdefault(root(together[0]), []).extend(together)
        readers.setdefault(root(together[0]), []).append(name)
    return Plan(tuple(needed), tuple(tuple(dict.fromkeys(group)) for group in groups.values()),
                tuple(map(tuple, readers.values())), tuple(sorted(head)))


def depthwise(model: Any) -> list[str]:
    """Names of the convolutions of which every channel stays by itself."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    return [node.name for node in model.graph.node if node.op_type == "Conv" and node.input[1] in constants
            and attribute(node, "group", 1) > 1 and constants[node.input[1]].dims[1] == 1]


def quantize(model: Any, planned: Plan, ranges: Mapping[str, Sequence[float]]) -> Any:
    """The prepared graph with Q/DQ nodes around what is planned.

    ranges  tensor of planned.sites -> (lowest, highest) value it is to hold; a group takes the widest of its members

    Zero points are 0, so a tensor that reaches further to one side, as behind a Relu or SiLU, would waste half of the
    levels. Where only convolutions without padding read it, its middle is taken off before it is quantised, and what
    that changes in the sums is put into their biases: the same numbers, with twice as many levels.
    """
    import onnx
    from onnx import helper, numpy_helper

    quantized = onnx.ModelProto()
    quantized.CopyFrom(model)
    graph = quantized.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    made = [numpy_helper.from_array(np.int8(0), "q_zero")]
    after: dict[str, list[Any]] = {}
    renamed: dict[str, str] = {}
    middles: dict[str, np.float32] = {}
    for number, (group, readers) in enumerate(zip(planned.sites, planned.readers)):
        low, high = min(float(ranges[name][0]) for name in group), max(float(ranges[name][1]) for name in group)
        if not np.isfinite([low, high]).all():
            raise Invalid(f"The range of {group[0]!r} is {low}..{high}; calibrate again.")
        middle = np.float32((low + high) / 2) if _can_shift(graph, group, planned.layers) else np.float32(0)
        reach = max(high - float(middle), float(middle) - low)
        scale = f"q_scale_{number}"
        made.append(numpy_helper.from_array(np.float32(max(reach, LEAST_RANGE) / LEVELS), scale))
        if middle:
            made.append(numpy_helper.from_array(middle, f"q_middle_{number}"))
            middles |= dict.fromkeys(readers, middle)
        for name in group:
            kept, given, source = f"{name}_q", f"{name}_dq", name
            after[name] = []
            if middle:
                source = f"{name}_shifted"
                after[name].append(helper.make_node("Sub", [name, f"q_middle_{number}"], [source], name=source))
            after[name] += [helper.make_node("QuantizeLinear", [source, scale, "q_zero"], [kept], name=kept),
                            helper.make_node("DequantizeLinear", [kept, scale, "q_zero"], [given], name=given)]
            renamed[name] = given
    weights: dict[str, tuple[str, np.ndarray]] = {}
    layers = set(planned.layers)
    nodes = [pair for value in graph.input for pair in after.get(value.name, ())]
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        if node.name in layers:
            key = f"{node.input[1]}_{_axis(node)}"
            if key not in weights:
                dequantized, initial, rounded = _quantized_weights(node, constants[node.input[1]])
                nodes.append(dequantized)
                made += initial
                weights[key] = dequantized.output[0], rounded
            node.input[1], rounded = weights[key]
            if node.name in middles:
                bias = numpy_helper.to_array(constants[node.input[2]]) if len(node.input) > 2 and node.input[2] else 0
                sums = rounded.sum(axis=tuple(range(1, rounded.ndim)))
                del node.input[2:]
                node.input.append(f"{node.name}_shifted_bias")
                values = (bias + middles[node.name] * sums).astype(np.float32)
                made.append(numpy_helper.from_array(values, node.input[2]))
        nodes.append(node)
        for output in node.output:
            nodes += after.get(output, ())
    used = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
    replace(graph.node, nodes)
    replace(graph.initializer, [tensor for tensor in (*graph.initializer, *made) if tensor.name in used])
    del graph.value_info[:]
    return quantized


def _can_shift(graph: Any, group: Collection[str], layers: Collection[str]) -> bool:
    """Whether all that reads the tensors of a group, by way of what only moves values, are int8 convolutions without
    padding and with a constant bias or none."""
    constants = {tensor.name for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}
    waiting, seen = list(group), set(group)
    while waiting:
        name = waiting.pop()
        if name in outputs:
            return False
        for node in graph.node:
            if name not in node.input:
                continue
            if _moves(node) and node.input[0] != name and node.op_type != "Concat":
                return False  # it is an index or a shape
            if _moves(node):
                waiting += [output for output in node.output if output not in seen]
                seen |= set(node.output)
            elif (node.op_type != "Conv" or node.name not in layers or any(attribute(node, "pads", ()))
                  or attribute(node, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID")
                  or any(one and one not in constants for one in node.input[2:])):
                return False
    return True


def _quantized_weights(node: Any, tensor: Any) -> tuple[Any, list[Any], np.ndarray]:
    """The DequantizeLinear that gives a layer's weights; its int8 values, scales and zero points; what comes out of
    it."""
    from onnx import helper, numpy_helper

    values, axis = numpy_helper.to_array(tensor).astype(np.float32), _axis(node)
    axis %= values.ndim
    others = tuple(index for index in range(values.ndim) if index != axis)
    if not np.isfinite(values).all():
        raise Invalid(f"The weights of {node.name!r} hold a NaN or an infinity. Export the model again.")
    scales = (np.maximum(np.abs(values).max(axis=others), LEAST_RANGE) / LEVELS).astype(np.float32)
    shape = [1] * values.ndim
    shape[axis] = -1
    whole = np.clip(np.rint(values / scales.reshape(shape)), -LEVELS, LEVELS).astype(np.int8)
    name = f"{tensor.name}_axis{axis}"
    made = helper.make_node("DequantizeLinear", [f"{name}_q", f"{name}_scales", f"{name}_zeros"], [f"{name}_dq"],
                            name=f"{name}_dq", axis=axis)
    initial = [numpy_helper.from_array(whole, f"{name}_q"), numpy_helper.from_array(scales, f"{name}_scales"),
               numpy_helper.from_array(np.zeros(len(scales), np.int8), f"{name}_zeros")]
    return made, initial, whole * scales.reshape(shape)


def _axis(node: Any) -> int:
    """The axis of a layer's weights that counts its output channels."""
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return {"Conv": 0, "ConvTranspose": 1, "MatMul": -1}[node.op_type]


def _weights(node: Any, constants: Mapping[str, Any]) -> bool:
    """Whether a node multiplies what flows through the graph by constant weights of two or more axes."""
    return (node.op_type in WEIGHTED and len(node.input) > 1 and node.input[1] in constants
            and node.input[0] not in constants and len(constants[node.input[1]].dims) >= 2)


def _moves(node: Any) -> bool:
    if node.op_type == "Resize":
        return attribute(node, "mode", b"nearest") == b"nearest"
    return node.op_type in MOVING


def _head(graph: Any, maker: Mapping[str, Any], constants: Mapping[str, Any]) -> set[str]:
    """Names of the layers nearest to the outputs: the walk back from each output ends at the first layer with weights,
    except where that only decodes (a convolution over a Softmax, as the DFL of YOLOv8 and GFL heads has)."""
    found, seen = set(), set()
    waiting = [value.name for value in graph.output]
    while waiting:
        node = maker.get(waiting.pop())
        if node is None or node.output[0] in seen:
            continue
        seen.add(node.output[0])
        if _weights(node, constants):
            found.add(node.name)
            if not _decodes(node, maker):
                continue
        waiting += [name for name in node.input if name]
    return found


def _decodes(node: Any, maker: Mapping[str, Any]) -> bool:
    above = maker.get(node.input[0])
    while above is not None and (_moves(above) and above.op_type != "Concat"):
        above = maker.get(above.input[0])
    return above is not None and above.op_type == "Softmax"


def _all_nodes(model: Any) -> Iterable[Any]:
    waiting = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while waiting:
        node = waiting.pop()
        yield node
        for one in node.attribute:
            waiting += [*one.g.node, *(inner for graph in one.graphs for inner in graph.node)]

"""The standard form of a detector's graph: (n, H, W, 3) uint8 RGB in, everything the card says of its input inside."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from workbench.errors import Invalid
from workbench.model import InputSpec

# Mul and Sub broadcast like numpy since opset 7.
LEAST_OPSET = 7


def pixels_inside(model: Any, spec: InputSpec) -> tuple[Any, InputSpec]:
    """The same graph taking pixels as they are: cast, colour order, scale, mean, std and layout become its first nodes.

    model  onnx.ModelProto whose one input is what `spec` describes; it is not changed
    spec   the input on the model's card

    Returns the onnx.ModelProto, whose input has the same name and batch axis and the sides of `spec`, and the spec that
    now describes it: NHWC, uint8, RGB, scale 1, mean 0, std 1. A model in this form already comes back as it is.
    The arithmetic is float32, in the order (pixel * (scale / std)) - mean / std. Raises Invalid for a graph whose input
    is not what `spec` says, and for one of an opset below 7.
    """
    from onnx import TensorProto, helper, numpy_helper

    standard = InputSpec(size=spec.size, padding=spec.padding, pad=spec.pad)
    value = image_input(model)
    _check(value, spec)
    sides = [dim.dim_value for dim in value.type.tensor_type.shape.dim[1:]]
    if spec == standard and 0 not in sides:
        return model, spec
    opset = opset_of(model)
    if opset < LEAST_OPSET:
        raise Invalid(f"the graph has opset {opset}, {LEAST_OPSET} or later is needed. Export it again.")
    made = _copied(model)
    graph, name, taken = made.graph, value.name, _names(model)

    def fresh(what: str) -> str:
        while what in taken:
            what += "_"
        taken.add(what)
        return what

    given_type = value.type.tensor_type.elem_type
    steps: list[tuple[str, list[Any], dict[str, Any]]] = []
    if spec.dtype == "float32":
        steps.append(("Cast", [], {"to": TensorProto.FLOAT}))
    if spec.colour == "BGR":
        steps.append(("Gather", [np.array([2, 1, 0], np.int64)], {"axis": 3}))
    gain, shift = gain_and_shift(spec)
    if (gain != 1).any():
        steps.append(("Mul", [gain], {}))
    if shift.any():
        steps.append(("Sub", [shift], {}))
    if spec.dtype == "float32" and given_type != TensorProto.FLOAT:
        steps.append(("Cast", [], {"to": given_type}))
    if spec.layout == "NCHW":
        steps.append(("Transpose", [], {"perm": [0, 3, 1, 2]}))
    nodes, current = [], name
    for kind, constants, attributes in steps:
        names = [fresh(f"pixels_{kind.lower()}_by") for _ in constants]
        graph.initializer.extend(numpy_helper.from_array(array, at) for array, at in zip(constants, names))
        made_name = fresh(f"pixels_{kind.lower()}")
        nodes.append(helper.make_node(kind, [current, *names], [made_name], name=made_name, **attributes))
        current = made_name
    for node in _nodes(graph):
        node.input[:] = [current if one == name else one for one in node.input]
    _put_first(graph, nodes)
    new = image_input(made)
    new.type.tensor_type.elem_type = TensorProto.UINT8
    dims = new.type.tensor_type.shape.dim
    for dim, side in zip(dims[1:], (spec.size[1], spec.size[0], 3), strict=True):
        dim.Clear()
        dim.dim_value = side
    # Shapes noted for open sides would contradict the fixed ones; runtimes infer them afresh.
    del graph.value_info[:]
    return made, standard


def gain_and_shift(spec: InputSpec) -> tuple[np.ndarray, np.ndarray]:
    """(3,) float32 each, in the order of the spec's colours: tensor = pixel * gain - shift."""
    std = np.array(spec.std, np.float32)
    return np.float32(spec.scale) / std, np.array(spec.mean, np.float32) / std


def dynamic_batch(model: Any) -> Any:
    """The graph with its batch axis free, where only a fixed 1 stood in the way; else the model unchanged.

    Frees the input's first axis and the leading 1 of every Reshape to a constant shape, which is where exporters write
    the batch down. Whether the graph then treats every image alike is for the caller to check with a run: a graph may
    fix its batch in other places too.
    """
    from onnx import numpy_helper

    first = image_input(model).type.tensor_type.shape.dim[0]
    if not first.HasField("dim_value") or first.dim_value != 1:
        return model
    made = _copied(model)
    graph = made.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    made_by = {node.output[0]: node for node in graph.node
               if node.op_type == "Constant" and node.attribute[0].name == "value"}
    weights = {*constants, *(node.output[0] for node in graph.node if node.op_type == "Constant")}
    for node in graph.node:
        if node.op_type != "Reshape" or len(node.input) < 2 or node.input[0] in weights or any(
                one.name == "allowzero" and one.i for one in node.attribute):
            continue
        name = node.input[1]
        tensor = constants[name] if name in constants else made_by[name].attribute[0].t if name in made_by else None
        shape = None if tensor is None else numpy_helper.to_array(tensor)
        if shape is None or len(shape) < 2 or shape[0] != 1:
            continue
        # 0 takes the axis over from what goes in. A shape may serve several nodes, so each gets its own.
        free = np.concatenate([[0], shape[1:]]).astype(np.int64)
        freed = numpy_helper.from_array(free, f"{node.output[0]}_any_batch")
        graph.initializer.append(freed)
        node.input[1] = freed.name
    for value in (image_input(made), *graph.output):
        if value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].Clear()
            value.type.tensor_type.shape.dim[0].dim_param = "n"
    del graph.value_info[:]
    return made


def image_input(model: Any) -> Any:
    """The graph's one input that is no initializer (an onnx.ValueInfoProto). Raises Invalid when there are others."""
    initialised = {tensor.name for tensor in model.graph.initializer}
    given = [value for value in model.graph.input if value.name not in initialised]
    if len(given) != 1:
        raise Invalid(f"the graph has {len(given)} inputs; a detector must have exactly one, the images.")
    return given[0]


def opset_of(model: Any) -> int:
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)


def _check(value: Any, spec: InputSpec) -> None:
    from onnx import TensorProto

    kind = value.type.tensor_type
    shape = [dim.dim_value or None for dim in kind.shape.dim]
    sides = spec.size[::-1]
    wanted = (1, *sides, 3) if spec.layout == "NHWC" else (1, 3, *sides)
    if len(shape) != 4 or any(given not in (None, need) for given, need in zip(shape[1:], wanted[1:])) or (
            shape[0] not in (None, 1)):
        raise Invalid(f"the graph takes {_shape(shape)}, its card says {spec.layout} {_shape(wanted)} with a batch of 1 "
                      "or any. Correct the card's input or export the graph again.")
    fitting = (TensorProto.UINT8,) if spec.dtype == "uint8" else (
        TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
    if kind.elem_type not in fitting:
        name = TensorProto.DataType.Name(kind.elem_type).lower()
        raise Invalid(f"the graph takes {name} {_shape(shape)}, its card says {spec.dtype}. Correct the card's input or export the graph again.")


def _shape(shape: Iterable[int | None]) -> str:
    return "(" + ", ".join("n" if side is None else str(side) for side in shape) + ")"


def _copied(model: Any) -> Any:
    made = type(model)()
    made.CopyFrom(model)
    # Up to IR version 3 initializers had to be listed among the inputs, which new ones need not be.
    given = image_input(made)
    del made.graph.input[:]
    made.graph.input.append(given)
    made.ir_version = max(made.ir_version, 4)
    return made


def _nodes(graph: Any) -> Iterable[Any]:
    """All nodes, those of subgraphs included: a branch of an If may read the image too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _names(model: Any) -> set[str]:
    graph = model.graph
    return {name for node in _nodes(graph) for name in (*node.input, *node.output)} | {
        value.name for value in (*graph.input, *graph.output, *graph.initializer)}


def _put_first(graph: Any, nodes: list[Any]) -> None:
    rest = [type(node).FromString(node.SerializeToString()) for node in graph.node]
    del graph.node[:]
    graph.node.extend([*nodes, *rest])

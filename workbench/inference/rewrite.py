"""Rewrites of a detector's graph that leave its numbers as they are and suit int8: fewer operations that only move
pixels.

prepare           opset >= 13, every node named, constants as initializers, Identity and BatchNormalization folded away
fold_focus        four strided slices, concatenated, and a convolution become one convolution of twice the stride
absorb_shuffles   permutations of channels go into the weights of the convolutions that read them
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from workbench.errors import Invalid

# QuantizeLinear knows an axis since opset 13.
LEAST_OPSET = 13
# The opset that older graphs are converted to.
OPSET = 17
# Operations that treat every channel alike, by themselves.
CHANNELWISE = ("Relu", "LeakyRelu", "Sigmoid", "Clip", "HardSwish", "HardSigmoid", "Tanh", "Elu", "Softplus", "Mish",
               "MaxPool", "AveragePool", "GlobalAveragePool", "Resize", "Abs", "Exp", "Sqrt")
# More pieces than this are slower to put together than the shuffle they replace.
MOST_PIECES = 32


def prepare(model: Any) -> Any:
    """A copy of the graph, ready to be planned and rewritten. Raises Invalid where its opset cannot be converted."""
    import onnx

    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < LEAST_OPSET:
        try:
            model = onnx.version_converter.convert_version(model, OPSET)
        except Exception as error:  # the converter raises RuntimeError and errors of its own
            raise Invalid(f"The graph has opset {opset}, int8 needs {LEAST_OPSET}, and it cannot be converted: "
                          f"{error}. Export it with opset {LEAST_OPSET} or later.") from error
    prepared = onnx.ModelProto()
    prepared.CopyFrom(model)
    graph = prepared.graph
    given = {tensor.name for tensor in graph.initializer}
    # Up to IR version 3 initializers had to be listed among the inputs; as inputs they could be overridden.
    replace(graph.input, [value for value in graph.input if value.name not in given])
    prepared.ir_version = max(prepared.ir_version, 7)
    _take_in_constants(graph)
    _drop_identities(graph)
    _fold_batch_norms(graph)
    used = set()
    for index, node in enumerate(graph.node):
        name = node.name or f"{node.op_type}_{node.output[0]}"
        node.name = name if name not in used else f"{name}_{index}"
        used.add(node.name)
    _drop_unused(graph)
    del graph.value_info[:]
    return prepared


def fold_focus(model: Any) -> None:
    """Replaces the Focus layer of YOLOX and early YOLOv5 (slices at offsets 0 and 1 with step 2, concatenated, then a
    convolution) by the convolution on the whole image that it equals; in place.

    Channel (dy, dx, c) at (y, x) of the concatenation is channel c at (2y + dy, 2x + dx) of the image, so a k x k
    kernel with padding p and stride s becomes 2k x 2k with padding 2p and stride 2s.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    maker = {output: node for node in graph.node for output in node.output}
    for conv in graph.node:
        concat = maker.get(conv.input[0]) if conv.op_type == "Conv" else None
        if (concat is None or concat.op_type != "Concat" or attribute(concat, "axis", 1) != 1 or len(concat.input) != 4
                or conv.input[1] not in constants or attribute(conv, "group", 1) != 1
                or set(attribute(conv, "dilations", [1])) != {1}
                or attribute(conv, "auto_pad", b"NOTSET") != b"NOTSET"):
            continue
        found = [_strided(name, maker, constants) for name in concat.input]
        weights = constants[conv.input[1]]
        if (None in found or len({source for source, _ in found}) != 1 or weights.ndim != 4 or weights.shape[1] % 4
                or sorted(offset for _, offset in found) != [(0, 0), (0, 1), (1, 0), (1, 1)]):
            continue
        outs, ins, high, wide = weights.shape
        whole = np.zeros((outs, ins // 4, 2 * high, 2 * wide), weights.dtype)
        for index, (_, (down, right)) in enumerate(found):
            whole[:, :, down::2, right::2] = weights[:, index * (ins // 4):(index + 1) * (ins // 4)]
        name = f"{conv.input[1]}_whole"
        graph.initializer.append(numpy_helper.from_array(whole, name))
        pads, strides = attribute(conv, "pads", [0] * 4), attribute(conv, "strides", [1, 1])
        conv.input[0], conv.input[1] = found[0][0], name
        replace(conv.attribute, [helper.make_attribute(key, value) for key, value in (
            ("kernel_shape", [2 * high, 2 * wide]), ("pads", [2 * pad for pad in pads]),
            ("strides", [2 * stride for stride in strides]))])
    _drop_unused(graph)


def absorb_shuffles(model: Any) -> None:
    """Takes channel shuffles (ShuffleNet's: a Gather by a permutation, or Reshape, Transpose, Reshape) out of the
    graph; in place.

    Tensors keep their channels where they are, and it is written down which is which: convolutions get their weights
    permuted, a Split becomes one into more pieces and Concats of those. Wherever an operation needs the right order and
    cannot be changed, one Gather restores it.
    """
    import onnx

    shapes = _shapes(onnx.shape_inference.infer_shapes(model, data_prop=True))
    _Shuffles(model.graph, shapes).run()
    _drop_unused(model.graph)


class _Shuffles:
    """name -> the tensor that really holds it, and order: physical channel j is logical channel order[j]."""

    def __init__(self, graph: Any, shapes: Mapping[str, list[int | None]]) -> None:
        from onnx import numpy_helper

        self.graph, self.shapes = graph, shapes
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self.held: dict[str, tuple[str, np.ndarray]] = {}
        self.restored: dict[str, str] = {}
        self.readers: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.nodes: list[Any] = []
        self.count = 0

    def run(self) -> None:
        from onnx import helper

        skipped: set[str] = set()
        outputs = [value.name for value in self.graph.output]
        for node in list(self.graph.node):
            if node.output[0] in skipped:
                continue
            shuffle = self._shuffle(node, outputs)
            if shuffle is not None:
                output, permutation, gone = shuffle
                skipped |= gone
                name, order = self._of(node.input[0], len(permutation))
                inverse = np.argsort(permutation)
                self.held[output] = (name, inverse[order])
            elif not any(name in self.held for name in node.input):
                self.nodes.append(node)
            elif not self._carried(node):
                for index, name in enumerate(node.input):
                    node.input[index] = self._restored(name)
                self.nodes.append(node)
        for name in outputs:
            if name in self.held:
                self.nodes.append(helper.make_node("Identity", [self._restored(name)], [name], name=f"{name}_in_order"))
        replace(self.graph.node, self.nodes)

    def _shuffle(self, node: Any, outputs: list[str]) -> tuple[str, np.ndarray, set[str]] | None:
        """(its output, permutation, outputs of its inner nodes) of a node where a shuffle begins: out[k] = in[p[k]]."""
        if node.op_type == "Gather" and attribute(node, "axis", 0) == 1 and node.input[1] in self.constants:
            order, channels = self.constants[node.input[1]], self._channels(node.input[0])
            if order.ndim == 1 and len(order) == channels and sorted(order.tolist()) == list(range(channels)):
                return node.output[0], order, set()
        if node.op_type != "Reshape" or node.output[0] in outputs:
            return None
        before, middle = self.shapes.get(node.input[0]), self.shapes.get(node.output[0])
        after = self.readers.get(node.output[0], [])
        if not before or not middle or len(before) != 4 or len(middle) != 5 or len(after) != 1 or (
                after[0].op_type != "Transpose" or list(attribute(after[0], "perm", [])) != [0, 2, 1, 3, 4]):
            return None
        last = self.readers.get(after[0].output[0], [])
        if (len(last) != 1 or last[0].op_type != "Reshape" or after[0].output[0] in outputs or None in middle[1:3]
                or middle[1] * middle[2] != before[1]
                or (self.shapes.get(last[0].output[0]) or [])[1:] != before[1:] or middle[3:] != before[2:]):
            return None
        order = np.arange(before[1]).reshape(middle[1], middle[2]).T.ravel()
        return last[0].output[0], order, {after[0].output[0], last[0].output[0]}

    def _carried(self, node: Any) -> bool:
        """Appends the node so that it works on shuffled channels; False when it cannot."""
        kind, first = node.op_type, node.input[0]
        if kind in CHANNELWISE and first in self.held and (kind != "Resize" or self._keeps_channels(node)):
            name, order = self.held[first]
            node.input[0] = name
            self._append(node, order)
        elif kind in ("Add", "Mul") and all(name in self.held for name in node.input) and np.array_equal(
                *(self.held[name][1] for name in node.input)):
            order = self.held[first][1]
            for index, name in enumerate(node.input):
                node.input[index] = self.held[name][0]
            self._append(node, order)
        elif kind == "Concat" and attribute(node, "axis", 0) == 1 and None not in map(self._channels, node.input):
            offset, orders = 0, []
            for index, one in enumerate(node.input):
                name, order = self._of(one, self._channels(one))
                node.input[index] = name
                orders.append(order + offset)
                offset += len(order)
            self._append(node, np.concatenate(orders))
        elif kind == "Split" and attribute(node, "axis", 0) == 1:
            return self._split(node)
        elif kind == "Conv" and first in self.held and node.input[1] in self.constants:
            return self._convolved(node)
        else:
            return False
        return True

    def _split(self, node: Any) -> bool:
        from onnx import helper

        name, order = self.held[node.input[0]]
        sizes = [self._channels(output) for output in node.output]
        if None in sizes or sum(sizes) != len(order):
            return False
        belongs = np.searchsorted(np.cumsum(sizes), order, side="right")
        edges = [0, *(np.nonzero(np.diff(belongs))[0] + 1).tolist(), len(order)]
        if len(edges) - 1 > MOST_PIECES:
            return False
        pieces = [self._fresh(f"{node.output[0]}_piece") for _ in edges[1:]]
        sizes_of = self._constant(np.diff(edges))
        self.nodes.append(helper.make_node("Split", [name, sizes_of], pieces, axis=1, name=pieces[0]))
        for index, output in enumerate(node.output):
            mine = [piece for piece, edge in zip(pieces, edges) if belongs[edge] == index]
            order_of = order[belongs == index] - sum(sizes[:index])
            whole = mine[0]
            if len(mine) > 1:
                whole = self._fresh(f"{output}_pieces")
                self.nodes.append(helper.make_node("Concat", mine, [whole], axis=1, name=whole))
            self.held[output] = (whole, order_of)
        return True

    def _convolved(self, node: Any) -> bool:
        name, order = self.held[node.input[0]]
        weights, group = self.constants[node.input[1]], attribute(node, "group", 1)
        if group == 1:
            node.input[0], node.input[1] = name, self._constant(weights[:, order])
            self.nodes.append(node)
            return True
        if group != len(order) or weights.shape[:2] != (group, 1) or any(
                one not in self.constants for one in node.input[2:]):
            return False
        node.input[0] = name
        for index in range(1, len(node.input)):
            node.input[index] = self._constant(self.constants[node.input[index]][order])
        self._append(node, order)
        return True

    def _append(self, node: Any, order: np.ndarray) -> None:
        self.nodes.append(node)
        output = node.output[0]
        # The name now means the shuffled tensor; what asks for the logical one finds it through `held`.
        node.output[0] = self._fresh(f"{output}_shuffled")
        self.held[output] = (node.output[0], order)

    def _restored(self, name: str) -> str:
        """A tensor with the channels of `name` in their right order."""
        from onnx import helper

        if name not in self.held:
            return name
        if name not in self.restored:
            physical, order = self.held[name]
            self.restored[name] = self._fresh(f"{name}_restored")
            self.nodes.append(helper.make_node("Gather", [physical, self._constant(np.argsort(order))],
                                               [self.restored[name]], axis=1, name=self.restored[name]))
        return self.restored[name]

    def _of(self, name: str, channels: int) -> tuple[str, np.ndarray]:
        return self.held.get(name, (name, np.arange(channels)))

    def _channels(self, name: str) -> int | None:
        shape = self.shapes.get(name)
        return shape[1] if shape and len(shape) >= 2 else None

    def _keeps_channels(self, node: Any) -> bool:
        return self._channels(node.input[0]) == self._channels(node.output[0])

    def _constant(self, values: np.ndarray) -> str:
        from onnx import numpy_helper

        values = np.ascontiguousarray(values)
        name = self._fresh("shuffled_constant")
        self.graph.initializer.append(numpy_helper.from_array(values, name))
        self.constants[name] = values
        return name

    def _fresh(self, name: str) -> str:
        self.count += 1
        return f"{name}_{self.count}"


def attribute(node: Any, name: str, default: Any) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(one) for one in node.attribute if one.name == name), default)


def replace(field: Any, values: Iterable[Any]) -> None:
    """Puts `values` into a repeated protobuf field, in place of what it holds."""
    kept = [type(value).FromString(value.SerializeToString()) for value in values]
    del field[:]
    field.extend(kept)


def _strided(name: str, maker: Mapping[str, Any],
             constants: Mapping[str, np.ndarray]) -> tuple[str, tuple[int, int]] | None:
    """(source, (row, column) offset) of a tensor that is every second row and column of a source, sliced to its end."""
    offsets: dict[int, int] = {}
    while (node := maker.get(name)) is not None and node.op_type == "Slice":
        given = [constants.get(one) for one in node.input[1:]]
        if len(given) != 4 or any(one is None for one in given):
            return None
        for start, end, axis, step in zip(*(one.ravel().tolist() for one in given)):
            # An end of 2^31 - 1 or more is how exporters write "to the end".
            if axis not in (2, 3) or axis in offsets or step != 2 or start not in (0, 1) or end < 2 ** 31 - 1:
                return None
            offsets[axis] = start
        name = node.input[0]
    return (name, (offsets[2], offsets[3])) if len(offsets) == 2 else None


def _shapes(model: Any) -> dict[str, list[int | None]]:
    values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    return {value.name: [dim.dim_value if dim.HasField("dim_value") else None
                         for dim in value.type.tensor_type.shape.dim]
            for value in values if value.type.tensor_type.HasField("shape")}


def _drop_unused(graph: Any) -> None:
    """Nodes and initializers that no output needs."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(node.input) | {name for inner in _inner(node) for name in inner.input}
    replace(graph.node, reversed(kept))
    replace(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in needed])


def _inner(node: Any) -> Iterable[Any]:
    """The nodes of a node's subgraphs."""
    for one in node.attribute:
        for graph in (one.g, *one.graphs):
            for inner in graph.node:
                yield inner
                yield from _inner(inner)


def _take_in_constants(graph: Any) -> None:
    from onnx import helper, numpy_helper

    kept = []
    for node in graph.node:
        if node.op_type != "Constant" or node.attribute[0].name == "sparse_value":
            kept.append(node)
            continue
        value = helper.get_attribute_value(node.attribute[0])
        tensor = value if hasattr(value, "dims") else numpy_helper.from_array(np.asarray(
            value, np.float32 if "float" in node.attribute[0].name else np.int64))
        tensor.name = node.output[0]
        graph.initializer.append(tensor)
    replace(graph.node, kept)


def _drop_identities(graph: Any) -> None:
    outputs = {value.name for value in graph.output}
    source: dict[str, str] = {}
    kept = []
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = source.get(name, name)
        # A subgraph may read the tensor by its name, so nothing is renamed where there are some.
        if node.op_type == "Identity" and node.output[0] not in outputs and not any(
                one.HasField("g") or one.graphs for other in graph.node for one in other.attribute):
            source[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    replace(graph.node, kept)


def _fold_batch_norms(graph: Any) -> None:
    """Conv -> BatchNormalization becomes one Conv: w' = w g / sqrt(v + e), b' = (b - m) g / sqrt(v + e) + beta."""
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in graph.initializer}
    maker = {output: node for node in graph.node for output in node.output}
    readers: dict[str, int] = {}
    for name in [name for node in graph.node for name in node.input] + [value.name for value in graph.output]:
        readers[name] = readers.get(name, 0) + 1
    gone = set()
    for norm in graph.node:
        conv = maker.get(norm.input[0]) if norm.op_type == "BatchNormalization" else None
        if (conv is None or conv.op_type != "Conv" or readers[conv.output[0]] > 1 or len(norm.output) > 1
                or any(name not in constants for name in (*norm.input[1:], *conv.input[1:]))):
            continue
        gain, beta, mean, variance = (numpy_helper.to_array(constants[name]) for name in norm.input[1:5])
        weights = numpy_helper.to_array(constants[conv.input[1]])
        bias = numpy_helper.to_array(constants[conv.input[2]]) if len(conv.input) > 2 else np.zeros_like(mean)
        factor = gain / np.sqrt(variance + attribute(norm, "epsilon", 1e-5))
        fresh = {f"{norm.output[0]}_folded_weights": weights * factor.reshape(-1, *[1] * (weights.ndim - 1)),
                 f"{norm.output[0]}_folded_bias": (bias - mean) * factor + beta}
        for name, values in fresh.items():
            graph.initializer.append(numpy_helper.from_array(values.astype(weights.dtype), name))
            constants[name] = graph.initializer[-1]
        del conv.input[1:]
        conv.input.extend(fresh)
        conv.output[0] = norm.output[0]
        maker[norm.output[0]] = conv
        gone.add(norm.output[0])
    replace(graph.node, [node for node in graph.node
                         if node.op_type != "BatchNormalization" or node.output[0] not in gone])

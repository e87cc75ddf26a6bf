"""Q/DQ graphs: what is in them, that rewrites leave the numbers alone, and that both CPU backends compute the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest
from doubles.quantizable import deep_finder
from onnx import TensorProto, helper, numpy_helper

from workbench.adapters.onnxruntime import OnnxRuntime
from workbench.adapters.openvino import OpenVINO
from workbench.errors import Invalid
from workbench.inference import rewrite
from workbench.inference.calibration import Ranges, observed
from workbench.inference.graph import Graph
from workbench.inference.quantize import Plan, depthwise, is_quantized, plan, prepare, quantize

RANDOM = np.random.default_rng(0)


def model_of(nodes: list[Any], shape: list[int | str], outputs: list[str], constants: dict[str, np.ndarray],
             opset: int = 19) -> Any:
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in constants.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def weights(*shape: int) -> np.ndarray:
    return RANDOM.normal(0, 1 / np.sqrt(np.prod(shape[1:])), shape).astype(np.float32)


def run(model: Any, x: np.ndarray, backend: Callable[..., Any] = OnnxRuntime) -> dict[str, np.ndarray]:
    with backend(Graph(Path("test.onnx"), model), threads=1) as opened:
        return opened.run(x)


def ranges_of(model: Any, planned: Plan, x: np.ndarray) -> dict[str, tuple[float, float]]:
    tensors = [name for group in planned.sites for name in group if name != "x"]
    seen = Ranges()
    found = run(observed(model, tensors), x)
    seen.see({"x": x, **{name: found[name] for name in tensors}}, "test")
    return seen.of("minmax")


def quantized_of(model: Any, x: np.ndarray) -> tuple[Any, Plan]:
    prepared = prepare(model)
    planned = plan(prepared)
    return quantize(prepared, planned, ranges_of(prepared, planned, x)), planned


def error(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(one))


def chain(head: bool = True) -> Any:
    """Two branches of signed values that meet in a Concat, a residual Add, a depthwise convolution, and a head."""
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["a0"], name="stem", pads=[1] * 4),
        helper.make_node("LeakyRelu", ["a0"], ["a"], alpha=0.1),
        helper.make_node("Conv", ["a", "w1"], ["c0"], name="left"),
        helper.make_node("Sigmoid", ["c0"], ["s"]), helper.make_node("Mul", ["c0", "s"], ["c"]),
        helper.make_node("Concat", ["a", "c"], ["both"], axis=1),
        helper.make_node("Conv", ["both", "w2"], ["d"], name="joined"),
        helper.make_node("Add", ["d", "a"], ["e"]),
        helper.make_node("Conv", ["e", "w3"], ["f"], name="each", group=8, pads=[1] * 4),
        helper.make_node("MaxPool", ["f"], ["g"], kernel_shape=[3, 3], pads=[1] * 4),
        helper.make_node("Conv", ["g", "w4", "b4"], ["h0"], name="last"), helper.make_node("Relu", ["h0"], ["h"])]
    nodes += [helper.make_node("Conv", ["h", "w5", "b5"], ["y"], name="head")] if head else []
    return model_of(nodes, ["n", 3, 16, 16], ["y" if head else "h"], {
        "w0": weights(8, 3, 3, 3), "b0": weights(8), "w1": weights(8, 8, 1, 1), "w2": weights(8, 16, 1, 1),
        "w3": weights(8, 1, 3, 3), "w4": weights(8, 8, 1, 1), "b4": weights(8), "w5": weights(4, 8, 1, 1),
        "b5": weights(4)})


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return RANDOM.normal(0, 1, (1, 3, 16, 16)).astype(np.float32)


class TestGraph:
    def test_weights_and_activations_are_symmetric_int8_head_and_biases_float(self, images: np.ndarray) -> None:
        made, planned = quantized_of(chain(), images)
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
        maker = {name: node for node in made.graph.node for name in node.output}
        assert planned.layers == ("stem", "left", "joined", "each", "last") and planned.head == ("head",)
        for node in made.graph.node:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                zero = constants[node.input[2]]
                assert zero.dtype == np.int8 and not zero.any(), node.name
            if node.op_type == "Conv" and node.name in planned.layers:
                dequantized = maker[node.input[1]]
                kept, scales = (constants[name] for name in dequantized.input[:2])
                assert kept.dtype == np.int8 and np.abs(kept.astype(int)).max() == 127 and -128 not in kept
                assert scales.shape == (len(kept),) and rewrite.attribute(dequantized, "axis", 1) == 0
                assert all(constants[name].dtype == np.float32 for name in node.input[2:])
        head = next(node for node in made.graph.node if node.name == "head")
        assert constants[head.input[1]].dtype == np.float32 and head.input[0] == "h"
        onnx.checker.check_model(onnx.shape_inference.infer_shapes(made, strict_mode=True))

    def test_branches_that_meet_in_a_concat_share_one_scale(self, images: np.ndarray) -> None:
        planned = plan(prepare(chain()))
        assert ("a", "c") in planned.sites
        assert planned.readers[planned.sites.index(("a", "c"))] == ("left", "joined")

    def test_what_only_unpadded_convolutions_read_uses_all_levels(self, images: np.ndarray) -> None:
        nodes = [helper.make_node("Conv", ["x", "w0"], ["a0"], name="stem"), helper.make_node("Relu", ["a0"], ["a"]),
                 helper.make_node("Conv", ["a", "w1", "b1"], ["b0"], name="one"),
                 helper.make_node("Relu", ["b0"], ["b"]),
                 helper.make_node("Conv", ["b", "w2"], ["c0"], name="padded", pads=[1] * 4),
                 helper.make_node("Relu", ["c0"], ["c"]), helper.make_node("Conv", ["c", "w3"], ["y"], name="head")]
        model = model_of(nodes, [1, 3, 16, 16], ["y"], {
            "w0": weights(8, 3, 1, 1), "w1": weights(8, 8, 1, 1), "b1": weights(8), "w2": weights(8, 8, 3, 3),
            "w3": weights(2, 8, 1, 1)})
        made, planned = quantized_of(model, images)
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
        scales = {node.input[0]: constants[node.input[1]] for node in made.graph.node
                  if node.op_type == "QuantizeLinear"}
        largest = ranges_of(prepare(model), planned, images)
        # Behind a Relu values lie in 0..m: as -m/2..m/2 they fill 254 levels; with zeros padded in they cannot be
        # moved.
        assert scales["a_shifted"] == pytest.approx(largest["a"][1] / 2 / 127, rel=1e-5)
        assert scales["b"] == pytest.approx(largest["b"][1] / 127, rel=1e-5)
        assert error(run(chain_of(made), images)["y"], run(made, images)["y"]) < 0.05

    def test_a_layer_asked_to_stay_float_keeps_its_weights_and_its_input_unless_another_reads_it(self) -> None:
        prepared = prepare(chain())
        without = plan(prepared, ("last",))
        assert "last" not in without.layers and ("f",) in plan(prepared).sites and ("f",) not in without.sites

    def test_the_convolution_that_only_sums_a_distribution_is_no_end_of_the_head(self) -> None:
        nodes = [helper.make_node("Conv", ["x", "w0"], ["a"], name="body"), helper.make_node("Relu", ["a"], ["b"]),
                 helper.make_node("Conv", ["b", "w1"], ["c"], name="distances"),
                 helper.make_node("Softmax", ["c"], ["d"], axis=1),
                 helper.make_node("Conv", ["d", "w2"], ["y"], name="dfl")]
        model = model_of(nodes, [1, 3, 8, 8], ["y"], {"w0": weights(8, 3, 1, 1), "w1": weights(16, 8, 1, 1),
                                                      "w2": np.arange(16, dtype=np.float32).reshape(1, 16, 1, 1)})
        planned = plan(prepare(model))
        assert planned.layers == ("body",) and planned.head == ("dfl", "distances")

    @pytest.mark.parametrize("kind", ["Gemm", "Gemm transposed", "MatMul", "ConvTranspose"])
    def test_other_layers_with_weights_are_quantised_along_their_output_channels(self, kind: str) -> None:
        uneven = np.array([0.01, 1, 100, 1], np.float32)  # per-tensor scales would lose the first channel whole
        if kind == "ConvTranspose":
            nodes = [helper.make_node("ConvTranspose", ["x", "w"], ["a"], name="layer", strides=[2, 2])]
            shape, given = [1, 6, 4, 4], weights(6, 4, 2, 2) * uneven.reshape(1, 4, 1, 1)
        elif kind == "MatMul":
            nodes = [helper.make_node("MatMul", ["x", "w"], ["a"], name="layer")]
            shape, given = [1, 5, 6], weights(6, 4) * uneven
        else:
            is_turned = kind != "Gemm"
            nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["a"], name="layer", transB=int(is_turned))]
            shape, given = [1, 6], (weights(6, 4) * uneven).T if is_turned else weights(6, 4) * uneven
        nodes += [helper.make_node("Relu", ["a"], ["r"]), helper.make_node("Identity", ["r"], ["y"])]
        # The layer makes the output, so another one behind it keeps it out of the head.
        nodes[-1] = helper.make_node("MatMul", ["r", "last"], ["y"], name="head")
        width = 8 if kind == "ConvTranspose" else 4
        model = model_of(nodes, shape, ["y"], {
            "w": given, "b": np.zeros(4, np.float32), "last": np.eye(width, dtype=np.float32)})
        x = RANDOM.normal(0, 1, shape).astype(np.float32)
        made, planned = quantized_of(model, x)
        assert planned.layers == ("layer",)
        expected, found = run(model, x)["y"], run(made, x)["y"]
        channel = 1 if kind == "ConvTranspose" else -1
        for index in range(4):
            exact = np.take(expected, index, channel)
            if exact.any():
                assert error(exact, np.take(found, index, channel)) < 0.03

    def test_q_dq_integer_operations_and_those_in_functions_are_recognised(self, images: np.ndarray) -> None:
        made, _ = quantized_of(chain(), images)
        assert is_quantized(made) and not is_quantized(chain())
        inner = helper.make_node("QLinearConv", ["x"] * 8, ["y"])
        function = helper.make_function("d", "f", ["x"], ["y"], [inner], [helper.make_opsetid("", 17)])
        model = chain()
        model.functions.append(function)
        assert is_quantized(model)
        branch = helper.make_graph([helper.make_node("QuantizeLinear", ["x", "s"], ["q"])], "b", [], [])
        model = chain()
        model.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch))
        assert is_quantized(model)


class TestBackends:
    @pytest.mark.parametrize("backend", [OpenVINO, OnnxRuntime])
    def test_both_compute_a_quantised_graph_as_onnx_defines_it(self, images: np.ndarray, backend: type) -> None:
        # Behind a Concat OpenVINO takes signed int8 for unsigned (2026.4): the adapter gives it the unsigned dialect.
        made, _ = quantized_of(chain(), images)
        reference = onnx.reference.ReferenceEvaluator(made).run(None, {"x": images})[0]
        found = run(made, images, backend)["y"]
        # A value half-way between two levels may fall to either side.
        assert error(reference, found) < 0.01
        assert error(run(chain_of(made), images)["y"], found) < 0.1

    def test_int8_kernels_run(self, images: np.ndarray) -> None:
        made, _ = quantized_of(chain(), images)
        with OpenVINO(Graph(Path("test.onnx"), made), threads=1) as backend:
            assert backend.report.precision == "int8"


def chain_of(quantized: Any) -> Any:
    """The float graph a quantised one approximates: Q/DQ of activations left out, weights as they were rounded."""
    model = onnx.ModelProto()
    model.CopyFrom(quantized)
    instead = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    kept = [node for node in model.graph.node if node.op_type != "QuantizeLinear"]
    source = {node.output[0]: instead[node.input[0]] for node in kept
              if node.op_type == "DequantizeLinear" and node.input[0] in instead}
    kept = [node for node in kept if node.output[0] not in source]
    for node in kept:
        node.input[:] = [source.get(name, name) for name in node.input]
    rewrite.replace(model.graph.node, kept)
    return model


class TestRewrites:
    def same(self, model: Any, *, without: str, shape: tuple[int, ...]) -> Any:
        x = RANDOM.normal(0, 1, shape).astype(np.float32)
        made = prepare(model)
        assert without not in {node.op_type for node in made.graph.node}
        before, after = run(model, x), run(made, x)
        assert before.keys() == after.keys()
        for name in before:
            np.testing.assert_allclose(after[name], before[name], rtol=1e-4, atol=1e-5)
        return made

    def test_batch_norms_identities_and_constants_fold_away(self) -> None:
        nodes = [
            helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(weights(4, 3, 3, 3), "w")),
            helper.make_node("Identity", ["x"], ["x1"]), helper.make_node("Conv", ["x1", "w"], ["a"]),
            helper.make_node("BatchNormalization", ["a", "g", "b", "m", "v"], ["c"], epsilon=0.01),
            helper.make_node("Relu", ["c"], ["d"]), helper.make_node("Conv", ["d", "w2"], ["y"])]
        made = self.same(model_of(nodes, [1, 3, 9, 9], ["y"], {
            "g": weights(4), "b": weights(4), "m": weights(4), "v": np.abs(weights(4)) + 1, "w2": weights(2, 4, 1, 1)}),
            without="BatchNormalization", shape=(1, 3, 9, 9))
        assert [node.op_type for node in made.graph.node] == ["Conv", "Relu", "Conv"]

    @pytest.mark.parametrize("order", [((0, 0), (1, 0), (0, 1), (1, 1)), ((1, 1), (0, 1), (1, 0), (0, 0))])
    def test_a_focus_layer_becomes_one_convolution(self, order: tuple[tuple[int, int], ...]) -> None:
        # YOLOX slices rows, then columns, of each of four phases (network_blocks.py, Focus).
        nodes, most = [], np.array([2 ** 63 - 1])
        constants = {"0": np.array([0]), "1": np.array([1]), "2": np.array([2]), "3": np.array([3]), "most": most}
        for index, (down, right) in enumerate(order):
            nodes += [helper.make_node("Slice", ["x", str(down), "most", "2", "2"], [f"rows{index}"]),
                      helper.make_node("Slice", [f"rows{index}", str(right), "most", "3", "2"], [f"part{index}"])]
        nodes += [helper.make_node("Concat", [f"part{index}" for index in range(4)], ["whole"], axis=1),
                  helper.make_node("Conv", ["whole", "w", "b"], ["y"], pads=[1] * 4, strides=[1, 1],
                                   kernel_shape=[3, 3])]
        constants |= {"w": weights(5, 12, 3, 3), "b": weights(5)}
        made = self.same(model_of(nodes, [1, 3, 12, 10], ["y"], constants), without="Slice", shape=(1, 3, 12, 10))
        assert [node.op_type for node in made.graph.node] == ["Conv"]

    def test_slices_that_are_no_focus_layer_stay(self) -> None:
        nodes = [helper.make_node("Slice", ["x", "0", "4", "2", "2"], [f"p{index}"]) for index in range(4)]
        nodes += [helper.make_node("Concat", ["p0", "p1", "p2", "p3"], ["whole"], axis=1),
                  helper.make_node("Conv", ["whole", "w"], ["y"])]
        model = model_of(nodes, [1, 3, 8, 8], ["y"], {"0": np.array([0]), "4": np.array([4]), "2": np.array([2]),
                                                      "w": weights(5, 12, 1, 1)})
        assert sum(node.op_type == "Slice" for node in prepare(model).graph.node) == 4

    @pytest.mark.parametrize("form", ["gather", "reshape"])
    def test_channel_shuffles_of_shufflenet_go_into_the_weights(self, form: str) -> None:
        # Two units of ShuffleNetV2: half of the channels goes through convolutions, then both halves are interleaved.
        order = np.arange(12).reshape(2, 6).T.ravel()
        nodes, current = [helper.make_node("Conv", ["x", "w"], ["t0"])], "t0"
        constants: dict[str, np.ndarray] = {"w": weights(12, 3, 1, 1), "halves": np.array([6, 6]), "order": order,
                                            "sides": np.array([2, 3]), "five": np.array([0, 2, 6, 8, 8]),
                                            "four": np.array([0, 12, 8, 8])}
        for unit in range(3):
            n = f"u{unit}"
            constants |= {f"{n}a": weights(6, 6, 1, 1), f"{n}d": weights(6, 1, 3, 3), f"{n}b": weights(6),
                          f"{n}c": weights(6, 6, 1, 1)}
            nodes += [
                helper.make_node("Split", [current, "halves"], [f"{n}l", f"{n}r"], axis=1),
                helper.make_node("Conv", [f"{n}r", f"{n}a"], [f"{n}1"]), helper.make_node("Relu", [f"{n}1"], [f"{n}2"]),
                helper.make_node("Conv", [f"{n}2", f"{n}d", f"{n}b"], [f"{n}3"], group=6, pads=[1] * 4),
                helper.make_node("Conv", [f"{n}3", f"{n}c"], [f"{n}4"]),
                helper.make_node("Concat", [f"{n}l", f"{n}4"], [f"{n}5"], axis=1)]
            if form == "gather":
                nodes.append(helper.make_node("Gather", [f"{n}5", "order"], [f"{n}6"], axis=1))
            else:
                nodes += [helper.make_node("Reshape", [f"{n}5", "five"], [f"{n}7"]),
                          helper.make_node("Transpose", [f"{n}7"], [f"{n}8"], perm=[0, 2, 1, 3, 4]),
                          helper.make_node("Reshape", [f"{n}8", "four"], [f"{n}6"])]
            current = f"{n}6"
        # Once into a depthwise convolution, and once as it is into something that knows nothing of orders.
        constants |= {"dw": weights(12, 1, 3, 3), "bias": weights(12), "sum": weights(4, 12, 1, 1)}
        nodes += [helper.make_node("Conv", [current, "dw", "bias"], ["e"], group=12, pads=[1] * 4),
                  helper.make_node("LeakyRelu", ["e"], ["f"]), helper.make_node("Conv", ["f", "sum"], ["y"]),
                  helper.make_node("ReduceMean", [current, "sides"], ["mean"], keepdims=0)]
        model = model_of(nodes, [1, 3, 8, 8], ["y", "mean"], constants)
        made = self.same(model, without="Transpose" if form == "reshape" else "Reshape", shape=(1, 3, 8, 8))
        # Only what the mean reads is put into order.
        assert sum(node.op_type == "Gather" for node in made.graph.node) == 1

    def test_a_shuffled_output_comes_out_in_order(self) -> None:
        nodes = [helper.make_node("Conv", ["x", "w"], ["a"]), helper.make_node("Gather", ["a", "order"], ["y"], axis=1)]
        model = model_of(nodes, [1, 3, 4, 4], ["y"], {"w": weights(6, 3, 1, 1), "order": np.array([0, 3, 1, 4, 2, 5])})
        self.same(model, without="Split", shape=(1, 3, 4, 4))

    def test_an_old_opset_is_converted(self) -> None:
        nodes = [helper.make_node("Conv", ["x", "w"], ["a"]), helper.make_node("Relu", ["a"], ["b"]),
                 helper.make_node("Conv", ["b", "w2"], ["y"])]
        model = model_of(nodes, [1, 3, 4, 4], ["y"], {"w": weights(6, 3, 1, 1), "w2": weights(2, 6, 1, 1)}, opset=11)
        made = self.same(model, without="Clip", shape=(1, 3, 4, 4))
        assert made.opset_import[0].version >= 13
        assert model.opset_import[0].version == 11

    def test_depthwise_layers_are_named(self) -> None:
        assert depthwise(prepare(chain())) == ["each"]


class TestBadInput:
    def test_a_quantised_graph_is_refused(self, images: np.ndarray) -> None:
        made, _ = quantized_of(chain(), images)
        with pytest.raises(Invalid, match="quantised already.*FP32"):
            prepare(made)

    def test_a_graph_whose_only_layer_makes_the_output_has_nothing_to_quantise(self) -> None:
        model = model_of([helper.make_node("Conv", ["x", "w"], ["y"])], [1, 3, 4, 4], ["y"], {"w": weights(6, 3, 1, 1)})
        with pytest.raises(Invalid, match="nothing to quantise: 1 of its layers have constant weights, 1 of them make"):
            plan(prepare(model))

    def test_weights_computed_at_run_time_are_left_alone(self) -> None:
        nodes = [helper.make_node("Relu", ["w"], ["w1"]), helper.make_node("Conv", ["x", "w1"], ["a"], name="dynamic"),
                 helper.make_node("Relu", ["a"], ["b"]), helper.make_node("Conv", ["b", "w2"], ["y"])]
        model = model_of(nodes, [1, 3, 4, 4], ["y"], {"w": weights(6, 3, 1, 1), "w2": weights(2, 6, 1, 1)})
        with pytest.raises(Invalid, match="nothing to quantise.*as constants"):
            plan(prepare(model))

    def test_an_opset_that_cannot_be_converted_says_so(self) -> None:
        model = model_of([helper.make_node("Conv", ["x", "w"], ["y"])], [1, 3, 4, 4], ["y"], {"w": weights(6, 3, 1, 1)})
        model.opset_import[0].version = 10
        model.graph.node[0].op_type = "NoSuchOperation"
        with pytest.raises(Invalid, match="opset 10.*13.*Export it"):
            prepare(model)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_broken_weights_and_ranges_are_refused(self, images: np.ndarray, value: float) -> None:
        model = chain()
        prepared = prepare(model)
        planned = plan(prepared)
        ranges = ranges_of(prepared, planned, images)
        with pytest.raises(Invalid, match="calibrate again"):
            quantize(prepared, planned, {**ranges, planned.sites[0][0]: (0.0, value)})
        tensor = next(tensor for tensor in prepared.graph.initializer if tensor.name == "w1")
        broken = numpy_helper.to_array(tensor).copy()
        broken[0] = value
        tensor.CopyFrom(numpy_helper.from_array(broken, "w1"))
        with pytest.raises(Invalid, match="'left' hold a NaN or an infinity"):
            quantize(prepared, planned, ranges)

    def test_a_tensor_that_is_always_zero_gets_a_scale_that_can_be_divided_by(self) -> None:
        made, _ = quantized_of(chain(), np.zeros((1, 3, 16, 16), np.float32))
        assert np.isfinite(run(made, np.ones((1, 3, 16, 16), np.float32))["y"]).all()


def test_the_test_s_own_detector_keeps_its_head_and_quantises_the_rest(tmp_path: Path) -> None:
    deep_finder(tmp_path)
    planned = plan(prepare(onnx.load(str(tmp_path / "model.onnx"))))
    assert planned.layers == ("first", "second", "third") and planned.head == ("head",)

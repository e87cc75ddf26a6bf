"""The builder of workbench/inference/engine.py under tensorrt_rtx, whose wheel builds engines without a GPU.

These tests show that graphs are parsed and built, and which layers the builder planned in int8. Building is not
running: that an engine loads, computes the right numbers and is fast is shown on a card by tests/gpu and bench/gpu.py.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest
from doubles import graphs, quantized
from onnx import TensorProto, helper

from workbench.adapters.tensorrt import rtx_library
from workbench.errors import Invalid, Unavailable
from workbench.inference.engine import EngineOptions, build, cast_first, check_dialect, float_type, int8_layers
from workbench.inference.graph import quantized_layers, read_graph
from workbench.inference.known import card_for_nanodet, card_for_yolox
from workbench.inference.quantize import plan, prepare, quantize
from workbench.inference.standard import pixels_inside
from workbench.model import InputSpec

PROJECT = Path(__file__).resolve().parents[3]
MODELS = PROJECT / "models"
RECIPES = sorted(path.parent for path in MODELS.glob("*/network.py"))
# Each recipe's network at its smallest.
SMALL: dict[str, Callable[[Any], Any]] = {
    "efficientnet_lite0_fcos": lambda network: network.Detector(3, channels=32, depth=1),
    "ssdlite320_mobilenet_v3": lambda network: network.Detector(3, "efficientnet_lite0"),
    "fasterrcnn": lambda network: network.Detector(3),
    "classification": lambda network: network.Classifier("efficientnet_lite0", 3),
    "segmentation": lambda network: network.Segmenter(3)}
RTX_METHODS = ("set_compute_capability", "num_compute_capabilities")
AMPERE = EngineOptions(targets=("SM86",))


@pytest.fixture(scope="module")
def rtx() -> Any:
    """The library; where .ci/run demands all tests, Linux on x86-64 must have it."""
    try:
        return rtx_library()
    except Unavailable as error:
        if os.environ.get("WORKBENCH_REQUIRE_SHARED") and (sys.platform, platform.machine()) == ("linux", "x86_64"):
            pytest.fail(str(error))
        pytest.skip(str(error))


def int8_of(model: Any) -> Any:
    """The graph quantised with made-up ranges: which numbers come out is of no matter for building."""
    ready = prepare(model)
    planned = plan(ready)
    return quantize(ready, planned, {tensor: (-6.0, 6.0) for site in planned.sites for tensor in site})


def standard(file: Path, spec: InputSpec) -> Any:
    return pixels_inside(read_graph(file)[1], spec)[0]


def check_both(rtx: Any, model: Any) -> None:
    """Builds a model as float and as INT8, and looks at what the builder says of the layers."""
    full = build(rtx, Path("model.onnx"), model, AMPERE)
    assert full.engine[1:4] == b"trt" and int8_layers(full.layers) == [] and float_type(full.layers) == "f32"
    half = int8_of(model)
    small = build(rtx, Path("model.onnx"), half, AMPERE)
    # The builder may fuse layers, and it may split one; most of what is quantised must really compute in int8.
    assert len(int8_layers(small.layers)) >= 0.9 * len(quantized_layers(half)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_s_model_is_built_as_float_and_as_int8_or_refused(
    rtx: Any, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    for folder in (MODELS, recipe):
        monkeypatch.syspath_prepend(str(folder))
    before = sys.modules.pop("network", None)
    try:
        network = importlib.import_module("network")
        export, small = importlib.import_module("training.export").export_onnx, SMALL[recipe.name]
        if hasattr(network, "export_onnx"):
            network.export_onnx(small(network), (64, 64), tmp_path / "model.onnx")
        else:
            export(small(network), (64, 64), tmp_path / "model.onnx", ["logits"])
    finally:
        sys.modules.pop("network", None)
        if before is not None:
            sys.modules["network"] = before
    model = read_graph(tmp_path / "model.onnx")[1]
    if recipe.name == "fasterrcnn":  # its second stage looks at what NMS leaves of the first one's boxes
        with pytest.raises(Invalid, match="NonMaxSuppression.* selects boxes inside the graph"):
            check_both(rtx, model)
    else:
        check_both(rtx, model)


@pytest.mark.parametrize("name, card", [("yolox_nano", card_for_yolox), ("nanodet_plus_m", card_for_nanodet)])
def test_the_shared_models_are_built_as_float_and_as_int8(rtx: Any, shared: Path, name: str, card: Any) -> None:
    file = shared / "data" / "models" / name / f"{name}_416.onnx"
    check_both(rtx, standard(file, card(file, "m", size=(416, 416)).input))


@pytest.mark.parametrize("target, computes_int8", [("SM75", False), ("SM80", True), ("SM86", True), ("SM120", True)])
def test_a_quantised_convolution_is_built_for_every_generation_of_cards(
    rtx: Any, tmp_path: Path, target: str, computes_int8: bool
) -> None:
    """Seen in 1.7.1: for Turing (SM75) TensorRT for RTX plans it in float32. Q/DQ nodes alone promise nothing."""
    model = onnx.load(quantized.convolution(tmp_path / "q.onnx"))
    built = build(rtx, tmp_path / "q.onnx", model, EngineOptions(targets=(target,)))
    assert built.engine and [name[:4] for name in int8_layers(built.layers)] == ["conv"] * computes_int8


def test_the_tiny_graphs_of_the_tests_are_built(rtx: Any, tmp_path: Path) -> None:
    for path in (graphs.affine(tmp_path / "free.onnx"), graphs.affine(tmp_path / "fixed.onnx", batch=2),
                 tmp_path / graphs.red_finder(tmp_path).onnx):
        assert build(rtx, path, onnx.load(path), AMPERE).engine


def test_bytes_that_are_transposed_before_they_are_cast_are_built(rtx: Any, tmp_path: Path) -> None:
    """TensorRT has no transposition of uint8, exporters write it all the same (torch.onnx of a permuted image)."""
    path = graphs.save(tmp_path / "m.onnx", [
        helper.make_node("Transpose", ["images"], ["t"], name="first", perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["t"], ["f"], to=TensorProto.FLOAT), helper.make_node("Mul", ["f", "two"], ["y"])],
        {"images": (["n", 4, 4, 3], "uint8")}, ["y"], {"two": np.float32(2)})
    model = onnx.load(path)
    changed = cast_first(model)
    assert [node.op_type for node in changed.graph.node] == ["Cast", "Transpose", "Cast", "Mul"]
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3)).astype(np.uint8)
    before, after = (
        onnx.reference.ReferenceEvaluator(one).run(None, {"images": images})[0] for one in (model, changed))
    np.testing.assert_array_equal(before, after)
    assert build(rtx, path, model, AMPERE).engine
    cast_already = onnx.load(graphs.affine(tmp_path / "a.onnx"))
    assert cast_first(cast_already) is cast_already


@pytest.mark.parametrize("given, says", [
    ({"bias": np.int32}, r"node 3 'dq_b' \(DequantizeLinear\) holds int32.*float biases.*Make the INT8 version here"),
    ({"zero": 3}, r"node 0 'q' \(QuantizeLinear\) has a zero point other than 0.*Make the INT8 version here"),
    # The parser takes these for int8 with a warning, and other numbers come out.
    ({"kind": np.uint8}, r"node 0 'q' \(QuantizeLinear\) holds uint8.*Make the INT8 version here"),
], ids=["int32 bias", "zero point", "uint8"])
def test_a_dialect_of_quantisation_that_tensorrt_does_not_have_is_invalid_with_its_node(
    tmp_path: Path, given: dict[str, Any], says: str
) -> None:
    with pytest.raises(Invalid, match=rf"q.onnx: {says}"):
        check_dialect(tmp_path / "q.onnx", onnx.load(quantized.convolution(tmp_path / "q.onnx", **given)))
    check_dialect(tmp_path / "q.onnx", onnx.load(quantized.convolution(tmp_path / "q.onnx")))


def test_a_graph_that_ends_in_non_maximum_suppression_is_invalid(tmp_path: Path) -> None:
    path = graphs.save(tmp_path / "m.onnx", [
        helper.make_node("Slice", ["images", "from", "to"], ["boxes"]),
        helper.make_node("NonMaxSuppression", ["boxes", "scores", "most"], ["kept"], name="last")],
        {"images": ([1, 10, 4], "float32")}, ["kept"],
        {"scores": np.zeros((1, 1, 10), np.float32), "most": np.array([5]), "from": np.array([0]), "to": np.array([1])})
    with pytest.raises(Invalid, match=r"m.onnx: node 1 'last' \(NonMaxSuppression\) selects boxes.*raw outputs"):
        check_dialect(path, onnx.load(path))


def test_what_the_parser_refuses_is_invalid_with_file_node_reason_and_next_step(rtx: Any, tmp_path: Path) -> None:
    for nodes, says in (
        ([helper.make_node("Conjure", ["x"], ["y"], name="odd")], r"node 0 'odd' \(Conjure\).*no such operator"),
        ([helper.make_node("SequenceConstruct", ["x"], ["s"], name="list"),
          helper.make_node("ConcatFromSequence", ["s"], ["y"], axis=0)], r"node 0 'list' \(SequenceConstruct\)"),
        ([helper.make_node("Conv", ["x", "w"], ["y"], name="wide")], r"node 0 'wide' \(Conv\).*dimension"),
    ):
        path = graphs.save(tmp_path / "m.onnx", nodes, {"x": ([1, 4, 8, 8], "float32")}, ["y"],
                           {"w": np.zeros((2, 3, 3, 3), np.float32)})
        with pytest.raises(Invalid, match=rf"m.onnx: {says}.*backend onnxruntime or openvino") as caught:
            build(rtx, path, onnx.load(path), AMPERE)
        assert "/_src/" not in str(caught.value) and "\n" not in str(caught.value)


def test_free_sides_and_several_inputs_are_invalid(rtx: Any, tmp_path: Path) -> None:
    free = graphs.save(tmp_path / "free.onnx", [helper.make_node("Relu", ["x"], ["y"])],
                       {"x": (["n", 3, "h", "w"], "float32")}, ["y"], {})
    two = graphs.save(tmp_path / "two.onnx", [helper.make_node("Add", ["a", "b"], ["y"])],
                      {"a": ([1, 4], "float32"), "b": ([1, 4], "float32")}, ["y"], {})
    for path, says in ((free, "free.onnx leaves sides of its input 'x' free.*height and width"), (two, "2 inputs")):
        with pytest.raises(Invalid, match=says):
            build(rtx, path, onnx.load(path), AMPERE)


def test_a_build_tells_its_progress_and_is_stopped_by_what_is_raised(rtx: Any, tmp_path: Path) -> None:
    path, told = graphs.affine(tmp_path / "m.onnx"), []

    def tell(phase: str, done: int, steps: int) -> None:
        told.append((phase, done, steps))
        if len(told) == 30:
            raise KeyboardInterrupt("a person cancelled")

    build(rtx, path, onnx.load(path), AMPERE, tell=lambda *step: told.append(step))
    assert len({phase for phase, _, _ in told}) > 3 and all(1 <= done <= steps for _, done, steps in told)
    told.clear()
    with pytest.raises(KeyboardInterrupt, match="a person cancelled"):
        build(rtx, path, onnx.load(path), AMPERE, tell=tell)
    assert len(told) == 30


def test_too_little_memory_means_smaller_batches_unless_they_were_asked_for(
    rtx: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = np.random.default_rng(0).normal(size=(64, 3, 3, 3)).astype(np.float32)
    more = np.random.default_rng(1).normal(size=(64, 64, 3, 3)).astype(np.float32)
    path = graphs.save(tmp_path / "m.onnx", [
        helper.make_node("Conv", ["images", "w"], ["a"], pads=[1] * 4), helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "v"], ["c"], pads=[1] * 4), helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("Conv", ["d", "v"], ["y"], pads=[1] * 4)],
        {"images": (["n", 3, 128, 128], "float32")}, ["y"], {"w": weights, "v": more})
    model = onnx.load(path)
    little = EngineOptions(targets=("SM86",), workspace_bytes=64 << 20)
    assert build(rtx, path, model, little).engine
    assert "Trying at most 32 images" in caplog.text
    with pytest.raises(Unavailable, match="out of memory.*m.onnx.*smaller batches"):
        build(rtx, path, model, EngineOptions((1, 8, 64), 64 << 20, ("SM86",)))


@pytest.mark.parametrize("batches", [(1, 2), (2, 1, 3), (0, 1, 2), (1, 4, 2)])
def test_batches_out_of_order_are_invalid(batches: tuple[int, ...]) -> None:
    with pytest.raises(Invalid, match="fewest, tuned for, most"):
        EngineOptions(batches)


def test_larger_images_get_smaller_batches() -> None:
    assert EngineOptions().profile_of((-1, 416, 416, 3)) == (1, 8, 64)
    assert EngineOptions().profile_of((-1, 3, 1280, 1280)) == (1, 8, 16)
    assert EngineOptions().profile_of((-1, 4096, 4096, 3)) == (1, 1, 1)
    assert EngineOptions(batches=(2, 4, 6)).profile_of((-1, 4096, 4096, 3)) == (2, 4, 6)


def test_int8_layers_are_told_from_those_that_only_convert() -> None:
    rtx = ("Name: in, LayerType: kgen, Inputs: [ { Name: x, Dimensions: [-1,3,8,8], Datatype: Float }], Constants: [], "
           "Outputs: [ { Name: q, Datatype: Int8 }], TacticName: t\n"
           "Name: conv, LayerType: correlation, Inputs: [ { Name: q, Datatype: Int8 }], Constants: [ { Name: w, "
           "Datatype: Int8 }], Outputs: [ { Name: y, Datatype: Float }], TacticName: t\n"
           "Name: out, LayerType: kgen, Inputs: [ { Name: q, Datatype: Int8 }], Constants: [ { Name: s, "
           "Datatype: Float }], Outputs: [ { Name: z, Datatype: Float }], TacticName: t\n"
           "Name: half, LayerType: gemm, Inputs: [ { Name: y, Datatype: Half }], Constants: [], Outputs: [], "
           "TacticName: t")
    full = ("Name: r, LayerType: Reformat, Inputs: [ { Name: x, Format/Datatype: Row major linear FP32 }], "
            "Outputs: [ { Name: q, Format/Datatype: Thirty-two wide channel vectorized row major Int8 format }], "
            "ParameterType: Reformat\n"
            "Name: conv1, LayerType: CaskConvolution, Inputs: [ { Name: q, Format/Datatype: Thirty-two wide channel "
            "vectorized row major Int8 format }], Outputs: [ { Name: y, Format/Datatype: Row major linear FP32 }], "
            "Weights: {\"Type\": \"Int8\", \"Count\": 9}\n"
            "Name: back, LayerType: Reformat, Inputs: [ { Name: q, Format/Datatype: Four wide Int8 format }], "
            "Outputs: []")
    assert (int8_layers(rtx), float_type(rtx)) == (["conv"], "f16")
    assert (int8_layers(full), float_type(full)) == (["conv1"], "f32")


def test_every_name_of_the_library_that_the_workbench_uses_exists_in_it(rtx: Any) -> None:
    """Read from the sources, so that a new call is checked too; the same holds for tensorrt where it is installed."""
    libraries = [rtx, *(importlib.import_module(name) for name in ("tensorrt",) if importlib.util.find_spec(name))]
    text = "".join((PROJECT / "workbench" / file).read_text()
                   for file in ("inference/engine.py", "adapters/tensorrt.py"))
    names = set(re.findall(r"\btrt\.([A-Za-z0-9_.]+)", text)) - {"__name__", "__version__"}
    assert len(names) > 12
    used = {"Builder": r"builder", "IBuilderConfig": r"config", "OnnxParser": r"parser",
            "ParserError": r"\berror(?=\.\w+\(\))",
            "INetworkDefinition": r"network", "IOptimizationProfile": r"\bprofile", "ICudaEngine": r"_engine",
            "IExecutionContext": r"ready\.context", "Runtime": r"_runtime"}
    for library in libraries:
        only_rtx = set() if library is rtx else {"ComputeCapability", *RTX_METHODS}
        for name in names - only_rtx:
            place = library
            for part in name.split("."):
                place = getattr(place, part)
        for kind, variable in used.items():
            methods = set(re.findall(rf"{variable}\.([a-z]\w+)", text)) - {"items", "fewer"} - only_rtx
            assert methods, kind
            missing = [method for method in methods if not hasattr(getattr(library, kind), method)]
            assert missing == [], f"{library.__name__}.{kind} has no {missing}"


def test_every_function_of_cuda_bindings_that_the_adapter_calls_takes_as_many_arguments() -> None:
    cu = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed", exc_type=ImportError)
    text = (PROJECT / "workbench/adapters/tensorrt.py").read_text()
    calls = re.findall(r"cu\.(cu\w+)\(((?:[^()]|\([^()]*\))*)\)", text)
    assert len(calls) >= 7
    for name, arguments in calls:
        wanted = len(inspect.signature(getattr(cu, name)).parameters)
        assert len([one for one in arguments.split(",") if one.strip()]) == wanted, name
    assert cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL == 1 and cu.CUresult.CUDA_SUCCESS == 0

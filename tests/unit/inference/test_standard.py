"""The standard form of graphs: pixels in, the card's input arithmetic inside, and a batch axis set free."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import pytest
from doubles import graphs
from onnx import TensorProto, helper, numpy_helper

from workbench.adapters.onnxruntime import OnnxRuntime
from workbench.adapters.openvino import OpenVINO
from workbench.errors import Invalid
from workbench.inference.detector import Detector
from workbench.inference.graph import Graph, file_record, read_graph
from workbench.inference.known import card_for_nanodet, card_for_yolox
from workbench.inference.standard import dynamic_batch, gain_and_shift, pixels_inside
from workbench.model import InputSpec, ModelCard

SIDES = (48, 32)  # width, height


def passing(path: Path, spec: InputSpec, batch: int | str = 1, opset: int = 17,
            dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """A graph that gives back what it is fed, as float32."""
    shape = [batch, SIDES[1], SIDES[0], 3] if spec.layout == "NHWC" else [batch, 3, SIDES[1], SIDES[0]]
    kind = TensorProto.UINT8 if spec.dtype == "uint8" else dtype
    graph = helper.make_graph([helper.make_node("Cast", ["images"], ["fed"], to=TensorProto.FLOAT)], "passing",
                              [helper.make_tensor_value_info("images", kind, shape)],
                              [helper.make_tensor_value_info("fed", TensorProto.FLOAT, [batch, None, None, None])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.save(model, str(path))
    return model


def outside(canvas: np.ndarray, spec: InputSpec) -> np.ndarray:
    """What InputSpec's docstring says, in numpy."""
    tensor = canvas if spec.colour == "RGB" else canvas[..., ::-1]
    if spec.dtype == "float32":
        gain, shift = gain_and_shift(spec)
        tensor = tensor.astype(np.float32) * gain - shift
    return np.ascontiguousarray(tensor if spec.layout == "NHWC" else tensor.transpose(0, 3, 1, 2))


SPECS = [InputSpec(SIDES, layout=layout, dtype=dtype, colour=colour, **more)
         for layout, dtype, colour in product(("NHWC", "NCHW"), ("uint8", "float32"), ("RGB", "BGR"))
         for more in ({}, {"scale": 1 / 255, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)})
         if dtype == "float32" or not more]


@pytest.mark.parametrize("adapter", [OpenVINO, OnnxRuntime])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.layout} {s.dtype} {s.colour} scale {s.scale:.3g}")
def test_the_graph_is_fed_what_the_card_describes(tmp_path: Path, spec: InputSpec, adapter: type) -> None:
    canvas = np.random.default_rng(0).integers(0, 256, (1, SIDES[1], SIDES[0], 3), np.uint8)
    made, standard = pixels_inside(passing(tmp_path / "m.onnx", spec), spec)
    onnx.checker.check_model(made)
    assert standard == InputSpec(SIDES)
    with adapter(Graph(tmp_path / "m.onnx", made), threads=1) as backend:
        fed = backend.run(canvas)["fed"]
    # The same float32 operations; a runtime may fuse multiplication and subtraction and round once instead of twice.
    np.testing.assert_allclose(fed, outside(canvas, spec), rtol=1e-6, atol=1e-6)


def test_scale_mean_and_std_worked_out_by_hand(tmp_path: Path) -> None:
    spec = InputSpec(SIDES, layout="NCHW", dtype="float32", colour="BGR", scale=0.5, mean=(1, 2, 3), std=(2, 4, 8))
    made, _ = pixels_inside(passing(tmp_path / "m.onnx", spec), spec)
    with OnnxRuntime(Graph(tmp_path / "m.onnx", made), threads=1) as backend:
        fed = backend.run(np.full((1, SIDES[1], SIDES[0], 3), (10, 20, 40), np.uint8))["fed"]
    # Blue (40 * 0.5 - 1) / 2, green (20 * 0.5 - 2) / 4, red (10 * 0.5 - 3) / 8.
    np.testing.assert_allclose(fed[0, :, 5, 5], [9.5, 2.0, 0.25])


def test_a_graph_in_standard_form_comes_back_as_it_is(tmp_path: Path) -> None:
    spec = InputSpec(SIDES, padding="centre", pad=7)
    model = passing(tmp_path / "m.onnx", spec, batch="n")
    made, same = pixels_inside(model, spec)
    assert made is model and same == spec
    scaled = InputSpec(SIDES, dtype="float32", scale=2.0, padding="centre", pad=7)
    once, standard = pixels_inside(passing(tmp_path / "m.onnx", scaled), scaled)
    assert standard == spec and pixels_inside(once, standard)[0] is once


def test_the_model_given_is_not_changed_and_name_and_batch_axis_stay(tmp_path: Path) -> None:
    spec = InputSpec(SIDES, layout="NCHW", dtype="float32")
    model = passing(tmp_path / "m.onnx", spec, batch="n")
    before = model.SerializeToString()
    made, _ = pixels_inside(model, spec)
    assert model.SerializeToString() == before
    (value,) = made.graph.input
    dims = value.type.tensor_type.shape.dim
    assert value.name == "images" and dims[0].dim_param == "n" and [d.dim_value for d in dims[1:]] == [32, 48, 3]


def test_half_and_double_inputs_are_cast_to_what_the_graph_takes(tmp_path: Path) -> None:
    spec = InputSpec(SIDES, layout="NCHW", dtype="float32", scale=1 / 255)
    canvas = np.full((1, SIDES[1], SIDES[0], 3), 51, np.uint8)
    for kind in (TensorProto.FLOAT16, TensorProto.DOUBLE):
        made, _ = pixels_inside(passing(tmp_path / "m.onnx", spec, dtype=kind), spec)
        with OnnxRuntime(Graph(tmp_path / "m.onnx", made), threads=1) as backend:
            np.testing.assert_allclose(backend.run(canvas)["fed"], 0.2, atol=2e-4)  # half precision has 11 bits


def test_names_taken_by_the_graph_and_weights_listed_as_inputs_do_no_harm(tmp_path: Path) -> None:
    spec = InputSpec(SIDES, layout="NCHW", dtype="float32", colour="BGR")
    # IR version 3 lists weights among the inputs, and these have the names the first nodes would take.
    weight = numpy_helper.from_array(np.float32(3), "pixels_gather")
    shape = [1, 3, SIDES[1], SIDES[0]]
    graph = helper.make_graph(
        [helper.make_node("Mul", ["images", "pixels_gather"], ["pixels_cast"])], "old",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape),
         helper.make_tensor_value_info("pixels_gather", TensorProto.FLOAT, [])],
        [helper.make_tensor_value_info("pixels_cast", TensorProto.FLOAT, shape)], [weight])
    made, _ = pixels_inside(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=3), spec)
    with OnnxRuntime(Graph(tmp_path / "m.onnx", made), threads=1) as backend:
        fed = backend.run(np.full((1, SIDES[1], SIDES[0], 3), (1, 2, 4), np.uint8))["pixels_cast"]
    assert fed[0, :, 0, 0].tolist() == [12, 6, 3]


def test_an_input_that_is_read_inside_a_branch_is_fed_too(tmp_path: Path) -> None:
    spec = InputSpec(SIDES, layout="NHWC", dtype="float32", scale=0.5)
    branches = {name: helper.make_graph(
        [helper.make_node("Add", ["images", "images"], [f"{name}_sum"])], name, [],
        [helper.make_tensor_value_info(f"{name}_sum", TensorProto.FLOAT, None)])
        for name in ("then_branch", "else_branch")}
    graph = helper.make_graph(
        [helper.make_node("If", ["yes"], ["sum"], **branches)], "branching",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, SIDES[1], SIDES[0], 3])],
        [helper.make_tensor_value_info("sum", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array(True), "yes")])
    made, _ = pixels_inside(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), spec)
    with OnnxRuntime(Graph(tmp_path / "m.onnx", made), threads=1) as backend:
        assert (backend.run(np.full((1, SIDES[1], SIDES[0], 3), 7, np.uint8))["sum"] == 7).all()


@pytest.mark.parametrize(("spec", "made_for", "expected"), [
    (InputSpec((64, 32)), InputSpec(SIDES), r"takes \(1, 32, 48, 3\), its card says NHWC \(1, 32, 64, 3\)"),
    (InputSpec(SIDES, layout="NCHW"), InputSpec(SIDES), "NCHW"),
    (InputSpec(SIDES, dtype="float32"), InputSpec(SIDES), r"takes uint8 \(1, 32, 48, 3\), its card says float32"),
    (InputSpec(SIDES), InputSpec(SIDES, dtype="float32"), "takes float .* its card says uint8"),
], ids=["sides", "layout", "float", "uint8"])
def test_a_card_that_does_not_describe_the_input_is_refused(
    tmp_path: Path, spec: InputSpec, made_for: InputSpec, expected: str
) -> None:
    with pytest.raises(Invalid, match=expected):
        pixels_inside(passing(tmp_path / "m.onnx", made_for), spec)


def test_an_opset_without_broadcasting_is_refused(tmp_path: Path) -> None:
    spec = InputSpec(SIDES, layout="NCHW", dtype="float32")
    with pytest.raises(Invalid, match="opset 6"):
        pixels_inside(passing(tmp_path / "m.onnx", spec, opset=6), spec)


def reshaping(path: Path, fixed_elsewhere: bool = False) -> tuple[ModelCard, Path]:
    """A YOLOX-like graph for one image: its Reshape holds a leading 1; with `fixed_elsewhere` a constant does, too."""
    cells = 16  # 32 x 32 at stride 8
    nodes = [helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT),
             helper.make_node("Transpose", ["x"], ["chw"], perm=[0, 3, 1, 2]),
             helper.make_node("AveragePool", ["chw"], ["pooled"], kernel_shape=[8, 8], strides=[8, 8]),
             helper.make_node("Conv", ["pooled", "mix"], ["maps"]),
             helper.make_node("Sigmoid", ["maps"], ["scores"]),
             helper.make_node("Reshape", ["scores", "flat"], ["flattened"]),
             helper.make_node("Transpose", ["flattened"], ["made"], perm=[0, 2, 1]),
             helper.make_node("Gather", ["made", "first"], ["output"], axis=0)]
    if not fixed_elsewhere:
        nodes = nodes[:-1]
        nodes[-1].output[0] = "output"
    graphs.save(path / "m.onnx", nodes, {"images": ([1, 32, 32, 3], "uint8")}, ["output"],
                {"mix": np.random.default_rng(0).normal(0, 0.02, (6, 3, 1, 1)).astype(np.float32),
                 "flat": np.array([1, 6, cells], np.int64), "first": np.array([0], np.int64)})
    card = replace(graphs.red_finder(path / "finder", labels=("a",)), input=InputSpec((32, 32)),
                   decoder={"name": "yolox", "strides": [8]}, files={"m.onnx": file_record(path / "m.onnx")})
    return card, path / "m.onnx"


@pytest.mark.parametrize("adapter", [OpenVINO, OnnxRuntime])
def test_a_fixed_batch_of_one_is_set_free_where_only_reshapes_hold_it(tmp_path: Path, adapter: type) -> None:
    card, path = reshaping(tmp_path)
    freed = dynamic_batch(read_graph(path)[1])
    images = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), np.uint8)
    with adapter(Graph(path, freed), threads=1) as many, adapter(path, threads=1) as one:
        assert many.batch_is_dynamic and not one.batch_is_dynamic
        singles = np.concatenate([one.run(image[None])["output"] for image in images])
        np.testing.assert_allclose(many.run(images)["output"], singles, rtol=1e-5, atol=1e-6)
    with Detector(card, tmp_path, lambda source: adapter(source, threads=1), batch=4) as detector:
        assert detector.batch_is_dynamic


def test_a_graph_that_fixes_its_batch_elsewhere_still_runs_one_image_at_a_time(tmp_path: Path) -> None:
    card, _ = reshaping(tmp_path, fixed_elsewhere=True)
    images = list(np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), np.uint8))
    with Detector(card, tmp_path, lambda source: OnnxRuntime(source, threads=1), batch=4, confidence=0.0) as detector:
        assert not detector.batch_is_dynamic
        assert [len(one) for one in detector.detect(images)] == [len(detector.detect([one])[0]) for one in images]


def test_a_free_batch_axis_and_one_of_many_images_are_left_alone(tmp_path: Path) -> None:
    for batch in ("n", 4):
        model = passing(tmp_path / "m.onnx", InputSpec(SIDES), batch=batch)
        assert dynamic_batch(model) is model


@pytest.mark.parametrize("adapter", [OpenVINO, OnnxRuntime])
@pytest.mark.parametrize("kind", ["yolox", "nanodet"])
def test_real_detectors_give_the_same_numbers_as_with_their_own_preparation(
    shared: Path, kind: str, adapter: type
) -> None:
    if kind == "yolox":
        file = shared / "data/models/yolox_nano/yolox_nano_416.onnx"
        card = card_for_yolox(file, "m")
    else:
        file = shared / "data/models/nanodet_plus_m/nanodet_plus_m_416.onnx"
        card = card_for_nanodet(file, "m", size=(416, 416))
    import cv2
    file_of_picture = sorted((shared / "data/images/coco_val100").iterdir())[3]
    picture = cv2.cvtColor(cv2.imread(str(file_of_picture)), cv2.COLOR_BGR2RGB)
    with Detector(card, file.parent, lambda source: adapter(source, threads=1)) as detector:
        prepared = detector.prepare(picture)
        inside = detector.outputs(prepared.tensor[None])
        (found,) = detector.detect([picture])
    with adapter(file, threads=1) as backend:
        outputs = backend.run(outside(prepared.tensor[None], card.input))
    for name, expected in outputs.items():
        # One rounding of the input in 24 bits, through 110 convolutions.
        np.testing.assert_allclose(inside[name], expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    assert len(found)

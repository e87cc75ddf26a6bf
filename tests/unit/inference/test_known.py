"""Cards of YOLOX and NanoDet, and whether their decoders see what is on real photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from doubles import graphs
from onnx import helper

from workbench.adapters.onnxruntime import OnnxRuntime
from workbench.adapters.openvino import OpenVINO
from workbench.boxes import Detections, iou
from workbench.errors import Invalid, NotFound
from workbench.inference.detector import Detector, check_card
from workbench.inference.known import COCO_80, COCO_IDS, KNOWN, card_for, card_for_nanodet, card_for_yolox
from workbench.inference.pipeline import decode_image
from workbench.model import ModelCard

# What is plainly to be seen on these photographs (looked at, one by one).
MAIN_OBJECTS = {"000000000285.jpg": "bear", "000000000724.jpg": "stop sign", "000000000785.jpg": "person",
                "000000000802.jpg": "refrigerator", "000000000872.jpg": "person", "000000000632.jpg": "bed",
                "000000000776.jpg": "teddy bear", "000000000139.jpg": "tv"}


@pytest.fixture(scope="module")
def cards(shared: Path) -> dict[str, tuple[ModelCard, Path]]:
    models = shared / "data" / "models"
    yolox, nanodet = models / "yolox_nano", models / "nanodet_plus_m"
    return {
        "yolox": (card_for_yolox(yolox / "yolox_nano_416.onnx", "yolox_nano"), yolox),
        "nanodet": (card_for_nanodet(nanodet / "nanodet_plus_m_416.onnx", "nanodet_plus_m", size=(416, 416)), nanodet),
    }


@pytest.fixture(scope="module")
def photographs(shared: Path) -> dict[str, np.ndarray]:
    folder = shared / "data" / "images" / "coco_val100"
    return {name: decode_image((folder / name).read_bytes(), name) for name in MAIN_OBJECTS}


@pytest.fixture(scope="module", params=[OpenVINO, OnnxRuntime], ids=["openvino", "onnxruntime"])
def seen(request: pytest.FixtureRequest, cards: dict[str, tuple[ModelCard, Path]],
         photographs: dict[str, np.ndarray]) -> dict[str, dict[str, Detections]]:
    found = {}
    for family, (card, folder) in cards.items():
        with Detector(card, folder, lambda path: request.param(path, threads=2)) as detector:
            found[family] = {name: detector.detect([image])[0] for name, image in photographs.items()}
    return found


def test_there_are_eighty_labels_in_coco_s_order() -> None:
    assert len(set(COCO_80)) == 80
    assert [COCO_80.index(label) for label in ("person", "stop sign", "bear", "refrigerator", "toothbrush")] == [
        0,
        11,
        21,
        72,
        79,
    ]


def test_the_shared_models_fit_their_cards(cards: dict[str, tuple[ModelCard, Path]]) -> None:
    for card, folder in cards.values():
        assert check_card(card, folder, lambda path: OpenVINO(path, threads=2))["detections"] > 0


@pytest.mark.parametrize("family", ["yolox", "nanodet"])
def test_the_main_object_of_each_photograph_is_found(seen: dict[str, dict[str, Detections]], family: str) -> None:
    for name, label in MAIN_OBJECTS.items():
        best = seen[family][name][:3]
        assert label in [COCO_80[class_id] for class_id in best.class_id], (
            f"{family} does not see the {label} on {name}"
        )


def test_two_families_of_detectors_draw_the_same_boxes(seen: dict[str, dict[str, Detections]]) -> None:
    overlaps, shifts = [], []
    for name, label in MAIN_OBJECTS.items():
        one, other = (found[name][found[name].class_id == COCO_80.index(label)] for found in seen.values())
        overlap = iou(one.xyxy, other.xyxy)
        row, column = np.unravel_index(overlap.argmax(), overlap.shape)
        overlaps.append(overlap[row, column])
        shifts.append(other.xyxy[column] - one.xyxy[row])
    assert min(overlaps) > 0.75 and np.mean(overlaps) > 0.87
    # A grid read half a cell off would shift all boxes the same way, by 4 to 50 px (measured 8 px for NanoDet).
    assert (np.abs(np.median(shifts, axis=0)) < 4).all()


def test_the_backends_agree_on_a_photograph(
    cards: dict[str, tuple[ModelCard, Path]], photographs: dict[str, np.ndarray]
) -> None:
    for card, folder in cards.values():
        found = []
        for adapter in (OpenVINO, OnnxRuntime):
            with Detector(card, folder, lambda path, adapter=adapter: adapter(path, threads=2)) as detector:
                found.append(detector.detect([photographs["000000000872.jpg"]])[0])
        assert found[0].class_id.tolist() == found[1].class_id.tolist()
        # Two libraries add up in another order; a tenth of a pixel is far below what anybody sees.
        np.testing.assert_allclose(found[0].xyxy, found[1].xyxy, atol=0.1)
        np.testing.assert_allclose(found[0].confidence, found[1].confidence, atol=1e-3)


def test_a_graph_of_any_size_needs_to_be_told_its_size(shared: Path, tmp_path: Path) -> None:
    path = shared / "data" / "models" / "nanodet_plus_m" / "nanodet_plus_m_416.onnx"
    with pytest.raises(Invalid, match="which .width, height."):
        card_for_nanodet(path, "nanodet")
    with pytest.raises(Invalid, match="takes 416x416 images, not 320x320"):
        card_for_yolox(shared / "data" / "models" / "yolox_nano" / "yolox_nano_416.onnx", "y", size=(320, 320))


def test_what_is_no_detector_gets_no_card(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="absent.onnx"):
        card_for_yolox(tmp_path / "absent.onnx", "y")
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(Invalid, match="text.onnx is not an ONNX graph"):
        card_for_yolox(tmp_path / "text.onnx", "y")
    graphs.save(tmp_path / "flat.onnx", [helper.make_node("Relu", ["x"], ["y"])], {"x": ([1, 4], "float32")}, ["y"], {})
    with pytest.raises(Invalid, match="four axes"):
        card_for_yolox(tmp_path / "flat.onnx", "y")


def with_outputs(path: Path, size: int, outputs: dict[str, list[int | str]]) -> Path:
    """A graph of one image input that gives zeros in these shapes."""
    constants, nodes = {"zero": np.float32(0)}, []
    nodes.append(helper.make_node("ReduceMean", ["images"], ["mean"], axes=[0, 1, 2, 3], keepdims=0))
    nodes.append(helper.make_node("Mul", ["mean", "zero"], ["nothing"]))
    for name, shape in outputs.items():
        constants[f"{name}_like"] = np.zeros(shape, np.float32)
        nodes.append(helper.make_node("Add", [f"{name}_like", "nothing"], [name]))
    graphs.save(path, nodes, {"images": ([1, 3, size, size], "float32")}, list(outputs), constants)
    model = onnx.load(str(path))
    for value, shape in zip(model.graph.output, outputs.values()):
        value.type.tensor_type.shape.CopyFrom(helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, shape).tensor_type.shape)
    onnx.save(model, str(path))
    return path


EXPORTS = {
    "yolov5": (64, {"output0": [1, 3 * 84, 85]}), "yolov8": (64, {"output0": [1, 84, 84]}),
    "yolov8_seg": (64, {"output0": [1, 116, 84], "output1": [1, 32, 16, 16]}),
    "fcos": (32, {"cls_logits": [1, 23, 91], "bbox_regression": [1, 23, 4], "bbox_ctrness": [1, 23, 1]}),
    "retinanet": (32, {"cls_logits": [1, 207, 91], "bbox_regression": [1, 207, 4]}),
    "ssd": (300, {"scores": [1, 8732, 91], "boxes": [1, 8732, 4]}),
    "detr": (64, {"logits": [1, 100, 92], "pred_boxes": [1, 100, 4]}),
    "rt_detr": (64, {"logits": [1, 300, 80], "boxes": [1, 300, 4]}),
    "classification": (64, {"output": [1, 3]}), "semantic": (64, {"out": [1, 4, 16, 16]})}


@pytest.mark.parametrize("family", EXPORTS)
def test_an_export_of_each_family_fits_its_card_from_the_file_alone(family: str, tmp_path: Path) -> None:
    size, outputs = EXPORTS[family]
    labels = () if KNOWN[family].labels else ("cat", "dog", "bird")
    onnx_file = with_outputs(tmp_path / "model.onnx", size, outputs)
    card = card_for(family, onnx_file, "mine", labels=labels)
    assert check_card(card, tmp_path, lambda path: OnnxRuntime(path, threads=1))["backend"] == "onnxruntime"
    assert card.input.size == (size, size) and ModelCard.from_json(card.to_json()) == card
    if family in ("fcos", "retinanet", "ssd", "detr"):
        assert card.decoder["columns"] == list(COCO_IDS) and len(card.labels) == 80
    if family == "ssd":
        assert card.decoder["outputs"] == {"cls": "scores", "box": "boxes"}


def test_coco_s_80_labels_have_the_ids_that_coco_gives_them() -> None:
    # instances_val2017.json: person 1, stop sign 13, bear 23, refrigerator 82, toothbrush 90.
    ids = dict(zip(COCO_80, COCO_IDS, strict=True))
    assert [ids[label] for label in ("person", "stop sign", "bear", "refrigerator", "toothbrush")] == [1, 13, 23, 82, 90]


def test_a_family_that_does_not_exist_and_labels_nobody_can_know_are_told(tmp_path: Path) -> None:
    onnx_file = with_outputs(tmp_path / "model.onnx", 64, {"output": [1, 3]})
    with pytest.raises(Invalid, match="no family 'yolo99'; there are yolox"):
        card_for("yolo99", onnx_file, "mine")
    with pytest.raises(Invalid, match="say the labels of model.onnx"):
        card_for("classification", onnx_file, "mine")


def test_every_family_says_how_to_export_it() -> None:
    assert all(one.how.endswith(".") and one.title for one in KNOWN.values())

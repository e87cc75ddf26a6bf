"""From images to boxes in their pixels, on a graph that really looks for red and blue squares."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doubles import graphs
from onnx import helper

from workbench.adapters.onnxruntime import OnnxRuntime
from workbench.errors import Invalid, NotFound
from workbench.inference.detector import Detector, check_card
from workbench.inference.graph import file_record
from workbench.model import InputSpec, ModelCard
from workbench.taxonomy import Taxonomy

RED, BLUE = (255, 0, 0), (0, 0, 255)


def open_graph(path: Path) -> OnnxRuntime:
    return OnnxRuntime(path, threads=1)


def picture(width: int, height: int, *squares: tuple[tuple[int, int, int, int], tuple[int, int, int]]) -> np.ndarray:
    image = np.full((height, width, 3), 30, np.uint8)
    for (x1, y1, x2, y2), colour in squares:
        image[y1:y2, x1:x2] = colour
    return image


def test_objects_are_found_in_the_pixels_of_the_image(tmp_path: Path) -> None:
    card = graphs.red_finder(tmp_path)
    # 128 x 64 is letterboxed by 0.5; the cell of stride 8 with the red square is 16 x 16 image pixels.
    image = picture(128, 64, ((32, 16, 48, 32), RED), ((96, 32, 112, 48), BLUE))
    with Detector(card, tmp_path, open_graph) as detector:
        (found,) = detector.detect([image])
    found = found[np.argsort(found.class_id)]
    assert found.class_id.tolist() == [0, 1] and (found.confidence > 0.99).all()
    # One stride to each side of the cell's middle: 16 pixels around (40, 24) and (104, 40).
    np.testing.assert_allclose(found.xyxy, [[24, 8, 56, 40], [88, 24, 120, 56]], atol=1e-4)


@pytest.mark.parametrize("batch", ["n", 1])
def test_a_fixed_batch_and_a_free_one_find_the_same(tmp_path: Path, batch: int | str) -> None:
    card = graphs.red_finder(tmp_path, batch=batch)
    images = [picture(128, 64, ((32, 16, 48, 32), RED)), picture(50, 90), picture(64, 64, ((8, 8, 16, 16), BLUE))]
    with Detector(card, tmp_path, open_graph) as detector:
        together = detector.detect(images)
        alone = [detector.detect([image])[0] for image in images]
        assert detector.detect([]) == []
    assert [len(found) for found in together] == [1, 0, 1]
    for one, other in zip(together, alone):
        np.testing.assert_allclose(one.xyxy, other.xyxy, atol=1e-4)
        assert one.class_id.tolist() == other.class_id.tolist()


def test_thresholds_of_the_caller_win_over_the_card_s(tmp_path: Path) -> None:
    card = graphs.red_finder(tmp_path)
    image = picture(64, 64, ((8, 8, 16, 16), (100, 20, 20)), ((40, 40, 48, 48), (20, 20, 100)))  # logit 80/8 - 4 = 6

    def found_with(card: ModelCard, **thresholds: Any) -> list[int]:
        with Detector(card, tmp_path, open_graph, **thresholds) as detector:
            return sorted(detector.detect([image])[0].class_id.tolist())

    assert found_with(card) == [0, 1]
    assert found_with(card, confidence=0.9999) == []
    strict = replace(card, decoder={**card.decoder, "confidence_by_label": {"blue": 0.9999}})
    assert found_with(strict) == [0]
    assert found_with(strict, confidence_by_label={"red": 0.9999}) == [1]
    assert found_with(strict, confidence_by_label={}) == [0, 1]
    with pytest.raises(Invalid, match="0..1"):
        Detector(card, tmp_path, open_graph, confidence=1.5)
    with pytest.raises(Invalid, match="green"):
        Detector(card, tmp_path, open_graph, confidence_by_label={"green": 0.5})


def test_neighbouring_cells_of_one_object_become_one_box(tmp_path: Path) -> None:
    card = graphs.red_finder(tmp_path)
    image = picture(64, 64, ((8, 8, 24, 16), RED))  # two cells whose boxes overlap by a third
    with Detector(replace(card, decoder={**card.decoder, "iou": 0.2}), tmp_path, open_graph) as detector:
        assert len(detector.detect([image])[0]) == 1
    with Detector(card, tmp_path, open_graph, iou=0.5) as detector:
        assert len(detector.detect([image])[0]) == 2


def test_what_is_prepared_is_a_canvas_of_pixels_whatever_the_card_describes(tmp_path: Path) -> None:
    spec = InputSpec((32, 32), layout="NCHW", dtype="float32", colour="BGR", scale=0.5, mean=(1, 2, 3), std=(2, 4, 8))
    card = replace(graphs.red_finder(tmp_path), input=spec)
    tensor = Detector(card, tmp_path, open_graph).prepare(picture(32, 32, ((0, 0, 32, 32), (10, 20, 40)))).tensor
    assert tensor.shape == (32, 32, 3) and tensor.dtype == np.uint8 and tensor[5, 5].tolist() == [10, 20, 40]
    with pytest.raises(Invalid, match="uint8"):
        Detector(replace(card, input=replace(spec, dtype="uint8")), tmp_path, open_graph)


def test_a_backend_that_is_given_a_graph_in_memory_names_its_file(tmp_path: Path) -> None:
    spec = InputSpec((64, 64), layout="NHWC", dtype="float32")
    graphs.save(tmp_path / "odd.onnx", [helper.make_node("Conjure", ["images"], ["y"])],
                {"images": ([1, 64, 64, 3], "float32")}, ["y"], {})
    card = replace(graphs.red_finder(tmp_path), input=spec, files={"odd.onnx": file_record(tmp_path / "odd.onnx")})
    with pytest.raises(Invalid, match=str(tmp_path / "odd.onnx")), Detector(card, tmp_path, open_graph):
        pass


def test_a_checkpoint_renamed_to_onnx_is_refused_and_named(tmp_path: Path) -> None:
    import pickle
    (tmp_path / "model.onnx").write_bytes(pickle.dumps({"state_dict": [1.0] * 100}))
    card = replace(graphs.red_finder(tmp_path / "finder"), files={"model.onnx": file_record(tmp_path / "model.onnx")})
    with pytest.raises(Invalid, match="model.onnx is not an ONNX graph"), Detector(card, tmp_path, open_graph):
        pass


def test_a_swapped_file_is_never_opened(tmp_path: Path) -> None:
    card = graphs.red_finder(tmp_path)
    graphs.red_finder(tmp_path, labels=("red",))
    with pytest.raises(Invalid, match="sha256"), Detector(card, tmp_path, open_graph):
        pass
    (tmp_path / card.onnx).unlink()
    with pytest.raises(NotFound, match="model.onnx"), Detector(card, tmp_path, open_graph):
        pass


class TestCheckCard:
    def test_a_fitting_card_says_what_runs_it(self, tmp_path: Path) -> None:
        report = check_card(graphs.red_finder(tmp_path), tmp_path, open_graph)
        assert report["backend"] == "onnxruntime" and report["precision"] == "f32" and report["detections"] > 0

    @pytest.mark.parametrize(("change", "expected"), [
        ({"input": InputSpec((96, 64))}, r"the graph takes \(n, 64, 64, 3\), its card says NHWC \(1, 64, 96, 3\)"),
        ({"input": InputSpec((64, 64), layout="NCHW")}, "NCHW"),
        ({"input": InputSpec((64, 64), dtype="float32")}, "takes uint8"),
        ({"labels": Taxonomy(("red",))}, "and 1 labels it expects"),
        ({"decoder": {"name": "yolox"}}, "yolox decoder"),
        ({"decoder": {"name": "fcos", "strides": [8, 16]}}, "strides 8, 16"),
    ], ids=["size", "layout", "dtype", "labels", "decoder", "strides"])
    def test_a_card_that_does_not_fit_is_told_before_it_is_registered(
            self, tmp_path: Path, change: dict[str, Any], expected: str) -> None:
        with pytest.raises(Invalid, match=expected):
            check_card(replace(graphs.red_finder(tmp_path), **change), tmp_path, open_graph)

    def test_a_graph_that_gives_nan_is_told_before_it_is_registered(self, tmp_path: Path) -> None:
        nodes = [
            helper.make_node("ReduceMean", ["images"], ["mean"], keepdims=1),
            helper.make_node("Sub", ["mean", "mean"], ["nought"]),
            helper.make_node("Div", ["nought", "nought"], ["nan"]),
            helper.make_node("Reshape", ["nan", "one"], ["flat"]),
            helper.make_node("Expand", ["flat", "shape"], ["output"]),
        ]
        graphs.save(tmp_path / "nan.onnx", nodes, {"images": ([1, 3, 32, 32], "float32")}, ["output"],
                    {"one": np.array([1, 1, 1], np.int64), "shape": np.array([1, 21, 6], np.int64)})
        card = ModelCard(
            "m",
            "1",
            InputSpec((32, 32), layout="NCHW", dtype="float32"),
            {"name": "yolox"},
            Taxonomy(("a",)),
            {"nan.onnx": file_record(tmp_path / "nan.onnx")},
        )
        with pytest.raises(Invalid, match="nan.onnx.*NaN"):
            check_card(card, tmp_path, open_graph)

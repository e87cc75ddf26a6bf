"""Raw outputs into boxes: every number worked out by hand for one point of each family of heads."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from workbench.errors import Invalid
from workbench.inference.candidates import points
from workbench.inference.decode import decode
from workbench.inference.letterbox import Letterbox
from workbench.inference.nms import nms
from workbench.model import InputSpec, ModelCard
from workbench.taxonomy import Taxonomy

LEAST = np.full(2, 0.3, np.float32)
PROJECT = Path(__file__).resolve().parents[3]


def card(name: str, size: tuple[int, int] = (64, 96), **decoder: Any) -> ModelCard:
    return ModelCard(
        "m", "1", InputSpec(size), {"name": name, **decoder}, Taxonomy(("cat", "dog")), {"m.onnx": {"sha256": "0"}}
    )


def test_points_run_level_by_level_and_row_by_row() -> None:
    positions, strides = points(card("fcos", size=(64, 32), strides=[16, 32]), centre=0.5)
    assert positions.tolist() == [
        [8, 8],
        [24, 8],
        [40, 8],
        [56, 8],
        [8, 24],
        [24, 24],
        [40, 24],
        [56, 24],
        [16, 16],
        [48, 16],
    ]
    assert strides.tolist() == [16] * 8 + [32] * 2


def test_a_level_covers_a_side_that_its_stride_does_not_divide() -> None:
    # NanoDet at 416: 52, 26, 13 and ceil(416 / 64) = 7 cells a side.
    assert len(points(card("nanodet", size=(416, 416)), centre=0)[0]) == 52**2 + 26**2 + 13**2 + 7**2 == 3598


def test_yolox_boxes_grow_from_their_cell() -> None:
    one = card("yolox")  # 8*12 + 4*6 + 2*3 = 126 points
    output = np.zeros((1, 126, 7), np.float32)
    # Level of stride 16 begins at 96; row 2, column 3 is point 96 + 2*4 + 3. Offset (0.5, 0.25), size (2, 3) strides.
    output[0, 96 + 11] = [0.5, 0.25, math.log(2), math.log(3), 0.8, 0.1, 0.9]
    (found,) = decode(one, {"output": output}, LEAST)
    # Centre ((3 + 0.5) * 16, (2 + 0.25) * 16) = (56, 36), sides 32 and 48; score 0.8 * 0.9.
    np.testing.assert_allclose(found.xyxy, [[40, 12, 72, 60]], rtol=1e-6)
    assert found.class_id.tolist() == [1] and found.confidence[0] == pytest.approx(0.72, abs=1e-6)


def test_nanodet_distances_are_means_of_their_distributions() -> None:
    one = card("nanodet", strides=[32])  # 2 * 3 = 6 points
    output = np.zeros((1, 6, 2 + 32), np.float32)
    output[0, 3, 0] = 0.75  # row 1, column 1: the point (32, 32)
    bins = output[0, 3, 2:].reshape(4, 8)
    bins[0, 1] = bins[1, 0] = bins[3, 2] = 50.0  # all weight on one bin: 1, 0 and 2 strides
    # The right side keeps eight equal bins: their mean is 3.5 strides.
    (found,) = decode(one, {"output": output}, LEAST)
    np.testing.assert_allclose(found.xyxy, [[0, 32, 32 + 112, 96]], rtol=1e-6)
    assert found.class_id.tolist() == [0] and found.confidence[0] == pytest.approx(0.75)


def test_fcos_scores_are_the_root_of_class_and_centredness() -> None:
    one = card("fcos", strides=[32])
    outputs = fcos(6, 2)
    outputs["cls_logits"][0, 4, 1] = 1.0
    outputs["bbox_ctrness"][0, 4, 0] = 2.0
    outputs["bbox_regression"][0, 4] = [0.5, 1, 0.25, 0.5]
    (found,) = decode(one, outputs, LEAST)
    # Point 4 is row 2, column 0: its middle is (16, 80).
    np.testing.assert_allclose(found.xyxy, [[0, 48, 24, 96]])
    score = math.sqrt(1 / (1 + math.exp(-1)) / (1 + math.exp(-2)))
    assert found.class_id.tolist() == [1] and found.confidence[0] == pytest.approx(score, abs=1e-6)
    (found,) = decode(card("fcos", strides=[32], score="sigmoid(cls) * sigmoid(ctr)"), outputs, LEAST)
    assert found.confidence[0] == pytest.approx(score**2, abs=1e-6)


def test_each_label_has_its_own_threshold() -> None:
    outputs = fcos(6, 2)
    outputs["cls_logits"][0, :2] = [[3.0, -9.0], [-9.0, 3.0]]
    outputs["bbox_ctrness"][:] = 3.0
    (found,) = decode(card("fcos", strides=[32]), outputs, np.array([0.99, 0.3], np.float32))
    assert found.class_id.tolist() == [1]


def test_at_most_the_best_candidates_are_decoded() -> None:
    outputs = fcos(6, 2)
    outputs["cls_logits"][0, :, 0] = [1, 2, 3, 4, 5, 6]
    outputs["bbox_ctrness"][:] = 9
    (found,) = decode(card("fcos", strides=[32], max_candidates=2), outputs, LEAST)
    assert len(found) == 2 and found.confidence[0] > found.confidence[1] > 0.99


@pytest.mark.parametrize(
    ("one", "outputs", "expected"),
    [
        (
            card("yolox"),
            {"output": np.zeros((1, 126, 6))},
            r"one output \(n, 126, 7\), the graph gives output \(1, 126, 6\)",
        ),
        (card("yolox"), {"output": np.zeros((1, 125, 7))}, r"\(n, 126, 7\)"),
        (card("nanodet"), {"output": np.zeros((1, 126, 7))}, r"\(n, 128, 34\)"),
        (card("nanodet"), {"a": np.zeros((1, 128, 34)), "b": np.zeros((1, 1, 1))}, r"one output"),
        (
            card("fcos", strides=[32]),
            {"output": np.zeros((1, 126, 7))},
            r"cls_logits \(n, 6, 2\) and bbox_regression \(n, 6, 4\)",
        ),
    ],
    ids=["labels", "points", "family", "two outputs", "names"],
)
def test_a_graph_that_does_not_fit_its_card_is_invalid_and_both_sides_are_named(
        one: ModelCard, outputs: dict[str, np.ndarray], expected: str) -> None:
    with pytest.raises(Invalid, match=f"m.onnx of m@1 does not fit.*{expected}"):
        decode(one, outputs, LEAST)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_broken_output_is_invalid(value: float) -> None:
    outputs = fcos(6, 2)
    outputs["bbox_ctrness"][0, 5] = value
    with pytest.raises(Invalid, match="m.onnx.*bbox_ctrness.*NaN"):
        decode(card("fcos", strides=[32]), outputs, LEAST)


def test_scores_without_their_sigmoid_are_noticed() -> None:
    with pytest.raises(Invalid, match="sigmoid inside"):
        decode(card("yolox"), {"output": np.full((1, 126, 7), -3.0, np.float32)}, LEAST)


def test_huge_sides_stay_finite() -> None:
    output = np.zeros((1, 126, 7), np.float32)
    output[0, 0] = [0, 0, 1000, 1000, 1, 1, 0]
    (found,) = decode(card("yolox"), {"output": output}, LEAST)
    assert np.isfinite(found.xyxy).all()


@pytest.mark.parametrize("decoder", [{"strides": []}, {"strides": [0]}, {"strides": ["8"]}, {"score": "max(cls)"}])
def test_decoder_settings_that_mean_nothing_are_invalid(decoder: dict[str, Any]) -> None:
    with pytest.raises(Invalid, match="Model m@1: decoder"):
        decode(card("fcos", **decoder), fcos(6, 2), LEAST)


def test_our_decoder_agrees_with_the_student_s_own(tmp_path: Path) -> None:
    """models/efficientnet_lite0_fcos decodes for itself while it trains; what we draw must be what it measured."""
    models = PROJECT / "models"
    rng = np.random.default_rng(7)
    outputs = {"cls_logits": rng.normal(-2, 2, (1, 126, 2)), "bbox_regression": rng.uniform(0.2, 3, (1, 126, 4)),
               "bbox_ctrness": rng.normal(1, 1, (1, 126, 1))}
    outputs = {name: value.astype(np.float32) for name, value in outputs.items()}
    np.savez(tmp_path / "raw.npz", **outputs)
    script = ("import sys, numpy as np, torch; from efficientnet_lite0_fcos.evaluate import decode; raw = np.load(sys.argv[1]); "
              "heads = tuple(torch.from_numpy(raw[n][0]) for n in ('cls_logits', 'bbox_regression', 'bbox_ctrness')); "
              "boxes, scores, ids = decode(heads, (64, 96), 0.5, (128, 190), confidence=0.3, nms_iou=0.6); "
              "np.savez(sys.argv[2], boxes=boxes, scores=scores, ids=ids)")
    subprocess.run(
        [sys.executable, "-c", script, tmp_path / "raw.npz", tmp_path / "theirs.npz"], cwd=models, check=True
    )
    theirs = np.load(tmp_path / "theirs.npz")
    one = card("fcos", strides=[8, 16, 32], score="sqrt(sigmoid(cls)*sigmoid(ctr))")
    (found,) = decode(one, outputs, LEAST)
    boxes = Letterbox((0.5, 0.5), (0, 0), (128, 190)).to_image(found.xyxy)
    kept = nms(boxes, found.confidence, found.class_id, 0.6, 100)
    assert len(kept) == len(theirs["boxes"]) > 10
    np.testing.assert_allclose(found.confidence[kept], theirs["scores"], atol=1e-6)
    np.testing.assert_allclose(boxes[kept], theirs["boxes"], atol=1e-3)
    assert found.class_id[kept].tolist() == theirs["ids"].tolist()


def fcos(count: int, classes: int) -> dict[str, np.ndarray]:
    return {
        "cls_logits": np.full((1, count, classes), -9.0, np.float32),
        "bbox_regression": np.ones((1, count, 4), np.float32),
        "bbox_ctrness": np.full((1, count, 1), -9.0, np.float32),
    }


def test_a_card_with_one_label_works_like_any_other() -> None:
    one = replace(card("fcos", strides=[32]), labels=Taxonomy(("cat",)))
    outputs = fcos(6, 1)
    outputs["cls_logits"][0, 0] = outputs["bbox_ctrness"][0, 0] = 4
    (found,) = decode(one, outputs, LEAST[:1])
    assert found.class_id.tolist() == [0]

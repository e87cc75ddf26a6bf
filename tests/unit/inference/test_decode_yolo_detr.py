"""YOLOv5, v8, NanoDet's several exports, DETR and classifiers: references written from their published formulas, and a
few numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from workbench.errors import Invalid
from workbench.inference.candidates import Candidates, likely, sigmoid
from workbench.inference.decode import decode
from workbench.model import InputSpec, ModelCard
from workbench.taxonomy import Taxonomy

LABELS = ("cat", "dog", "bird")
LEAST = np.full(3, 0.3, np.float32)


def card(name: str, size: tuple[int, int] = (64, 96), labels: tuple[str, ...] = LABELS, **decoder: Any) -> ModelCard:
    return ModelCard(
        "m", "1", InputSpec(size), {"name": name, **decoder}, Taxonomy(labels), {"m.onnx": {"sha256": "0"}}
    )


def by_hand(rows: list[tuple[list[float], float, int]]) -> list[tuple[list[float], float, int]]:
    """(cxcywh, score, class) -> (xyxy, score, class), best first."""
    boxes = [([x - w / 2, y - h / 2, x + w / 2, y + h / 2], score, label) for (x, y, w, h), score, label in rows]
    return sorted(boxes, key=lambda one: -one[1])


def assert_same(found: Candidates, expected: list[tuple[list[float], float, int]]) -> None:
    assert len(found) == len(expected) > 3
    np.testing.assert_allclose(found.confidence, [score for _, score, _ in expected], atol=1e-6)
    np.testing.assert_allclose(found.xyxy, [box for box, _, _ in expected], rtol=1e-5, atol=1e-4)
    assert found.class_id.tolist() == [label for _, _, label in expected]


def heads(count: int, width: int, seed: int) -> np.ndarray:
    """(2, count, width): boxes in pixels, then shares, mostly small ones."""
    rng = np.random.default_rng(seed)
    boxes = rng.uniform(4, 60, (2, count, 4))
    return np.concatenate([boxes, rng.uniform(0, 1, (2, count, width - 4)) ** 3], axis=2).astype(np.float32)


def test_yolov5_rows_are_scored_by_objectness_times_class() -> None:
    # 3 anchors at each of 8*12 + 4*6 + 2*3 = 126 cells.
    output = heads(3 * 126, 5 + 3, seed=1)
    for found, raw in zip(decode(card("yolov5"), {"output0": output}, LEAST), output, strict=True):
        assert_same(
            found,
            by_hand(
                [
                    (list(row[:4]), row[4] * row[5 + label], label)
                    for row in raw.astype(float)
                    for label in range(3)
                    if row[4] * row[5 + label] > 0.3
                ]
            ),
        )


@pytest.mark.parametrize("is_transposed", [False, True])
def test_yolov8_rows_have_no_objectness_and_may_lie_or_stand(is_transposed: bool) -> None:
    rows = heads(126, 4 + 3, seed=2)
    output = rows if is_transposed else rows.transpose(0, 2, 1)
    for found, raw in zip(decode(card("yolov8"), {"output0": output}, LEAST), rows, strict=True):
        assert_same(
            found,
            by_hand(
                [
                    (list(row[:4]), row[4 + label], label)
                    for row in raw.astype(float)
                    for label in range(3)
                    if row[4 + label] > 0.3
                ]
            ),
        )


def test_where_both_orders_of_yolov8_fit_the_published_one_is_taken() -> None:
    # 32x32 with one stride of 12: 3 * 3 = 9 cells, and 4 + 5 columns.
    one = card("yolov8", (32, 32), tuple("abcde"), strides=[12])
    output = np.zeros((1, 9, 9), np.float32)
    output[0, :4, 7] = [10, 12, 4, 6]  # the eighth point's box stands in its column
    output[0, 4 + 2, 7] = 0.9
    (found,) = decode(one, {"output0": output}, np.full(5, 0.3, np.float32))
    assert found.xyxy.tolist() == [[8, 9, 12, 15]] and found.class_id.tolist() == [2]


def test_nanodet_reads_scores_and_distributions_apart_and_level_by_level() -> None:
    rng = np.random.default_rng(3)
    one = card("nanodet", strides=[16, 32])  # 4*6 + 2*3 = 30 points
    scores = (rng.uniform(0, 1, (1, 30, 3)) ** 2).astype(np.float32)
    sides = rng.normal(0, 2, (1, 30, 32)).astype(np.float32)
    (together,) = decode(one, {"out": np.concatenate([scores, sides], axis=2)}, LEAST)
    apart = {
        "two": {"dis": sides, "cls": scores},
        "levels": {"cls16": scores[:, :24], "cls32": scores[:, 24:], "dis16": sides[:, :24], "dis32": sides[:, 24:]},
    }
    for outputs in apart.values():
        (found,) = decode(one, outputs, LEAST)
        np.testing.assert_array_equal(found.xyxy, together.xyxy)
        np.testing.assert_array_equal(found.confidence, together.confidence)
    with pytest.raises(Invalid, match=r"for each level \(n, cells, 3\) and \(n, cells, 32\), with 24, 6 cells"):
        decode(one, {**apart["levels"], "more": np.zeros((1, 3, 3), np.float32)}, LEAST)


def test_the_nanodet_before_plus_looks_from_the_middle_of_its_cells() -> None:
    output = np.zeros((1, 6, 3 + 32), np.float32)
    output[0, 0, 1] = 0.9
    output[0, 0, 3:].reshape(4, 8)[:, 1] = 50  # one stride to every side
    (found,) = decode(card("nanodet", strides=[32], centre=0.5), {"out": output}, LEAST)
    np.testing.assert_allclose(found.xyxy, [[-16, -16, 48, 48]], atol=1e-3)


def test_detr_queries_say_their_best_label_or_nothing() -> None:
    rng = np.random.default_rng(4)
    logits, boxes = (
        rng.normal(0, 2, (2, 40, 4)).astype(np.float32),
        rng.uniform(0.1, 0.9, (2, 40, 4)).astype(np.float32),
    )
    outputs = {"logits": logits, "pred_boxes": boxes}
    one = card("detr", outputs={"cls": "logits"})
    for found, raw, shares in zip(decode(one, outputs, LEAST), logits.astype(float), boxes.astype(float), strict=True):
        rows = []
        for row, box in zip(raw, shares):
            probabilities = [math.exp(value) / sum(map(math.exp, row)) for value in row]
            label = max(range(3), key=lambda at: probabilities[at])  # the fourth column is "no object"
            if probabilities[label] > 0.3:
                rows.append(([box[0] * 64, box[1] * 96, box[2] * 64, box[3] * 96], probabilities[label], label))
        assert_same(found, by_hand(rows))


def test_deformable_detr_scores_every_label_of_a_query() -> None:
    rng = np.random.default_rng(5)
    logits, boxes = (
        rng.normal(-1, 2, (1, 40, 3)).astype(np.float32),
        rng.uniform(0.1, 0.9, (1, 40, 4)).astype(np.float32),
    )
    (found,) = decode(card("detr", score="sigmoid"), {"pred_logits": logits, "pred_boxes": boxes}, LEAST)
    assert_same(
        found,
        by_hand(
            [
                ([box[0] * 64, box[1] * 96, box[2] * 64, box[3] * 96], 1 / (1 + math.exp(-row[label])), label)
                for row, box in zip(logits[0].astype(float), boxes[0].astype(float))
                for label in range(3)
                if 1 / (1 + math.exp(-row[label])) > 0.3
            ]
        ),
    )


def test_detr_columns_of_coco_are_found_by_the_card() -> None:
    logits = np.zeros((1, 5, 10), np.float32)
    logits[0, 2, 7] = 9
    one = card("detr", columns=[1, 4, 7])
    (found,) = decode(one, {"pred_logits": logits, "pred_boxes": np.full((1, 5, 4), 0.5, np.float32)}, LEAST)
    assert found.class_id.tolist() == [2] and found.xyxy.tolist() == [[16, 24, 48, 72]]


@pytest.mark.parametrize(
    ("score", "given", "tags"),
    [
        ("softmax", [1.0, 3.0, 2.0], [(1, math.exp(3) / (math.exp(1) + math.exp(2) + math.exp(3)))]),
        ("softmax", [1.0, 1.0, 1.0], [(0, 1 / 3)]),
        ("sigmoid", [-2.0, 3.0, 0.0], [(1, 1 / (1 + math.exp(-3))), (2, 0.5)]),
        ("probabilities", [0.1, 0.5, 0.4], [(1, 0.5), (2, 0.4)]),
    ],
)
def test_a_classifier_tags_the_whole_frame(score: str, given: list[float], tags: list[tuple[int, float]]) -> None:
    for shape in ((1, 3), (1, 3, 1, 1)):
        (found,) = decode(
            card("classification", score=score), {"out": np.array(given, np.float32).reshape(shape)}, LEAST
        )
        assert found.class_id.tolist() == [label for label, _ in tags]
        np.testing.assert_allclose(found.confidence, [share for _, share in tags], rtol=1e-6)
        assert found.xyxy.tolist() == [[0, 0, 64, 96]] * len(tags)


def test_a_classifier_may_give_its_best_few() -> None:
    (found,) = decode(
        card("classification", score="sigmoid", top_k=2), {"out": np.array([[1, 3, 2]], np.float32)}, LEAST
    )
    assert found.class_id.tolist() == [1, 2]


def test_rows_are_dropped_by_their_logits_only_when_their_score_would_be() -> None:
    logits = np.random.default_rng(6).normal(-2, 3, (500, 3)).astype(np.float32)
    for least in (np.array([0.0, 0.5, 1.0], np.float32), np.array([0.3, 0.9, 0.05], np.float32)):
        kept = set(likely(logits, least).tolist())
        assert set(np.nonzero((sigmoid(logits) > least).any(axis=1))[0].tolist()) <= kept
    assert len(likely(logits, np.full(3, 0.99, np.float32))) < 100


@pytest.mark.parametrize(
    ("one", "outputs", "said"),
    [
        (card("yolov5"), {"o": np.zeros((1, 126, 8))}, r"one output \(n, 378, 8\)"),
        (card("yolov5", anchors_per_cell=1), {"o": np.zeros((1, 378, 8))}, r"one output \(n, 126, 8\)"),
        (card("yolov8"), {"o": np.zeros((1, 8, 126))}, r"\(n, 7, 126\) or \(n, 126, 7\)"),
        (card("yolov8"), {"o": np.zeros((1, 7, 126)), "p": np.zeros(1)}, r"one output \(n, 7, 126\)"),
        (
            card("retinanet", strides=[32], sizes=[[32]]),
            {"cls_logits": np.zeros((1, 18, 3)), "bbox_regression": np.zeros((1, 6, 4))},
            r"cls_logits \(n, 18, 3\) and bbox_regression \(n, 18, 4\), a row an anchor",
        ),
        (card("ssd"), {"scores": np.zeros((1, 5, 4))}, "cls_logits"),
        (
            card("detr"),
            {"pred_logits": np.zeros((1, 5, 3)), "pred_boxes": np.zeros((1, 5, 4))},
            r"pred_logits \(n, q, 4\)",
        ),
        (
            card("detr"),
            {"pred_logits": np.zeros((1, 5, 4)), "pred_boxes": np.zeros((1, 6, 4))},
            r"pred_boxes \(n, q, 4\)",
        ),
        (
            card("detr", columns=[1, 4, 7]),
            {"pred_logits": np.zeros((1, 5, 7)), "pred_boxes": np.zeros((1, 5, 4))},
            "does not fit",
        ),
        (card("classification"), {"o": np.zeros((1, 4))}, r"one output \(n, 3\)"),
        (card("classification"), {"o": np.zeros(3)}, r"one output \(n, 3\)"),
        (card("classification"), {"o": np.zeros((1, 3, 2, 2))}, r"one output \(n, 3\)"),
        (card("yolox"), {}, "gives no output"),
    ],
)
def test_outputs_that_do_not_fit_are_invalid_and_both_sides_are_named(
    one: ModelCard, outputs: dict[str, np.ndarray], said: str
) -> None:
    with pytest.raises(Invalid, match=f"m.onnx of m@1.*{said}"):
        decode(one, {name: value.astype(np.float32) for name, value in outputs.items()}, LEAST)


@pytest.mark.parametrize(
    ("one", "shape"),
    [
        (card("yolov5"), (1, 378, 8)),
        (card("yolov8"), (1, 7, 126)),
        (card("classification", score="probabilities"), (1, 3)),
    ],
)
@pytest.mark.parametrize("value", [-0.5, 1.5])
def test_scores_outside_0_to_1_are_invalid(one: ModelCard, shape: tuple[int, ...], value: float) -> None:
    with pytest.raises(Invalid, match="expects 0..1"):
        decode(one, {"o": np.full(shape, value, np.float32)}, LEAST)


def test_detr_boxes_in_pixels_are_invalid() -> None:
    outputs = {"pred_logits": np.zeros((1, 5, 4), np.float32), "pred_boxes": np.full((1, 5, 4), 40, np.float32)}
    with pytest.raises(Invalid, match="shares of the image"):
        decode(card("detr"), outputs, LEAST)


@pytest.mark.parametrize(
    ("name", "decoder", "said"),
    [
        ("yolov9000", {}, "names decoder 'yolov9000'; known are yolox"),
        ("yolov8", {"strides": [8, -16]}, r"strides \[8, -16\] must be whole numbers of pixels above 0"),
        ("yolov8", {"strides": 8}, "strides 8 must"),
        ("yolov5", {"anchors_per_cell": 0}, "anchors_per_cell 0 must"),
        ("nanodet", {"reg_max": 7.5}, "reg_max 7.5 must"),
        ("fcos", {"centre": 2}, "centre 2 must lie in 0..1"),
        ("retinanet", {"sizes": [[32], [64]]}, r"sizes \[\[32\], \[64\]\] must be 5 lists of sides"),
        ("retinanet", {"aspect_ratios": [1, 0]}, "aspect_ratios .* height / width ratios above 0"),
        ("retinanet", {"weights": [1, 1]}, "weights .* four numbers"),
        ("retinanet", {"steps": [8]}, "steps .* 5 numbers of pixels"),
        ("ssd", {"scales": [0.1, 0.2]}, "scales .* must be 7 shares"),
        ("ssd", {"aspect_ratios": [[2]] * 5}, "aspect_ratios .* must be 6 lists"),
        ("detr", {"score": "argmax"}, "score 'argmax' must be one of softmax, sigmoid"),
        ("detr", {"columns": [1, 2]}, r"columns \[1, 2\] must be 3 different columns"),
        ("detr", {"columns": [1, 2, 2]}, "columns .* must be 3 different columns"),
        ("detr", {"outputs": ["a"]}, "outputs .* must give outputs of the graph by name"),
        ("classification", {"top_k": 0}, "top_k 0 must"),
        ("classification", {"confidence": float("nan")}, "confidence nan must lie in 0..1"),
        ("yolox", {"iou": "high"}, "iou 'high' must lie in 0..1"),
        ("yolox", {"confidence_by_label": {"cow": 0.5}}, "confidence_by_label .* labels of the model"),
        ("yolox", {"max_detections": 0}, "max_detections 0 must"),
        ("semantic", {"background": -1}, "background -1 must"),
        ("semantic", {"min_area": -4}, "min_area -4 must"),
    ],
)
def test_a_card_whose_decoder_makes_no_sense_is_refused_by_the_name_of_the_setting(
    name: str, decoder: dict[str, Any], said: str
) -> None:
    with pytest.raises(Invalid, match=f"Model m@1.*{said}"):
        card(name, **decoder)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("yolov5", "boxes"),
        ("detr", "boxes"),
        ("classification", "tags"),
        ("semantic", "polygons"),
        ("yolov8_seg", "polygons"),
    ],
)
def test_the_decoder_says_what_the_model_draws(name: str, task: str) -> None:
    assert card(name).task == task

"""Scores against pycocotools, and counts worked out by hand."""

from __future__ import annotations

import contextlib
import io
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.annotation import Annotation
from workbench.boxes import Detections
from workbench.errors import Invalid
from workbench.evaluation.metrics import COCO_NAMES, Metrics, score
from workbench.taxonomy import Taxonomy

AB = Taxonomy(("a", "b"))
Truth = dict[str, tuple[Annotation, ...]]


def box(label: str, *xyxy: float, crowd: bool = False) -> Annotation:
    return Annotation(label, xyxy, attributes={"iscrowd": 1} if crowd else {})


def found(*rows: tuple[int, float, tuple[float, float, float, float]]) -> Detections:
    """rows: (class_id, confidence, xyxy)."""
    return Detections(
        np.array([row[2] for row in rows]).reshape(-1, 4), [row[0] for row in rows], [row[1] for row in rows]
    )


def oracle(truth: Truth, detections: dict[str, Detections], taxonomy: Taxonomy) -> list[float]:
    """pycocotools' twelve numbers."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    names = sorted(truth)
    annotations = [
        {"id": 0, "image_id": number, "category_id": taxonomy.class_id(one.label), "iscrowd": int(bool(one.attributes)),
         "bbox": [one.xyxy[0], one.xyxy[1], one.xyxy[2] - one.xyxy[0], one.xyxy[3] - one.xyxy[1]],
         "area": (one.xyxy[2] - one.xyxy[0]) * (one.xyxy[3] - one.xyxy[1])}
        for number, name in enumerate(names) for one in truth[name]]
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    results = [
        [number, x1, y1, x2 - x1, y2 - y1, confidence, class_id]
        for number, name in enumerate(names)
        if name in detections
        for (x1, y1, x2, y2), confidence, class_id in zip(
            detections[name].xyxy.astype(float), detections[name].confidence.astype(float), detections[name].class_id
        )
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        ground = COCO()
        ground.dataset = {"images": [{"id": number} for number in range(len(names))], "annotations": annotations,
                          "categories": [{"id": class_id} for class_id in range(len(taxonomy))]}
        ground.createIndex()
        evaluation = COCOeval(ground, ground.loadRes(np.array(results, float).reshape(-1, 7)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


def assert_same(metrics: Metrics, stats: list[float]) -> None:
    ours = [-1.0 if metrics.coco[name] is None else metrics.coco[name] for name in COCO_NAMES]
    np.testing.assert_allclose(ours, stats, atol=1e-6)


def random_case(seed: int, frames: int = 25, classes: int = 3) -> tuple[Truth, dict[str, Detections], Taxonomy]:
    rng = np.random.default_rng(seed)
    taxonomy = Taxonomy(tuple("abcdef"[:classes]))
    truth, detections = {}, {}
    for number in range(frames):
        count = int(rng.integers(0, 9))
        corners = rng.uniform(0, 500, (count, 2))
        boxes = np.concatenate([corners, corners + np.exp(rng.uniform(1, 5.5, (count, 2)))], axis=1)
        class_ids = rng.integers(0, classes, count)
        truth[f"{number:03}"] = tuple(box(taxonomy.labels[class_id], *xyxy, crowd=rng.random() < 0.05)
                                      for xyxy, class_id in zip(boxes, class_ids))
        extra = int(rng.integers(0, 4))
        far = rng.uniform(0, 500, (extra, 2))
        moved = boxes + rng.normal(0, 0.08, boxes.shape) * np.tile(boxes[:, 2:] - boxes[:, :2], 2)
        guesses = np.concatenate([moved, moved[: count // 2] + 1.5, np.concatenate([far, far + 40], axis=1)])
        guesses[:, 2:] = np.maximum(guesses[:, 2:], guesses[:, :2] + 1)
        ids = np.concatenate([np.where(rng.random(count) < 0.1, rng.integers(0, classes, count), class_ids),
                              class_ids[: count // 2], rng.integers(0, classes, extra)])
        # Distinct confidences: equal ones may be taken in any order, and the order changes precision.
        detections[f"{number:03}"] = Detections(
            guesses, ids, (rng.permutation(len(guesses)) + rng.random(len(guesses))) / 20
        )
    return truth, detections, taxonomy


@pytest.mark.parametrize("seed", range(5))
def test_all_twelve_numbers_are_those_of_pycocotools_on_random_boxes(seed: int) -> None:
    truth, detections, taxonomy = random_case(seed)
    assert_same(score(truth, detections, taxonomy), oracle(truth, detections, taxonomy))


def test_all_twelve_numbers_are_those_of_pycocotools_on_real_boxes(shared: Path) -> None:
    """Truth: bccd's corrected labels; detections: the original, faulty ones of the same photographs."""
    taxonomy = Taxonomy(("RBC", "WBC", "Platelets"))
    rng = np.random.default_rng(0)
    truth, detections = {}, {}
    for faulty in sorted((shared / "data" / "cosmicad" / "Annotations").glob("*.xml"))[:60]:
        file = shared / "data" / "bccd" / "BCCD" / "Annotations" / faulty.name
        truth[file.stem], drawn = tuple(_voc(file)), list(_voc(faulty))
        detections[file.stem] = Detections(np.array([one.xyxy for one in drawn]).reshape(-1, 4),
                                           [taxonomy.class_id(one.label) for one in drawn], rng.random(len(drawn)))
    metrics = score(truth, detections, taxonomy)
    assert_same(metrics, oracle(truth, detections, taxonomy))
    assert metrics.truth > 500 and 0.1 < metrics.map_50 < 1


def _voc(file: Path) -> list[Annotation]:
    boxes = []
    for one in ElementTree.parse(file).getroot().iter("object"):
        sides = [float(one.find(f"bndbox/{side}").text) for side in ("xmin", "ymin", "xmax", "ymax")]
        if sides[2] > sides[0] and sides[3] > sides[1]:
            boxes.append(Annotation(one.find("name").text, tuple(sides)))
    return boxes


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 4))
def test_the_twelve_numbers_agree_whatever_the_boxes_are(seed: int, frames: int, classes: int) -> None:
    truth, detections, taxonomy = random_case(seed, frames, classes)
    if any(truth.values()):
        assert_same(score(truth, detections, taxonomy), oracle(truth, detections, taxonomy))


def test_perfect_boxes_score_one_and_none_score_nought() -> None:
    truth = {"1": (box("a", 0, 0, 50, 50), box("b", 60, 60, 90, 90)), "2": ()}
    perfect = {"1": found((0, 0.9, (0, 0, 50, 50)), (1, 0.8, (60, 60, 90, 90)))}
    metrics = score(truth, perfect, AB, confidence=0.5)
    assert metrics.map_50_95 == pytest.approx(1) and metrics.map_50 == pytest.approx(1)
    assert metrics.confusion == ((1, 0, 0), (0, 1, 0), (0, 0, 0)) and (
        metrics.frames,
        metrics.truth,
        metrics.detections,
    ) == (2, 2, 2)
    assert metrics.best_f1 == 1 and metrics.best_confidence == pytest.approx(0.8)
    blind = score(truth, {}, AB)
    assert blind.map_50_95 == blind.map_50 == 0 and blind.confusion == ((0, 0, 1), (0, 0, 1), (0, 0, 0))
    assert (blind.best_confidence, blind.best_f1) == (1, 0)


def test_average_precision_by_hand() -> None:
    # Two objects; by confidence: hit, miss, hit. Precision 1 up to recall 0.5, then 2/3: of the 101 points of the grid
    # 0, 0.01 .. 0.5 (51) have precision 1, the other 50 have 2/3.
    truth = {"1": (box("a", 0, 0, 40, 40), box("a", 100, 0, 140, 40))}
    guesses = {"1": found((0, 0.9, (0, 0, 40, 40)), (0, 0.8, (0, 100, 40, 140)), (0, 0.7, (100, 0, 140, 40)))}
    metrics = score(truth, guesses, AB, confidence=0.75)
    expected = (51 + 50 * 2 / 3) / 101
    assert metrics.map_50 == pytest.approx(expected, abs=1e-9)
    assert [metrics.per_class["a"][name] for name in ("ap", "ap50")] == pytest.approx([expected] * 2, abs=1e-9)
    curve = metrics.curves["a"]
    assert len(curve["precision"]) == len(curve["confidence"]) == 101
    assert curve["precision"][50] == 1 and curve["precision"][51] == pytest.approx(2 / 3)
    assert curve["confidence"][50] == pytest.approx(0.9) and curve["confidence"][100] == pytest.approx(0.7)
    # F1 = 2 hits / (2 objects + detections): 2/3 at 0.9, 2/4 at 0.8, 4/5 at 0.7.
    assert metrics.per_class["a"]["best_f1"] == pytest.approx(0.8) and metrics.best_confidence == pytest.approx(0.7)
    assert metrics.per_class["a"]["detections"] == metrics.detections == 2  # at or above 0.75
    assert metrics.confusion == ((1, 0, 1), (0, 0, 0), (1, 0, 0))


def test_confusion_counts_a_wrong_label_once_and_prefers_the_right_one() -> None:
    truth = {"1": (box("a", 0, 0, 40, 40), box("b", 100, 0, 140, 40), box("b", 200, 0, 240, 40))}
    guesses = {"1": found((1, 0.9, (0, 0, 40, 40)),  # b for a ...
                          (0, 0.6, (4, 0, 44, 40)),  # ... but there is an a as well, less sure and less exact
                          (0, 0.8, (100, 0, 140, 40)))}  # a for b
    assert score(truth, guesses, AB, confidence=0.5).confusion == ((1, 0, 0), (1, 0, 1), (0, 1, 0))


def test_the_threshold_that_is_best_may_differ_per_class() -> None:
    truth = {"1": (box("a", 0, 0, 40, 40), box("b", 100, 0, 140, 40))}
    guesses = {
        "1": found(
            (0, 0.3, (0, 0, 40, 40)),
            (0, 0.2, (0, 200, 40, 240)),
            (1, 0.9, (100, 0, 140, 40)),
            (1, 0.8, (200, 0, 240, 40)),
            (1, 0.7, (300, 0, 340, 40)),
            (1, 0.6, (400, 0, 440, 40)),
        )
    }
    metrics = score(truth, guesses, AB)
    assert metrics.per_class["a"]["best_confidence"] == pytest.approx(0.3)
    assert metrics.per_class["b"]["best_confidence"] == pytest.approx(0.9)
    # Both together: at 0.9 one hit of two objects and one detection, F1 = 2/3; at 0.3 two hits, five detections, 4/7.
    assert metrics.best_confidence == pytest.approx(0.9) and metrics.best_f1 == pytest.approx(2 / 3)


def test_a_crowd_is_neither_missed_nor_a_mistake() -> None:
    truth = {"1": (box("a", 0, 0, 40, 40), box("a", 100, 0, 200, 100, crowd=True))}
    guesses = {"1": found((0, 0.9, (0, 0, 40, 40)), (0, 0.8, (100, 0, 200, 90)))}
    metrics = score(truth, guesses, AB, confidence=0.5)
    assert metrics.confusion == ((1, 0, 0), (0, 0, 0), (0, 0, 0)) and metrics.truth == 1 and metrics.best_f1 == 1


def test_a_label_that_the_truth_lacks_has_no_average_precision() -> None:
    metrics = score({"1": (box("a", 0, 0, 40, 40),)}, {"1": found((1, 0.9, (0, 0, 40, 40)))}, AB, confidence=0.5)
    assert list(metrics.per_class) == list(metrics.curves) == ["a"] and metrics.confusion == (
        (0, 1, 0),
        (0, 0, 0),
        (0, 0, 0),
    )


def test_annotations_with_a_confidence_score_like_detections() -> None:
    truth, detections, taxonomy = random_case(3)
    drawn = {
        name: tuple(
            Annotation(taxonomy.labels[class_id], tuple(xyxy), confidence=float(confidence), source="model:m@1")
            for xyxy, class_id, confidence in zip(one.xyxy, one.class_id, one.confidence)
        )
        for name, one in detections.items()
    }
    assert score(truth, drawn, taxonomy) == score(truth, detections, taxonomy)


def test_a_polygon_counts_by_the_box_around_it_and_a_tag_not_at_all() -> None:
    shape = Annotation("a", polygon=((0, 0), (40, 10), (20, 40)))
    metrics = score({"1": (shape, Annotation("b"))}, {"1": found((0, 0.9, (0, 0, 40, 40)))}, AB)
    assert metrics.map_50_95 == pytest.approx(1) and metrics.truth == 1


def test_a_frame_nobody_looked_at_is_no_truth() -> None:
    with pytest.raises(Invalid, match="1 frames have no truth.*e.g. 2"):
        score({"1": (box("a", 0, 0, 40, 40),), "2": None}, {}, AB)


def test_a_frame_where_nothing_is_counts_its_mistakes() -> None:
    truth = {"1": (box("a", 0, 0, 40, 40),)}
    guesses = {"1": found((0, 0.5, (0, 0, 40, 40))), "2": found((0, 0.9, (0, 0, 40, 40)))}
    assert score({**truth, "2": ()}, guesses, AB).map_50 == pytest.approx(0.5)
    with pytest.raises(Invalid, match="not evaluated, e.g. 2"):
        score(truth, guesses, AB)


def test_what_cannot_be_scored_is_invalid() -> None:
    with pytest.raises(Invalid, match="None of the 1 frames has a labelled box"):
        score({"1": ()}, {}, AB)
    with pytest.raises(Invalid, match="'c' is not in the taxonomy"):
        score({"1": (box("c", 0, 0, 1, 1),)}, {}, AB)
    with pytest.raises(Invalid, match="class ids 2..2, the taxonomy has 2"):
        score({"1": (box("a", 0, 0, 1, 1),)}, {"1": found((2, 0.5, (0, 0, 1, 1)))}, AB)


def test_metrics_survive_json() -> None:
    truth, detections, taxonomy = random_case(1)
    metrics = score(truth, detections, taxonomy)
    assert Metrics.from_json(json.loads(json.dumps(metrics.to_json(), allow_nan=False))) == metrics

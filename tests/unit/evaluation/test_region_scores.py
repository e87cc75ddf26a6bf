"""Scores of regions: pixels held to scikit-learn's and masks one by one to pycocotools', and what is counted by hand."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sklearn.metrics import confusion_matrix, jaccard_score

from workbench.annotation import Annotation
from workbench.boxes import Detections
from workbench.dataset import Frame, LabeledFrame
from workbench.errors import Invalid
from workbench.evaluation.metrics import score
from workbench.evaluation.primary import scored_from
from workbench.evaluation.regions import has_regions, pixels, score_regions, with_outlines
from workbench.taxonomy import Taxonomy

LABELS = Taxonomy(("sky", "bird"))
WIDTH, HEIGHT = 48, 40


def frame(name: str, *drawn: Annotation) -> LabeledFrame:
    return LabeledFrame(Frame(name, WIDTH, HEIGHT, "0" * 32), tuple(drawn), "test")


def box(x1: float, y1: float, x2: float, y2: float) -> tuple[tuple[float, float], ...]:
    return (x1, y1), (x2, y1), (x2, y2), (x1, y2)


def region(label: str, polygon: tuple[tuple[float, float], ...]) -> Annotation:
    xs, ys = zip(*polygon)
    return Annotation(label, (min(xs), min(ys), max(xs), max(ys)), polygon)


def found(*rows: tuple[str, tuple[tuple[float, float], ...], float]) -> Detections:
    rings = tuple(np.array(ring, float) for _, ring, _ in rows)
    return Detections(np.array([[*ring.min(axis=0), *ring.max(axis=0)] for ring in rings]).reshape(-1, 4),
                      np.array([LABELS.class_id(label) for label, _, _ in rows]), np.array([sure for *_, sure in rows]), None, rings)


def test_pixels_are_counted_by_hand() -> None:
    frames = (frame("a", region("sky", box(0, 0, 48, 20)), region("bird", box(10, 5, 20, 15))),)
    given_ = {"a": found(("sky", box(0, 0, 48, 10), 0.9), ("bird", box(10, 5, 20, 15), 0.8), ("bird", box(30, 30, 40, 40), 0.1))}
    made = score_regions(frames, given_, LABELS, 0.5)
    # The bird lies on the sky in both: sky 960 - 100 and 480 - 50 pixels (the bird reaches 5 rows into what is found).
    assert made.confusion == ((430, 0, 430), (0, 100, 0), (0, 0, 960))
    assert made.iou == {"sky": pytest.approx(430 / 860), "bird": 1} and made.miou == pytest.approx(0.75)
    lower = score_regions(frames, given_, LABELS, 0.05)
    assert lower.iou["bird"] == pytest.approx(0.5) and lower.coco == made.coco


def random_case(seed: int) -> tuple[list[LabeledFrame], dict[str, Detections]]:
    dice = np.random.default_rng(seed)

    def ring() -> tuple[tuple[float, float], ...]:
        centre, radius = dice.uniform((6, 6), (WIDTH - 6, HEIGHT - 6)), dice.uniform(4, 14)
        turns = np.sort(dice.uniform(0, 2 * np.pi, 7))
        points = centre + radius * np.stack([np.cos(turns), np.sin(turns)], axis=1)
        return tuple(map(tuple, np.clip(points, 0, (WIDTH, HEIGHT)).tolist()))

    frames, given_ = [], {}
    for index in range(int(dice.integers(1, 6))):
        drawn = [(LABELS.labels[int(dice.integers(0, 2))], ring()) for _ in range(int(dice.integers(0, 4)))]
        frames.append(frame(f"{index}", *(region(*one) for one in drawn)))
        moved = [(label, tuple((x + float(dice.normal(0, 1)), y) for x, y in ring_), float(dice.uniform(0.1, 1)))
                 for label, ring_ in drawn if dice.random() < 0.8]
        given_[f"{index}"] = found(*moved, *(("bird", ring(), float(dice.uniform(0.1, 1))) for _ in range(int(dice.integers(0, 2)))))
    return frames, given_


def painted(rings: list[tuple[int, np.ndarray]]) -> np.ndarray:
    """Class ids by pycocotools' masks of whole frames, the largest first."""
    canvas = np.full((HEIGHT, WIDTH), 2)
    shapes = [(class_id, masks.decode(masks.frPyObjects([ring.ravel().tolist()], HEIGHT, WIDTH))[:, :, 0]) for class_id, ring in rings]
    for class_id, mask in sorted(shapes, key=lambda one: -int(one[1].sum())):
        canvas[mask > 0] = class_id
    return canvas


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 100_000))
def test_iou_of_pixels_is_scikit_learn_s_jaccard_score(seed: int) -> None:
    frames, given_ = random_case(seed)
    truth = [painted([(LABELS.class_id(one.label), np.array(one.polygon)) for one in labeled.annotations]) for labeled in frames]
    drawn = [painted([(int(class_id), ring) for class_id, ring in zip(boxes.class_id, boxes.polygons)]) for boxes in given_.values()]
    flat = np.concatenate([one.ravel() for one in truth]), np.concatenate([one.ravel() for one in drawn])
    if not (flat[0] < 2).any():
        with pytest.raises(Invalid, match="has a labelled region"):
            score_regions(frames, given_, LABELS, 0.0)
        return
    made = score_regions(frames, given_, LABELS, 0.0)
    assert (np.array(made.confusion) == confusion_matrix(*flat, labels=[0, 1, 2])).all()
    there = [index for index in (0, 1) if (flat[0] == index).any()]
    expected = jaccard_score(*flat, labels=there, average=None, zero_division=0)
    assert [made.iou[LABELS.labels[index]] for index in there] == pytest.approx(expected)
    assert made.miou == pytest.approx(expected.mean())


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 100_000))
def test_masks_one_by_one_are_scored_as_pycocotools_does(seed: int) -> None:
    frames, given_ = random_case(seed)
    images, annotations, results = [], [], []
    for image_id, labeled in enumerate(frames, 1):
        images.append({"id": image_id, "width": WIDTH, "height": HEIGHT})
        for one in labeled.annotations:
            run = masks.frPyObjects([np.array(one.polygon).ravel().tolist()], HEIGHT, WIDTH)[0]
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": LABELS.class_id(one.label) + 1,
                                "segmentation": run, "area": float(masks.area(run)), "bbox": masks.toBbox(run).tolist(), "iscrowd": 0})
        boxes = given_[labeled.frame.name]
        results += [{"image_id": image_id, "category_id": int(class_id) + 1, "score": float(sure),
                     "segmentation": masks.frPyObjects([ring.ravel().tolist()], HEIGHT, WIDTH)[0]}
                    for class_id, ring, sure in zip(boxes.class_id, boxes.polygons, boxes.confidence)]
    if not annotations or not results:
        return
    with redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {"info": {}, "images": images, "annotations": annotations, "categories": [{"id": 1}, {"id": 2}]}
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    made = score_regions(frames, given_, LABELS, 0.0)
    assert made.coco == pytest.approx({"map_50_95": evaluation.stats[0], "map_50": evaluation.stats[1]}, abs=1e-6)


def test_a_model_whose_regions_join_things_has_no_score_of_masks_one_by_one() -> None:
    frames = (frame("a", region("bird", box(0, 0, 10, 10))),)
    made = score_regions(frames, {"a": found(("bird", box(0, 0, 10, 10), 0.9))}, LABELS, 0.5, has_instances=False)
    assert (made.coco, made.ap, made.miou) == ({}, {}, 1)


def test_a_mask_is_scored_as_its_outline_and_a_box_beside_regions_as_its_rectangle() -> None:
    disc = cv2.circle(np.zeros((HEIGHT, WIDTH), np.uint8), (20, 20), 9, 1, -1)
    run = masks.encode(np.asfortranarray(disc))
    mask = Annotation("bird", mask={"size": list(run["size"]), "counts": run["counts"].decode()})
    empty = masks.encode(np.asfortranarray(disc * 0))
    nothing = Annotation("bird", mask={"size": list(empty["size"]), "counts": empty["counts"].decode()})
    (made,) = with_outlines([frame("a", mask, Annotation("sky", (30, 0, 48, 10)), Annotation("sky"), nothing)])
    assert [(one.label, one.polygon is not None, one.mask) for one in made.annotations] == [
        ("bird", True, None), ("sky", False, None), ("sky", False, None)]
    assert has_regions(made.annotations) and not has_regions(None) and not has_regions([Annotation("sky")])
    counted = pixels([made], {}, LABELS).confusion[0]
    assert counted[1].sum() == disc.sum() and counted[0].sum() == 180


def test_frames_that_are_there_twice_count_twice() -> None:
    frames, given_ = random_case(3)
    counted, weights = pixels(frames, given_, LABELS), np.arange(len(frames))
    doubled = [one for one, count in zip(frames, weights) for _ in range(count)]
    again = pixels(doubled, given_, LABELS)
    np.testing.assert_allclose(counted.iou(weights), again.iou(np.ones(len(doubled))))


def test_regions_go_with_the_boxes_scores_as_json() -> None:
    from dataclasses import replace
    frames = (frame("a", region("bird", box(0, 0, 10, 10))),)
    given_ = {"a": found(("bird", box(0, 0, 10, 10), 0.9))}
    made = replace(score({"a": frames[0].annotations}, given_, LABELS, 0.5), regions=score_regions(frames, given_, LABELS, 0.5))
    assert scored_from(json.loads(json.dumps(made.to_json(), allow_nan=False))) == made
    assert made.values == pytest.approx({"map_50_95": 1, "map_50": 1, "miou": 1, "mask_map_50_95": 1, "mask_map_50": 1})
    assert made.by_label("miou") == {"bird": 1} and made.logged()["iou/bird"] == 1

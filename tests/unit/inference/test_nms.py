"""Non-maximum suppression and the choice of candidates."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.boxes import iou
from workbench.inference.nms import best, nms


def greedy(boxes: np.ndarray, scores: np.ndarray, class_ids: np.ndarray, least: float) -> list[int]:
    """The definition, word by word: take the best, drop those of its class that overlap it by more, and again."""
    left, kept = sorted(range(len(boxes)), key=lambda i: -scores[i]), []
    while left:
        first, *rest = left
        kept.append(first)
        left = [i for i in rest if class_ids[i] != class_ids[first] or iou(boxes[[first]], boxes[[i]])[0, 0] <= least]
    return kept


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 60), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.3, 0.45, 0.6, 1.0]))
def test_it_keeps_what_the_definition_keeps(count: int, seed: int, least: float) -> None:
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 60, (count, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(1, 40, (count, 2))], axis=1)
    scores, class_ids = rng.permutation(count).astype(np.float32) / 100, rng.integers(0, 3, count)
    assert nms(boxes, scores, class_ids, least).tolist() == greedy(boxes, scores, class_ids, least)


def test_boxes_of_different_classes_never_suppress_each_other() -> None:
    boxes = np.array([[0, 0, 10, 10]] * 3, float)
    assert nms(boxes, np.array([0.5, 0.9, 0.7]), np.array([0, 1, 0]), 0.5).tolist() == [1, 2]


def test_only_the_best_are_returned() -> None:
    boxes = np.array([[i * 20, 0, i * 20 + 10, 10] for i in range(5)], float)
    assert nms(boxes, np.array([0.1, 0.2, 0.3, 0.4, 0.5]), np.zeros(5, int), 0.5, max_detections=2).tolist() == [4, 3]


def test_no_boxes_give_none() -> None:
    assert nms(np.zeros((0, 4)), np.zeros(0), np.zeros(0), 0.5).tolist() == []


def test_candidates_are_the_best_above_each_class_s_threshold() -> None:
    scores = np.array([[0.9, 0.2], [0.4, 0.6], [0.9, 0.9]], np.float32)
    points, class_ids = best(scores, np.array([0.5, 0.7], np.float32), most=10)
    assert list(zip(points.tolist(), class_ids.tolist())) == [(0, 0), (2, 0), (2, 1)]
    points, class_ids = best(scores, np.zeros(2, np.float32), most=2)
    assert list(zip(points.tolist(), class_ids.tolist())) == [(0, 0), (2, 0)]

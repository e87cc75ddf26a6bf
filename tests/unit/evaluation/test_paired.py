"""The paired bootstrap: its mean is COCO's difference, its interval shrinks with frames and tells chance from progress."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from workbench.annotation import Annotation
from workbench.boxes import Detections
from workbench.evaluation.metrics import score
from workbench.evaluation.paired import RESAMPLES, differences, interval
from workbench.taxonomy import Taxonomy

COLOURS = Taxonomy(("red", "blue", "green"))
NONE = Detections(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0, np.float32))


def frames(count: int, spread: float, seed: int) -> tuple[dict, dict]:
    """(truth, detections): a red and sometimes a blue box of 30 px on each frame, found `spread` px aside."""
    random = np.random.default_rng(seed)
    truth, found = {}, {}
    for index in range(count):
        ids = [0, 1] if index % 3 == 0 else [0]
        boxes = np.array([[10, 10, 40, 40], [50, 50, 80, 80]], float)[:len(ids)]
        truth[f"{index}"] = tuple(Annotation(label=COLOURS.labels[one], xyxy=tuple(box)) for one, box in zip(ids, boxes.tolist()))
        moved = boxes + random.normal(0, spread, boxes.shape)
        found[f"{index}"] = Detections(moved, np.array(ids), random.uniform(0.3, 1, len(ids)).astype(np.float32))
    return truth, found


@pytest.mark.parametrize("ious, figure", [(10, "map_50_95"), (1, "map_50")])
def test_the_draws_lie_around_the_difference_that_coco_measures(ious: int, figure: str) -> None:
    truth, good = frames(60, 1.0, 1)
    _, bad = frames(60, 6.0, 2)
    expected = getattr(score(truth, good, COLOURS, 0.3), figure) - getattr(score(truth, bad, COLOURS, 0.3), figure)
    overall, per_label = differences(truth, good, bad, COLOURS, ious=ious)
    assert overall.shape == (RESAMPLES,) and set(per_label) == {"red", "blue"}
    low, high = interval(overall)
    assert 0 < low <= expected <= high and overall.mean() == pytest.approx(expected, abs=0.05)


def test_two_equals_cannot_be_told_apart_and_the_sign_turns_with_the_order() -> None:
    truth, one = frames(40, 2.0, 1)
    _, other = frames(40, 2.0, 7)
    overall, _ = differences(truth, one, other, COLOURS)
    low, high = interval(overall)
    assert low < 0 < high
    assert np.array_equal(overall, -differences(truth, other, one, COLOURS)[0])
    assert interval(differences(truth, one, one, COLOURS)[0]) == [0, 0]


def test_more_frames_give_a_narrower_interval() -> None:
    widths = []
    for count in (10, 160):
        low, high = interval(differences(*frames(count, 1.0, 1), frames(count, 4.0, 2)[1], COLOURS)[0])
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_frames_without_boxes_and_models_that_find_nothing_are_no_error() -> None:
    truth, found = frames(3, 0.0, 1)
    truth |= {f"empty {index}": () for index in range(30)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        overall, _ = differences(truth, found, {}, COLOURS)
        low, high = interval(overall)
        assert low == high == pytest.approx(1) and np.isnan(overall).any(), "a draw of empty frames says nothing"
        assert interval(differences(truth, {}, {name: NONE for name in truth}, COLOURS)[0]) == [0, 0]

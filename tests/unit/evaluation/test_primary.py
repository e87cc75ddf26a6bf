"""The metrics that promotion decides by: over all frames the evaluation's own value, over draws an interval around it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from workbench.annotation import Annotation
from workbench.boxes import Detections
from workbench.dataset import Frame, LabeledFrame
from workbench.evaluation.metrics import score
from workbench.evaluation.paired import drawn, interval
from workbench.evaluation.primary import PRIMARY, counts, default_metric, figure, task_of
from workbench.evaluation.regions import score_regions
from workbench.evaluation.tags import score_tags
from workbench.taxonomy import Taxonomy

LABELS = Taxonomy(("red", "blue", "unseen"))


def ring(shift: float) -> np.ndarray:
    return np.array([(4, 4), (36, 4), (36, 36), (4, 36)], float) + shift


def case(metric: str, shift: float, wrong: int, count: int = 24) -> tuple[list[LabeledFrame], dict[str, Detections], Any]:
    """(frames, found, its score): red on even frames, blue on odd ones, `shift` px aside; the label of every `wrong`-th
    frame is the other one."""
    task, frames, found = PRIMARY[metric], [], {}
    for index in reversed(range(count)):  # frames need not come in the order of their names
        label, name = LABELS.labels[index % 2], f"{index:02d}"
        polygon = tuple(map(tuple, ring(0).tolist()))
        drawn_ = {"tags": Annotation(label), "boxes": Annotation(label, (4, 4, 36, 36)),
                  "polygons": Annotation(label, (4, 4, 36, 36), polygon)}[task]
        frames.append(LabeledFrame(Frame(name, 40, 40, "0" * 32), (drawn_,), "test"))
        class_id = index % 2 if index % wrong else 1 - index % 2
        if task == "tags":
            sure = np.full(3, 0.1)
            sure[class_id] = 0.9 - index / 100
            found[name] = Detections(np.tile([0, 0, 40, 40], (3, 1)), np.arange(3), sure)
        else:
            moved = ring(shift)
            found[name] = Detections([[*moved.min(axis=0), *moved.max(axis=0)]], [class_id], [0.9 - index / 100], None, (moved,))
    truth = {one.frame.name: one.annotations for one in frames}
    if task == "tags":
        return frames, found, score_tags(truth, found, LABELS, 0.5, metric != "map")
    boxes = score(truth, found, LABELS, 0.5)
    if task == "boxes":
        return frames, found, boxes
    from dataclasses import replace
    return frames, found, replace(boxes, regions=score_regions(frames, found, LABELS, 0.5))


@pytest.mark.parametrize("metric", PRIMARY)
def test_over_every_frame_once_it_is_what_the_evaluation_says(metric: str) -> None:
    frames, found, scored = case(metric, 2, 5)
    value, parts = figure(metric, frames, found, scored, LABELS)(np.ones(len(frames)))
    assert 0 < value < 1 and value == pytest.approx(scored.values[metric], abs=1e-6)
    known = {label: part for label, part in parts.items() if part == part}
    assert known == pytest.approx(scored.by_label(metric), abs=1e-6) and set(known) == {"red", "blue"}


@pytest.mark.parametrize("metric", PRIMARY)
def test_the_interval_of_the_difference_holds_what_was_measured_and_tells_better_from_equal(metric: str) -> None:
    frames, good_found, good = case(metric, 0.5, 12)
    _, bad_found, bad = case(metric, 4, 3)
    better, worse = figure(metric, frames, good_found, good, LABELS), figure(metric, frames, bad_found, bad, LABELS)
    low, high = interval(drawn(better, worse, len(frames))[0])
    assert 0 < low <= good.values[metric] - bad.values[metric] <= high
    back_low, back_high = interval(drawn(worse, better, len(frames))[0])
    assert (back_low, back_high) == pytest.approx((-high, -low))
    assert interval(drawn(better, better, len(frames))[0]) == [0, 0]


def test_each_task_has_the_metric_it_is_decided_by() -> None:
    def frame(*drawn_: Annotation) -> LabeledFrame:
        return LabeledFrame(Frame("a", 40, 40, "0" * 32), drawn_, "test")

    outline = Annotation("red", (4, 4, 36, 36), tuple(map(tuple, ring(0).tolist())))
    box, tag = Annotation("red", (1, 1, 5, 5)), Annotation("red")
    assert default_metric("boxes", [frame(box, outline)]) == "map_50_95"
    assert default_metric("polygons", [frame(box), frame(outline)]) == "miou"
    assert default_metric("polygons", [frame(box)]) == "map_50_95"
    assert default_metric("tags", [frame(tag, box)]) == "accuracy"
    assert default_metric("tags", [frame(tag), frame(tag, Annotation("blue"))]) == "map"
    assert [counts("accuracy", one) for one in (tag, box, outline)] == [True, False, False]
    assert [counts("miou", one) for one in (tag, box, outline)] == [False, True, True]


def test_what_people_drew_says_what_a_model_of_theirs_is_to_draw() -> None:
    box, tag = Annotation("red", (1, 1, 9, 9)), Annotation("red")
    outline = Annotation("red", (4, 4, 36, 36), tuple(map(tuple, ring(0).tolist())))
    of = {name: LabeledFrame(Frame(name, 40, 40, "0" * 32), drawn_, "train") for name, drawn_ in {
        "box": (box,), "tag": (tag,), "outline": (outline,), "mixed": (box, outline), "empty": (), "unseen": None}.items()}
    for names, task in (("box", "boxes"), ("tag empty", "tags"), ("outline unseen", "polygons"), ("mixed", "boxes"),
                        ("tag box", "boxes"), ("empty unseen", "boxes"), ("", "boxes")):
        assert task_of([of[name] for name in names.split()]) == task, names

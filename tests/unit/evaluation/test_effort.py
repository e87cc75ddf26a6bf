"""How many boxes a person touches, counted by hand and by property."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.annotation import Annotation, is_same_drawing
from workbench.evaluation.effort import least_effort, Effort, corrected, effort
from workbench.evaluation.matching import match


def machine(label: str, *xyxy: float, key: str = "") -> Annotation:
    return Annotation(label, xyxy, source="model:m@1", confidence=0.5, **({"id": key} if key else {}))


def true(label: str, *xyxy: float) -> Annotation:
    return Annotation(label, xyxy, source="human:truth")


def test_each_kind_of_work_is_counted_once() -> None:
    proposed = [
        machine("a", 0, 0, 100, 100),  # as it should be
        machine("a", 200, 0, 300, 100),  # IoU with (240, 0, 340, 100): 60 / 140 = 0.43: too far off, drawn anew
        machine("a", 0, 200, 100, 300),  # IoU with (20, 200, 120, 300): 80 / 120 = 0.67: moved
        machine("b", 200, 200, 300, 300),  # another label on the spot
        machine("a", 600, 600, 700, 700)]  # nothing there
    truth = [
        true("a", 0, 0, 100, 100),
        true("a", 240, 0, 340, 100),
        true("a", 20, 200, 120, 300),
        true("a", 200, 200, 300, 300),
    ]
    assert effort(proposed, truth) == Effort(boxes_total=4, untouched=1, moved=1, relabelled=1, deleted=2, drawn=1)
    assert effort(proposed, truth).touched == 5
    assert effort([], truth) == Effort(boxes_total=4, drawn=4) and effort(proposed, []) == Effort(deleted=5)
    assert effort(truth, truth) == Effort(boxes_total=4, untouched=4)


def test_a_box_that_is_nearly_right_needs_no_touch() -> None:
    # 85 / 115 = 0.739 and 82 / 118 = 0.695.
    assert effort([machine("a", 0, 0, 100, 100)], [true("a", 15, 0, 115, 100)]).untouched == 1
    assert effort([machine("a", 0, 0, 100, 100)], [true("a", 18, 0, 118, 100)]).moved == 1
    assert effort([machine("a", 0, 0, 100, 100)], [true("a", 15, 0, 115, 100)], same_iou=0.75).moved == 1


def test_pairs_are_chosen_so_that_the_least_is_touched() -> None:
    # The first proposal fits both objects; greedily it would take the better second one and leave two touches.
    proposed = [machine("a", 10, 0, 110, 100), machine("a", 24, 0, 124, 100)]
    truth = [true("a", 0, 0, 100, 100), true("a", 14, 0, 114, 100)]
    assert effort(proposed, truth, same_iou=0.8) == Effort(boxes_total=2, untouched=2)


def test_a_box_of_the_right_label_is_preferred_over_a_closer_one() -> None:
    pairs = match(
        np.array([[0, 0, 100, 100], [10, 0, 110, 100]], float), ["b", "a"], np.array([[0, 0, 100, 100]], float), ["a"]
    )
    assert [(pair.one, pair.other, pair.is_same_label) for pair in pairs] == [(1, 0, True)]


def test_among_equal_efforts_the_label_decides() -> None:
    # 75 / 125 = 0.6: pulling the a into place and naming the b anew cost one touch each, and the other box one more.
    proposed, truth = [machine("b", 0, 0, 100, 100), machine("a", 25, 0, 125, 100)], [true("a", 0, 0, 100, 100)]
    assert effort(proposed, truth) == Effort(boxes_total=1, moved=1, deleted=1)


def test_frames_are_counted_apart_and_added_up() -> None:
    truth = {"1": (true("a", 0, 0, 10, 10),), "2": (true("a", 0, 0, 10, 10),), "3": ()}
    proposed = {
        "1": (machine("a", 0, 0, 10, 10),),
        "3": (machine("a", 0, 0, 10, 10),),
        "4": (machine("a", 0, 0, 10, 10),),
    }
    # Frame 2 is drawn from scratch; what is right on frame 4 nobody knows.
    assert effort(proposed, truth) == Effort(boxes_total=2, untouched=1, deleted=1, drawn=1)
    assert effort({"1": None, "2": (), "3": ()}, truth) == Effort(boxes_total=2, drawn=2)


def test_the_reviewer_leaves_good_boxes_exactly_as_they_are() -> None:
    good, off, wrong, spurious = (
        machine("a", 0.4, 0, 100, 101.2, key="good"),
        machine("a", 0, 200, 100, 300, key="off"),
        machine("b", 200, 200, 300, 300, key="wrong"),
        machine("a", 600, 600, 700, 700, key="spurious"),
    )
    truth = [
        true("a", 0, 0, 100, 100),
        true("a", 20, 200, 120, 300),
        true("a", 203, 200, 303, 300),
        true("b", 400, 0, 450, 50),
    ]
    left = {annotation.id: annotation for annotation in corrected([good, off, wrong, spurious], truth, "ann")}
    assert left.pop("good") is good
    moved, relabelled = left.pop("off"), left.pop("wrong")
    assert moved == replace(off, xyxy=truth[1].xyxy, attributes={"touched_by": "human:ann"}) and not moved.is_machine
    assert relabelled == replace(wrong, label="a", xyxy=truth[2].xyxy, attributes={"touched_by": "human:ann"})
    (drawn,) = left.values()
    assert (drawn.label, drawn.xyxy, drawn.source, drawn.confidence) == ("b", (400, 0, 450, 50), "human:ann", None)
    assert drawn.id != truth[3].id


def test_tags_stay() -> None:
    tag = Annotation("blurred")
    assert corrected([tag], [], "ann") == (tag,) and effort([tag], []) == Effort()


boxes = st.tuples(
    st.integers(0, 60), st.integers(0, 60), st.integers(5, 60), st.integers(5, 60), st.sampled_from("ab")
).map(lambda one: (one[4], one[0], one[1], one[0] + one[2], one[1] + one[3]))


@settings(deadline=None, max_examples=150)
@given(st.lists(boxes, max_size=7), st.lists(boxes, max_size=7), st.sampled_from([0.5, 0.7, 0.9]))
def test_what_a_reviewer_leaves_is_right_and_costs_what_was_counted(
    proposed: list, truth: list, same_iou: float
) -> None:
    machines, wanted = [machine(*one) for one in proposed], [true(*one) for one in truth]
    spent, left = effort(machines, wanted, same_iou), corrected(machines, wanted, "ann", same_iou)
    assert spent.untouched + spent.moved + spent.relabelled + spent.deleted == len(machines)
    assert (
        spent.untouched + spent.moved + spent.relabelled + spent.drawn == len(wanted) == spent.boxes_total == len(left)
    )
    after = effort(left, wanted, same_iou)
    assert after == Effort(boxes_total=len(wanted), untouched=len(wanted))
    originals = {annotation.id: annotation for annotation in machines}
    assert sum(1 for one in left if one.id not in originals) == spent.drawn
    # The truth as text differs only where a person touched something.
    assert (
        sum(1 for one in left if one.id in originals and not is_same_drawing(one, originals[one.id]))
        <= spent.moved + spent.relabelled
    )


@settings(deadline=None, max_examples=100)
@given(st.lists(boxes, max_size=4), st.lists(boxes, max_size=4))
def test_no_other_pairing_costs_less(proposed: list, truth: list) -> None:
    from itertools import permutations

    from workbench.boxes import iou
    machines, wanted = [machine(*one) for one in proposed], [true(*one) for one in truth]
    overlap = iou([one.xyxy for one in machines], [one.xyxy for one in wanted])
    best = len(machines) + len(wanted)
    slots = list(range(len(wanted))) + [None] * len(machines)
    for targets in set(permutations(slots, len(machines))):
        pairs = [(i, t) for i, t in enumerate(targets) if t is not None]
        if all(overlap[i, t] >= 0.5 for i, t in pairs):
            good = sum(machines[i].label == wanted[t].label and overlap[i, t] >= 0.7 for i, t in pairs)
            best = min(best, len(machines) + len(wanted) - len(pairs) - good)
    assert effort(machines, wanted).touched == best


def test_effort_adds_up_and_is_json() -> None:
    total = Effort(3, 1, 1, 0, 0, 1) + Effort(1, 0, 0, 1, 2, 0)
    assert total.to_json() == {
        "boxes_total": 4,
        "untouched": 1,
        "moved": 1,
        "relabelled": 1,
        "deleted": 2,
        "drawn": 1,
        "touched": 5,
    }


@pytest.mark.parametrize("count", [200])
def test_a_crowded_frame_is_paired_in_reasonable_time(count: int) -> None:
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 1000, (count, 2))
    rows = [("a", *xy, *(xy + 50)) for xy in corners.tolist() for xy in [np.array(xy)]]
    assert effort([machine(*row) for row in rows], [true(*row) for row in rows]).untouched == count


def test_the_threshold_with_the_fewest_touches_is_chosen() -> None:
    # Two true boxes. The machine finds one at 0.9 and the other at 0.6, and draws a wrong box at 0.3. From 0.325 to 0.6
    # nothing has to be touched; the middle of those 12 thresholds (the 7th) is 0.475. Below, one deletion; above, one
    # box to draw, and from 0.925 on two.
    truth = {"a": [Annotation("car", (0, 0, 10, 10)), Annotation("car", (50, 50, 60, 60))]}
    found = {"a": [Annotation("car", xyxy, source="model:m@1", confidence=confidence)
                   for xyxy, confidence in [((0, 0, 10, 10), 0.9), ((50, 50, 60, 60), 0.6), ((80, 80, 90, 90), 0.3)]]}
    threshold, left = least_effort(found, truth)
    assert threshold == 0.475 and left.touched == 0


def test_a_useless_model_is_told_to_propose_nothing() -> None:
    truth = {"a": [Annotation("car", (0, 0, 10, 10))]}
    found = {"a": [Annotation("car", (50, i, 60, i + 9), source="model:m@1", confidence=0.5) for i in range(9)]}
    threshold, left = least_effort(found, truth)
    assert threshold > 0.5 and left.touched == left.boxes_total == 1

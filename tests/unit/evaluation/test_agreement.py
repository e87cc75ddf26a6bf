"""Agreement of two sets of boxes, counted by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.annotation import Annotation
from workbench.evaluation.agreement import Agreement, agreement, agreements, disagreement


def box(left: float, label: str = "RBC", width: float = 100.0) -> Annotation:
    return Annotation(label, xyxy=(left, 0.0, left + width, 100.0))


def test_boxes_that_overlap_by_half_with_one_label_are_the_same_thing() -> None:
    # IoU of two 100 px boxes that are shifted by d is (100 - d) / (100 + d): 0.5 at a third of their width.
    assert agreement([box(0)], [box(33)]).both == 1
    assert agreement([box(0)], [box(34)]) == Agreement(1, 0, 1, 1)
    assert agreement([box(0)], [box(0, "WBC")]) == Agreement(1, 0, 1, 1, mislabelled=1)


def test_precision_recall_and_accuracy_are_those_of_cvat_s_report() -> None:
    # i_quality 24 and 36: two right, one with the wrong label, one too many: 0.5, 2/3, and 2 of 4 things
    found = agreement([box(0), box(400), box(200, "WBC"), box(900)], [box(0), box(200), box(400)])
    assert (found.precision, found.recall, found.accuracy) == (0.5, 0.6667, 0.5)


def test_no_boxes_at_all_have_no_share_and_no_disagreement() -> None:
    found = agreement([], [])
    assert (found.precision, found.recall, found.accuracy, disagreement([], [])) == (None, None, None, 0.0)


@pytest.mark.parametrize("first, second, wanted", [
    ([box(0)], [box(0)], 0.0), ([box(0)], [], 1.0), ([], [box(0)], 1.0), ([box(0)], [box(500)], 1.0),
    ([box(0), box(200)], [box(0)], 1 / 3), ([box(0)], [box(0, "WBC")], 1.0)])
def test_disagreement_is_the_share_of_boxes_without_a_partner(first: list, second: list, wanted: float) -> None:
    assert disagreement(first, second) == pytest.approx(wanted)


def test_two_boxes_on_one_thing_are_one_partner_and_one_too_many() -> None:
    assert agreement([box(0), box(5)], [box(0)]) == Agreement(1, 1, 1, 0)


def test_polygons_count_by_their_box_and_tags_not_at_all() -> None:
    polygon = Annotation("RBC", polygon=((0, 0), (100, 0), (100, 100), (0, 100)))
    assert agreement([polygon, Annotation("RBC")], [box(0)]) == Agreement(1, 1, 0, 0)


def test_only_frames_that_both_know_are_added_up() -> None:
    assert agreements({"a": [box(0)], "b": [box(0)]}, {"a": [box(0)], "c": [box(0)]}) == Agreement(1, 1, 0, 0)


@given(st.lists(st.integers(0, 20), max_size=6), st.lists(st.integers(0, 20), max_size=6))
def test_disagreement_has_no_sides_and_stays_within_0_and_1(first: list[int], second: list[int]) -> None:
    one, other = [box(30.0 * at) for at in first], [box(30.0 * at) for at in second]
    found = disagreement(one, other)
    assert 0 <= found <= 1 and found == disagreement(other, one) and disagreement(one, one) == 0

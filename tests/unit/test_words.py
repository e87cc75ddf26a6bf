"""The root value files: taxonomy, annotation, boxes, model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from workbench import boxes
from workbench.annotation import Annotation, is_same_drawing, machine_annotation_id
from workbench.boxes import Detections
from workbench.errors import Invalid
from workbench.model import InputSpec, ModelCard
from workbench.taxonomy import Taxonomy

COCO, OURS = Taxonomy(("person", "car", "truck")), Taxonomy(("car", "lorry"))


def test_labels_map_by_name_and_what_does_not_match_is_listed() -> None:
    found = COCO.map_to(OURS)
    assert (found.pairs, found.unmatched, found.unreached) == ({"car": "car"}, ("person", "truck"), ("lorry",))
    assert found("person") is None


def test_a_rename_maps_what_the_names_do_not() -> None:
    assert COCO.map_to(OURS, {"truck": "lorry"}).pairs == {"car": "car", "truck": "lorry"}
    with pytest.raises(Invalid, match="'bus'"):
        COCO.map_to(OURS, {"bus": "lorry"})


@pytest.mark.parametrize("labels", [("a", "a"), ("",), (" a",), ("a\n",), (3,)])
def test_a_taxonomy_refuses_labels_nobody_could_tell_apart_or_read(labels: tuple) -> None:
    with pytest.raises(Invalid):
        Taxonomy(labels)


def test_a_taxonomy_grows_without_moving_its_class_ids() -> None:
    assert OURS.with_labels(["truck", "car"]).labels == ("car", "lorry", "truck")


@pytest.mark.parametrize("wrong", [
    {"xyxy": (0, 0, float("nan"), 1)}, {"xyxy": (0, 0, float("inf"), 1)}, {"xyxy": (5, 0, 5, 1)}, {"xyxy": (0, 0, 1)},
    {"label": ""}, {"source": "somebody"}, {"source": "model:"}, {"confidence": 1.2}, {"confidence": float("nan")},
    {"polygon": ((0, 0), (1, 1))},
])
def test_an_annotation_that_no_tool_could_draw_is_refused(wrong: dict) -> None:
    with pytest.raises(Invalid):
        Annotation(**{"label": "car", "xyxy": (0, 0, 1, 1), **wrong})


numbers = st.floats(0, 4000, allow_nan=False)


@given(x=numbers, y=numbers, w=st.floats(1, 500), h=st.floats(1, 500), confidence=st.none() | st.floats(0, 1))
def test_an_annotation_survives_its_canonical_form(x: float, y: float, w: float, h: float, confidence: float | None) -> None:
    drawn = Annotation("car", (x, y, x + w, y + h), source="model:m@1", confidence=confidence, attributes={"run_id": "r"})
    again = Annotation.from_json(drawn.to_json())
    assert is_same_drawing(drawn, again) and again.id == drawn.id and again.attributes == drawn.attributes
    assert again.to_json() == drawn.to_json()


def test_a_changed_label_or_a_moved_corner_is_another_drawing() -> None:
    one = Annotation("car", (0, 0, 10, 10))
    assert is_same_drawing(one, Annotation("car", (0.01, 0, 10, 10)))
    assert not is_same_drawing(one, Annotation("car", (0.2, 0, 10, 10)))
    assert not is_same_drawing(one, Annotation("lorry", (0, 0, 10, 10)))


def test_a_machine_box_is_no_longer_a_machine_s_once_touched() -> None:
    assert Annotation("car", source="model:m@1").is_machine
    assert not Annotation("car", source="model:m@1", attributes={"touched_by": "human:a"}).is_machine
    assert not Annotation("car", source="human:a").is_machine


def test_the_ids_a_run_gives_are_the_same_when_it_is_repeated() -> None:
    assert machine_annotation_id("r", "f", 0) == machine_annotation_id("r", "f", 0)
    assert len({machine_annotation_id(run, frame, i) for run in "rs" for frame in "fg" for i in range(3)}) == 12


def test_iou_of_boxes_worked_out_by_hand() -> None:
    # 10x10 against itself: 1; shifted by half: overlap 50, union 150; apart: 0; a point has no union with itself.
    found = boxes.iou(np.array([[0, 0, 10, 10]]), np.array([[0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30]]))
    assert found == pytest.approx(np.array([[1, 1 / 3, 0]]))
    assert boxes.iou(np.array([[1, 1, 1, 1]]), np.array([[1, 1, 1, 1]])).tolist() == [[0]]
    assert boxes.iou(np.zeros((0, 4)), np.zeros((3, 4))).shape == (0, 3)


def test_box_forms_turn_into_each_other() -> None:
    assert boxes.xywh_to_xyxy([[1, 2, 3, 4]]).tolist() == [[1, 2, 4, 6]]
    assert boxes.xyxy_to_xywh([[1, 2, 4, 6]]).tolist() == [[1, 2, 3, 4]]
    assert boxes.cxcywh_to_xyxy([[5, 5, 2, 4]]).tolist() == [[4, 3, 6, 7]]
    assert boxes.clip(np.array([[-1, -2, 30, 5]]), 20, 10).tolist() == [[0, 0, 20, 5]]


def test_detections_refuse_shapes_that_disagree_and_broken_numbers() -> None:
    with pytest.raises(Invalid, match=r"\(n, 4\), got \(4, 7\)"):
        Detections(np.zeros((4, 7)), np.zeros(4), np.zeros(4))
    with pytest.raises(Invalid, match="must have shape"):
        Detections(np.zeros((2, 4)), np.zeros(3), np.zeros(2))
    with pytest.raises(Invalid, match="NaN"):
        Detections(np.full((1, 4), np.nan), np.zeros(1), np.zeros(1))
    assert len(Detections.empty()) == 0


def card(**changes: object) -> ModelCard:
    record = {"name": "student", "version": "3", "labels": ["car"], "decoder": {"name": "fcos", "strides": [8]},
              "input": {"width": 320, "height": 256}, "files": {"model.onnx": {"sha256": "0", "size_bytes": 1}}}
    return ModelCard.from_json({**record, **changes})


def test_a_card_survives_its_json() -> None:
    assert ModelCard.from_json(card().to_json()) == card()
    assert (card().ref, card().source, card().onnx) == ("student@3", "model:student@3", "model.onnx")
    assert card().input == InputSpec((320, 256))


@pytest.mark.parametrize("changes", [
    {"name": "../x"}, {"version": "a/b"}, {"labels": []}, {"decoder": {"name": "magic"}}, {"decoder": {}},
    {"files": {}}, {"files": {"../model.onnx": {}}}, {"files": {"a.onnx": {}, "b.onnx": {}}}, {"input": {"width": 320}},
    {"input": {"width": 320, "height": 0}}, {"input": {"width": 320, "height": 320, "colour": "HSV"}},
    {"input": {"width": 320, "height": 320, "std": [0, 1, 1]}}, {"decoder": {"name": "fcos", "confidence": 7}},
])
def test_a_card_that_could_not_run_is_refused(changes: dict) -> None:
    with pytest.raises(Invalid):
        card(**changes)

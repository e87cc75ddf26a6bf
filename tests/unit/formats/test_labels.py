"""The rules by which label boxes become annotations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from workbench.formats.labels import ImageLabels, LabelBox, number, place, usable_label


def placed(*values: tuple[float, ...], size=(100, 80), claimed=None, relative=False):
    boxes = tuple(LabelBox("cell", one, f"l.txt line {index}", relative) for index, one in enumerate(values, 1))
    return place(ImageLabels(boxes, size=claimed, where="l.txt"), "a.jpg", size, size, 1, "human:ana")


def test_a_box_inside_is_taken_as_it_is() -> None:
    got = placed((10, 20, 30.126, 40))
    assert got.annotations[0].xyxy == (10, 20, 30.13, 40) and got.annotations[0].source == "human:ana"
    assert not got.refused and not got.warnings


def test_nobody_looked_is_not_nothing_there() -> None:
    assert place(ImageLabels(None), "a.jpg", (9, 9), (9, 9), 1, "human:ana").annotations is None
    assert placed().annotations == ()


def test_rounding_beyond_the_edge_is_cut_without_a_word() -> None:
    got = placed((-0.9, 10, 20, 80.5))
    assert got.annotations[0].xyxy == (0, 10, 20, 80) and not got.warnings


def test_a_box_mostly_inside_is_cut_with_a_warning() -> None:
    got = placed((60, 10, 130, 20))  # 40 of its 70 pixels of width are inside: 57 %
    assert got.annotations[0].xyxy == (60, 10, 100, 20)
    assert "leaves the picture of 100 x 80 pixels by 30.0" in got.warnings["l.txt line 1"]


@pytest.mark.parametrize(("box", "why"), [
    ((60, 10, 160, 20), "60% outside"), ((200, 10, 300, 20), "100% outside"), ((100.0, 10, 100.5, 20), "outside"),
    ((-50, -50, -1, -1), "100% outside"), ((30, 10, 20, 20), "no area"), ((30, 10, 30, 20), "no area"),
    ((math.nan, 1, 2, 3), "not a finite number"), ((0, 0, math.inf, 3), "not a finite number"),
    ((5, 5, 5.001, 9), "hundredth of a pixel"),
])
def test_a_box_that_cannot_be_is_refused_by_place_and_the_others_go_on(box: tuple[float, ...], why: str) -> None:
    got = placed((1, 1, 9, 9), box, (2, 2, 8, 8))
    assert [a.xyxy for a in got.annotations] == [(1, 1, 9, 9), (2, 2, 8, 8)]
    assert list(got.refused) == ["l.txt line 2"] and why in got.refused["l.txt line 2"]


def test_labels_made_for_another_size_are_refused_as_a_whole() -> None:
    got = placed((1, 1, 9, 9), claimed=(640, 480))
    assert got.annotations is None
    assert "640 x 480" in got.refused["l.txt (a.jpg)"] and "100 x 80" in got.refused["l.txt (a.jpg)"]


def test_a_repeated_box_is_taken_once() -> None:
    got = placed((1, 1, 9, 9), (1, 1, 9.001, 9))
    assert len(got.annotations) == 1 and "taken once" in got.warnings["l.txt line 2"]


def test_ids_depend_on_the_content_alone() -> None:
    first, again, moved = placed((1, 1, 9, 9)), placed((1, 1, 9, 9)), placed((1, 1, 9, 9.5))
    assert first.annotations[0].id == again.annotations[0].id != moved.annotations[0].id


@pytest.mark.parametrize("orientation", [1, 5, 6, 7, 8])
def test_boxes_drawn_on_the_unturned_file_turn_with_it(orientation: int) -> None:
    pixels = np.zeros((48, 64), np.uint8)
    pixels[5:15, 10:40] = 255  # the thing inside the box (10, 5, 40, 15)
    image = Image.fromarray(pixels)
    image.getexif()[0x0112] = orientation
    upright = np.asarray(ImageOps.exif_transpose(image))
    size = upright.shape[1::-1]
    labels = ImageLabels((LabelBox("cell", (10, 5, 40, 15), "l"),), size=(64, 48))
    got = place(labels, "a.jpg", size, (64, 48), orientation, "human:ana").annotations[0].xyxy
    rows, columns = np.flatnonzero(upright.any(axis=1)), np.flatnonzero(upright.any(axis=0))
    assert got == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)


def test_labels_of_a_picture_turned_by_half_are_taken_as_drawn_on_what_a_viewer_shows() -> None:
    labels = ImageLabels((LabelBox("cell", (10, 5, 40, 15), "l"),), size=(64, 48))
    assert place(labels, "a.jpg", (64, 48), (64, 48), 3, "human:ana").annotations[0].xyxy == (10, 5, 40, 15)


@given(st.lists(st.tuples(*[st.floats(-50, 150) | st.sampled_from([math.nan, math.inf, -1e308, 1e308])] * 4), max_size=5))
def test_whatever_is_placed_lies_inside(boxes: list[tuple[float, ...]]) -> None:
    got = placed(*boxes)
    for annotation in got.annotations:
        x1, y1, x2, y2 = annotation.xyxy
        assert 0 <= x1 < x2 <= 100 and 0 <= y1 < y2 <= 80
    repeated = sum("taken once" in text for text in got.warnings.values())
    assert len(got.annotations) + len(got.refused) + repeated == len(boxes)


def test_numbers_and_labels_are_read_without_guessing() -> None:
    assert number("2.5") == 2.5 and number(3) == 3
    assert all(math.isnan(number(value)) for value in (True, None, "x", [1], {"a": 1}))
    assert usable_label(" red cell ") == "red cell" and usable_label(7) == "7"
    assert usable_label("") is None and usable_label("a\nb") is None and usable_label(None) is None

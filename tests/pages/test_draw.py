"""Frames with boxes: colours stay with labels, human and machine boxes look different, boxes land where they belong."""

from __future__ import annotations

import numpy as np
from PIL import Image

from app.draw import PALETTE, colour_of, draw
from workbench.annotation import Annotation


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[start : start + 2], 16) for start in (1, 3, 5))


def test_a_label_keeps_its_colour_when_the_taxonomy_grows() -> None:
    assert colour_of("b", ("a", "b")) == colour_of("b", ("a", "b", "c")) == PALETTE[1]


def test_labels_of_one_taxonomy_have_different_colours_up_to_the_palette() -> None:
    labels = [f"label {number}" for number in range(len(PALETTE))]
    assert len({colour_of(label, labels) for label in labels}) == len(labels)


def test_a_label_outside_the_taxonomy_has_the_same_colour_every_time() -> None:
    assert colour_of("stray", ("a",)) == colour_of("stray", ("a", "b")) in PALETTE


def test_a_human_box_is_solid_and_a_machine_box_has_gaps() -> None:
    image = Image.new("RGB", (200, 100), "white")
    human = Annotation("a", (20, 40, 180, 90), source="human:anna")
    machine = Annotation("a", (20, 40, 180, 90), source="model:m@1", confidence=0.5)
    solid = np.asarray(draw(image, [human], ("a",)))[89, 30:170]
    dashed = np.asarray(draw(image, [machine], ("a",)))[90, 30:170]
    is_ink = [(row == rgb(PALETTE[0])).all(axis=1) for row in (solid, dashed)]
    assert is_ink[0].all()
    # 6 px of ink, 6 px of gap.
    assert 0.35 < is_ink[1].mean() < 0.65


def test_boxes_are_scaled_with_the_picture() -> None:
    image = Image.new("RGB", (960, 480), "white")
    small = draw(image, [Annotation("a", (480, 240, 960, 480), source="human:anna")], ("a",), width=480)
    pixels = np.asarray(small)
    assert small.size == (480, 240)
    assert tuple(pixels[180, 240]) == rgb(PALETTE[0])
    assert tuple(pixels[60, 60]) == (255, 255, 255)


def test_a_picture_is_never_enlarged_and_the_original_stays_as_it_is() -> None:
    image = Image.new("RGB", (64, 64), "white")
    drawn = draw(image, [Annotation("a", (8, 8, 40, 40), source="human:anna")], ("a",), width=480)
    assert drawn.size == (64, 64)
    assert np.asarray(image).min() == 255


def test_a_box_at_the_edge_and_a_label_in_another_script_are_drawn() -> None:
    image = Image.new("RGB", (64, 64), "white")
    drawn = draw(
        image,
        [
            Annotation("赤血球", (-0.4, -0.4, 64.4, 64.4), source="human:anna"),
            Annotation("tag", source="human:anna"),
            Annotation("p", polygon=((1, 1), (60, 2), (30, 60)), source="human:anna"),
        ],
    )
    assert np.asarray(drawn).min() < 255

"""Fitting an image into a model's input, and the way back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import Invalid
from workbench.inference.letterbox import letterbox


def grey(width: int, height: int, value: int = 200) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def test_the_image_lies_top_left_and_the_rest_is_grey() -> None:
    canvas, box = letterbox(grey(200, 100), (64, 64))
    # 64 / 200 = 0.32, so the image takes 64 x 32.
    assert canvas.shape == (64, 64, 3) and (canvas[:32] == 200).all() and (canvas[32:] == 114).all()
    assert box.scale == (0.32, 0.32) and box.offset == (0, 0) and box.image_size == (200, 100)


def test_the_image_lies_in_the_middle() -> None:
    canvas, box = letterbox(grey(200, 100), (64, 64), padding="centre", pad=7)
    assert (
        (canvas[16:48] == 200).all() and (canvas[:16] == 7).all() and (canvas[48:] == 7).all() and box.offset == (0, 16)
    )
    np.testing.assert_allclose(box.to_image(np.array([[0, 16, 64, 48]])), [[0, 0, 200, 100]])


def test_stretching_scales_each_side_on_its_own() -> None:
    canvas, box = letterbox(grey(200, 100), (64, 96), padding="stretch")
    assert (canvas == 200).all() and box.scale == (0.32, 0.96)
    np.testing.assert_allclose(box.to_image(np.array([[32, 48, 64, 96]])), [[100, 50, 200, 100]])


def test_boxes_are_cut_to_the_image_on_the_way_back() -> None:
    _, box = letterbox(grey(200, 100), (64, 64))
    np.testing.assert_allclose(box.to_image(np.array([[-5, -5, 70, 60]])), [[0, 0, 200, 100]])


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from(["topleft", "centre", "stretch"]),
       st.sampled_from([(64, 64), (416, 320), (33, 97)]), st.integers(0, 2**32 - 1))
def test_a_box_survives_the_trip_to_the_canvas_and_back(
    width: int, height: int, padding: str, size: tuple[int, int], seed: int
) -> None:
    corners = np.sort(np.random.default_rng(seed).uniform(0, 1, (4, 2, 2)), axis=1) * [width, height]
    boxes = corners.reshape(4, 4)
    canvas, box = letterbox(grey(width, height), size, padding)
    assert canvas.shape == (size[1], size[0], 3)
    on_canvas = box.to_canvas(boxes)
    assert (on_canvas >= 0).all() and (on_canvas <= np.array(size * 2) + 1e-9).all()
    np.testing.assert_allclose(box.to_image(on_canvas), boxes, atol=1e-9 * max(width, height))


def test_a_mark_is_found_again_where_it_was() -> None:
    image = grey(601, 403, 0)
    image[200:260, 300:390] = 255
    canvas, box = letterbox(image, (320, 320), padding="centre")
    rows, columns = np.nonzero((canvas == 255).all(axis=2))
    found = box.to_image(np.array([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]))
    # One canvas pixel is 1.88 image pixels, and interpolation may take one at each edge.
    np.testing.assert_allclose(found, [[300, 200, 390, 260]], atol=2 * 601 / 320)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((5, 5), np.uint8),
        np.zeros((5, 5, 4), np.uint8),
        np.zeros((5, 5, 3), np.float32),
        np.zeros((0, 5, 3), np.uint8),
    ],
    ids=["grey", "alpha", "float", "empty"],
)
def test_what_is_no_rgb_image_is_refused(image: np.ndarray) -> None:
    with pytest.raises(Invalid, match="uint8"):
        letterbox(image, (64, 64))


def test_a_wrong_padding_or_size_is_refused() -> None:
    with pytest.raises(Invalid, match="topleft"):
        letterbox(grey(4, 4), (64, 64), padding="left")
    with pytest.raises(Invalid, match="positive"):
        letterbox(grey(4, 4), (0, 64))


@pytest.mark.parametrize("padding", ["topleft", "centre", "stretch"])
def test_a_reduced_image_lies_where_the_whole_one_would(padding: str) -> None:
    whole, reduced = grey(1281, 721), grey(641, 361)
    canvas, box = letterbox(whole, (320, 256), padding)
    smaller, same = letterbox(reduced, (320, 256), padding, image_size=(1281, 721))
    assert same == box and (smaller == canvas).all()


def test_the_canvas_is_never_the_image_itself() -> None:
    image = grey(64, 64)
    canvas, _ = letterbox(image, (64, 64))
    canvas[:] = 0
    assert (image == 200).all()

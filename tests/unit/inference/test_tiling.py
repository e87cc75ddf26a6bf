"""Large frames piece by piece: where the tiles lie, and boxes of tiles as boxes of the frame."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from doubles import graphs
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.adapters.onnxruntime import OnnxRuntime
from workbench.boxes import Detections
from workbench.dataset import Frame
from workbench.errors import Invalid
from workbench.inference.detector import Detector
from workbench.inference.pipeline import detect_frames
from workbench.inference.tiling import Tiling, detect_tiles, merge

FRAME = (1000, 500)
LEFT, RIGHT = (0, 0, 600, 500), (400, 0, 1000, 500)  # two tiles that share 200 px


def found(*boxes: tuple[float, ...]) -> Detections:
    """Boxes as x1, y1, x2, y2, confidence and, where it is not 0, class id."""
    rows = [(*box, 0)[:6] for box in boxes]
    return Detections(np.array([row[:4] for row in rows], float).reshape(-1, 4), np.array([row[5] for row in rows]),
                      np.array([row[4] for row in rows]))


def merged(left: Detections, right: Detections, whole: Detections | None = None, iou: float = 0.5) -> list[list[float]]:
    views, every = [LEFT, RIGHT], [left, right]
    if whole is not None:
        views, every = [*views, (0, 0, *FRAME)], [*every, whole]
    result = merge(every, views, FRAME, iou)
    return [[*map(float, xyxy), round(float(score), 3)] for xyxy, score in zip(result.xyxy, result.confidence)]


def test_a_box_in_one_tile_comes_to_its_place_in_the_frame() -> None:
    assert merged(found((10, 20, 30, 40, 0.9)), found((300, 100, 340, 160, 0.8))) == [
        [10, 20, 30, 40, 0.9], [700, 100, 740, 160, 0.8]]


def test_an_object_that_both_tiles_see_whole_is_one_box() -> None:
    assert merged(found((450, 100, 550, 200, 0.7)), found((50, 101, 151, 200, 0.9))) == [[450, 101, 551, 200, 0.9]]


def test_objects_of_two_labels_in_one_place_stay_two() -> None:
    assert len(merged(found((450, 100, 550, 200, 0.7, 0)), found((50, 100, 150, 200, 0.9, 1)))) == 2


def test_the_part_a_tile_saw_goes_where_another_saw_the_whole_object() -> None:
    # The object spans 500..700: the left tile ends at 600 and is surer of its half than the right one of the whole.
    assert merged(found((500, 100, 599, 200, 0.95)), found((100, 100, 300, 200, 0.6))) == [[500, 100, 700, 200, 0.6]]


def test_an_object_wider_than_the_overlap_is_put_together_across_the_border() -> None:
    # It spans 300..800: 300..600 in the left tile, 400..800 in the right one, none sees all of it.
    assert merged(found((300, 100, 600, 200, 0.7)), found((0, 102, 400, 198, 0.8))) == [[300, 100, 800, 200, 0.8]]


def test_the_whole_frame_s_view_of_a_large_object_stands_for_its_parts() -> None:
    parts = found((300, 100, 600, 200, 0.9)), found((0, 102, 400, 198, 0.9))
    assert merged(*parts, found((298, 99, 805, 201, 0.5))) == [[298, 99, 805, 201, 0.5]]


def test_two_objects_beside_each_other_at_a_border_stay_two() -> None:
    # One above the other: they end at the tiles' borders, but span other stretches of it.
    assert len(merged(found((500, 100, 600, 180, 0.9)), found((0, 200, 150, 280, 0.9)))) == 2


def test_an_object_across_four_tiles_is_one_box() -> None:
    views = [(0, 0, 60, 60), (40, 0, 100, 60), (0, 40, 60, 100), (40, 40, 100, 100)]
    # It spans 20..80 both ways.
    parts = [found((20, 20, 60, 60, 0.5)), found((0, 20, 40, 60, 0.6)), found((20, 0, 60, 40, 0.7)),
             found((0, 0, 40, 40, 0.8))]
    result = merge(parts, views, (100, 100), 0.5)
    assert result.xyxy.tolist() == [[20, 20, 80, 80]] and result.confidence.tolist() == [pytest.approx(0.8)]


def test_a_box_at_the_frame_s_own_border_is_whole() -> None:
    # x2 = 1000 is the frame's border, and the object's end as far as anybody can see.
    assert merged(found(), found((500, 100, 600, 200, 0.9), (450, 100, 560, 200, 0.3)), iou=0.9) == [
        [900, 100, 1000, 200, 0.9], [850, 100, 960, 200, 0.3]]


def test_nothing_found_is_nothing() -> None:
    assert merged(found(), found()) == []


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(32, 900), st.floats(0, 0.9))
def test_tiles_cover_every_pixel_overlap_enough_and_end_with_the_frame(
    width: int, height: int, size: int, overlap: float
) -> None:
    tiles = Tiling(size, overlap).tiles(width, height)
    for sides, first, last in ((width, 0, 2), (height, 1, 3)):
        spans = sorted({(tile[first], tile[last]) for tile in tiles})
        assert spans[0][0] == 0 and spans[-1][1] == sides
        assert all(end - start == min(size, sides) for start, end in spans)
        # A pixel for rounding the step, one for rounding the places.
        assert all(end - following >= size * overlap - 2 for (_, end), (following, _) in zip(spans, spans[1:]))
    assert len(tiles) == len(set(tiles))


@pytest.mark.parametrize("wrong", [{"size": 16}, {"size": 640.5}, {"size": "640"}, {"size": True},
                                   {"size": 640, "overlap": 1.0}, {"size": 640, "overlap": -0.1},
                                   {"size": 640, "overlap": float("nan")}, {"size": 640, "overlap": "half"}], ids=str)
def test_a_tiling_that_makes_no_sense_is_refused(wrong: dict) -> None:
    with pytest.raises(Invalid, match="Tile"):
        Tiling(**wrong)


class TestOnAGraph:
    """The red finder sees a cell of 8 px of its 64 px input; its box reaches one cell around the cell's middle."""

    @pytest.fixture
    def detector(self, tmp_path: Path):
        card = graphs.red_finder(tmp_path)
        with Detector(card, tmp_path, lambda path: OnnxRuntime(path, threads=1)) as opened:
            yield opened

    def test_a_small_object_is_found_in_tiles_that_the_whole_frame_hides(self, detector: Detector) -> None:
        image = np.zeros((512, 512, 3), np.uint8)
        image[200:208, 304:312] = (255, 0, 0)  # one pixel of the canvas, an eighth of a cell
        assert len(detector.detect([image])[0]) == 0
        # Tiles begin at 0, 56, 112, ...: the square is half a cell of each, so its logits still exceed the threshold.
        tiled = detect_tiles(detector, image, Tiling(64, 0.125))
        assert len(tiled) == 1
        x1, y1, x2, y2 = tiled.xyxy[0]
        assert x1 <= 304 and y1 <= 200 and x2 >= 312 and y2 >= 208 and max(x2 - x1, y2 - y1) <= 32

    def test_a_frame_no_larger_than_a_tile_gives_what_it_gives_without_tiling(self, detector: Detector) -> None:
        image = np.zeros((100, 120, 3), np.uint8)
        image[20:60, 30:70] = (255, 0, 0)
        plain, tiled = detector.detect([image])[0], detect_tiles(detector, image, Tiling(128))
        assert len(plain) and (tiled.xyxy == plain.xyxy).all() and (tiled.confidence == plain.confidence).all()

    @pytest.mark.parametrize("batch", [1, 3])
    def test_frames_in_tiles_keep_their_order_and_bad_ones_fail_alone(self, detector: Detector, batch: int) -> None:
        import cv2
        image = np.zeros((128, 128, 3), np.uint8)
        image[16:24, 72:80] = (255, 0, 0)
        data = cv2.imencode(".png", image[:, :, ::-1])[1].tobytes()
        files = {"a": data, "b": b"nothing", "c": data}
        stream = detect_frames(detector, ((name, Frame(name, 128, 128, blob="0" * 32)) for name in files),
                               lambda one: files[one.name], batch=batch, tiling=Tiling(64, 0.0, whole=False))
        results = dict(stream)
        assert list(results) == ["a", "b", "c"] and "b cannot be decoded" in str(results["b"])
        # The square is the second cell of its tile in both directions: a box of 16 px around (76, 20).
        assert results["a"].xyxy.tolist() == results["c"].xyxy.tolist() == [[68, 12, 84, 28]]

    def test_a_model_that_draws_no_boxes_is_refused(self, detector: Detector) -> None:
        tags = replace(detector.card, decoder={"name": "classification"})
        detector.card = tags
        with pytest.raises(Invalid, match="only models that draw boxes"):
            detect_tiles(detector, np.zeros((128, 128, 3), np.uint8), Tiling(64))

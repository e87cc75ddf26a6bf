"""Masks from instance and semantic heads: shapes that are known exactly, through every letterbox and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from doubles import graphs
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from workbench.adapters.onnxruntime import OnnxRuntime
from workbench.boxes import Detections
from workbench.errors import Invalid
from workbench.inference.decode import decode
from workbench.inference.detector import Detector, check_card
from workbench.inference.letterbox import Letterbox, letterbox
from workbench.inference.masks import outlined, polygon_of
from workbench.model import InputSpec, ModelCard
from workbench.taxonomy import Taxonomy

LEAST = np.full(2, 0.3, np.float32)


def card(
    name: str, size: tuple[int, int] = (64, 64), labels: tuple[str, ...] = ("cat", "dog"), **decoder: Any
) -> ModelCard:
    return ModelCard(
        "m", "1", InputSpec(size), {"name": name, **decoder}, Taxonomy(labels), {"m.onnx": {"sha256": "0"}}
    )


def area(polygon: np.ndarray) -> float:
    x, y = polygon.T.astype(float)
    return abs((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) / 2


def whole(found: Any, one: ModelCard, box: Letterbox | None = None) -> Detections:
    box = box or Letterbox((1, 1), (0, 0), one.input.size)
    return outlined(one, found, np.arange(len(found)), box.to_image(found.xyxy), box)


def ellipse(
    box: Letterbox, canvas: tuple[int, int], stride: int, centre: tuple[float, float], radii: tuple[float, float]
) -> np.ndarray:
    """What a perfect mask head gives of an ellipse in the frame: (h, w) at the middles of its cells, above 0 inside."""
    xs = ((np.arange(canvas[0] // stride) + 0.5) * stride - box.offset[0]) / box.scale[0]
    ys = ((np.arange(canvas[1] // stride) + 0.5) * stride - box.offset[1]) / box.scale[1]
    far = np.hypot((xs[None, :] - centre[0]) / radii[0], (ys[:, None] - centre[1]) / radii[1])
    return (1 - far).astype(np.float32)


@settings(deadline=None, max_examples=60)
@given(
    width=st.integers(200, 1400),
    height=st.integers(200, 1000),
    padding=st.sampled_from(["topleft", "centre", "stretch"]),
    where=st.tuples(st.floats(0.35, 0.65), st.floats(0.35, 0.65)),
    size=st.tuples(st.floats(0.15, 0.3), st.floats(0.15, 0.3)),
)
def test_an_ellipse_comes_back_from_the_canvas_where_it_was(
    width: int, height: int, padding: str, where: tuple[float, float], size: tuple[float, float]
) -> None:
    _, box = letterbox(np.zeros((height, width, 3), np.uint8), (320, 256), padding)
    centre = where[0] * width, where[1] * height
    radii = size[0] * width, size[1] * height
    cell = 4 / min(box.scale)
    assume(min(radii) > 3 * cell)  # what a head of this resolution can show at all
    mask = ellipse(box, (320, 256), 4, centre, radii)
    xyxy = np.array([centre[0] - radii[0], centre[1] - radii[1], centre[0] + radii[0], centre[1] + radii[1]])
    polygon = polygon_of(mask, xyxy, box, (320, 256))
    # Between the middles of two cells the edge of a curve is straight, and corners are simplified by a pixel.
    assert area(polygon) == pytest.approx(np.pi * radii[0] * radii[1], rel=0.05)
    far = np.hypot(*((polygon - centre) / radii).T)
    assert (np.abs(far - 1) * min(radii) < 1.5 + 0.15 * cell).all()
    assert polygon.min() >= 0 and (polygon <= (width, height)).all()


def test_a_rectangle_of_whole_pixels_keeps_its_sides() -> None:
    mask = np.full((64, 64), -1, np.float32)
    mask[20:30, 8:40] = 1
    polygon = polygon_of(mask, np.array([0, 0, 64, 64]), Letterbox((1, 1), (0, 0), (64, 64)), (64, 64))
    # Interpolation rounds the corners of a mask that is -1 or 1: a few tenths of a pixel each.
    assert area(polygon) == pytest.approx(10 * 32, rel=0.04)
    np.testing.assert_allclose([*polygon.min(axis=0), *polygon.max(axis=0)], [8, 20, 40, 30], atol=0.26)


def test_the_border_of_a_letterbox_shifts_no_mask() -> None:
    # A frame of 200 x 100 in 64 x 64: scale 0.32, 16 px of border above and below; the mask covers the right half.
    _, box = letterbox(np.zeros((100, 200, 3), np.uint8), (64, 64), "centre")
    mask = np.where(np.arange(64)[None, :] >= 32, 1, -1) * np.ones((64, 1))
    polygon = polygon_of(mask, np.array([0, 0, 200, 100]), box, (64, 64))
    np.testing.assert_allclose([*polygon.min(axis=0), *polygon.max(axis=0)], [100, 0, 200, 100], atol=0.6)


def test_of_several_parts_the_largest_is_drawn_and_holes_are_closed() -> None:
    mask = np.full((64, 64), -1, np.float32)
    mask[2:8, 2:8] = mask[20:50, 20:50] = 1
    mask[30:35, 30:35] = -1
    polygon = polygon_of(mask, np.array([0, 0, 64, 64]), Letterbox((1, 1), (0, 0), (64, 64)), (64, 64))
    assert area(polygon) == pytest.approx(30 * 30, rel=0.02) and polygon.min() > 19


def seg(count: int = 84, prototypes: tuple[int, int] = (16, 16)) -> dict[str, np.ndarray]:
    """64 x 64 with strides 8, 16, 32 has 64 + 16 + 4 points; 2 labels, 3 masks' prototypes at stride 4."""
    return {
        "output0": np.zeros((1, 4 + 2 + 3, count), np.float32),
        "output1": np.zeros((1, 3, *prototypes), np.float32),
    }


def test_yolov8_seg_masks_are_mixed_from_prototypes_and_cut_to_their_box() -> None:
    outputs = seg()
    protos = outputs["output1"][0]
    protos[0] = -1
    protos[1, :, 8:] = 2  # right half
    protos[2, 8:] = 3  # lower half
    outputs["output0"][0, :, 5] = [40, 32, 32, 48, 0.1, 0.9, 1, 1, 0]  # 24..56 x 8..56, right half of the canvas
    outputs["output0"][0, :, 80] = [16, 40, 24, 32, 0.8, 0.1, 1, 0, 1]  # 4..28 x 24..56, lower half
    one = card("yolov8_seg")
    (found,) = decode(one, outputs, LEAST)
    done = whole(found, one)
    assert done.class_id.tolist() == [1, 0] and done.xyxy.tolist() == [[24, 8, 56, 56], [4, 24, 28, 56]]
    for polygon, box in zip(done.polygons, ([32, 8, 56, 56], [4, 32, 28, 56])):
        # The edge between -1 and 1 (or 2) lies within the cell of 4 px that the two middles span.
        np.testing.assert_allclose([*polygon.min(axis=0), *polygon.max(axis=0)], box, atol=2)
    lying = {**outputs, "output0": outputs["output0"].transpose(0, 2, 1)}
    again = whole(decode(one, lying, LEAST)[0], one)
    assert all((a == b).all() for a, b in zip(done.polygons, again.polygons))
    assert len(done[1:]) == 1 and (done[1:].polygons[0] == done.polygons[1]).all()


def test_an_instance_whose_mask_is_empty_is_left_out() -> None:
    outputs = seg()
    outputs["output1"][0, 0] = -1
    outputs["output0"][0, :, 5] = [40, 32, 32, 48, 0.1, 0.9, 1, 0, 0]
    one = card("yolov8_seg")
    (found,) = decode(one, outputs, LEAST)
    assert len(found) == 1 and len(whole(found, one)) == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda o: {**o, "output1": o["output1"][:, :2]},
        lambda o: {**o, "output1": np.zeros((1, 3, 16, 8), np.float32)},
        lambda o: {"output0": o["output0"]},
        lambda o: {**o, "output0": o["output0"][..., :80]},
        lambda o: {**o, "output1": np.zeros((1, 3, 1, 1), np.float32)},
    ],
)
def test_prototypes_that_do_not_fit_are_invalid(change: Any) -> None:
    with pytest.raises(Invalid, match="m.onnx of m@1 does not fit the yolov8_seg decoder"):
        decode(card("yolov8_seg"), change(seg()), LEAST)


def maps(channels: int) -> np.ndarray:
    """(1, channels, 16, 16): channel 1 is sure in a block of 4 x 6 cells, the last one in two blocks."""
    output = np.zeros((1, channels, 16, 16), np.float32)
    output[0, 0] = 4
    output[0, 1, 2:6, 3:9] = 8
    output[0, -1, 10:14, 0:4] = output[0, -1, 10:14, 8:16] = 9
    return output


def test_semantic_regions_are_connected_pieces_of_a_label() -> None:
    one = card("semantic")
    (found,) = decode(one, {"out": maps(3)}, LEAST)
    done = whole(found, one)
    # Cells of 4 px; equal certainty, so the larger region first.
    assert done.class_id.tolist() == [1, 1, 0]
    np.testing.assert_allclose(done.xyxy, [[32, 40, 64, 56], [0, 40, 16, 56], [12, 8, 36, 24]])
    shares = np.exp([4.0, 8.0, 9.0])
    assert done.confidence[2] == pytest.approx(shares[1] / (shares[0] + shares[1] + 1), abs=1e-5)
    for polygon, box in zip(done.polygons, done.xyxy):
        np.testing.assert_allclose([*polygon.min(axis=0), *polygon.max(axis=0)], box, atol=0.5)
        assert area(polygon) == pytest.approx(np.prod(box[2:] - box[:2]), rel=0.1)


def test_class_ids_and_logits_draw_the_same_regions() -> None:
    logits = maps(3)
    for ids in (logits.argmax(axis=1), logits.argmax(axis=1)[:, None]):
        (found,) = decode(card("semantic"), {"out": ids.astype(np.float32)}, LEAST)
        assert found.confidence.tolist() == [1, 1, 1] and found.class_id.tolist() == [1, 0, 1]


def test_without_a_background_every_pixel_has_a_label_and_with_columns_some_have_none() -> None:
    (found,) = decode(card("semantic"), {"out": maps(2)}, LEAST)
    assert sorted(found.class_id.tolist()) == [0, 1, 1, 1]  # the block of channel 1, and the two of the last: also 1
    (found,) = decode(card("semantic", columns=[1, 4]), {"out": maps(6)}, LEAST)
    assert found.class_id.tolist() == [0]
    ids = np.full((1, 16, 16), 255, np.float32)
    ids[0, :8] = 1
    (found,) = decode(card("semantic", background=None), {"out": ids}, LEAST)
    assert found.class_id.tolist() == [1] and found.xyxy.tolist() == [[0, 0, 64, 32]]


def test_one_channel_for_one_label_is_a_logit() -> None:
    output = np.full((1, 1, 16, 16), -3, np.float32)
    output[0, 0, 4:8, 4:8] = 2
    (found,) = decode(card("semantic", labels=("crack",)), {"out": output}, LEAST[:1])
    assert found.xyxy.tolist() == [[16, 16, 32, 32]]
    assert found.confidence[0] == pytest.approx(1 / (1 + np.exp(-2)))


def test_specks_are_no_regions() -> None:
    output = maps(3)
    output[0, 1, 0, 15] = 20  # one cell: 16 px of the canvas
    assert len(decode(card("semantic"), {"out": output}, LEAST)[0]) == 3
    assert len(decode(card("semantic", min_area=16), {"out": output}, LEAST)[0]) == 4


@pytest.mark.parametrize(
    "output",
    [
        np.zeros((1, 5, 16, 16)),
        np.zeros((1, 3, 16, 8)),
        np.zeros((1, 3)),
        np.full((1, 16, 16), 7),
        np.full((1, 16, 16), 0.5),
        np.full((1, 16, 16), -3),
    ],
    ids=["labels", "size", "axes", "ids too high", "no ids", "negative ids"],
)
def test_maps_that_do_not_fit_are_invalid(output: np.ndarray) -> None:
    with pytest.raises(Invalid, match="m.onnx of m@1"):
        decode(card("semantic"), {"out": output.astype(np.float32)}, LEAST)


def test_a_mask_of_nan_is_invalid() -> None:
    outputs = seg()
    outputs["output1"][0, 0, 3, 3] = np.nan
    with pytest.raises(Invalid, match="output1.*NaN"):
        decode(card("yolov8_seg"), outputs, LEAST)


def test_a_detector_draws_polygons_on_frames_of_any_size(tmp_path: Path) -> None:
    """Blobs of red in a picture of another shape than the input, through letterbox, graph, regions and back."""
    one = graphs.red_masks(tmp_path)
    image = np.zeros((180, 300, 3), np.uint8)
    cv2.ellipse(image, (90, 80), (50, 30), 0, 0, 360, (255, 0, 0), -1)
    cv2.rectangle(image, (200, 100), (259, 159), (0, 0, 255), -1)
    with Detector(one, tmp_path, lambda path: OnnxRuntime(path, threads=1)) as detector:
        (found,) = detector.detect([image])
    assert [one.labels.labels[class_id] for class_id in found.class_id] == ["blue", "red"]
    # Cells of 8 px in a canvas where the frame is 0.85 as large: within a cell's half.
    np.testing.assert_allclose(found.xyxy, [[200, 100, 260, 160], [40, 50, 140, 110]], atol=5)
    assert area(found.polygons[1]) == pytest.approx(np.pi * 50 * 30, rel=0.1)
    assert check_card(one, tmp_path, lambda path: OnnxRuntime(path, threads=1))["backend"] == "onnxruntime"

"""Stored files to detections: order, errors of single frames, bounded memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from doubles import graphs

from workbench.adapters.onnxruntime import OnnxRuntime
from workbench.boxes import Detections
from workbench.dataset import Frame
from workbench.errors import Invalid, NotFound, WorkbenchError
from workbench.inference.detector import Detector
from workbench.inference.pipeline import decode_image, detect_frames


def png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image[:, :, ::-1])[1].tobytes()


def frame(name: str, width: int = 64, height: int = 64) -> Frame:
    return Frame(name, width, height, blob="0" * 32)


@pytest.fixture
def detector(tmp_path: Path) -> Iterator[Detector]:
    card = graphs.red_finder(tmp_path)
    with Detector(card, tmp_path, lambda path: OnnxRuntime(path, threads=1)) as opened:
        yield opened


@pytest.fixture
def red() -> np.ndarray:
    image = np.zeros((64, 64, 3), np.uint8)
    image[8:16, 8:16] = (255, 0, 0)
    return image


@pytest.mark.parametrize("batch", [1, 3])
def test_results_come_in_the_order_of_the_frames_and_a_bad_one_is_its_error(
    detector: Detector, red: np.ndarray, batch: int
) -> None:
    files = {
        "a": png(red),
        "b": b"no image",
        "c": png(np.zeros((64, 64, 3), np.uint8)),
        "d": b"",
        "e": png(red[:32]),
        "f": png(red),
    }

    def read(one: Frame) -> bytes:
        time.sleep(0.02 if one.name in "ace" else 0)
        if one.name == "g":
            raise NotFound("Blob g is not there")
        return files[one.name]

    found = list(detect_frames(detector, ((name, frame(name)) for name in "abcdefg"), read, batch=batch))
    assert [key for key, _ in found] == list("abcdefg")
    counts = {key: len(one) if isinstance(one, Detections) else str(one) for key, one in found}
    assert counts["a"] == counts["f"] == 1 and counts["c"] == 0
    assert (
        "b cannot be decoded" in counts["b"]
        and "d cannot be decoded" in counts["d"]
        and counts["g"] == "Blob g is not there"
    )
    assert counts["e"] == "e is 64 x 32 px, its record says 64 x 64. Upload the frame again."


def test_no_more_images_wait_than_allowed(detector: Detector, red: np.ndarray) -> None:
    data, lock, read_so_far = png(red), threading.Lock(), []

    def read(one: Frame) -> bytes:
        with lock:
            read_so_far.append(one.name)
        return data

    for done, (_, found) in enumerate(
        detect_frames(detector, ((i, frame(str(i))) for i in range(200)), read, batch=2, ahead=5), 1
    ):
        assert len(found) == 1 and len(read_so_far) <= done + 2 + 5
    assert len(read_so_far) == 200


def test_who_stops_listening_stops_the_reading(detector: Detector, red: np.ndarray) -> None:
    data, seen = png(red), []
    stream = detect_frames(detector, ((i, frame(str(i))) for i in range(1000)), lambda one: seen.append(one) or data)
    next(stream)
    stream.close()
    assert len(seen) <= 1 + 8 + 1 and not [t for t in threading.enumerate() if t.name.startswith("decode")]


def test_a_fault_of_our_own_is_not_taken_for_a_bad_frame(detector: Detector) -> None:
    with pytest.raises(ZeroDivisionError):
        list(detect_frames(detector, [("a", frame("a"))], lambda one: 1 // 0))


def test_colours_and_depths_become_rgb() -> None:
    colour = np.zeros((4, 5, 3), np.uint8)
    colour[:, :, 0] = 250
    assert (decode_image(png(colour), "x") == colour).all()
    assert (
        decode_image(cv2.imencode(".png", np.full((4, 5), 7, np.uint8))[1].tobytes(), "x").tolist()
        == [[[7] * 3] * 5] * 4
    )
    deep = cv2.imencode(".png", np.full((4, 5, 4), 0x0A00, np.uint16))[1].tobytes()
    assert (decode_image(deep, "x") == 10).all()
    with pytest.raises(WorkbenchError, match="x cannot be decoded"):
        decode_image(b"\x89PNG\r\n\x1a\n", "x")


def test_the_exif_orientation_is_applied(tmp_path: Path) -> None:
    from PIL import Image
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter to the right
    Image.fromarray(np.zeros((10, 20, 3), np.uint8)).save(tmp_path / "turned.jpg", exif=exif)
    assert decode_image((tmp_path / "turned.jpg").read_bytes(), "turned.jpg").shape == (20, 10, 3)


def test_a_truncated_png_is_an_error() -> None:
    whole = png(np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8))
    with pytest.raises(Invalid, match="x cannot be decoded"):
        decode_image(whole[:40], "x")

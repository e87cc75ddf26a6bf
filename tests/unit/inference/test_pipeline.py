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
    frames = ((i, frame(str(i))) for i in range(1000))
    stream = detect_frames(detector, frames, lambda one: seen.append(one) or data, ahead=8)
    next(stream)
    stream.close()
    assert len(seen) <= 1 + 8 + 1 and not [t for t in threading.enumerate() if t.name.startswith("detect")]


def test_a_stream_nobody_closes_may_end_in_one_of_its_own_threads(detector: Detector, red: np.ndarray) -> None:
    """Python collects a forgotten generator in whatever thread happens to run; this one must not wait for itself."""
    data, streams, ended, errors = png(red), [], threading.Event(), []

    def read(one: Frame) -> bytes:
        if one.name == "3":
            try:
                until = time.monotonic() + 60
                while streams[0].gi_running and time.monotonic() < until:
                    time.sleep(0.001)
                streams.pop().close()
            except Exception as error:
                errors.append(error)
            ended.set()
        return data

    streams.append(detect_frames(detector, ((i, frame(str(i))) for i in range(8)), read, threads=2, ahead=8))
    next(streams[0])
    assert ended.wait(60) and errors == []


def test_no_frames_give_no_results(detector: Detector) -> None:
    assert list(detect_frames(detector, [], lambda one: b"")) == []


@pytest.mark.parametrize(("batch", "threads"), [(1, 1), (1, 3), (4, 2)])
def test_a_frame_gets_the_same_boxes_whoever_comes_before_it(
    detector: Detector, red: np.ndarray, batch: int, threads: int
) -> None:
    rng = np.random.default_rng(0)
    files = {str(i): png(np.maximum(red, rng.integers(0, 90, (64, 64, 3)).astype(np.uint8))) for i in range(11)}

    def detected(names: list[str]) -> dict[str, bytes]:
        stream = detect_frames(detector, ((name, frame(name)) for name in names), lambda one: files[one.name],
                               batch=batch, threads=threads)
        return {name: found.xyxy.tobytes() + found.confidence.tobytes() for name, found in stream}

    every = detected(list(files))
    assert len(every) == 11 and all(every.values())
    assert detected(list(files)[7:]) == {name: every[name] for name in list(files)[7:]}
    assert detected(list(files)) == every


def test_the_sink_may_be_slow_without_holding_the_model_up(detector: Detector, red: np.ndarray) -> None:
    data, seen = png(red), []
    frames = ((i, frame(str(i))) for i in range(60))
    stream = detect_frames(detector, frames, lambda one: seen.append(one) or data, ahead=40)
    next(stream)
    until = time.monotonic() + 60
    while len(seen) < 40 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(seen) >= 40
    stream.close()


def jpeg(image: np.ndarray, orientation: int = 1) -> bytes:
    import io

    from PIL import Image
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(image).save(file, "JPEG", quality=95, exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_decoded_at_a_fraction_gives_the_boxes_of_the_whole_one(detector: Detector, orientation: int) -> None:
    # 8 times the model's input: decoded at 1/8. Orientation 6 turns the stored image a quarter to the right.
    image = np.zeros((512, 512, 3), np.uint8)
    image[64:128, 192:256] = (255, 0, 0)
    stored = image if orientation == 1 else np.rot90(image)
    ((_, found),) = detect_frames(detector, [("a", frame("a", 512, 512))], lambda one: jpeg(stored, orientation))
    assert found.xyxy.shape == (1, 4)
    # The cell with the red square, and a cell of 64 px around its middle: the head's own answer for a whole image.
    np.testing.assert_allclose(found.xyxy[0], [160, 32, 288, 160], atol=0.5)
    assert (detector.detect([image])[0].xyxy == found.xyxy).all()


def test_the_recorded_size_is_checked_also_where_a_jpeg_is_decoded_at_a_fraction(detector: Detector) -> None:
    data = jpeg(np.zeros((721, 1281, 3), np.uint8))
    sizes = {"right": (1281, 721), "a pixel less": (1280, 721), "turned": (721, 1281)}
    stream = detect_frames(detector, ((name, frame(name, *size)) for name, size in sizes.items()), lambda one: data)
    found = dict(stream)
    assert len(found["right"]) == 0
    assert "is 1281 x 721 px, its record says 1280 x 721" in str(found["a pixel less"])
    assert "is 1281 x 721 px, its record says 721 x 1281" in str(found["turned"])


def test_damaged_odd_and_dangerous_files_are_failed_items_and_the_others_go_on(
    detector: Detector, red: np.ndarray
) -> None:
    import struct
    import zlib
    whole = jpeg(np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8))
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + head + struct.pack(">I", zlib.crc32(b"IHDR" + head))
    files = {"good.jpg": png(red), "cut.jpg": whole[:len(whole) // 2], "bomb.png": bomb, "text.jpg": b"<html>no image",
             "one.png": png(np.zeros((1, 1, 3), np.uint8)), "header.jpg": whole[:30], "last.png": png(red)}
    sizes = {"bomb.png": (60_000, 60_000), "one.png": (1, 1)}
    frames = [(name, frame(name, *sizes.get(name, (64, 64)))) for name in files]
    found = dict(detect_frames(detector, frames, lambda one: files[one.name]))
    assert len(found["good.jpg"]) == len(found["last.png"]) == 1  # a PNG named .jpg is a PNG
    assert len(found["one.png"]) == 0
    assert "cut.jpg cannot be decoded" in str(found["cut.jpg"]) and "header.jpg cannot be" in str(found["header.jpg"])
    assert "text.jpg cannot be decoded" in str(found["text.jpg"])
    assert "bomb.png is 60000 x 60000 px, more than the 50 megapixels" in str(found["bomb.png"])


def test_an_output_that_is_not_a_number_stops_the_run_and_names_the_model(tmp_path: Path, red: np.ndarray) -> None:
    from dataclasses import replace

    from onnx import helper

    from workbench.inference.graph import file_record
    nodes = [helper.make_node("Cast", ["images"], ["x"], to=1),
             helper.make_node("ReduceMean", ["x"], ["m"], keepdims=0),
             helper.make_node("Sub", ["m", "m"], ["nought"]), helper.make_node("Div", ["nought", "nought"], ["nan"]),
             helper.make_node("Expand", ["nan", "shape"], ["output"])]
    graphs.save(tmp_path / "nan.onnx", nodes, {"images": ([1, 64, 64, 3], "uint8")}, ["output"],
                {"shape": np.array([1, 64, 7], np.int64)})
    card = replace(graphs.red_finder(tmp_path), decoder={"name": "yolox", "strides": [8]},
                   files={"nan.onnx": file_record(tmp_path / "nan.onnx")})
    with Detector(card, tmp_path, lambda path: OnnxRuntime(path, threads=1)) as broken:
        with pytest.raises(Invalid, match="nan.onnx.*NaN"):
            list(detect_frames(broken, [("a", frame("a"))], lambda one: png(red)))


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

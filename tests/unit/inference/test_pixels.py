"""Pixels: that the quick way to decode a JPEG gives what OpenCV gives, and leaves to it what is not plain."""

from __future__ import annotations

import io
import random

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from workbench.errors import Invalid
from workbench.inference.pixels import REDUCED, decode_frame, decode_image, decode_rgb

PICTURE = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (61, 83, 3), np.uint8), (5, 5), 0)


def jpeg(mode: str = "RGB", picture: np.ndarray = PICTURE, **settings: object) -> bytes:
    written = io.BytesIO()
    Image.fromarray(picture).convert(mode).save(written, "JPEG", **settings)
    return written.getvalue()


def by_opencv(data: bytes) -> np.ndarray | None:
    found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    return None if found is None else found[..., ::-1]


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return jpeg(exif=exif.tobytes())


@pytest.mark.parametrize("data", [
    *(jpeg(quality=quality, subsampling=sampling) for quality in (30, 80, 100) for sampling in (0, 1, 2)),
    jpeg(progressive=True), jpeg("L"), jpeg(restart_marker_blocks=3), jpeg(keep_rgb=True), jpeg(comment=b"of a camera"),
    jpeg("CMYK"), *(turned(orientation) for orientation in range(1, 9)),
    jpeg(picture=PICTURE[:1, :1]), jpeg(picture=PICTURE[:17, :1]), jpeg() + b"bytes behind the end"])
def test_a_jpeg_has_the_pixels_that_opencv_gives(data: bytes) -> None:
    np.testing.assert_array_equal(decode_image(data, "a.jpg"), by_opencv(data))


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("size", [(640, 480), (333, 251), (1280, 721)])
def test_a_reduced_jpeg_has_the_pixels_that_opencv_gives(size: tuple[int, int], factor: int) -> None:
    data = jpeg(picture=cv2.resize(PICTURE, size))
    expected = cv2.imdecode(np.frombuffer(data, np.uint8), REDUCED[factor])[..., ::-1]
    least = (expected.shape[1], expected.shape[0])
    np.testing.assert_array_equal(decode_frame(data, "a.jpg", size, least), expected)


def test_plain_jpegs_take_the_quick_way_and_turned_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    quick, whole = [], simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *given, **named: quick.append(given) or whole(*given, **named))
    for data, count in ((jpeg(), 1), (jpeg("L"), 2), (turned(6), 2), (jpeg("CMYK"), 2)):
        decode_image(data, "a.jpg")
        assert len(quick) == count
    assert decode_frame(turned(6), "a.jpg", (61, 83)).shape == (83, 61, 3) and len(quick) == 2


def test_a_damaged_jpeg_ends_as_it_does_with_opencv() -> None:
    chance, data = random.Random(0), jpeg(quality=90)
    refused = 0
    for number in range(300):
        broken = bytearray(data[:chance.randrange(4, len(data))] if number % 3 == 0 else data)
        for _ in range(chance.randrange(1, 6)):
            broken[chance.randrange(2, len(broken))] = chance.randrange(256)
        try:
            expected = by_opencv(bytes(broken))
        except cv2.error:
            with pytest.raises(cv2.error):
                decode_rgb(bytes(broken))
            continue
        found = decode_rgb(bytes(broken))
        assert (found is None) == (expected is None)
        if expected is not None:
            np.testing.assert_array_equal(found, expected)
        refused += expected is None
    assert refused  # some were no pictures any more


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"\xff\xd8\xff\xc0\x00\x0b\x08", jpeg()[:200], b"\xff\xd8" + b"\xff" * 100])
def test_what_is_no_whole_jpeg_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(Invalid, match="a.jpg cannot be decoded"):
        decode_image(data, "a.jpg")

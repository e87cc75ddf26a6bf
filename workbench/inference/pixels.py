"""Image files to pixels: their size from the header, decoded whole or, where less will do, at a fraction of it."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator

import cv2
import numpy as np
import simplejpeg

from workbench.errors import Invalid
from workbench.formats.limits import Limits

# libjpeg gives an image at a half, a quarter or an eighth almost for the price of its entropy decoding (libjpeg.txt,
# scale_denom); each side is rounded up.
REDUCED = {8: cv2.IMREAD_REDUCED_COLOR_8, 4: cv2.IMREAD_REDUCED_COLOR_4, 2: cv2.IMREAD_REDUCED_COLOR_2}
# Markers C0..CF start a frame and hold its size, but for DHT, JPG and DAC (ITU T.81, table B.1).
FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def decode_image(data: bytes, name: str) -> np.ndarray:
    """An image file's bytes -> (H, W, 3) uint8 RGB, upright (its EXIF orientation applied).

    Raises Invalid for what is no image, is damaged, or has more pixels than an upload may have: that is told from the
    header, before anything is decoded.
    """
    _stored_size(data, name)
    return _decoded(data, name)


def decode_frame(data: bytes, name: str, size: tuple[int, int], least: tuple[int, int] | None = None) -> np.ndarray:
    """The same for a frame whose upright (width, height) is known; a JPEG may come reduced to 1/2, 1/4 or 1/8.

    least  (width, height) that the result must have at least, None: the whole image

    A result smaller than `size` shows the whole image. Raises Invalid also when the image has another size.
    """
    stored = _stored_size(data, name)
    if stored != size and stored != size[::-1]:
        raise _other_size(name, stored, size)
    factor = 1
    # Turned or not cannot be told from the result where both sides shrink to the same number of pixels.
    if least is not None and data.startswith(b"\xff\xd8"):
        factor = next((by for by in REDUCED if all(
            _shrunk(side, by) >= need for side, need in zip(size, least)) and (
            size[0] == size[1] or _shrunk(size[0], by) != _shrunk(size[1], by))), 1)
    image = _decoded(data, name, factor)
    found = (image.shape[1], image.shape[0])
    if found != tuple(_shrunk(side, factor) for side in size):
        raise _other_size(name, stored[::-1] if stored == size else stored, size)
    return image


def image_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) that an image file's header tells, before its EXIF orientation is applied; None for no image."""
    if data.startswith(b"\xff\xd8"):
        return _jpeg_size(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return struct.unpack(">II", data[16:24]) if data[12:16] == b"IHDR" and len(data) >= 24 else None
    from PIL import Image
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except Exception:  # readers of damaged headers raise nearly anything; the caller says which file it is
        return None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    for marker, at in _jpeg_segments(data):
        if marker in FRAME_MARKERS:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height
    return None


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether a file is a JPEG of 8 bits in grey or three colours that nothing turns: what libjpeg-turbo decodes to the
    very pixels that OpenCV gives, in less than half of the time, for the JPEG library inside OpenCV's wheels is built
    without SIMD (4.14 and 5.0, x86-64)."""
    if not data.startswith(b"\xff\xd8"):
        return False
    for marker, at in _jpeg_segments(data):
        if marker in FRAME_MARKERS:
            return len(data) > at + 9 and data[at + 4] == 8 and data[at + 9] in (1, 3)
        if marker == 0xE1 and data[at + 4:at + 8] == b"Exif":
            return False
    return False


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """(marker, where it begins) of a JPEG's segments up to the header of its frame."""
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        yield marker, at
        if marker in FRAME_MARKERS:
            return
        # FF may be repeated to fill up; 01 and D0..D8 stand alone; the others say how long they are.
        at += 1 if marker == 0xFF else 2 if marker == 0x01 or 0xD0 <= marker <= 0xD8 else (
            2 + struct.unpack_from(">H", data, at + 2)[0])


def _stored_size(data: bytes, name: str) -> tuple[int, int]:
    size = image_size(data)
    if size is None or min(size) < 1:
        raise Invalid(f"{name} cannot be decoded as an image. Upload the file again.")
    most = Limits().pixels
    if size[0] * size[1] > most:
        raise Invalid(f"{name} is {size[0]} x {size[1]} px, more than the {most / 1e6:.0f} megapixels allowed; make it "
                      "smaller.")
    return size


def _decoded(data: bytes, name: str, factor: int = 1) -> np.ndarray:
    try:
        pixels = decode_rgb(data, factor)
    except cv2.error as error:
        raise Invalid(f"{name} cannot be decoded as an image: {error.err}. Upload the file again.") from error
    if pixels is None:
        raise Invalid(f"{name} cannot be decoded as an image, or ends too early. Upload the file again.")
    return pixels


def decode_rgb(data: bytes, factor: int = 1) -> np.ndarray | None:
    """(H, W, 3) uint8 RGB as OpenCV decodes an image file, whose size is known to be sensible; None or cv2.error for what
    is none.

    factor  2, 4, 8: a JPEG comes reduced by so much
    """
    if _is_plain_jpeg(data):
        width, height = (_shrunk(side, factor) if factor > 1 else 0 for side in _jpeg_size(data))
        try:
            return simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
        except ValueError:
            pass  # damaged or unusual: OpenCV decides what becomes of it
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), REDUCED.get(factor, cv2.IMREAD_COLOR))
    return None if pixels is None else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def _shrunk(side: int, factor: int) -> int:
    return -(-side // factor)


def _other_size(name: str, found: tuple[int, int], size: tuple[int, int]) -> Invalid:
    return Invalid(f"{name} is {found[0]} x {found[1]} px, its record says {size[0]} x {size[1]}. Upload the frame "
                   "again.")

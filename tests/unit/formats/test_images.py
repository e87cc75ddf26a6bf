"""Image files that strangers send."""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from workbench.errors import Invalid
from workbench.formats.images import looks_like_image, read_image
from workbench.formats.limits import Limits


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def photograph(width: int = 64, height: int = 48) -> Image.Image:
    """Red at the top left, blue elsewhere: a turned one shows."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 2] = 200
    pixels[: height // 2, : width // 2] = (220, 20, 20)
    return Image.fromarray(pixels)


def pixels_of(data: bytes) -> np.ndarray:
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_an_upright_image_is_stored_byte_for_byte(kind: str) -> None:
    data = encoded(photograph(), kind)
    picture = read_image(data, {"JPEG": ".JPG"}.get(kind, "." + kind.lower()))
    assert (picture.data, picture.size, picture.orientation, picture.notes) == (data, (64, 48), 1, ())


def test_a_grey_jpeg_is_stored_byte_for_byte() -> None:
    data = encoded(photograph().convert("L"), "JPEG")
    assert read_image(data, ".jpg").data == data


def test_a_file_of_zero_bytes_is_refused() -> None:
    with pytest.raises(Invalid, match="0 bytes"):
        read_image(b"", ".jpg")


@pytest.mark.parametrize("data", [b"%PDF-1.7 this is no image", b"x", b"<svg></svg>", bytes(1000)])
def test_what_is_not_an_image_is_refused(data: bytes) -> None:
    with pytest.raises(Invalid, match="is not an image"):
        read_image(data, ".jpg")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.98])
def test_a_truncated_image_is_refused(kind: str, share: float) -> None:
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 120, 3), np.uint8)), kind)
    with pytest.raises(Invalid, match="damaged or truncated|is not an image"):
        read_image(data[: int(len(data) * share)], "." + kind.lower())


def test_a_truncated_progressive_jpeg_is_refused() -> None:
    data = encoded(photograph(300, 200), "JPEG", progressive=True)
    with pytest.raises(Invalid, match="damaged or truncated"):
        read_image(data[:-40], ".jpg")


def png_header(width: int, height: int, depth: int = 8) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(10_000, 10_000), (60_000, 60_000)])
def test_a_hundred_megapixels_are_refused_by_the_header_alone(width: int, height: int) -> None:
    with pytest.raises(Invalid, match="megapixels"):
        read_image(png_header(width, height), ".png")


def test_the_pixel_limit_can_be_set() -> None:
    data = encoded(photograph(100, 100), "JPEG")
    assert read_image(data, ".jpg", Limits(pixels=10_000)).size == (100, 100)
    with pytest.raises(Invalid, match=r"100 x 100 .* make it smaller"):
        read_image(data, ".jpg", Limits(pixels=9_999))


def test_a_file_beyond_the_byte_limit_is_refused() -> None:
    with pytest.raises(Invalid, match="MiB allowed"):
        read_image(bytes(2 << 20), ".jpg", Limits(image_bytes=1 << 20))


def test_the_content_wins_over_a_wrong_suffix_and_is_told() -> None:
    data = encoded(photograph(), "PNG")
    picture = read_image(data, ".jpg")
    assert picture.data == data
    assert picture.notes == ("is a PNG image although its name ends in .jpg; read by its content.",)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_a_turned_image_is_stored_as_every_viewer_shows_it(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photograph(), kind, exif=exif.tobytes(), **({"quality": 95} if kind == "JPEG" else {}))
    shown = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
             5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
             8: lambda a: np.rot90(a)}[orientation](np.asarray(photograph()))
    picture = read_image(data, {"TIFF": ".tif", "JPEG": ".jpg"}.get(kind, ".png"))
    stored = pixels_of(picture.data)
    assert picture.orientation == orientation and picture.size == shown.shape[1::-1] == stored.shape[1::-1]
    assert picture.file_size == (64, 48)
    # two JPEG encodings at quality 95 move a flat colour by a few levels; a wrong turn moves it by 180
    assert np.abs(stored.astype(int) - shown).mean() < (4 if kind == "JPEG" else 0.01)
    assert Image.open(io.BytesIO(picture.data)).getexif().get(0x0112, 1) == 1
    assert (picture.data == data) == (orientation == 1 and kind != "TIFF")


def test_a_meaningless_orientation_is_no_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 42
    data = encoded(photograph(), "JPEG", exif=exif.tobytes())
    assert read_image(data, ".jpg").data == data


def test_cmyk_becomes_rgb_and_is_told() -> None:
    picture = read_image(encoded(photograph().convert("CMYK"), "JPEG", quality=95), ".jpg")
    assert Image.open(io.BytesIO(picture.data)).mode == "RGB" and "CMYK" in picture.notes[0]
    assert np.abs(pixels_of(picture.data).astype(int) - np.asarray(photograph())).mean() < 6  # two JPEG encodings


@pytest.mark.parametrize("shape", [(20, 30), (20, 30, 3)])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_are_refused_so_that_nobody_guesses_the_contrast(shape: tuple[int, ...], suffix: str) -> None:
    data = cv2.imencode(suffix, np.full(shape, 40_000, np.uint16))[1].tobytes()
    with pytest.raises(Invalid, match="16 bits a channel"):
        read_image(data, suffix)


def test_floating_point_tiff_is_refused() -> None:
    with pytest.raises(Invalid, match="32 bits a channel"):
        read_image(cv2.imencode(".tif", np.ones((10, 10), np.float32))[1].tobytes(), ".tif")


def test_a_palette_image_is_stored_as_it_is() -> None:
    data = encoded(photograph().quantize(16), "PNG")
    assert read_image(data, ".png").data == data


def test_opaque_alpha_is_stored_as_it_is_and_real_transparency_on_white() -> None:
    opaque = encoded(photograph().convert("RGBA"), "PNG")
    assert read_image(opaque, ".png").data == opaque
    half = photograph().convert("RGBA")
    half.paste((0, 0, 0, 0), (0, 0, 10, 10))
    picture = read_image(encoded(half, "PNG"), ".png")
    assert tuple(pixels_of(picture.data)[5, 5]) == (255, 255, 255) and "transparent" in picture.notes[0]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_is_refused(kind: str) -> None:
    frames = [photograph(), photograph().transpose(Image.Transpose.ROTATE_180)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(Invalid, match="more than one picture"):
        read_image(data, "." + kind.lower())


@pytest.mark.parametrize(("kind", "suffix"), [("GIF", ".gif"), ("TIFF", ".tiff")])
def test_what_browsers_cannot_show_is_stored_as_png(kind: str, suffix: str) -> None:
    picture = read_image(encoded(photograph(), kind), suffix)
    assert picture.data.startswith(b"\x89PNG") and kind in picture.notes[0]
    assert np.array_equal(pixels_of(picture.data), np.asarray(photograph()))


def test_a_camera_s_multi_picture_jpeg_is_one_photograph() -> None:
    data = encoded(photograph(), "MPO", save_all=True, append_images=[photograph(32, 24)])
    picture = read_image(data, ".jpg")
    assert picture.data == data and picture.size == (64, 48)


def test_images_are_known_by_their_first_bytes() -> None:
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF"):
        assert looks_like_image(encoded(photograph(), kind)[:16])
    assert not looks_like_image(b'{"images": []}')

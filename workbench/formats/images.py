"""Reads one image file that a stranger sent: its bytes as they will be stored, upright, or the reason why not."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from workbench.blobs import Digests
from workbench.dataset import Frame
from workbench.errors import Invalid
from workbench.formats.limits import Limits

# What is read, and how its files may end. MPO is a JPEG followed by previews, as many cameras write it.
SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"), "MPO": (".jpg", ".jpeg", ".mpo"), "PNG": (".png",),
    "BMP": (".bmp", ".dib"), "WEBP": (".webp",), "TIFF": (".tif", ".tiff"), "GIF": (".gif",),
}
OPENED = tuple(kind for kind in SUFFIXES if kind != "MPO")  # Pillow opens an MPO as a JPEG first
IMAGE_SUFFIXES = frozenset(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*", b"GIF8")
ORIENTATION_TAG = 0x0112
# The highest quality before a JPEG grows much faster than it gains (libjpeg's own advice, usage.txt).
JPEG_QUALITY = 95
# Neither OpenCV nor browsers read every TIFF and GIF.
NOT_STORED = ("TIFF", "GIF")


@dataclass(frozen=True)
class Picture:
    """A readable image.

    data         the bytes to store: the file's own, unless it had to be turned or converted
    size         (width, height) in pixels, upright
    file_size    (width, height) as the file had it, before it was turned
    orientation  the EXIF orientation the file had, 1..8
    notes        what a person should know about it, a sentence each
    """

    data: bytes
    size: tuple[int, int]
    file_size: tuple[int, int]
    orientation: int
    notes: tuple[str, ...] = ()


def looks_like_image(head: bytes) -> bool:
    """Whether the first 16 bytes are those of an image, whatever the file is called."""
    return head.startswith(MAGIC) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def read_image(data: bytes, suffix: str, limits: Limits = Limits()) -> Picture:
    """Checks every byte of an image by decoding it; an upright 8-bit RGB or grey one is stored byte for byte.

    suffix  how the file's name ends (".jpg"): content wins, a wrong suffix gives a note
    Raises Invalid with the reason (without the file's name) when it is no image, damaged, too large, animated, or has
    more than 8 bits a channel.
    """
    if not data:
        raise Invalid("the file has 0 bytes; copy it again from where it came.")
    if len(data) > limits.image_bytes:
        raise Invalid(f"the file has more than the {limits.image_bytes / 2**20:.0f} MiB allowed for an image; make it "
                      "smaller.")
    try:
        with Image.open(io.BytesIO(data), formats=OPENED) as image:
            return _read(image, data, suffix.lower(), limits)
    except Invalid:
        raise
    except UnidentifiedImageError as error:
        raise Invalid("is not an image (JPEG, PNG, BMP, WebP, TIFF or GIF), whatever its name says.") from error
    except (Image.DecompressionBombError, MemoryError) as error:
        raise Invalid(f"has far more than the {limits.pixels / 1e6:.0f} megapixels allowed; make it "
                      "smaller.") from error
    except Exception as error:  # decoders of damaged bytes raise nearly anything: OSError, SyntaxError, struct.error
        raise Invalid(f"is damaged or truncated ({str(error) or type(error).__name__}); copy it again from where it "
                      "came.") from error


def read_file(file: Path, limits: Limits = Limits()) -> Picture:
    """Likewise for a file; Invalid also when it cannot be opened."""
    try:
        # Asked first: read(n) sets n bytes aside at once, however small the file is.
        size = min(file.stat().st_size, limits.image_bytes)
        with file.open("rb") as opened:
            data = opened.read(size + 1)
    except OSError as error:
        raise Invalid(f"cannot be read ({error.strerror}); check its permissions.") from error
    return read_image(data, file.suffix, limits)


def frame_of(name: str, picture: Picture, made: Digests) -> Frame:
    """The record of a picture whose bytes have those digests."""
    return Frame(name, *picture.size, blob=made.md5, sha256=made.sha256, size_bytes=made.size_bytes,
                 orientation=picture.orientation)


def _read(image: Image.Image, data: bytes, suffix: str, limits: Limits) -> Picture:
    kind, size = image.format, image.size
    if size[0] * size[1] > limits.pixels:
        raise Invalid(f"has {size[0]} x {size[1]} = {size[0] * size[1] / 1e6:.0f} megapixels, more than the "
                      f"{limits.pixels / 1e6:.0f} allowed; make it smaller.")
    if _bits(image, data) > 8:
        raise Invalid(f"has {_bits(image, data)} bits a channel; convert it to 8 bits, so that you choose the "
                      "contrast.")
    if kind != "MPO" and getattr(image, "is_animated", False):
        raise Invalid("holds more than one picture (an animation or a multi-page file); save each as an image of its "
                      "own.")
    notes = []
    if suffix not in SUFFIXES[kind]:
        notes.append(f"is a {kind} image although its name ends in {suffix or 'nothing'}; read by its content.")
    orientation = _orientation(image)
    if kind == "TIFF" and orientation >= 5:
        size = size[::-1]  # Pillow tells the turned size of these, and turns them itself when it loads them
    if kind in ("JPEG", "MPO") and orientation == 1 and image.mode in ("RGB", "L"):
        # An eighth of the size is decoded: all bytes are still read and checked, in less than half of the time.
        image.draft(None, (1, 1))
        image.load()
        return Picture(data, size, size, 1, tuple(notes))
    image.load()
    upright = ImageOps.exif_transpose(image) if orientation != 1 else image
    if upright.mode == "CMYK":
        upright = upright.convert("RGB")
        notes.append("had CMYK colours for print; stored as RGB.")
    if upright.has_transparency_data and (shown := _without_alpha(upright)) is not None:
        upright = shown
        notes.append("had transparent parts; stored on white.")
    if kind in NOT_STORED:
        notes.append(f"was a {kind} file; its pixels are stored as PNG.")
    if orientation == 1 and kind not in NOT_STORED and upright is image:
        return Picture(data, size, size, 1, tuple(notes))
    return Picture(_encode(upright, kind), upright.size, size, orientation, tuple(notes))


def _bits(image: Image.Image, data: bytes) -> int:
    """Bits a channel as the file has them: Pillow silently cuts 16-bit RGB to 8."""
    if image.format == "PNG":
        return data[24]  # IHDR's bit depth (PNG specification, 11.2.2)
    if image.format == "TIFF":
        bits = image.tag_v2.get(258, (1,))  # BitsPerSample (TIFF 6.0, section 8)
        return max(bits) if isinstance(bits, tuple) else int(bits)
    return 8


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # a damaged EXIF block harms no pixel; every viewer shows such a file unturned
        return 1
    return found if found in range(2, 9) else 1


def _without_alpha(image: Image.Image) -> Image.Image | None:
    """The image on white, or None when nothing in it is transparent."""
    rgba = image.convert("RGBA")
    if rgba.getchannel("A").getextrema()[0] == 255:
        return None
    canvas = Image.new("RGBA", rgba.size, "white")
    canvas.alpha_composite(rgba)
    return canvas.convert("RGB")


def _encode(image: Image.Image, kind: str) -> bytes:
    out = io.BytesIO()
    if kind in ("JPEG", "MPO"):
        image.save(out, "JPEG", quality=JPEG_QUALITY, subsampling=0, exif=b"")
    else:
        plain = image if image.mode in ("1", "L", "RGB", "P") else image.convert("RGB")
        plain.save(out, "PNG", exif=b"")
    return out.getvalue()

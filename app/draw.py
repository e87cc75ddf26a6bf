"""Frames with their boxes, as people look at them: one colour per label, machine boxes dashed, human boxes solid."""

from __future__ import annotations

import hashlib
import io
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import streamlit as st
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from app import session
from workbench.annotation import Annotation
from workbench.blobs import Blobs
from workbench.dataset import Frame
from workbench.errors import WorkbenchError
from workbench.evaluation.matching import box_of
from workbench.evaluation.tags import is_tag

# Twenty colours that stay apart on photographs, the first ones the most: Sasha Trubetskoy's list of distinct colours.
PALETTE = (
    "#e6194b",
    "#3cb44b",
    "#4363d8",
    "#f58231",
    "#911eb4",
    "#46f0f0",
    "#f032e6",
    "#bcf60c",
    "#fabebe",
    "#008080",
    "#ffe119",
    "#9a6324",
    "#800000",
    "#aaffc3",
    "#808000",
    "#ffd8b1",
    "#000075",
    "#808080",
    "#e6beff",
    "#fffac8",
)
WIDTH = 480
DASH = 6
JPEG_QUALITY = 86


@dataclass(frozen=True)
class Picture:
    """A frame to show: its pixels' md5, what is drawn on it and what stands below it."""

    blob: str
    annotations: tuple[Annotation, ...] = ()
    caption: str = ""


def colour_of(label: str, labels: Sequence[str] = ()) -> str:
    """A label's colour: by its class_id in the taxonomy, which only grows at its end; by its name when it has none."""
    if label in labels:
        return PALETTE[list(labels).index(label) % len(PALETTE)]
    return PALETTE[hashlib.md5(label.encode(), usedforsecurity=False).digest()[0] % len(PALETTE)]


def draw(
    image: Image.Image, annotations: Iterable[Annotation], labels: Sequence[str] = (), width: int = WIDTH
) -> Image.Image:
    """An RGB copy of the image, `width` pixels wide at most, with boxes, polygons and label text on it.

    Coordinates of the annotations are pixels of the image as given. Drawn after scaling, so lines stay crisp.
    """
    scale = min(1.0, width / image.width)
    canvas = image.convert("RGB")
    if scale < 1:
        canvas = canvas.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=12 if canvas.width >= 320 else 10)
    texts, tags = [], []
    for annotation in annotations:
        colour = colour_of(annotation.label, labels)
        around = box_of(annotation)
        if around is None:
            if annotation.mask is None:
                tags.append((annotation, colour))
            continue
        box = tuple(value * scale for value in around)
        if annotation.polygon is not None:
            points = [(x * scale, y * scale) for x, y in annotation.polygon]
            (_dashed if annotation.is_machine else _solid)(pen, points, colour)
        elif annotation.is_machine:
            _dashed(pen, [(box[0], box[1]), (box[2], box[1]), (box[2], box[3]), (box[0], box[3])], colour)
        else:
            pen.rectangle(box, outline=colour, width=2)
        texts.append((box, annotation, colour))
    # Tags are about the whole frame: one below the other in its corner.
    for line, (annotation, colour) in enumerate(tags):
        top = line * (font.size + 5) + font.size + 3
        _chip(pen, canvas.size, (0, top, canvas.width, top), annotation, colour, font)
    for box, annotation, colour in texts:
        _chip(pen, canvas.size, box, annotation, colour, font)
    return canvas


def _solid(pen: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], colour: str) -> None:
    pen.line([*points, points[0]], fill=colour, width=2)


def _dashed(pen: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], colour: str) -> None:
    """A closed outline in dashes of DASH pixels that go on around its corners."""
    gone = 0.0
    for (x1, y1), (x2, y2) in zip(points, [*points[1:], points[0]]):
        length = math.hypot(x2 - x1, y2 - y1)
        at = 0.0
        while at < length:
            step = min(max(DASH - gone % DASH, 0.5), length - at)
            if int(gone // DASH) % 2 == 0:
                start, end = at / length, (at + step) / length
                pen.line((x1 + (x2 - x1) * start, y1 + (y2 - y1) * start, x1 + (x2 - x1) * end, y1 + (y2 - y1) * end),
                         fill=colour, width=2)
            at, gone = at + step, gone + step


def _chip(
    pen: ImageDraw.ImageDraw,
    size: tuple[int, int],
    box: tuple[float, ...],
    annotation: Annotation,
    colour: str,
    font: ImageFont.FreeTypeFont,
) -> None:
    """The label above its box; left out where it would be much wider than the box and hide the neighbours."""
    text = annotation.label if annotation.confidence is None else f"{annotation.label} {annotation.confidence:.2f}"
    text = text if text.isascii() else text.encode("latin-1", "replace").decode("latin-1")
    wide = pen.textlength(text, font=font)
    if wide > 1.8 * (box[2] - box[0]):
        text = (
            annotation.label
            if annotation.label.isascii()
            else annotation.label.encode("latin-1", "replace").decode("latin-1")
        )
        wide = pen.textlength(text, font=font)
        if wide > 2.2 * (box[2] - box[0]):
            return
    tall = font.size + 3
    left = min(max(0, box[0]), max(0, size[0] - wide - 6))
    top = box[1] - tall if box[1] >= tall else box[1]
    pen.rectangle((left, top, left + wide + 5, top + tall), fill=colour)
    pen.text((left + 3, top + 1), text, fill=_ink(colour), font=font)


def _ink(colour: str) -> str:
    """Black or white, whichever reads better: relative luminance by ITU-R BT.601."""
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 150 else "white"


def jpeg(blobs: Blobs, picture: Picture, labels: Sequence[str] = (), width: int = WIDTH) -> bytes:
    """The picture as JPEG bytes, drawn once per content. Raises WorkbenchError, or OSError for bad pixels."""
    drawn = tuple(
        (a.label, a.xyxy, a.polygon, a.source, a.confidence, "touched_by" in a.attributes) for a in picture.annotations
    )
    return _jpeg(str(blobs.path(picture.blob)), drawn, tuple(labels), width, picture.annotations)


@st.cache_data(max_entries=1500, show_spinner=False)
def _jpeg(path: str, drawn: tuple, labels: tuple[str, ...], width: int, _annotations: tuple[Annotation, ...]) -> bytes:
    with Image.open(Path(path)) as image:
        upright = ImageOps.exif_transpose(image)
        canvas = draw(upright, _annotations, labels, width)
    out = io.BytesIO()
    canvas.save(out, "JPEG", quality=JPEG_QUALITY)
    return out.getvalue()


def gallery(pictures: Sequence[Picture], labels: Sequence[str] = (), columns: int = 4, width: int = WIDTH) -> None:
    """A grid of frames with captions; one that cannot be shown says so in its place."""
    blobs = session.workbench().blobs
    for start in range(0, len(pictures), columns):
        for column, picture in zip(st.columns(columns), pictures[start : start + columns]):
            with column:
                try:
                    st.image(jpeg(blobs, picture, labels, width), width="stretch")
                except WorkbenchError as failure:
                    session.error(failure)
                except (OSError, UnidentifiedImageError):
                    st.warning("The pixels of this frame cannot be decoded.", icon=":material/broken_image:")
                if picture.caption:
                    st.caption(session.literal(picture.caption))


def legend(labels: Sequence[str], used: Iterable[str] | None = None, has_lines: bool = True) -> None:
    """Which colour is which label, and what a dashed line means, where there are lines."""
    shown = [label for label in labels if used is None or label in set(used)][:30]
    chips = "".join(
        f"<span style='white-space:nowrap'><i style='background:{colour_of(label, labels)}'></i>{escape(label)}</span>"
        for label in shown
    )
    lines = "<span>┅ dashed: a machine drew it</span><span>─ solid: a person</span>" if has_lines else ""
    st.html(
        "<style>.legend{display:flex;flex-wrap:wrap;gap:4px 14px;font-size:.82rem;opacity:.85}"
        ".legend i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:5px}</style>"
        f"<div class='legend'>{chips}{lines}</div>"
    )


def of_labeled(frame: Frame, annotations: Sequence[Annotation] | None, caption: str = "") -> Picture:
    """A frame with what is drawn on it; the caption counts that, or says that nobody looked."""
    seen = "nobody looked" if annotations is None else counted(annotations)
    return Picture(frame.blob, tuple(annotations or ()), caption or f"{frame.name} · {seen}")


def counted(annotations: Sequence[Annotation]) -> str:
    """`3 boxes, 1 tag`; of what is not there nothing, of an empty frame `nothing on it`."""
    found = Counter(
        "tag" if is_tag(one) else "polygon" if one.polygon is not None else "mask" if one.mask is not None else "box"
        for one in annotations
    )
    plural = {"box": "boxes", "polygon": "polygons", "mask": "masks", "tag": "tags"}
    said = [f"{found[name]} {name if found[name] == 1 else plural[name]}" for name in plural if found[name]]
    return ", ".join(said) or "nothing on it"

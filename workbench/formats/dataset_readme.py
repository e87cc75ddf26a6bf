"""The README of a published version: what is in it, what changed, and sample frames with their boxes drawn."""

from __future__ import annotations

import io
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from workbench.annotation import Annotation
from workbench.dataset import SPLITS, Diff, Frame, LabeledFrame, Manifest
from workbench.taxonomy import Taxonomy

SAMPLES = 6
SAMPLE_SIDE = 640
# COCO's bounds between small, medium and large objects, as areas in pixels (cocodataset.org/#detection-eval).
SMALL, MEDIUM = 32**2, 96**2
QUANTILES = (5, 25, 50, 75, 95)
NAMES_SHOWN = 10
FILES = """\
`dvc pull` (DVC 3) puts the pictures into `frames/`. `annotations.jsonl` has one frame a line: `annotations` is null
where nobody looked and [] where somebody looked and saw nothing; `xyxy` is x1, y1, x2, y2 in pixels. `metadata.csv` has
the size, md5 and sha256 of every file; `taxonomy.json` the labels in the order of their class_id."""
# Okabe and Ito's palette, told apart by colour-blind readers too, without its black; yellow shows on most photographs.
COLOURS = ("#F0E442", "#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#0072B2")


def readme(dataset: str, version: str, manifest: Manifest, *, message: str, author: str, url: str,
           previous: str | None = None, changed: Diff | None = None, samples: Sequence[str] = ()) -> str:
    """Markdown. `previous` and `changed` tell the version before and the difference; `samples` the frames drawn, in
    the order of samples/1.jpg, samples/2.jpg, ...; `url` is what git clones."""
    parts = [
        f"# {dataset} {version}", _plain(message), f"Published by {_plain(author)}.",
        _table(("frames", "labelled", "of these without an object", "not labelled", "boxes", "labels"),
               [(len(manifest.frames), len(manifest.labeled), sum(one.annotations == () for one in manifest.frames),
                 len(manifest.frames) - len(manifest.labeled), manifest.box_count, len(manifest.taxonomy))]),
        "A frame that is not labelled was not looked at by anybody: it is no background.",
    ]
    if previous is not None and changed is not None:
        parts += [f"## What changed since {previous}", *_changes(changed)]
    if samples:
        parts += ["## Sample frames",
                  "\n".join(f"![{_plain(name)}](samples/{number}.jpg)" for number, name in enumerate(samples, start=1))]
    parts += ["## Classes", _classes(manifest), "## Splits", _splits(manifest)]
    parts += [*_box_sizes(manifest), *_sources(manifest), "## How to get the frames",
              f"```\ngit clone {shlex.quote(url)} {dataset}\ncd {dataset}\ngit checkout v{version}\ndvc pull\n```", FILES]
    return "\n\n".join(part for part in parts if part) + "\n"


def choose_samples(manifest: Manifest, count: int = SAMPLES) -> tuple[LabeledFrame, ...]:
    """Labelled frames with something on them: one for each label in turn, then others; the same for the same pixels."""
    drawn = [one for one in manifest.frames if one.annotations]
    drawn.sort(key=lambda one: (one.frame.blob, one.frame.name))
    chosen: dict[str, LabeledFrame] = {}
    for label in manifest.taxonomy.labels:
        found = next((one for one in drawn if one.frame.name not in chosen
                      and any(annotation.label == label for annotation in one.annotations or ())), None)
        if found is not None:
            chosen[found.frame.name] = found
    for one in drawn:
        chosen.setdefault(one.frame.name, one)
    return tuple(chosen.values())[:count]


def draw_samples(manifest: Manifest, pixels: Callable[[Frame], bytes]) -> dict[str, bytes]:
    """frame name -> JPEG with its boxes, at most SAMPLES of them. A file that is not an image is left out."""
    pictures = {}
    for one in choose_samples(manifest):
        try:
            with Image.open(io.BytesIO(pixels(one.frame))) as image:
                pictures[one.frame.name] = _draw(image, one, manifest.taxonomy)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue  # PIL's ways of saying "not an image"; upload refuses such files, a sample is not worth a version
    return pictures


def _draw(image: Image.Image, one: LabeledFrame, taxonomy: Taxonomy) -> bytes:
    image = ImageOps.exif_transpose(image).convert("RGB")
    image.thumbnail((SAMPLE_SIDE, SAMPLE_SIDE))
    scale_x, scale_y = image.width / one.frame.width, image.height / one.frame.height
    canvas, font = ImageDraw.Draw(image), ImageFont.load_default(size=13)
    names, tags = [], 0
    # Large things first, so that small ones stay visible on top; the names last, so that no line crosses them.
    for annotation in sorted(one.annotations or (), key=lambda a: (-_area(a), a.id)):
        colour = COLOURS[taxonomy.class_id(annotation.label) % len(COLOURS)]
        if annotation.polygon is not None:
            points = [(x * scale_x, y * scale_y) for x, y in annotation.polygon]
            canvas.line([*points, points[0]], fill=colour, width=2)
            corner = (min(x for x, _ in points), min(y for _, y in points))
        elif annotation.xyxy is not None:
            x1, y1, x2, y2 = annotation.xyxy
            canvas.rectangle((x1 * scale_x, y1 * scale_y, x2 * scale_x, y2 * scale_y), outline=colour, width=2)
            corner = (x1 * scale_x, y1 * scale_y)
        else:
            corner, tags = (0, 16 * (tags + 1)), tags + 1
        names.append((annotation.label, corner, colour))
    for label, corner, colour in names:
        _, _, right, bottom = canvas.textbbox((0, 0), label, font=font)
        at = (max(0, min(corner[0], image.width - right - 4)), max(0, corner[1] - bottom - 2))
        canvas.rectangle((at[0], at[1], at[0] + right + 4, at[1] + bottom + 2), fill=colour)
        canvas.text((at[0] + 2, at[1]), label, fill="black", font=font)
    written = io.BytesIO()
    image.save(written, "JPEG", quality=80)
    return written.getvalue()


def _changes(changed: Diff) -> list[str]:
    rows = [(what, len(getattr(changed, field))) for what, field in (
        ("frames added", "frames_added"), ("frames removed", "frames_removed"), ("frames changed", "frames_relabeled"),
        ("boxes added", "boxes_added"), ("boxes removed", "boxes_removed"), ("boxes changed", "boxes_changed"))]
    told = [_table(("what", "how many"), rows)]
    for what, names in (("Labels added", changed.labels_added), ("Labels removed", changed.labels_removed),
                        ("Frames added", changed.frames_added), ("Frames removed", changed.frames_removed),
                        ("Frames changed", changed.frames_relabeled)):
        if names:
            more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
            told.append(f"{what}: {', '.join(map(_plain, names[:NAMES_SHOWN]))}{more}.")
    return told


def _classes(manifest: Manifest) -> str:
    boxes: Counter[tuple[str, str | None]] = Counter()
    frames: Counter[str] = Counter()
    for one in manifest.labeled:
        boxes.update((annotation.label, one.split) for annotation in one.annotations or ())
        frames.update({annotation.label for annotation in one.annotations or ()})
    splits = _used_splits(manifest)
    rows = [(class_id, label, *(boxes[label, split] for split in splits),
             sum(count for (name, _), count in boxes.items() if name == label), frames[label])
            for class_id, label in enumerate(manifest.taxonomy.labels)]
    per_split = (f"boxes in {split or 'no split'}" for split in splits)
    return _table(("class_id", "label", *per_split, "boxes", "frames with it"), rows)


def _splits(manifest: Manifest) -> str:
    rows = []
    for split in _used_splits(manifest):
        frames = [one for one in manifest.frames if one.split == split]
        labelled = sum(one.annotations is not None for one in frames)
        rows.append((split or "no split", len(frames), labelled, len(frames) - labelled,
                     sum(len(one.annotations or ()) for one in frames)))
    return _table(("split", "frames", "labelled", "not labelled", "boxes"), rows)


def _used_splits(manifest: Manifest) -> tuple[str | None, ...]:
    return SPLITS + ((None,) if any(one.split is None for one in manifest.frames) else ())


def _box_sizes(manifest: Manifest) -> list[str]:
    boxes = np.array([a.xyxy for one in manifest.labeled for a in one.annotations or () if a.xyxy is not None])
    if not len(boxes):
        return []
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area = width * height
    small, large = int((area < SMALL).sum()), int((area >= MEDIUM).sum())
    quantiles = [(name, *(f"{value:.1f}" for value in np.percentile(values, QUANTILES)))
                 for name, values in (("width", width), ("height", height), ("square root of the area", np.sqrt(area)))]
    return ["## Box sizes",
            _table(("small (area under 32 x 32)", "medium", "large (96 x 96 and more)"),
                   [(small, len(boxes) - small - large, large)]),
            _table(("in pixels", *(f"{quantile} %" for quantile in QUANTILES)), quantiles)]


def _sources(manifest: Manifest) -> list[str]:
    counts = Counter(_author(annotation) for one in manifest.labeled for annotation in one.annotations or ())
    rows = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ["## Who drew the boxes", _table(("who", "boxes"), rows)] if rows else []


def _author(annotation: Annotation) -> str:
    touched = annotation.attributes.get("touched_by")
    return f"{annotation.source}, changed by {touched}" if touched else annotation.source


def _area(annotation: Annotation) -> float:
    if annotation.xyxy is None:
        return 0.0
    x1, y1, x2, y2 = annotation.xyxy
    return (x2 - x1) * (y2 - y1)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [" | ".join(_plain(str(cell)) for cell in row) for row in (head, *rows)]
    lines.insert(1, " | ".join(["---"] * len(head)))
    return "\n".join(f"| {line} |" for line in lines)


def _plain(text: str) -> str:
    """Text from outside as Markdown that shows it as it is: no table cell, link, picture or HTML comes out of it."""
    text = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return re.sub(r"([\\`*\[\]<>|&~]|^#|(?<!\w)_|_(?!\w))", r"\\\1", text)

"""COCO JSON, one file or one a split, beside or above its pictures (also as Roboflow and CVAT lay it out).

Boxes; outlines (`segmentation`, as polygons or run-length encoding), which become one polygon each; and tags of whole
pictures, where `images` have "tags": [category id or name, ...] as checkouts have.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from workbench.annotation import SAME_PX
from workbench.blobs import Blobs
from workbench.dataset import SPLITS, Manifest
from workbench.errors import Invalid
from workbench.formats.checkout import coco_document, link_blob
from workbench.formats.labels import ImageLabels, LabelBox, Labels, number, usable_label
from workbench.formats.outlines import decode_rle, of_mask, of_parts
from workbench.formats.source import SPLIT_FOLDERS, Files, split_of


def find(files: Files) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The COCO files by path with their content, and {path: reason} of JSON files that cannot be read."""
    found, refused = {}, {}
    for path in files.ending(".json"):
        try:
            content = json.loads(files.text(path))  # NaN is let through here: `place` names the box that has it
        except Invalid as error:
            refused[path] = str(error)
        except (ValueError, RecursionError) as error:
            refused[path] = f"is not JSON ({str(error)[:200]}); its labels are left out."
        else:
            if isinstance(content, dict) and isinstance(content.get("images"), list) and (
                    "annotations" in content or "categories" in content):
                found[path] = content
    return found, refused


def read(files: Files, found: dict[str, dict[str, Any]]) -> Labels:
    """A picture in `images` without annotations: nothing is there. One that no file lists: nobody looked.

    The split is in a file's name (instances_val2017.json) or in the name of its folder (valid/_annotations.coco.json);
    pictures that no file lists have that of their folder.
    """
    labels = Labels()
    for path, content in found.items():
        categories = dict(_categories(path, content, labels))
        labels.taxonomy = labels.taxonomy.with_labels(label for label in categories.values() if label)
        images = _images(path, content, files, labels)
        boxes: dict[Any, list[LabelBox]] = {key: [] for key in images}
        for key, box in _boxes(path, content, categories, images, labels):
            boxes[key].append(box)
        is_looked_at = isinstance(content.get("annotations"), list)
        tags = _tags(path, content, categories, images, labels)
        for key, given in tags.items():
            boxes[key] += given
        for key, (image, size) in images.items():
            if image in labels.images:
                labels.warnings[f"{path} image {key}"] = (f"{image} is in {labels.images[image].where} already; what "
                                                          "stands there is kept.")
                continue
            labels.images[image] = ImageLabels(tuple(boxes[key]) if is_looked_at or key in tags else None,
                                               _split(path) or split_of(image), size, path)
    for image in files.images:
        if image not in labels.images:
            labels.images[image] = ImageLabels(None, split_of(image))
    return labels


def write(manifest: Manifest, blobs: Blobs, folder: Path) -> None:
    """annotations/instances_<split>.json and images/<split>/; frames without a split are in "default". Frames that
    nobody looked at have their picture there and are in no file."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for split in (*SPLITS, None):
        frames = [one for one in manifest.frames if one.split == split]
        name = split or "default"
        for one in frames:
            link_blob(blobs, one.frame.blob, folder / "images" / name / one.frame.name)
        if frames:
            document = coco_document(manifest.taxonomy, [one for one in frames if one.annotations is not None])
            (folder / "annotations" / f"instances_{name}.json").write_text(
                json.dumps(document, ensure_ascii=False, allow_nan=False), encoding="utf-8")


def _split(path: str) -> str | None:
    stem = PurePosixPath(path).stem.lower()
    words = "".join(c if c.isalpha() else " " for c in stem).split()
    return next((SPLIT_FOLDERS[word] for word in words if word in SPLIT_FOLDERS), None) or split_of(path)


def _categories(path: str, content: dict[str, Any], labels: Labels) -> Iterator[tuple[Any, str | None]]:
    """Category id -> label in the order of the ids; None for one whose name cannot be a label."""
    seen: dict[Any, str] = {}
    rows = [row for row in content.get("categories") or () if isinstance(row, dict) and isinstance(row.get("id"), int)]
    for row in sorted(rows, key=lambda row: row["id"]):
        label, where = usable_label(row.get("name")), f"{path} category {row['id']}"
        if row["id"] in seen:
            labels.refused[where] = (f"stands twice, as {seen[row['id']]!r} and {str(row.get('name'))[:40]!r}; the "
                                     "first counts.")
            continue
        if label is None:
            labels.refused[where] = f"{str(row.get('name'))[:40]!r} is no usable label; its boxes are left out."
        seen[row["id"]] = str(label)
        yield row["id"], label


def _images(path: str, content: dict[str, Any], files: Files,
            labels: Labels) -> dict[Any, tuple[str, tuple[int, int] | None]]:
    """Image id -> (path of the picture, size claimed). What has no file or stands twice is refused."""
    images: dict[Any, tuple[str, tuple[int, int] | None]] = {}
    taken: set[str] = set()
    for index, row in enumerate(content["images"]):
        key = row.get("id") if isinstance(row, dict) else None
        name = row.get("file_name") if isinstance(row, dict) else None
        if not isinstance(key, (int, str)) or not isinstance(name, str) or not name:
            labels.refused[f"{path} image entry {index + 1}"] = "has no id or no file_name; it is left out."
            continue
        where = f"{path} image {name[:200]}"
        if key in images:
            labels.refused[where] = f"has id {key}, which {images[key][0]} has already; it is left out."
            continue
        image = _locate(files, path, name)
        if image is None:
            labels.refused[where] = ("its file is not in the upload (or several could be meant); its labels are left "
                                     "out.")
        elif image in taken:
            labels.refused[where] = "is listed twice; the first entry counts."
        else:
            size = tuple(int(value) if (value := number(row.get(side))) > 0 else 0 for side in ("width", "height"))
            taken.add(image)
            images[key] = (image, size if all(size) else None)
    return images


def _boxes(path: str, content: dict[str, Any], categories: dict[Any, str | None], images: dict[Any, Any],
           labels: Labels) -> Iterator[tuple[Any, LabelBox]]:
    seen, rows = set(), content.get("annotations")
    listed = {row["id"] for row in content["images"] if isinstance(row, dict) and isinstance(row.get("id"), (int, str))}
    for index, row in enumerate(rows if isinstance(rows, list) else (), 1):
        if not isinstance(row, dict):
            labels.refused[f"{path} annotation entry {index}"] = "is not an object; it is left out."
            continue
        key = row.get("id") if isinstance(row.get("id"), (int, str)) else None
        where = f"{path} annotation {key}" if key is not None else f"{path} annotation entry {index}"
        image, category, bbox = row.get("image_id"), row.get("category_id"), row.get("bbox")
        if key is not None and key in seen:
            labels.refused[f"{where} (entry {index})"] = ("has an id that another annotation has already; it is left "
                                                          "out.")
            continue
        seen.add(key)
        if not isinstance(image, (int, str)) or image not in images:
            if not isinstance(image, (int, str)) or image not in listed:  # else the picture itself was named already
                labels.refused[where] = (f"belongs to image {str(image)[:40]!r}, which the file does not list; it is "
                                         "left out.")
            continue
        if not isinstance(category, int) or category not in categories:
            labels.refused[where] = (f"has the unknown category {str(category)[:40]!r} (known: "
                                     f"{', '.join(map(str, categories))[:200]}); the box is left out.")
        elif row.get("iscrowd"):
            labels.warnings[where] = "is a crowd region, which is no single object; it is left out."
        elif categories[category] is not None:
            given = row.get("attributes")
            box = LabelBox(categories[category], None, where, attributes=given if isinstance(given, dict) else {})
            has_box = isinstance(bbox, list) and len(bbox) == 4
            if has_box:
                x, y, width, height = map(number, bbox)
                box = replace(box, values=(x, y, x + width, y + height))
            try:
                polygon = _outline(row.get("segmentation"), images[image][1])
            except Invalid as error:
                polygon = None
                if has_box:
                    labels.warnings[where] = f"{error}; its bbox is taken instead."
                else:
                    labels.refused[where] = f"{error}; it is left out."
                    continue
            if polygon is not None and not (has_box and _is_rectangle(polygon, box.values)):
                box = replace(box, values=None, polygon=polygon)
            if box.values is None and box.polygon is None:
                labels.refused[where] = "has no bbox of four numbers x, y, width, height; it is left out."
            else:
                yield image, box


def _tags(path: str, content: dict[str, Any], categories: dict[Any, str | None], images: dict[Any, Any],
          labels: Labels) -> dict[Any, list[LabelBox]]:
    """Image id -> its tags, of the pictures that have a list of them."""
    found: dict[Any, list[LabelBox]] = {}
    for row in content["images"]:
        if not isinstance(row, dict) or "tags" not in row or row.get("id") not in images or row["id"] in found:
            continue
        where, given = f"{path} image {str(row.get('file_name'))[:200]} tags", row["tags"]
        if not isinstance(given, list):
            labels.refused[where] = f"are {str(given)[:40]!r} instead of a list of category ids; they are left out."
            continue
        found[row["id"]] = []
        for tag in given:
            is_id = isinstance(tag, int) and not isinstance(tag, bool) and tag in categories
            label = categories[tag] if is_id else tag if isinstance(tag, str) and tag in categories.values() else None
            if label is not None:
                found[row["id"]].append(LabelBox(label, None, f"{where} {tag}"))
            elif not is_id:
                labels.refused[f"{where} {str(tag)[:40]}"] = (f"is no category (known: "
                                                              f"{', '.join(map(str, categories))[:200]}); it is left out.")
    return found


def _outline(segmentation: Any, size: tuple[int, int] | None) -> tuple[tuple[float, float], ...] | None:
    """One closed polygon around a COCO segmentation, None where there is none. Raises Invalid with the reason.

    size  (width, height) of the picture as the file says it
    """
    if not segmentation:
        return None
    if isinstance(segmentation, dict):
        mask = decode_rle(segmentation)
        if size not in (None, mask.shape[::-1]):
            raise Invalid(f"its mask is for {mask.shape[1]} x {mask.shape[0]} pixels, the picture has {size[0]} x "
                          f"{size[1]}")
        return tuple(map(tuple, of_mask(mask).tolist()))
    parts = []
    for part in segmentation if isinstance(segmentation, list) else [None]:
        if not isinstance(part, list) or len(part) < 6 or len(part) % 2:
            raise Invalid("its segmentation is neither a mask nor a list of polygons x1, y1, x2, y2, ... of at least "
                          "three points")
        parts.append(np.array([number(value) for value in part]).reshape(-1, 2))
    if len(parts) == 1 or not all(np.isfinite(part).all() for part in parts):  # `place` names what is not finite
        return tuple(map(tuple, np.concatenate(parts).tolist()))
    return tuple(map(tuple, of_parts(parts).tolist()))


def _is_rectangle(polygon: Sequence[tuple[float, float]], xyxy: Sequence[float]) -> bool:
    """Whether a polygon is only its box written as one, as exports of boxes have it."""
    x1, y1, x2, y2 = xyxy
    corners = (x1, y1), (x2, y1), (x2, y2), (x1, y2)

    def meet(some: Sequence[tuple[float, float]], others: Sequence[tuple[float, float]]) -> bool:
        return all(any(math.dist(one, other) <= SAME_PX for other in others) for one in some)

    return len(polygon) <= 5 and meet(polygon, corners) and meet(corners, polygon)


def _locate(files: Files, path: str, name: str) -> str | None:
    """The picture an entry means: below the JSON file's folder, below images/ with or without the file's own name or
    split, or the only one whose path ends with the name."""
    name = name.replace("\\", "/").lstrip("/").removeprefix("./")
    parent = PurePosixPath(path).parent
    stem = PurePosixPath(path).stem
    inner = [stem.removeprefix("instances_"), *([split] if (split := _split(path)) else [])]
    for base in (parent, parent.parent):
        for folder in ("", *inner, "images", *(f"images/{one}" for one in inner)):
            candidate = str(base / folder / name)
            if files.has_image(candidate):
                return candidate
    return files.find_image(name)

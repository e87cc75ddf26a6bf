"""YOLO in Ultralytics' layout: data.yaml, images/, labels/; also classes.txt, and labels beside the images.

A line is a box (class, centre x, centre y, width, height) or a polygon (class, x1, y1, x2, y2, x3, y3, ...), all relative.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from workbench.blobs import Blobs
from workbench.dataset import SPLITS, LabeledFrame, Manifest
from workbench.errors import Invalid
from workbench.formats.checkout import link_blob
from workbench.formats.labels import ImageLabels, LabelBox, Labels, number, usable_label
from workbench.formats.source import SPLIT_FOLDERS, Files, split_of
from workbench.taxonomy import Taxonomy

NAME_FILES = ("classes.txt", "obj.names", "labels.txt")
# How far a relative value may leave 0..1 before it is something else than a rounding, such as a pixel coordinate.
TOLERANCE = 1e-3


def is_there(files: Files) -> bool:
    if any(PurePosixPath(path).name in NAME_FILES for path in files.others):
        return True
    if any("labels" in PurePosixPath(path).parts[:-1] for path in files.ending(".txt")):
        return True
    return any(isinstance(config, dict) and "names" in config for _, config in _configs(files, {}))


def read(files: Files) -> Labels:
    """A missing label file means that nobody looked, an empty one that nothing is there.

    Raises Invalid when no file names the classes.
    """
    labels = Labels()
    config_path, config = next(((path, one) for path, one in _configs(files, labels.refused)
                                if isinstance(one, dict) and "names" in one), ("", {}))
    by_id = _class_names(files, config_path, config, labels)
    labels.taxonomy = Taxonomy(tuple(dict.fromkeys(by_id.values())))
    splits = _splits(files, config_path, config, labels.refused)
    texts = {str(PurePosixPath(path).with_suffix("")): path for path in files.ending(".txt")}
    used = set()
    for image in files.images:
        split = splits.get(image) or split_of(image)
        path = next((texts[stem] for stem in _label_stems(image) if stem in texts), None)
        if path is None or PurePosixPath(path).name in NAME_FILES:
            labels.images[image] = ImageLabels(None, split)
            continue
        used.add(path)
        try:
            boxes = tuple(_lines(files.text(path), path, by_id, labels.refused))
        except Invalid as error:
            labels.refused[path] = str(error)
            labels.images[image] = ImageLabels(None, split)
            continue
        labels.images[image] = ImageLabels(boxes, split, where=path)
    for path in texts.values():
        *folders, name = PurePosixPath(path).parts
        if path not in used and "labels" in folders and name not in NAME_FILES:
            labels.refused[path] = "there is no picture for these labels; they are left out."
    return labels


def write(manifest: Manifest, blobs: Blobs, folder: Path) -> None:
    """Ultralytics' layout: images/<split>/, labels/<split>/, data.yaml. Nobody looked: no label file; nothing there: an
    empty one. Frames without a split lie in images/ itself. Tags have no place there and are left out."""
    for one in manifest.frames:
        place = PurePosixPath(one.split or "") / one.frame.name
        link_blob(blobs, one.frame.blob, folder / "images" / place)
        if one.annotations is not None:
            file = (folder / "labels" / place).with_suffix(".txt")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(_line(one, manifest.taxonomy)))
    config = {split: f"images/{split}" for split in SPLITS if any(one.split == split for one in manifest.frames)}
    config["names"] = dict(enumerate(manifest.taxonomy.labels))
    (folder / "data.yaml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _line(one: LabeledFrame, taxonomy: Taxonomy) -> Iterator[str]:
    width, height = one.frame.width, one.frame.height
    for annotation in one.annotations or ():
        # Eight decimals keep a hundredth of a pixel in pictures of up to a million pixels a side.
        if annotation.polygon is not None:
            points = (f"{x / width:.8f} {y / height:.8f}" for x, y in annotation.polygon)
            yield f"{taxonomy.class_id(annotation.label)} {' '.join(points)}\n"
        elif annotation.xyxy is not None:
            x1, y1, x2, y2 = annotation.xyxy
            yield (f"{taxonomy.class_id(annotation.label)} {(x1 + x2) / 2 / width:.8f} {(y1 + y2) / 2 / height:.8f} "
                   f"{(x2 - x1) / width:.8f} {(y2 - y1) / height:.8f}\n")


def _lines(text: str, path: str, by_id: dict[int, str], refused: dict[str, str]) -> Iterator[LabelBox]:
    for index, line in enumerate(text.splitlines(), 1):
        words, where = line.split(), f"{path} line {index}"
        if not words:
            continue
        if len(words) != 5 and (len(words) < 7 or len(words) % 2 == 0):
            refused[where] = (f"has {len(words)} numbers; a box has 5: class, centre x, centre y, width, height, a "
                              "polygon 7 or more: class and x, y of each point. The line is left out.")
            continue
        values = tuple(map(number, words))
        if values[0] not in by_id:
            known = ", ".join(map(str, by_id))
            refused[where] = f"names class {words[0][:40]!r}, but the classes are {known}; the line is left out."
        elif any(not -TOLERANCE <= value <= 1 + TOLERANCE for value in values[1:]):  # NaN compares false: refused too
            refused[where] = (f"has a value outside 0..1 ({' '.join(words[1:])[:80]}); YOLO boxes and polygons are "
                              "relative to the picture. The line is left out.")
        elif len(words) > 5:
            yield LabelBox(by_id[int(values[0])], None, where, is_relative=True,
                           polygon=tuple(zip(values[1::2], values[2::2])))
        else:
            yield LabelBox(by_id[int(values[0])], values[1:], where, is_relative=True)


def _configs(files: Files, refused: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """The YAML files with their content, data.yaml first; what is not YAML is refused."""
    for path in sorted(files.ending(".yaml", ".yml"), key=lambda path: (PurePosixPath(path).stem != "data", path)):
        try:
            yield path, yaml.safe_load(files.text(path))
        except Invalid as error:
            refused[path] = str(error)
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            refused[path] = f"is not YAML ({str(error).splitlines()[0][:200]}); it is left out."


def _class_names(files: Files, config_path: str, config: dict[str, Any], labels: Labels) -> dict[int, str]:
    names: Any = config.get("names")
    where = config_path
    if names is None:
        for where in sorted(files.others, key=lambda path: (len(PurePosixPath(path).parts), path)):
            if PurePosixPath(where).name in NAME_FILES:
                names = files.lines(where, labels.refused)
                break
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names:
        raise Invalid("The YOLO labels come without class names. Add data.yaml with `names`, or classes.txt with one "
                      "name a line.")
    by_id = {}
    for key, name in names.items():
        label = usable_label(name)
        if label is None or not str(key).isdigit():
            labels.refused[f"{where} class {key}"] = (f"{str(name)[:80]!r} is no usable label; boxes of this class "
                                                      "are left out.")
        else:
            by_id[int(key)] = label
    if not by_id:
        raise Invalid(f"{where} has no usable class name. Give each class a printable name.")
    return dict(sorted(by_id.items()))


def _splits(files: Files, config_path: str, config: dict[str, Any], refused: dict[str, str]) -> dict[str, str]:
    """Picture -> split as data.yaml's train, val and test say: folders, or .txt files that list pictures.

    A picture in two of them keeps the first (train before val before test): what was trained on is no test.
    """
    found: dict[str, str] = {}
    base = PurePosixPath(config_path).parent
    if not any(config.get(split) for split in SPLITS):  # darknet's lists stand beside the pictures' folder
        config = {SPLIT_FOLDERS[PurePosixPath(path).stem]: path for path in files.ending(".txt")
                  if PurePosixPath(path).stem in SPLIT_FOLDERS and "labels" not in PurePosixPath(path).parts}
    for split in SPLITS:
        entries = config.get(split) or []
        for entry in entries if isinstance(entries, list) else [entries]:
            parts = [part for part in PurePosixPath(str(entry)).parts if part not in ("/", "..", ".")]
            tail = "/".join(parts)
            if tail.endswith(".txt"):
                listed = next((path for path in files.others if path == tail or path.endswith("/" + tail)), None)
                images = [_listed(files, line) for line in (files.lines(listed, refused) if listed else [])]
            else:
                images = _below(files, base, parts)
            for image in images:
                if image:
                    found.setdefault(image, split)
    return found


def _listed(files: Files, line: str) -> str | None:
    parts = [part for part in PurePosixPath(line.replace("\\", "/")).parts if part not in ("/", "..", ".")]
    return next((image for start in range(len(parts)) if (image := files.find_image("/".join(parts[start:])))), None)


def _below(files: Files, base: PurePosixPath, parts: list[str]) -> list[str]:
    """Pictures below a folder that data.yaml names; its front part may be that of another machine and is given up."""
    for start in range(len(parts)):
        folder = "/".join((*base.parts, *parts[start:])) + "/"
        images = [image for image in files.images if image.startswith(folder)]
        if images:
            return images
    return []


def _label_stems(image: str) -> list[str]:
    """Where a picture's labels lie, without suffix: the last images/ becomes labels/ (Ultralytics, img2label_paths), or
    beside the picture, or in labels/ beside its folder."""
    path = PurePosixPath(image).with_suffix("")
    parts = list(path.parts)
    stems = []
    if "images" in parts[:-1]:
        last = len(parts) - 2 - parts[:-1][::-1].index("images")
        stems.append("/".join([*parts[:last], "labels", *parts[last + 1:]]))
    stems += [str(path), str(path.parent.parent / "labels" / path.name), str(path.parent / "labels" / path.name)]
    return stems

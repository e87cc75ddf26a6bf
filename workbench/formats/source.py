"""Source: what an upload holds, whatever it came as: pictures with their frame names, and what labels say of each."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath

from workbench.errors import Invalid, NotFound
from workbench.formats import archive
from workbench.formats.images import IMAGE_SUFFIXES, looks_like_image
from workbench.formats.labels import ImageLabels
from workbench.formats.limits import Limits
from workbench.taxonomy import Taxonomy

SPLIT_FOLDERS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
                 "test": "test", "testing": "test"}
# Folders that say what lies in them, not what a frame is called.
_STRUCTURE = {"images", "jpegimages", "imgs", *SPLIT_FOLDERS}
_LABEL_SUFFIXES = (".json", ".xml", ".yaml", ".yml", ".txt", ".names")
_COMPANION_SUFFIXES = (*_LABEL_SUFFIXES, "", ".md", ".csv", ".data", ".cache", ".html", ".py", ".ipynb", ".pdf")
_COMPANION_NAMES = ("readme", "license", "licence", "notice", "provenance", "citation")
_SYSTEM = ("__macosx", "thumbs.db", "desktop.ini", "$recycle.bin")


@dataclass(frozen=True)
class Files:
    """The files of a folder as sorted relative POSIX paths: pictures (by name or content), and all others."""

    root: Path
    images: tuple[str, ...]
    others: tuple[str, ...]
    limits: Limits = Limits()

    def ending(self, *suffixes: str) -> list[str]:
        return [path for path in self.others if PurePosixPath(path).suffix.lower() in suffixes]

    def data(self, path: str) -> bytes:
        """Raises Invalid with the reason when the file is too large for a label file or cannot be read."""
        file = self.root / path
        try:
            if file.stat().st_size > self.limits.label_bytes:
                raise Invalid(f"has more than the {self.limits.label_bytes / 2**20:.0f} MiB allowed for a label file; "
                              "split it.")
            return file.read_bytes()
        except OSError as error:
            raise Invalid(f"cannot be read ({error.strerror}); its labels are left out.") from error

    def text(self, path: str) -> str:
        """Likewise, and Invalid when it is not UTF-8."""
        try:
            return self.data(path).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise Invalid(f"is not UTF-8 text (byte {error.start}); it is left out. Save it as UTF-8.") from error

    def lines(self, path: str, refused: dict[str, str]) -> list[str]:
        """The lines that are not empty, stripped; none, and the reason in `refused`, when the file cannot be read."""
        try:
            return [line.strip() for line in self.text(path).splitlines() if line.strip()]
        except Invalid as error:
            refused[path] = str(error)
            return []

    def has_image(self, path: str) -> bool:
        return path in self._image_set

    def find_image(self, path: str) -> str | None:
        """The picture at that path, or the only one whose path ends with it; None when none or several do."""
        path = "/".join(part for part in PurePosixPath(path.replace("\\", "/")).parts if part not in ("/", "."))
        if path in self._image_set:
            return path
        ends = [image for image in self._by_basename.get(PurePosixPath(path).name, ())
                if image.endswith("/" + path) or "/" not in path]
        return ends[0] if len(ends) == 1 else None

    def images_of_stem(self, stem: str) -> tuple[str, ...]:
        """Pictures whose path without suffix is `stem`: "JPEGImages/a" gives "JPEGImages/a.jpg"."""
        return tuple(self._by_stem.get(stem, ()))

    @cached_property
    def _image_set(self) -> frozenset[str]:
        return frozenset(self.images)

    @cached_property
    def _by_basename(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for image in self.images:
            found.setdefault(PurePosixPath(image).name, []).append(image)
        return found

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for image in self.images:
            found.setdefault(str(PurePosixPath(image).with_suffix("")), []).append(image)
        return found


@dataclass(frozen=True)
class SourceImage:
    """One picture file: where it lies, what its frame will be called, what labels say about it."""

    path: str
    name: str
    labels: ImageLabels = ImageLabels()

    @property
    def shown(self) -> str:
        """The path as messages and databases can hold it."""
        return printable(self.path)


@dataclass(frozen=True)
class Source:
    """format is "images", "coco", "yolo", "voc" or "folders" (one per label); refused and warnings are by file (and place
    in it)."""

    root: Path
    format: str
    taxonomy: Taxonomy
    images: tuple[SourceImage, ...]
    refused: dict[str, str] = field(default_factory=dict)
    warnings: dict[str, str] = field(default_factory=dict)


@contextmanager
def open_source(path: Path, limits: Limits = Limits(), check: Callable[[], None] = lambda: None) -> Iterator[Source]:
    """A folder, a zip or tar of one, or a single picture; what was unpacked is gone afterwards.

    Raises NotFound when there is nothing, Invalid when it is neither, Unavailable when there is no room to unpack.
    """
    path = Path(path)
    if not path.exists():
        raise NotFound(f"{path} does not exist. Give the path of a folder, a .zip or a .tar.gz.")
    if path.is_dir():
        yield read_source(path, limits)
    elif _is_image(path):
        yield Source(path.parent, "images", Taxonomy(()), (SourceImage(path.name, printable(path.name)),))
    else:
        with archive.extracted(path, limits, check) as found:
            source = read_source(found.folder, limits)
            yield replace(source, refused={**found.refused, **source.refused})


def read_source(root: Path, limits: Limits = Limits()) -> Source:
    """Finds out the format of a folder and reads all of its labels; of the pictures nothing is read yet.

    A data set may lie in one more folder. Without label files, folders may name tags (formats/classes.py). Raises
    Invalid when label files of two formats are mixed, or when YOLO labels come without class names.
    """
    from workbench.formats import classes, coco, voc, yolo

    files, refused = _walk(root, limits)
    coco_files, coco_problems = coco.find(files)
    found = {"COCO": bool(coco_files), "YOLO": yolo.is_there(files), "VOC": voc.is_there(files)}
    names = [name for name, is_there in found.items() if is_there]
    if len(names) > 1:
        raise Invalid(f"The upload holds {' and '.join(names)} labels at once, and which of them are right is not ours "
                      "to guess. Upload it again with the label files of one format.")
    if found["COCO"]:
        kind, labels = "coco", coco.read(files, coco_files)
    elif found["YOLO"]:
        kind, labels = "yolo", yolo.read(files)
    elif found["VOC"]:
        kind, labels = "voc", voc.read(files)
    else:
        labels = classes.read(files)
        kind = "images" if labels is None else "folders"
    refused |= coco_problems
    frame_names = names_of(files.images)
    if labels is None:
        for path in files.others:
            if path not in refused and not PurePosixPath(path).name.lower().startswith(_COMPANION_NAMES):
                refused[path] = "is not an image (JPEG, PNG, BMP, WebP, TIFF or GIF), and no label file that is known."
        images = tuple(SourceImage(path, frame_names[path]) for path in files.images)
        return Source(root, kind, Taxonomy(()), images, refused, classes.hint(frame_names.values()))
    for path in files.others:
        if PurePosixPath(path).suffix.lower() not in _COMPANION_SUFFIXES and not _is_companion(path):
            refused.setdefault(path, "is not an image (JPEG, PNG, BMP, WebP, TIFF or GIF).")
    images = tuple(SourceImage(path, frame_names[path], labels.images.get(path, ImageLabels()))
                   for path in files.images)
    return Source(root, kind, labels.taxonomy, images, {**refused, **labels.refused}, labels.warnings)


def split_of(path: str) -> str | None:
    """The split that a folder of the path names ("images/val/a.jpg"), the innermost one; None when none does."""
    for part in reversed(PurePosixPath(path).parts[:-1]):
        word = re.sub(r"[_-]?\d{4}$", "", part.lower())  # COCO's own: train2017
        if word in SPLIT_FOLDERS:
            return SPLIT_FOLDERS[word]
    return None


def names_of(paths: tuple[str, ...]) -> dict[str, str]:
    """Frame names by path: the path below what all have in common, without folders such as images/ and train/.

    Where two pictures would be called the same that way, those folders stay. What does not print, and backslashes,
    become "_".
    """
    below = _without_common_folders({path: PurePosixPath(path).parts for path in paths})
    short = below
    while True:
        stripped = _without_common_folders({
            path: parts[1:] if len(parts) > 1 and is_structure(parts[0]) else parts for path, parts in short.items()})
        if stripped == short:
            break
        short = stripped
    if len(set(short.values())) < len(short):
        short = below
    return {path: printable("/".join(parts)) for path, parts in short.items()}


def is_structure(folder: str) -> bool:
    """Whether a folder says what lies in it: images/, train/."""
    return folder.lower() in _STRUCTURE or re.sub(r"[_-]?\d{4}$", "", folder.lower()) in SPLIT_FOLDERS


def _without_common_folders(parts: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    if not parts:
        return parts
    common = os.path.commonprefix([one[:-1] for one in parts.values()])
    return {path: one[len(common):] for path, one in parts.items()}


def printable(name: str) -> str:
    return "".join(c if c.isprintable() and c != "\\" else "_" for c in name)


def _walk(root: Path, limits: Limits) -> tuple[Files, dict[str, str]]:
    """All files below, without hidden ones and those that systems leave; what is no plain file is refused."""
    images, others, refused, count = [], [], {}, 0
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        for name in sorted(names):
            if _is_hidden(name):
                continue
            count += 1
            if count > limits.files:
                raise Invalid(f"{root.name} holds more than {limits.files:,} files. Upload it in parts.")
            file = Path(folder, name)
            path = file.relative_to(root).as_posix()
            if not file.is_file():
                refused[printable(path)] = "is a link to nothing, a device or a pipe; only plain files are taken."
            elif _is_image(file):
                images.append(path)
            else:
                others.append(path)
    return Files(root, tuple(sorted(images)), tuple(sorted(others)), limits), refused


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM


def _is_companion(path: str) -> bool:
    return PurePosixPath(path).name.lower().startswith(_COMPANION_NAMES)


def _is_image(file: Path) -> bool:
    if file.suffix.lower() in IMAGE_SUFFIXES:
        return True
    if file.suffix.lower() in _LABEL_SUFFIXES and file.suffix.lower() != ".txt":
        return False
    try:
        with file.open("rb") as opened:
            return looks_like_image(opened.read(16))
    except OSError:
        return False

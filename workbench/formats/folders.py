"""Data set folders as values and back, without any store: to split one up, to compare, to convert."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from workbench.blobs import digests
from workbench.dataset import Frame, LabeledFrame
from workbench.errors import Invalid
from workbench.formats.checkout import coco_document
from workbench.formats.images import frame_of, read_file
from workbench.formats.labels import place
from workbench.formats.limits import Limits
from workbench.formats.source import SourceImage, open_source
from workbench.taxonomy import Taxonomy


def read_labeled_folder(folder: Path, limits: Limits = Limits()) -> tuple[Taxonomy, list[LabeledFrame]]:
    """A COCO, YOLO or VOC folder (or archive), or one of pictures: every picture that can be used, as an upload would
    name and label it, sorted by name; what an upload would refuse is left out. A frame's `blob` is the md5 of the bytes
    an upload would store.

    Raises NotFound or Invalid as an upload does.
    """
    frames = []
    with open_source(folder, limits) as source:
        for image in source.images:
            try:
                frames.append(_read(source.root / image.path, image, limits))
            except Invalid:
                continue
    return source.taxonomy, sorted(frames, key=lambda one: one.frame.name)


def write_coco_folder(folder: Path, taxonomy: Taxonomy, splits: Mapping[str, Iterable[LabeledFrame]],
                      data: Path) -> Path:
    """Writes frames that `read_labeled_folder(data)` gave as a COCO data set; an older one at `folder` is replaced.

    splits  "train", "val" and "test" -> frames; pictures lie in images/<split>/<frame name>, copied from the folder
            `data`, labels in annotations/instances_<split>.json
    Raises Invalid when a frame is not in `data`.
    """
    with open_source(data) as source:
        paths = {image.name: source.root / image.path for image in source.images}
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "annotations").mkdir(parents=True)
        for split, given in splits.items():
            frames = list(given)
            for one in frames:
                if one.frame.name not in paths:
                    raise Invalid(f"Frame {one.frame.name!r} is not in {data}.")
                target = folder / "images" / split / one.frame.name
                target.parent.mkdir(parents=True, exist_ok=True)
                _copy(paths[one.frame.name], target, one.frame)
            document = coco_document(taxonomy, [one for one in frames if one.annotations is not None])
            (folder / "annotations" / f"instances_{split}.json").write_text(
                json.dumps(document, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    return folder


def _read(path: Path, image: SourceImage, limits: Limits) -> LabeledFrame:
    picture = read_file(path, limits)
    placed = place(image.labels, image.name, picture.size, picture.file_size, picture.orientation, "human:unknown")
    return LabeledFrame(frame_of(image.name, picture, digests(picture.data)), placed.annotations, image.labels.split)


def _copy(path: Path, target: Path, frame: Frame) -> None:
    if frame.orientation == 1:
        shutil.copyfile(path, target)
    else:  # boxes are those of the upright picture
        target.write_bytes(read_file(path).data)

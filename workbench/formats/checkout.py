"""Checkout: a version as the plain COCO folder that a training script reads; pixels are linked, not copied."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from workbench.annotation import DECIMALS
from workbench.blobs import Blobs
from workbench.dataset import SPLITS, LabeledFrame, Manifest
from workbench.errors import Invalid
from workbench.taxonomy import Taxonomy


def write_checkout(manifest: Manifest, blobs: Blobs, folder: Path, ref: str = "") -> Path:
    """Writes the labelled frames of a version below `folder`, which is made and must be empty:

    frames/<frame name>               the pixels: links to the blobs, copies where links cannot be
    train.json val.json test.json     COCO detection; category ids are 0..C-1 in taxonomy order; a split without a
                                      labelled frame has an empty list
    dataset.json                      {"ref", "digest", "labels"}, written last: where it stands the rest is complete

    Returns the folder. Raises Invalid when it is not empty, NotFound when a blob is missing.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise Invalid(f"{folder} is not empty; a checkout goes into a new folder.")
    (folder / "frames").mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        frames = manifest.split(split)
        for one in frames:
            link_blob(blobs, one.frame.blob, folder / "frames" / one.frame.name)
        _write_json(folder / f"{split}.json", coco_document(manifest.taxonomy, frames, first_category=0))
    facts = {"ref": ref, "digest": manifest.digest, "labels": list(manifest.taxonomy.labels)}
    _write_json(folder / "dataset.json", facts)
    return folder


def coco_document(taxonomy: Taxonomy, frames: Iterable[LabeledFrame], first_category: int = 1) -> dict[str, Any]:
    """COCO detection as JSON values, boxes only; ids count from 1, those of categories, in taxonomy order, from
    `first_category`: readers such as Datumaro take category 0 for the background."""
    images, annotations = [], []
    for one in frames:
        images.append({"id": len(images) + 1, "file_name": one.frame.name, "width": one.frame.width,
                       "height": one.frame.height})
        for annotation in one.annotations or ():
            if annotation.xyxy is None:
                continue
            x1, y1, x2, y2 = annotation.xyxy
            width, height = round(x2 - x1, DECIMALS), round(y2 - y1, DECIMALS)
            annotations.append({
                "id": len(annotations) + 1, "image_id": len(images),
                "category_id": taxonomy.class_id(annotation.label) + first_category,
                "bbox": [round(x1, DECIMALS), round(y1, DECIMALS), width, height], "area": round(width * height, 4),
                "iscrowd": 0, "segmentation": [],
                **({"attributes": annotation.attributes} if annotation.attributes else {})})
    categories = [{"id": index, "name": label, "supercategory": ""}
                  for index, label in enumerate(taxonomy.labels, first_category)]
    return {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}


def link_blob(blobs: Blobs, md5: str, path: Path) -> None:
    """A hard link to the blob, else a symbolic one, else a copy; blobs are read-only, so a reader changes none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blob = blobs.path(md5)
    for link in (os.link, os.symlink, shutil.copyfile):
        try:
            link(blob.resolve(), path)
            return
        except (OSError, NotImplementedError) as error:
            if link is shutil.copyfile or isinstance(error, FileExistsError):
                raise


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, allow_nan=False), encoding="utf-8")

"""Checkout: a version as the plain COCO folder that a training script reads; pixels are linked, not copied."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from workbench.annotation import DECIMALS, Annotation
from workbench.blobs import Blobs
from workbench.dataset import SPLITS, LabeledFrame, Manifest
from workbench.errors import Invalid
from workbench.evaluation.matching import box_of
from workbench.formats.labels import polygon_area
from workbench.formats.outlines import decode_rle
from workbench.taxonomy import Taxonomy


def write_checkout(manifest: Manifest, blobs: Blobs, folder: Path, ref: str = "", unlabelled: bool = False) -> Path:
    """Writes the labelled frames of a version below `folder`, which is made and must be empty:

    frames/<frame name>               the pixels: links to the blobs, copies where links cannot be
    train.json val.json test.json     COCO (`coco_document`); category ids are 0..C-1 in taxonomy order; a split without
                                      a labelled frame has an empty list
    unlabelled.json                   if asked for: the frames of train that nobody looked at
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
    if unlabelled:
        frames = [one for one in manifest.split("train", labeled_only=False) if one.annotations is None]
        for one in frames:
            link_blob(blobs, one.frame.blob, folder / "frames" / one.frame.name)
        _write_json(folder / "unlabelled.json", coco_document(manifest.taxonomy, frames, first_category=0))
    facts = {"ref": ref, "digest": manifest.digest, "labels": list(manifest.taxonomy.labels)}
    _write_json(folder / "dataset.json", facts)
    return folder


def coco_document(taxonomy: Taxonomy, frames: Iterable[LabeledFrame], first_category: int = 1) -> dict[str, Any]:
    """COCO as JSON values; ids count from 1, those of categories, in taxonomy order, from `first_category`: readers such
    as Datumaro take category 0 for the background.

    Boxes have an empty `segmentation`, polygons [[x1, y1, ...]] with their own area, masks their run-length encoding;
    all have a bbox. Every image has "tags", the category ids of what is said of the frame as a whole, [] for nothing.
    """
    images, annotations = [], []
    for one in frames:
        drawn = one.annotations or ()
        shapes = [(annotation, _shape(annotation)) for annotation in drawn]
        tags = [taxonomy.class_id(annotation.label) + first_category for annotation, shape in shapes if shape is None]
        images.append({"id": len(images) + 1, "file_name": one.frame.name, "width": one.frame.width,
                       "height": one.frame.height, "tags": sorted(set(tags))})
        for annotation, shape in shapes:
            if shape is None:
                continue
            annotations.append({
                "id": len(annotations) + 1, "image_id": len(images),
                "category_id": taxonomy.class_id(annotation.label) + first_category, **shape, "iscrowd": 0,
                **({"attributes": annotation.attributes} if annotation.attributes else {})})
    categories = [{"id": index, "name": label, "supercategory": ""}
                  for index, label in enumerate(taxonomy.labels, first_category)]
    return {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}


def _shape(annotation: Annotation) -> dict[str, Any] | None:
    """"bbox", "area" and "segmentation" of what is drawn, None for a tag."""
    segmentation: Any = []
    around, area = box_of(annotation), None
    if annotation.polygon is not None:
        segmentation = [[round(value, DECIMALS) for point in annotation.polygon for value in point]]
        area = polygon_area(annotation.polygon)
    elif annotation.mask is not None:
        segmentation, mask = annotation.mask, decode_rle(annotation.mask)
        area = float(mask.sum())
        ys, xs = np.nonzero(mask)
        if around is None and len(xs):
            around = float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1)
        around = around or (0.0, 0.0, 0.0, 0.0)
    if around is None:
        return None
    x1, y1, x2, y2 = around
    width, height = round(x2 - x1, DECIMALS), round(y2 - y1, DECIMALS)
    return {"bbox": [round(x1, DECIMALS), round(y1, DECIMALS), width, height],
            "area": round(width * height if area is None else area, 4), "segmentation": segmentation}


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

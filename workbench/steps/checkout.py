"""Checkout: a version as the folder `data` that a training gets, for a train.py that is run by hand."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from workbench.blobs import Blobs
from workbench.dataset import SPLITS
from workbench.errors import Invalid, NotFound
from workbench.ports import DatasetStore
from workbench.steps.retrain import labelled, lay_out


@dataclass(frozen=True)
class Checkout:
    """version: the reference; frames: split -> labelled frames in it; labels: class_id -> label."""

    version: str
    folder: Path
    frames: dict[str, int]
    labels: tuple[str, ...]


def checkout(version: str, folder: Path, *, store: DatasetStore, blobs: Blobs, unlabelled: bool = False) -> Checkout:
    """Writes a version into `folder`, whole or not at all, as a training gets it (steps/retrain, docs/adopting.md).

    version     a data set's name for its latest version, or a reference
    folder      is made; may be there already when it is empty
    unlabelled  also the frames of train that nobody looked at

    Raises Invalid when `folder` holds anything or cannot be written, when nothing in the train split is labelled or a
    blob is damaged, NotFound for a version or a blob there is not.
    """
    dataset, at, _ = version.partition("@")
    if not at:
        versions = store.versions(dataset)
        if not versions:
            raise NotFound(f"Data set {dataset} has no version yet; publish one first.")
        version = versions[0].ref
    record, manifest = labelled(version, store)
    place = folder.resolve()
    try:
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            what = "is not empty" if place.is_dir() else "is a file"
            raise Invalid(f"{folder} {what}, and a checkout replaces nothing. Name a folder that is not there yet.")
        place.parent.mkdir(parents=True, exist_ok=True)
        # Beside its place, so that what is written moves there in one step and a kill leaves no half of it.
        with tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as temporary:
            lay_out(manifest, blobs, record.ref, Path(temporary) / "data", unlabelled)
            (Path(temporary) / "data").rename(place)
    except OSError as error:
        raise Invalid(f"{folder} cannot be written: {error.strerror or error}. Name a folder where you may write and "
                      "there is room.") from error
    frames = {split: len(manifest.split(split)) for split in SPLITS}
    return Checkout(record.ref, place, frames, manifest.taxonomy.labels)

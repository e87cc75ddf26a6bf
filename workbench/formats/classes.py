"""Folders that name tags: <split>/<label>/<picture>, the form in which data sets for classification are passed on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath

from workbench.formats.labels import ImageLabels, LabelBox, Labels, usable_label
from workbench.formats.source import Files, is_structure, split_of
from workbench.taxonomy import Taxonomy

# Folders of data sets for other things, which are no labels.
_OTHER = {"labels", "annotations", "masks", "mask", "gt", "groundtruth", "img", "image"}


def read(files: Files) -> Labels | None:
    """Every picture tagged with its folder's name, or None where the folders do not say tags.

    They do when all pictures lie at <split>/<label>/<picture>, or without a label at <split>/<picture> (a test set that
    others keep the answers of), with at least two labels, and no split has a label that the training split lacks: those
    are folders of videos or of sites. Folders without a split above them are never taken for labels, for people sort
    pictures in many ways.
    """
    folders = {image: _folders(image) for image in files.images}
    if not folders or any(found is None for found in folders.values()):
        return None
    by_split: dict[str, set[str]] = {}
    for split, label in folders.values():
        if label:
            by_split.setdefault(split, set()).add(label)
    known = by_split.get("train", set()) if len(by_split) > 1 else set().union(*by_split.values())
    if len(known) < 2 or any(given - known for given in by_split.values()):
        return None
    if any(is_structure(label) or label.lower() in _OTHER for label in known):
        return None
    labels = Labels()
    usable = {folder: usable_label(folder) for folder in sorted(known)}
    labels.taxonomy = Taxonomy(tuple(dict.fromkeys(label for label in usable.values() if label)))
    for image, (split, folder) in folders.items():
        tags = None
        if folder and usable[folder]:
            tags = (LabelBox(usable[folder], None, str(PurePosixPath(image).parent)),)
        elif folder:
            labels.refused[str(PurePosixPath(image).parent)] = (f"{folder[:40]!r} is no usable label; its pictures are "
                                                                "taken without one.")
        labels.images[image] = ImageLabels(tags, split)
    labels.warnings["folders"] = (f"the pictures lie in one folder per label, so each is tagged with its folder's name: "
                                  f"{', '.join(labels.taxonomy.labels[:10])}{' ...' * (len(labels.taxonomy) > 10)}.")
    return labels


def hint(names: Iterable[str]) -> dict[str, str]:
    """A warning, under "folders", where frame names <folder>/<picture> could mean labels, {} otherwise."""
    parts = [PurePosixPath(name).parts for name in names]
    found = sorted({one[0] for one in parts})
    if len(found) < 2 or any(len(one) != 2 for one in parts):
        return {}
    return {"folders": f"the pictures lie in the folders {', '.join(found[:5])}{' ...' * (len(found) > 5)} and are taken "
                       f"without labels. If the folders are labels, put them below train/ (train/{found[0]}/...) and "
                       "upload that."}


def _folders(image: str) -> tuple[str, str] | None:
    """(split, label or "") of a picture, None where its path does not have this form."""
    parts = PurePosixPath(image).parts[:-1]
    for at, folder in enumerate(parts):
        split = split_of(f"{folder}/picture")
        if split is not None:
            return (split, "".join(parts[at + 1:])) if len(parts) - at <= 2 else None
    return None

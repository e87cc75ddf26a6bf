"""PASCAL VOC: JPEGImages/, Annotations/*.xml, ImageSets/Main/{train,val,test,trainval}.txt.

Coordinates are taken and written as they stand (zero-based, as LabelImg and Datumaro write them): the one pixel by
which VOC's one-based originals differ is smaller than an annotator's hand.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from xml.etree import ElementTree  # for writing only; what is read goes through defusedxml

import defusedxml
import defusedxml.ElementTree as safe_xml

from workbench.blobs import Blobs
from workbench.dataset import SPLITS, LabeledFrame, Manifest
from workbench.errors import Invalid
from workbench.formats.checkout import link_blob
from workbench.formats.labels import ImageLabels, LabelBox, Labels, number, usable_label
from workbench.formats.source import Files, split_of
from workbench.taxonomy import Taxonomy

FLAGS = ("difficult", "truncated", "occluded")


def is_there(files: Files) -> bool:
    """XML files in Annotations/, or any whose text begins as a VOC annotation does."""
    paths = files.ending(".xml")
    if any("Annotations" in PurePosixPath(path).parts[:-1] for path in paths):
        return True
    for path in paths:
        try:
            if b"<annotation" in files.data(path)[:1024]:
                return True
        except Invalid:
            continue  # named when it is read, or as what is no image
    return False


def read(files: Files) -> Labels:
    """A picture without an XML file is one that nobody looked at; an XML file without objects: nothing is there.

    The taxonomy is that of labelmap.txt where there is one, else the labels that occur, sorted.
    """
    labels = Labels()
    splits = _splits(files, labels)
    read_from: dict[str, str] = {}
    for path in files.ending(".xml"):
        try:
            root = _parse(files.data(path))
            image = _image_of(files, path, root)
        except Invalid as error:
            labels.refused[path] = str(error)
            continue
        if image in read_from:
            labels.refused[path] = f"is the second label file for {image}, after {read_from[image]}; it is left out."
            continue
        read_from[image] = path
        boxes = tuple(box for index, node in enumerate(root.iter("object"), 1)
                      if (box := _box(node, f"{path} object {index}", labels.refused)) is not None)
        size = tuple(int(value) if (value := number(root.findtext(f"size/{side}"))) > 0 else 0
                     for side in ("width", "height"))
        if not all(size):
            labels.warnings[path] = "has no <size>; its boxes are held against the size of the picture file itself."
            size = None
        labels.images[image] = ImageLabels(boxes, None, size, path)
    for image in files.images:
        known = labels.images.get(image, ImageLabels())
        labels.images[image] = ImageLabels(known.boxes, splits.get(image) or split_of(image), known.size, known.where)
    used = {box.label for one in labels.images.values() for box in one.boxes or ()}
    labels.taxonomy = Taxonomy(tuple(_labelmap(files, labels.refused))).with_labels(sorted(used))
    return labels


def write(manifest: Manifest, blobs: Blobs, folder: Path) -> None:
    """JPEGImages/, Annotations/ (no file for a frame that nobody looked at), ImageSets/Main/ and labelmap.txt."""
    sets = folder / "ImageSets" / "Main"
    sets.mkdir(parents=True, exist_ok=True)
    for one in manifest.frames:
        link_blob(blobs, one.frame.blob, folder / "JPEGImages" / one.frame.name)
        if one.annotations is not None:
            file = (folder / "Annotations" / one.frame.name).with_suffix(".xml")
            file.parent.mkdir(parents=True, exist_ok=True)
            tree = ElementTree.ElementTree(_document(one))
            ElementTree.indent(tree)
            tree.write(file, encoding="utf-8", xml_declaration=True)
    for split in SPLITS:
        stems = [str(PurePosixPath(one.frame.name).with_suffix("")) for one in manifest.frames if one.split == split]
        if stems:
            (sets / f"{split}.txt").write_text("\n".join(stems) + "\n", encoding="utf-8")
    # VOC's own map: label, colour, parts, actions, separated by colons (Datumaro and CVAT read it)
    lines = ["# label:color_rgb:parts:actions", "background:::", *(f"{label}:::" for label in manifest.taxonomy.labels)]
    (folder / "labelmap.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _document(one: LabeledFrame) -> ElementTree.Element:
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = one.frame.name
    size = ElementTree.SubElement(root, "size")
    for side, value in (("width", one.frame.width), ("height", one.frame.height), ("depth", 3)):
        ElementTree.SubElement(size, side).text = str(value)
    for annotation in one.annotations or ():
        if annotation.xyxy is None:
            continue
        node = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(node, "name").text = annotation.label
        for flag in FLAGS:
            ElementTree.SubElement(node, flag).text = str(int(bool(annotation.attributes.get(flag))))
        box = ElementTree.SubElement(node, "bndbox")
        for side, value in zip(("xmin", "ymin", "xmax", "ymax"), annotation.xyxy):
            ElementTree.SubElement(box, side).text = f"{value:.2f}".rstrip("0").rstrip(".")
    return root


def _parse(data: bytes) -> ElementTree.Element:
    """Raises Invalid with the reason: not XML, no VOC annotation, or one with an entity or another document in it."""
    try:
        root = safe_xml.fromstring(data, forbid_dtd=False, forbid_entities=True, forbid_external=True)
    except defusedxml.DefusedXmlException as error:
        raise Invalid("declares an XML entity or points to another document, which can be used to attack the reader; "
                      "its labels are left out. Write the names out.") from error
    except (ElementTree.ParseError, ValueError, LookupError, RecursionError) as error:
        raise Invalid(f"is not XML ({error}); its labels are left out.") from error
    if root.tag != "annotation":
        raise Invalid(f"is no VOC annotation: it begins with <{root.tag[:40]}>, not <annotation>; it is left out.")
    return root


def _image_of(files: Files, path: str, root: ElementTree.Element) -> str:
    """The picture of an XML file: the one of the same stem (VOC's rule), else the one that <filename> names."""
    own = PurePosixPath(path)
    stems = [str(own.with_suffix(""))]
    parts = list(own.parts)
    if "Annotations" in parts[:-1]:
        at = parts.index("Annotations")
        stems = ["/".join([*parts[:at], folder, *PurePosixPath(*parts[at + 1:]).with_suffix("").parts])
                 for folder in ("JPEGImages", "images", "Images")] + stems
    for stem in stems:
        if images := files.images_of_stem(stem):
            return images[0]
    named = (root.findtext("filename") or "").strip()
    image = files.find_image(named) if named else None
    if image is None:
        raise Invalid(f"there is no picture for these labels ({named or own.stem}); they are left out.")
    return image


def _box(node: ElementTree.Element, where: str, refused: dict[str, str]) -> LabelBox | None:
    label = usable_label(node.findtext("name"))
    if label is None:
        refused[where] = f"has no usable <name> ({(node.findtext('name') or '')[:40]!r}); the box is left out."
        return None
    if node.find("bndbox") is None:
        refused[where] = f"of {label!r} has no <bndbox>; it is left out."
        return None
    values = tuple(number((node.findtext(f"bndbox/{side}") or "").strip()) for side in ("xmin", "ymin", "xmax", "ymax"))
    attributes = {flag: True for flag in FLAGS if (node.findtext(flag) or "").strip() == "1"}
    return LabelBox(label, values, where, attributes=attributes)


def _splits(files: Files, labels: Labels) -> dict[str, str]:
    """Picture -> split from ImageSets/Main. One that stands in two lists keeps the first of train, val, test, trainval
    (which counts as train): what was trained on is no test."""
    found: dict[str, str] = {}
    lists = {PurePosixPath(path).stem: path for path in files.ending(".txt")
             if PurePosixPath(path).parts[-3:-1] == ("ImageSets", "Main")}
    by_stem = {PurePosixPath(image).stem: image for image in files.images}
    for name in (*SPLITS, "trainval"):
        if name not in lists:
            continue
        split = "train" if name == "trainval" else name
        for line in files.lines(lists[name], labels.refused):
            # "name", "name 1" (VOC's class lists), or a name with blanks in it; the name may have folders
            found_for = (files.find_image(stem) or _beside(files, lists[name], stem) or by_stem.get(stem)
                         for stem in (line, line.split()[0]))
            image = next(filter(None, found_for), None)
            if image is None:
                labels.warnings[f"{lists[name]} {line[:80]}"] = "names a picture that is not there."
            elif found.setdefault(image, split) != split and name != "trainval":
                labels.warnings[f"{lists[name]} {line[:80]}"] = (f"stands in the {found[image]} list too; it stays "
                                                                 "there.")
    return found


def _beside(files: Files, path: str, stem: str) -> str | None:
    """The picture of that stem in the JPEGImages/ that stands beside the list's ImageSets/."""
    parts = PurePosixPath(path).parts
    base = parts[: parts.index("ImageSets")]
    images = [image for folder in ("JPEGImages", "images")
              for image in files.images_of_stem("/".join((*base, folder, stem)))]
    return images[0] if len(images) == 1 else None


def _labelmap(files: Files, refused: dict[str, str]) -> list[str]:
    path = next((path for path in files.ending(".txt") if PurePosixPath(path).name == "labelmap.txt"), None)
    lines = files.lines(path, refused) if path else []
    names = [usable_label(line.split(":")[0]) for line in lines if not line.startswith("#")]
    return [name for name in dict.fromkeys(names) if name and name != "background"]

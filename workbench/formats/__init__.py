"""Reading and writing the field's data set formats, and the archives they come in."""

from workbench.formats.folders import read_labeled_folder, write_coco_folder

__all__ = ["read_labeled_folder", "write_coco_folder"]

"""Limits: what an upload may cost before it is refused."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What is read from an upload.

    pixels         of one image, told from its header before anything is decoded; 50 MP are 150 MB of RGB
    image_bytes    of one image file
    label_bytes    of one label file; a COCO file of this size takes about ten times as much memory while it is read
    files          in one folder or archive
    archive_bytes  that an archive may unpack to
    ratio          unpacked bytes per byte of archive. Photographs give about 1, label texts 5 to 20, a blank bitmap
                   several hundred; deflate ends at 1,032 (zlib's technical details), which is where zip bombs are
    """

    pixels: int = 50_000_000
    image_bytes: int = 200 << 20
    label_bytes: int = 512 << 20
    files: int = 200_000
    archive_bytes: int = 50 << 30
    ratio: int = 200

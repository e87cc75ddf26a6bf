"""Files that a browser sent, kept below the home folder until their upload job has read them."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from workbench.errors import Invalid

CHUNK = 1 << 20
KEEP_S = 3600  # a job that was just submitted is not in the list of active jobs yet


def save(files: Sequence[BinaryIO], folder: Path) -> Path:
    """Writes the files (each with a `.name`, which may hold folders) and returns what an upload takes: the one zip, or
    the folder. The place is named by the content, so sending the same files again gives the same place.

    Raises Invalid for a name that leaves the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    half = Path(tempfile.mkdtemp(prefix=".half-", dir=folder))
    try:
        whole = hashlib.sha256()
        for file in sorted(files, key=lambda one: one.name):
            path = PurePosixPath(file.name.replace("\\", "/"))
            if path.is_absolute() or ".." in path.parts or not path.parts or not file.name.isprintable():
                raise Invalid(f"File name {file.name!r} leaves its folder. Rename the file and send it again.")
            whole.update(f"{path}\0".encode())
            target = half.joinpath(*path.parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.seek(0)
            with target.open("wb") as out:
                while chunk := file.read(CHUNK):
                    whole.update(chunk)
                    out.write(chunk)
        place = folder / whole.hexdigest()[:24]
        if place.exists():
            shutil.rmtree(half)
        else:
            half.rename(place)
    except BaseException:
        shutil.rmtree(half, ignore_errors=True)
        raise
    place.touch()
    is_archive = len(files) == 1 and files[0].name.lower().endswith(".zip")
    return place / files[0].name if is_archive else place


def sweep(folder: Path, needed: Collection[str]) -> None:
    """Removes what no active job reads (`needed`: their sources) and nobody sent within the last hour."""
    for place in folder.iterdir() if folder.is_dir() else ():
        if time.time() - place.stat().st_mtime > KEEP_S and not any(source.startswith(str(place)) for source in needed):
            shutil.rmtree(place, ignore_errors=True)

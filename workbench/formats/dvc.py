"""What DVC keeps in git for a tracked folder, so that `git clone` and stock `dvc pull` fetch the frames.

DVC 3: the folder is one JSON listing, stored under its own md5 with the suffix ".dir" beside the files it lists, at
files/md5/ab/cdef... of the remote, which is how workbench.blobs lays out its store.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit, urlunsplit

from workbench.dataset import Frame
from workbench.errors import Invalid

MD5 = re.compile(r"[0-9a-f]{32}")
# A clone must not turn into a repository inside a repository: git and DVC read their settings from such folders.
_RESERVED = re.compile(r"\.(git|dvc|hg)", re.IGNORECASE)


def check_frames(frames: Iterable[Frame]) -> None:
    """Raises Invalid, naming the frame, unless the frames can lie as files in one folder, each under its blob's md5."""
    names = set()
    for frame in frames:
        path = PurePosixPath(frame.name)
        if str(path) != frame.name or any(_RESERVED.match(part) for part in path.parts):
            raise Invalid(f"Frame {frame.name!r} cannot be published: rename it so that no part of its path is empty, "
                          "'.' or begins with .git, .dvc or .hg.")
        if not MD5.fullmatch(frame.blob):
            raise Invalid(f"Frame {frame.name!r} names the blob {frame.blob!r}; it must be an md5 (32 hexadecimal digits).")
        names.add(frame.name)
    for name in names:
        for folder in PurePosixPath(name).parents:
            if str(folder) in names:
                raise Invalid(f"Frame {str(folder)!r} is also the folder of {name!r}; rename one of them.")


def listing(frames: Iterable[Frame]) -> bytes:
    """The ".dir" object: DVC's own JSON (dvc_data.hashfile.tree.Tree.as_bytes), so that its md5 is DVC's own."""
    rows = [{"md5": frame.blob, "relpath": frame.name} for frame in frames]
    return json.dumps(sorted(rows, key=lambda row: row["relpath"]), sort_keys=True).encode()


def tracking_files(frames: tuple[Frame, ...], blobs_url: str, folder: str = "frames") -> dict[str, bytes]:
    """path -> content of every file that DVC wants in git: the folder's .dvc file and the settings of the remote."""
    size = sum(frame.size_bytes for frame in frames)
    lines = ["outs:", f"- md5: {hashlib.md5(listing(frames), usedforsecurity=False).hexdigest()}.dir"]
    if all(frame.size_bytes for frame in frames):
        lines.append(f"  size: {size}")
    lines += [f"  nfiles: {len(frames)}", "  hash: md5", f"  path: {folder}", ""]
    config = f"[core]\n    remote = storage\n['remote \"storage\"']\n    url = {_remote(blobs_url)}\n"
    return {
        f"{folder}.dvc": "\n".join(lines).encode(),
        ".dvc/config": config.encode(),
        ".dvc/.gitignore": b"/config.local\n/tmp\n/cache\n",
        ".dvcignore": b"",
        ".gitignore": f"/{folder}\n".encode(),
    }


def _remote(url: str) -> str:
    """The blob store's address as DVC takes it: an absolute path or a URL without credentials, quoted for ConfigObj."""
    scheme, _, rest = url.partition("://")
    if not rest or scheme in ("file", "local"):
        url = str(Path(rest or url).absolute())
    else:
        parts = urlsplit(url)
        url = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    if not url.isprintable():
        raise Invalid(f"The blob store's address {url!r} has characters that DVC's settings cannot hold.")
    if not re.search(r"[\"'#,]|^\s|\s$", url):
        return url
    for quote in ('"', "'", "'''"):
        if quote not in url:
            return f"{quote}{url}{quote}"
    raise Invalid(f"The blob store's address {url!r} has every kind of quote; DVC's settings cannot hold it.")

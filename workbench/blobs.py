"""The content-addressed store of pixels, laid out as DVC lays out its cache and remotes: files/md5/ab/cdef..."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import fsspec

from workbench.errors import Invalid, NotFound

MD5 = re.compile(r"[0-9a-f]{32}(\.dir)?")


@dataclass(frozen=True)
class Digests:
    md5: str
    sha256: str
    size_bytes: int


def digests(data: bytes) -> Digests:
    return Digests(hashlib.md5(data, usedforsecurity=False).hexdigest(), hashlib.sha256(data).hexdigest(), len(data))


class Blobs:
    """Blobs named by the md5 of their content, under a local folder or any fsspec URL (s3://bucket/prefix).

    A blob is written whole under another name and moved into place, so a reader never sees half of one.
    """

    def __init__(self, url: str, cache: Path | None = None) -> None:
        self.url = url
        self._fs, root = fsspec.core.url_to_fs(url)
        self._root = root.rstrip("/")
        self._is_local = isinstance(self._fs, fsspec.implementations.local.LocalFileSystem)
        self._cache = cache

    def key(self, md5: str) -> str:
        if not MD5.fullmatch(md5):
            raise Invalid(f"Blob name {md5!r} must be the md5 of its content, 32 hexadecimal digits.")
        return f"{self._root}/files/md5/{md5[:2]}/{md5[2:]}"

    def put(self, data: bytes, suffix: str = "") -> Digests:
        """Stores bytes; storing them again does nothing. `suffix` ".dir" is DVC's mark of a directory listing."""
        made = digests(data)
        key = self.key(made.md5 + suffix)
        if self._fs.exists(key) and self._fs.size(key) == len(data):
            return made
        self._fs.makedirs(key.rsplit("/", 1)[0], exist_ok=True)
        if self._is_local:
            self._put_local(Path(key), data)
        else:
            self._fs.pipe_file(key, data)
        return made

    def get(self, md5: str) -> bytes:
        """The bytes, verified. Raises NotFound, or Invalid when they no longer have that md5."""
        try:
            data = self._fs.cat_file(self.key(md5))
        except FileNotFoundError as error:
            raise NotFound(f"Blob {md5} is not in {self.url}; restore the store from its backup.") from error
        if hashlib.md5(data, usedforsecurity=False).hexdigest() != md5.removesuffix(".dir"):
            raise Invalid(f"Blob {md5} in {self.url} is damaged: its content has another md5. Restore it from backup.")
        return data

    def exists(self, md5: str) -> bool:
        return self._fs.exists(self.key(md5))

    def path(self, md5: str) -> Path:
        """A local file with the blob's bytes: the store's own where it is local, else a verified copy in the cache."""
        if self._is_local:
            path = Path(self.key(md5))
            if not path.exists():
                raise NotFound(f"Blob {md5} is not in {self.url}; restore the store from its backup.")
            return path
        cache = self._cache or Path(tempfile.gettempdir()) / "workbench-blobs"
        path = cache / md5[:2] / md5[2:]
        if not path.exists():
            self._put_local(path, self.get(md5))
        return path

    @staticmethod
    def _put_local(path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, half = tempfile.mkstemp(dir=path.parent, prefix=".half-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(half, 0o444)
            os.replace(half, path)
        except BaseException:
            Path(half).unlink(missing_ok=True)
            raise

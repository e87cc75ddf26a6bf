"""Opens a zip or tar that a stranger packed: what is harmless is extracted, the rest is named with its reason."""

from __future__ import annotations

import fcntl
import shutil
import stat
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from workbench.errors import Invalid, Unavailable
from workbench.formats.limits import Limits

PREFIX = "workbench-upload-"
CHUNK = 1 << 20
# Blank bitmaps and short label files may compress beyond Limits.ratio; only what gets large can hurt.
SMALL_BYTES = 4 << 20
# A folder without a lock is somebody's who is about to lock it, unless it is older than this.
LOCKING_S = 60


class _Refused(Exception):
    """This entry is left out; the text is its reason."""


class _Enough(Exception):
    """This entry and everything after it is left out."""


@dataclass
class Extracted:
    """folder: what was good; refused: entry name -> reason."""

    folder: Path
    refused: dict[str, str] = field(default_factory=dict)


def is_archive(path: Path) -> bool:
    return path.is_file() and (zipfile.is_zipfile(path) or tarfile.is_tarfile(path))


@contextmanager
def extracted(path: Path, limits: Limits = Limits(), check: Callable[[], None] = lambda: None) -> Iterator[Extracted]:
    """The good entries of a zip or tar (.tar, .tar.gz, .tar.bz2, .tar.xz) in a temporary folder, removed at the end.

    An entry is refused when its name leaves the folder or cannot be one, when it is a link, a device or encrypted, when
    it is damaged, when its name stands twice, or when it goes beyond `limits`; bytes are counted as they come out, no
    header is believed. Archives inside of it are not opened. `check` is called between entries and may raise.

    Raises Invalid when the file is no such archive, Unavailable when the disk is full.
    """
    with _temporary_folder() as folder:
        found = Extracted(folder)
        try:
            if zipfile.is_zipfile(path):
                _unzip(path, found, _Counter(limits, path.stat().st_size), check)
            elif tarfile.is_tarfile(path):
                _untar(path, found, _Counter(limits, path.stat().st_size), check)
            else:
                raise Invalid(f"{path.name} is neither a zip nor a tar archive. Upload a folder, a .zip or a .tar.gz.")
        except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError) as error:
            raise Invalid(f"{path.name} is damaged or not a usable archive: {error}. Pack it again.") from error
        except OSError as error:
            raise Unavailable(f"{path.name} could not be unpacked below {folder.parent}: {error}. Free some space and "
                              "try again.") from error
        yield found


class _Counter:
    """Counts entries and bytes of one archive against its limits."""

    def __init__(self, limits: Limits, archive_bytes: int) -> None:
        self._limits, self._archive_bytes = limits, archive_bytes
        self._files = self._bytes = 0

    def entry(self) -> None:
        self._files += 1
        if self._files > self._limits.files:
            raise _Enough(f"the archive has more than {self._limits.files:,} entries; from here on nothing is read. "
                          "Upload it in parts.")

    def position(self, offset: int) -> None:
        """Where an entry begins in the unpacked tar: to skip a huge entry costs as much as to read it."""
        if offset > self._limits.archive_bytes:
            raise _Enough(self._too_large())

    def copy(self, source: BinaryIO, target: Path, packed_bytes: int | None) -> None:
        """Writes one entry, chunk by chunk; leaves no file behind when it goes beyond a limit."""
        written = 0
        try:
            with target.open("xb") as file:
                while chunk := source.read(CHUNK):
                    written += len(chunk)
                    self._check(written, packed_bytes)
                    file.write(chunk)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
        self._bytes += written

    def _check(self, written: int, packed_bytes: int | None) -> None:
        ratio, total = self._limits.ratio, self._bytes + written
        if written > SMALL_BYTES and packed_bytes is not None and written > ratio * max(packed_bytes, 1):
            raise _Refused(f"unpacks to more than {ratio} times its packed size: this is how zip bombs are made; it is "
                           "left out.")
        if total > SMALL_BYTES and total > ratio * self._archive_bytes:
            raise _Refused(f"the archive unpacks to more than {ratio} times its size with it: this is how zip bombs "
                           "are made; it is left out.")
        if total > self._limits.archive_bytes:
            raise _Refused(self._too_large())

    def _too_large(self) -> str:
        return (f"the archive unpacks to more than {self._limits.archive_bytes / 2**30:.1f} GiB with it; it is left "
                "out. Upload the archive in parts.")


def _unzip(path: Path, found: Extracted, counter: _Counter, check: Callable[[], None]) -> None:
    with zipfile.ZipFile(path) as archive:
        seen: set[str] = set()
        for entry in archive.infolist():
            check()
            name = getattr(entry, "orig_filename", entry.filename)
            try:
                counter.entry()
                if entry.filename.endswith("/"):
                    continue
                kind = stat.S_IFMT(entry.external_attr >> 16)
                if kind not in (0, stat.S_IFREG):
                    raise _Refused(f"is a {_KINDS.get(kind, 'special file')}; only plain files are taken.")
                if entry.flag_bits & 0x1:
                    raise _Refused("is encrypted; pack the archive again without a password.")
                target = _target(found.folder, name, seen)
                with archive.open(entry) as source:
                    counter.copy(source, target, entry.compress_size)
            except _Refused as reason:
                found.refused[_shown(name)] = str(reason)
            except _Enough as reason:
                found.refused[_shown(name)] = str(reason)
                return
            except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError) as error:
                found.refused[_shown(name)] = f"is damaged inside the archive ({error}); pack it again."


def _untar(path: Path, found: Extracted, counter: _Counter, check: Callable[[], None]) -> None:
    with tarfile.open(path, "r:*") as archive:
        seen: set[str] = set()
        while True:
            check()
            try:
                entry = archive.next()
            except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
                if not seen:
                    raise Invalid(f"{path.name} is damaged: {error}. Pack it again.") from error
                found.refused[path.name] = f"is damaged ({error}); what follows {len(seen)} good entries is lost."
                return
            if entry is None:
                return
            archive.members = []  # tarfile remembers every header: a long archive would fill the memory
            try:
                counter.entry()
                counter.position(entry.offset_data)
                if entry.isdir():
                    continue
                if not entry.isreg():
                    raise _Refused(f"is a {_TAR_KINDS.get(entry.type, 'special file')}; only plain files are taken.")
                target = _target(found.folder, entry.name, seen)
                with archive.extractfile(entry) as source:
                    counter.copy(source, target, None)
            except _Refused as reason:
                found.refused[_shown(entry.name)] = str(reason)
            except _Enough as reason:
                found.refused[_shown(entry.name)] = str(reason)
                return
            except (tarfile.TarError, zlib.error, EOFError) as error:
                found.refused[_shown(entry.name)] = f"is damaged inside the archive ({error}); pack it again."


_KINDS = {stat.S_IFLNK: "symbolic link", stat.S_IFDIR: "folder in disguise", stat.S_IFCHR: "device",
          stat.S_IFBLK: "device", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
_TAR_KINDS = {tarfile.SYMTYPE: "symbolic link", tarfile.LNKTYPE: "hard link", tarfile.CHRTYPE: "device",
              tarfile.BLKTYPE: "device", tarfile.FIFOTYPE: "pipe"}


def _target(folder: Path, name: str, seen: set[str]) -> Path:
    """Where an entry goes; its parent folders exist afterwards. Raises _Refused when the name is not harmless."""
    parts = PurePosixPath(name).parts
    if not parts or "\0" in name:
        raise _Refused("has no usable name.")
    if name.startswith("/"):
        raise _Refused("has an absolute path, which would be written outside the upload; only relative paths are "
                       "taken.")
    if ".." in parts:
        raise _Refused("has '..' in its path, which would be written outside the upload; only paths below it are "
                       "taken.")
    if "\\" in name:
        raise _Refused("has a backslash in its path; pack the archive again with '/' between folders.")
    if len(name) > 1 and name[1] == ":" and name[0].isalpha():
        raise _Refused("has a drive letter in its path; only relative paths are taken.")
    if any(len(part.encode(errors="surrogateescape")) > 255 for part in parts) or len(name) > 1000:
        raise _Refused("has a name that is too long for a file; shorten it.")
    plain = "/".join(parts)
    if plain in seen:
        raise _Refused("stands more than once in the archive; the first one is taken.")
    target = folder / plain
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            raise _Refused("is a file and a folder at once in this archive; it is left out.")
    except (FileExistsError, NotADirectoryError):
        raise _Refused("lies below another entry that is a file; it is left out.") from None
    except (UnicodeError, ValueError):
        raise _Refused("has a name that no file can have; rename it.") from None
    seen.add(plain)
    return target


def _shown(name: str) -> str:
    """The name with what does not print written out: it goes into reports and databases."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)[:500] or "(no name)"


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A folder that is gone afterwards; one whose process was killed goes when the next archive is opened.

    Its owner holds a lock on the file beside it, which the system takes back however the process ends.
    """
    _sweep(Path(tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    lock = folder.with_name(folder.name + ".lock")
    try:
        with lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            inside = folder / "files"
            inside.mkdir()
            yield inside
    finally:
        shutil.rmtree(folder)
        lock.unlink(missing_ok=True)


def _sweep(parent: Path) -> None:
    for lock in parent.glob(PREFIX + "*.lock"):
        try:
            with lock.open("r+") as file:
                if time.time() - lock.stat().st_mtime < LOCKING_S:
                    continue
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink(missing_ok=True)
        except OSError:
            continue  # in use, or somebody else's

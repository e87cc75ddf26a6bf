"""Archives that strangers packed."""

from __future__ import annotations

import io
import os
import stat
import struct
import tarfile
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import Cancelled, Invalid
from workbench.formats import archive
from workbench.formats.archive import extracted
from workbench.formats.limits import Limits


def pack(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as made:
        for name, data in entries.items():
            made.writestr(name, data)
    return path


def files_below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own place for temporary folders, to see what is left there."""
    folder = tmp_path / "temp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize(("name", "why"), [
    ("../evil.jpg", "'..'"), ("a/../../evil.jpg", "'..'"), ("/etc/evil.jpg", "absolute path"), ("a\\evil.jpg", "backslash"),
    ("..\\evil.jpg", "backslash"), ("C:evil.jpg", "drive letter"), ("c:/evil.jpg", "drive letter"), ("x" * 300, "too long"),
])
def test_a_name_that_leaves_the_upload_is_refused_and_the_good_entries_go_on(tmp_path: Path, temp: Path, name: str,
                                                                            why: str) -> None:
    packed = pack(tmp_path / "a.zip", {"good/1.jpg": b"one", name: b"evil", "good/2.jpg": b"two"})
    with extracted(packed) as found:
        assert files_below(found.folder) == {"good/1.jpg": b"one", "good/2.jpg": b"two"}
        assert list(found.refused) == [name] and why in found.refused[name]
    assert not list(temp.iterdir()) and not list(tmp_path.rglob("evil.jpg"))


def test_a_symbolic_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as made:
        link = zipfile.ZipInfo("link.jpg")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        made.writestr(link, "/etc/passwd")
        made.writestr("good.jpg", b"good")
    with extracted(tmp_path / "a.zip") as found:
        assert files_below(found.folder) == {"good.jpg": b"good"}
        assert found.refused == {"link.jpg": "is a symbolic link; only plain files are taken."}


def test_links_and_devices_in_a_tar_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as made:
        for name, kind in (("sym", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("dev", tarfile.CHRTYPE), ("pipe", tarfile.FIFOTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            made.addfile(entry)
        for name, data in (("../up.jpg", b"evil"), ("good.jpg", b"good")):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            made.addfile(entry, io.BytesIO(data))
    with extracted(tmp_path / "a.tar.gz") as found:
        assert files_below(found.folder) == {"good.jpg": b"good"}
        assert {name: reason.split(";")[0] for name, reason in found.refused.items()} == {
            "sym": "is a symbolic link", "hard": "is a hard link", "dev": "is a device", "pipe": "is a pipe",
            "../up.jpg": "has '..' in its path, which would be written outside the upload"}


def test_a_zip_bomb_is_refused_before_it_fills_the_disk(tmp_path: Path) -> None:
    packed = pack(tmp_path / "a.zip", {"good.jpg": b"good", "bomb.bmp": bytes(64 << 20)})
    assert packed.stat().st_size < 100_000
    with extracted(packed) as found:
        assert files_below(found.folder) == {"good.jpg": b"good"}
        assert "zip bomb" in found.refused["bomb.bmp"]


def test_a_bomb_in_a_tar_is_refused_too(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as made:
        entry = tarfile.TarInfo("bomb.bmp")
        entry.size = 64 << 20
        made.addfile(entry, io.BytesIO(bytes(entry.size)))
    with extracted(tmp_path / "a.tar.gz") as found:
        assert files_below(found.folder) == {} and "zip bomb" in found.refused["bomb.bmp"]


def test_many_small_bombs_are_counted_together(tmp_path: Path) -> None:
    packed = pack(tmp_path / "a.zip", {f"{index}.bmp": bytes(3 << 20) for index in range(40)})
    with extracted(packed) as found:
        unpacked = sum(map(len, files_below(found.folder).values()))
        assert unpacked <= max(4 << 20, 200 * packed.stat().st_size) and len(found.refused) >= 30


def test_bytes_are_counted_as_they_come_and_not_as_the_header_says(tmp_path: Path) -> None:
    packed = pack(tmp_path / "a.zip", {"liar.jpg": os.urandom(3 << 20)}, zipfile.ZIP_STORED)
    data = bytearray(packed.read_bytes())
    directory = data.rindex(b"PK\x01\x02")
    struct.pack_into("<I", data, directory + 24, 10)  # the unpacked size in the central directory: a lie
    packed.write_bytes(data)
    with extracted(packed, Limits(archive_bytes=1 << 20)) as found:
        assert files_below(found.folder) == {} and list(found.refused) == ["liar.jpg"]


def test_an_archive_beyond_its_size_loses_only_what_goes_beyond(tmp_path: Path) -> None:
    packed = pack(tmp_path / "a.zip", {"1": os.urandom(600), "2": os.urandom(600), "3": os.urandom(300)})
    with extracted(packed, Limits(archive_bytes=1000)) as found:
        assert sorted(files_below(found.folder)) == ["1", "3"] and "Upload the archive in parts" in found.refused["2"]


def test_an_archive_with_too_many_entries_is_read_up_to_the_limit(tmp_path: Path) -> None:
    packed = pack(tmp_path / "a.zip", {str(index): b"x" for index in range(10)})
    with extracted(packed, Limits(files=4)) as found:
        assert sorted(files_below(found.folder)) == ["0", "1", "2", "3"]
        assert list(found.refused) == ["4"] and "more than 4 entries" in found.refused["4"]


def test_an_encrypted_entry_is_refused(tmp_path: Path) -> None:
    packed = pack(tmp_path / "a.zip", {"secret.jpg": b"x", "good.jpg": b"good"})
    data = bytearray(packed.read_bytes())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + at] |= 1  # general purpose flag bit 0: encrypted
    packed.write_bytes(data)
    with extracted(packed) as found:
        assert files_below(found.folder) == {"good.jpg": b"good"} and "encrypted" in found.refused["secret.jpg"]


def test_a_damaged_entry_is_refused_and_leaves_no_half_file(tmp_path: Path) -> None:
    content = os.urandom(5 << 20)
    packed = pack(tmp_path / "a.zip", {"broken.jpg": content, "good.jpg": b"good"}, zipfile.ZIP_STORED)
    data = bytearray(packed.read_bytes())
    data[4 << 20] ^= 0xFF
    packed.write_bytes(data)
    with extracted(packed) as found:
        assert files_below(found.folder) == {"good.jpg": b"good"} and "damaged" in found.refused["broken.jpg"]


def test_a_name_that_stands_twice_is_taken_once(tmp_path: Path) -> None:
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "a.zip", "w") as made:
        warnings.simplefilter("ignore")
        made.writestr("a.jpg", b"first")
        made.writestr("a.jpg", b"second")
        made.writestr("./a.jpg", b"third")
    with extracted(tmp_path / "a.zip") as found:
        assert files_below(found.folder) == {"a.jpg": b"first"}
        assert sorted(found.refused) == ["./a.jpg", "a.jpg"] and "more than once" in found.refused["a.jpg"]


def test_an_entry_below_a_file_is_refused(tmp_path: Path) -> None:
    packed = pack(tmp_path / "a.zip", {"a": b"file", "a/b.jpg": b"below", "c/d": b"1", "c": b"folder"})
    with extracted(packed) as found:
        assert files_below(found.folder) == {"a": b"file", "c/d": b"1"} and sorted(found.refused) == ["a/b.jpg", "c"]


def test_an_archive_in_an_archive_stays_closed(tmp_path: Path) -> None:
    inner = pack(tmp_path / "inner.zip", {"a.jpg": b"x"}).read_bytes()
    with extracted(pack(tmp_path / "a.zip", {"inner.zip": inner})) as found:
        assert list(files_below(found.folder)) == ["inner.zip"]


def test_a_truncated_archive_and_a_text_file_are_invalid_and_leave_nothing(tmp_path: Path, temp: Path) -> None:
    packed = pack(tmp_path / "a.zip", {"a.jpg": os.urandom(1000)})
    packed.write_bytes(packed.read_bytes()[:600])
    (tmp_path / "b.zip").write_text("not an archive")
    for name in ("a.zip", "b.zip"):
        with pytest.raises(Invalid, match=name), extracted(tmp_path / name):
            pass
    assert not list(temp.iterdir())


def test_a_cancelled_upload_leaves_no_temporary_folder(tmp_path: Path, temp: Path) -> None:
    def cancelled() -> None:
        raise Cancelled("stop")

    with pytest.raises(Cancelled), extracted(pack(tmp_path / "a.zip", {"a": b"x"}), check=cancelled):
        pass
    assert not list(temp.iterdir())


def test_what_a_killed_process_left_goes_when_the_next_archive_is_opened(tmp_path: Path, temp: Path) -> None:
    left = temp / (archive.PREFIX + "killed")
    left.mkdir()
    (left / "half.jpg").write_bytes(b"half")
    lock = temp / (left.name + ".lock")
    lock.touch()
    packed = pack(tmp_path / "a.zip", {"a": b"x"})
    with extracted(packed):
        assert left.exists(), "a young folder may be one that is about to be locked"
    os.utime(lock, (time.time() - 3600, time.time() - 3600))
    with extracted(packed), extracted(packed) as inner:
        assert not left.exists() and not lock.exists()
        assert files_below(inner.folder) == {"a": b"x"}
    assert not list(temp.iterdir())


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(alphabet=st.sampled_from("ab./\\:\0 C~é\n"), min_size=1, max_size=12), min_size=1, max_size=6))
def test_whatever_the_names_nothing_is_written_outside(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as place:
        packed = Path(place, "a.zip")
        with warnings.catch_warnings(), zipfile.ZipFile(packed, "w") as made:
            warnings.simplefilter("ignore")
            for index, name in enumerate(names):
                entry = zipfile.ZipInfo("placeholder")
                entry.filename = name
                made.writestr(entry, str(index).encode())
        before = set(os.listdir(place))
        with extracted(packed) as found:
            inside = files_below(found.folder)
            assert all(".." not in Path(name).parts and not name.startswith("/") for name in inside)
            assert len(inside) + len(found.refused) <= len(names)
            assert all(reason for reason in found.refused.values())
            assert set(os.listdir(found.folder.parent)) == {"files"}
        assert set(os.listdir(place)) == before

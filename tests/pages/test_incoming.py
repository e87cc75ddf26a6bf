"""Files that a browser sent: kept once, named by content, never outside their folder."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path

import pytest

from app.incoming import save, sweep
from workbench.errors import Invalid


def sent(name: str, data: bytes) -> io.BytesIO:
    file = io.BytesIO(data)
    file.name = name
    return file


def test_one_zip_is_kept_as_a_file_and_pictures_as_a_folder(tmp_path: Path) -> None:
    archive = save([sent("frames.zip", b"zip")], tmp_path)
    folder = save([sent("b.jpg", b"2"), sent("set/a.jpg", b"1")], tmp_path)
    assert archive.name == "frames.zip" and archive.read_bytes() == b"zip"
    assert (folder / "set/a.jpg").read_bytes() == b"1" and (folder / "b.jpg").read_bytes() == b"2"


def test_the_same_files_sent_twice_lie_in_the_same_place(tmp_path: Path) -> None:
    first = save([sent("a.jpg", b"1"), sent("b.jpg", b"2")], tmp_path)
    second = save([sent("b.jpg", b"2"), sent("a.jpg", b"1")], tmp_path)
    assert first == second
    assert save([sent("a.jpg", b"1"), sent("b.jpg", b"3")], tmp_path) != first


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/a.jpg", "x/../../a.jpg", "..\\a.jpg", "a\n.jpg"])
def test_a_name_that_leaves_the_folder_is_refused_and_nothing_stays(tmp_path: Path, name: str) -> None:
    with pytest.raises(Invalid, match="leaves its folder"):
        save([sent("good.jpg", b"1"), sent(name, b"2")], tmp_path / "incoming")
    assert list((tmp_path / "incoming").iterdir()) == []
    assert not (tmp_path / "a.jpg").exists()


def test_what_no_job_needs_any_more_is_swept_after_an_hour(tmp_path: Path) -> None:
    old, needed, fresh = (save([sent("a.jpg", data)], tmp_path) for data in (b"1", b"2", b"3"))
    for place in (old, needed):
        os.utime(place, (time.time() - 7200,) * 2)
    sweep(tmp_path, [str(needed)])
    assert [place.exists() for place in (old, needed, fresh)] == [False, True, True]

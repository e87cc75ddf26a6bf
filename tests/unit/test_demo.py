"""The demo's own parts; the loop it runs is tested step by step, and as a whole in a browser."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from workbench import quickstart
from workbench.config import Config
from workbench.demo import TABLE, _folder, _stage
from workbench.errors import Invalid
from workbench.formats import read_labeled_folder
from workbench.wiring import Workbench

REQUEST = {"data": None, "seed": 0}


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    return quickstart.generate(tmp_path / "digits", seed=1, train=16, val=3, test=5)


def test_the_start_and_the_rest_share_no_frame_and_the_truth_is_of_the_rest(tmp_path: Path, digits: Path) -> None:
    staged = _stage(tmp_path / "demo", digits, start_frames=8, seed=0)
    _, start = read_labeled_folder(staged.start)
    _, rest = read_labeled_folder(staged.rest)
    _, truth = read_labeled_folder(staged.truth)
    _, whole = read_labeled_folder(digits)
    assert {one.split for one in start} == {"train", "val", "test"}
    assert {one.frame.blob for one in start}.isdisjoint(one.frame.blob for one in rest)
    assert {one.frame.blob for one in start} | {one.frame.blob for one in rest} == {one.frame.blob for one in whole}
    assert [one.frame for one in truth] == [one.frame for one in rest]
    assert all(one.annotations is None for one in rest) and all(one.annotations is not None for one in truth)
    assert (staged.start_frames, staged.rest_frames) == (len(start), len(rest)) == (13, 11)


def test_the_test_list_of_the_data_stays_the_test_list(tmp_path: Path, digits: Path) -> None:
    _, whole = read_labeled_folder(digits)
    _, start = read_labeled_folder(_stage(tmp_path / "demo", digits, start_frames=8, seed=0).start)
    assert ({one.frame.blob for one in start if one.split == "test"}
            == {one.frame.blob for one in whole if one.split == "test"})


def test_too_few_labelled_pictures_are_refused_with_their_number(tmp_path: Path, digits: Path) -> None:
    with pytest.raises(Invalid, match="19 others"):
        _stage(tmp_path / "demo", digits, start_frames=60, seed=0)


def test_a_demo_broken_off_goes_on_and_one_that_ended_is_not_told_again(tmp_path: Path) -> None:
    workbench = Workbench(replace(Config.read(tmp_path / "home", {}), person="ann"))
    first = _folder(workbench, "digits", REQUEST)
    assert _folder(workbench, "digits", REQUEST) == first
    assert _folder(workbench, "digits", {**REQUEST, "seed": 1}).name == "digits-2"
    (first / TABLE).write_text("{}")
    assert _folder(workbench, "digits", REQUEST).name == "digits-3"

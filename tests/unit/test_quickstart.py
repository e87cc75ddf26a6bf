"""The quick-start data set."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from workbench import quickstart
from workbench.errors import Invalid
from workbench.formats import read_labeled_folder
from workbench.quickstart import DIGITS, PHOTOGRAPHS, VISIBLE, draw_frame, generate


def content(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    sizes = {"train": 6, "val": 2, "test": 3}
    one, same, other = (content(generate(tmp_path / name, seed=seed, **sizes)) for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    assert one == same and len(one) == 11 + 3 + 1
    assert all(one[name] != other[name] for name in one if name.endswith(".jpg"))


def test_it_is_read_as_coco_with_its_splits(tmp_path: Path) -> None:
    taxonomy, frames = read_labeled_folder(generate(tmp_path / "q", train=20, val=4, test=6))
    assert taxonomy.labels == tuple("0123456789") and len(frames) == 30
    assert [sum(one.split == split for one in frames) for split in ("train", "val", "test")] == [20, 4, 6]
    assert all((one.frame.width, one.frame.height) == (320, 240) and one.annotations for one in frames)
    used = {a.label for one in frames for a in one.annotations}
    assert used == set(taxonomy.labels)


def test_a_part_can_be_left_unlabelled_with_its_truth_beside(tmp_path: Path) -> None:
    folder = generate(tmp_path / "q", train=10, val=2, test=3, unlabeled=6)
    _, frames = read_labeled_folder(folder)
    unseen = {one.frame.name: one for one in frames if one.annotations is None}
    truth = json.loads((folder / "truth.json").read_text())["frames"]
    assert sorted(truth) == sorted(unseen) and len(unseen) == 6 and {one.split for one in unseen.values()} == {"train"}
    _, whole = read_labeled_folder(generate(tmp_path / "whole", train=10, val=2, test=3))
    for one in whole:
        if one.frame.name in truth:
            assert one.frame.blob == unseen[one.frame.name].frame.blob
            assert [{"label": a.label, "xyxy": list(a.xyxy)} for a in one.annotations] == truth[one.frame.name]


def test_boxes_are_tight_around_every_digit_there_is() -> None:
    images, _ = quickstart._digits()
    for index, digit in enumerate(images):
        ink = quickstart._ink(digit, np.random.default_rng(index))
        inner = ink[2:-2, 2:-2] >= VISIBLE
        assert min(ink.shape) > 8 and inner[0].any() and inner[-1].any() and inner[:, 0].any() and inner[:, -1].any()
        outside = ink.copy()
        outside[2:-2, 2:-2] = 0
        assert outside.max() < VISIBLE, "nothing visible lies outside of the box"


def test_digits_are_readable_hardly_overlap_and_stand_out() -> None:
    sides = []
    for index in range(40):
        pixels, boxes = draw_frame("train", index)
        assert pixels.shape == (240, 320, 3) and pixels.dtype == np.uint8 and 1 <= len(boxes) <= 8
        for number, (_, (x1, y1, x2, y2)) in enumerate(boxes):
            assert 0 <= x1 < x2 <= 320 and 0 <= y1 < y2 <= 240
            sides.append(y2 - y1)
            inside, ring = pixels[y1:y2, x1:x2], pixels[max(y1 - 3, 0):y2 + 3, max(x1 - 3, 0):x2 + 3]
            assert inside.astype(int).max() - inside.min() > 60 and ring.size > inside.size
            for _, other in boxes[:number]:
                assert quickstart._overlap((x1, y1, x2, y2), other) <= quickstart.MAX_OVERLAP
    assert 16 <= min(sides) and max(sides) <= 64 and 24 <= np.median(sides) <= 44


def test_no_digit_and_no_photograph_is_in_two_splits() -> None:
    names = [name for group in PHOTOGRAPHS.values() for name in group]
    assert len(names) == len(set(names))
    stretches = sorted(DIGITS.values())
    assert all(one[1] <= following[0] for one, following in zip(stretches, stretches[1:]))
    for split in PHOTOGRAPHS:
        for name in PHOTOGRAPHS[split]:
            assert min(quickstart._photograph(name).shape[:2]) >= 240, "it lies in the wheel and is large enough"


def test_what_is_there_is_kept_replaced_or_left_alone(tmp_path: Path) -> None:
    folder = generate(tmp_path / "q", train=2, val=0, test=1)
    first = (folder / "quickstart.json").stat().st_mtime_ns
    generate(folder, train=2, val=0, test=1)
    assert (folder / "quickstart.json").stat().st_mtime_ns == first
    generate(folder, train=3, val=0, test=1)
    assert len(list(folder.rglob("*.jpg"))) == 4 and [path.name for path in tmp_path.iterdir()] == ["q"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(Invalid, match="something else"):
        generate(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.parametrize("options", [{"train": -1}, {"train": 2, "unlabeled": 3}, {"train": 0, "val": 0, "test": 0}, {"size": (100, 240)}])
def test_numbers_that_make_no_sense_are_invalid(tmp_path: Path, options: dict) -> None:
    with pytest.raises(Invalid):
        generate(tmp_path / "q", **options)
    assert not list(tmp_path.iterdir())

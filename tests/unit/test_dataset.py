"""Frames, manifests, digests, diffs, splits and version numbers."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, strategies as st

from workbench.annotation import Annotation
from workbench.dataset import (Frame, LabeledFrame, Manifest, assign_splits, check_dataset_name, diff, next_version,
                               parse_ref)
from workbench.errors import Invalid
from workbench.taxonomy import Taxonomy

CARS = Taxonomy(("car", "lorry"))


def labeled(name: str, *annotations: Annotation, seen: bool = True, split: str = "train") -> LabeledFrame:
    return LabeledFrame(Frame(name, 100, 80, "0" * 32), tuple(annotations) if seen else None, split)


def box(id: str, label: str = "car", x: float = 1) -> Annotation:
    return Annotation(label, (x, 1, x + 10, 20), id=id)


def test_the_same_content_in_another_order_has_the_same_digest() -> None:
    frames = [labeled(f"{i}.jpg", box(f"a{i}"), box(f"b{i}")) for i in range(5)]
    shuffled = [replace(one, annotations=tuple(reversed(one.annotations))) for one in random.Random(0).sample(frames, 5)]
    assert Manifest(CARS, tuple(frames)).digest == Manifest(CARS, tuple(shuffled)).digest


def test_a_frame_nobody_looked_at_is_not_background() -> None:
    unseen, empty = Manifest(CARS, (labeled("a.jpg", seen=False),)), Manifest(CARS, (labeled("a.jpg"),))
    assert unseen.digest != empty.digest
    assert (len(unseen.labeled), len(empty.labeled)) == (0, 1)
    assert unseen.split("train") == () and len(unseen.split("train", labeled_only=False)) == 1


def test_a_manifest_survives_its_lines() -> None:
    manifest = Manifest(CARS, (labeled("b/ü.jpg", box("1")), labeled("a.jpg", seen=False)))
    again = Manifest.from_lines(manifest.to_lines())
    assert again == manifest and again.digest == manifest.digest


@pytest.mark.parametrize("frames", [
    (labeled("a.jpg"), labeled("a.jpg")), (labeled("a.jpg", box("1", "bus")),), (labeled("a.jpg", box("1", x=95)),)])
def test_a_manifest_that_contradicts_itself_is_refused(frames: tuple) -> None:
    with pytest.raises(Invalid, match="a.jpg"):
        Manifest(CARS, frames)


@pytest.mark.parametrize("name", ["", "/a", "../a", "a/../b", "a\\b", "a\nb"])
def test_a_frame_name_that_leaves_its_folder_is_refused(name: str) -> None:
    with pytest.raises(Invalid):
        Frame(name, 1, 1, "0" * 32)


def test_what_changed_between_two_versions_is_told_box_by_box() -> None:
    old = Manifest(CARS, (labeled("a", box("1"), box("2")), labeled("b", seen=False), labeled("gone", box("9"))))
    new = Manifest(CARS.with_labels(["bus"]), (labeled("a", box("1", x=5), box("3")), labeled("b"), labeled("new")))
    found = diff(old, new)
    assert (found.frames_added, found.frames_removed, found.frames_relabeled) == (("new",), ("gone",), ("a", "b"))
    assert (found.boxes_added, found.boxes_changed) == ((("a", "3"),), (("a", "1"),))
    assert found.boxes_removed == (("a", "2"), ("gone", "9"))
    assert (found.labels_added, found.bump) == (("bus",), "minor")
    assert diff(old, old).is_empty


def test_the_version_number_moves_as_far_as_the_change() -> None:
    one = Manifest(CARS, (labeled("a", box("1")),))
    assert diff(one, Manifest(CARS, one.frames + (labeled("b", seen=False),))).bump == "patch"
    assert diff(one, Manifest(Taxonomy(("car",)), one.frames)).bump == "major"
    assert [next_version(*step) for step in [(None, "patch"), ("0.1.0", "patch"), ("0.1.9", "minor"), ("0.2.1", "major")]] \
        == ["0.1.0", "0.1.1", "0.2.0", "1.0.0"]


@given(st.lists(st.text("0123456789abcdef", min_size=32, max_size=32), unique=True, max_size=50))
def test_a_frame_never_changes_its_split(md5s: list[str]) -> None:
    frames = [LabeledFrame(Frame(f"{i}.jpg", 1, 1, md5)) for i, md5 in enumerate(md5s)]
    together = {one.frame.blob: one.split for one in assign_splits(frames)}
    alone = {one.frame.blob: assign_splits([one])[0].split for one in frames}
    assert together == alone
    assert assign_splits([replace(one, split="val") for one in frames]) == tuple(replace(one, split="val") for one in frames)


def test_splits_come_out_in_their_shares() -> None:
    frames = [LabeledFrame(Frame(f"{i}", 1, 1, f"{random.Random(i).getrandbits(128):032x}")) for i in range(4000)]
    shares = [one.split for one in assign_splits(frames)]
    # Three standard deviations of a binomial share at n = 4000 are 0.019 at most.
    assert shares.count("test") / 4000 == pytest.approx(0.2, abs=0.02)
    assert shares.count("val") / 4000 == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("ref", ["cells", "cells@1", "cells@1.0", "Cells@1.0.0", "cells@01.0.0", "../x@1.0.0", "cells@1.0.0-x"])
def test_a_reference_of_another_form_is_refused(ref: str) -> None:
    with pytest.raises(Invalid):
        parse_ref(ref)
    assert parse_ref("cells@1.4.0") == ("cells", "1.4.0")


@pytest.mark.parametrize("name", ["", "A", "a b", "-a", "a/b", "..", "a" * 64])
def test_a_data_set_name_that_is_no_safe_folder_is_refused(name: str) -> None:
    with pytest.raises(Invalid):
        check_dataset_name(name)

"""Which frames calibrate, how far activations reach on them, and what is refused."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from workbench.annotation import Annotation
from workbench.errors import Invalid
from workbench.inference.calibration import BINS, LEAST_FRAMES, METHODS, Ranges, check_frames, choose, digest, embed


def looks(count: int, groups: int, seed: int = 0) -> np.ndarray:
    """Embeddings of `groups` well separated kinds of frames, one after the other."""
    noise = np.random.default_rng(seed).normal(0, 0.01, (count, 4))
    return np.repeat(np.eye(groups, 4), count // groups, axis=0) + noise


class TestChoose:
    def test_the_same_seed_gives_the_same_frames_and_another_one_others(self) -> None:
        labels, embeddings = [["red"]] * 200, looks(200, 4)
        first = choose(labels, embeddings, 32, seed=1)
        assert first == choose(labels, embeddings, 32, seed=1) != choose(labels, embeddings, 32, seed=2)
        assert len(set(first)) == 32

    def test_rare_looks_and_rare_labels_are_not_drowned_by_the_many(self) -> None:
        # 190 frames of one scene with cars, 10 of another, of which 3 show a bus.
        embeddings = np.concatenate([np.tile([1.0, 0, 0, 0], (190, 1)), np.tile([0, 1.0, 0, 0], (10, 1))])
        embeddings += np.random.default_rng(0).normal(0, 0.001, embeddings.shape)
        labels = [["car"]] * 197 + [["car", "bus"]] * 3
        chosen = choose(labels, embeddings, 20, seed=0)
        # By chance 20 of 200 would hold one frame of the second scene and 0.3 buses.
        assert sum(index >= 190 for index in chosen) >= 3 and sum(index >= 197 for index in chosen) >= 2

    def test_frames_without_labels_take_part_but_do_not_crowd_out_labelled_ones(self) -> None:
        labels = [["red"] if index % 4 == 0 else [] for index in range(100)]
        chosen = choose(labels, looks(100, 4), 40, seed=0)
        counts = Counter(bool(labels[index]) for index in chosen)
        assert counts[True] >= 15 and counts[False] >= 15

    @pytest.mark.parametrize(("there", "asked"), [(3, 100), (LEAST_FRAMES - 1, 100), (200, 3)])
    def test_a_handful_of_frames_is_refused_with_the_next_step(self, there: int, asked: int) -> None:
        with pytest.raises(Invalid, match=f"{min(there, asked)} frames are too few.*{LEAST_FRAMES}.*Upload more"):
            choose([["red"]] * there, np.zeros((there, 4)), asked, seed=0)

    def test_identical_pictures_can_be_chosen_too(self) -> None:
        assert len(choose([[]] * 30, np.zeros((30, 4)), 20, seed=0)) == 20


def test_alike_pictures_lie_close_and_others_apart() -> None:
    random = np.random.default_rng(0)
    dark = [np.clip(random.normal(40, 5, (90, 160, 3)), 0, 255).astype(np.uint8) for _ in range(2)]
    bright = np.clip(random.normal(200, 40, (300, 200, 3)), 0, 255).astype(np.uint8)
    one, same, other = map(embed, (*dark, bright))
    assert one.shape == same.shape == other.shape == (60,)
    assert np.linalg.norm(one - same) * 10 < np.linalg.norm(one - other)


def test_the_digest_is_about_frames_seed_and_kind_but_not_about_order() -> None:
    base = digest(["a", "b"], 0, "minmax")
    assert base == digest(["b", "a"], 0, "minmax") and len(base) == 64
    others = digest(["a", "c"], 0, "minmax"), digest(["a", "b"], 1, "minmax"), digest(["a", "b"], 0, "entropy")
    assert len({base, *others}) == 4


class TestCheckFrames:
    def test_a_label_the_model_does_not_know_is_named(self) -> None:
        drawn = {"1.png": (Annotation("red", (0, 0, 5, 5)),), "2.png": (Annotation("lorry", (0, 0, 5, 5)),),
                 "3.png": None}
        with pytest.raises(Invalid, match="2.png has the label 'lorry'.*knows red, blue.*taxonomy"):
            check_frames(drawn, {}, ("red", "blue"), {}, "student@1")

    def test_pixels_kept_for_the_certificate_are_refused(self) -> None:
        with pytest.raises(Invalid, match="a.png has the same pixels as test/b.png"):
            check_frames({"a.png": None}, {"a.png": "md5"}, ("red",), {"md5": "test/b.png"}, "student@1")
        check_frames({"a.png": ()}, {"a.png": "md5"}, ("red",), {"other": "test/b.png"}, "student@1")


class TestRanges:
    def test_each_method_on_values_worked_out_by_hand(self) -> None:
        # 99,999 values even in 0..1 and one outlier of 100.
        values = np.append(np.linspace(0, 1, 99_999), 100).astype(np.float32)
        seen = Ranges()
        seen.see({"t": values}, "f")
        assert seen.of("minmax") == {"t": (0.0, 100.0)}
        # 99.99 % of the values lie below 0.9999; the histogram's bins are 100 / 2048 wide.
        assert seen.of("percentile")["t"][1] == pytest.approx(1, abs=0.1)
        # One outlier is worth less than 127 levels for what lies in 0..1; entropy looks at 128 bins at least, 6.25
        # here.
        assert seen.of("entropy")["t"][1] <= 7

    def test_entropy_keeps_the_whole_range_of_values_that_fill_it_evenly(self) -> None:
        seen = Ranges()
        seen.see({"t": np.linspace(-1, 1, 100_000, dtype=np.float32)}, "f")
        low, high = seen.of("entropy")["t"]
        assert -1 <= low <= -0.95 and 0.95 <= high <= 1

    def test_ends_are_those_seen_and_signs_are_kept(self) -> None:
        seen = Ranges()
        seen.see({"t": np.array([-0.25, 3], np.float32)}, "f")
        seen.see({"t": np.array([[1], [-0.5]], np.float32)}, "g")
        assert seen.of("minmax") == {"t": (-0.5, 3.0)}

    def test_frames_of_growing_reach_count_as_if_the_reach_had_been_known(self) -> None:
        random = np.random.default_rng(0)
        frames = [np.abs(random.normal(0, scale, 5000)).astype(np.float32) for scale in (0.01, 0.5, 8, 1)]
        growing, known = Ranges(), Ranges()
        known.see({"t": np.array([np.concatenate(frames).max()], np.float32)}, "first")
        for frame in frames:
            growing.see({"t": frame}, "f")
            known.see({"t": frame}, "f")
        for method in METHODS:
            one, other = growing.of(method)["t"], known.of(method)["t"]
            # Doubling rounds the reach up to a power of two times the first, so bins are up to twice as wide.
            assert one[1] == pytest.approx(other[1], rel=0.05, abs=40 * 2 / BINS), method

    def test_large_tensors_are_sampled_but_their_largest_value_is_not_missed(self) -> None:
        values = np.zeros(1_000_003, np.float32)
        values[777_777] = 5
        seen = Ranges()
        seen.see({"t": values}, "f")
        assert seen.of("minmax") == {"t": (0.0, 5.0)}

    def test_tensors_of_zeros_have_an_empty_range(self) -> None:
        seen = Ranges()
        seen.see({"t": np.zeros(100, np.float32)}, "f")
        assert [seen.of(method)["t"] for method in METHODS] == [(0.0, 0.0)] * 3

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_a_nan_or_an_infinity_names_frame_and_tensor(self, value: float) -> None:
        with pytest.raises(Invalid, match="cells/7.png: tensor 'relu_3' holds a NaN or an infinity"):
            Ranges().see({"relu_3": np.array([1, value, 2], np.float32)}, "cells/7.png")

"""Search spaces as people write them, and how many trainings a machine holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from workbench.capacity import GIB, count_cores, free_memory, read_gpus, slots
from workbench.errors import Invalid
from workbench.search_space import Choice, Range, read_space, suggest


def test_a_space_of_lists_and_ranges_knows_its_values_and_its_size() -> None:
    space = read_space({"batch_size": [4, 8], "layers": {"low": 1, "high": 7, "step": 3},
                        "drop": {"low": 0, "high": 0.3, "step": 0.1}})
    assert space.parameters["batch_size"] == Choice((4, 8))
    assert space.parameters["layers"].values == (1, 4, 7) and all(type(one) is int for one in space.parameters["layers"].values)
    # 0.3 / 0.1 is 2.9999999999999996, and 3 * 0.1 is 0.30000000000000004.
    assert space.parameters["drop"].values == (0.0, 0.1, 0.2, 0.3)
    assert space.size == 2 * 3 * 4


def test_a_range_of_fractions_or_over_decades_has_no_end() -> None:
    space = read_space({"lr": {"low": 1e-4, "high": 0.1, "log": True}, "batch_size": [4, 8]})
    assert space.parameters["lr"] == Range(1e-4, 0.1, is_log=True) and space.size is None
    with pytest.raises(Invalid, match="A grid needs values it can count, and lr is a range without a step"):
        space.grid(0, 10)


def test_a_grid_has_every_combination_once_in_an_order_that_the_seed_decides() -> None:
    space = read_space({"a": [1, 2, 3], "b": ["x", "y"]})
    every = space.grid(0, 100)
    assert len(every) == 6 and len({tuple(one.items()) for one in every}) == 6
    assert space.grid(0, 4) == every[:4] and space.grid(0, 100) == every
    assert [one["a"] for one in every] != [1, 1, 2, 2, 3, 3]
    with pytest.raises(Invalid, match="has 10000000000 combinations"):
        read_space({name: list(range(100)) for name in "abcde"}).grid(0, 10)


@pytest.mark.parametrize(("record", "told"), [
    ([], "is a JSON object of at least one parameter"),
    ({}, "is a JSON object of at least one parameter"),
    ({"lr": 0.1}, "lr: write .* A single value goes into the fixed parameters"),
    ({"lr": []}, "lr: a list has 1 to 100 values, got 0"),
    ({"lr": list(range(101))}, "lr: a list has 1 to 100 values, got 101"),
    ({"lr": [1, 1]}, "lr: a value stands there twice"),
    ({"lr": [[1]]}, "is neither a number nor a word"),
    ({"lr": [float("nan")]}, "nan is neither a number nor a word"),
    ({"lr": [None]}, "None is neither a number nor a word"),
    ({"lr": {"low": 1}}, "lr: a range has low and high"),
    ({"lr": {"low": 1, "high": 2, "mid": 1}}, "lr: a range has low and high and may have log, step, whole; got low, high, mid"),
    ({"lr": {"low": 2, "high": 1}}, "low must be below high"),
    ({"lr": {"low": "1", "high": 2}}, "low must be a number, got '1'"),
    ({"lr": {"low": True, "high": 2}}, "low must be a number, got True"),
    ({"lr": {"low": 0, "high": float("inf")}}, "high must be a number, got inf"),
    ({"lr": {"low": 0, "high": 1, "log": True}}, "a logarithmic range begins above 0"),
    ({"lr": {"low": 1, "high": 9, "log": True, "step": 2}}, "a logarithmic range has no step"),
    ({"lr": {"low": 1, "high": 9, "log": "yes"}}, "log must be true or false, got 'yes'"),
    ({"lr": {"low": 1, "high": 9, "step": 0}}, "step must be above 0 and at most 8"),
    ({"lr": {"low": 1, "high": 9, "step": 10}}, "step must be above 0 and at most 8"),
    ({"lr": {"low": 0.5, "high": 9, "whole": True}}, "of whole numbers must be whole"),
])
def test_a_space_that_means_nothing_is_refused_with_the_parameter_and_the_reason(record: object, told: str) -> None:
    with pytest.raises(Invalid, match=told):
        read_space(record)


def test_what_is_suggested_for_a_recipe_can_be_read_and_covers_rate_batch_and_frozen_layers() -> None:
    proposed = suggest({"data": ("string", None), "lr": ("float", 0.001), "lr_backbone": ("float", 0), "batch_size": ("float", 8),
                        "freeze": ("float", 0), "epochs": ("float", 20), "colour": ("float", 0.2), "slr": ("float", 1)})
    # 0.001 / sqrt(10) and 0.001 * sqrt(10), to two digits; a rate of 0 has nothing around it.
    assert proposed == {"lr": {"low": 0.00032, "high": 0.0032, "log": True}, "batch_size": [4, 8, 16], "freeze": [0, 2, 4]}
    assert read_space(proposed).size is None
    assert suggest({"data": ("string", None), "C": ("float", 1.0)}) == {}


@pytest.mark.parametrize(("most", "cores", "memory", "gpus", "trials", "threads"), [
    (100, 8, 100, (), 8, 1),           # one a core
    (3, 8, 100, (), 3, 2),             # as wanted: 8 // 3 threads each
    (100, 8, 4, (), 2, 4),             # 0.85 * 4 GiB hold two trainings of 1.5 GiB
    (100, 8, 0, (), 1, 8),             # one is always tried
    (100, 8, 100, ("a", "b"), 2, 4),   # one a GPU
    (100, 1, 100, ("a", "b"), 2, 1),   # fewer cores than GPUs
])
def test_trials_at_once_are_as_many_as_the_scarcest_thing_allows(
        most: int, cores: int, memory: int, gpus: tuple[str, ...], trials: int, threads: int) -> None:
    found = slots(most, cores=cores, memory=memory * GIB, need=int(1.5 * GIB), gpus=gpus)
    assert (found.trials, found.threads) == (trials, threads)
    assert found.why.startswith(f"{trials} trial") and f"{memory}.0 GiB free memory of which a trial needs 1.5" in found.why


def test_a_container_with_a_share_of_time_and_memory_has_no_more_than_that(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text(f"{GIB}\n")
    (tmp_path / "memory.current").write_text(f"{GIB}\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 4096\n")
    # One and a half cores are two at most, and this machine may have one.
    assert count_cores(cgroup=tmp_path) == min(2, count_cores(cgroup=tmp_path / "none"))
    assert count_cores(1, tmp_path) == 1
    # All is used, but a page of a file that was read once is given up when memory is asked for.
    assert free_memory(tmp_path) == 4096
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(tmp_path) > 4096


def test_a_divided_gpu_counts_by_its_parts() -> None:
    listed = ("GPU 0: NVIDIA H200 (UUID: GPU-aaaa)\n"
              "GPU 1: NVIDIA H200 (UUID: GPU-bbbb)\n"
              "  MIG 3g.71gb     Device  0: (UUID: MIG-cccc)\n"
              "  MIG 3g.71gb     Device  1: (UUID: MIG-dddd)\n")
    assert read_gpus(listed) == ("GPU-aaaa", "MIG-cccc", "MIG-dddd")
    assert read_gpus("No devices were found\n") == ()

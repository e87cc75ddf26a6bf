"""What ports.Search promises, on Optuna."""

from __future__ import annotations

import pytest

from workbench.adapters.optuna import OptunaSearch
from workbench.errors import Invalid
from workbench.ports import Search
from workbench.search_space import read_space

SPACE = read_space({"lr": {"low": 1e-4, "high": 1, "log": True}, "layers": {"low": 0, "high": 4, "step": 2},
                    "kind": ["a", "b"]})


def value(params: dict) -> float:
    """Best where lr is 0.01; layers matter a little, kind not at all."""
    from math import log10
    return -abs(log10(params["lr"]) + 2) - 0.05 * params["layers"]


def run(search: Search, count: int, begun: list[dict] | None = None) -> list[dict]:
    """Trials one after the other; `begun` are known from before and told again."""
    tried = list(begun or [])
    for number, params in enumerate(tried):
        search.begin(number, params)
        search.tell(number, "complete", value(params))
    for number in range(len(tried), count):
        tried.append(search.ask(number))
        search.tell(number, "complete", value(tried[-1]))
    return tried


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_search_opened_anew_in_the_middle_goes_on_as_if_it_had_never_stopped(sampler: str) -> None:
    through = run(OptunaSearch(SPACE, trials=14, sampler=sampler, seed=3), 14)
    broken = run(OptunaSearch(SPACE, trials=14, sampler=sampler, seed=3), 14, through[:8])
    assert broken == through
    assert run(OptunaSearch(SPACE, trials=14, sampler=sampler, seed=4), 14) != through
    assert all(1e-4 <= one["lr"] <= 1 and one["layers"] in (0, 2, 4) and one["kind"] in "ab" for one in through)
    assert all(type(one["layers"]) is int for one in through)


def test_a_search_that_learns_ends_nearer_to_the_best_than_one_at_random() -> None:
    def median_of_the_last(sampler: str) -> float:
        ends = sorted(value(params) for seed in range(3)
                      for params in run(OptunaSearch(SPACE, trials=30, sampler=sampler, seed=seed), 30)[15:])
        return ends[len(ends) // 2]

    assert median_of_the_last("tpe") > median_of_the_last("random")


def test_a_grid_is_tried_out_and_its_trials_keep_their_numbers() -> None:
    space = read_space({"a": [1, 2], "b": ["x", "y"]})
    search, again = (OptunaSearch(space, trials=4, sampler="grid", seed=1) for _ in range(2))
    tried = [search.ask(number) for number in range(4)]
    assert sorted((one["a"], one["b"]) for one in tried) == [(1, "x"), (1, "y"), (2, "x"), (2, "y")]
    again.begin(0, tried[0])
    assert [again.ask(number) for number in (1, 2, 3)] == tried[1:]


@pytest.mark.parametrize("is_maximized", [True, False])
def test_the_median_pruner_ends_a_trial_that_is_behind_and_lets_a_leader_go_on(is_maximized: bool) -> None:
    sign = 1 if is_maximized else -1
    search = OptunaSearch(SPACE, trials=20, pruner="median", is_maximized=is_maximized)
    for number in range(6):
        search.ask(number)
        for epoch in range(1, 6):
            assert not search.report(number, epoch, sign * (number + epoch)) or number == 0
        search.tell(number, "complete", sign * (number + 5))
    search.ask(6), search.ask(7)
    behind = [search.report(6, epoch, sign * -10.0) for epoch in range(1, 6)]
    assert any(behind) and not behind[0]  # the first epoch is not judged
    assert not any(search.report(7, epoch, sign * 100.0) for epoch in range(1, 6))


def test_without_a_pruner_nothing_is_pruned_and_an_epoch_told_twice_is_no_error() -> None:
    search = OptunaSearch(SPACE, trials=20, pruner="none")
    for number in range(8):
        search.ask(number)
        assert not any(search.report(number, epoch, -float(number)) for epoch in (1, 2, 2, 3))
        search.tell(number, "failed") if number % 2 else search.tell(number, "pruned")
    assert search.importance() == {}


def test_importance_names_what_made_the_difference_and_leaves_out_what_was_never_varied() -> None:
    space = read_space({"lr": {"low": 1e-4, "high": 1, "log": True}, "layers": [0, 2, 4], "kind": ["only"]})
    search = OptunaSearch(space, trials=30, sampler="random")
    run(search, 9)
    assert search.importance() == {}  # of nine trials it would be a guess
    found = OptunaSearch(space, trials=30, sampler="random")
    run(found, 30)
    shares = found.importance()
    assert set(shares) == {"lr", "layers"} and shares["lr"] > 0.8
    assert sum(shares.values()) == pytest.approx(1, abs=1e-6)


def test_a_space_with_fewer_combinations_than_trials_repeats_itself_instead_of_ending() -> None:
    search = OptunaSearch(read_space({"a": [1, 2]}), trials=4, sampler="random")
    tried = run_all(search, 4)
    assert {one["a"] for one in tried[:2]} == {1, 2} and len(tried) == 4


def run_all(search: Search, count: int) -> list[dict]:
    tried = []
    for number in range(count):
        tried.append(search.ask(number))
        search.tell(number, "complete", 0.5)
    return tried


@pytest.mark.parametrize(("how", "told"), [
    ({"sampler": "gp"}, "Sampler 'gp' does not exist; choose tpe, random, grid"),
    ({"pruner": "hyperband"}, "Pruner 'hyperband' does not exist; choose median, halving, none"),
    ({"sampler": "grid"}, "lr is a range without a step"),
])
def test_a_search_that_there_is_not_is_refused(how: dict, told: str) -> None:
    with pytest.raises(Invalid, match=told):
        OptunaSearch(SPACE, trials=5, **how)

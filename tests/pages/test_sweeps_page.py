"""Sweeps: the form, a sweep as it goes and as it went, and what may be done with the best trial."""

from __future__ import annotations

import json
from pathlib import Path

import filled
import pytest
from streamlit.testing.v1 import AppTest
from test_pages_empty import texts

from app import sweep_charts
from app.sweep_charts import BEST, Line
from workbench.search_space import read_space
from workbench.steps.trials import Trial, folder_of, write_trial
from workbench.wiring import Workbench

RECIPE = "efficientnet_lite0_fcos"
SPACE = {"lr": {"low": 0.0001, "high": 0.1, "log": True}, "batch_size": [4, 8]}
ASKED = {"dataset": "shapes", "version": "shapes@0.1.0", "recipe": RECIPE, "space": SPACE, "metric": "map_50_95"}
TRIALS = (
    (Trial(0, {"lr": 0.001, "batch_size": 4}, "complete", 0.3, is_settled=True, started_at=1e9, seconds=61),
     (0.1, 0.3)),
    (Trial(1, {"lr": 0.01, "batch_size": 8}, "complete", 0.42, is_settled=True, started_at=1e9, seconds=62),
     (0.2, 0.42)),
    (Trial(2, {"lr": 0.09, "batch_size": 4}, "pruned", None, "It falls behind.",
           is_settled=True, started_at=1e9, seconds=30), (0.01,)),
    (Trial(3, {"lr": 0.002, "batch_size": 4}, "failed", None, "The training ended with exit code 3.\nlog",
           is_settled=True, started_at=1e9), ()),
)
RESULT = {"model": "shapes-detector@1", "recipe": RECIPE, "metric": "map_50_95", "best": 1, "value": 0.42,
          "params": {"lr": 0.01, "batch_size": 8}, "importance": {"lr": 0.9, "batch_size": 0.1}}


def sweep(workbench: Workbench, state: str = "done", count: int = len(TRIALS)) -> None:
    """A sweep as a worker would have left it."""
    filled.job(workbench, "sw1", "sweep", state, ASKED, done=count, total=9,
               **({"result": json.dumps(RESULT)} if state == "done" else {}))
    folder = workbench.config.home / "sweeps" / "sw1"
    for trial, values in TRIALS[:count]:
        write_trial(folder, trial)
        output = folder_of(folder, trial.number) / "output"
        output.mkdir()
        rows = [{"epoch": epoch, "epochs": 9, "map_50_95": value} for epoch, value in enumerate(values, 1)]
        output.joinpath("history.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def button(at: AppTest, key: str):
    return next(one for one in at.button if one.key == key)


def field(at: AppTest, label: str):
    return next(one for one in [*at.text_area, *at.number_input, *at.selectbox, *at.text_input] if one.label == label)


def charts(at: AppTest) -> int:
    return len(at.get("vega_lite_chart"))


def test_the_form_begins_with_a_space_around_the_recipes_defaults_and_starts_one_job(
        partless: Workbench, visit) -> None:
    at = visit("sweeps", dataset="shapes")
    assert "No sweep yet." in texts(at)
    proposed = json.loads(field(at, "Search space").value)
    assert {"lr", "batch_size", "freeze"} <= set(proposed) and "epochs" not in proposed
    assert field(at, "Compared by").value == "map_50_95"
    # A parameter that is searched for is not also fixed, whatever stands in its field.
    field(at, "batch_size").set_value(2.0).run()
    field(at, "epochs").set_value(3.0).run()
    field(at, "Search space").set_value('{"batch_size": [4, 8], "freeze": [0, 1, 2]}').run()
    assert "6 combinations." in texts(at)
    field(at, "Trials, at most").set_value(5).run()
    button(at, "sweep_go").click().run()
    (job,) = partless.jobs.list(kind="sweep")
    assert not at.exception and job.args == {
        "dataset": "shapes", "version": job.args["version"], "recipe": job.args["recipe"], "person": "me",
        "space": {"batch_size": [4, 8], "freeze": [0, 1, 2]}, "params": {"epochs": 3}, "trials": 5, "time_limit_s": 0,
        "at_once": 0, "sampler": "tpe", "pruner": "median", "seed": 0, "metric": "map_50_95", "lower_is_better": False}
    assert button(at, "sweep_go").disabled


@pytest.mark.parametrize(("typed", "told"), [
    ('{"lr": [0.1}', "The search space is not JSON"),
    ("{}", "at least one parameter"),
    ('{"momentum": [0.9]}', "has no parameter momentum to search for"),
    ('{"lr": {"low": 2, "high": 1}}', "low must be below high"),
    ('{"lr": ["fast"]}', "lr"),
])
def test_a_space_that_cannot_be_searched_is_told_at_once_and_cannot_be_started(
        partless: Workbench, visit, typed: str, told: str) -> None:
    at = visit("sweeps", dataset="shapes")
    field(at, "Search space").set_value(typed).run()
    assert told in at.error[0].value.replace("\\", "") and button(at, "sweep_go").disabled
    assert partless.jobs.list(kind="sweep") == []


def test_a_sweep_that_is_over_shows_the_best_first_and_why_others_ended(partless: Workbench, visit) -> None:
    sweep(partless)
    at = visit("sweeps", dataset="shapes")
    assert "shapes-detector@1** is trial 1 with map_50_95 **0.42**: lr 0.01, batch_size 8." in texts(at)
    table = at.dataframe[0].value
    assert list(table["trial"]) == [1, 0, 2, 3] and list(table["state"]) == ["best", "complete", "pruned", "failed"]
    assert list(table["epochs"]) == [2, 2, 1, 0] and list(table["took"])[:2] == ["1 min 2 s", "1 min 1 s"]
    assert list(table["why"])[2:] == ["It falls behind.", "The training ended with exit code 3."]
    assert charts(at) == 3  # what mattered, learning curves, parallel coordinates


def test_a_running_sweep_shows_what_there_is_and_no_best_model(partless: Workbench, visit) -> None:
    sweep(partless, "running", 1)
    at = visit("sweeps", dataset="shapes")
    assert "shapes-detector@1** is trial" not in texts(at) and charts(at) == 2
    assert button(at, "sweep_go").disabled and list(at.dataframe[0].value["state"]) == ["best"]


def test_a_sweep_without_a_trial_says_that_they_appear(partless: Workbench, visit) -> None:
    sweep(partless, "running", 0)
    assert "Trials appear here as soon as they begin." in texts(visit("sweeps", dataset="shapes"))


def test_the_best_ones_parameters_fill_the_form_of_retrain(partless: Workbench, visit) -> None:
    sweep(partless)
    at = visit("sweeps", dataset="shapes")
    button(at, "sweep_again").click().run()
    assert not at.exception and at.title[0].value == "Retrain and promote"
    assert (field(at, "lr").value, field(at, "batch_size").value) == (0.01, 8.0)
    assert field(at, "Recipe").value == RECIPE


def test_the_best_model_is_the_challenger_on_the_page_that_promotes(partless: Workbench, tmp_path: Path, visit) -> None:
    filled.model(partless, tmp_path / "more", "shapes-detector", "2")
    sweep(partless)
    at = visit("sweeps", dataset="shapes")
    button(at, "sweep_promote").click().run()
    assert not at.exception and field(at, "Challenger").value == "shapes-detector@1"


def test_charts_hold_the_best_apart_and_bear_trials_without_a_number() -> None:
    lines = [Line(0, BEST, {"lr": 0.01, "batch_size": 8}, [(1, 0.2), (2, 0.42)], 0.42),
             Line(1, "pruned", {"lr": 0.0001, "batch_size": 4}, [(1, float("nan")), (2, 0.01)], 0.01),
             Line(2, "failed", {"lr": 0.1, "batch_size": 4}, [], None)]
    space = read_space(SPACE)
    drawn = sweep_charts.parallel(lines, space, "map_50_95").to_dict()
    rows = [row for rows in drawn["datasets"].values() for row in rows if "with" in row]
    place = {(row["trial"], row["axis"]): row["at"] for row in rows}
    # 0.01 is two of three decades up from 0.0001; of two batch sizes the larger is at the top.
    assert place[0, "lr"] == pytest.approx(2 / 3) and place[1, "lr"] == 0 and place[2, "lr"] == pytest.approx(1)
    assert (place[0, "batch_size"], place[1, "batch_size"]) == (1, 0)
    assert (place[0, "map_50_95"], place[1, "map_50_95"]) == (1, 0) and (2, "map_50_95") not in place
    points = [row for rows in sweep_charts.curves(lines, "map_50_95").to_dict()["datasets"].values() for row in rows]
    assert [(row["trial"], row["epoch"]) for row in points] == [(0, 1), (0, 2), (1, 2)]
    for nothing in ([], lines[2:], lines[:1]):
        assert sweep_charts.parallel(nothing, space, "map_50_95").to_dict()["layer"]
        assert sweep_charts.curves(nothing, "map_50_95").to_dict()["layer"]

"""Sweeps with a recipe that really learns: real git, a real MLflow server, real processes, a real search."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from parts_training import Bench, commit

from workbench.adapters.mlflow import MlflowTracker
from workbench.adapters.optuna import OptunaSearch
from workbench.errors import Cancelled, Conflict, Invalid, Unavailable
from workbench.ports import Quiet
from workbench.steps.sweep import Swept, sweep
from workbench.steps.training import Training
from workbench.steps.trials import Trial, folder_of, read_trials

TESTS = Path(__file__).resolve().parents[2]
ASKED = {"recipe": "small", "metric": "val_loss", "lower_is_better": True}
RATES = {"learning_rate": {"low": 0.001, "high": 1.0, "log": True}}


@pytest.fixture(autouse=True)
def one_thread(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No trial takes more than its core, and none outlives its test."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    for folder in (bench.home / "sweeps").glob("*/trials/*"):
        Training(folder, grace_s=0).stop()


def run(bench: Bench, version: str, space: dict[str, Any], job: Quiet | None = None, **changed: Any) -> Swept:
    arguments = {**ASKED, "cores": 2, **bench.parts, **changed}
    return sweep(version, space=space, open_search=OptunaSearch, job=job or Quiet(id="s1"), **arguments)


def folder(bench: Bench) -> Path:
    return bench.home / "sweeps" / "s1"


def starts(bench: Bench, trial: int) -> list[dict[str, Any]]:
    file = folder_of(folder(bench), trial) / "output" / "starts.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def left(bench: Bench) -> list[psutil.Process]:
    trainings = [Training(folder_of(folder(bench), trial.number)) for trial in read_trials(folder(bench))]
    return [one for training in trainings for one in training.processes()]


def runs(bench: Bench) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in bench.parts["tracker"].runs(f"{bench.dataset} sweeps")}


def wait_for(claim: Any, timeout_s: float = 120) -> None:
    until = time.monotonic() + timeout_s
    while not claim():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def test_the_best_of_a_grid_is_registered_and_nothing_else_stays(bench: Bench) -> None:
    version, job = bench.publish(), Quiet(id="s1")
    found = run(bench, version, {"learning_rate": [0.0001, 0.1], "frozen": [0, 1]}, job, sampler="grid", pruner="none",
                trials=50, params={"epochs": 4})
    # Four combinations are tried out, once each, by hardly learning at all and by learning well.
    assert found.counts == {"complete": 4, "failed": 0, "pruned": 0, "stopped": 0}
    assert found.params == {"learning_rate": 0.1, "frozen": 0} and found.model == f"{bench.dataset}-detector@1"
    trials = read_trials(folder(bench))
    assert found.best == min(trials, key=lambda one: one.value).number and found.value == trials[found.best].value
    assert {(one.params["learning_rate"], one.params["frozen"]) for one in trials} == {
        (0.0001, 0), (0.0001, 1), (0.1, 0), (0.1, 1)}
    assert any("2 trials at once with 1 thread each: 2 cores" in line for line in job.lines)
    assert (job.done, job.total) == (4, 4)

    tracker, parent = bench.parts["tracker"], runs(bench)[f"sweep of small on {version}"]
    assert parent["run_id"] == found.run_id and parent["status"] == "FINISHED"
    assert parent["metrics"]["objective"] == found.value and parent["params"]["best learning_rate"] == "0.1"
    nested = [one for name, one in runs(bench).items() if name.startswith("trial")]
    assert len(nested) == 4 and {one["status"] for one in nested} == {"FINISHED"}
    client = MlflowClient(tracker.url)
    assert {client.get_run(one["run_id"]).data.tags["mlflow.parentRunId"] for one in nested} == {found.run_id}
    # Of four models that were stored, three are gone from the server too.
    assert [one["name"] for one in nested if client.list_artifacts(one["run_id"], "model")] == [f"trial {found.best}"]
    best = runs(bench)[f"trial {found.best}"]
    assert best["params"]["learning_rate"] == "0.1" and best["metrics"]["objective"] == found.value
    assert [step for step, _ in tracker.history(best["run_id"], "val_loss")] == [1, 2, 3, 4]
    assert tracker.by_alias(f"{bench.dataset}-detector", "challenger").run_id == best["run_id"]
    card = bench.parts["models"].card(found.model)
    assert card.run_id == best["run_id"] and (bench.parts["models"].folder(found.model) / "model.onnx").exists()

    weights = [file for file in folder(bench).rglob("*") if file.suffix in (".onnx", ".pt", ".npz", ".png")]
    assert weights == [] and not (folder(bench) / "data").exists() and left(bench) == []
    assert len(list(folder(bench).rglob("history.jsonl"))) == 4
    # The same job again is the same sweep, for nothing.
    assert run(bench, version, {"learning_rate": [0.0001, 0.1], "frozen": [0, 1]}, sampler="grid", pruner="none",
               trials=50, params={"epochs": 4}) == found
    with pytest.raises(Conflict, match="is already a sweep of"):
        run(bench, version, RATES)


def test_a_trial_that_falls_behind_is_pruned_with_all_its_processes(bench: Bench) -> None:
    version = bench.publish()
    # One good trial after the other, then some that learn nothing and would take minutes.
    rates = [0.1, 0.11, 0.12, 0.13, 1e-7, 1e-8]

    class InOrder(OptunaSearch):
        def ask(self, number: int) -> dict[str, Any]:
            params = {"learning_rate": rates[number], "epochs": 4 if rates[number] > 0.01 else 500,
                      "pause_s": 0 if rates[number] > 0.01 else 0.4}
            self.begin(number, params)
            return params

    space = {"learning_rate": {"low": 1e-9, "high": 1.0, "log": True}, "epochs": [4, 500], "pause_s": {"low": 0, "high": 1.0}}
    found = sweep(version, space=space, open_search=InOrder, job=Quiet(id="s1"), **ASKED, trials=6, cores=2, **bench.parts)
    assert found.counts == {"complete": 4, "failed": 0, "pruned": 2, "stopped": 0} and found.best in (0, 1, 2, 3)
    pruned = read_trials(folder(bench))[4:]
    assert all(one.state == "pruned" and one.value is None and "falls behind the other trials" in one.reason for one in pruned)
    assert left(bench) == []
    assert {runs(bench)[one.name]["status"] for one in pruned} == {"KILLED"}
    assert runs(bench)["trial 4"]["tags"]["state"] == "pruned"


def test_a_worker_killed_with_9_leaves_trials_that_the_next_one_follows(bench: Bench) -> None:
    version = bench.publish()
    asked = {"trials": 4, "sampler": "random", "pruner": "none", "params": {"epochs": 5, "pause_s": 0.5}}
    script = ("import json, sys\nfrom pathlib import Path\nsys.path[:0] = [sys.argv[5], sys.argv[6]]\n"
              "from parts_training import Bench\nfrom test_sweep import RATES, run\n"
              "run(Bench(Path(sys.argv[1]), *sys.argv[2:4]), sys.argv[4], RATES, **json.loads(sys.argv[7]))\n")
    worker = subprocess.Popen([sys.executable, "-c", script, bench.folder, bench.url, bench.dataset, version, TESTS,
                               Path(__file__).parent, json.dumps(asked)])
    wait_for(lambda: len(list(folder(bench).glob("trials/*/output/history.jsonl"))) == 2)
    with pytest.raises(Conflict, match="Another worker"):
        run(bench, version, RATES, **asked)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert left(bench)  # they outlive their worker
    # One of them dies with it, as when the machine goes down.
    for process in Training(folder_of(folder(bench), 1)).processes():
        process.kill()
    before = [one.params for one in read_trials(folder(bench))]
    job = Quiet(id="s1")
    seen: dict[int, list[dict[str, Any]]] = {}

    def look() -> None:
        while not done.is_set():
            for number in range(4):
                seen[number] = starts(bench, number) or seen.get(number, [])
            done.wait(0.05)

    done = threading.Event()
    looking = threading.Thread(target=look)
    looking.start()
    try:
        found = run(bench, version, RATES, job, **asked)
    finally:
        done.set()
        looking.join()
    assert any("2 trials were begun before; 2 of them go on" in line for line in job.lines)
    assert found.counts == {"complete": 4, "failed": 0, "pruned": 0, "stopped": 0}
    trials = read_trials(folder(bench))
    assert [one.params for one in trials[:2]] == before
    # The first was only followed; the second began again, in its folder and from its checkpoint.
    assert len(seen[0]) == 1 and len(seen[1]) == 2 and len(seen[2]) == len(seen[3]) == 1
    assert len(runs(bench)) == 5 and {one["status"] for one in runs(bench).values()} == {"FINISHED"}
    assert len(bench.parts["tracker"].versions(f"{bench.dataset}-detector")) == 1 and left(bench) == []
    # What a search that never stopped would have drawn.
    undisturbed = OptunaSearch(_space(), trials=4, sampler="random", pruner="none", seed=0, is_maximized=False)
    assert [undisturbed.ask(number) for number in range(4)] == [one.params for one in trials]


def _space() -> Any:
    from workbench.search_space import read_space
    return read_space(RATES)


def test_cancelling_ends_every_trial_with_what_it_started(bench: Bench) -> None:
    version = bench.publish()

    class CancelledOnceTwoTrain(Quiet):
        def check(self) -> None:
            if len(list(folder(bench).glob("trials/*/output/history.jsonl"))) == 2:
                raise Cancelled("Cancelled by ann.")

    with pytest.raises(Cancelled):
        run(bench, version, RATES, CancelledOnceTwoTrain(id="s1"), trials=9,
            params={"epochs": 500, "pause_s": 0.2, "mood": "fork"})
    trials = read_trials(folder(bench))
    assert [(one.state, one.reason) for one in trials] == [("stopped", "The sweep was cancelled.")] * 2
    assert left(bench) == [] and bench.parts["models"].refs() == []
    assert {one["status"] for one in runs(bench).values()} == {"KILLED"} and len(runs(bench)) == 3
    assert not list(folder(bench).rglob("*.npz")) and not (folder(bench) / "data").exists()


def test_trials_that_fail_do_not_fail_the_sweep(bench: Bench) -> None:
    job = Quiet(id="s1")
    found = run(bench, bench.publish(), {"mood": ["good", "fail", "nan"]}, job, sampler="grid", params={"epochs": 3})
    by_mood = {one.params["mood"]: one for one in read_trials(folder(bench))}
    assert found.counts["failed"] == 2 and found.params == {"mood": "good"}
    assert "ended with exit code 3" in by_mood["fail"].reason and "no learning rate would help here" in by_mood["fail"].reason
    assert "did not learn" in by_mood["nan"].reason and by_mood["nan"].value is None
    assert set(job.failed) == {by_mood[mood].name for mood in ("fail", "nan")}


def test_when_all_trials_fail_the_sweep_fails_with_the_first_ones_reason_and_does_so_again(bench: Bench) -> None:
    version = bench.publish()
    for _ in range(2):
        with pytest.raises(Invalid, match="(?s)All 2 trials failed. The first one: The training ended with exit code 3"):
            run(bench, version, {"learning_rate": [0.1, 0.2]}, sampler="grid", params={"mood": "fail"})
    assert [len(starts(bench, number)) for number in (0, 1)] == [0, 0]  # trimmed, and not started again
    assert runs(bench)[f"sweep of small on {version}"]["status"] == "FAILED" and bench.parts["models"].refs() == []


def test_when_its_time_is_over_what_runs_is_ended_and_the_best_so_far_is_registered(bench: Bench) -> None:
    found = run(bench, bench.publish(), {"epochs": [2, 3000]}, sampler="grid", seed=1, params={"pause_s": 0.1},
                time_limit_s=12)
    by_epochs = {one.params["epochs"]: one for one in read_trials(folder(bench))}
    assert by_epochs[2].state == "complete" and found.params == {"epochs": 2}
    assert (by_epochs[3000].state, by_epochs[3000].reason) == ("stopped", "The sweep's time was over.")
    assert left(bench) == [] and 12 <= found.seconds < 60


def test_a_sweep_too_short_for_any_trial_says_so(bench: Bench) -> None:
    with pytest.raises(Invalid, match="None of the 2 trials came to its end .*2 stopped.*Give the sweep more time"):
        run(bench, bench.publish(), RATES, trials=2, params={"epochs": 3000, "pause_s": 0.2}, time_limit_s=0.5)
    assert left(bench) == []


def test_what_a_trial_was_seen_to_need_decides_how_many_run_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    # Free memory for two of the 0.25 GiB that a trial has at least, and a first guess that fits once.
    monkeypatch.setattr("workbench.steps.side_by_side.free_memory", lambda: int(0.7 * 2**30))
    job = Quiet(id="s1")
    run(bench, bench.publish(), {"learning_rate": [0.1, 0.2, 0.3]}, job, sampler="grid", params={"epochs": 2, "pause_s": 0.5}, memory_gb=0.5)
    told = [line for line in job.lines if "at once with" in line]
    assert [line.split()[0] for line in told] == ["1", "2"] and "of which a trial needs 0.5" in told[0]
    assert all(one.memory > 0 for one in read_trials(folder(bench)))


def test_each_trial_gets_a_gpu_of_its_own_and_its_share_of_the_cores(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.steps.side_by_side.visible_gpus", lambda: ("GPU-a", "GPU-b"))
    monkeypatch.setattr("workbench.steps.sweep.count_cores", lambda limit: 6)
    seen: dict[int, dict[str, Any]] = {}

    class Looks(Quiet):
        def check(self) -> None:
            seen.update({number: rows[0] for number in range(4) if (rows := starts(bench, number))})

    run(bench, bench.publish(), {"learning_rate": [0.1, 0.2, 0.3, 0.4]}, Looks(id="s1"), sampler="grid",
        params={"epochs": 4, "pause_s": 0.3})
    trials = read_trials(folder(bench))
    assert {one.gpu for one in trials[:2]} == {"GPU-a", "GPU-b"} and {one.threads for one in trials} == {3}
    for number, row in seen.items():
        assert row["CUDA_VISIBLE_DEVICES"] == trials[number].gpu and row["OMP_NUM_THREADS"] == "3" and row["threads"] == 3
    assert len(seen) == 4
    first, second = (range_of(one) for one in trials[:2])
    assert first[0] < second[1] and second[0] < first[1]  # side by side


def range_of(trial: Trial) -> tuple[float, float]:
    return trial.started_at, trial.started_at + trial.seconds


@pytest.mark.parametrize("usage", ["[]", "{\"memory_mb\": \"much\"}", "{\"memory_mb\": 1e999}"])
def test_a_trial_that_ends_its_keeper_and_tells_nonsense_of_its_memory_fails_by_itself(bench: Bench, usage: str) -> None:
    recipe = bench.project / "models" / "forger"
    recipe.mkdir()
    (recipe / "usage.json").write_text(usage)
    (recipe / "MLproject").write_text(
        "entry_points:\n  main:\n    parameters: {data: string, output: string, wish: float}\n    command: "
        "'ls {data} {wish}; cp usage.json {output}/../usage.json; kill -9 $PPID; sleep 60'\n")
    commit(bench.project)
    with pytest.raises(Invalid, match="All 2 trials failed. The first one: What the training used cannot be read"):
        run(bench, bench.publish(), {"wish": [1, 2]}, sampler="grid", recipe="forger")
    assert left(bench) == []


def test_the_next_trial_trains_while_what_the_last_one_left_is_put_in_order(bench: Bench) -> None:
    waited: dict[str, bool] = {}

    class Slow(MlflowTracker):
        def finish_run(self, run_id: str, status: str) -> None:
            name = self.run(run_id)["name"]
            if name in ("trial 0", "trial 1"):
                number, until = int(name[-1]) + 1, time.monotonic() + 60
                while len(read_trials(folder(bench))) <= number and time.monotonic() < until:
                    time.sleep(0.02)
                waited[name] = time.monotonic() < until
            super().finish_run(run_id, status)

    found = run(bench, bench.publish(), {"learning_rate": [0.1, 0.2, 0.3]}, sampler="grid", params={"epochs": 2},
                at_once=1, tracker=Slow(bench.url))
    assert waited == {"trial 0": True, "trial 1": True} and found.counts["complete"] == 3
    # One after the other all the same: no training began before the one before it was over; seconds are rounded to 0.01.
    ranges = [range_of(one) for one in read_trials(folder(bench))]
    assert all(ended <= began + 0.01 for (_, ended), (began, _) in zip(ranges, ranges[1:]))
    assert {one["status"] for one in runs(bench).values()} == {"FINISHED"} and left(bench) == []
    weights = [file for file in folder(bench).rglob("*") if file.suffix in (".onnx", ".pt", ".npz")]
    assert weights == [] and len(bench.parts["models"].refs()) == 1


def test_a_tracker_that_took_a_trial_s_run_and_did_not_say_so_has_it_once(bench: Bench,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.steps.side_by_side.AGAIN_S", 0.1)
    silent = {"trial 0", "trial 1"}

    class Silent(MlflowTracker):
        def start_run(self, experiment: str, name: str, *more: Any, **named: Any) -> str:
            made = super().start_run(experiment, name, *more, **named)
            if name in silent:
                silent.discard(name)
                raise Unavailable("The answer did not come.")
            return made

    job = Quiet(id="s1")
    found = run(bench, bench.publish(), {"learning_rate": [0.1, 0.2]}, job, sampler="grid", params={"epochs": 2},
                tracker=Silent(bench.url))
    assert silent == set() and found.counts["complete"] == 2 and sum("tries again" in line for line in job.lines) == 2
    assert len(bench.parts["tracker"].runs(f"{bench.dataset} sweeps")) == 3  # its own, and one a trial


def test_people_hear_of_a_sweep_and_no_channel_holds_it_up(bench: Bench) -> None:
    from workbench.notifications import Message, Outbox
    from workbench.steps.announce import announced
    opened, kept = threading.Event(), []

    class Blocked:
        name = "blocked"

        def send(self, message: Message) -> None:
            opened.wait(120)
            kept.append(message)

    outbox, version = Outbox([Blocked()]), bench.publish()

    def step(args: dict[str, Any], job: Quiet) -> dict[str, Any]:
        return run(bench, version, args["space"], job, sampler="grid", params=args["params"],
                   experiment=args.get("experiment")).to_json()

    steps = announced({"sweep": step}, outbox=outbox, records=lambda: bench.records,
                      tracker=lambda: bench.parts["tracker"], models=lambda: bench.parts["models"])
    asked = {"version": version, "space": {"learning_rate": [0.0001, 0.1]}, "params": {"epochs": 2},
             "metric": "val_loss"}
    found = steps["sweep"](asked, Quiet(id="s1"))
    for experiment in (None, "night run"):
        with pytest.raises(Invalid, match="All 2 trials failed"):
            steps["sweep"]({**asked, "params": {"mood": "fail"}, "experiment": experiment}, Quiet(id=f"{experiment}"))
    assert kept == []  # all is over, and nothing was sent yet
    opened.set()
    assert outbox.close(60) == 0
    assert [one.title.split(":")[0] for one in kept] == [
        "Sweep started", "Sweep finished", "Sweep started", "Sweep failed", "Sweep started", "Sweep failed"]
    lines = dict(kept[1].lines)
    assert lines["Best trial"] == f"trial {found['best']} (2 complete)"
    assert lines["Its parameters"] == "learning_rate = 0.1"
    assert lines["val_loss after"].startswith(f"{found['value']:.4f} ({bench.dataset}-detector@1")
    assert kept[1].link.endswith(f"/runs/{found['run_id']}") and kept[1].image  # the curve of the best trial
    tracker = bench.parts["tracker"]
    for message, experiment in ((kept[3], f"{bench.dataset} sweeps"), (kept[5], "night run")):
        assert "ended with exit code 3" in message.text
        own = [one for one in tracker.runs(experiment) if one["name"].startswith("sweep") and one["status"] == "FAILED"]
        assert message.link.endswith(f"/runs/{own[0]['run_id']}")


@pytest.mark.parametrize(("space", "changed", "told"), [
    ({"momentum": [0.1]}, {}, "Recipe small has no parameter momentum to search for; it has batch_size, epochs"),
    ({"learning_rate": [0.1, "fast"]}, {}, "Parameter learning_rate of recipe small must be a number|'fast'"),
    ({"schedule": {"low": 1, "high": 2}}, {}, "Parameter schedule of recipe small is a string, so a range has no meaning"),
    ({"schedule": ["cosine", "a; rm -rf x"]}, {}, "schedule"),
    ({"data": ["here"]}, {}, "data.* given by the workbench"),
    (RATES, {"params": {"learning_rate": 0.1}}, "learning_rate is both fixed and searched for"),
    (RATES, {"params": {"momentum": 0.1}}, "has no parameter momentum"),
    ({}, {}, "at least one parameter"),
    (RATES, {"sampler": "grid"}, "learning_rate is a range without a step"),
    (RATES, {"sampler": "genetic"}, "Sampler 'genetic' does not exist"),
    (RATES, {"pruner": "axe"}, "Pruner 'axe' does not exist"),
    (RATES, {"metric": "--help"}, "primary_metric must be the name of a number"),
    (RATES, {"trials": 0}, "A sweep has 1 to 1000 trials, got 0"),
    (RATES, {"time_limit_s": -1}, "time_limit_s must be 0 or more, got -1"),
    (RATES, {"time_limit_s": math.nan}, "time_limit_s must be 0 or more, got nan"),
    (RATES, {"seed": -1}, "seed must be 0 or more"),
    (RATES, {"recipe": "nothing"}, "has no models/nothing/MLproject"),
    (RATES, {"limits": {"speed": 1}}, "There is no limit speed"),
])
def test_what_cannot_be_swept_is_refused_before_anything_runs(bench: Bench, space: dict[str, Any], changed: dict[str, Any],
                                                              told: str) -> None:
    version = bench.publish()
    with pytest.raises(Exception, match=told) as refused:
        run(bench, version, space, **changed)
    assert isinstance(refused.value, Invalid) or type(refused.value).__name__ == "NotFound"
    assert runs(bench) == {} and not read_trials(folder(bench))


def test_a_metric_that_no_trial_has_is_told_with_those_there_are(bench: Bench) -> None:
    with pytest.raises(Invalid, match="(?s)has a number map_50_95, by which the trials are compared; they have .*val_loss"):
        run(bench, bench.publish(), {"learning_rate": [0.1]}, metric="map_50_95", params={"epochs": 1})


def test_the_run_of_the_best_trial_can_be_run_again(bench: Bench) -> None:
    from functools import partial

    from workbench.steps.rerun import rerun
    from workbench.steps.retrain import retrain
    version = bench.publish()
    found = run(bench, version, {"learning_rate": [0.01, 0.1]}, sampler="grid", params={"epochs": 2})
    best = runs(bench)[f"trial {found.best}"]["run_id"]
    job = Quiet(id="again")
    again = rerun(best, retrain=partial(retrain, job=job, **bench.parts), tracker=bench.parts["tracker"],
                  store=bench.parts["store"], models=bench.parts["models"], project=bench.project, job=job)
    assert again.is_same and again.compared >= 1 and again.of == best

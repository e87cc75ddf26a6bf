"""Retraining end to end with a recipe that learns nothing: real git, a real MLflow server, real processes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import onnx
import psutil
import pytest
from parts_training import Bench, commit

from workbench.adapters.mlflow import MlflowTracker
from workbench.errors import Cancelled, Conflict, Invalid, NotFound, Unavailable
from workbench.ports import Quiet
from workbench.recipe import git
from workbench.steps import trained


class But:
    """Another object with some of its attributes replaced."""

    def __init__(self, other: Any, **changed: Any) -> None:
        self._other = other
        self.__dict__.update(changed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._other, name)


def wait_for(claim: Any, timeout_s: float = 120) -> None:
    until = time.monotonic() + timeout_s
    while not claim():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.1)


def test_a_training_is_tracked_registered_and_repeated_for_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_CVAT_TOKEN", "s3cret")
    version = bench.publish()
    sha = git(bench.project, "rev-parse", "HEAD").strip()
    (bench.project / "models/tiny/train.py").write_text("raise SystemExit('uncommitted')")
    job = Quiet(id=f"demo:{bench.dataset}:retrain")  # what a job's id looks like
    trained = bench.retrain(version, job, params={"epochs": 3})

    name = f"{bench.dataset}-detector"
    assert (trained.model, trained.commit, trained.version) == (f"{name}@1", sha, version)
    assert (job.done, job.total) == (3, 3)
    assert any("Uncommitted changes are left out" in line and "models/tiny/train.py" in line for line in job.lines)
    digest = bench.parts["store"].version(version).digest

    run = bench.run()
    assert run["run_id"] == trained.run_id and run["status"] == "FINISHED"
    assert run["tags"] | {"job": job.id, "dataset": version, "dataset_digest": digest, "commit": sha, "recipe": "tiny",
                          "person": "ann"} == run["tags"]
    assert run["params"]["epochs"] == "3"
    assert bench.parts["tracker"].history(trained.run_id, "map_50") == [(1, 0.1), (2, 0.2), (3, 0.3)]

    registered = bench.parts["tracker"].by_alias(name, "challenger")
    assert (registered.version, registered.run_id) == ("1", trained.run_id)
    stored = bench.parts["tracker"].artifacts(trained.run_id, "model", bench.folder / "fetched")
    card = bench.parts["models"].card(trained.model)
    assert json.loads((stored / "card.json").read_text()) == card.to_json()
    assert sorted(file.name for file in stored.iterdir()) == ["card.json", "model.onnx", "weights.pt"]
    assert card.trained_on == {"ref": version, "digest": digest} and card.run_id == trained.run_id
    assert (bench.parts["models"].folder(trained.model) / "model.onnx").read_bytes() == (stored / "model.onnx").read_bytes()
    # The constant model is right on the only val frame: sqrt(sigmoid(5) * sigmoid(5)) = 0.9933 is its confidence.
    assert card.metrics["on"] == f"{version}/val" and card.metrics["map_50_95"] == pytest.approx(1, abs=1e-6)
    assert 0.05 <= card.decoder["confidence"] <= 0.9934

    folder = next((bench.home / "trainings").iterdir())
    said = next(line for line in (folder / "log.txt").read_text().splitlines() if line.startswith("environment:")).split()
    assert "WORKBENCH_CVAT_TOKEN" not in said and {"MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI", "GIT_COMMIT"} < set(said)
    assert (folder / "output/starts.txt").read_text().split()[1] == sha
    assert sorted(file.name for file in folder.iterdir()) == ["card.json", "exit", "lock", "log.txt", "output", "request.json",
                                                              "since", "trained.json", "usage.json"]
    assert bench.retrain(version, job, params={"epochs": 3}) == trained
    assert len((folder / "output/starts.txt").read_text().splitlines()) == 1
    assert len(bench.parts["tracker"].versions(name)) == 1


def test_a_second_training_starts_from_the_first_model_and_is_another_job(bench: Bench) -> None:
    version = bench.publish()
    first = bench.retrain(version)
    with pytest.raises(Conflict, match="is already a training of"):
        bench.retrain(version, base_model=first.model)
    second = bench.retrain(version, Quiet(id="second"), base_model=first.model, params={"shift": 4})
    assert second.model.endswith("@2")
    assert bench.parts["models"].card(second.model).trained_on["base_model"] == first.model
    with pytest.raises(NotFound):
        bench.retrain(version, Quiet(id="third"), base_model="nobody@1")


def test_without_a_val_split_the_recipe_s_own_figures_and_threshold_stand(bench: Bench) -> None:
    trained = bench.retrain(bench.publish(("train", "train", "test")))
    card = bench.parts["models"].card(trained.model)
    assert card.metrics == {"map_50": 0.5, "on": "frames the recipe held out of the train split"}
    assert card.decoder["confidence"] == 0.05


def test_a_worker_killed_with_9_then_repeated_is_one_run_and_one_training(bench: Bench) -> None:
    version = bench.publish()
    script = (
        "import sys\nfrom pathlib import Path\nsys.path.insert(0, sys.argv[5])\n"
        "from parts_training import Bench\n"
        "bench = Bench(Path(sys.argv[1]), sys.argv[2], sys.argv[3])\n"
        "bench.retrain(sys.argv[4], params={'epochs': 4, 'pause_s': 2})\n")
    tests = Path(__file__).resolve().parents[2]
    worker = subprocess.Popen([sys.executable, "-c", script, bench.folder, bench.url, bench.dataset, version, tests])
    training = bench.training()
    wait_for(lambda: training.history())
    with pytest.raises(Conflict, match="Another worker"):
        bench.retrain(version, params={"epochs": 4, "pause_s": 2})
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    orphans = training.processes()
    assert orphans
    # The project moves on meanwhile; the repeat belongs to the first commit.
    sha = git(bench.project, "rev-parse", "HEAD").strip()
    (bench.project / "models/tiny/train.py").write_text("raise SystemExit('another recipe')")
    commit(bench.project)
    job = Quiet(id=f"job-{bench.dataset}")
    trained = bench.retrain(version, job, params={"epochs": 4, "pause_s": 2})
    assert trained.commit == sha
    assert any("still at work" in line for line in job.lines)
    assert len((training.output / "starts.txt").read_text().splitlines()) == 1
    assert bench.run()["status"] == "FINISHED" and len(bench.parts["tracker"].versions(f"{bench.dataset}-detector")) == 1
    assert training.processes() == []


def test_a_trainer_that_died_with_the_machine_goes_on_in_its_folder_and_run(bench: Bench) -> None:
    version = bench.publish()

    class DiesAtTheFirstEpoch(Quiet):
        def progress(self, done: int, total: int, note: str = "") -> None:
            if done == 1:
                for process in bench.training().processes():
                    process.kill()
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.retrain(version, DiesAtTheFirstEpoch(id=f"job-{bench.dataset}"), params={"epochs": 3, "pause_s": 2})
    trained = bench.retrain(version, params={"epochs": 3, "pause_s": 2})
    starts = (bench.training().output / "starts.txt").read_text().splitlines()
    assert len(starts) == 2 and len({line.split()[1] for line in starts}) == 1
    assert [row["epoch"] for row in bench.training().history()] == [1, 2, 3]
    assert bench.run()["run_id"] == trained.run_id and bench.run()["status"] == "FINISHED"


def test_cancelling_ends_the_trainer_with_its_children_and_the_run_is_killed(bench: Bench) -> None:
    version = bench.publish()
    training = bench.training()

    class CancelledAtTheFirstEpoch(Quiet):
        def check(self) -> None:
            if training.history():
                raise Cancelled("Cancelled by ann.")

    with pytest.raises(Cancelled):
        bench.retrain(version, CancelledAtTheFirstEpoch(id=f"job-{bench.dataset}"),
                      params={"mood": "fork", "epochs": 500, "pause_s": 1})
    assert bench.run()["status"] == "KILLED"
    pids = [int(line) for line in (training.output / "children.txt").read_text().split()]
    assert len(pids) == 3
    for pid in pids:
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert training.processes() == [] and bench.parts["models"].refs() == []


@pytest.mark.parametrize(("mood", "told"), [
    ("fail", "(?s)ended with exit code 3.*log.txt.*error: the loss is not finite in epoch 1"),
    ("nomodel", "ended without an error but left no model.onnx, card.json, metrics.json"),
    ("nan", "metrics.json map_50 is nan: it did not learn"),
])
def test_a_training_that_fails_says_why_and_registers_nothing(bench: Bench, mood: str, told: str) -> None:
    version = bench.publish()
    for _ in range(2):  # the repeat of a failed job fails the same way, and does not train again
        with pytest.raises(Invalid, match=told):
            bench.retrain(version, params={"mood": mood})
        assert bench.run()["status"] == "FAILED"
    assert len((bench.training().output / "starts.txt").read_text().splitlines()) == 1
    assert bench.parts["models"].refs() == [] and bench.parts["tracker"].versions(f"{bench.dataset}-detector") == []


class Endless:
    """A backend that opens a model for as long as a test goes on, as one does whose graph loops without end."""

    def __init__(self) -> None:
        self.begun, self.over = threading.Event(), threading.Event()

    def __call__(self, file: Any) -> Any:
        self.begun.set()
        self.over.wait(60)
        raise Invalid("the test is over")


def test_a_model_that_never_answers_fails_its_training_and_holds_the_worker_up_no_longer(
        bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained, "TRY_S", 1)
    endless = Endless()
    with pytest.raises(Invalid, match="did not look at two images within 1 s. Look for a loop in its graph"):
        bench.retrain(bench.publish(), open_backend=endless)
    endless.over.set()
    assert bench.run()["status"] == "FAILED" and bench.parts["models"].refs() == []


def test_a_training_is_cancelled_while_its_model_does_not_answer(bench: Bench) -> None:
    endless = Endless()

    class Cancels(Quiet):
        def check(self) -> None:
            if endless.begun.is_set():
                raise Cancelled("Job was cancelled.")

    with pytest.raises(Cancelled):
        bench.retrain(bench.publish(), Cancels(id=f"job-{bench.dataset}"), open_backend=endless)
    endless.over.set()
    assert bench.run()["status"] == "KILLED" and bench.parts["models"].refs() == []


def tensors_beside(bench: Bench, more: str) -> None:
    """The recipe tiny keeps its tensors in model.onnx.data, as torch.onnx.export does, then does something more."""
    train = bench.project / "models" / "tiny" / "train.py"
    line = '    (output / "weights.pt").write_bytes(b"plain weights")\n'
    assert line in train.read_text()
    train.write_text(train.read_text().replace(line, f'''{line}    onnx.save(onnx.load(output / "model.onnx"), output / "model.onnx",
              save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    {more}
'''))
    commit(bench.project)


def test_tensors_that_an_exporter_kept_beside_the_graph_are_taken_into_it(bench: Bench) -> None:
    tensors_beside(bench, "")
    trained = bench.retrain(bench.publish())
    folder = bench.parts["models"].folder(trained.model)
    assert sorted(one.name for one in folder.iterdir()) == ["card.json", "model.onnx", "weights.pt"]
    assert not any(tensor.external_data for tensor in onnx.load(folder / "model.onnx").graph.initializer)
    assert trained.metrics["map_50"] == 1


@pytest.mark.parametrize(("more", "told"), [
    ("(output / 'model.onnx.data').unlink()", "keeps tensor .* in 'model.onnx.data'; only a file beside it is allowed"),
    ("(output / 'model.onnx.data').unlink(); (output / 'model.onnx.data').symlink_to('/etc/passwd')", "data is a link or no plain"),
    ("os.truncate(output / 'model.onnx.data', 3)", "keeps tensors in model.onnx.data, which cannot be taken into it"),
    ("(output / 'model.onnx').write_bytes((output / 'model.onnx').read_bytes().replace(b'model.onnx.data', b'../../../../any'))",
     "keeps tensor .* in '../../../../any'"),
])
def test_tensors_beside_the_graph_that_are_not_there_or_lead_elsewhere_are_refused(bench: Bench, more: str, told: str) -> None:
    tensors_beside(bench, more)
    with pytest.raises(Invalid, match=told):
        bench.retrain(bench.publish())
    assert bench.parts["models"].refs() == []


@pytest.mark.parametrize(("changed", "error", "told"), [
    ({"params": {"mood": "good; touch {folder}/tricked"}}, Invalid, "must be a plain word"),
    ({"params": {"optimizer": "sgd"}}, Invalid, "has no parameter optimizer"),
    ({"params": {"output": "elsewhere"}}, Invalid, "is given by the workbench"),
    ({"params": {"base_weights": "none"}}, Invalid, "give base_model"),
    ({"recipe": "../tiny"}, Invalid, "Recipe name"),
    ({"recipe": "huge"}, NotFound, "has no models/huge/MLproject"),
])
def test_what_cannot_be_trained_is_refused_before_anything_starts(bench: Bench, changed: dict, error: type, told: str) -> None:
    version = bench.publish()
    with pytest.raises(error, match=told):
        bench.retrain(version, **changed)
    assert bench.parts["tracker"].runs(bench.dataset) == [] and not bench.training().log.exists()
    assert list(bench.folder.rglob("tricked")) == []


def test_a_version_without_training_boxes_and_a_project_without_git_are_refused(bench: Bench, tmp_path: Path) -> None:
    version = bench.publish(("val", "test"))
    with pytest.raises(Invalid, match="no label in its train split"):
        bench.retrain(version)
    shutil.copytree(bench.project / "models", tmp_path / "unpacked/models")
    with pytest.raises(Invalid, match="is not a git checkout"):
        bench.retrain(version, project=tmp_path / "unpacked")


def test_a_tracker_that_went_away_costs_a_repetition_and_nothing_else(bench: Bench) -> None:
    version, tracker, models = bench.publish(), bench.parts["tracker"], bench.parts["models"]
    with pytest.raises(Unavailable):  # before the training
        bench.retrain(version, tracker=MlflowTracker("http://127.0.0.1:9"))
    assert not bench.training().log.exists()

    with pytest.raises(Unavailable, match="(?s)MLflow did not answer; run it again"):  # while it starts
        bench.retrain(version, tracker=But(tracker, url="http://127.0.0.1:9"))
    assert bench.run()["status"] == "RUNNING" and bench.training().exit_code() is None

    def unavailable(*arguments: Any) -> None:
        raise Unavailable("The store went away.")

    with pytest.raises(Unavailable, match="The store went away"):
        bench.retrain(version, models=But(models, register=unavailable))
    # As it is when the tracker goes away while the recipe finishes: all results are there, `mlflow run` says 75.
    (bench.training().folder / "exit").write_text("75")
    assert bench.retrain(version).model.endswith("@1")
    assert len((bench.training().output / "starts.txt").read_text().splitlines()) == 1
    assert bench.run()["status"] == "FINISHED"

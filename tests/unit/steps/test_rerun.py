"""A training run again from the facts its run keeps; exact data and weights; strangers' scripts. Real git, MLflow, processes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from typing import Any

import psutil
import pytest
from parts_training import Bench, commit
from test_environments import wheel
from test_retrain import But

from workbench.errors import Invalid, NotFound
from workbench.ports import Quiet
from workbench.recipe import git
from workbench.steps import environments
from workbench.steps import rerun as rerun_step
from workbench.steps.keeper import MIB
from workbench.steps.limits import Limits
from workbench.steps.rerun import OTHER_TOLERANCE, SAME_TOLERANCE, Rerun, compare, rerun
from workbench.steps.retrain import lay_out, retrain


def again(bench: Bench, run_id: str, job: str = "again", parts: dict[str, Any] | None = None, **changed: Any) -> Rerun:
    parts, job = {**bench.parts, **(parts or {})}, Quiet(id=job)
    return rerun(run_id, retrain=partial(retrain, job=job, **parts), job=job,
                 **{name: parts[name] for name in ("tracker", "store", "models", "project")}, **changed)


def edit(bench: Bench, *changes: tuple[str, str]) -> str:
    file = bench.project / "models/tiny/train.py"
    text = file.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    file.write_text(text)
    return commit(bench.project)


def test_a_run_keeps_all_that_is_needed_and_is_run_again_from_that_alone(bench: Bench) -> None:
    version = bench.publish()
    first = bench.retrain(version)
    trained = bench.retrain(version, Quiet(id="second"), base_model=first.model, params={"shift": 1}, limits={"wall_s": 500},
                            most=Limits(wall_s=900, disk_mb=900, processes=90))
    tracker = bench.parts["tracker"]
    tags = tracker.run(trained.run_id)["tags"]
    base = bench.parts["models"].card(first.model).files["weights.pt"]["sha256"]
    assert tags | {"commit": first.commit, "dataset": version, "base_model": first.model, "base_model_sha256": base,
                   "environment": "current", "seed": ""} == tags
    assert json.loads(tags["limits"]) == Limits(wall_s=500, disk_mb=900, processes=90).to_json()
    assert json.loads(tags["machine"])["cores"] >= 1 and len(tags["environment_digest"]) == 32
    used = tracker.run(trained.run_id)["metrics"]
    assert used["used_wall_s"] > 0 and used["used_processes"] >= 1 and 10 < used["used_memory_mb"]
    kept = tracker.artifacts(trained.run_id, "workbench", bench.folder / "kept")
    assert "mlflow==" in (kept / "environment.txt").read_text()
    facts = json.loads((kept / "facts.json").read_text())
    assert facts["params"] == {"shift": 1} and facts["dataset_digest"] == bench.parts["store"].version(version).digest

    # The project has moved on, the worker knows nothing of the job, and the champion stays what it is.
    edit(bench, ("def main", "raise SystemExit('another recipe')\n\n\ndef main"))
    result = again(bench, trained.run_id)
    assert result.is_same and result.differing == {} and result.tolerance == SAME_TOLERANCE and result.compared >= 6
    assert result.says.startswith(f"The same as run {trained.run_id}: all {result.compared} numbers within 0.001")
    assert "has no parameter seed" in result.says
    name = f"{bench.dataset}-detector"
    assert [one.version for one in tracker.versions(name)] == ["2", "1"] == sorted((one.version for one in tracker.versions(name)), reverse=True)
    assert tracker.by_alias(name, "challenger").version == "2" and bench.parts["models"].refs() == [f"{name}@1", f"{name}@2"]
    run = tracker.run(result.run_id)
    assert run["status"] == "FINISHED" and run["tags"] | {"kind": "rerun", "rerun_of": trained.run_id, "commit": trained.commit,
                                                          "same_as_first": "true", "comparison": result.says} == run["tags"]
    compared = json.loads((tracker.artifacts(result.run_id, "workbench", bench.folder / "again") / "comparison.json").read_text())
    assert compared == json.loads(json.dumps(result.to_json()))
    assert again(bench, trained.run_id) == result  # the job repeated after a kill: nothing trains twice
    assert git(bench.project, "rev-parse", "HEAD").strip() != trained.commit


def test_another_result_is_told_plainly_and_is_no_failure(bench: Bench) -> None:
    edit(bench, ('"epochs": options.epochs', '"epochs": options.epochs, "seconds": os.getpid(), "luck": len(options.output) / 100'))
    first = bench.retrain(bench.publish())
    result = again(bench, first.run_id)
    assert not result.is_same and list(result.differing) == ["metrics luck"]
    assert result.says.startswith(f"NOT the same as run {first.run_id}: 1 of") and "metrics luck" in result.says
    assert bench.parts["tracker"].run(result.run_id)["tags"]["same_as_first"] == "false"
    assert again(bench, first.run_id, tolerance=0.5).is_same


def test_what_is_missing_or_not_what_it_was_is_a_refusal_with_the_reason(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    version = bench.publish()
    first = bench.retrain(version)
    tracker, store = bench.parts["tracker"], bench.parts["store"]
    with pytest.raises(Invalid, match="named by its id, 32 hexadecimal digits"):
        again(bench, "--help")
    with pytest.raises(NotFound):
        again(bench, "0" * 32)
    empty = tracker.start_run(bench.dataset, "another's", {})
    with pytest.raises(Invalid, match="keeps no facts"):
        again(bench, empty)
    for changed, told in (({"commit": "0" * 40}, "git ls-tree in .* failed"), ({"recipe": "gone"}, "has no models/gone/MLproject"),
                          ({"dataset": f"{bench.dataset}@9.9.9"}, "9.9.9"), ({"base_model": "nobody@1"}, "nobody@1"),
                          ({"dataset_digest": "0" * 64}, "it was trained on 0000"), ({"format": 99}, "lack their format")):
        wrong = tracker.start_run(bench.dataset, "changed", {})
        kept = tracker.artifacts(first.run_id, "workbench", bench.folder / f"kept {told[:6]}".replace(".", ""))
        facts = json.loads((kept / "facts.json").read_text()) | changed
        (kept / "facts.json").write_text(json.dumps(facts))
        tracker.log_files(wrong, kept, "workbench")
        with pytest.raises(Invalid, match=told):
            again(bench, wrong, f"job {told[:6]}")
    digest = store.version(version).digest
    with pytest.raises(Invalid, match=f"now has digest {'0' * 64}, it was trained on {digest}"):
        again(bench, first.run_id, parts={"store": But(store, version=lambda ref: replace(store.version(ref), digest="0" * 64))})
    own = environments.current()
    other = replace(own, packages=own.packages.replace("mlflow==", "mlflow==0."))
    monkeypatch.setattr(rerun_step, "current", lambda: other)
    with pytest.raises(Invalid, match=r"1 of its packages are not installed as they were \(mlflow==3.*new \(mlflow==0.*--changed-environment"):
        again(bench, first.run_id)
    assert len(tracker.versions(f"{bench.dataset}-detector")) == 1


def test_numbers_are_compared_by_hand() -> None:
    first = {"metrics": {"map_50": 0.5, "big": 200.0, "seconds": 9, "val": {"wall_s": 3, "used_memory_mb": 5, "ap": [0.1, 0.2]}}}
    second = {"metrics": {"map_50": 0.5004, "big": 200.1, "seconds": 90, "val": {"wall_s": 1, "used_memory_mb": 6, "ap": [0.1, 0.25]}}}
    found = compare(first, second, 1e-3)
    # 0.0004 / 1; 0.1 / 200 = 0.0005; 0.05 / 1
    assert found.compared == 4 and found.differing == {"metrics val ap 1": [0.2, 0.25]} and found.largest == pytest.approx(0.05)
    lacking = compare({"metrics": {"a": 1}}, {"metrics": {"b": 1}}, OTHER_TOLERANCE)
    assert lacking.differing == {"metrics a": [1.0, None], "metrics b": [None, 1.0]}


def test_a_frame_or_weights_that_were_changed_are_found_before_anything_trains(bench: Bench) -> None:
    version = bench.publish()
    first = bench.retrain(version)
    weights = bench.folder / "models" / first.model.replace("@", "/") / "weights.pt"
    weights.chmod(0o644)
    weights.write_bytes(b"other weights")
    with pytest.raises(Invalid, match="weights.pt of .* has sha256 .*, its card says"):
        bench.retrain(version, Quiet(id="base"), base_model=first.model)
    frame = bench.parts["store"].manifest(version).split("train")[1].frame
    blob = bench.parts["blobs"].path(frame.blob)
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    with pytest.raises(Invalid, match=f"frames/{re.escape(frame.name)} of {version} has md5 .*, the version says {frame.blob}.*backup"):
        bench.retrain(version, Quiet(id="data"))
    assert not bench.training("data").log.exists() and not (bench.training("data").folder / "data").exists()
    assert sorted(run["status"] for run in bench.parts["tracker"].runs(bench.dataset)) == ["FAILED", "FINISHED"]


def test_labels_that_an_earlier_attempt_changed_are_found_and_laid_out_anew(bench: Bench) -> None:
    version, data = bench.publish(), bench.folder / "data"
    manifest = bench.parts["store"].manifest(version)
    for spoil in (lambda: (data / "train.json").write_text("{}"), (data / "val.json").unlink):
        lay_out(manifest, bench.parts["blobs"], version, data)
        lay_out(manifest, bench.parts["blobs"], version, data)  # a start after a kill finds it as it was
        spoil()
        with pytest.raises(Invalid, match=f"(train|val).json of {version} has md5"):
            lay_out(manifest, bench.parts["blobs"], version, data)
        assert not data.exists()


def test_a_script_that_hides_a_child_prints_our_secret_and_fills_the_disk_is_ended_cleaned_up_and_told(bench: Bench) -> None:
    secret = "t0ken-of-the-service"
    edit(bench, ("    history = output", f"""    print("found {secret} and https://ann:geheim@host/x")
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            (output / "hidden.txt").write_text(str(os.getpid()))
            os.execve("/bin/sleep", ["sleep", "600"], {{}})
        os._exit(0)
    while True:
        with open(output / "big", "ab") as big:
            big.write(b"x" * {MIB})
    history = output"""))
    version = bench.publish()
    for _ in range(2):
        with pytest.raises(Invalid, match=r"wrote \d+ MiB to the disk, its limit is 40 \(setting retrain_disk_mb.*Keep fewer") as failed:
            bench.retrain(version, limits={"disk_mb": 40}, secrets=(secret,))
    training = bench.training()
    assert "found *** and https://host/x" in str(failed.value) and secret not in training.log.read_text()
    hidden = int((training.output / "hidden.txt").read_text())
    assert not psutil.pid_exists(hidden) or psutil.Process(hidden).status() == psutil.STATUS_ZOMBIE
    assert training.processes() == [] and not training.scratch.exists()
    assert sum(file.stat().st_size for file in training.folder.rglob("*")) < MIB and not (training.folder / "data").exists()
    assert bench.run()["status"] == "FAILED" and bench.parts["models"].refs() == []
    edit(bench, ("    while True:", "    while False:"), ("    if os.fork() == 0:\n        os.setsid", "    if 0:\n        os.setsid"))
    assert bench.retrain(version, Quiet(id="next")).model.endswith("@1")  # the one after is none the worse


def test_a_recipe_runs_in_the_environment_of_its_lock_and_again_from_its_facts(bench: Bench) -> None:
    version = bench.publish()
    made = bench.retrain(version)
    own = bench.project / "models/own"
    wheel(own / "wheels", says="0.25")
    for name in ("model.onnx", "card.json"):
        (own / name).write_bytes((bench.training().output / name).read_bytes())
    (own / "requirements.txt").write_text("--no-index\n./wheels/tinyloss-1.2-py3-none-any.whl\n")
    (own / "MLproject").write_text("name: own\nentry_points:\n  main:\n    parameters:\n      data: string\n      output: string\n"
                                   "      seed: {type: float, default: 3}\n    command: python train.py {output}\n")
    # Nothing but the standard library and what the lock names.
    (own / "train.py").write_text("import json, shutil, sys\nimport tinyloss\ntry:\n    import numpy\n    raise SystemExit('not isolated')\n"
                                  "except ImportError: pass\nfor name in ('model.onnx', 'card.json'): shutil.copy(name, sys.argv[1])\n"
                                  "json.dump({'map_50': float(tinyloss.SAYS)}, open(sys.argv[1] + '/metrics.json', 'w'))\n")
    commit(bench.project)
    with pytest.raises(Invalid, match="No module named 'tinyloss'"):
        bench.retrain(version, Quiet(id="current"), recipe="own")
    trained = bench.retrain(version, Quiet(id="locked"), recipe="own", environment="locked")
    tags = bench.parts["tracker"].run(trained.run_id)["tags"]
    (built,) = (one for one in (bench.home / "environments").iterdir() if one.is_dir())
    assert (tags["environment"], tags["environment_digest"], tags["seed"]) == ("locked", built.name, "3")
    result = again(bench, trained.run_id)
    assert result.is_same and "has no parameter seed" not in result.says and made.model.endswith("@1")
    with pytest.raises(Invalid, match="models/tiny at .* has no lock"):
        bench.retrain(version, Quiet(id="no lock"), environment="locked")
    with pytest.raises(Invalid, match="current .* or locked .* not 'docker'"):
        bench.retrain(version, Quiet(id="docker"), environment="docker")

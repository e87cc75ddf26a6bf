"""The commands that ask for a training, set what trains by itself, and say what follows a promotion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from workbench.blobs import digests
from workbench.cli import cli
from workbench.config import Config
from workbench.dataset import Frame, LabeledFrame, Manifest
from workbench.errors import Invalid, NotFound, Unavailable
from workbench.jobs import QueueFull, tables
from workbench.steps.rules import rules
from workbench.taxonomy import Taxonomy
from workbench.wiring import PROJECT, Workbench

SHA = "0123456789abcdef0123456789abcdef01234567"
GIT = ("--git-uri", str(PROJECT), "--commit", SHA)


@pytest.fixture
def workbench(tmp_path: Path) -> Workbench:
    wb = Workbench(Config(home=tmp_path, person="ada"))
    made = wb.blobs.put(b"pixels")
    assert made.md5 == digests(b"pixels").md5
    frame = Frame("1.png", 9, 9, made.md5, made.sha256, made.size_bytes)
    manifest = Manifest(Taxonomy(("cell",)), (LabeledFrame(frame, (), "train"),))
    wb.datasets.publish("cells", manifest, "m", "ada <a@b.org>")
    return wb


def run(workbench: Workbench, *words: str) -> str:
    done = CliRunner().invoke(cli, ["--home", str(workbench.config.home), *words], standalone_mode=False)
    if done.exception:
        raise done.exception
    return done.output


def args_of(workbench: Workbench, kind: str) -> dict[str, Any]:
    (job,) = workbench.jobs.list(kind=kind)
    return job.args


def test_a_training_from_a_git_repository_is_the_job_that_post_retrain_makes(workbench: Workbench) -> None:
    run(workbench, "retrain", "cells", *GIT, "--location", "models/tiny", "--model-name", "cells-night",
        "--experiment", "by night", "--primary-metric", "map_50", "--param", "epochs=3", "--detach")
    assert args_of(workbench, "retrain") == {
        "dataset": "cells", "version": "cells@0.1.0", "repository": str(PROJECT), "commit": SHA,
        "location": "models/tiny", "experiment": "by night", "register_as": "cells-night", "primary": "map_50",
        "params": {"epochs": 3}}


def test_a_recipe_of_the_workbench_trains_on_the_latest_version_or_a_given_one(workbench: Workbench) -> None:
    run(workbench, "retrain", "cells", "--param", "epochs=3", "--detach")
    assert args_of(workbench, "retrain") == {"dataset": "cells", "version": "cells@0.1.0", "params": {"epochs": 3},
                                             "recipe": "efficientnet_lite0_fcos"}
    with pytest.raises(Invalid, match="no version 0.9.0"):
        run(workbench, "retrain", "cells@0.9.0", "--detach")


@pytest.mark.parametrize(("words", "sentence"), [
    (("--location", "x"), "--location goes with --git-uri"), (("--model-name", "x"), "--model-name goes with"),
    ((*GIT, "--recipe", "tiny"), "--recipe names a recipe of the workbench"), (GIT[:2], "needs --commit"),
    ((*GIT[:2], "--commit", "main"), "full commit hash"), ((*GIT[:2], "--commit", "-h"), "full commit hash"),
    (("--git-uri", "ext::sh", "--commit", SHA), "git_uri must read"), (("--param", "epochs"), "must read NAME=VALUE"),
    (("--git-uri", "https://a:b@host/x", "--commit", SHA), "credentials"),
    (("--param", "nonsense=1"), "no parameter nonsense"),
    (("--base-model", "gone@1"), "gone@1"), ((*GIT, "--param", "a=$(id)"), "a")])
def test_what_cannot_be_trained_is_refused_before_a_job_is_stored(
        workbench: Workbench, words: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(Invalid, match=sentence):
        run(workbench, "retrain", "cells", *words, "--detach")
    assert workbench.jobs.list() == []


def test_rules_are_set_listed_and_switched_off(workbench: Workbench) -> None:
    said = run(workbench, "rules", "set", "cells", "schedule", "--cron", "0 3 * * 1", *GIT)
    assert "cells is trained at 0 3 * * 1 (UTC)." in said
    assert "alarm is told" in run(workbench, "rules", "set", "cells", "drift", "--only-tell", "--threshold", "0.3")
    found = rules("cells", records=workbench.records)
    assert found["schedule"].training["commit"] == SHA and "version" not in found["schedule"].training
    assert (found["drift"].threshold, found["drift"].retrain, found["drift"].person) == (0.3, False, "me")
    run(workbench, "rules", "off", "cells", "schedule")
    listed = run(workbench, "rules", "list", "cells")
    assert "schedule  off" in listed and "drift     when the deployed model drifts" in listed
    for wrong in (("set", "cells", "schedule"), ("set", "cells", "accepted", "--every-h", "1"),
                  ("set", "nothing", "drift")):
        with pytest.raises(Invalid):
            run(workbench, "rules", *wrong)
    with pytest.raises(NotFound, match="no rule 'accepted'"):
        run(workbench, "rules", "off", "cells", "accepted")


def test_what_follows_a_promotion_is_said_with_it_or_later(workbench: Workbench) -> None:
    run(workbench, "promote", "cells", "cells-detector@2", "cells@0.1.0", "--then", "int8", "--then", "cvat",
        "--detach")
    assert args_of(workbench, "promote")["then"] == ["int8", "cvat"]
    run(workbench, "rollback", "cells", "--bring-back", "--detach")
    assert args_of(workbench, "rollback") == {"dataset": "cells", "bring_back": True}
    with pytest.raises(NotFound, match="cells has no champion"):
        run(workbench, "redeploy", "cells", "--detach")
    for name in ("detector", "night"):
        workbench.records.add("promotions", "cells", f"cells-{name}@1", "ada", {"promoted": True})
    run(workbench, "redeploy", "cells", "--detach")
    assert args_of(workbench, "redeploy") == {"dataset": "cells", "model": "cells-detector@1", "then": ["deploy"]}
    assert run(workbench, "champion", "cells", "--name", "cells-night") == "cells-night@1\n"
    run(workbench, "drift", "cells", "--detach")
    assert args_of(workbench, "drift") == {"dataset": "cells"}


def a_worker_of(workbench: Workbench, *lanes: str) -> None:
    """As this process would stand in the tables if it worked."""
    process = psutil.Process()
    with workbench.records.engine.begin() as connection:
        connection.execute(tables.workers.insert(), {
            "id": "".join(lanes), "machine": tables.machine(), "pid": process.pid, "beat": 0.0,
            "pid_started": process.create_time()})
        connection.execute(tables.worker_lanes.insert(), [{"worker": "".join(lanes), "lane": name} for name in lanes])


@pytest.mark.parametrize("words", [("retrain", "cells"), ("rerun", "run-1"),
                                   ("sweep", "cells", "--space", '{"lr": [0.1, 0.2]}')])
def test_a_training_may_ask_for_a_gpu_and_is_told_when_no_worker_has_one(
        workbench: Workbench, words: tuple[str, ...]) -> None:
    workbench.jobs.list()  # the tables are there
    a_worker_of(workbench, "cpu", "train")
    with pytest.raises(Unavailable, match="No worker serves the lane gpu, .* leave out --gpu, or queue .* --detach"):
        run(workbench, *words, "--gpu")
    assert workbench.jobs.list() == []
    said = run(workbench, *words, "--gpu", "--detach")
    (job,) = workbench.jobs.list()
    assert job.args["gpu"] is True and tables.lane(job.kind, job.args) == "gpu"
    assert "No worker serves the lane gpu now: the job waits" in said
    a_worker_of(workbench, "gpu")
    assert "No worker" not in run(workbench, *words, "--gpu", "--detach")
    run(workbench, *words, "--detach")
    assert "gpu" not in workbench.jobs.list()[0].args


def test_a_step_that_no_living_worker_takes_is_not_queued_to_wait(workbench: Workbench) -> None:
    workbench.jobs.list()
    a_worker_of(workbench, "cpu")
    with pytest.raises(Unavailable, match=r"lane train, .* Start one that does \(setting worker_lanes; .*--detach"):
        run(workbench, "retrain", "cells")
    assert workbench.jobs.list() == []


def test_a_rule_may_ask_for_a_gpu(workbench: Workbench) -> None:
    said = run(workbench, "rules", "set", "cells", "schedule", "--every-h", "24", "--gpu")
    assert "No worker serves the lane gpu now" in said
    assert rules("cells", records=workbench.records)["schedule"].training["gpu"] is True


def test_no_more_trainings_wait_than_the_setting_says(workbench: Workbench) -> None:
    (workbench.config.home / "settings.toml").write_text("retrain_queue = 2\n")
    for _ in range(2):
        run(workbench, "retrain", "cells", "--detach")
    with pytest.raises(QueueFull, match="2 retrain jobs wait already.* cancel one .* setting retrain_queue"):
        run(workbench, "retrain", "cells", "--detach")
    assert len(workbench.jobs.list()) == 2
    for _ in range(3):  # what is no training waits as long as it likes
        run(workbench, "drift", "cells", "--detach")
    workbench.jobs.cancel(workbench.jobs.list(kind="retrain")[0].id)
    run(workbench, "retrain", "cells", "--detach")

"""The command line: quick, one command per step, and every failure one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from socket import socket

import pytest

from workbench import cli, kinds, quickstart, supervise
from workbench.config import Config
from workbench.jobs import tables
from workbench.records import Records
from workbench.supervise import parts
from workbench.wiring import Workbench

PROJECT = Path(__file__).resolve().parents[2]
STEPS = ("upload", "annotate", "undo", "evaluate", "version", "retrain", "sweep", "rerun", "promote", "rollback",
         "deploy", "redeploy", "drift", "quantize", "certify")
OTHERS = ("up", "doctor", "demo", "diff", "checkout", "champion", "rules", "watch", "jobs", "datasets", "models",
          "notify")


@pytest.fixture()
def config(tmp_path: Path) -> Config:
    with socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    return Config(home=tmp_path / "home", mongo_port=port, mlflow_port=9, person="ada", worker_lanes="cpu, train")


def workbench(config: Config, *words: str, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "workbench.cli", *words], env=parts.environment(config), cwd=PROJECT,
                          capture_output=True, text=True, timeout=timeout)


def test_help_tells_the_loop_in_its_order_and_is_quick(config: Config) -> None:
    best = 9.0
    for _ in range(3):  # the best of three: other work on the machine is not ours
        began = time.monotonic()
        said = workbench(config, "--help")
        best = min(best, time.monotonic() - began)
    assert said.returncode == 0 and best < 1.0
    assert "upload -> annotate -> review -> evaluate -> version -> retrain -> promote -> deploy" in said.stdout
    listed = [line.split()[0] for line in said.stdout.partition("Commands:")[2].splitlines() if line.strip()]
    assert listed == ["up", "doctor", "demo", *STEPS[:5], "diff", "checkout", *STEPS[5:10], "champion",
                      *STEPS[10:13], "rules", *STEPS[13:], "watch", "jobs", "datasets", "models", "notify"]


def test_help_imports_nothing_heavy() -> None:
    heavy = ("dbos", "sqlalchemy", "numpy", "torch", "fiftyone", "mlflow", "streamlit", "cv2", "fsspec", "psutil",
             "fastapi")
    code = f"import sys, workbench.cli; print({{name.split('.')[0] for name in sys.modules}} & set({heavy}))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT)
    assert said.stdout.strip() == "set()", said.stderr


@pytest.mark.parametrize("command", [*STEPS, *OTHERS])
def test_every_command_explains_itself(config: Config, command: str) -> None:
    assert cli.cli.commands[command].get_short_help_str(200)
    for option in cli.cli.commands[command].params:
        assert not isinstance(option, cli.click.Option) or option.help or option.name in ("split", "kind"), option.name


def test_every_job_kind_has_a_command_but_those_of_the_demo_and_of_the_cvat_page() -> None:
    assert set(kinds.ARGUMENTS) == {*STEPS, "correct", "pull", "send"}


@pytest.mark.parametrize("words, code, says", [
    (["jobs", "show", "nothing"], 1, "Job 'nothing' does not exist"),
    (["annotate", "cells"], 1, "No model is deployed for cells"),
    (["deploy", "cells", "student@1"], 1, "Start `workbench up`"),
    (["annotate", "cells", "m@1", "--rename", "lorry", "--detach"], 2, "must read NAME=VALUE"),
    (["champion", "cells"], 1, "cells has no champion. `workbench promote`"),
    (["champion", "cells", "--on", "2026-05-01"], 1, "cells has no champion on 2026-05-01"),
    (["champion", "cells", "--on", "May"], 2, "'May' is no date. Write a day as 2026-05-01"),
    (["rollback", "cells"], 1, "Start `workbench up`"),
    (["diff", "cells", "cells@1.0.0"], 2, "MAJOR.MINOR.PATCH"),
    (["diff", "cells@0.1.0", "cells@1.0.0"], 1, "cells"),
    (["checkout", "cells@1.0", "new"], 2, "must read name@MAJOR.MINOR.PATCH"),
    (["models", "add", "/"], 2, "docs/adopting.md"),
    (["part", "mongo"], 2, "there are mongod, ui"),
    (["part", "mongod", "--check"], 1, "Nothing listens"),
    (["upload", "cells", "/nowhere"], 2, "'/nowhere' does not exist"),
    (["sweep", "cells", "--space", "{"], 2, "--space cannot be read: Expecting property name"),
    (["sweep", "cells", "--space", "@/nowhere"], 2, "--space cannot be read"),
    (["sweep", "cells", "--space", "{}"], 2, "dataset_repo is no data set"),
    (["paint"], 2, "No such command 'paint'"),
    (["jobs", "list", "--state", "asleep"], 2, "is not one of 'queued'")])
def test_a_failure_is_one_sentence_and_an_exit_code(config: Config, words: list[str], code: int, says: str) -> None:
    said = workbench(config, *words)
    assert said.returncode == code, said.stderr
    assert says in said.stderr and "Traceback" not in said.stderr and said.stdout == ""


def test_a_setting_that_is_none_is_named_without_a_trace(config: Config) -> None:
    config.home.mkdir()
    (config.home / "settings.toml").write_text("colour = 'red'\n")
    said = workbench(config, "datasets")
    assert said.returncode == 2 and "'colour', which is no setting" in said.stderr and "Traceback" not in said.stderr


def test_debug_shows_where_an_error_came_from(config: Config) -> None:
    said = workbench(config, "--debug", "jobs", "show", "nothing")
    assert said.returncode == 1 and "Traceback" in said.stderr and "NotFound" in said.stderr


def test_a_detached_job_is_queued_listed_and_cancelled(config: Config) -> None:
    job_id = workbench(config, "deploy", "cells", "student@1", "--detach").stdout.strip()
    status = Workbench(config).jobs.get(job_id)
    assert (status.kind, status.args, status.person) == ("deploy", {"dataset": "cells", "model": "student@1"}, "ada")
    assert job_id in workbench(config, "jobs", "list").stdout
    shown = workbench(config, "jobs", "show", job_id).stdout
    assert json.loads(shown)["state"] == "queued"
    assert workbench(config, "jobs", "cancel", job_id).stdout.strip() == f"deploy job {job_id} is cancelled"


def test_steps_run_as_jobs_in_the_worker_and_tell_what_they_did(config: Config, tmp_path: Path) -> None:
    """Upload, version, diff and a failing step, through real processes: mongod, a worker, the command line."""
    pictures = quickstart.generate(tmp_path / "pictures", train=6, val=1, test=2, unlabeled=2, size=(192, 144))
    (pictures / "images" / "train" / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    with supervise.Supervisor(config, ("mongod", "worker"), lambda line: None) as supervisor:
        supervisor.wait_ready(timeout_s=180)
        outside = replace(config, person="eve")
        uploaded = workbench(outside, "upload", "digits", str(pictures))
        assert uploaded.returncode == 0, uploaded.stderr
        assert "digits@0.1.0" in uploaded.stdout
        assert "broken.jpg: " in uploaded.stderr and "upload job" in uploaded.stderr
        again = workbench(outside, "upload", "digits", str(pictures), "--json")
        result = json.loads(again.stdout)
        assert result["version"] == "digits@0.1.0" and result["added"] == 0
        published = workbench(outside, "version", "digits", "-m", "nothing new")
        assert published.returncode == 0 and "digits@0.1.0" in published.stdout
        failed = workbench(outside, "annotate", "digits", "nobody@1")
        assert failed.returncode == 1 and "nobody@1" in failed.stderr and "Traceback" not in failed.stderr
        assert workbench(outside, "diff", "digits@0.1.0", "digits@0.1.0").stdout.count(" 0 ") == 8
        listed = workbench(outside, "datasets").stdout
        assert "digits@0.1.0" in listed and "9 frames, 7 labelled" in listed
        shown = workbench(outside, "jobs", "list", "--kind", "upload").stdout.splitlines()
        assert len(shown) == 2 and all(" done " in line and " eve " in line for line in shown)
        entries = Records(config.database).entries("uploads", "digits")
        assert [(one.subject, one.person, one.facts["added"]) for one in entries] == [
            ("digits@0.1.0", "eve", 0), ("digits@0.1.0", "eve", 9)]
        assert entries[1].facts["refused"] == 1
        asked = workbench(outside, "retrain", "digits", "--gpu")
        assert asked.returncode == 1 and "No worker serves the lane gpu" in asked.stderr
        jobs = Workbench(outside).jobs
        assert [one.lanes for one in jobs.workers()] == [("cpu", "train")]
    assert jobs.workers() == [] and jobs.unserved_lane("upload", {}) == "cpu"
    with Records(config.database).engine.connect() as connection:
        assert list(connection.execute(tables.worker_lanes.select())) == []

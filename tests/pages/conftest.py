"""Pages as a visitor meets them, on an empty workbench or one with something in it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

PROJECT = Path(__file__).resolve().parent.parent.parent
for folder in (PROJECT, PROJECT / "tests", PROJECT / "tests" / "pages"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import filled  # noqa: E402
from parts import mlflow_server  # noqa: E402
from parts_mongo import free_port, mongod  # noqa: E402
from workbench.config import Config  # noqa: E402
from workbench.wiring import Workbench  # noqa: E402

RUN_S = 120  # FiftyOne's and MLflow's imports under load

Open = Callable[..., AppTest]


def settings(home: Path, **lines: str) -> Config:
    """A home whose outside parts answer nowhere, unless a line says where."""
    home.mkdir(parents=True, exist_ok=True)
    ports = {"mlflow_port": free_port(), "mongo_port": free_port(), "fiftyone_port": free_port()}
    (home / "settings.toml").write_text(
        "\n".join(
            [
                *(f'{key} = "{value}"' for key, value in lines.items()),
                *(f"{key} = {value}" for key, value in ports.items()),
            ]
        )
    )
    return Config.read(home, environ={})


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workbench:
    """Nothing in it, and neither mongod nor MLflow answers."""
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "home"))
    return Workbench(settings(tmp_path / "home"))


@pytest.fixture
def partless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workbench:
    """A data set and models, while mongod and MLflow are down."""
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "home"))
    workbench = Workbench(settings(tmp_path / "home"))
    filled.dataset(workbench)
    filled.model(workbench, tmp_path / "onnx")
    filled.decisions(workbench)
    return workbench


@pytest.fixture(scope="session")
def filled_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("filled")
    with mongod(folder / "mongo") as mongo, mlflow_server(folder / "mlflow") as mlflow:
        filled.fill(settings(folder / "home", mongo_url=mongo, mlflow_url=mlflow), folder / "onnx")
        yield folder / "home"


@pytest.fixture
def workbench(filled_home: Path, monkeypatch: pytest.MonkeyPatch) -> Workbench:
    """A data set with two versions, a working copy, models, runs, decisions and jobs; all parts answer."""
    monkeypatch.setenv("WORKBENCH_HOME", str(filled_home))
    return Workbench(Config.read(filled_home, environ={}))


@pytest.fixture
def visit() -> Open:
    """visit("upload", dataset="shapes") opens a page in a new session; nothing on it may have failed."""

    def open_page(name: str, **query: str) -> AppTest:
        at = AppTest.from_file(str(PROJECT / "app" / "main.py"), default_timeout=RUN_S)
        for key, value in query.items():
            at.query_params[key] = value
        at.run()
        if name != "overview":
            at.switch_page(f"../pages/{name}.py").run()
        assert not at.exception, at.exception[0].message
        return at

    return open_page

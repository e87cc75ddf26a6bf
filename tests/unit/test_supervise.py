"""The supervisor with real parts: they come up, come back after a crash, and end with it, however it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from socket import socket

import psutil
import pytest

from workbench import supervise
from workbench.config import Config
from workbench.errors import Conflict, Invalid, Unavailable
from workbench.supervise import parts
from workbench.wiring import Workbench

PROJECT = Path(__file__).resolve().parents[2]
WAIT_S = 120
QUICK = ("mongod", "worker")


@pytest.fixture()
def config(tmp_path: Path) -> Config:
    return Config(home=tmp_path / "home", **{f"{name}_port": free_port() for name in
                                             ("ui", "service", "mlflow", "fiftyone", "mongo")})


def free_port() -> int:
    with socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def until(is_so: Callable[[], object], what: str, timeout_s: float = WAIT_S) -> None:
    end = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < end, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.05)


def lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_parts_come_up_come_back_after_a_crash_and_end_together(config: Config) -> None:
    said: list[str] = []
    with supervise.Supervisor(config, QUICK, said.append) as supervisor:
        supervisor.wait_ready(timeout_s=WAIT_S)
        first = supervisor.pids()
        assert set(first) == set(QUICK) and all(map(lives, first.values()))
        assert {line.split()[0] for line in said if "answers after" in line} == set(QUICK)
        assert Workbench(config).server.tasks() == []
        for one in supervisor.parts:
            parts.look(config, one)

        os.kill(first["worker"], signal.SIGKILL)
        until(lambda: supervisor.pids().get("worker") not in (None, first["worker"]), "a restart")
        supervisor.wait_ready(("worker",), WAIT_S)
        assert any(re.match(r"worker stopped \(exit -9: .*\); starting it again in 1 s. Log: .*worker.log", line) for line in said)
        second = supervisor.pids()
        assert second["mongod"] == first["mongod"]
        guard = supervisor._guard.pid
    assert not any(map(lives, [*second.values(), guard]))
    assert (config.home / "logs" / "mongod.log").stat().st_size > 0
    with pytest.raises(Unavailable, match="Nothing listens on port"):
        parts.look(config, parts.part("mongod"))


def test_no_part_outlives_a_supervisor_that_was_killed(config: Config) -> None:
    code = ("import sys; from workbench.config import Config; from workbench import supervise; "
            "supervise.up(Config.read(), ('mongod', 'worker'), lambda line: print(line, flush=True))")
    process = subprocess.Popen([sys.executable, "-c", code], env=parts.environment(config), stdout=subprocess.PIPE, text=True)
    lines = [process.stdout.readline() for _ in range(2)]
    assert all("answers after" in line for line in lines), lines
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 3  # two parts and the guard
    process.kill()
    process.wait()
    until(lambda: not any(lives(child.pid) for child in children), "the end of all parts", 60)


def test_a_second_workbench_on_the_same_home_is_refused(config: Config) -> None:
    with supervise.Supervisor(config, ("mongod",), lambda line: None) as supervisor:
        supervisor.wait_ready(timeout_s=WAIT_S)
        other = replace(config, mongo_port=free_port())
        with pytest.raises(Conflict, match=rf"already runs on {config.home} \(process {os.getpid()}\)"):
            supervise.Supervisor(other, ("mongod",)).__enter__()
        assert lives(supervisor.pids()["mongod"])
    # Free again afterwards.
    supervise.lock(config.home).close()


def test_a_taken_port_is_named_with_the_setting_that_moves_it(config: Config) -> None:
    with socket() as listener:
        listener.bind(("127.0.0.1", config.service_port))
        listener.listen()
        with pytest.raises(Conflict, match=f"service cannot have port {config.service_port}.*WORKBENCH_SERVICE_PORT"):
            supervise.Supervisor(config, ("mongod", "service")).__enter__()
    # Nothing was started and nothing is held.
    supervise.lock(config.home).close()


def test_ctrl_c_ends_everything_with_exit_code_0(config: Config) -> None:
    process = subprocess.Popen([sys.executable, "-m", "workbench.cli", "up", "--part", "mongod"], cwd=PROJECT,
                               env=parts.environment(config), stdout=subprocess.PIPE, text=True)
    assert "mongod    answers after" in process.stdout.readline()
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(WAIT_S) == 0 and "Stopping." in process.stdout.read()
    assert not any(lives(child.pid) for child in children)


def test_a_part_with_an_outside_server_is_not_started(config: Config) -> None:
    chosen = supervise.Supervisor(replace(config, mongo_url="mongodb://db:27017", mlflow_url="http://mlflow:5000")).parts
    assert [part.name for part in chosen] == ["ui", "worker", "service", "fiftyone"]
    with pytest.raises(Invalid, match="there are mongod, ui"):
        supervise.Supervisor(config, ("mongo",))


def test_no_secret_stands_on_a_command_line(config: Config) -> None:
    secrets = {"service_token": "s3cret-1", "cvat_token": "s3cret-2", "mongo_url": "mongodb://me:s3cret-3@db",
               "database_url": "postgresql://me:s3cret-4@db/x", "mlflow_url": "http://me:s3cret-5@ml"}
    secret = replace(config, **secrets)
    for part in parts.ALL:
        assert "s3cret" not in " ".join(part.argv(secret)), part.name
    inherited = parts.environment(secret)
    assert Config.read(environ=inherited) == secret


def test_every_part_listens_where_the_settings_say_and_on_loopback_by_default(config: Config) -> None:
    for part in parts.ALL:
        argv = part.argv(config)
        if part.port:
            assert str(getattr(config, part.port)) in argv and "127.0.0.1" in argv, part.name
        assert "0.0.0.0" not in argv


def test_a_part_that_cannot_start_is_tried_again_and_said(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    broken = parts.Part("broken", "fails", lambda config: [sys.executable, "-c", "raise SystemExit('no such model')"],
                            lambda config: parts._answers("http://127.0.0.1:9/"), wave=0)
    missing = parts.Part("missing", "is not there", lambda config: ["/nowhere/program"], broken.probe, wave=0)
    monkeypatch.setattr(parts, "ALL", (broken, missing))
    with supervise.Supervisor(config, on_line=said.append) as supervisor:
        until(lambda: sum("broken stopped (exit 1: no such model)" in line for line in said) >= 2, "a second attempt")
        with pytest.raises(Unavailable, match="broken did not answer within 0.1 s.*ends: no such model"):
            supervisor.wait_ready(("broken",), 0.1)
    assert "starting it again in 1 s" in said[0] or "missing" in said[0]
    assert any("again in 2 s" in line for line in said if line.startswith("broken"))
    assert any(line.startswith("missing cannot be started: ") for line in said)


def test_a_log_that_grew_too_large_is_turned_over(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    chatty = parts.Part("chatty", "talks", lambda config: [sys.executable, "-uc", "while True: print('x' * 999)"],
                            lambda config: None, wave=0)
    monkeypatch.setattr(parts, "ALL", (chatty,))
    monkeypatch.setattr(supervise, "LOG_BYTES", 50_000)
    log = config.home / "logs" / "chatty.log"
    with supervise.Supervisor(config, on_line=lambda line: None) as supervisor:
        supervisor.wait_ready(timeout_s=WAIT_S)
        until(log.with_suffix(".log.1").exists, "the turn")
    assert log.with_suffix(".log.1").stat().st_size > 50_000


@pytest.mark.slow
def test_everything_comes_up_and_the_first_page_within_20_seconds(config: Config) -> None:
    """On an otherwise quiet machine; a busy one gets three times as long."""
    said: list[str] = []
    began = time.monotonic()
    with supervise.Supervisor(config, on_line=said.append) as supervisor:
        supervisor.wait_ready(("ui",), 60)
        page_s = time.monotonic() - began
        supervisor.wait_ready(timeout_s=280)
        print(f"first page after {page_s:.1f} s, everything after {time.monotonic() - began:.1f} s")
        assert page_s < 20 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
        assert set(supervisor.pids()) == {part.name for part in parts.ALL}
        assert not [line for line in said if "stopped" in line]

"""Jobs on a real Postgres with worker processes that take each other for other machines: silence, not a process id,
tells who is dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.parts_postgres import Postgres, postgres
from workbench.config import Config
from workbench.jobs import Jobs
from workbench.records import Records, open_database

WAIT_S = 90   # a worker starts in 3 s; this machine may be busy
DEAD_S = 6    # 30 by default; a busy machine beats at least every second

Start = Callable[..., subprocess.Popen]


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    try:
        with postgres() as running:
            yield running
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture()
def url(server: Postgres) -> str:
    return server.database()


@pytest.fixture()
def jobs(url: str, tmp_path: Path) -> Iterator[Jobs]:
    """As the HTTP service sees them, on a machine that runs no worker."""
    config = Config(home=tmp_path, database_url=url, machine_name="service", worker_dead_s=DEAD_S)
    engine = open_database(url)
    yield Jobs(config, engine)
    engine.dispose()


@pytest.fixture()
def start(url: str, tmp_path: Path) -> Iterator[Start]:
    """Starts a worker process on a machine of that name; all are killed at the end of the test."""
    started: list[subprocess.Popen] = []

    def one(name: str, **settings: object) -> subprocess.Popen:
        settings = {"machine_name": name, "database_url": url, "worker_dead_s": DEAD_S, **settings}
        env = {**os.environ, **{f"WORKBENCH_{key.upper()}": str(value) for key, value in settings.items()}}
        with (tmp_path / f"{name}.log").open("wb") as log:
            started.append(subprocess.Popen([sys.executable, str(Path(__file__).parent / "worker_of_files.py"),
                                             str(tmp_path)], env=env, stdout=log, stderr=log, cwd=tmp_path))
        return started[-1]

    yield one
    for process in started:
        process.kill()
        process.wait()


def until(is_so: Callable[[], object], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < end, f"{what} did not happen within {WAIT_S} s"
        time.sleep(0.05)


def machines(jobs: Jobs) -> dict[str, str]:
    """Name of a machine -> id of the worker that lives there."""
    return {worker.machine.split()[0]: worker.id for worker in jobs.workers()}


def test_a_job_whose_machine_is_gone_ends_once_on_another_one(jobs: Jobs, start: Start, tmp_path: Path) -> None:
    processes = {name: start(name) for name in ("a", "b")}  # both make the tables of an empty database
    until(lambda: set(machines(jobs)) == {"a", "b"}, "two workers")
    job_id = jobs.submit("retrain", {"n": 200, "pause_s": 0.03}, person="ada", key="once")
    until(lambda: jobs.get(job_id).done > 5, "progress")
    ids = machines(jobs)
    victim = next(name for name in ids if ids[name] == jobs.get(job_id).worker)
    survivor = "b" if victim == "a" else "a"
    before = jobs.get(job_id).done
    processes[victim].kill()
    processes[victim].wait()
    assert jobs.get(job_id).state == "running"  # nobody knows yet

    assert jobs.submit("retrain", {"n": 200, "pause_s": 0.03}, person="ada", key="once") == job_id
    status = jobs.wait(job_id, WAIT_S)
    assert (status.state, status.done, status.worker) == ("done", 200, ids[survivor]) and before < 200
    assert status.result == {"counted": 200, "by": "ada"}
    # What a dead worker had written is not written again, and nobody else was at it.
    assert [int(line) for line in (tmp_path / f"{job_id}.count").read_text().split()] == list(range(200))
    assert sum("The worker died" in line for line in jobs.log_lines(job_id)) == 1
    assert set(machines(jobs)) == {survivor} and processes[survivor].poll() is None


def test_lanes_work_side_by_side_on_their_machines_and_are_cancelled_from_another(
        jobs: Jobs, start: Start) -> None:
    start("desk", worker_lanes="cpu")
    start("rack", worker_lanes="train, gpu")
    until(lambda: set(machines(jobs)) == {"desk", "rack"}, "two workers")
    ids = machines(jobs)
    upload, training, heavy = (jobs.submit(kind, {"n": 3000, **more}, person="ada")
                               for kind, more in (("count", {}), ("retrain", {}), ("retrain", {"gpu": True})))
    until(lambda: all(jobs.get(one).done > 0 for one in (upload, training, heavy)), "three jobs at once")
    assert [jobs.get(one).worker for one in (upload, training, heavy)] == [ids["desk"], ids["rack"], ids["rack"]]
    assert jobs.cancel(heavy).is_cancelling
    assert jobs.wait(heavy, WAIT_S).state == "cancelled"
    assert jobs.get(upload).state == jobs.get(training).state == "running"


def test_nobody_takes_a_job_of_a_lane_that_no_worker_serves(jobs: Jobs, start: Start) -> None:
    start("desk", worker_lanes="cpu")
    training = jobs.submit("retrain", {"n": 1}, person="ada")
    upload = jobs.submit("count", {"n": 1}, person="ada")
    assert jobs.wait(upload, WAIT_S).state == "done"
    time.sleep(1.5)  # three times as long as a worker takes to look
    assert jobs.get(training).state == "queued"
    start("rack", worker_lanes="train")
    assert jobs.wait(training, WAIT_S).state == "done"


def test_a_worker_that_was_cut_off_ends_with_what_it_left_and_changes_nothing_more(
        jobs: Jobs, start: Start, tmp_path: Path) -> None:
    processes = {"a": start("a")}
    job_id = jobs.submit("retrain", {"n": 100, "pause_s": 0.05}, person="ada")
    until(lambda: jobs.get(job_id).done > 3, "progress")
    processes["a"].send_signal(signal.SIGSTOP)
    start("b")
    status = jobs.wait(job_id, WAIT_S)
    assert status.state == "done" and status.worker == machines(jobs)["b"]
    processes["a"].send_signal(signal.SIGCONT)
    assert processes["a"].wait(WAIT_S) == 70
    assert jobs.get(job_id) == status
    assert job_id in (tmp_path / f"{processes['a'].pid}.ended").read_text().split()


def test_a_database_that_is_started_again_fails_no_job(
        server: Postgres, jobs: Jobs, start: Start, tmp_path: Path) -> None:
    start("a", worker_dead_s=60)
    job_id = jobs.submit("count", {"n": 150, "pause_s": 0.03}, person="ada")
    until(lambda: jobs.get(job_id).done > 3, "progress")
    worker = jobs.get(job_id).worker
    server.stop()
    server.start()
    status = jobs.wait(job_id, WAIT_S)
    assert (status.state, status.worker, jobs.log_lines(job_id)) == ("done", worker, [])
    assert len((tmp_path / f"{job_id}.count").read_text().split()) == 150


def test_ledgers_and_leases_are_kept_there_too(url: str) -> None:
    records = Records(url)
    assert records.add("uploads", "cells", "cells@1", "ada", key="one")
    assert not records.add("uploads", "cells", "cells@1", "ada", key="one")
    assert [entry.subject for entry in Records(url).entries("uploads")] == ["cells@1"]
    records.lease("cells", "a.png", "ada")
    assert records.leased("cells") == {"a.png": "ada"}

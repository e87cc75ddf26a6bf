"""Durable jobs with real worker processes on real databases: nothing lost, nothing twice, whatever is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import sqlalchemy as sa

from workbench.config import Config
from workbench.errors import Conflict, Invalid, NotFound, Unavailable
from workbench.jobs import Jobs, QueueFull, tables
from workbench.jobs import worker as module
from workbench.records import open_database

PROJECT = Path(__file__).resolve().parents[2]
WAIT_S = 90  # a worker starts in 2 s; this machine may be busy


@pytest.fixture()
def home(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture()
def jobs(home: Path) -> Jobs:
    return open_jobs(home)


@pytest.fixture()
def start(home: Path) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Starts a worker process; all are killed at the end of the test."""
    started: list[subprocess.Popen[bytes]] = []

    def one() -> subprocess.Popen[bytes]:
        log = (home / f"worker{len(started)}.log").open("wb")
        started.append(subprocess.Popen([sys.executable, str(Path(__file__).parent / "worker_of_files.py"), str(home)],
                                        stdout=log, stderr=subprocess.STDOUT, cwd=home))
        return started[-1]

    yield one
    for process in started:
        process.kill()
        process.wait()


def open_jobs(home: Path) -> Jobs:
    config = Config(home=home)
    return Jobs(config, open_database(config.database))


def until(is_so: Callable[[], object], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < end, f"{what} did not happen within {WAIT_S} s"
        time.sleep(0.02)


def test_a_double_click_is_one_job(jobs: Jobs, home: Path) -> None:
    first = jobs.submit("count", {"n": 3}, person="ada", key="form 1")
    assert jobs.submit("count", {"n": 3}, person="ada", key="form 1") == first
    assert open_jobs(home).submit("count", {"n": 3}, person="ada", key="form 1") == first
    assert jobs.submit("count", {"n": 3}, person="ada", key="form 2") != first
    assert jobs.submit("count", {"n": 3}, person="ada") != jobs.submit("count", {"n": 3}, person="ada")
    assert len(jobs.list()) == 4 and jobs.counts() == {("count", "queued"): 4}


def test_a_key_with_other_arguments_is_refused(jobs: Jobs) -> None:
    jobs.submit("count", {"n": 3}, person="ada", key="form 1")
    with pytest.raises(Conflict, match="other arguments"):
        jobs.submit("count", {"n": 4}, person="ada", key="form 1")


def test_a_queue_with_a_limit_takes_no_more_than_that_from_many_at_once(home: Path, jobs: Jobs) -> None:
    jobs.prepare()
    others, said = [open_jobs(home) for _ in range(8)], []

    def submit(number: int) -> None:
        for request in range(3):
            try:
                said.append(others[number].submit("retrain", {}, person="ada", key=f"{number} {request}", most_queued=5))
            except QueueFull as error:
                said.append(str(error))

    threads = [threading.Thread(target=submit, args=(number,)) for number in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert jobs.counts() == {("retrain", "queued"): 5} and len(said) == 24
    assert said.count("5 retrain jobs wait already. Submit it again when one has begun.") == 19
    queued = jobs.list()[0]
    # What waits already is the same job also when the queue is full, and other kinds have their own.
    key = next(f"{number} {request}" for number in range(8) for request in range(3)
               if (there := jobs.find("retrain", f"{number} {request}")) and there.id == queued.id)
    assert jobs.submit("retrain", {}, person="ada", key=key, most_queued=5) == queued.id
    jobs.submit("count", {}, person="ada", most_queued=1)


@pytest.mark.parametrize("args", [{"frames": {1, 2}}, {"x": float("nan")}, {"path": Path("a")}])
def test_arguments_that_are_not_json_are_refused_and_queue_nothing(jobs: Jobs, args: dict) -> None:
    with pytest.raises(Invalid, match="plain JSON"):
        jobs.submit("count", args, person="ada")
    assert jobs.list() == []


def test_a_job_that_does_not_exist_is_not_found(jobs: Jobs) -> None:
    for ask in (jobs.get, jobs.cancel, jobs.log_lines, jobs.failed_items):
        with pytest.raises(NotFound, match="jobs list"):
            ask("nothing")
    with pytest.raises(Invalid, match="queued, running"):
        jobs.list(state="asleep")


def test_a_queued_job_that_was_cancelled_never_starts(jobs: Jobs, start: Callable, home: Path) -> None:
    cancelled, kept = (jobs.submit("count", {"n": 2}, person="ada") for _ in range(2))
    assert jobs.cancel(cancelled).state == "cancelled"
    start()
    assert jobs.wait(kept, WAIT_S).state == "done"
    assert jobs.get(cancelled).started_at == "" and not (home / f"{cancelled}.count").exists()
    assert jobs.cancel(kept).state == "done"


def test_waiting_for_a_job_that_nobody_does_ends_with_what_to_do(jobs: Jobs) -> None:
    job_id = jobs.submit("count", {"n": 2}, person="ada")
    with pytest.raises(Unavailable, match=f"still queued after 0.3 s.*jobs show {job_id}"):
        jobs.wait(job_id, 0.3)


def test_one_worker_does_jobs_in_order_reports_and_survives_what_they_raise(jobs: Jobs, start: Callable, home: Path) -> None:
    process = start()
    counted = jobs.submit("count", {"n": 5}, person="ada")
    failing = {how: jobs.submit("fail", {"how": how}, person="ada") for how in ("invalid", "unforeseen", "exit", "answer")}
    unknown = jobs.submit("paint", {}, person="ada")
    done = jobs.wait(counted, WAIT_S)
    assert (done.state, done.done, done.total, done.note) == ("done", 5, 5, "number 4")
    assert done.result == {"counted": 5, "by": "ada"} and done.created_at < done.started_at < done.finished_at
    assert done.failed_items == 1 and jobs.failed_items(counted) == {"an item": "is odd"}

    found = {how: jobs.wait(job_id, WAIT_S) for how, job_id in failing.items()}
    assert {status.state for status in found.values()} == {"failed"}
    assert found["invalid"].error == "The box leaves the frame. Draw it again." and jobs.log_lines(failing["invalid"]) == []
    assert found["unforeseen"].error.startswith("KeyError: 'colour'") and "SystemExit: 3" in found["exit"].error
    assert 'raise {"invalid"' in "\n".join(jobs.log_lines(failing["unforeseen"]))
    assert "TypeError" in found["answer"].error
    assert "No worker knows jobs of kind 'paint'; there are count" in jobs.wait(unknown, WAIT_S).error
    # Wrong input is not tried again.
    assert (home / "failed.count").read_text() == "...." and process.poll() is None
    assert jobs.counts() == {("count", "done"): 1, ("fail", "failed"): 4, ("paint", "failed"): 1}


def test_a_running_job_stops_when_it_is_cancelled_and_a_training_keeps_no_upload_waiting(
        jobs: Jobs, start: Callable, home: Path) -> None:
    training = jobs.submit("retrain", {"n": 3000}, person="ada")
    upload = jobs.submit("count", {"n": 3}, person="ada")
    start()
    assert jobs.wait(upload, WAIT_S).state == "done"
    until(lambda: jobs.get(training).done > 0, "progress")
    assert jobs.get(training).state == "running"
    began = time.monotonic()
    assert jobs.cancel(training).is_cancelling
    cancelled = jobs.wait(training, WAIT_S)
    assert cancelled.state == "cancelled" and not cancelled.is_cancelling
    assert time.monotonic() - began < 10  # asked every 0.2 s; generous for a busy machine
    assert cancelled.done <= len((home / f"{training}.count").read_text().split()) < 3000


def test_a_worker_killed_at_random_moments_costs_and_doubles_nothing(jobs: Jobs, start: Callable, home: Path) -> None:
    chance = random.Random(1)
    ids = [jobs.submit("count", {"n": 100}, person="ada") for _ in range(2)]
    for _ in range(4):
        process = start()
        until(lambda: any(worker.pid == process.pid for worker in jobs.workers()), "a worker")
        time.sleep(chance.uniform(0, 1.2))
        process.kill()
        process.wait()
    assert jobs.workers() == []
    start()
    for job_id in ids:
        status = jobs.wait(job_id, WAIT_S)
        assert (status.state, status.done) == ("done", 100)
        assert [int(line) for line in (home / f"{job_id}.count").read_text().split()] == list(range(100))
        assert jobs.failed_items(job_id) == {"an item": "is odd"}


def test_an_interrupted_job_goes_on_before_those_queued_after_it(jobs: Jobs, start: Callable) -> None:
    first = jobs.submit("count", {"n": 60}, person="ada")
    second = jobs.submit("count", {"n": 1}, person="ada")
    process = start()
    until(lambda: jobs.get(first).done > 3, "progress")
    process.kill()
    process.wait()
    start()
    jobs.wait(second, WAIT_S)
    assert jobs.get(first).state == "done" and jobs.get(first).finished_at <= jobs.get(second).started_at
    assert "The worker died" in jobs.log_lines(first)[0]


def test_a_job_is_taken_over_from_a_dead_worker_and_never_from_a_living_one(jobs: Jobs, start: Callable, home: Path) -> None:
    first, second = start(), start()
    until(lambda: len(jobs.workers()) == 2, "two workers")
    job_id = jobs.submit("overlap", {"s": 6}, person="ada")
    until((home / f"{job_id}.begun").exists, "the start")
    # Stopped, it sends no beats; its process is there, so the job stays its own.
    holder, other = (first, second) if str(first.pid) in (home / f"{job_id}.begun").read_text() else (second, first)
    holder.send_signal(signal.SIGSTOP)
    time.sleep(3 * module.BEAT_S)
    assert jobs.get(job_id).state == "running" and len((home / f"{job_id}.begun").read_text().split()) == 1
    holder.kill()
    holder.wait()
    (home / f"{job_id}.inside").unlink()
    assert jobs.wait(job_id, WAIT_S).state == "done"
    assert [int(pid) for pid in (home / f"{job_id}.begun").read_text().split()] == [holder.pid, other.pid]


def test_a_worker_asked_to_end_gives_its_job_back(jobs: Jobs, start: Callable, home: Path) -> None:
    process = start()
    job_id = jobs.submit("count", {"n": 60}, person="ada")
    until(lambda: jobs.get(job_id).done > 3, "progress")
    process.terminate()
    assert process.wait(WAIT_S) == 0
    waiting = jobs.get(job_id)
    assert waiting.state == "queued" and 3 < waiting.done < 60 and jobs.workers() == []
    start()
    assert jobs.wait(job_id, WAIT_S).state == "done"
    assert len((home / f"{job_id}.count").read_text().split()) == 60 and jobs.log_lines(job_id) == []


def test_a_job_whose_worker_is_dead_can_be_cancelled_at_once(jobs: Jobs, start: Callable) -> None:
    process = start()
    job_id = jobs.submit("count", {"n": 500}, person="ada")
    until(lambda: jobs.get(job_id).done > 3, "progress")
    process.kill()
    process.wait()
    assert jobs.cancel(job_id).state == "cancelled"
    start()
    after = jobs.submit("count", {"n": 1}, person="ada")
    assert jobs.wait(after, WAIT_S).state == "done" and jobs.get(job_id).state == "cancelled"


def test_a_job_left_between_our_row_and_the_queue_is_queued_again(jobs: Jobs, start: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        # What a kill between the two writes leaves behind.
        patched.setattr(Jobs, "_enqueue", lambda *_: None)
        job_id = jobs.submit("count", {"n": 2}, person="ada")
    start()
    assert jobs.wait(job_id, WAIT_S).state == "done"


def test_a_job_that_kills_its_workers_is_given_up(jobs: Jobs, home: Path) -> None:
    job_id = jobs.submit("fail", {"how": "die"}, person="ada")
    worker = _offline_worker(jobs)
    for deaths in range(module.MAX_DEATHS):
        assert worker._start(job_id) is not None, deaths
    assert worker._start(job_id) is None
    assert jobs.get(job_id).state == "failed" and f"{module.MAX_DEATHS} workers died in a row" in jobs.get(job_id).error


def test_deaths_with_progress_in_between_are_forgiven(jobs: Jobs) -> None:
    job_id = jobs.submit("count", {"n": 1000}, person="ada")
    worker = _offline_worker(jobs)
    for done in range(3 * module.MAX_DEATHS):
        assert worker._start(job_id) is not None
        with worker.engine.begin() as connection:
            connection.execute(tables.jobs.update().values(done=done))
    assert jobs.get(job_id).state == "running"


def test_a_worker_on_another_machine_is_dead_only_after_a_long_silence(jobs: Jobs) -> None:
    clock = _Clock()
    worker = _offline_worker(jobs, dead_s=30, clock=clock)
    row = _Row(id="theirs", machine="another machine", pid=1, pid_started=0.0, beat=1.0)
    assert not worker._is_dead(row)
    clock.at += 29
    assert not worker._is_dead(row)
    clock.at += 2
    assert worker._is_dead(row)
    # It beats again: alive, whatever its clock says.
    assert not worker._is_dead(_Row(id="theirs", machine="another machine", pid=1, pid_started=0.0, beat=0.5))


def test_the_reaper_strikes_off_only_whom_it_has_watched_being_silent(jobs: Jobs) -> None:
    clock = _Clock()
    reaper = _offline_worker(jobs, dead_s=30, clock=clock, client=_NoWorkflows())
    with jobs._engine.begin() as connection:
        connection.execute(tables.workers.insert(), [
            {"id": name, "machine": "another machine", "pid": 1, "pid_started": 0.0, "beat": 1.0}
            for name in ("silent", "beating")])

    def after(seconds: int) -> list[str]:
        for second in range(seconds):
            clock.at += 1
            with jobs._engine.begin() as connection:
                connection.execute(tables.workers.update().where(tables.workers.c.id == "beating").values(beat=clock.at))
            reaper._adopt()
        with jobs._engine.connect() as connection:
            return sorted(connection.execute(sa.select(tables.workers.c.id)).scalars())

    assert after(20) == ["beating", "silent"]
    clock.at += 60  # without the database nobody could beat, and nobody look: that counts for nothing
    assert after(30) == ["beating", "silent"]
    assert after(2) == ["beating"]


def test_what_a_dead_worker_left_running_is_ended_where_its_job_may_go_elsewhere(jobs: Jobs) -> None:
    ids = {name: jobs.submit("retrain", {}, person="ada") for name in ("ours", "fallen's", "theirs", "cancelled")}
    stray: dict[str, bool] = {}
    ask = lambda is_stray: stray.update({name: is_stray(job_id) for name, job_id in {**ids, "unknown": "no-job"}.items()})
    worker = _offline_worker(jobs, end_here=ask)
    holder = {"ours": worker.id, "fallen's": "fallen", "theirs": "far", "cancelled": "fallen"}
    at = {"pid": os.getpid(), "pid_started": psutil.Process().create_time(), "beat": 1.0}
    with jobs._engine.begin() as connection:
        connection.execute(tables.workers.insert(), {"id": worker.id, "machine": "here", **at})
        for name, job_id in ids.items():
            connection.execute(tables.jobs.update().where(tables.jobs.c.id == job_id).values(
                worker=holder[name], state="cancelled" if name == "cancelled" else "running"))
    worker._end_strays()
    # Nobody else could take it: it is found and followed further.
    assert stray == {"ours": False, "fallen's": False, "theirs": False, "cancelled": True, "unknown": False}
    with jobs._engine.begin() as connection:
        connection.execute(tables.workers.insert(), {"id": "far", "machine": "another machine", **at})
    worker._end_strays()
    assert stray == {"ours": False, "fallen's": True, "theirs": True, "cancelled": True, "unknown": False}


@pytest.mark.parametrize("kind, args, expected", [
    ("upload", {}, "cpu"), ("annotate", {"gpu": True}, "cpu"), ("retrain", {}, "train"), ("sweep", {"gpu": False}, "train"),
    ("retrain", {"gpu": True}, "gpu"), ("rerun", {"gpu": True}, "gpu"), ("retrain", {"gpu": "yes"}, "train")])
def test_a_training_that_asks_for_a_gpu_waits_in_a_lane_of_its_own(kind: str, args: dict, expected: str) -> None:
    assert tables.lane(kind, args) == expected


def test_a_worker_serves_the_lanes_it_is_told_to_and_refuses_others(home: Path) -> None:
    assert tables.lanes_of("gpu, train gpu") == ("gpu", "train")
    assert {"cpu", "train"} <= set(tables.lanes_of(""))
    for wrong, message in (({"worker_lanes": "cpu, tpu"}, "names tpu; there are cpu, train, gpu"),
                           ({"worker_dead_s": 0}, "worker_dead_s must be at least 2, is 0")):
        config = Config(home=home, **wrong)
        with pytest.raises(Invalid, match=message):
            Jobs(config, open_database(config.database)).work({})


def test_a_machine_is_told_from_others_of_its_name_by_its_boot() -> None:
    assert tables.machine("host-a") != tables.machine("host-b") and tables.machine("host-a").startswith("host-a ")
    assert Path("/proc/sys/kernel/random/boot_id").read_text()[:8] in tables.machine()


def test_a_database_that_does_not_answer_for_a_moment_fails_no_job(jobs: Jobs) -> None:
    worker, calls = _offline_worker(jobs), []

    def write(connection: sa.Connection) -> str:
        calls.append(connection)
        if len(calls) == 1:
            raise sa.exc.OperationalError("UPDATE jobs", {}, ConnectionError("server closed the connection"))
        return "written"
    assert worker.write(write) == "written" and len(calls) == 2


def test_progress_is_written_a_few_times_a_second_and_the_last_one_always(jobs: Jobs) -> None:
    job_id = jobs.submit("count", {"n": 1}, person="ada")
    worker = _offline_worker(jobs)
    worker._start(job_id)
    job = worker._running[job_id] = module.RunningJob(worker, job_id)
    statements: list[str] = []
    sa.event.listen(worker.engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    for number in range(1000):
        job.progress(number, 1000)
        job.check()
    assert statements == [] and jobs.get(job_id).done == 0
    worker._pulse()
    assert jobs.get(job_id).done == 999
    job.progress(1000, 1000, "end")
    worker._finish(job, {"state": "done", "result": "{}"})
    assert (jobs.get(job_id).done, jobs.get(job_id).note, jobs.get(job_id).state) == (1000, "end", "done")


def test_the_end_of_a_job_that_was_given_away_changes_nothing(jobs: Jobs) -> None:
    job_id = jobs.submit("count", {"n": 1}, person="ada")
    first, second = _offline_worker(jobs), _offline_worker(jobs)
    assert first._start(job_id) is not None and second._start(job_id) is not None
    first._finish(module.RunningJob(first, job_id), {"state": "failed", "error": "too late"})
    assert jobs.get(job_id).state == "running" and jobs.get(job_id).error == ""


def test_jobs_are_listed_newest_first_by_kind_and_state(jobs: Jobs) -> None:
    ids = [jobs.submit(kind, {}, person="ada") for kind in ("count", "fail", "count")]
    jobs.cancel(ids[0])
    assert {status.id for status in jobs.list(kind="count")} == {ids[0], ids[2]}
    assert [status.id for status in jobs.list(state="cancelled")] == [ids[0]]
    assert len(jobs.list(limit=2)) == 2
    assert [status.created_at for status in jobs.list()] == sorted((s.created_at for s in jobs.list()), reverse=True)


def test_looking_at_jobs_needs_no_queue_library(home: Path) -> None:
    code = ("import sys; from pathlib import Path; from workbench.config import Config; from workbench.jobs import Jobs; "
            "from workbench.records import open_database; c = Config(home=Path(sys.argv[1])); "
            "print(Jobs(c, open_database(c.database)).list(), 'dbos' in sys.modules)")
    said = subprocess.run([sys.executable, "-c", code, str(home)], capture_output=True, text=True, cwd=PROJECT)
    assert said.stdout.strip() == "[] False", said.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_during_annotate_and_version_change_nothing() -> None:
    said = subprocess.run([sys.executable, "bench/kill.py", "--kills", "20", "--frames", "32"], capture_output=True, text=True,
                          cwd=PROJECT, timeout=880)
    assert said.returncode == 0, said.stderr[-3000:]
    figures = json.loads(said.stdout.strip().splitlines()[-1])
    assert (figures["kills"], figures["identical"], figures["lost"], figures["doubled"]) == (20, True, 0, 0)
    assert {"annotate", "version"} <= figures["by_moment"].keys() and figures["boxes_a_round"] > 50


class _Clock:
    at = 1000.0

    def __call__(self) -> float:
        return self.at


class _NoWorkflows:
    def list_workflows(self, **_: object) -> list[object]:
        return []


class _Row:
    def __init__(self, **columns: object) -> None:
        self.__dict__.update(columns)


def _offline_worker(jobs: Jobs, client: object = None, **changed: object) -> module.WorkerProcess:
    options = {"lanes": tables.LANES, "machine": "here", "dead_s": 30, **changed}
    return module.WorkerProcess(jobs._engine, "", {}, 1, threading.Event(), client, lambda *_: None, **options)


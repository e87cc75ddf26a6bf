"""Durable jobs: a queue, idempotency keys and recovery from DBOS; state, progress, failed items and log in our tables.

A job is one DBOS workflow around one repeatable step. DBOS decides which worker runs it; our `jobs` row is what people
see and the only place a job ends. Killed anywhere, the step is called again and goes on from what the stores hold.
"""

from __future__ import annotations

import hashlib
import json
import logging
import signal
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sqlalchemy as sa

from workbench.config import Config
from workbench.errors import Conflict, Invalid, NotFound, Unavailable
from workbench.jobs.tables import (APPLICATION, STATES, TRAIN_KINDS, WORKFLOW, database_time, has_process, items, jobs,
                                   lane, lanes_of, log, machine, metadata, worker_lanes, workers)
from workbench.ports import Job
from workbench.records import alone, now, reading

LOOK_S = 0.2  # how often somebody who waits looks

# Each gets the job's arguments, with the "person" who asked unless they name another.
Kinds = dict[str, Callable[[dict[str, Any], Job], dict[str, Any]]]
EndHere = Callable[[Callable[[str], bool]], None]


@dataclass(frozen=True)
class JobStatus:
    """A job as it stands: progress `done` of `total` (0: not known yet), counts, result or error, times in UTC, and the
    worker that has or had it."""

    id: str
    kind: str
    args: dict[str, Any]
    person: str
    state: str
    done: int
    total: int
    note: str
    failed_items: int
    result: dict[str, Any] | None
    error: str
    is_cancelling: bool
    created_at: str
    started_at: str
    finished_at: str
    worker: str = ""

    @property
    def is_over(self) -> bool:
        return self.state in ("done", "failed", "cancelled")


class QueueFull(Unavailable):
    """As many jobs of a kind wait as may."""


def _keyed(kind: str, key: str) -> str:
    return hashlib.sha256(f"{kind}\0{key}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Worker:
    """A worker process that has not been found dead, and the lanes it serves."""

    id: str
    machine: str
    pid: int
    lanes: tuple[str, ...] = ()


class Jobs:
    """The jobs of one workbench, from any process: submit, look, cancel; `work` makes this process a worker.

    Every process may submit and look at the same time as workers work. Raises NotFound for a job that does not exist.
    """

    def __init__(self, config: Config, engine: sa.Engine) -> None:
        self._engine, self._config = engine, config
        self._machine = machine(config.machine_name)
        is_postgres = config.database_url.startswith("postgres")
        self._queue_file = None if is_postgres else config.home / "jobs.sqlite"
        self._queue_url = (engine.url.render_as_string(hide_password=False) if is_postgres
                           else f"sqlite:///{self._queue_file}")
        with alone(engine) as connection:
            metadata.create_all(connection)

    def submit(self, kind: str, args: dict[str, Any], *, person: str, key: str | None = None,
               most_queued: int | None = None) -> str:
        """Queues a job and returns its id; the same kind and `key` again is the same job, whatever became of it.

        Raises Invalid when `args` is not JSON, Conflict when the key was used with other arguments, QueueFull when
        `most_queued` jobs of that kind wait already, however many processes submit at once.
        """
        try:
            text = json.dumps(args, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise Invalid(f"Arguments of a {kind} job must be plain JSON: {error}.") from error
        job_id = _keyed(kind, key) if key else uuid.uuid4().hex[:16]
        row = {"id": job_id, "kind": kind, "args": text, "person": person, "state": "queued", "created_at": now()}
        try:
            with self._engine.begin() if most_queued is None else alone(self._engine) as connection:
                if most_queued is not None:
                    waiting = connection.scalar(sa.select(sa.func.count()).where(
                        jobs.c.kind == kind, jobs.c.state == "queued"))
                    if waiting >= most_queued and not connection.scalar(sa.select(jobs.c.id).where(jobs.c.id == job_id)):
                        raise QueueFull(f"{most_queued} {kind} jobs wait already. Submit it again when one has begun.")
                connection.execute(jobs.insert(), row)
        except sa.exc.IntegrityError:
            there = self.get(job_id)
            if json.dumps(there.args, sort_keys=True) != text:
                raise Conflict(f"Key {key!r} already stands for {kind} job {job_id} with other arguments. "
                               "Use another key for another request.") from None
        self._enqueue(job_id, lane(kind, args))
        return job_id

    def ask(self, kind: str, args: dict[str, Any], *, person: str, key: str | None = None) -> str:
        """`submit` for what a person asks for: of a kind of training only as many wait as the setting retrain_queue
        says, as with POST /retrain. Raises QueueFull beyond, and what `submit` raises."""
        limit = self._config.retrain_queue if kind in TRAIN_KINDS else None
        try:
            return self.submit(kind, args, person=person, key=key, most_queued=limit)
        except QueueFull as error:
            raise QueueFull(f"{error} Or cancel one that waits; setting retrain_queue says how many may.") from error

    def find(self, kind: str, key: str) -> JobStatus | None:
        """The job that `submit` made for a key."""
        return next(iter(self._read(jobs.c.id == _keyed(kind, key), limit=1)), None)

    def get(self, job_id: str) -> JobStatus:
        found = self._read(jobs.c.id == job_id, limit=1)
        if not found:
            raise NotFound(f"Job {job_id!r} does not exist. `workbench jobs list` shows those there are.")
        return found[0]

    def list(self, limit: int = 50, kind: str | None = None, state: str | None = None) -> list[JobStatus]:
        """Newest first."""
        if state is not None and state not in STATES:
            raise Invalid(f"Job state {state!r} must be one of {', '.join(STATES)}.")
        return self._read(sa.and_(sa.true(), *([jobs.c.kind == kind] if kind else []),
                                  *([jobs.c.state == state] if state else [])), limit)

    def counts(self) -> dict[tuple[str, str], int]:
        """(kind, state) -> number of jobs; what there is none of is left out."""
        with reading(self._engine) as connection:
            rows = connection.execute(
                sa.select(jobs.c.kind, jobs.c.state, sa.func.count()).group_by(jobs.c.kind, jobs.c.state))
            return {(kind, state): count for kind, state, count in rows}

    def cancel(self, job_id: str) -> JobStatus:
        """A queued job never starts; a running one stops at its next check; one that is over stays as it is."""
        living = [worker.id for worker in self.workers()]
        with self._engine.begin() as connection:
            has_nobody = sa.or_(jobs.c.state == "queued",
                                sa.and_(jobs.c.state == "running", jobs.c.worker.not_in(living)))
            connection.execute(jobs.update().where(jobs.c.id == job_id, has_nobody)
                               .values(state="cancelled", cancel=True, finished_at=now()))
            connection.execute(jobs.update().where(jobs.c.id == job_id, jobs.c.state == "running").values(cancel=True))
        return self.get(job_id)

    def log_lines(self, job_id: str) -> list[str]:
        """Oldest first, each with its time."""
        self.get(job_id)
        with reading(self._engine) as connection:
            rows = connection.execute(sa.select(log).where(log.c.job == job_id).order_by(log.c.id))
            return [f"{row.at} {row.text}" for row in rows]

    def failed_items(self, job_id: str) -> dict[str, str]:
        """item -> reason, sorted by item."""
        self.get(job_id)
        with reading(self._engine) as connection:
            rows = connection.execute(sa.select(items).where(items.c.job == job_id).order_by(items.c.item))
            return {row.item: row.reason for row in rows}

    def wait(self, job_id: str, timeout_s: float) -> JobStatus:
        """Waits until the job is over. Raises Unavailable when it is not in time; the job goes on."""
        end = time.monotonic() + timeout_s
        while not (status := self.get(job_id)).is_over:
            if time.monotonic() > end:
                raise Unavailable(f"{status.kind} job {job_id} is still {status.state} after {timeout_s:g} s; it goes "
                                  f"on. Look again with `workbench jobs show {job_id}`.")
            time.sleep(LOOK_S)
        return status

    def workers(self) -> list[Worker]:
        """The workers that live: by process id on this machine, by a fresh beat on others."""
        with reading(self._engine) as connection:
            rows, at = list(connection.execute(sa.select(workers))), database_time(connection)
            served = list(connection.execute(sa.select(worker_lanes)))
        return [Worker(row.id, row.machine, row.pid, tuple(sorted(one.lane for one in served if one.worker == row.id)))
                for row in rows
                if (has_process(row) if row.machine == self._machine else at - row.beat < self._config.worker_dead_s)]

    def unserved_lane(self, kind: str, args: dict[str, Any]) -> str:
        """The lane that such a job would wait in for want of a living worker that serves it; "" where there is one."""
        name = lane(kind, args)
        return "" if any(name in worker.lanes for worker in self.workers()) else name

    def work(self, kinds: Kinds, concurrency: int = 1, stop: threading.Event | None = None,
             end_here: EndHere = lambda is_stray: None) -> None:
        """Runs jobs of the lanes in the setting worker_lanes in this process until SIGTERM, SIGINT or `stop`;
        `concurrency` is per lane.

        end_here  ends the processes that jobs have left on this machine, of those ids that it is given a test for: when
                  a worker of another machine may be at them

        A running step is asked to stop at its next check and is repeated by the next worker. One that does not within
        STOP_S is left behind in its thread: end the process with os._exit then, as after a kill.
        """
        stop, lanes = stop or threading.Event(), lanes_of(self._config.worker_lanes)
        if self._config.worker_dead_s < 2:
            raise Invalid(f"Setting worker_dead_s must be at least 2, is {self._config.worker_dead_s}.")
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: stop.set())
        from workbench.jobs.worker import WorkerProcess
        self._prepare_queue()
        WorkerProcess(self._engine, self._queue_url, kinds, concurrency, stop, self._client, self._enqueue, lanes=lanes,
                      machine=self._machine, dead_s=self._config.worker_dead_s, end_here=end_here).run()

    def _read(self, condition: Any, limit: int) -> list[JobStatus]:
        failed = sa.select(sa.func.count()).where(items.c.job == jobs.c.id).scalar_subquery()
        query = sa.select(jobs, failed.label("failed")).where(condition)
        with reading(self._engine) as connection:
            rows = list(connection.execute(query.order_by(jobs.c.created_at.desc(), jobs.c.id).limit(limit)))
        return [JobStatus(
            row.id, row.kind, json.loads(row.args), row.person, row.state, row.done, row.total, row.note, row.failed,
            json.loads(row.result) if row.result else None, row.error, row.cancel and row.state == "running",
            row.created_at, row.started_at, row.finished_at, row.worker or "") for row in rows]

    def prepare(self) -> None:
        """What the first submission would wait a second for: the queue's tables and its library."""
        _ = self._client

    def _enqueue(self, job_id: str, queue: str) -> None:
        """Hands the job to DBOS; a job it has is left alone."""
        self._client.enqueue({"workflow_name": WORKFLOW, "queue_name": queue, "workflow_id": job_id,
                              "serialization_type": self._json}, job_id)

    @cached_property
    def _client(self) -> Any:
        from dbos import DBOSClient
        self._prepare_queue()
        return DBOSClient(system_database_url=self._queue_url, application_name=APPLICATION)

    @cached_property
    def _json(self) -> Any:
        from dbos import WorkflowSerializationFormat
        return WorkflowSerializationFormat.PORTABLE

    def _prepare_queue(self) -> None:
        """Creates or updates DBOS's tables: a client never does, and the first process may be any."""
        from dbos import DBOS
        logging.getLogger("dbos").setLevel(logging.WARNING)
        if self._queue_file is not None:
            # Kept in the file: readers do not wait for writers.
            connection = sqlite3.connect(self._queue_file, timeout=30)
            connection.execute("PRAGMA journal_mode=WAL")
            connection.close()
        DBOS.migrate(self._queue_url)

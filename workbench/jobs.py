"""Durable jobs: a queue, idempotency keys and recovery from DBOS; state, progress, failed items and log in our tables.

A job is one DBOS workflow around one repeatable step. DBOS decides which worker runs it; our `jobs` row is what people
see and the only place a job ends. Killed anywhere, the step is called again and goes on from what the stores hold.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import socket
import sqlite3
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa

from workbench.config import Config
from workbench.errors import Cancelled, Conflict, Invalid, NotFound, Unavailable, WorkbenchError
from workbench.ports import Job
from workbench.records import now

# Constant: with DBOS's default (a hash of the code) every new release would orphan the jobs of the one before.
APPLICATION, VERSION, WORKFLOW = "workbench", "1", "run_job"
# A training must not keep uploads waiting: one lane each, each worker runs one job of a lane at a time.
LANES = ("cpu", "train")
TRAIN_KINDS = ("retrain",)
STATES = ("queued", "running", "done", "failed", "cancelled")
PULSE_S = 0.2       # how often progress is written and "has anybody cancelled?" is asked
POLL_S = 0.5        # how often a worker looks into its lanes; more often costs an idle worker 3 % of a core
BEAT_S = 1.0        # how often a worker says that it lives, and looks for jobs of dead ones
DEAD_AFTER_S = 30   # silence after which a worker on another machine counts as dead; here its process id decides
STOP_S = 5          # how long steps may take to stop at their next check when the worker is asked to end
MAX_DEATHS = 20     # deaths in a row without progress after which a job is given up: it is what kills its workers

metadata = sa.MetaData()
jobs = sa.Table(
    "jobs", metadata,
    sa.Column("id", sa.String(64), primary_key=True), sa.Column("kind", sa.String(64), nullable=False, index=True),
    sa.Column("args", sa.Text, nullable=False), sa.Column("person", sa.String(200), nullable=False),
    sa.Column("state", sa.String(16), nullable=False, index=True),
    sa.Column("done", sa.Integer, nullable=False, default=0), sa.Column("total", sa.Integer, nullable=False, default=0),
    sa.Column("note", sa.Text, nullable=False, default=""), sa.Column("result", sa.Text),
    sa.Column("error", sa.Text, nullable=False, default=""),
    sa.Column("cancel", sa.Boolean, nullable=False, default=False),
    sa.Column("worker", sa.String(64)), sa.Column("deaths", sa.Integer, nullable=False, default=0),
    sa.Column("done_at_start", sa.Integer, nullable=False, default=0),
    sa.Column("created_at", sa.String(40), nullable=False),
    sa.Column("started_at", sa.String(40), nullable=False, default=""),
    sa.Column("finished_at", sa.String(40), nullable=False, default=""))
items = sa.Table(
    "job_items", metadata,
    sa.Column("job", sa.String(64), primary_key=True), sa.Column("item", sa.String(512), primary_key=True),
    sa.Column("reason", sa.Text, nullable=False))
log = sa.Table(
    "job_log", metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True), sa.Column("job", sa.String(64), index=True),
    sa.Column("at", sa.String(40), nullable=False), sa.Column("text", sa.Text, nullable=False))
workers = sa.Table(
    "workers", metadata,
    sa.Column("id", sa.String(64), primary_key=True), sa.Column("machine", sa.String(300), nullable=False),
    sa.Column("pid", sa.Integer, nullable=False), sa.Column("pid_started", sa.Float, nullable=False),
    sa.Column("beat", sa.Float, nullable=False))

# Each gets the job's arguments, with the "person" who asked unless they name another.
Kinds = dict[str, Callable[[dict[str, Any], Job], dict[str, Any]]]
logger = logging.getLogger("workbench.jobs")


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


@dataclass(frozen=True)
class Worker:
    """A worker process that has not been found dead."""

    id: str
    machine: str
    pid: int


class Jobs:
    """The jobs of one workbench, from any process: submit, look, cancel; `work` makes this process a worker.

    Every process may submit and look at the same time as workers work. Raises NotFound for a job that does not exist.
    """

    def __init__(self, config: Config, engine: sa.Engine) -> None:
        self._engine = engine
        is_postgres = config.database_url.startswith("postgres")
        self._queue_file = None if is_postgres else config.home / "jobs.sqlite"
        self._queue_url = config.database_url if is_postgres else f"sqlite:///{self._queue_file}"
        with _alone(engine) as connection:
            metadata.create_all(connection)

    def submit(self, kind: str, args: dict[str, Any], *, person: str, key: str | None = None) -> str:
        """Queues a job and returns its id; the same kind and `key` again is the same job, whatever became of it.

        Raises Invalid when `args` is not JSON, Conflict when the key was used with other arguments.
        """
        try:
            text = json.dumps(args, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise Invalid(f"Arguments of a {kind} job must be plain JSON: {error}.") from error
        job_id = hashlib.sha256(f"{kind}\0{key}".encode()).hexdigest()[:16] if key else uuid.uuid4().hex[:16]
        row = {"id": job_id, "kind": kind, "args": text, "person": person, "state": "queued", "created_at": now()}
        try:
            with self._engine.begin() as connection:
                connection.execute(jobs.insert(), row)
        except sa.exc.IntegrityError:
            there = self.get(job_id)
            if json.dumps(there.args, sort_keys=True) != text:
                raise Conflict(f"Key {key!r} already stands for {kind} job {job_id} with other arguments. "
                               "Use another key for another request.") from None
        self._enqueue(job_id, kind)
        return job_id

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
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(jobs.c.kind, jobs.c.state, sa.func.count()).group_by(jobs.c.kind, jobs.c.state))
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
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(log).where(log.c.job == job_id).order_by(log.c.id))
            return [f"{row.at} {row.text}" for row in rows]

    def failed_items(self, job_id: str) -> dict[str, str]:
        """item -> reason, sorted by item."""
        self.get(job_id)
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(items).where(items.c.job == job_id).order_by(items.c.item))
            return {row.item: row.reason for row in rows}

    def wait(self, job_id: str, timeout_s: float) -> JobStatus:
        """Waits until the job is over. Raises Unavailable when it is not in time; the job goes on."""
        end = time.monotonic() + timeout_s
        while not (status := self.get(job_id)).is_over:
            if time.monotonic() > end:
                raise Unavailable(f"{status.kind} job {job_id} is still {status.state} after {timeout_s:g} s; it goes "
                                  f"on. Look again with `workbench jobs show {job_id}`.")
            time.sleep(PULSE_S)
        return status

    def workers(self) -> list[Worker]:
        """The workers that live: by process id on this machine, by a fresh beat on others."""
        with self._engine.connect() as connection:
            rows = list(connection.execute(sa.select(workers)))
        return [Worker(row.id, row.machine, row.pid) for row in rows
                if (_has_process(row) if row.machine == _machine() else time.time() - row.beat < DEAD_AFTER_S)]

    def work(self, kinds: Kinds, concurrency: int = 1, stop: threading.Event | None = None) -> None:
        """Runs jobs in this process until SIGTERM, SIGINT or `stop`; `concurrency` is per lane.

        A running step is asked to stop at its next check and is repeated by the next worker. One that does not within
        STOP_S is left behind in its thread: end the process with os._exit then, as after a kill.
        """
        stop = stop or threading.Event()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: stop.set())
        self._prepare_queue()
        _WorkerProcess(self._engine, self._queue_url, kinds, concurrency, stop, self._client, self._enqueue).run()

    def _read(self, condition: Any, limit: int) -> list[JobStatus]:
        failed = sa.select(sa.func.count()).where(items.c.job == jobs.c.id).scalar_subquery()
        query = sa.select(jobs, failed.label("failed")).where(condition)
        with self._engine.connect() as connection:
            rows = list(connection.execute(query.order_by(jobs.c.created_at.desc(), jobs.c.id).limit(limit)))
        return [JobStatus(
            row.id, row.kind, json.loads(row.args), row.person, row.state, row.done, row.total, row.note, row.failed,
            json.loads(row.result) if row.result else None, row.error, row.cancel and row.state == "running",
            row.created_at, row.started_at, row.finished_at, row.worker or "") for row in rows]

    def _enqueue(self, job_id: str, kind: str) -> None:
        """Hands the job to DBOS; a job it has is left alone."""
        self._client.enqueue({"workflow_name": WORKFLOW, "queue_name": _lane(kind), "workflow_id": job_id,
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


class _Stopping(BaseException):
    """The worker ends; not an Exception, so that no step takes it for a failed item."""


class _RunningJob:
    """The Job a step talks to: progress stays in memory until the next pulse, failures and log are written at once."""

    def __init__(self, worker: _WorkerProcess, job_id: str) -> None:
        self.id = job_id
        self._worker = worker
        self._progress: tuple[int, int, str] | None = None
        self.is_cancelled = False

    def progress(self, done: int, total: int, note: str = "") -> None:
        self._progress = (int(done), int(total), str(note))

    def fail_item(self, item: str, reason: str) -> None:
        with self._worker.engine.begin() as connection:
            mine = sa.and_(items.c.job == self.id, items.c.item == item[:512])
            connection.execute(items.delete().where(mine))
            connection.execute(items.insert(), {"job": self.id, "item": item[:512], "reason": reason})

    def log(self, text: str) -> None:
        with self._worker.engine.begin() as connection:
            _log(connection, self.id, text)

    def check(self) -> None:
        if self._worker.stop.is_set():
            raise _Stopping
        if self.is_cancelled:
            raise Cancelled(f"Job {self.id} was cancelled.")

    def take_progress(self) -> dict[str, Any]:
        """What has not been written yet, as columns."""
        progress, self._progress = self._progress, None
        return dict(zip(("done", "total", "note"), progress)) if progress else {}


class _WorkerProcess:
    """One process's part in the queue: a DBOS executor, a pulse, and the search for jobs of dead workers."""

    def __init__(self, engine: sa.Engine, queue_url: str, kinds: Kinds, concurrency: int, stop: threading.Event,
                 client: Any, enqueue: Callable[[str, str], None]) -> None:
        self.engine, self.stop = engine, stop
        self.id = uuid.uuid4().hex
        self._queue_url, self._kinds, self._concurrency = queue_url, kinds, concurrency
        self._client, self._enqueue = client, enqueue
        self._running: dict[str, _RunningJob] = {}
        self._beats: dict[str, tuple[float, float]] = {}

    def run(self) -> None:
        from dbos import DBOS, WorkflowSerializationFormat
        DBOS(config={"name": APPLICATION, "system_database_url": self._queue_url, "application_version": VERSION,
                     "executor_id": self.id, "log_level": "WARNING", "run_migrations": False,
                     "notification_listener_polling_interval_sec": 2.0})
        @DBOS.workflow(name=WORKFLOW, serialization_type=WorkflowSerializationFormat.PORTABLE)
        def run_job(job_id: str) -> None:
            self._run_job(job_id)

        with self.engine.begin() as connection:
            connection.execute(workers.insert(), {
                "id": self.id, "machine": _machine(), "pid": os.getpid(), "beat": time.time(),
                "pid_started": psutil.Process().create_time()})
        # Before this worker takes anything: a job that was interrupted goes on before those that were queued after it.
        self._adopt()
        DBOS.launch()
        for lane in LANES:
            DBOS.register_queue(lane, worker_concurrency=self._concurrency, polling_interval_sec=POLL_S,
                                on_conflict="always_update")
        logger.info("worker %s takes %s jobs", self.id, ", ".join(sorted(self._kinds)))
        beaten = time.monotonic()
        while not self.stop.wait(PULSE_S):
            try:
                self._pulse()
                if time.monotonic() - beaten >= BEAT_S:
                    self._beat()
                    self._adopt()
                    beaten = time.monotonic()
            except sa.exc.SQLAlchemyError:
                logger.exception("the database does not answer; trying again")
        self._end()
        DBOS.destroy(destroy_registry=True)

    def _end(self) -> None:
        end = time.monotonic() + STOP_S
        while self._running and time.monotonic() < end:
            time.sleep(0.05)
        self._pulse()
        if not self._running:
            with self.engine.begin() as connection:
                connection.execute(workers.delete().where(workers.c.id == self.id))

    def _run_job(self, job_id: str) -> None:
        job = self._running[job_id] = _RunningJob(self, job_id)
        row = None if self.stop.is_set() else self._start(job_id)
        if row is None:
            del self._running[job_id]
            if self.stop.is_set():
                threading.Event().wait()  # to return would tell DBOS that the job is over
            return
        try:
            job.is_cancelled = row.cancel
            job.check()
            if row.kind not in self._kinds:
                raise Invalid(f"No worker knows jobs of kind {row.kind!r}; there are {', '.join(sorted(self._kinds))}.")
            result = self._kinds[row.kind]({"person": row.person, **json.loads(row.args)}, job)
            ending = {"state": "done", "result": json.dumps(result, sort_keys=True)}
        except _Stopping:
            ending = {"state": "queued", "worker": None}
        except Cancelled as error:
            ending = {"state": "cancelled", "error": str(error)}
        except WorkbenchError as error:
            ending = {"state": "failed", "error": str(error)}
        except (Exception, SystemExit) as error:
            job.log(traceback.format_exc())
            ending = {"state": "failed", "error": f"{type(error).__name__}: {error}. The job's log has the traceback."}
        self._finish(job, ending)
        del self._running[job_id]
        if ending["state"] == "queued":
            threading.Event().wait()  # to return would tell DBOS that the job is over

    def _start(self, job_id: str) -> Any:
        """Takes the job and returns its row, or None when there is nothing left to do."""
        with self.engine.begin() as connection:
            row = connection.execute(sa.select(jobs).where(jobs.c.id == job_id)).one_or_none()
            if row is None or row.state not in ("queued", "running"):
                return None
            values: dict[str, Any] = {"state": "running", "worker": self.id, "started_at": row.started_at or now(),
                                      "done_at_start": row.done, "deaths": 0}
            if row.state == "running":
                values["deaths"] = row.deaths + 1 if row.done <= row.done_at_start else 1
                _log(connection, job_id, "The worker died; this one goes on from what is stored.")
            if values["deaths"] >= MAX_DEATHS:
                values |= {"state": "failed", "finished_at": now(), "error":
                           f"{MAX_DEATHS} workers died in a row while doing this job, without progress. Free memory "
                           "or look into the worker's log, then submit it again."}
            connection.execute(jobs.update().where(jobs.c.id == job_id).values(**values))
        return row if values["state"] == "running" else None

    def _finish(self, job: _RunningJob, ending: dict[str, Any]) -> None:
        if ending["state"] != "queued":
            ending["finished_at"] = now()
        values = {**ending, **job.take_progress()}
        while True:
            try:
                with self.engine.begin() as connection:
                    connection.execute(jobs.update().where(jobs.c.id == job.id, jobs.c.worker == self.id,
                                                           jobs.c.state == "running").values(**values))
                return
            except sa.exc.OperationalError:
                logger.exception("cannot write the end of job %s yet; trying again", job.id)
                time.sleep(1)

    def _pulse(self) -> None:
        running = dict(self._running)
        if not running:
            return
        with self.engine.begin() as connection:
            for job in running.values():
                values = job.take_progress()
                if values:
                    mine = sa.and_(jobs.c.id == job.id, jobs.c.worker == self.id)
                    connection.execute(jobs.update().where(mine).values(**values))
            cancelled = connection.execute(sa.select(jobs.c.id).where(jobs.c.id.in_(list(running)), jobs.c.cancel))
            for row in cancelled:
                running[row.id].is_cancelled = True

    def _beat(self) -> None:
        with self.engine.begin() as connection:
            me = connection.execute(workers.update().where(workers.c.id == self.id).values(beat=time.time()))
        if not me.rowcount:
            # Another worker took this one for dead and its jobs with it: to go on would run them twice.
            logger.critical("worker %s was silent for over %s s and its jobs were given away", self.id, DEAD_AFTER_S)
            os._exit(70)

    def _adopt(self) -> None:
        """Strikes dead workers off and queues the jobs that no living worker has.

        Under one lock for all workers: two that resumed the same job one after the other would run it twice.
        """
        with _alone(self.engine) as connection:
            dead = [row.id for row in connection.execute(sa.select(workers)) if self._is_dead(row)]
            connection.execute(workers.delete().where(workers.c.id.in_(dead)))
            living = set(connection.execute(sa.select(workers.c.id)).scalars())
            for workflow in self._client.list_workflows(status="PENDING", load_input=False, load_output=False):
                if workflow.executor_id not in living:
                    kind = connection.execute(sa.select(jobs.c.kind).where(jobs.c.id == workflow.workflow_id)).scalar()
                    self._client.resume_workflow(workflow.workflow_id, queue_name=_lane(kind))
            # A process may have died between writing our row and handing it to DBOS.
            queued = list(connection.execute(sa.select(jobs.c.id, jobs.c.kind).where(jobs.c.state == "queued")))
        known = {one.workflow_id for one in self._client.list_workflows(
            workflow_ids=[row.id for row in queued], load_input=False, load_output=False)} if queued else set()
        for row in queued:
            if row.id not in known:
                self._enqueue(row.id, row.kind)

    def _is_dead(self, row: Any) -> bool:
        if row.id == self.id:
            return False
        if row.machine == _machine() and not psutil.pid_exists(row.pid):
            return True
        if row.machine == _machine() and _has_process(row):
            return False
        # By our own clock, since when the beat has not moved: clocks of two machines need not agree.
        beat, since = self._beats.get(row.id, (None, 0.0))
        if beat != row.beat:
            self._beats[row.id] = (row.beat, time.monotonic())
            return False
        return time.monotonic() - since > DEAD_AFTER_S


@contextmanager
def _alone(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A transaction that only one process has at a time."""
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            # SQLite's transactions begin with the write lock (records.open_database); Postgres has to be asked.
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(7467201)"))
        yield connection


def _lane(kind: str | None) -> str:
    return "train" if kind in TRAIN_KINDS else "cpu"


def _log(connection: sa.Connection, job_id: str, text: str) -> None:
    connection.execute(log.insert(), {"job": job_id, "at": now(), "text": text})


def _machine() -> str:
    """Where a process id means something: host name and process namespace (containers may share the first)."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {os.readlink(namespace) if namespace.exists() else ''}".strip()


def _has_process(row: Any) -> bool:
    """Whether exactly that process lives; its start time tells it from a later one with the same number."""
    try:
        process = psutil.Process(row.pid)
        return abs(process.create_time() - row.pid_started) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

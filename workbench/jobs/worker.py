"""The worker's side of the queue: a DBOS executor, a pulse that writes and asks, the search for dead workers' jobs."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from typing import Any

import psutil
import sqlalchemy as sa

from workbench.errors import Cancelled, Invalid, WorkbenchError
from workbench.jobs.tables import (APPLICATION, LANES, VERSION, WORKFLOW, database_time, has_process, items, jobs, lane,
                                   worker_lanes, workers, write_log)
from workbench.ports import Job
from workbench.records import alone, now, reading

PULSE_S = 0.2       # how often progress is written and "has anybody cancelled?" is asked
POLL_S = 0.5        # how often a worker looks into its lanes; more often costs an idle worker 3 % of a core
BEAT_S = 1.0        # how often a worker says that it lives, and looks for jobs of dead ones
SILENT = 2 / 3      # share of the silence that makes a worker dead after which it ends by itself, trainings too
STOP_S = 5          # how long steps may take to stop at their next check when the worker is asked to end
MAX_DEATHS = 20     # deaths in a row without progress after which a job is given up: it is what kills its workers

logger = logging.getLogger("workbench.jobs")


class _Stopping(BaseException):
    """The worker ends; not an Exception, so that no step takes it for a failed item."""


class RunningJob:
    """The Job a step talks to: progress stays in memory until the next pulse, failures and log are written at once."""

    def __init__(self, worker: WorkerProcess, job_id: str) -> None:
        self.id = job_id
        self._worker = worker
        self._progress: tuple[int, int, str] | None = None
        self.is_cancelled = False

    def progress(self, done: int, total: int, note: str = "") -> None:
        self._progress = (int(done), int(total), str(note))

    def fail_item(self, item: str, reason: str) -> None:
        def write(connection: sa.Connection) -> None:
            mine = sa.and_(items.c.job == self.id, items.c.item == item[:512])
            connection.execute(items.delete().where(mine))
            connection.execute(items.insert(), {"job": self.id, "item": item[:512], "reason": reason})
        self._worker.write(write)

    def log(self, text: str) -> None:
        self._worker.write(lambda connection: write_log(connection, self.id, text))

    def check(self) -> None:
        if self._worker.stop.is_set() or self._worker.has_given_up.is_set():
            raise _Stopping
        if self.is_cancelled:
            raise Cancelled(f"Job {self.id} was cancelled.")

    def take_progress(self) -> dict[str, Any]:
        """What has not been written yet, as columns."""
        progress, self._progress = self._progress, None
        return dict(zip(("done", "total", "note"), progress)) if progress else {}


class WorkerProcess:
    """One process's part in the queue: a DBOS executor, a pulse, and the search for jobs of dead workers.

    enqueue   hands a job to a lane
    machine   where a process id means something; workers elsewhere are judged by their beats
    dead_s    silence after which a worker on another machine counts as dead; the same for all workers of a database
    end_here  Jobs.work has it
    clock     seconds that only go forward
    """

    def __init__(self, engine: sa.Engine, queue_url: str,
                 kinds: dict[str, Callable[[dict[str, Any], Job], dict[str, Any]]],
                 concurrency: int, stop: threading.Event, client: Any, enqueue: Callable[[str, str], None], *,
                 lanes: tuple[str, ...], machine: str, dead_s: float,
                 end_here: Callable[[Callable[[str], bool]], None] = lambda is_stray: None,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.engine, self.stop, self.has_given_up = engine, stop, threading.Event()
        self.id = uuid.uuid4().hex
        self._queue_url, self._kinds, self._concurrency, self._lanes = queue_url, kinds, concurrency, lanes
        self._client, self._enqueue, self._end_here = client, enqueue, end_here
        self._machine, self._dead_s, self._clock = machine, dead_s, clock
        self._running: dict[str, RunningJob] = {}
        self._beats: dict[str, tuple[float, float]] = {}
        self._beaten = self._looked = clock()

    def run(self) -> None:
        from dbos import DBOS, WorkflowSerializationFormat
        DBOS(config={"name": APPLICATION, "system_database_url": self._queue_url, "application_version": VERSION,
                     "executor_id": self.id, "log_level": "WARNING", "run_migrations": False,
                     "notification_listener_polling_interval_sec": 2.0})
        @DBOS.workflow(name=WORKFLOW, serialization_type=WorkflowSerializationFormat.PORTABLE)
        def run_job(job_id: str) -> None:
            self._run_job(job_id)

        self._end_strays()
        with self.engine.begin() as connection:
            connection.execute(workers.insert(), {
                "id": self.id, "machine": self._machine, "pid": os.getpid(), "beat": database_time(connection),
                "pid_started": psutil.Process().create_time()})
            connection.execute(worker_lanes.insert(), [{"worker": self.id, "lane": name} for name in self._lanes])
        # Before this worker takes anything: a job that was interrupted goes on before those that were queued after it.
        self._adopt()
        DBOS.listen_queues(self._lanes)
        DBOS.launch()
        for name in LANES:
            DBOS.register_queue(name, worker_concurrency=self._concurrency, polling_interval_sec=POLL_S,
                                on_conflict="always_update")
        logger.info("worker %s takes %s jobs of the lanes %s", self.id, ", ".join(sorted(self._kinds)),
                    ", ".join(self._lanes))
        self._beat()
        if self.engine.dialect.name == "postgresql":
            threading.Thread(target=self._watch, name="watch", daemon=True).start()
        looked = self._clock()
        while not self.stop.wait(PULSE_S):
            try:
                self._pulse()
                if self._clock() - looked >= BEAT_S:
                    self._beat()
                    self._adopt()
                    looked = self._clock()
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
                connection.execute(worker_lanes.delete().where(worker_lanes.c.worker == self.id))

    def _run_job(self, job_id: str) -> None:
        job = self._running[job_id] = RunningJob(self, job_id)
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
        def take(connection: sa.Connection) -> Any:
            row = connection.execute(sa.select(jobs).where(jobs.c.id == job_id).with_for_update()).one_or_none()
            if row is None or row.state not in ("queued", "running"):
                return None
            values: dict[str, Any] = {"state": "running", "worker": self.id, "started_at": row.started_at or now(),
                                      "done_at_start": row.done, "deaths": 0}
            if row.state == "running":
                values["deaths"] = row.deaths + 1 if row.done <= row.done_at_start else 1
                write_log(connection, job_id, "The worker died; this one goes on from what is stored.")
            if values["deaths"] >= MAX_DEATHS:
                values |= {"state": "failed", "finished_at": now(), "error":
                           f"{MAX_DEATHS} workers died in a row while doing this job, without progress. Free memory "
                           "or look into the worker's log, then submit it again."}
            connection.execute(jobs.update().where(jobs.c.id == job_id).values(**values))
            return row if values["state"] == "running" else None
        return self.write(take)

    def _finish(self, job: RunningJob, ending: dict[str, Any]) -> None:
        if ending["state"] != "queued":
            ending["finished_at"] = now()
        values = {**ending, **job.take_progress()}
        self.write(lambda connection: connection.execute(jobs.update().where(
            jobs.c.id == job.id, jobs.c.worker == self.id, jobs.c.state == "running").values(**values)))

    def write(self, write: Callable[[sa.Connection], Any]) -> Any:
        """One transaction, again until the database answers: what a database misses for a moment fails no job."""
        while True:
            try:
                with self.engine.begin() as connection:
                    return write(connection)
            except sa.exc.OperationalError:
                logger.exception("the database does not answer; trying again")
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
        began = self._clock()
        with self.engine.begin() as connection:
            beat = database_time(connection)
            me = connection.execute(workers.update().where(workers.c.id == self.id).values(beat=beat))
        if not me.rowcount:
            # Another worker took this one for dead and its jobs with it: to go on would run them twice.
            self._give_up("its jobs were given away")
        self._beaten = began

    def _watch(self) -> None:
        """Ends this worker while its jobs are still its own: cut off from the database it would not see them taken."""
        while not self.stop.wait(0.5):
            if self._clock() - self._beaten > SILENT * self._dead_s:
                self._give_up("it ends before others take its jobs")

    def _give_up(self, why: str) -> None:
        logger.critical("worker %s was silent for %.0f s; %s", self.id, self._clock() - self._beaten, why)
        self.has_given_up.set()
        self._end_here(set(self._running).__contains__)
        os._exit(70)

    def _end_strays(self) -> None:
        """Ends what dead workers of this machine have left running, unless the job is sure to go on here."""
        with reading(self.engine) as connection:
            living = [row for row in connection.execute(sa.select(workers)) if not self._is_dead(row)]
        here = [row.id for row in living if row.machine == self._machine]
        may_go_elsewhere = len(here) < len(living)

        def is_stray(job_id: str) -> bool:
            with reading(self.engine) as connection:
                query = sa.select(jobs.c.state, jobs.c.worker).where(jobs.c.id == job_id)
                row = connection.execute(query).one_or_none()
            if row is None or row.state == "running" and row.worker in here:
                return False
            return may_go_elsewhere or row.state not in ("queued", "running")
        self._end_here(is_stray)

    def _adopt(self) -> None:
        """Strikes dead workers off and queues the jobs that no living worker has.

        Under one lock for all workers: two that resumed the same job one after the other would run it twice.
        """
        if self._clock() - self._looked > self._dead_s / 2:
            # Who has not looked has not seen others beat either, as after a moment without the database.
            self._beats.clear()
        self._looked = self._clock()
        with reading(self.engine) as connection:
            fallen = [row for row in connection.execute(sa.select(workers)) if self._is_dead(row)]
        if any(row.machine == self._machine for row in fallen):
            self._end_strays()
        with alone(self.engine) as connection:
            dead = [row.id for row in connection.execute(sa.select(workers)) if self._is_dead(row)]
            connection.execute(workers.delete().where(workers.c.id.in_(dead)))
            connection.execute(worker_lanes.delete().where(worker_lanes.c.worker.in_(dead)))
            living = set(connection.execute(sa.select(workers.c.id)).scalars())
            for workflow in self._client.list_workflows(status="PENDING", load_input=False, load_output=False):
                if workflow.executor_id not in living:
                    row = connection.execute(sa.select(jobs).where(jobs.c.id == workflow.workflow_id)).one_or_none()
                    if row is None:
                        continue
                    self._client.resume_workflow(workflow.workflow_id, queue_name=lane(row.kind, json.loads(row.args)))
            # A process may have died between writing our row and handing it to DBOS.
            queued = list(connection.execute(sa.select(jobs).where(jobs.c.state == "queued")))
        known = {one.workflow_id for one in self._client.list_workflows(
            workflow_ids=[row.id for row in queued], load_input=False, load_output=False)} if queued else set()
        for row in queued:
            if row.id not in known:
                self._enqueue(row.id, lane(row.kind, json.loads(row.args)))

    def _is_dead(self, row: Any) -> bool:
        if row.id == self.id:
            return False
        if row.machine == self._machine and not psutil.pid_exists(row.pid):
            return True
        if row.machine == self._machine and has_process(row):
            return False
        # By our own clock, since when the beat has not moved: clocks of two machines need not agree.
        beat, since = self._beats.get(row.id, (None, 0.0))
        if beat != row.beat:
            self._beats[row.id] = (row.beat, self._clock())
            return False
        return self._clock() - since > self._dead_s

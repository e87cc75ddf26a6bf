"""What CVAT cannot keep, beside it in the workbench's database: runs, splits, decisions per frame, and what is being
written.

CVAT knows a frame as a number in a task, has no place for what a run removed, and writes in several requests. A frame's
row therefore holds what we last wrote and, while a write is under way, `pending`: what stood there before and what
shall stand there. Whoever finds a `pending` of a process that died carries it through, so a kill loses nothing.
"""

from __future__ import annotations

import json
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import psutil
import sqlalchemy as sa

from workbench.annotation import Annotation
from workbench.dataset import Frame
from workbench.errors import Unavailable
from workbench.records import alone, reading
from workbench.run import RunWrite

BATCH = 500  # names in one SQL statement
LOCK_S = 300  # longer than a request with all its attempts may take; a lock is renewed before each
WAIT_S = 900

metadata = sa.MetaData()
projects = sa.Table(
    "cvat_projects", metadata, sa.Column("dataset", sa.String(64), primary_key=True),
    sa.Column("url", sa.String(500), nullable=False), sa.Column("project_id", sa.Integer, nullable=False))
frames = sa.Table(
    "cvat_frames", metadata,
    sa.Column("dataset", sa.String(64), primary_key=True), sa.Column("name", sa.String(512), primary_key=True),
    sa.Column("file", sa.String(300), nullable=False),
    sa.Column("task_id", sa.Integer), sa.Column("number", sa.Integer),
    sa.Column("status", sa.String(16), nullable=False), sa.Column("least_confidence", sa.Float, nullable=False),
    sa.Column("decided_in", sa.String(80), nullable=False), sa.Column("facts", sa.Text, nullable=False),
    sa.Column("write_id", sa.String(32), nullable=False), sa.Column("pending", sa.Text))
locks = sa.Table(
    "cvat_locks", metadata, sa.Column("name", sa.String(100), primary_key=True),
    sa.Column("holder", sa.String(300), nullable=False), sa.Column("until", sa.Float, nullable=False))


@dataclass(frozen=True)
class Row:
    """One frame: where it lies in CVAT, and what only we know of it.

    file        the name its pixels have in CVAT
    task_id     None until CVAT has taken the pixels
    number      the frame's number in that task
    decided_in  the decision of the CVAT job (see frames.decision) that stood when `status` was written, "" for none
    is_unseen   nobody looked: without drawings this is None, not ()
    ids         our ids of what was drawn at the last write, in order
    pending     (before, after) of a write that is not known to be done
    """

    frame: Frame
    file: str
    task_id: int | None = None
    number: int | None = None
    status: str = "new"
    split: str | None = None
    reviewed_by: str = ""
    reviewed_at: str = ""
    runs: tuple[RunWrite, ...] = ()
    is_unseen: bool = True
    ids: tuple[str, ...] = ()
    least_confidence: float = 1.0
    decided_in: str = ""
    write_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    pending: tuple[tuple[Annotation, ...], tuple[Annotation, ...]] | None = None

    @property
    def known_ids(self) -> set[str]:
        return {*self.ids, *(a.id for a in self.pending[0])} if self.pending else set(self.ids)


class State:
    """engine: the database of workbench.records."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        with alone(engine) as connection:
            metadata.create_all(connection)
        me = psutil.Process()
        # Unique per object, because two of one process may hold different locks.
        self._holder = f"{socket.gethostname()}|{me.pid}|{me.create_time():.2f}|{uuid.uuid4().hex}"

    def project(self, dataset: str) -> tuple[str, int] | None:
        """(address of the server, id of the project)"""
        with reading(self._engine) as connection:
            row = connection.execute(sa.select(projects).where(projects.c.dataset == dataset)).first()
        return (row.url, row.project_id) if row else None

    def projects(self, url: str) -> dict[str, int]:
        with reading(self._engine) as connection:
            rows = connection.execute(sa.select(projects).where(projects.c.url == url).order_by(projects.c.dataset))
            return {row.dataset: row.project_id for row in rows}

    def add_project(self, dataset: str, url: str, project_id: int) -> None:
        with self._engine.begin() as connection:
            connection.execute(projects.insert(), {"dataset": dataset, "url": url, "project_id": project_id})

    def forget(self, dataset: str) -> None:
        with self._engine.begin() as connection:
            for table in (frames, projects):
                connection.execute(table.delete().where(table.c.dataset == dataset))

    def rows(self, dataset: str, names: Sequence[str]) -> dict[str, Row]:
        found = {}
        with reading(self._engine) as connection:
            for some in _batches(names):
                query = sa.select(frames).where(frames.c.dataset == dataset, frames.c.name.in_(some))
                found.update({row.name: _row(row) for row in connection.execute(query)})
        return found

    def places(self, dataset: str) -> list[Any]:
        """(name, file, task_id, number, status, decided_in, least_confidence) of every frame, by name."""
        names = ("name", "file", "task_id", "number", "status", "decided_in", "least_confidence")
        columns = [frames.c[name] for name in names]
        query = sa.select(*columns).where(frames.c.dataset == dataset).order_by(frames.c.name)
        with reading(self._engine) as connection:
            return list(connection.execute(query))

    def write_ids(self, dataset: str, names: Sequence[str]) -> dict[str, str]:
        """What changes with every write, and when one is known to be done."""
        found = {}
        with reading(self._engine) as connection:
            for some in _batches(names):
                rows = connection.execute(sa.select(frames.c.name, frames.c.write_id, frames.c.pending.is_(None)).where(
                    frames.c.dataset == dataset, frames.c.name.in_(some)))
                found.update({name: f"{write_id}{is_done}" for name, write_id, is_done in rows})
        return found

    def put(self, dataset: str, rows: Sequence[Row]) -> None:
        """Replaces the rows, all or none."""
        with self._engine.begin() as connection:
            for some in _batches([row.frame.name for row in rows]):
                connection.execute(frames.delete().where(frames.c.dataset == dataset, frames.c.name.in_(some)))
            if rows:
                connection.execute(frames.insert(), [_values(dataset, row) for row in rows])

    def settle(self, dataset: str, names: Sequence[str]) -> None:
        """The pending writes of these frames are done."""
        with self._engine.begin() as connection:
            for some in _batches(names):
                connection.execute(frames.update().where(
                    frames.c.dataset == dataset, frames.c.name.in_(some)).values(pending=None))

    def drop(self, dataset: str, names: Sequence[str]) -> None:
        with self._engine.begin() as connection:
            for some in _batches(names):
                connection.execute(frames.delete().where(frames.c.dataset == dataset, frames.c.name.in_(some)))

    @contextmanager
    def lock(self, name: str) -> Iterator[Callable[[], None]]:
        """One holder at a time among all processes; yields a function that renews it.

        The lock of a process that died is taken over: at once on this machine, LOCK_S after its last renewal on
        another. Raises Unavailable when somebody holds it for WAIT_S.
        """
        start = time.monotonic()
        while not self._take(name):
            if time.monotonic() - start > WAIT_S:
                raise Unavailable(f"Another process has been writing to CVAT ({name}) for {WAIT_S} s. Wait for it, or "
                                  "stop it, then try again.")
            time.sleep(0.05)
        try:
            yield lambda: self._renew(name)
        finally:
            with self._engine.begin() as connection:
                connection.execute(locks.delete().where(locks.c.name == name, locks.c.holder == self._holder))

    def _take(self, name: str) -> bool:
        row = {"name": name, "holder": self._holder, "until": time.time() + LOCK_S}
        try:
            with self._engine.begin() as connection:
                held = connection.execute(sa.select(locks).where(locks.c.name == name)).first()
                if held is None:
                    connection.execute(locks.insert(), row)
                    return True
                if _is_alive(held.holder, held.until):
                    return False
                taken = connection.execute(locks.update().where(
                    locks.c.name == name, locks.c.holder == held.holder, locks.c.until == held.until).values(row))
                return taken.rowcount == 1
        except sa.exc.IntegrityError:  # another process took it in between
            return False

    def _renew(self, name: str) -> None:
        with self._engine.begin() as connection:
            renewed = connection.execute(locks.update().where(
                locks.c.name == name, locks.c.holder == self._holder).values(until=time.time() + LOCK_S))
        if renewed.rowcount != 1:
            raise Unavailable(f"Another process took over writing to CVAT ({name}) because this one stood still for "
                              f"over {LOCK_S} s. Try again.")


def with_write(row: Row, **changes: Any) -> Row:
    return replace(row, write_id=uuid.uuid4().hex, **changes)


def _values(dataset: str, row: Row) -> dict[str, Any]:
    facts = {"frame": row.frame.to_json(), "split": row.split, "reviewed_by": row.reviewed_by,
             "reviewed_at": row.reviewed_at, "runs": [run.to_json() for run in row.runs], "is_unseen": row.is_unseen,
             "ids": list(row.ids)}
    pending = None if row.pending is None else json.dumps([[a.to_json() for a in part] for part in row.pending])
    return {"dataset": dataset, "name": row.frame.name, "file": row.file, "task_id": row.task_id, "number": row.number,
            "status": row.status, "least_confidence": row.least_confidence, "decided_in": row.decided_in,
            "facts": json.dumps(facts), "write_id": row.write_id, "pending": pending}


def _row(row: Any) -> Row:
    facts = json.loads(row.facts)
    pending = None
    if row.pending is not None:
        before, after = json.loads(row.pending)
        pending = tuple(map(Annotation.from_json, before)), tuple(map(Annotation.from_json, after))
    return Row(
        frame=Frame.from_json(facts["frame"]), file=row.file, task_id=row.task_id, number=row.number, status=row.status,
        split=facts["split"], reviewed_by=facts["reviewed_by"], reviewed_at=facts["reviewed_at"],
        runs=tuple(map(RunWrite.from_json, facts["runs"])), is_unseen=facts["is_unseen"], ids=tuple(facts["ids"]),
        least_confidence=row.least_confidence, decided_in=row.decided_in, write_id=row.write_id, pending=pending)


def _is_alive(holder: str, until: float) -> bool:
    """Whether the process that wrote this holder may still run; on another machine only time can tell."""
    machine, pid, started, _ = holder.split("|")
    if machine != socket.gethostname():
        return until > time.time()
    try:
        # A number that was given to another process since has another start; 2 s: the clock may have been set.
        return abs(psutil.Process(int(pid)).create_time() - float(started)) < 2
    except psutil.NoSuchProcess:
        return False


def _batches(names: Sequence[str]) -> Iterator[list[str]]:
    names = list(dict.fromkeys(names))
    for start in range(0, len(names), BATCH):
        yield names[start:start + BATCH]

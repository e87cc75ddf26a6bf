"""What only we know: leases, reviews, machine runs, promotions, deployments; append-only where it matters."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import sqlalchemy as sa

from workbench.errors import Conflict

LEASE_S = 90

metadata = sa.MetaData()
leases = sa.Table(
    "leases", metadata,
    sa.Column("dataset", sa.String(64), primary_key=True), sa.Column("frame", sa.String(512), primary_key=True),
    sa.Column("holder", sa.String(200), nullable=False), sa.Column("until", sa.Float, nullable=False))


def _ledger(name: str) -> sa.Table:
    return sa.Table(
        name, metadata,
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("dataset", sa.String(64), nullable=False, index=True),
        sa.Column("subject", sa.String(512), nullable=False, index=True),
        sa.Column("person", sa.String(200), nullable=False),
        sa.Column("at", sa.String(40), nullable=False),
        sa.Column("facts", sa.Text, nullable=False),
        sa.Column("key", sa.String(300), unique=True))


LEDGERS = {name: _ledger(name) for name in ("reviews", "machine_runs", "promotions", "deployments", "uploads",
                                             "certificates", "cvat_deployments", "pulls", "cvat_reviews",
                                             "notifications", "redeployments", "drift", "retrain_rules", "retrain_events")}


@dataclass(frozen=True)
class Entry:
    """One line of a ledger. subject: the frame of a review, the run id of a machine run, the model of the rest."""

    id: int
    dataset: str
    subject: str
    person: str
    at: str
    facts: dict[str, Any]


def now() -> str:
    """UTC, ISO 8601, to the millisecond."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


class Records:
    """One SQLAlchemy database: SQLite for one machine, Postgres for a team. `clock` gives seconds since the epoch."""

    def __init__(self, url: str, clock: Callable[[], float] = lambda: datetime.now(timezone.utc).timestamp()) -> None:
        self.engine = open_database(url)
        self._clock = clock
        with alone(self.engine) as connection:
            metadata.create_all(connection)

    def lease(self, dataset: str, frame: str, holder: str, lease_s: float = LEASE_S) -> None:
        """Takes or renews a frame for one holder. Raises Conflict while somebody else holds it."""
        refused = self.lease_many(dataset, [frame], holder, lease_s)
        if refused:
            raise Conflict(f"{frame} is being worked on by {refused[frame]}. Take the next frame, or wait until they "
                           f"leave it (at most {LEASE_S} s after they close it).")

    def lease_many(self, dataset: str, frames: Sequence[str], holder: str, lease_s: float = LEASE_S) -> dict[str, str]:
        """Takes or renews what is free; returns {frame: who holds it} of the frames it did not get."""
        with self.engine.begin() as connection:
            at = self._clock()
            held = {row.frame: row for row in connection.execute(
                sa.select(leases).where(leases.c.dataset == dataset, leases.c.frame.in_(list(frames))))}
            refused = {name: row.holder for name, row in held.items() if row.holder != holder and row.until > at}
            free = [name for name in dict.fromkeys(frames) if name not in refused]
            if free:
                connection.execute(leases.delete().where(leases.c.dataset == dataset, leases.c.frame.in_(free)))
                connection.execute(leases.insert(), [
                    {"dataset": dataset, "frame": name, "holder": holder, "until": at + lease_s} for name in free])
        return refused

    def release(self, dataset: str, frames: Sequence[str], holder: str) -> None:
        with self.engine.begin() as connection:
            connection.execute(leases.delete().where(
                leases.c.dataset == dataset, leases.c.frame.in_(list(frames)), leases.c.holder == holder))

    def leased(self, dataset: str) -> dict[str, str]:
        """frame -> holder, of the leases that still run."""
        with reading(self.engine) as connection:
            rows = connection.execute(sa.select(leases).where(leases.c.dataset == dataset, leases.c.until > self._clock()))
            return {row.frame: row.holder for row in rows}

    def add(self, ledger: str, dataset: str, subject: str, person: str, facts: dict[str, Any] | None = None,
            key: str | None = None, unless: Callable[[Entry], bool] | None = None) -> bool:
        """Appends one entry. With a `key` that is there already nothing happens and False comes back, nor with an entry
        of the ledger for which `unless` holds, which nobody can add meanwhile who asks the same."""
        row = {"dataset": dataset, "subject": subject, "person": person, "at": now(),
               "facts": json.dumps(facts or {}, sort_keys=True), "key": key}
        try:
            with self.engine.begin() if unless is None else alone(self.engine) as connection:
                there = () if unless is None else connection.execute(sa.select(LEDGERS[ledger]))
                if any(unless(_entry(row)) for row in there):
                    return False
                connection.execute(LEDGERS[ledger].insert(), row)
        except sa.exc.IntegrityError:
            return False
        return True

    def entries(self, ledger: str, dataset: str | None = None, subject: str | None = None, limit: int = 1000) -> list[Entry]:
        """Newest first."""
        table = LEDGERS[ledger]
        query = sa.select(table).order_by(table.c.id.desc()).limit(limit)
        if dataset is not None:
            query = query.where(table.c.dataset == dataset)
        if subject is not None:
            query = query.where(table.c.subject == subject)
        with reading(self.engine) as connection:
            return [_entry(row) for row in connection.execute(query)]

    def deployed(self, dataset: str) -> str | None:
        """The model reference that annotates this data set's next upload, or None."""
        entries = self.entries("deployments", dataset, limit=1)
        return entries[0].subject if entries else None


def _entry(row: Any) -> Entry:
    return Entry(row.id, row.dataset, row.subject, row.person, row.at, json.loads(row.facts))


@contextmanager
def alone(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A transaction that only one process has at a time."""
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            # SQLite's transactions begin with the write lock (open_database); Postgres has to be asked.
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(7467201)"))
        yield connection


def reading(engine: sa.Engine) -> sa.Connection:
    """A connection for reading only: in SQLite it neither waits for a writer nor makes one wait."""
    return engine.connect().execution_options(is_reading=True)


def open_database(url: str) -> sa.Engine:
    """An engine that several processes may share: SQLite waits for its writers instead of failing."""
    # Of SQLAlchemy's drivers of Postgres, psycopg is the one that is installed.
    engine = sa.create_engine(re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", url), pool_pre_ping=True)
    if engine.dialect.name == "sqlite":
        @sa.event.listens_for(engine, "connect")
        def _set_up(connection: Any, _: Any) -> None:
            cursor = connection.cursor()
            cursor.execute("PRAGMA busy_timeout=30000")
            cursor.execute("PRAGMA journal_mode=WAL")
            cursor.execute("PRAGMA synchronous=NORMAL")
            cursor.close()

        @sa.event.listens_for(engine, "begin")
        def _begin(connection: Any) -> None:
            # Take the write lock at the start, so that two writers wait for each other instead of failing half-way.
            is_reading = connection.get_execution_options().get("is_reading")
            connection.exec_driver_sql("BEGIN" if is_reading else "BEGIN IMMEDIATE")
    return engine

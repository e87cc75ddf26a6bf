"""The tables of jobs, and what both sides of the queue need: lanes, locks, which process lives."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa

from workbench.records import now

# Constant: with DBOS's default (a hash of the code) every new release would orphan the jobs of the one before.
APPLICATION, VERSION, WORKFLOW = "workbench", "1", "run_job"
# A training must not keep uploads waiting: one lane each, each worker runs one job of a lane at a time.
LANES = ("cpu", "train")
TRAIN_KINDS = ("retrain",)
STATES = ("queued", "running", "done", "failed", "cancelled")
DEAD_AFTER_S = 30   # silence after which a worker on another machine counts as dead; here its process id decides

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


@contextmanager
def alone(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A transaction that only one process has at a time."""
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            # SQLite's transactions begin with the write lock (records.open_database); Postgres has to be asked.
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(7467201)"))
        yield connection


def lane(kind: str | None) -> str:
    return "train" if kind in TRAIN_KINDS else "cpu"


def write_log(connection: sa.Connection, job_id: str, text: str) -> None:
    connection.execute(log.insert(), {"job": job_id, "at": now(), "text": text})


def machine() -> str:
    """Where a process id means something: host name and process namespace (containers may share the first)."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {os.readlink(namespace) if namespace.exists() else ''}".strip()


def has_process(row: Any) -> bool:
    """Whether exactly that process lives; its start time tells it from a later one with the same number."""
    try:
        process = psutil.Process(row.pid)
        return abs(process.create_time() - row.pid_started) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

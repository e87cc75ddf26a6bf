"""The tables of jobs, and what both sides of the queue need: lanes, locks, which process lives."""

from __future__ import annotations

import os
import re
import socket
import time
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa

from workbench.errors import Invalid
from workbench.records import now

# Constant: with DBOS's default (a hash of the code) every new release would orphan the jobs of the one before.
APPLICATION, VERSION, WORKFLOW = "workbench", "1", "run_job"
# A training must not keep uploads waiting: one lane each, each worker runs one job of a lane at a time. In "gpu" wait
# the trainings that asked for one.
LANES = ("cpu", "train", "gpu")
TRAIN_KINDS = ("retrain", "rerun", "sweep")
STATES = ("queued", "running", "done", "failed", "cancelled")
NVIDIA = Path("/dev/nvidiactl")  # is there exactly where a driver has found a card

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
worker_lanes = sa.Table(
    "worker_lanes", metadata,
    sa.Column("worker", sa.String(64), primary_key=True), sa.Column("lane", sa.String(16), primary_key=True))


def lane(kind: str, args: dict[str, Any]) -> str:
    """The queue that a job waits in; `args` with "gpu": true asks for a machine with one, for a training only."""
    if kind not in TRAIN_KINDS:
        return "cpu"
    return "gpu" if args.get("gpu") is True else "train"


def lanes_of(setting: str) -> tuple[str, ...]:
    """The lanes that a worker serves, of the setting worker_lanes; empty: all that this machine can. Raises Invalid."""
    named = tuple(dict.fromkeys(name for name in re.split(r"[,\s]+", setting) if name))
    unknown = [name for name in named if name not in LANES]
    if unknown:
        raise Invalid(f"Setting worker_lanes names {', '.join(unknown)}; there are {', '.join(LANES)}.")
    return named or tuple(name for name in LANES if name != "gpu" or NVIDIA.exists())


def write_log(connection: sa.Connection, job_id: str, text: str) -> None:
    connection.execute(log.insert(), {"job": job_id, "at": now(), "text": text})


def database_time(connection: sa.Connection) -> float:
    """Seconds since the epoch by the one clock that all processes share: the clocks of two machines need not agree."""
    if connection.engine.dialect.name == "postgresql":
        return float(connection.scalar(sa.text("SELECT extract(epoch FROM clock_timestamp())")))
    return time.time()


def machine(name: str = "") -> str:
    """Where a process id means something. name: the setting machine_name, instead of the host's.

    Two hosts made of one image may have one name, and the first process namespace has the same number everywhere: the
    boot tells them apart. Containers of one host share it: the namespace does.
    """
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return " ".join([name or socket.gethostname(), *([boot.read_text()[:8]] if boot.exists() else []),
                     *([os.readlink(namespace)] if namespace.exists() else [])])


def has_process(row: Any) -> bool:
    """Whether exactly that process lives; its start time tells it from a later one with the same number."""
    try:
        process = psutil.Process(row.pid)
        return abs(process.create_time() - row.pid_started) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

"""A step as a job: submitted, followed to its end; and the commands that list, show and cancel jobs."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from workbench.cli.options import LISTED, InOrder, opened
from workbench.config import Config
from workbench.errors import Unavailable

if TYPE_CHECKING:
    from workbench.wiring import Workbench

POLL_S = 0.3


def run_job(config: Config, kind: str, args: dict[str, Any], detach: bool, as_json: bool) -> int:
    """Submits a job and follows it; returns the exit code, 0 when it is done."""
    from workbench import kinds
    args = {name: value for name, value in args.items() if value not in (None, {})}
    kinds.check(kind, args)
    workbench = opened(config)
    if not detach and not workbench.jobs.workers():
        raise Unavailable("No worker runs, so nothing would happen. Start `workbench up` (in another terminal), then "
                          "repeat this; or queue the job with --detach.")
    lane = workbench.jobs.unserved_lane(kind, args)
    if not detach and lane:
        instead = (", leave out --gpu" if lane == "gpu" else "") + ", or queue the job with --detach."
        raise Unavailable(f"No worker serves the lane {lane}, so the job would only wait. Start one that does (setting "
                          f"worker_lanes; docs/operating.md){instead}")
    job_id = workbench.jobs.ask(kind, args, person=config.person)
    if detach:
        tell_of_lane(workbench, kind, args)
        click.echo(job_id)
        return 0
    try:
        status = _follow(workbench, job_id)
    except KeyboardInterrupt:
        click.echo(f"\nThe job goes on: `workbench jobs show {job_id}`, `workbench jobs cancel {job_id}`.", err=True)
        return 130
    failed = workbench.jobs.failed_items(job_id)
    for item, reason in list(failed.items())[:LISTED]:
        click.echo(f"{item}: {reason}", err=True)
    if len(failed) > LISTED:
        click.echo(f"... and {len(failed) - LISTED} more: `workbench jobs show {job_id}`.", err=True)
    if status.state != "done":
        click.echo(status.error or f"The job is {status.state}.", err=True)
        return 1
    result = status.result or {}
    if as_json:
        click.echo(json.dumps(result))
    for name, value in () if as_json else result.items():
        if isinstance(value, (str, int, float)) and value != "":
            click.echo(f"{name:16} {value}")
    return 0


def tell_of_lane(workbench: Workbench, kind: str, args: dict[str, Any]) -> None:
    """Says that such a job waits, where no worker that lives takes it."""
    lane = workbench.jobs.unserved_lane(kind, args)
    if lane:
        click.echo(f"No worker serves the lane {lane} now: the job waits until one does (docs/operating.md).", err=True)


def _follow(workbench: Workbench, job_id: str) -> Any:
    """Draws progress on a terminal; elsewhere a line when the state changes."""
    told, is_terminal = "", sys.stderr.isatty()
    while True:
        status = workbench.jobs.get(job_id)
        text = f"{status.kind} {status.state} {status.done}/{status.total or '?'} {status.note}".rstrip()
        if is_terminal and text != told:
            click.echo(f"\r\033[K{text}", nl=status.is_over, err=True)
        elif not is_terminal and status.state != told:
            click.echo(f"{status.kind} job {job_id} is {status.state}", err=True)
        told = text if is_terminal else status.state
        if status.is_over:
            return status
        if status.state == "queued" and workbench.jobs.unserved_lane(status.kind, status.args):
            raise Unavailable(f"The worker is gone; {status.kind} job {job_id} waits for the next one. Start "
                              "`workbench up`.")
        time.sleep(POLL_S)


@click.group(cls=InOrder)
def jobs() -> None:
    """List, show and cancel jobs."""


@jobs.command("list")
@click.option("--limit", default=LISTED, show_default=True)
@click.option("--kind")
@click.option("--state", type=click.Choice(["queued", "running", "done", "failed", "cancelled"]))
@click.pass_obj
def list_jobs(config: Config, limit: int, kind: str | None, state: str | None) -> None:
    """The newest jobs."""
    for job in opened(config).jobs.list(limit, kind, state):
        click.echo(f"{job.id}  {job.created_at[:19]}  {job.kind:9} {job.state:9} {job.done}/{job.total or '?'}  "
                   f"{job.person}  {job.error or job.note}")


@jobs.command("show")
@click.argument("job_id")
@click.pass_obj
def showrun_job(config: Config, job_id: str) -> None:
    """Everything about a job: arguments, result, failed items, log."""
    from dataclasses import asdict
    all_jobs = opened(config).jobs
    click.echo(json.dumps(asdict(all_jobs.get(job_id)), indent=2))
    for item, reason in all_jobs.failed_items(job_id).items():
        click.echo(f"failed: {item}: {reason}")
    for line in all_jobs.log_lines(job_id):
        click.echo(line)


@jobs.command("cancel")
@click.argument("job_id")
@click.pass_obj
def cancelrun_job(config: Config, job_id: str) -> None:
    """A queued job never starts, a running one stops at its next check."""
    status = opened(config).jobs.cancel(job_id)
    click.echo(f"{status.kind} job {job_id} is {'being cancelled' if status.is_cancelling else status.state}")

"""Commands of this machine: its parts, their health, the whole loop once, cameras, channels of messages."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from workbench.cli.options import opened, pairs
from workbench.config import Config
from workbench.errors import Invalid, NotFound, WorkbenchError


@click.command()
@click.option("--part", "parts", multiple=True, 
              help="Only these parts (mongod, ui, worker, service, mlflow, fiftyone).")
@click.pass_obj
def up(config: Config, parts: tuple[str, ...]) -> None:
    """Start and supervise everything on this machine until Ctrl-C."""
    from workbench import supervise
    supervise.up(config, parts or None, click.echo)


@click.command()
@click.argument("what", type=click.Choice(["cvat"]), required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
@click.pass_obj
def doctor(config: Config, what: str | None, as_json: bool) -> int:
    """Check each part, or what CVAT needs to show deployed models (doctor cvat); say what is wrong and what to do. Exit
    code 1 when something needed is broken."""
    from workbench import doctor as checks
    found = checks.examine(config) if what is None else checks.examine_cvat(opened(config))
    if as_json:
        click.echo(json.dumps({"ok": checks.is_fit(found), "checks": [check.to_json() for check in found]}))
    for check in () if as_json else found:
        click.echo(f"{check.mark:5} {check.name:12} {check.says}")
    return 0 if checks.is_fit(found) else 1


@click.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), 
              help="A labelled COCO, YOLO or VOC folder instead of the quick-start data set.")
@click.option("--training-s", type=click.IntRange(30), nargs=2, help="Time budgets of the two trainings in seconds.")
@click.option("--param", multiple=True, metavar="NAME=VALUE", help="A parameter of the training recipe.")
@click.option("--serve/--no-serve", default=True, help="Serve the workbench afterwards.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as one JSON line, last.")
@click.pass_obj
def demo(config: Config, data: Path | None, training_s: tuple[int, int] | None, param: tuple[str, ...], serve: bool,
         as_json: bool) -> None:
    """Run the whole loop once, print what each step did, then serve the workbench."""
    from workbench import demo as loop
    loop.run(config, data=data, training_s=training_s, params=pairs("--param", param), serve=serve, as_json=as_json)


@click.command()
@click.argument("cameras", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--dataset", required=True, help="What the frames of events go to.")
@click.option("--model", help="The deployed one of the data set otherwise.")
@click.option("--per-hour", type=click.IntRange(1), default=60, show_default=True,
              help="Frames kept of a camera in an hour.")
@click.pass_obj
def watch(config: Config, cameras: Path, dataset: str, model: str | None, per_hour: int) -> None:
    """Watch the cameras of the TOML file CAMERAS until Ctrl-C; frames of events go to DATASET (docs/streams.md)."""
    import signal
    import threading

    import cv2

    from workbench.dataset import check_dataset_name
    from workbench.inference.cameras import read_cameras
    from workbench.steps.quantize import open_annotator
    from workbench.steps.spool import Spool
    from workbench.steps.watch import low_thresholds, upload_by
    from workbench.steps.watch import watch as run
    check_dataset_name(dataset)
    listed, workbench = read_cameras(cameras), opened(config)
    model = model or workbench.records.deployed(dataset)
    if model is None:
        raise NotFound(f"No model is deployed for {dataset}. Name one: `workbench models list` shows those there are.")
    cv2.setNumThreads(1)  # frames are worked on side by side, so each needs one thread
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    thresholds, send = low_thresholds(workbench.models.card(model)), upload_by(workbench.jobs, dataset, config.person)
    with open_annotator(model, models=workbench.models, open_backend=workbench.open_backend,
                        certificates=workbench.certificates, **thresholds) as detector, \
            Spool(config.home / "watch" / dataset, per_hour=per_hour) as spool:
        report = run(listed, detector, spool, send, say=click.echo, stop=stop)
    click.echo(json.dumps(report.to_json()))


@click.command()
@click.option("--test", is_flag=True, help="Send each of them a test message.")
@click.pass_obj
def notify(config: Config, test: bool) -> int:
    """List the channels that are told of trainings and promotions (docs/notifications.md)."""
    from workbench.notifications import Message
    channels = opened(config).channels()
    if not channels:
        raise Invalid(f"No channel is set. Write discord_webhook or notify_urls into {config.home / 'settings.toml'}.")
    failed = 0
    for channel in channels:
        try:
            if test:
                channel.send(Message("A test message of the workbench", "Messages about trainings will come here.",
                                     (("By", config.person),)))
            click.echo(f"{channel.name}: {'the message is sent' if test else 'set'}")
        except WorkbenchError as error:
            failed += 1
            click.echo(f"{channel.name}: {error}", err=True)
    return 1 if failed else 0


@click.command(hidden=True)
@click.pass_obj
def worker(config: Config) -> None:
    """Run jobs in this process (`workbench up` starts it)."""
    import logging
    import os
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    workbench = opened(config)
    from workbench.steps.training import stop_trainings
    workbench.jobs.work(workbench.job_kinds(), end_here=lambda is_stray: stop_trainings(config.home, is_stray))
    workbench.outbox.close()
    # A step that did not stop in time still has its thread, which would hold this process back.
    sys.stdout.flush()
    os._exit(0)


@click.command(hidden=True)
@click.argument("name")
@click.option("--check", is_flag=True, help="Only ask whether it answers.")
@click.pass_obj
def part(config: Config, name: str, check: bool) -> None:
    """Become one part: what a container runs."""
    from workbench.supervise import parts
    if check:
        parts.part(name).probe(config)
    else:
        parts.run_part(config, name)

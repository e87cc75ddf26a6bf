"""Commands of frames and versions: upload, annotate, evaluate, publish, compare, check out."""

from __future__ import annotations

from pathlib import Path

import click

from workbench.cli.jobs import run_job
from workbench.cli.options import LISTED, opened, pairs, step
from workbench.config import Config
from workbench.errors import NotFound


@click.command()
@click.argument("dataset")
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.option("--split", type=click.Choice(["train", "val", "test"]),
              help="For frames to which the data set gives none.")
@step
def upload(config: Config, dataset: str, source: Path, split: str | None, **how: bool) -> int:
    """Make SOURCE (a folder, an archive, or a COCO, YOLO or VOC data set) the next version of DATASET."""
    return run_job(config, "upload", {"dataset": dataset, "source": str(source.resolve()), "split": split}, **how)


@click.command()
@click.argument("dataset")
@click.argument("model", required=False)
@click.option("--confidence", type=click.FloatRange(0, 1), help="Least confidence of a box, for all labels.")
@click.option("--again", is_flag=True, help="Also frames that a machine annotated before and nobody reviewed.")
@click.option("--rename", multiple=True, metavar="MODEL_LABEL=LABEL", help="Map a label where the names differ.")
@click.option("--tiles", type=click.IntRange(32, 8192), metavar="PX",
              help="Small objects in large frames: also look at pieces of PX by PX pixels.")
@click.option("--tile-overlap", type=click.FloatRange(0, 0.9), default=0.2, show_default=True,
              help="Share of a piece that the next one repeats.")
@step
def annotate(config: Config, dataset: str, model: str | None, confidence: float | None, again: bool,
             rename: tuple[str, ...], tiles: int | None, tile_overlap: float, **how: bool) -> int:
    """Let MODEL (else the deployed one) annotate the frames of DATASET that nobody has reviewed."""
    model = model or opened(config).records.deployed(dataset)
    if model is None:
        raise NotFound(f"No model is deployed for {dataset}. Name one: `workbench models list` shows those there are.")
    return run_job(config, "annotate", {
        "dataset": dataset, "model": model, "statuses": ["new", "annotated"] if again else ["new"],
        "confidence": confidence, "renames": pairs("--rename", rename),
        "tiling": {"size": tiles, "overlap": tile_overlap} if tiles else None}, **how)


@click.command()
@click.argument("dataset")
@click.argument("run")
@step
def undo(config: Config, dataset: str, run: str, **how: bool) -> int:
    """Take back the annotate job RUN on every frame nobody has reviewed since."""
    return run_job(config, "undo", {"dataset": dataset, "run_id": run}, **how)


@click.command()
@click.argument("model")
@click.argument("version")
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="test", show_default=True)
@step
def evaluate(config: Config, model: str, version: str, split: str, **how: bool) -> int:
    """Score MODEL (student@3) on a split of VERSION (cells@1.0.0), now."""
    return run_job(config, "evaluate", {"model": model, "version": version, "split": split}, **how)


@click.command()
@click.argument("dataset")
@click.option("-m", "--message", default="", help="What is new, for those who read the history.")
@click.option("--bump", type=click.Choice(["major", "minor", "patch"]), help="Part of the number that moves.")
@step
def version(config: Config, dataset: str, message: str, bump: str | None, **how: bool) -> int:
    """Publish the working copy of DATASET as its next version."""
    return run_job(config, "version", {"dataset": dataset, "message": message, "bump": bump}, **how)


@click.command()
@click.argument("old")
@click.argument("new")
@click.pass_obj
def diff(config: Config, old: str, new: str) -> None:
    """Say what changed from version OLD (cells@1.0.0) to NEW."""
    from dataclasses import asdict

    from workbench.dataset import diff as compare
    store = opened(config).datasets
    changes = asdict(compare(store.manifest(old), store.manifest(new)))
    for name, found in changes.items():
        shown = ", ".join(one if isinstance(one, str) else f"{one[0]} {one[1][:8]}" for one in found[:LISTED])
        click.echo(f"{name.replace('_', ' '):18} {len(found):6}  {shown}{' ...' if len(found) > LISTED else ''}")


@click.command()
@click.argument("version")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--unlabelled", is_flag=True, help="Also the frames of train that nobody labelled, as recipes that learn "
              "from a teacher get them.")
@click.pass_obj
def checkout(config: Config, version: str, folder: Path, unlabelled: bool) -> None:
    """Write VERSION (cells@1.0.0, or cells for its latest) into the new FOLDER, as a training gets it."""
    from workbench.steps.checkout import checkout as write
    workbench = opened(config)
    done = write(version, folder, store=workbench.datasets, blobs=workbench.blobs, unlabelled=unlabelled)
    counted = ", ".join(f"{number} {name}" for name, number in done.frames.items())
    click.echo(f"{done.version} is in {done.folder}: {counted} frames, {len(done.labels)} labels. "
               "Only read it: its pictures are the workbench's own.")


@click.command()
@click.pass_obj
def datasets(config: Config) -> None:
    """List data sets and their versions."""
    store = opened(config).datasets
    for name in store.names():
        for one in store.versions(name):
            click.echo(f"{one.ref:24} {one.created_at[:19]}  {one.frames} frames, {one.labeled} labelled, "
                       f"{one.boxes} boxes  {one.message.splitlines()[0] if one.message else ''}")

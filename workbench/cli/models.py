"""Commands of models: list, add, quantize, certify."""

from __future__ import annotations

import json
from pathlib import Path

import click

from workbench.cli.jobs import run_job
from workbench.cli.options import InOrder, limits_of, opened, step
from workbench.config import Config
from workbench.errors import Invalid, WorkbenchError


@click.command()
@click.argument("model")
@click.option("--version", required=True, help="Data set version (cells@1.0.0): its test split certifies, the rest "
              "calibrates.")
@click.option("--split", type=click.Choice(["val", "test"]), default="test", show_default=True,
              help="The split that is held out for the certificate.")
@click.option("--frames", type=click.IntRange(1), help="How many frames calibrate.")
@click.option("--seed", type=int, help="Which ones: the same seed, the same frames.")
@click.option("--limit", multiple=True, metavar="NAME=VALUE", help="loss, class_loss, speedup or frames.")
@step
def quantize(config: Config, model: str, version: str, split: str, frames: int | None, seed: int | None,
             limit: tuple[str, ...], **how: bool) -> int:
    """Make MODEL-int8: faster on this device, with a certificate of what that costs in accuracy."""
    return run_job(config, "quantize", {
        "model": model, "version": version, "split": split, "frames": frames, "seed": seed,
        "limits": limits_of(limit)}, **how)


@click.command()
@click.argument("model")
@click.option("--version", required=True, help="Data set version (cells@1.0.0) to measure on.")
@click.option("--split", type=click.Choice(["val", "test"]), default="test", show_default=True)
@click.option("--against", help="The FP32 version, where the INT8 one does not say which it came from.")
@click.option("--limit", multiple=True, metavar="NAME=VALUE", help="loss, class_loss, speedup or frames.")
@step
def certify(config: Config, model: str, version: str, split: str, against: str | None, limit: tuple[str, ...],
            **how: bool) -> int:
    """Measure the INT8 version MODEL against its FP32 origin on this device."""
    return run_job(config, "certify", {
        "model": model, "version": version, "split": split, "against": against,
        "limits": limits_of(limit)}, **how)


@click.group(cls=InOrder)
def models() -> None:
    """List and add detectors."""


@models.command("list")
@click.pass_obj
def list_models(config: Config) -> None:
    """The registered detectors."""
    store = opened(config).models
    for ref in store.refs():
        card = store.card(ref)
        click.echo(f"{ref:28} {card.decoder['name']:8} {card.input.size[0]}x{card.input.size[1]}  "
                   f"{len(card.labels)} labels  {card.licence}")


@models.command("add")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.pass_obj
def add_model(config: Config, folder: Path) -> None:
    """Register the detector in FOLDER (card.json and its files), after opening it and running a picture."""
    from workbench.inference.detector import check_card
    from workbench.model import ModelCard
    file = folder / "card.json"
    try:
        card = ModelCard.from_json(json.loads(file.read_text()))
    except (OSError, ValueError) as error:
        if isinstance(error, WorkbenchError):
            raise
        raise Invalid(f"{file} cannot be read ({error}). docs/adopting.md says what stands in it.") from error
    workbench = opened(config)
    report = check_card(card, folder, workbench.open_backend)
    workbench.models.register(card, folder)
    click.echo(f"{card.ref} is registered; it runs on {report['library']}, {report['device']}, {report['precision']}.")

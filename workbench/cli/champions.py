"""Commands that decide which model leads and which one annotates."""

from __future__ import annotations

import click

from workbench.cli.jobs import run_job
from workbench.cli.options import limits_of, opened, step
from workbench.config import Config
from workbench.errors import NotFound


@click.command()
@click.argument("dataset")
@click.argument("candidate")
@click.argument("version")
@click.option("--margin", type=click.FloatRange(0, 1), help="By how much the candidate has to be better.")
@click.option("--primary", help="The metric that decides: map_50_95, map_50, miou, accuracy, macro_f1 or map. "
              "Default: the one that the training was asked for, else that of the model's task.")
@click.option("--max-class-drop", type=click.FloatRange(0, 1), help="By how much no label's part may fall.")
@click.option("--split", type=click.Choice(["val", "test"]), default="test", show_default=True)
@click.option("--then", multiple=True, type=click.Choice(["deploy", "int8", "cvat"]), help="When it leads: deploy it; "
              "in INT8 where the certificate passes; also in CVAT, in place of earlier champions.")
@step
def promote(config: Config, dataset: str, candidate: str, version: str, margin: float | None, primary: str | None,
            max_class_drop: float | None, split: str, then: tuple[str, ...], **how: bool) -> int:
    """Score CANDIDATE and the champion of DATASET on the same split of VERSION; the surely better one leads."""
    return run_job(config, "promote", {"dataset": dataset, "candidate": candidate, "version": version, "margin": margin,
                                    "primary": primary, "max_class_drop": max_class_drop, "split": split,
                                    "then": list(then) or None}, **how)


@click.command()
@click.argument("dataset")
@click.option("--to", help="The model expected to lead again; refused when it would be another.")
@click.option("--name", help="The registered model, where DATASET has champions under several names.")
@click.option("--bring-back", is_flag=True, help="Also deploy again what was deployed with it, here and in CVAT.")
@step
def rollback(config: Config, dataset: str, to: str | None, name: str | None, bring_back: bool, **how: bool) -> int:
    """Make the champion before the present one of DATASET champion again."""
    return run_job(config, "rollback", {
        "dataset": dataset, "to": to, "name": name, "bring_back": bring_back or None}, **how)


@click.command()
@click.argument("dataset")
@click.option("--on", help="A day (2026-05-01: at its end) or a moment (2026-05-01T12:00), UTC; now otherwise.")
@click.option("--name", help="The registered model, where DATASET has champions under several names.")
@click.pass_obj
def champion(config: Config, dataset: str, on: str | None, name: str | None) -> None:
    """Print the champion of DATASET, now or on a date."""
    from workbench.steps.deploy import champion_of
    found = champion_of(dataset, opened(config).records, on, name)
    if found is None:
        raise NotFound(f"{dataset} has no champion{f' on {on}' if on else ''}. `workbench promote` makes one.")
    click.echo(found)


@click.command()
@click.argument("dataset")
@click.argument("model")
@step
def deploy(config: Config, dataset: str, model: str, **how: bool) -> int:
    """Make MODEL the one that annotates the next upload of DATASET."""
    return run_job(config, "deploy", {"dataset": dataset, "model": model}, **how)


@click.command()
@click.argument("dataset")
@click.argument("model", required=False)
@click.option("--then", multiple=True, type=click.Choice(["deploy", "int8", "cvat"]), default=("deploy",),
              help="deploy; int8: in INT8 where the certificate passes; cvat: also in place of earlier champions "
              "there.")
@click.option("--version", help="Data set version that calibrates and certifies; the latest otherwise.")
@click.option("--limit", multiple=True, metavar="NAME=VALUE", help="loss, class_loss, speedup or frames.")
@step
def redeploy(config: Config, dataset: str, model: str | None, then: tuple[str, ...], version: str | None,
             limit: tuple[str, ...], **how: bool) -> int:
    """Deploy the champion of DATASET (or MODEL, the champion of its name), as after a promotion."""
    from workbench.steps.deploy import champion_of
    model = model or champion_of(dataset, opened(config).records)
    if model is None:
        raise NotFound(f"{dataset} has no champion. `workbench promote` makes one.")
    limits = limits_of(limit)
    return run_job(config, "redeploy", {"dataset": dataset, "model": model, "then": list(then), "version": version,
                                     "limits": limits}, **how)


@click.command()
@click.argument("dataset")
@click.option("--threshold", type=float, help="Stability index above which it is an alarm; 0.2 otherwise.")
@click.option("--least-frames", type=int, help="Fewer frames tell nothing; 50 otherwise.")
@step
def drift(config: Config, dataset: str, threshold: float | None, least_frames: int | None, **how: bool) -> int:
    """Look whether the deployed model of DATASET still sees what its version looked like."""
    return run_job(config, "drift", {"dataset": dataset, "threshold": threshold, "least_frames": least_frames}, **how)

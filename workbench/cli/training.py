"""Commands that train: retrain, sweep, rerun, and the rules that start a retraining by themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from workbench.cli.jobs import run_job, tell_of_lane
from workbench.cli.options import InOrder, limits_of, opened, step
from workbench.config import Config
from workbench.errors import Invalid

GPU = "Wait for a worker of the lane gpu, on a machine with a graphics card (docs/operating.md)."


def training(command: Any) -> Any:
    """What to train with: a recipe of the workbench, or the MLproject of another git repository."""
    for option in reversed((
            click.option("--recipe", help="A folder of models/; the detector that comes with the workbench otherwise."),
            click.option("--param", multiple=True, metavar="NAME=VALUE", help="A parameter of the recipe."),
            click.option("--base-model", help="Model of the same recipe to start from."),
            click.option("--git-uri", help="Another repository, one that the setting retrain_repositories lists."),
            click.option("--location", help="Folder of the MLproject in it; its top otherwise."),
            click.option("--commit", help="Full SHA of the commit, 40 digits."),
            click.option("--experiment", help="MLflow experiment; the data set's name otherwise."),
            click.option("--model-name", help="Registered under; <data set>-detector otherwise."),
            click.option("--primary-metric", help="A number that metrics.json has to hold."),
            click.option("--lower-is-better", is_flag=True, help="Less of it is better."),
            click.option("--environment", type=click.Choice(["current", "locked"]),
                         help="The workbench's own Python, or one built from the recipe's lock."),
            click.option("--limit", multiple=True, metavar="NAME=VALUE",
                         help="wall_s, cpu_s, memory_mb, processes, disk_mb or log_mb, below the settings'."),
            click.option("--gpu", is_flag=True, help=GPU))):
        command = option(command)
    return command


def _training(config: Config, version: str, recipe: str | None, param: tuple[str, ...], base_model: str | None,
              git_uri: str | None, location: str | None, commit: str | None, experiment: str | None,
              model_name: str | None, primary_metric: str | None, lower_is_better: bool, environment: str | None,
              limit: tuple[str, ...], gpu: bool) -> dict[str, Any]:
    """Arguments of a retrain job on VERSION, a reference or a data set's name for its latest."""
    from workbench.steps.request import from_recipe, from_repository, parameters_of
    from workbench.wiring import PROJECT
    params = parameters_of(param)
    workbench, (dataset, _, number) = opened(config), version.partition("@")
    parts = {"project": PROJECT, "store": workbench.datasets, "models": workbench.models, "environment": environment,
             "limits": limits_of(limit), "gpu": gpu}
    if git_uri is None:
        given = {"--location": location, "--commit": commit, "--experiment": experiment, "--model-name": model_name,
                 "--primary-metric": primary_metric, "--lower-is-better": lower_is_better}
        if any(given.values()):
            said = ", ".join(name for name, value in given.items() if value)
            raise Invalid(f"{said} goes with --git-uri, the address of a git repository.")
        return from_recipe(version, recipe=recipe, params=params, base_model=base_model, **parts)
    if recipe is not None:
        raise Invalid("--recipe names a recipe of the workbench; with --git-uri give --location, the folder of the "
                      "MLproject in the repository.")
    if commit is None:
        raise Invalid("--git-uri needs --commit, the full SHA of what is to run: see `git rev-parse HEAD`.")
    args = from_repository(
        experiment_name=experiment or dataset, git_uri=git_uri, MLproject_location=location or ".", commit_hash=commit,
        dataset_repo=dataset, version=number or None, base_model=base_model, model_name=model_name,
        primary_metric=primary_metric, lower_is_better=lower_is_better, parameters=params,
        repositories=config.retrain_repositories, **parts)
    return {"dataset": dataset, **args}


@click.command()
@click.argument("version")
@training
@step
def retrain(config: Config, version: str, detach: bool, as_json: bool, **what: Any) -> int:
    """Train on VERSION (cells@1.0.0, or cells for its latest) and register the model.

    What trains is a recipe of the workbench, or with --git-uri and --commit the MLproject of another repository.
    """
    return run_job(config, "retrain", _training(config, version, **what), detach, as_json)


@click.command()
@click.argument("version")
@click.option("--space", required=True, help="What to vary, as JSON or @FILE: {\"lr\": {\"low\": 1e-4, \"high\": 1e-2, "
              "\"log\": true}, \"batch_size\": [4, 8]}.")
@click.option("--trials", type=click.IntRange(1, 1000), default=20, show_default=True, help="How many, at most.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), 
              help="Time of the whole sweep; no end otherwise.")
@click.option("--sampler", type=click.Choice(["tpe", "random", "grid"]), default="tpe", show_default=True,
              help="tpe learns from earlier trials; grid tries every combination.")
@click.option("--pruner", type=click.Choice(["median", "halving", "none"]), default="median", show_default=True,
              help="Which trials end early: those below the median, those outside a best third, or none.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the search.")
@click.option("--at-once", type=click.IntRange(1), help="Trials side by side; as many as cores, memory and GPUs allow "
              "otherwise.")
@click.option("--memory-gb", type=click.FloatRange(min=0, min_open=True), 
              help="What a trial needs, until one is measured.")
@training
@step
def sweep(config: Config, version: str, space: str, minutes: float | None, trials: int, sampler: str, pruner: str,
          seed: int, at_once: int | None, memory_gb: float | None, primary_metric: str | None, lower_is_better: bool,
          detach: bool, as_json: bool, **what: Any) -> int:
    """Train on VERSION with many parameters, side by side, and register the best model (docs/sweeps.md).

    The trials are compared by --primary-metric, map_50_95 otherwise.
    """
    try:
        varied = json.loads(Path(space[1:]).read_text() if space.startswith("@") else space)
    except (OSError, ValueError) as error:
        raise Invalid(f"--space cannot be read: {error}. Write a JSON object in quotes, or @FILE.") from error
    args = _training(config, version, primary_metric=None, lower_is_better=False, **what)
    if what["experiment"] is None:
        args.pop("experiment", None)  # a sweep has an experiment of its own
    return run_job(config, "sweep", {
        **args, "space": varied, "trials": trials, "time_limit_s": minutes and 60 * minutes, "sampler": sampler,
        "pruner": pruner, "seed": seed, "at_once": at_once, "memory_gb": memory_gb, "metric": primary_metric,
        "lower_is_better": lower_is_better or None}, detach, as_json)


@click.command()
@click.argument("run")
@click.option("--tolerance", type=click.FloatRange(0, 1, max_open=True), 
              help="Largest difference of a number, relative to the larger of 1 and itself; 0.001 on the same machine "
              "and packages without a GPU, 0.05 otherwise.")
@click.option("--changed-environment", is_flag=True, help="Go on although packages are not what they were.")
@click.option("--gpu", is_flag=True, help=GPU)
@step
def rerun(config: Config, run: str, tolerance: float | None, changed_environment: bool, gpu: bool, **how: bool) -> int:
    """Train again what the MLflow run RUN trained, and compare the metrics. Nothing is registered."""
    return run_job(config, "rerun", {
        "run": run, "tolerance": tolerance, "changed_environment": changed_environment, "gpu": gpu or None}, **how)


@click.group("rules", cls=InOrder)
def rules_group() -> None:
    """What starts a retraining by itself: a schedule, work accepted in CVAT, a drift alarm (docs/automation.md)."""


@rules_group.command("list")
@click.argument("dataset")
@click.pass_obj
def list_rules(config: Config, dataset: str) -> None:
    """The rules of DATASET, and what they decided last."""
    from workbench.steps.rules import events, rules
    records = opened(config).records
    for rule in rules(dataset, records=records).values():
        click.echo(f"{rule.kind:9} {rule.in_words() if rule.is_on else 'off'}; set {rule.at[:16]} by {rule.person}")
    for event in events(dataset, records=records):
        click.echo(f"{event.at[:19]}  {event.facts['told']}")


@rules_group.command("set")
@click.argument("dataset")
@click.argument("kind", type=click.Choice(["schedule", "accepted", "drift"]))
@click.option("--every-h", type=float, help="Of a schedule: hours between two trainings.")
@click.option("--cron", help="Of a schedule: minute hour day month weekday, in UTC.")
@click.option("--threshold", type=float, default=0.2, show_default=True,
              help="Of drift: index above which it is an alarm.")
@click.option("--least-frames", type=int, default=50, show_default=True, help="Of drift: fewer tell nothing.")
@click.option("--retrain/--only-tell", default=True, help="Of drift: whether an alarm starts a training.")
@training
@click.pass_obj
def set_rule_command(config: Config, dataset: str, kind: str, every_h: float | None, cron: str | None, threshold: float,
                     least_frames: int, retrain: bool, **what: Any) -> None:
    """Train DATASET anew on its latest version: on a schedule, when work accepted in CVAT is published, on drift."""
    from workbench.steps.rules import Rule, set_rule
    workbench, args = opened(config), _training(config, dataset, **what)
    made = set_rule(Rule(dataset, kind, every_h=every_h, cron=cron, threshold=threshold, least_frames=least_frames,
                         retrain=retrain, training={name: value for name, value in args.items() if name != "version"}),
                    records=workbench.records, person=config.person)
    tell_of_lane(workbench, "retrain", args)
    click.echo(f"{dataset} is trained {made.in_words()}." if kind != "drift" or retrain else
               f"{dataset}: an alarm is told {made.in_words()}.")


@rules_group.command("off")
@click.argument("dataset")
@click.argument("kind", type=click.Choice(["schedule", "accepted", "drift"]))
@click.pass_obj
def rule_off(config: Config, dataset: str, kind: str) -> None:
    """Switch a rule off."""
    from workbench.steps.rules import switch_off
    switch_off(dataset, kind, records=opened(config).records, person=config.person)
    click.echo(f"{dataset} is not trained by the rule {kind} any more.")

"""The command line: one command per step of the loop. Steps run as jobs in the worker that `workbench up` starts."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from workbench import __version__
from workbench.config import Config
from workbench.errors import Invalid, NotFound, Unavailable, WorkbenchError

if TYPE_CHECKING:
    from workbench.wiring import Workbench

POLL_S = 0.3
LISTED = 20


class InOrder(click.Group):
    """Lists commands as they are written here: in the order of the loop."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--home", type=click.Path(file_okay=False, path_type=Path), help="Folder of everything the workbench keeps "
              "(WORKBENCH_HOME; ~/.workbench).")
@click.option("--debug", is_flag=True, help="Show where in the code an error came from.")
@click.version_option(__version__, prog_name="workbench")
@click.pass_context
def cli(context: click.Context, home: Path | None, debug: bool) -> None:
    """A labeling-and-retraining workbench: raw frames in, a better detector out, over and over.

    \b
      upload -> annotate -> review -> evaluate -> version -> retrain -> promote -> deploy
         ^                                                                        |
         +------------------- the deployed model annotates the next upload -------+

    Start with `workbench demo`, or with `workbench up` and a browser. Reviewing happens in the browser; every other step
    has a command here too.
    """
    context.obj = Config.read(home)


def main() -> None:
    """Every failure is one sentence on stderr; exit code 2 for wrong input, 1 for any other failure."""
    is_debug = "--debug" in sys.argv
    try:
        code = cli(standalone_mode=False)
    except click.Abort:
        code = 130
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except WorkbenchError as error:
        if is_debug:
            raise
        click.echo(str(error), err=True)
        code = 2 if isinstance(error, Invalid) else 1
    except Exception as error:
        if is_debug:
            raise
        click.echo(f"Unforeseen {type(error).__name__}: {error}. Run it again with `workbench --debug ...` and report "
                   "what it prints.", err=True)
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _open(config: Config) -> Workbench:
    from workbench.wiring import Workbench
    return Workbench(config)


@cli.command()
@click.option("--part", "parts", multiple=True, help="Only these parts (mongod, ui, worker, service, mlflow, fiftyone).")
@click.pass_obj
def up(config: Config, parts: tuple[str, ...]) -> None:
    """Start and supervise everything on this machine until Ctrl-C."""
    from workbench import supervise
    supervise.up(config, parts or None, click.echo)


@cli.command()
@click.argument("what", type=click.Choice(["cvat"]), required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
@click.pass_obj
def doctor(config: Config, what: str | None, as_json: bool) -> int:
    """Check each part, or what CVAT needs to show deployed models (doctor cvat); say what is wrong and what to do. Exit
    code 1 when something needed is broken."""
    from workbench import doctor as checks
    found = checks.examine(config) if what is None else checks.examine_cvat(_open(config))
    if as_json:
        click.echo(json.dumps({"ok": checks.is_fit(found), "checks": [check.to_json() for check in found]}))
    for check in () if as_json else found:
        click.echo(f"{check.mark:5} {check.name:12} {check.says}")
    return 0 if checks.is_fit(found) else 1


@cli.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="A labelled COCO, YOLO or VOC folder instead of "
              "the quick-start data set.")
@click.option("--training-s", type=click.IntRange(30), nargs=2, help="Time budgets of the two trainings in seconds.")
@click.option("--param", multiple=True, metavar="NAME=VALUE", help="A parameter of the training recipe.")
@click.option("--serve/--no-serve", default=True, help="Serve the workbench afterwards.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as one JSON line, last.")
@click.pass_obj
def demo(config: Config, data: Path | None, training_s: tuple[int, int] | None, param: tuple[str, ...], serve: bool,
         as_json: bool) -> None:
    """Run the whole loop once, print what each step did, then serve the workbench."""
    from workbench import demo as loop
    loop.run(config, data=data, training_s=training_s, params=_pairs("--param", param), serve=serve, as_json=as_json)


def step(command: Any) -> Any:
    """Options that all steps have."""
    command = click.option("--detach", is_flag=True, help="Print the job's id and do not wait for it.")(command)
    command = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON line.")(command)
    return click.pass_obj(command)


@cli.command()
@click.argument("dataset")
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.option("--split", type=click.Choice(["train", "val", "test"]), help="For frames to which the data set gives none.")
@step
def upload(config: Config, dataset: str, source: Path, split: str | None, **how: bool) -> int:
    """Make SOURCE (a folder, an archive, or a COCO, YOLO or VOC data set) the next version of DATASET."""
    return _job(config, "upload", {"dataset": dataset, "source": str(source.resolve()), "split": split}, **how)


@cli.command()
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
    model = model or _open(config).records.deployed(dataset)
    if model is None:
        raise NotFound(f"No model is deployed for {dataset}. Name one: `workbench models list` shows those there are.")
    return _job(config, "annotate", {
        "dataset": dataset, "model": model, "statuses": ["new", "annotated"] if again else ["new"],
        "confidence": confidence, "renames": _pairs("--rename", rename),
        "tiling": {"size": tiles, "overlap": tile_overlap} if tiles else None}, **how)


@cli.command()
@click.argument("dataset")
@click.argument("run")
@step
def undo(config: Config, dataset: str, run: str, **how: bool) -> int:
    """Take back the annotate job RUN on every frame nobody has reviewed since."""
    return _job(config, "undo", {"dataset": dataset, "run_id": run}, **how)


@cli.command()
@click.argument("model")
@click.argument("version")
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="test", show_default=True)
@step
def evaluate(config: Config, model: str, version: str, split: str, **how: bool) -> int:
    """Score MODEL (student@3) on a split of VERSION (cells@1.0.0), now."""
    return _job(config, "evaluate", {"model": model, "version": version, "split": split}, **how)


@cli.command()
@click.argument("dataset")
@click.option("-m", "--message", default="", help="What is new, for those who read the history.")
@click.option("--bump", type=click.Choice(["major", "minor", "patch"]), help="Part of the number that moves.")
@step
def version(config: Config, dataset: str, message: str, bump: str | None, **how: bool) -> int:
    """Publish the working copy of DATASET as its next version."""
    return _job(config, "version", {"dataset": dataset, "message": message, "bump": bump}, **how)


@cli.command()
@click.argument("old")
@click.argument("new")
@click.pass_obj
def diff(config: Config, old: str, new: str) -> None:
    """Say what changed from version OLD (cells@1.0.0) to NEW."""
    from dataclasses import asdict

    from workbench.dataset import diff as compare
    store = _open(config).datasets
    changes = asdict(compare(store.manifest(old), store.manifest(new)))
    for name, found in changes.items():
        shown = ", ".join(one if isinstance(one, str) else f"{one[0]} {one[1][:8]}" for one in found[:LISTED])
        click.echo(f"{name.replace('_', ' '):18} {len(found):6}  {shown}{' ...' if len(found) > LISTED else ''}")


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
                         help="wall_s, cpu_s, memory_mb, processes, disk_mb or log_mb, below the settings'."))):
        command = option(command)
    return command


def _training(config: Config, version: str, recipe: str | None, param: tuple[str, ...], base_model: str | None,
              git_uri: str | None, location: str | None, commit: str | None, experiment: str | None,
              model_name: str | None, primary_metric: str | None, lower_is_better: bool, environment: str | None,
              limit: tuple[str, ...]) -> dict[str, Any]:
    """Arguments of a retrain job on VERSION, a reference or a data set's name for its latest."""
    from workbench.steps.request import from_recipe, from_repository, parameters_of
    from workbench.wiring import PROJECT
    params = parameters_of(param)
    workbench, (dataset, _, number) = _open(config), version.partition("@")
    parts = {"project": PROJECT, "store": workbench.datasets, "models": workbench.models, "environment": environment,
             "limits": {name: _number(value) for name, value in _pairs("--limit", limit).items()}}
    if git_uri is None:
        given = {"--location": location, "--commit": commit, "--experiment": experiment, "--model-name": model_name,
                 "--primary-metric": primary_metric, "--lower-is-better": lower_is_better}
        if any(given.values()):
            raise Invalid(f"{', '.join(name for name, value in given.items() if value)} goes with --git-uri, the address "
                          "of a git repository.")
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


@cli.command()
@click.argument("version")
@training
@step
def retrain(config: Config, version: str, detach: bool, as_json: bool, **what: Any) -> int:
    """Train on VERSION (cells@1.0.0, or cells for its latest) and register the model.

    What trains is a recipe of the workbench, or with --git-uri and --commit the MLproject of another repository.
    """
    return _job(config, "retrain", _training(config, version, **what), detach, as_json)


@cli.command()
@click.argument("version")
@click.option("--space", required=True, help="What to vary, as JSON or @FILE: {\"lr\": {\"low\": 1e-4, \"high\": 1e-2, "
              "\"log\": true}, \"batch_size\": [4, 8]}.")
@click.option("--trials", type=click.IntRange(1, 1000), default=20, show_default=True, help="How many, at most.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="Time of the whole sweep; no end otherwise.")
@click.option("--sampler", type=click.Choice(["tpe", "random", "grid"]), default="tpe", show_default=True,
              help="tpe learns from earlier trials; grid tries every combination.")
@click.option("--pruner", type=click.Choice(["median", "halving", "none"]), default="median", show_default=True,
              help="Which trials end early: those below the median, those outside a best third, or none.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the search.")
@click.option("--at-once", type=click.IntRange(1), help="Trials side by side; as many as cores, memory and GPUs allow "
              "otherwise.")
@click.option("--memory-gb", type=click.FloatRange(min=0, min_open=True), help="What a trial needs, until one is measured.")
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
    return _job(config, "sweep", {
        **args, "space": varied, "trials": trials, "time_limit_s": minutes and 60 * minutes, "sampler": sampler,
        "pruner": pruner, "seed": seed, "at_once": at_once, "memory_gb": memory_gb, "metric": primary_metric,
        "lower_is_better": lower_is_better or None}, detach, as_json)


@cli.command()
@click.argument("run")
@click.option("--tolerance", type=click.FloatRange(0, 1, max_open=True), help="Largest difference of a number, relative to "
              "the larger of 1 and itself; 0.001 on the same machine and packages without a GPU, 0.05 otherwise.")
@click.option("--changed-environment", is_flag=True, help="Go on although packages are not what they were.")
@step
def rerun(config: Config, run: str, tolerance: float | None, changed_environment: bool, **how: bool) -> int:
    """Train again what the MLflow run RUN trained, and compare the metrics. Nothing is registered."""
    return _job(config, "rerun", {"run": run, "tolerance": tolerance, "changed_environment": changed_environment}, **how)


@cli.command()
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
    return _job(config, "promote", {"dataset": dataset, "candidate": candidate, "version": version, "margin": margin,
                                    "primary": primary, "max_class_drop": max_class_drop, "split": split,
                                    "then": list(then) or None}, **how)


@cli.command()
@click.argument("dataset")
@click.option("--to", help="The model expected to lead again; refused when it would be another.")
@click.option("--name", help="The registered model, where DATASET has champions under several names.")
@click.option("--bring-back", is_flag=True, help="Also deploy again what was deployed with it, here and in CVAT.")
@step
def rollback(config: Config, dataset: str, to: str | None, name: str | None, bring_back: bool, **how: bool) -> int:
    """Make the champion before the present one of DATASET champion again."""
    return _job(config, "rollback", {"dataset": dataset, "to": to, "name": name, "bring_back": bring_back or None}, **how)


@cli.command()
@click.argument("dataset")
@click.option("--on", help="A day (2026-05-01: at its end) or a moment (2026-05-01T12:00), UTC; now otherwise.")
@click.option("--name", help="The registered model, where DATASET has champions under several names.")
@click.pass_obj
def champion(config: Config, dataset: str, on: str | None, name: str | None) -> None:
    """Print the champion of DATASET, now or on a date."""
    from workbench.steps.deploy import champion_of
    found = champion_of(dataset, _open(config).records, on, name)
    if found is None:
        raise NotFound(f"{dataset} has no champion{f' on {on}' if on else ''}. `workbench promote` makes one.")
    click.echo(found)


@cli.command()
@click.argument("dataset")
@click.argument("model")
@step
def deploy(config: Config, dataset: str, model: str, **how: bool) -> int:
    """Make MODEL the one that annotates the next upload of DATASET."""
    return _job(config, "deploy", {"dataset": dataset, "model": model}, **how)


@cli.command()
@click.argument("dataset")
@click.argument("model", required=False)
@click.option("--then", multiple=True, type=click.Choice(["deploy", "int8", "cvat"]), default=("deploy",),
              help="deploy; int8: in INT8 where the certificate passes; cvat: also in place of earlier champions there.")
@click.option("--version", help="Data set version that calibrates and certifies; the latest otherwise.")
@click.option("--limit", multiple=True, metavar="NAME=VALUE", help="map_loss, class_loss, speedup or frames.")
@step
def redeploy(config: Config, dataset: str, model: str | None, then: tuple[str, ...], version: str | None,
             limit: tuple[str, ...], **how: bool) -> int:
    """Deploy the champion of DATASET (or MODEL, the champion of its name), as after a promotion."""
    from workbench.steps.deploy import champion_of
    model = model or champion_of(dataset, _open(config).records)
    if model is None:
        raise NotFound(f"{dataset} has no champion. `workbench promote` makes one.")
    limits = {name: _number(value) for name, value in _pairs("--limit", limit).items()}
    return _job(config, "redeploy", {"dataset": dataset, "model": model, "then": list(then), "version": version,
                                     "limits": limits}, **how)


@cli.command()
@click.argument("dataset")
@click.option("--threshold", type=float, help="Stability index above which it is an alarm; 0.2 otherwise.")
@click.option("--least-frames", type=int, help="Fewer frames tell nothing; 50 otherwise.")
@step
def drift(config: Config, dataset: str, threshold: float | None, least_frames: int | None, **how: bool) -> int:
    """Look whether the deployed model of DATASET still sees what its version looked like."""
    return _job(config, "drift", {"dataset": dataset, "threshold": threshold, "least_frames": least_frames}, **how)


@cli.group("rules", cls=InOrder)
def rules_group() -> None:
    """What starts a retraining by itself: a schedule, work accepted in CVAT, a drift alarm (docs/automation.md)."""


@rules_group.command("list")
@click.argument("dataset")
@click.pass_obj
def list_rules(config: Config, dataset: str) -> None:
    """The rules of DATASET, and what they decided last."""
    from workbench.steps.rules import events, rules
    records = _open(config).records
    for rule in rules(dataset, records=records).values():
        click.echo(f"{rule.kind:9} {rule.in_words() if rule.is_on else 'off'}; set {rule.at[:16]} by {rule.person}")
    for event in events(dataset, records=records):
        click.echo(f"{event.at[:19]}  {event.facts['told']}")


@rules_group.command("set")
@click.argument("dataset")
@click.argument("kind", type=click.Choice(["schedule", "accepted", "drift"]))
@click.option("--every-h", type=float, help="Of a schedule: hours between two trainings.")
@click.option("--cron", help="Of a schedule: minute hour day month weekday, in UTC.")
@click.option("--threshold", type=float, default=0.2, show_default=True, help="Of drift: index above which it is an alarm.")
@click.option("--least-frames", type=int, default=50, show_default=True, help="Of drift: fewer tell nothing.")
@click.option("--retrain/--only-tell", default=True, help="Of drift: whether an alarm starts a training.")
@training
@click.pass_obj
def set_rule_command(config: Config, dataset: str, kind: str, every_h: float | None, cron: str | None, threshold: float,
                     least_frames: int, retrain: bool, **what: Any) -> None:
    """Train DATASET anew on its latest version: on a schedule, when work accepted in CVAT is published, on drift."""
    from workbench.steps.rules import Rule, set_rule
    args = _training(config, dataset, **what)
    made = set_rule(Rule(dataset, kind, every_h=every_h, cron=cron, threshold=threshold, least_frames=least_frames,
                         retrain=retrain, training={name: value for name, value in args.items() if name != "version"}),
                    records=_open(config).records, person=config.person)
    click.echo(f"{dataset} is trained {made.in_words()}." if kind != "drift" or retrain else
               f"{dataset}: an alarm is told {made.in_words()}.")


@rules_group.command("off")
@click.argument("dataset")
@click.argument("kind", type=click.Choice(["schedule", "accepted", "drift"]))
@click.pass_obj
def rule_off(config: Config, dataset: str, kind: str) -> None:
    """Switch a rule off."""
    from workbench.steps.rules import switch_off
    switch_off(dataset, kind, records=_open(config).records, person=config.person)
    click.echo(f"{dataset} is not trained by the rule {kind} any more.")


@cli.command()
@click.argument("model")
@click.option("--version", required=True, help="Data set version (cells@1.0.0): its test split certifies, the rest "
              "calibrates.")
@click.option("--split", type=click.Choice(["val", "test"]), default="test", show_default=True,
              help="The split that is held out for the certificate.")
@click.option("--frames", type=click.IntRange(1), help="How many frames calibrate.")
@click.option("--seed", type=int, help="Which ones: the same seed, the same frames.")
@click.option("--limit", multiple=True, metavar="NAME=VALUE", help="map_loss, class_loss, speedup or frames.")
@step
def quantize(config: Config, model: str, version: str, split: str, frames: int | None, seed: int | None,
             limit: tuple[str, ...], **how: bool) -> int:
    """Make MODEL-int8: faster on this device, with a certificate of what that costs in mAP."""
    return _job(config, "quantize", {
        "model": model, "version": version, "split": split, "frames": frames, "seed": seed,
        "limits": {name: _number(value) for name, value in _pairs("--limit", limit).items()}}, **how)


@cli.command()
@click.argument("model")
@click.option("--version", required=True, help="Data set version (cells@1.0.0) to measure on.")
@click.option("--split", type=click.Choice(["val", "test"]), default="test", show_default=True)
@click.option("--against", help="The FP32 version, where the INT8 one does not say which it came from.")
@click.option("--limit", multiple=True, metavar="NAME=VALUE", help="map_loss, class_loss, speedup or frames.")
@step
def certify(config: Config, model: str, version: str, split: str, against: str | None, limit: tuple[str, ...],
            **how: bool) -> int:
    """Measure the INT8 version MODEL against its FP32 origin on this device."""
    return _job(config, "certify", {
        "model": model, "version": version, "split": split, "against": against,
        "limits": {name: _number(value) for name, value in _pairs("--limit", limit).items()}}, **how)


@cli.command()
@click.argument("cameras", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--dataset", required=True, help="What the frames of events go to.")
@click.option("--model", help="The deployed one of the data set otherwise.")
@click.option("--per-hour", type=click.IntRange(1), default=60, show_default=True, help="Frames kept of a camera in an hour.")
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
    listed, workbench = read_cameras(cameras), _open(config)
    model = model or workbench.records.deployed(dataset)
    if model is None:
        raise NotFound(f"No model is deployed for {dataset}. Name one: `workbench models list` shows those there are.")
    cv2.setNumThreads(1)  # frames are worked on side by side, so each needs one thread
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with open_annotator(model, models=workbench.models, open_backend=workbench.open_backend,
                        certificates=workbench.certificates, **low_thresholds(workbench.models.card(model))) as detector, \
            Spool(config.home / "watch" / dataset, per_hour=per_hour) as spool:
        report = run(listed, detector, spool, upload_by(workbench.jobs, dataset, config.person), say=click.echo, stop=stop)
    click.echo(json.dumps(report.to_json()))


@cli.group(cls=InOrder)
def jobs() -> None:
    """List, show and cancel jobs."""


@jobs.command("list")
@click.option("--limit", default=LISTED, show_default=True)
@click.option("--kind")
@click.option("--state", type=click.Choice(["queued", "running", "done", "failed", "cancelled"]))
@click.pass_obj
def list_jobs(config: Config, limit: int, kind: str | None, state: str | None) -> None:
    """The newest jobs."""
    for job in _open(config).jobs.list(limit, kind, state):
        click.echo(f"{job.id}  {job.created_at[:19]}  {job.kind:9} {job.state:9} {job.done}/{job.total or '?'}  "
                   f"{job.person}  {job.error or job.note}")


@jobs.command("show")
@click.argument("job_id")
@click.pass_obj
def show_job(config: Config, job_id: str) -> None:
    """Everything about a job: arguments, result, failed items, log."""
    from dataclasses import asdict
    all_jobs = _open(config).jobs
    click.echo(json.dumps(asdict(all_jobs.get(job_id)), indent=2))
    for item, reason in all_jobs.failed_items(job_id).items():
        click.echo(f"failed: {item}: {reason}")
    for line in all_jobs.log_lines(job_id):
        click.echo(line)


@jobs.command("cancel")
@click.argument("job_id")
@click.pass_obj
def cancel_job(config: Config, job_id: str) -> None:
    """A queued job never starts, a running one stops at its next check."""
    status = _open(config).jobs.cancel(job_id)
    click.echo(f"{status.kind} job {job_id} is {'being cancelled' if status.is_cancelling else status.state}")


@cli.command()
@click.pass_obj
def datasets(config: Config) -> None:
    """List data sets and their versions."""
    store = _open(config).datasets
    for name in store.names():
        for one in store.versions(name):
            click.echo(f"{one.ref:24} {one.created_at[:19]}  {one.frames} frames, {one.labeled} labelled, {one.boxes} boxes  "
                       f"{one.message.splitlines()[0] if one.message else ''}")


@cli.group(cls=InOrder)
def models() -> None:
    """List and add detectors."""


@models.command("list")
@click.pass_obj
def list_models(config: Config) -> None:
    """The registered detectors."""
    store = _open(config).models
    for ref in store.refs():
        card = store.card(ref)
        click.echo(f"{ref:28} {card.decoder['name']:8} {card.input.size[0]}x{card.input.size[1]}  {len(card.labels)} labels"
                   f"  {card.licence}")


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
    workbench = _open(config)
    report = check_card(card, folder, workbench.open_backend)
    workbench.models.register(card, folder)
    click.echo(f"{card.ref} is registered; it runs on {report['library']}, {report['device']}, {report['precision']}.")


@cli.command()
@click.option("--test", is_flag=True, help="Send each of them a test message.")
@click.pass_obj
def notify(config: Config, test: bool) -> int:
    """List the channels that are told of trainings and promotions (docs/notifications.md)."""
    from workbench.notifications import Message
    channels = _open(config).channels()
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


@cli.command(hidden=True)
@click.pass_obj
def worker(config: Config) -> None:
    """Run jobs in this process (`workbench up` starts it)."""
    import logging
    import os
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    workbench = _open(config)
    from workbench.steps.training import stop_trainings
    workbench.jobs.work(workbench.job_kinds(), end_here=lambda is_stray: stop_trainings(config.home, is_stray))
    workbench.outbox.close()
    # A step that did not stop in time still has its thread, which would hold this process back.
    sys.stdout.flush()
    os._exit(0)


@cli.command(hidden=True)
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


def _job(config: Config, kind: str, args: dict[str, Any], detach: bool, as_json: bool) -> int:
    """Submits a job and follows it; 0 when it is done."""
    from workbench import kinds
    args = {name: value for name, value in args.items() if value not in (None, {})}
    kinds.check(kind, args)
    workbench = _open(config)
    if not detach and not workbench.jobs.workers():
        raise Unavailable("No worker runs, so nothing would happen. Start `workbench up` (in another terminal), then "
                          "repeat this; or queue the job with --detach.")
    job_id = workbench.jobs.submit(kind, args, person=config.person)
    if detach:
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
        if status.state == "queued" and not workbench.jobs.workers():
            raise Unavailable(f"The worker is gone; {status.kind} job {job_id} waits for the next one. Start `workbench up`.")
        time.sleep(POLL_S)


def _pairs(option: str, given: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals or not name or not value:
            raise Invalid(f"{option} {one!r} must read NAME=VALUE.")
        pairs[name] = value
    return pairs


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


if __name__ == "__main__":
    main()

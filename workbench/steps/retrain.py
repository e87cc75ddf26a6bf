"""Retrain: a published version and a recipe at an exact commit become a tracked run and a registered model."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from workbench.annotation import Annotation
from workbench.blobs import Blobs
from workbench.boxes import Detections
from workbench.dataset import DatasetVersion, Manifest, parse_ref
from workbench.errors import Cancelled, Conflict, Invalid, NotFound, Unavailable
from workbench.evaluation.effort import THRESHOLDS, least_effort
from workbench.formats.checkout import write_checkout
from workbench.inference.detector import OpenBackend, check_card
from workbench.inference.graph import file_record
from workbench.model import MODEL_NAME, InputSpec, ModelCard, parse_model_ref
from workbench.ports import DatasetStore, Job, ModelStore, Tracker
from workbench.recipe import Recipe, check_out, discard, read_recipe
from workbench.repository import check_commit, check_location, fetch, permitted
from workbench.steps.evaluate import evaluate
from workbench.steps.training import Training

RECIPE = "efficientnet_lite0_fcos"
# What a recipe leaves in its output folder; weights.pt (to continue from), history.jsonl and plots/ are welcome extras.
MODEL_FILES = ("model.onnx", "weights.pt")
THRESHOLD_FRAMES = 300
RESULTS = ("model.onnx", "card.json", "metrics.json")
# The tracker failed, not the training; sysexits.h calls it EX_TEMPFAIL.
TRY_AGAIN = 75
# Begins with a letter or digit, so that no command line reads it as an option.
EXPERIMENT = re.compile(r"[^\W_][\w .:+/-]{0,199}")
METRIC = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,99}")
# `mlflow run` without its command line, whose import takes another 3 s.
MLFLOW_RUN = f"""
import json, sys
from mlflow.exceptions import ExecutionException, MlflowException
from mlflow.projects import run
try:
    run(".", env_manager="local", **json.loads(sys.argv[1]))
except ExecutionException as error:
    sys.exit(str(error))
except MlflowException as error:
    print(error, file=sys.stderr)
    sys.exit({TRY_AGAIN})
"""


@dataclass(frozen=True)
class Trained:
    """What a training gave. model: its reference in the model store; seconds: of the training process, all attempts."""

    run_id: str
    model: str
    commit: str
    version: str
    recipe: str
    seconds: float
    metrics: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def model_name(dataset: str) -> str:
    """The name under which a data set's own detectors are registered. Raises Invalid when it would be too long."""
    name = f"{dataset}-detector"
    if not MODEL_NAME.fullmatch(name):
        raise Invalid(f"Data set name {dataset!r} is too long for its models to be named {name!r}: at most 54 letters.")
    return name


def retrain(
    version_ref: str, *, recipe: str = RECIPE, params: dict[str, Any] | None = None, base_model: str | None = None,
    store: DatasetStore, blobs: Blobs, tracker: Tracker, models: ModelStore, home: Path, job: Job, project: Path,
    open_backend: OpenBackend, person: str, repository: str | None = None, commit: str | None = None,
    location: str | None = None, repositories: str = "", experiment: str | None = None, register_as: str | None = None,
    primary: str | None = None, lower_is_better: bool = False,
) -> Trained:
    """Trains the recipe, as committed in `project`, on a version; registers the model as `<dataset>-detector@n`.

    The job's id names the training: calling again with the same job goes on where it stopped (the same folder below
    `<home>/trainings`, the same commit, the same run), waits for a training process that outlived its worker instead
    of starting a second one, and returns what there is once it is done.

    params      values for the recipe's own parameters
    base_model  reference of an earlier model of the same recipe to start from, or None
    project     git checkout that holds models/<recipe>/MLproject; its HEAD commit is what runs
    repository  address of another git repository, one that `repositories` (the setting retrain_repositories) permits,
                with the full SHA `commit` and `location`, the folder of the MLproject in it; `recipe` is not used then
    experiment  name of the MLflow experiment; the data set's name otherwise
    register_as name of the registered model instead of `<dataset>-detector`
    primary     metric that metrics.json has to hold; it and its direction are tags of the run

    Raises Invalid when recipe, parameters or data cannot be trained with, and when the training fails, with the end of
    its log; Cancelled; Unavailable while the tracker does not answer (repeat the job: nothing is lost).
    """
    name = name_for(parse_ref(version_ref)[0], register_as, store, models)
    check_words(experiment, primary)
    outside = {"repository": repository, "commit": commit, "location": location}
    if len({value is None for value in outside.values()}) > 1:
        raise Invalid("repository, commit and location go together; give all three, or none for the project's own "
                      "recipes.")
    training = Training(home / "trainings" / _folder_name(job.id))
    with training.held():
        asked = {"version": version_ref, "recipe": recipe, "params": params or {}, "base_model": base_model}
        named = {**outside, "experiment": experiment, "register_as": register_as, "primary": primary,
                 "lower_is_better": lower_is_better or None}
        # What was not given is left out, as it is in the record of a training from before these existed.
        asked |= {key: value for key, value in named.items() if value is not None}
        before = training.read("request.json")
        if before is not None and before["asked"] != asked:
            raise Conflict(f"Job {job.id} is already a training of {before['asked']}; start another job for another "
                           "one.")
        done = training.read("trained.json")
        if done is not None:
            return Trained(**done)
        # A repeat runs what the first attempt ran, also when the project has moved on since.
        if repository is not None:
            source, place = permitted(repository, repositories, project), check_location(location)
            recipe = source.name if place == "." else place.rpartition("/")[2]
            project = fetch(source, check_commit(commit), place, home / "recipes", job.check)
            chosen = read_recipe(project, recipe, commit, place)
        else:
            chosen = read_recipe(project, recipe, before["commit"] if before else None)
        version, manifest = store.version(version_ref), store.manifest(version_ref)
        if not any(one.annotations for one in manifest.split("train")):
            raise Invalid(f"{version_ref} has no box in its train split. Accept labelled frames, publish a version and "
                          "retrain on that.")
        arguments = _arguments(chosen, training, params or {}, name, base_model, models)
        if before is None:
            training.write("request.json", {"asked": asked, "commit": chosen.commit, "started_at": time.time()})
        experiment = experiment or version.dataset
        tags = {"git_uri": repository and source.address, "location": location, "primary_metric": primary,
                "lower_is_better": str(lower_is_better).lower() if primary else None}
        run_id = tracker.start_run(experiment, f"{recipe} on {version_ref}", {
            "job": job.id, "kind": "training", "dataset": version_ref, "dataset_digest": version.digest,
            "recipe": recipe, "commit": chosen.commit, "person": person, "base_model": base_model or "",
            **{key: value for key, value in tags.items() if value is not None}})
        try:
            if training.exit_code() is None:
                if training.processes():
                    job.log("The training process of an earlier worker is still at work; it goes on.")
                else:
                    _start(training, chosen, arguments, project, home / "recipes", manifest, version, blobs, tracker,
                           run_id, job, experiment)
                training.follow(job)
            metrics = _results(training)
            if primary is not None and (isinstance(metrics.get(primary), bool)
                                        or not isinstance(metrics.get(primary), (int, float))):
                raise Invalid(f"metrics.json has no number {primary}, the primary metric asked for; it has "
                              f"{', '.join(map(str, metrics))[:300]}. Ask for one of these, or have the recipe write it.")
            _log_epochs(training, tracker, run_id)
            card = training.read("card.json")
            if card is None:
                card = _publish(training, name, run_id, manifest, version, metrics, base_model, store, blobs, tracker,
                                open_backend, job)
            card = models.register(ModelCard.from_json(card), training.folder / "model")
            tracker.set_alias(name, "challenger", card.version)
        except Cancelled:
            tracker.finish_run(run_id, "KILLED")
            raise
        except (Invalid, NotFound):
            tracker.finish_run(run_id, "FAILED")
            raise
        tracker.finish_run(run_id, "FINISHED")
        seconds = training.ended_at() - training.read("request.json")["started_at"]
        trained = Trained(run_id, card.ref, chosen.commit, version_ref, recipe, round(seconds, 1), card.metrics)
        training.write("trained.json", trained.to_json())
        # The model, the run and the log stay; what can be made again goes.
        discard(project, home / "recipes", training.folder / "code")
        for folder in ("data", "model", "fetched"):
            shutil.rmtree(training.folder / folder, ignore_errors=True)
        epochs = len(training.history())
        job.progress(epochs, epochs, trained.model)
        return trained


def name_for(dataset: str, asked: str | None, store: DatasetStore, models: ModelStore) -> str:
    """The name a model is registered under: the one asked for, when it is nobody else's. Raises Invalid."""
    own = model_name(dataset)
    if asked is None or asked == own:
        return own
    if not MODEL_NAME.fullmatch(asked):
        raise Invalid("model_name must be lower-case letters, digits, '.', '-' or '_', at most 63 of them.")
    if asked.endswith("-detector") and asked.removesuffix("-detector") in store.names():
        raise Invalid(f"Model name {asked} belongs to data set {asked.removesuffix('-detector')}; choose another one.")
    if any(parse_model_ref(ref)[0] == asked and not models.card(ref).run_id for ref in models.refs()):
        raise Invalid(f"Model name {asked} belongs to a model that was not trained here; choose another one.")
    return asked


def check_words(experiment: str | None, primary: str | None) -> None:
    """Raises Invalid for what cannot be the name of an experiment or of a metric."""
    if experiment is not None and not EXPERIMENT.fullmatch(experiment):
        raise Invalid("experiment_name must begin with a letter or digit and go on with these, blanks and _ . : + / -, "
                      "at most 200 in all.")
    if primary is not None and not METRIC.fullmatch(primary):
        raise Invalid("primary_metric must be the name of a number in metrics.json, such as map_50_95.")


def _folder_name(job_id: str) -> str:
    """A folder name for a job; an id that is no plain word is told apart by its digest."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", job_id):
        return job_id
    return re.sub(r"[^A-Za-z0-9_-]+", "-", job_id)[:48] + "-" + hashlib.sha256(job_id.encode()).hexdigest()[:12]


def _arguments(recipe: Recipe, training: Training, params: dict[str, Any], name: str, base_model: str | None,
               models: ModelStore) -> dict[str, str]:
    ours = {"data": str(training.folder / "data"), "output": str(training.output)}
    if "name" in recipe.parameters:
        ours["name"] = name
    if base_model is not None:
        weights = models.folder(base_model) / "weights.pt"
        if not weights.exists():
            raise Invalid(f"Model {base_model} carries no weights.pt to start from; choose one that was trained by "
                          f"{recipe.name}, or none.")
        ours["base_weights"] = str(weights)
    elif "base_weights" in params:
        raise Invalid("base_weights names a file of this machine; give base_model, a model of the store, instead.")
    return recipe.arguments(params, ours)


def _start(training: Training, recipe: Recipe, arguments: dict[str, str], project: Path, mirrors: Path,
           manifest: Manifest, version: DatasetVersion, blobs: Blobs, tracker: Tracker, run_id: str, job: Job,
           experiment: str) -> None:
    """Lays out data and code and starts `mlflow run` on them."""
    if recipe.uncommitted:
        job.log(f"Uncommitted changes are left out, commit {recipe.commit[:12]} runs: {', '.join(recipe.uncommitted)}.")
    data, half = training.folder / "data", training.folder / "data.half"
    if not data.exists():
        shutil.rmtree(half, ignore_errors=True)
        write_checkout(manifest, blobs, half, version.ref)
        half.rename(data)
    check_out(project, recipe.commit, mirrors, training.folder / "code")
    tracker.log(run_id, params={key: value for key, value in arguments.items() if not value.startswith("/")})
    command = [sys.executable, "-c", MLFLOW_RUN, json.dumps(
        {"run_id": run_id, "experiment_name": experiment, "parameters": arguments,
         "storage_dir": str(training.folder / "fetched")})]
    job.log(f"{recipe.name} at {recipe.commit} trains on {version.ref}; its log is {training.log}.")
    job.progress(0, 0, "starting")
    training.start(command, {
        # MLproject's `python` is the one that runs us.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", "GIT_COMMIT": recipe.commit,
        "MLFLOW_TRACKING_URI": tracker.url, "MLFLOW_RUN_ID": run_id, "MLFLOW_EXPERIMENT_NAME": experiment,
        # A server that went away holds a training up for half a minute, not for MLflow's own several.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30", "MLFLOW_DISABLE_TELEMETRY": "true", "ORT_DISABLE_TELEMETRY": "1",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }, training.folder / "code" / recipe.folder)


def _results(training: Training) -> dict[str, Any]:
    """metrics.json of a training that ended well. Raises Invalid for one that did not, with the end of its log, and
    Unavailable when it was only the tracker that failed."""
    code = training.exit_code()
    missing = [name for name in RESULTS if not (training.output / name).is_file()]
    if code == TRY_AGAIN and missing:
        training.forget_end()
        raise Unavailable("The training stopped because MLflow did not answer; run it again, it goes on. "
                          f"{_end_of_log(training)}")
    if code not in (0, TRY_AGAIN):
        how = "was killed from outside (is there enough memory?)" if code is None else f"ended with exit code {code}"
        raise Invalid(f"The training {how}. {_end_of_log(training)}")
    if missing:
        raise Invalid(f"The training ended without an error but left no {', '.join(missing)} in {training.output}; a "
                      f"recipe writes {', '.join(RESULTS)} (docs/adopting.md). {_end_of_log(training)}")
    try:
        metrics = json.loads((training.output / "metrics.json").read_text())
    except ValueError as error:
        raise Invalid(f"{training.output / 'metrics.json'} is not JSON: {error}. {_end_of_log(training)}") from error
    if not isinstance(metrics, dict):
        raise Invalid(f"{training.output / 'metrics.json'} is no JSON object. {_end_of_log(training)}")
    for place, value in _numbers({"metrics.json": metrics, "history.jsonl": training.history()[-1:]}):
        if not math.isfinite(value):
            raise Invalid(f"The training's {place} is {value}: it did not learn. Lower the learning rate or look for "
                          f"damaged frames. {_end_of_log(training)}")
    return metrics


def _end_of_log(training: Training) -> str:
    return f"The end of {training.log}:\n{training.last_lines()}"


def _numbers(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Every number in a JSON value with the path to it."""
    if isinstance(value, (int, float)):
        yield place, value
    elif isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(inner, f"{place} {key}".strip())


def _log_epochs(training: Training, tracker: Tracker, run_id: str) -> None:
    """Gives the run the epochs that the recipe did not log itself."""
    known: dict[str, set[int]] = {}
    for row in training.history():
        numbers = {key: float(value) for key, value in row.items()
                   if key not in ("epoch", "epochs") and isinstance(value, (int, float)) and math.isfinite(value)}
        for key in numbers.keys() - known.keys():
            known[key] = {step for step, _ in tracker.history(run_id, key)}
        missing = {key: value for key, value in numbers.items() if int(row["epoch"]) not in known[key]}
        if missing:
            tracker.log(run_id, metrics=missing, step=int(row["epoch"]))


def _publish(training: Training, name: str, run_id: str, manifest: Manifest, version: DatasetVersion,
             metrics: dict[str, Any], base_model: str | None, store: DatasetStore, blobs: Blobs, tracker: Tracker,
             open_backend: OpenBackend, job: Job) -> dict[str, Any]:
    """Tries the model out, chooses its confidence on the val split and makes it a version in the tracker's registry.

    Leaves the files in `<training>/model` and the final card in `<training>/card.json`, which it returns.
    """
    staged = training.folder / "model"
    staged.mkdir(exist_ok=True)
    files = [file for file in MODEL_FILES if (training.output / file).is_file()]
    for file in files:
        shutil.copyfile(training.output / file, staged / file)
    card = _card(training.output / "card.json", name, {file: file_record(staged / file) for file in files})
    foreign = [label for label in card.labels.labels if label not in manifest.taxonomy]
    if foreign:
        raise Invalid(f"The trained model knows {', '.join(foreign)}, {version.ref} does not; its recipe has to take "
                      "the labels from train.json.")
    report = check_card(card, staged, open_backend)
    job.log(f"The model runs on {report['library']}, {report['device']}, {report['precision']}.")
    chosen, measured = _operating_point(card, staged, manifest, version, metrics, store, blobs, open_backend, job)
    trained_on = {"ref": version.ref, "digest": version.digest}
    if base_model is not None:
        trained_on["base_model"] = base_model
    card = replace(card, decoder={**card.decoder, **chosen}, metrics=measured, trained_on=trained_on, run_id=run_id)
    tracker.log_files(run_id, staged, "model")
    registered = tracker.register(name, run_id, "model", {"dataset": version.ref, "dataset_digest": version.digest,
                                                          "sha256": card.files[card.onnx]["sha256"]})
    record = replace(card, version=registered.version).to_json()
    (staged / "card.json").write_text(json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False))
    tracker.log_files(run_id, staged / "card.json", "model")
    training.write("card.json", record)
    return record


def _operating_point(card: ModelCard, folder: Path, manifest: Manifest, version: DatasetVersion,
                     metrics: dict[str, Any], store: DatasetStore, blobs: Blobs, open_backend: OpenBackend,
                     job: Job) -> tuple[dict[str, Any], dict[str, Any]]:
    """({"confidence": ...} for the card's decoder, its metrics): the one that leaves a person the fewest
    boxes to touch on the val split (evaluation.effort.least_effort).

    Without a val split the recipe's own figures stand, and its threshold where it names one.
    """
    val = manifest.split("val")
    if not any(one.annotations for one in val):
        own = {key: metrics[key] for key in ("map_50_95", "map_50") if isinstance(metrics.get(key), (int, float))}
        held_out = metrics.get("val") if isinstance(metrics.get("val"), dict) else {}
        confidence = held_out.get("best_f1_confidence")
        chosen = {"confidence": round(confidence, 4)} if isinstance(confidence, float) and 0 < confidence < 1 else {}
        return chosen, {**own, "on": "frames the recipe held out of the train split"}
    scored = evaluate(card.ref, version.ref, "val", models=_Unregistered(card, folder), store=store, blobs=blobs,
                      open_backend=open_backend, tracker=None, job=job)
    found = scored.metrics
    measured = {"map_50_95": found.map_50_95, "map_50": found.map_50, "best_f1": found.best_f1,
                "on": f"{version.ref}/val"}
    if not found.best_f1:
        return {}, measured
    # A sample is enough to choose one number by, and the pairing of boxes is not free.
    sample = sorted(val, key=lambda one: one.frame.blob)[:THRESHOLD_FRAMES]
    proposed = {one.frame.name: _annotations(scored.found[one.frame.name], found.labels, card) for one in sample
                if one.frame.name in scored.found}
    confidence, left = least_effort(proposed, {one.frame.name: one.annotations or () for one in sample})
    job.log(f"From confidence {confidence} on its boxes are worth proposing: {left.touched} touches instead of "
            f"{left.boxes_total} drawn boxes on {len(sample)} val frames.")
    return {"confidence": confidence}, measured | {"val_touched": left.touched, "val_boxes": left.boxes_total}


def _annotations(boxes: Detections, labels: Sequence[str], card: ModelCard) -> list[Annotation]:
    return [Annotation(labels[class_id], tuple(map(float, xyxy)), source=card.source, confidence=float(confidence))
            for xyxy, class_id, confidence in zip(boxes.xyxy, boxes.class_id, boxes.confidence)
            if confidence >= THRESHOLDS[0] and xyxy[2] > xyxy[0] and xyxy[3] > xyxy[1]]


@dataclass(frozen=True)
class _Unregistered:
    """As much of a ModelStore as an evaluation asks for, around one model that is in no store yet."""

    only: ModelCard
    files: Path

    def card(self, ref: str) -> ModelCard:
        return self.only

    def folder(self, ref: str) -> Path:
        return self.files


def _card(file: Path, name: str, files: dict[str, dict[str, Any]]) -> ModelCard:
    """The recipe's card under our name; what it notes beside a card's own fields is left out."""
    try:
        record = json.loads(file.read_text())
        spec = dict(record["input"])
        spec["padding"] = str(spec.get("padding", "topleft")).removeprefix("letterbox-")
        spec["pad"] = spec.pop("pad_value", spec.get("pad", 114))
        known = {field.name for field in fields(InputSpec)} | {"width", "height"}
        return ModelCard.from_json({**record, "name": name, "version": "new", "files": files,
                                    "input": {key: value for key, value in spec.items() if key in known}})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Invalid(f"{file} does not describe a model: {error!r}. See docs/adopting.md for its fields.") from error

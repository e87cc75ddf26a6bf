"""Retrain: a published version and a recipe at an exact commit become a tracked run and a registered model."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from workbench.blobs import Blobs
from workbench.dataset import SPLITS, DatasetVersion, Manifest, parse_ref
from workbench.errors import Cancelled, Conflict, Invalid, Unavailable
from workbench.formats.checkout import write_checkout
from workbench.inference.detector import OpenBackend
from workbench.model import MODEL_NAME, ModelCard, parse_model_ref
from workbench.ports import DatasetStore, Job, ModelStore, Tracker
from workbench.recipe import Recipe, check_out, discard, read_recipe
from workbench.repository import check_commit, check_location, fetch, permitted
from workbench.steps.environments import CURRENT, LOCKED, Environment, check_choice, current, locked, read_lock
from workbench.steps.facts import keep, keep_results
from workbench.steps.limits import Limits
from workbench.steps.trained import TRY_AGAIN, log_epochs, publish, results
from workbench.steps.training import Training

RECIPE = "efficientnet_lite0_fcos"
# What people drew on a version (evaluation.primary.task_of) -> the recipe that is offered first for it.
RECIPES = {"boxes": RECIPE, "polygons": "segmentation", "tags": "classification"}
# Threads that read a version once before it is trained on.
READERS = 4
# Begins with a letter or digit, so that no command line reads it as an option.
EXPERIMENT = re.compile(r"[^\W_][\w .:+/-]{0,199}")
METRIC = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,99}")
# `mlflow run` without its command line, whose import takes another 3 s.
MLFLOW_RUN = f"""
import json, sys
from mlflow.exceptions import ExecutionException, MlflowException
from mlflow.projects import run
from mlflow.projects.submitted_run import LocalSubmittedRun
ended = []
LocalSubmittedRun.wait = lambda this: not ended.append(this.command_proc.wait()) and not ended[-1]
try:
    run(".", env_manager="local", **json.loads(sys.argv[1]))
except ExecutionException as error:
    print(error, file=sys.stderr)
    # The command's own code, as a shell tells it; MLflow forgets it. One that we give a meaning to is not the command's.
    code = ended[-1] if ended else 1
    sys.exit(1 if code == {TRY_AGAIN} else code if code > 0 else 128 - code)
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
    primary: str | None = None, lower_is_better: bool = False, environment: str = CURRENT,
    limits: dict[str, int] | None = None, most: Limits = Limits(), secrets: tuple[str, ...] = (),
    rerun_of: str | None = None,
) -> Trained:
    """Trains the recipe, as committed in `project`, on a version; registers the model as `<dataset>-detector@n`.

    The job's id names the training: calling again with the same job goes on where it stopped (the same folder below
    `<home>/trainings`, the same commit, the same run), waits for a training process that outlived its worker instead
    of starting a second one, and returns what there is once it is done.

    params      values for the recipe's own parameters
    base_model  reference of an earlier model of the same recipe to start from, or None
    project     git checkout that holds models/<recipe>/MLproject; its HEAD commit is what runs
    repository  address of another git repository, one that `repositories` (the setting retrain_repositories) permits,
                with the full SHA `commit` and `location`, the folder of the MLproject in it; `recipe` is not used then.
                `commit` alone is one of the project's own
    experiment  name of the MLflow experiment; the data set's name otherwise
    register_as name of the registered model instead of `<dataset>-detector`
    primary     metric that metrics.json has to hold; it and its direction are tags of the run
    environment current or locked (steps/environments)
    limits      of this training (steps/limits), where they are lower than `most`, the settings'
    secrets     blotted out of what the training prints
    rerun_of    id of the run that this one repeats: its model stays with the run, nothing is registered

    Raises Invalid when recipe, parameters or data cannot be trained with, and when the training fails, with the end of
    its log; Cancelled; Unavailable while the tracker does not answer (repeat the job: nothing is lost).
    """
    name = name_for(parse_ref(version_ref)[0], register_as, store, models)
    check_words(experiment, primary)
    outside = check_outside(repository, commit, location)
    check_choice(environment)
    allowed = most.tightened(limits)
    training = Training(home / "trainings" / folder_name(job.id), secrets=secrets)
    with training.held():
        asked = {"version": version_ref, "recipe": recipe, "params": params or {}, "base_model": base_model}
        named = {**outside, "experiment": experiment, "register_as": register_as, "primary": primary,
                 "lower_is_better": lower_is_better or None, "limits": limits or None, "rerun_of": rerun_of}
        # What was not given is left out, as it is in the record of a training from before these existed.
        asked |= {key: value for key, value in named.items() if value is not None}
        begun, done = earlier(training, asked, f"Job {job.id} is already a training", "trained.json")
        if done is not None:
            return Trained(**done)
        chosen, project, address = choose(recipe, outside, begun, project, repositories, home / "recipes", job)
        recipe = chosen.name
        version, manifest = labelled(version_ref, store)
        arguments = arguments_for(chosen, training, params or {}, name, base_model, models)
        if environment == LOCKED:
            read_lock(project, chosen)  # refused before there is a run
        if begun is None:
            training.write("request.json", {"asked": asked, "commit": chosen.commit, "started_at": time.time()})
        experiment = experiment or version.dataset
        tags = {"git_uri": address, "location": location, "primary_metric": primary, "rerun_of": rerun_of,
                "lower_is_better": str(lower_is_better).lower() if primary else None}
        facts = {"recipe": recipe, "repository": address, "commit": chosen.commit, "location": location,
                 "params": params or {}, "dataset": version_ref, "dataset_digest": version.digest,
                 "base_model": base_model, "base_sha256": base_model and sha256_of_base(base_model, models),
                 "seed": arguments.get("seed", chosen.parameters.get("seed", ("", None))[1]),
                 "limits": allowed.to_json(), "experiment": experiment, "register_as": register_as, "primary": primary,
                 "lower_is_better": lower_is_better}
        run_id = tracker.start_run(experiment, f"{recipe} on {version_ref}", {
            "job": job.id, "kind": "rerun" if rerun_of else "training", "dataset": version_ref, "dataset_digest": version.digest,
            "recipe": recipe, "commit": chosen.commit, "person": person, "base_model": base_model or "",
            **{key: value for key, value in tags.items() if value is not None}})
        try:
            if training.exit_code() is None:
                if training.processes():
                    job.log("The training process of an earlier worker is still at work; it goes on.")
                else:
                    start(training, chosen, arguments, project, home / "recipes", manifest, version, blobs, tracker,
                          run_id, job, experiment, choice=environment, limits=allowed,
                          ready=lambda built: keep(tracker, run_id, training, facts, built))
                training.follow(job)
            tracker.log(run_id, metrics={f"used_{key}": value for key, value in (training.read("usage.json") or {}).items()
                                         if isinstance(value, (int, float))})
            metrics = results(training)
            if primary is not None and (isinstance(metrics.get(primary), bool)
                                        or not isinstance(metrics.get(primary), (int, float))):
                raise Invalid(f"metrics.json has no number {primary}, the primary metric asked for; it has "
                              f"{', '.join(map(str, metrics))[:300]}. Ask for one of these, or have the recipe write it.")
            log_epochs(training, tracker, run_id)
            card = training.read("card.json")
            if card is None:
                card = publish(training, name, run_id, manifest, version, metrics, base_model, store, blobs, tracker,
                               open_backend, job, registers=rerun_of is None)
            card = ModelCard.from_json(card)
            if rerun_of is None:
                card = models.register(card, training.folder / "model")
                tracker.set_alias(name, "challenger", card.version)
            keep_results(tracker, run_id, training, {"metrics": metrics, "measured": card.metrics})
        except Unavailable:
            raise
        except Exception as error:
            if not isinstance(error, Cancelled) and training.exit_code() is not None:
                training.write("failed.json", {"error": str(error)})
            tidy(training, project, home / "recipes", keep_output=False)
            tracker.finish_run(run_id, "KILLED" if isinstance(error, Cancelled) else "FAILED")
            raise
        tracker.finish_run(run_id, "FINISHED")
        seconds = training.ended_at() - training.read("request.json")["started_at"]
        trained = Trained(run_id, card.ref if rerun_of is None else "", chosen.commit, version_ref, recipe,
                          round(seconds, 1), card.metrics)
        training.write("trained.json", trained.to_json())
        tidy(training, project, home / "recipes")
        epochs = len(training.history())
        job.progress(epochs, epochs, trained.model)
        return trained


def earlier(folder: Training, asked: dict[str, Any], already: str,
            end: str) -> tuple[str | None, dict[str, Any] | None]:
    """What earlier attempts of a job left in its folder: (the commit they ran, which a repeat runs too, also when the
    project has moved on since; their result, in the file `end`), each None where there is none.

    already  begins the sentence of the Conflict that is raised when the job was asked for something else before

    Raises Invalid, as the first time, when the job has failed.
    """
    before, failed = folder.read("request.json"), folder.read("failed.json")
    if before is not None and before["asked"] != asked:
        raise Conflict(f"{already} of {before['asked']}; start another job for another one.")
    if failed is not None:
        raise Invalid(failed["error"])
    return before and before["commit"], folder.read(end)


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


def tidy(training: Training, project: Path, mirrors: Path, *, keep_output: bool = True) -> None:
    """Removes what can be made again; the model, the run and the log stay."""
    discard(project, mirrors, training.folder / "code")
    training.clear(("data", "data.half", "data.md5.json", "model", "fetched"), keep_output=keep_output)


def check_outside(repository: str | None, commit: str | None, location: str | None) -> dict[str, str | None]:
    """The three by their names. Raises Invalid unless they are given together, or none of them; a commit alone is one
    of the project's own."""
    outside = {"repository": repository, "commit": commit, "location": location}
    if commit is not None and repository is None and location is None:
        check_commit(commit)
    elif len({value is None for value in outside.values()}) > 1:
        raise Invalid("repository, commit and location go together; give all three, or none for the project's own "
                      "recipes.")
    return outside


def labelled(version_ref: str, store: DatasetStore) -> tuple[DatasetVersion, Manifest]:
    """A version and its manifest. Raises Invalid when nothing in its train split is labelled."""
    version, manifest = store.version(version_ref), store.manifest(version_ref)
    if not any(one.annotations for one in manifest.split("train")):
        raise Invalid(f"{version_ref} has no label in its train split. Accept labelled frames, publish a version and "
                      "retrain on that.")
    return version, manifest


def choose(recipe: str, outside: dict[str, str | None], commit: str | None, project: Path, repositories: str,
           mirrors: Path, job: Job) -> tuple[Recipe, Path, str | None]:
    """(the recipe, the git repository it is checked out from, the address of an outside one).

    The project's own `recipe` at `commit`, or at HEAD, unless `outside` names a repository, which is fetched.
    """
    if outside["repository"] is None:
        return read_recipe(project, recipe, commit or outside["commit"]), project, None
    source, place = permitted(outside["repository"], repositories, project), check_location(outside["location"])
    mirror = fetch(source, check_commit(outside["commit"]), place, mirrors, job.check)
    name = source.name if place == "." else place.rpartition("/")[2]
    return read_recipe(mirror, name, outside["commit"], place), mirror, source.address


def folder_name(job_id: str) -> str:
    """A folder name for a job; an id that is no plain word is told apart by its digest."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", job_id):
        return job_id
    return re.sub(r"[^A-Za-z0-9_-]+", "-", job_id)[:48] + "-" + hashlib.sha256(job_id.encode()).hexdigest()[:12]


def sha256_of_base(base_model: str, models: ModelStore) -> str:
    """As its card says and the store has verified."""
    return models.card(base_model).files["weights.pt"]["sha256"]


def arguments_for(recipe: Recipe, training: Training, params: dict[str, Any], name: str, base_model: str | None,
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
    if learns_from_a_teacher(recipe):
        if not isinstance(params.get("teacher"), str):
            raise Invalid(f"Recipe {recipe.name} learns from a teacher: give the parameter teacher, NAME@VERSION of a "
                          "registered model.")
        card = models.card(params["teacher"])
        training.write("teacher.json", card.to_json())
        ours |= {"teacher": str(models.folder(card.ref) / card.onnx), "teacher_card": str(training.folder / "teacher.json")}
        params = {key: value for key, value in params.items() if key != "teacher"}
    return recipe.arguments(params, ours)


def learns_from_a_teacher(recipe: Recipe) -> bool:
    """Whether its MLproject declares `teacher` and `teacher_card`: files of a registered model, which is given as
    teacher=NAME@VERSION; the frames of train that nobody labelled then lie beside the others."""
    return {"teacher", "teacher_card"} <= set(recipe.parameters)


def lay_out(manifest: Manifest, blobs: Blobs, ref: str, data: Path, unlabelled: bool = False) -> None:
    """Writes the frames and labels of a version into `data`, whole or not at all; what is there already stays.

    unlabelled  also those frames of train that nobody looked at

    All of it is then read once: raises Invalid, naming the file, where its content is not what the version says. A
    `data` that is a link is somebody else's, who has looked.
    """
    if data.is_symlink():
        return
    half, written = data.with_name(f"{data.name}.half"), data.with_name(f"{data.name}.md5.json")
    if not (data.exists() and written.exists()):
        for folder in (data, half):
            shutil.rmtree(folder, ignore_errors=True)
        write_checkout(manifest, blobs, half, ref, unlabelled)
        # Labels are written here, so that only a later start can find them changed.
        written.write_text(json.dumps({name: _md5(half / name) for name in _written(half)}))
        half.rename(data)
    said = {f"frames/{one.frame.name}": one.frame.blob for split in SPLITS
            for one in manifest.split(split, labeled_only=not (unlabelled and split == "train"))}
    said |= json.loads(written.read_text())
    with ThreadPoolExecutor(READERS) as readers:
        for name, found in zip(said, readers.map(lambda name: _md5(data / name), said)):
            if found != said[name]:
                shutil.rmtree(data, ignore_errors=True)
                then = ("Restore that blob from the backup of the blob store, then train again."
                        if name.startswith("frames/") else "Train again: it is laid out anew.")
                raise Invalid(f"{name} of {ref} has md5 {found or 'of no file'}, the version says {said[name]}: it was "
                              f"changed or damaged since. {then}")


def _written(folder: Path) -> list[str]:
    """Files of a checkout besides the frames."""
    names = (file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file())
    return [name for name in names if not name.startswith("frames/")]


def _md5(file: Path) -> str:
    try:
        with open(file, "rb") as data:
            return hashlib.file_digest(data, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError:
        return ""


def start(training: Training, recipe: Recipe, arguments: dict[str, str], project: Path, mirrors: Path,
          manifest: Manifest, version: DatasetVersion, blobs: Blobs, tracker: Tracker, run_id: str, job: Job,
          experiment: str, environment: dict[str, str] | None = None, *, choice: str = CURRENT, direct: bool = False,
          limits: Limits = Limits(), own: Environment | None = None,
          ready: Callable[[Environment], dict[str, str]] = lambda built: {}) -> None:
    """Lays out data and code, where they are not there yet, and starts `mlflow run` on them in the environment of that
    `choice`, `own` being the workbench's, when it is known; `environment` is added to what the training gets. `ready` is
    called before it starts and gives the run's tags. With `direct` the same command runs without the seconds that
    MLflow takes to put it together."""
    if recipe.uncommitted:
        job.log(f"Uncommitted changes are left out, commit {recipe.commit[:12]} runs: {', '.join(recipe.uncommitted)}.")
    lay_out(manifest, blobs, version.ref, training.folder / "data", learns_from_a_teacher(recipe))
    check_out(project, recipe.commit, mirrors, training.folder / "code")
    here = training.folder / "code" / recipe.folder
    built = (own or current()) if choice == CURRENT else locked(
        read_lock(project, recipe), here, mirrors.parent / "environments", job, training.secrets)
    tracker.log(run_id, params={key: value for key, value in arguments.items()
                                if not value.startswith(("/", "file:///"))}, tags=ready(built))
    command = ["bash", "-c", recipe.command_line(arguments)] if direct else [sys.executable, "-c", MLFLOW_RUN, json.dumps(
        {"run_id": run_id, "experiment_name": experiment, "parameters": arguments,
         "storage_dir": str(training.folder / "fetched")})]
    job.log(f"{recipe.name} at {recipe.commit} trains on {version.ref}; its log is {training.log}.")
    job.progress(0, 0, "starting")
    training.start(command, {
        # MLproject's `python` is that environment's, and no command of ours takes the place of one it lacks.
        "PATH": os.pathsep.join([str(built.python.parent), *(one for one in os.environ["PATH"].split(os.pathsep)
                                                             if one != str(Path(sys.executable).parent))]),
        "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", "GIT_COMMIT": recipe.commit,
        "MLFLOW_TRACKING_URI": tracker.url, "MLFLOW_RUN_ID": run_id, "MLFLOW_EXPERIMENT_NAME": experiment,
        # A server that went away holds a training up for half a minute, not for MLflow's own several.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30", "MLFLOW_DISABLE_TELEMETRY": "true", "ORT_DISABLE_TELEMETRY": "1",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true", **(environment or {}),
    }, here, limits)

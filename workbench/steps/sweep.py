"""Sweep: many trainings of one recipe on one version, chosen by a search, side by side; the best one is registered."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from workbench.blobs import Blobs
from workbench.capacity import GIB, NEED_BYTES, count_cores
from workbench.dataset import parse_ref
from workbench.errors import Cancelled, Invalid, Unavailable
from workbench.inference.detector import OpenBackend
from workbench.model import ModelCard
from workbench.ports import DatasetStore, Job, ModelStore, Search, Tracker
from workbench.recipe import Recipe, plain
from workbench.search_space import Range, Space, read_space
from workbench.steps.environments import CURRENT, LOCKED, check_choice, read_lock
from workbench.steps.facts import keep_results
from workbench.steps.limits import Limits
from workbench.steps.retrain import (RECIPE, arguments_for, check_outside, check_words, choose, earlier, folder_name,
                                     labelled, lay_out, learns_from_a_teacher, name_for, sha256_of_base)
from workbench.steps.side_by_side import Shared, SideBySide
from workbench.steps.trained import publish, results
from workbench.steps.training import Training
from workbench.steps.trials import Trial, folder_of, tidy

METRIC = "map_50_95"
TRIALS = 1000
# (space, trials=, sampler=, pruner=, seed=, is_maximized=) -> Search
OpenSearch = Callable[..., Search]
# What runs at once learns nothing from each other, so a search that learns keeps most trials for later.
LEARNERS_SHARE = 5


@dataclass(frozen=True)
class Swept:
    """What a sweep gave. model: the best trial's, registered; counts: state -> trials; seconds: of all workers."""

    run_id: str
    model: str
    version: str
    recipe: str
    commit: str
    metric: str
    best: int
    value: float
    params: dict[str, Any]
    counts: dict[str, int]
    seconds: float
    importance: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "trials": sum(self.counts.values()), **self.counts}


def sweep(
    version_ref: str, *, space: dict[str, Any], recipe: str = RECIPE, params: dict[str, Any] | None = None,
    base_model: str | None = None, metric: str = METRIC, lower_is_better: bool = False, trials: int = 20,
    time_limit_s: float = 0, sampler: str = "tpe", pruner: str = "median", seed: int = 0, at_once: int = 0,
    memory_gb: float = 0, store: DatasetStore, blobs: Blobs, tracker: Tracker, models: ModelStore, home: Path, job: Job,
    project: Path, open_backend: OpenBackend, open_search: OpenSearch, person: str, cores: int = 0,
    repository: str | None = None, commit: str | None = None, location: str | None = None, repositories: str = "",
    experiment: str | None = None, register_as: str | None = None, environment: str = CURRENT,
    limits: dict[str, int] | None = None, most: Limits = Limits(), secrets: tuple[str, ...] = (),
) -> Swept:
    """Trains the recipe with many parameters and registers the best model as `<dataset>-detector@n`, a challenger.

    The job's id names the sweep: calling again with the same job goes on where it stopped. A trial is recorded in its
    folder below `<home>/sweeps/<job>/trials` before it starts; one that outlived its worker is followed further, one
    that died with the machine is started again in its folder, finished ones are kept.

    space       what is varied (search_space.read_space); `params` are the values that all trials share
    metric      number in metrics.json (or in history.jsonl) by which trials are compared and, per epoch, pruned
    trials      how many, at most; a space with fewer combinations is tried out
    time_limit_s  seconds of the whole sweep, all workers' together; 0: none. Running trials end with it
    sampler     tpe, random or grid; pruner: median, halving or none
    at_once     trials side by side at most; 0: as many as cores, memory and GPUs allow
    memory_gb   what one trial needs, until it has been measured; 0: workbench.capacity.NEED_BYTES
    cores       threads the trials may use together; 0: all of this machine's
    experiment  name of the MLflow experiment; `<dataset> sweeps` otherwise, so that trials do not bury trainings
    environment, limits, most, secrets  of each trial, as in retrain

    Raises Invalid when the space does not fit the recipe, the data cannot be trained on, or no trial came to its end,
    with the reason of the first that failed; Cancelled, with all processes gone; Unavailable.
    """
    dataset = parse_ref(version_ref)[0]
    name = name_for(dataset, register_as, store, models)
    check_words(experiment, metric)
    outside = check_outside(repository, commit, location)
    check_choice(environment)
    allowed = most.tightened(limits)
    _check_amounts(trials, time_limit_s, at_once, memory_gb, seed)
    read, fixed = read_space(space), params or {}
    trials = min(trials, read.size or trials)
    search = open_search(read, trials=trials, sampler=sampler, pruner=pruner, seed=seed,
                         is_maximized=not lower_is_better)
    whole = Training(home / "sweeps" / folder_name(job.id))
    with whole.held():
        asked = {"version": version_ref, "recipe": recipe, "params": fixed, "space": space, "base_model": base_model,
                 "metric": metric, "lower_is_better": lower_is_better, "trials": trials, "sampler": sampler,
                 "pruner": pruner, "seed": seed, "time_limit_s": time_limit_s, "environment": environment,
                 "limits": limits, **outside}
        begun, done = earlier(whole, asked, f"Job {job.id} is already a sweep", "swept.json")
        if done is not None:
            tidy(whole)
            return Swept(**done)
        chosen, project, address = choose(recipe, outside, begun, project, repositories, home / "recipes", job)
        check_space(read, fixed, chosen)
        version, manifest = labelled(version_ref, store)
        sample = {key: one.low if isinstance(one, Range) else one.values[0] for key, one in read.parameters.items()}
        chosen.command_line(arguments_for(chosen, whole, {**fixed, **sample}, name, base_model, models))
        if environment == LOCKED:
            read_lock(project, chosen)
        if begun is None:
            whole.write("request.json", {"asked": asked, "commit": chosen.commit, "started_at": time.time()})
        if chosen.uncommitted:
            job.log(f"Uncommitted changes are left out, commit {chosen.commit[:12]} runs: "
                    f"{', '.join(chosen.uncommitted)}.")
        tags = {"job": job.id, "kind": "sweep", "dataset": version_ref, "dataset_digest": version.digest,
                "recipe": chosen.name, "commit": chosen.commit, "person": person, "primary_metric": metric,
                "lower_is_better": str(lower_is_better).lower(), "sampler": sampler, "pruner": pruner,
                **({"git_uri": address} if address else {})}
        experiment = experiment or f"{dataset} sweeps"
        run_id = tracker.start_run(experiment, f"sweep of {chosen.name} on {version_ref}", tags)
        tracker.log(run_id, params={**{key: json.dumps(value)[:500] for key, value in space.items()}, **fixed,
                                    "seed of the search": seed})
        lay_out(manifest, blobs, version.ref, whole.folder / "data", learns_from_a_teacher(chosen))
        facts = {"recipe": chosen.name, "repository": address, "commit": chosen.commit, "location": location,
                 "dataset": version_ref, "dataset_digest": version.digest, "base_model": base_model,
                 "base_sha256": base_model and sha256_of_base(base_model, models), "limits": allowed.to_json(),
                 "experiment": experiment, "register_as": register_as, "primary": None, "lower_is_better": False}
        together = at_once or (max(2, math.ceil(trials / LEARNERS_SHARE)) if sampler == "tpe" else trials)
        shared = Shared(chosen, fixed, name, base_model, project, home / "recipes", version, manifest, experiment,
                        run_id, metric, not lower_is_better, trials, time_limit_s, together,
                        int(memory_gb * GIB) or NEED_BYTES, count_cores(cores), environment, allowed, secrets, facts)
        running = SideBySide(whole, shared, search, job, tracker=tracker, models=models, blobs=blobs)
        try:
            running.run()
            best = running.best()
            if best is None:
                raise Invalid(_why_none(running.trials))
            training = Training(folder_of(whole.folder, best.number))
            metrics = results(training)
            card = training.read("card.json") or publish(
                training, name, best.run_id, manifest, version, metrics, base_model, store, blobs, tracker,
                open_backend, job)
            card = models.register(ModelCard.from_json(card), training.folder / "model")
            tracker.set_alias(name, "challenger", card.version)
            keep_results(tracker, best.run_id, training, {"metrics": metrics, "measured": card.metrics})
            tracker.log(run_id, {f"best {key}": value for key, value in best.params.items()}, {"objective": best.value},
                        {"best_run": best.run_id, "best_trial": str(best.number)})
        except Unavailable:
            raise
        except Exception as error:
            if not isinstance(error, Cancelled):
                whole.write("failed.json", {"error": str(error)})
            tracker.finish_run(run_id, "KILLED" if isinstance(error, Cancelled) else "FAILED")
            running.forget_models()
            tidy(whole)
            raise
        tracker.finish_run(run_id, "FINISHED")
        swept = Swept(run_id, card.ref, version_ref, chosen.name, chosen.commit, metric, best.number, best.value,
                      best.params, running.counts(), round(running.spent, 1), search.importance())
        whole.write("swept.json", asdict(swept))
        tidy(whole)
        job.progress(len(running.trials), len(running.trials), swept.model)
        return swept


def check_space(space: Space, fixed: dict[str, Any], recipe: Recipe) -> None:
    """Raises Invalid when a parameter is both fixed and varied, the recipe does not declare it, or a value of it is not
    what the recipe takes."""
    both = sorted(set(space.parameters) & set(fixed))
    if both:
        raise Invalid(f"{', '.join(both)} is both fixed and searched for; leave it in one place.")
    for name, one in space.parameters.items():
        if name not in recipe.parameters:
            raise Invalid(f"Recipe {recipe.name} has no parameter {name} to search for; it has "
                          f"{', '.join(sorted(set(recipe.parameters) - {'data', 'output', 'name', 'base_weights'}))}.")
        kind = recipe.parameters[name][0]
        if isinstance(one, Range) and kind not in ("float", "int"):
            raise Invalid(f"Parameter {name} of recipe {recipe.name} is a {kind}, so a range has no meaning for it; "
                          "give a list of its values.")
        for value in one.values if not isinstance(one, Range) else (one.low, one.high):
            plain(recipe.name, name, kind, value)


def _check_amounts(trials: int, time_limit_s: float, at_once: int, memory_gb: float, seed: int) -> None:
    if not 1 <= trials <= TRIALS:
        raise Invalid(f"A sweep has 1 to {TRIALS} trials, got {trials}.")
    for name, value in (("time_limit_s", time_limit_s), ("at_once", at_once), ("memory_gb", memory_gb), ("seed", seed)):
        if not math.isfinite(value) or value < 0:
            raise Invalid(f"{name} must be 0 or more, got {value}.")


def _why_none(trials: list[Trial]) -> str:
    failed = [one for one in trials if one.state == "failed"]
    if failed and all(one.state == "failed" for one in trials):
        return f"All {len(trials)} trials failed. The first one: {failed[0].reason}"
    told = ", ".join(f"{sum(one.state == state for one in trials)} {state}" for state in ("failed", "pruned", "stopped"))
    return (f"None of the {len(trials)} trials came to its end ({told}). Give the sweep more time or its trials fewer "
            f"epochs.{f' The first failure: {failed[0].reason}' if failed else ''}")

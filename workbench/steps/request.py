"""Request: what is asked of a training, checked as far as that needs no fetching; the arguments of its job come out.

The HTTP service, the page, the command line and the rules that start trainings by themselves all ask here.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from workbench.dataset import VERSION
from workbench.errors import Invalid, NotFound
from workbench.ports import DatasetStore, ModelStore
from workbench.recipe import plain, read_recipe
from workbench.repository import check_commit, check_location, permitted
from workbench.steps.environments import check_choice
from workbench.steps.limits import Limits
from workbench.steps.retrain import RECIPE, check_words, name_for

PARAMETER = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,99}")


def from_repository(
    *, experiment_name: str, git_uri: str, MLproject_location: str, commit_hash: str, dataset_repo: str,
    version: str | None = None, base_model: str | None = None, model_name: str | None = None,
    primary_metric: str | None = None, lower_is_better: bool = False, parameters: Mapping[str, Any] | None = None,
    environment: str | None = None, limits: Mapping[str, int] | None = None, gpu: bool = False,
    repositories: str, project: Path, store: DatasetStore, models: ModelStore,
) -> dict[str, Any]:
    """Arguments of a retrain job for the fields of POST /retrain. Raises Invalid.

    repositories  the setting retrain_repositories
    project       the workbench's own checkout, which may be trained from too
    """
    repository = permitted(git_uri, repositories, project)
    args = {"repository": repository.address, "commit": check_commit(commit_hash),
            "location": check_location(MLproject_location), "experiment": experiment_name}
    check_words(experiment_name, primary_metric)
    for name, value in (parameters or {}).items():
        if not PARAMETER.fullmatch(name):
            raise Invalid("Names in parameters must be letters, digits, _ and -, as the MLproject declares them.")
        # Its kind is not known yet: what reads as a number may be one.
        if not isinstance(value, str) or not _is_number(value):
            plain(repository.name if args["location"] == "." else args["location"], name, "string", value)
    dataset = _dataset(dataset_repo, store)
    args["version"] = f"{dataset}@{_version(dataset, version, store)}"
    _check_base(base_model, models)
    if model_name is not None:
        args["register_as"] = name_for(dataset, model_name, store, models)
    more = {"base_model": base_model, "primary": primary_metric, "params": dict(parameters or {}) or None,
            "lower_is_better": lower_is_better or None, **_how(environment, limits, gpu)}
    return args | {name: value for name, value in more.items() if value is not None}


def from_recipe(version: str, *, recipe: str | None = None, params: Mapping[str, Any] | None = None,
                base_model: str | None = None, environment: str | None = None,
                limits: Mapping[str, int] | None = None, gpu: bool = False, project: Path, store: DatasetStore,
                models: ModelStore) -> dict[str, Any]:
    """Arguments of a retrain job for a recipe of the project. Raises Invalid, NotFound for a recipe there is not.

    version  a data set's name for its latest version, or a reference
    """
    dataset, _, number = version.partition("@")
    chosen = read_recipe(project, recipe or RECIPE)
    unknown = sorted(set(params or {}) - set(chosen.parameters))
    if unknown:
        raise Invalid(f"Recipe {chosen.name} has no parameter {', '.join(unknown)}; it has "
                      f"{', '.join(sorted(chosen.parameters))}.")
    _check_base(base_model, models)
    ref = f"{dataset}@{_version(_dataset(dataset, store), number or None, store)}"
    more = {"params": dict(params or {}) or None, "base_model": base_model, **_how(environment, limits, gpu)}
    return {"dataset": dataset, "version": ref, "recipe": chosen.name,
            **{name: value for name, value in more.items() if value is not None}}


def _how(environment: str | None, limits: Mapping[str, int] | None, gpu: bool) -> dict[str, Any]:
    """What it runs in and may take, where that is asked for."""
    if environment is not None:
        check_choice(environment)
    Limits().tightened(dict(limits or {}))
    return {"environment": environment, "limits": dict(limits or {}) or None, "gpu": gpu or None}


def parameters_of(lines: Iterable[str]) -> dict[str, Any]:
    """Parameters from lines that read NAME=VALUE; empty ones are passed over. Raises Invalid."""
    given: dict[str, Any] = {}
    for line in filter(None, map(str.strip, lines)):
        name, equals, text = (one.strip() for one in line.partition("="))
        if not equals or not name or not text:
            raise Invalid(f"Parameter {line!r} must read NAME=VALUE.")
        given[name] = text
        for kind in (float, int):
            with contextlib.suppress(ValueError):
                given[name] = kind(text)
    return given


def _check_base(base_model: str | None, models: ModelStore) -> None:
    try:
        if base_model is not None:
            models.card(base_model)
    except NotFound as error:
        raise Invalid(str(error)) from error


def _dataset(named: str, store: DatasetStore) -> str:
    """The data set with this name or this repository. Raises Invalid: nothing is fetched from elsewhere."""
    names = store.names()
    if named in names:
        return named
    path = named.removeprefix("file://")
    if path.startswith("/") and path.isprintable():
        real = os.path.realpath(path)
        for name in names:
            if real == os.path.realpath(store.checkout_url(name)):
                return name
    raise Invalid("dataset_repo is no data set of this workbench; give a name or the path of its repository as "
                  f"`GET /v1/datasets` lists them: {', '.join(names[:20]) or 'there are none yet'}.")


def _version(dataset: str, asked: str | None, store: DatasetStore) -> str:
    if asked is None:
        versions = store.versions(dataset)
        if not versions:
            raise Invalid(f"Data set {dataset} has no version yet; publish one first.")
        return versions[0].version
    if not VERSION.fullmatch(asked):
        raise Invalid("version must read MAJOR.MINOR.PATCH, such as 1.0.0, or be left out for the latest one.")
    try:
        return store.version(f"{dataset}@{asked}").version
    except NotFound as error:
        raise Invalid(str(error)) from error


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

"""What to train with: a recipe of the workbench, or the MLproject of another git repository at an exact commit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import streamlit as st

from app import session
from workbench.evaluation.primary import task_of
from workbench.recipe import Recipe, read_recipe, recipes
from workbench.repository import allowed_list
from workbench.steps.request import from_recipe, from_repository, parameters_of
from workbench.steps.retrain import RECIPE, RECIPES
from workbench.wiring import PROJECT

# Given by the workbench, never by a person (steps/retrain.py).
OURS = ("data", "output", "name", "base_weights", "teacher_card")
FIRST = ("epochs", "time_limit_s", "long_side", "batch_size", "lr", "seed", "threads")
NO_MODEL, FROM_RECIPE = "ImageNet weights only", "What the recipe starts with"
OWN, GIT = "A recipe of the workbench", "From a git repository"


@dataclass(frozen=True)
class Asked:
    """A filled form. arguments: of the retrain job; raises Invalid with the sentence that POST /retrain would answer.

    about  what trains, in a few words
    """

    arguments: Callable[[], dict[str, Any]]
    about: str


def form(dataset: str) -> Asked | None:
    """The form; None while there is nothing to train with."""
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        source = st.segmented_control(
            "What trains", [OWN, GIT], default=OWN, required=True, key="retrain_source", label_visibility="collapsed"
        )
        gpu = st.toggle("On a GPU", key="retrain_gpu", help="Waits for a worker that serves the lane gpu.")
    if gpu and session.workbench().jobs.unserved_lane("retrain", {"gpu": True}):
        st.warning(
            "No worker serves the lane gpu now, so what is started here waits until one does: start one on a machine "
            "with an NVIDIA card (docs/operating.md, parallel work on many machines), or switch *On a GPU* off.",
            icon=":material/hourglass_top:",
        )
    return from_git(dataset, gpu) if source == GIT else own(dataset, gpu)


def own(dataset: str, gpu: bool) -> Asked | None:
    wb = session.workbench()
    names = recipes(PROJECT)
    left, right = st.columns([2, 3], gap="large")
    with left:
        version = session.version_picker(dataset)
        usual = RECIPES[_task(version)] if version else RECIPE
        name = session.pick("recipe", "Recipe", sorted(names, key=lambda one: (one != usual, one)))
        if name is None:
            st.info(
                "No recipe is committed in models/. Commit a folder with an MLproject there.", icon=":material/info:"
            )
            return None
        recipe = read_recipe(PROJECT, name)
        bases = _bases() if "base_weights" in recipe.parameters else []
        base = st.selectbox(
            "Start from",
            [NO_MODEL, *bases],
            key="retrain_base",
            help="An earlier student learns on; else from ImageNet.",
        )
        about = PROJECT / "models" / name / "README.md"
        if about.exists():
            with st.expander("About this recipe", icon=":material/description:"):
                st.markdown(about.read_text())
        if recipe.uncommitted:
            st.caption(f"Uncommitted changes are left out: commit `{recipe.commit[:12]}` runs.")
    with right:
        params = parameters(recipe)
    if version is None:
        return None
    return Asked(
        lambda: from_recipe(
            version,
            recipe=name,
            params=params,
            base_model=None if base == NO_MODEL else base,
            gpu=gpu,
            project=PROJECT,
            store=wb.datasets,
            models=wb.models,
        ),
        name,
    )


@st.cache_data(show_spinner=False, max_entries=100)
def _task(version: str) -> str:
    """What people drew on a version, which never changes."""
    return task_of(session.workbench().datasets.manifest(version).frames)


def from_git(dataset: str, gpu: bool) -> Asked | None:
    """The fields of POST /retrain."""
    wb = session.workbench()
    listed = [one.address for one in allowed_list(wb.config.retrain_repositories)]
    left, right = st.columns([3, 2], gap="large")
    with left:
        address = st.text_input(
            "Git address",
            key="git_uri",
            placeholder="https://git.example.org/acme/recipes.git",
            help="Without credentials: git on the worker's machine has its own.",
        )
        st.caption(
            f"Permitted are {', '.join(f'`{one}`' for one in listed)} with all below, and this workbench's checkout."
            if listed
            else "No other repository is permitted yet, only this workbench's own checkout: list some in the setting "
            "`retrain_repositories`."
        )
        one, two = st.columns([1, 2])
        location = one.text_input("Folder of the MLproject", value=".", key="git_location")
        commit = two.text_input(
            "Commit", key="git_commit", max_chars=40, placeholder="40 digits", help="`git rev-parse HEAD` tells it."
        )
        text = st.text_area(
            "Parameters",
            key="git_params",
            height=104,
            placeholder="epochs=20\nlearning_rate=0.01",
            help="One NAME=VALUE a line; what the MLproject declares.",
        )
    with right:
        version = session.version_picker(dataset)
        base = st.selectbox("Start from", [FROM_RECIPE, *_bases()], key="git_base")
        one, two = st.columns(2)
        experiment = one.text_input("Experiment", key="git_experiment", placeholder=dataset)
        model_name = two.text_input("Model name", key="git_model_name", placeholder=f"{dataset}-detector")
        one, two = st.columns(2, vertical_alignment="bottom")
        metric = one.text_input("Primary metric", key="git_metric", placeholder="map_50_95")
        lower = two.toggle("Lower is better", key="git_lower", disabled=not metric)
    if version is None:
        return None

    def arguments() -> dict[str, Any]:
        args = from_repository(
            experiment_name=experiment.strip() or dataset,
            git_uri=address.strip(),
            MLproject_location=location.strip() or ".",
            commit_hash=commit.strip(),
            dataset_repo=dataset,
            version=version.partition("@")[2],
            base_model=None if base == FROM_RECIPE else base,
            model_name=model_name.strip() or None,
            primary_metric=metric.strip() or None,
            lower_is_better=bool(metric) and lower,
            parameters=parameters_of(text.splitlines()),
            gpu=gpu,
            repositories=wb.config.retrain_repositories,
            project=PROJECT,
            store=wb.datasets,
            models=wb.models,
        )
        return {"dataset": dataset, **args}

    place = location.strip().strip("./")
    return Asked(arguments, f"{f'{place} of ' if place else ''}{address.strip() or 'the git repository'}")


def parameters(recipe: Recipe) -> dict[str, Any]:
    """One field for each of the recipe's own parameters; returns those that differ from their default."""
    own = {name: about for name, about in recipe.parameters.items() if name not in OURS}
    first = [name for name in FIRST if name in own]
    rest = [name for name in own if name not in first]
    given: dict[str, Any] = {}
    for names, place in (
        (first, st.container()),
        (rest, st.expander(f"{len(rest)} more parameters") if rest else None),
    ):
        for index, name in enumerate(names):
            if index % 4 == 0:
                columns = place.columns(4)
            kind, default = own[name]
            key = f"param_{recipe.name}_{name}"
            if kind in ("float", "int"):
                value = columns[index % 4].number_input(
                    name, value=float(default or 0), format="%g", key=key, step=_step(float(default or 0))
                )
            else:
                value = columns[index % 4].text_input(name, value=str(default or ""), key=key, max_chars=200)
            if value != (float(default or 0) if kind in ("float", "int") else str(default or "")):
                given[name] = int(value) if isinstance(value, float) and value.is_integer() else value
    return given


def _step(default: float) -> float:
    """What a click on + adds: 1 to a whole number, else about a tenth of the value (0.0001 to 0.0015)."""
    return 1.0 if default.is_integer() else 10.0 ** (math.floor(math.log10(abs(default))) - 1)


def summary(training: dict[str, Any]) -> str:
    """What a retrain job's arguments train, in a few words."""
    what = training.get("recipe") or f"{training.get('location')} of {training.get('repository')}"
    params = ", ".join(f"{name} {value}" for name, value in (training.get("params") or {}).items())
    commit = f" at {training['commit'][:12]}" if training.get("commit") else ""
    name = f", registered as {training['register_as']}" if training.get("register_as") else ""
    place = " on a GPU" if training.get("gpu") else ""
    return f"{what}{commit}{f' with {params}' if params else ''}{place}{name}"


def _bases() -> list[str]:
    models = session.workbench().models
    return [ref for ref in models.refs() if "weights.pt" in models.card(ref).files]

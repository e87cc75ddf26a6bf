"""Many trainings of one recipe, chosen by a search and run side by side; the best one is registered."""

from __future__ import annotations

import json
from typing import Any

import streamlit as st

from app import scores, session, sweep_charts, times
from app.sweep_charts import BEST, Line
from app.training_form import GIT, OWN, Asked, form
from workbench.errors import Invalid
from workbench.evaluation.primary import PRIMARY
from workbench.jobs import JobStatus
from workbench.recipe import read_recipe
from workbench.search_space import Space, read_space, suggest
from workbench.steps.retrain import folder_name
from workbench.steps.sweep import METRIC, TRIALS, check_space
from workbench.steps.training import Training
from workbench.steps.trials import Trial, curve, folder_of, read_trials
from workbench.wiring import PROJECT

SAMPLERS = {"tpe": "by TPE", "random": "at random", "grid": "from a grid"}
PRUNERS = {"median": "below the median", "halving": "not in a top third", "none": "never"}
SHOWN = 50
FORM_HELP = (
    'A list of values, or a range: `{"low": 0.0001, "high": 0.01, "log": true}`, with `"step"` for a grid. '
    "What stands here is left out of the parameters above."
)


def start(dataset: str) -> None:
    """What trains, what is varied, how, and the button."""
    with st.expander("New sweep", icon=":material/add:", expanded=not sweeps_of(dataset)):
        asked = form(dataset)
        if asked is None:
            session.empty("A sweep trains on a published version.", "versions", "Versions", "commit")
            return
        is_git = st.session_state.get("retrain_source", OWN) == GIT
        left, right = st.columns([4, 5], gap="large")  # a range of the space fits into a line
        with left:
            space = search_space(asked, is_git)
        with right:
            how = choices(is_git)
        job = session.watched("sweep", dataset)
        is_busy = job is not None and not job.is_over
        if st.button(
            "Start sweep",
            type="primary",
            icon=":material/tune:",
            disabled=is_busy or space is None,
            help="A sweep runs: see below." if is_busy else None,
            key="sweep_go",
        ):
            with session.explained():
                job_id = session.submit("sweep", arguments(dataset, asked, space, how, is_git))
                if job_id:
                    st.session_state["chosen_sweep"] = job_id
                    st.rerun()


def search_space(asked: Asked, is_git: bool) -> dict[str, Any] | None:
    """What is typed into the field, once it can be read; it begins with what the recipe's parameters suggest."""
    recipe = None if is_git else read_recipe(PROJECT, asked.about)
    proposed = suggest(recipe.parameters if recipe else {"learning_rate": ("float", 0.01)})
    text = st.text_area(
        "Search space",
        "{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(one)}" for name, one in proposed.items()) + "\n}",
        key=f"sweep_space_{recipe.name if recipe else 'git'}",
        height=174,
        help=FORM_HELP,
    )
    with session.explained():
        try:
            space = json.loads(text)
        except ValueError as error:
            raise Invalid(f"The search space is not JSON: {error}. Check quotes and commas.") from error
        read = read_space(space)
        if recipe is not None:
            check_space(read, {}, recipe)
        st.caption("No end of combinations." if read.size is None else f"{read.size} combinations.")
        return space
    return None


def choices(is_git: bool) -> dict[str, Any]:
    """How the search goes, as arguments of the job; only what differs from the step's own default."""
    one, two, three = st.columns(3)
    trials = one.number_input("Trials, at most", 1, TRIALS, 20, key="sweep_trials")
    minutes = two.number_input("Minutes, at most", 0.0, value=0.0, step=10.0, format="%g", key="sweep_minutes",
                               help="Of the whole sweep; 0: no end.")
    at_once = three.number_input("Side by side, at most", 0, TRIALS, 0, key="sweep_at_once",
                                 help="0: as many as cores, memory and GPUs allow.")
    one, two, three = st.columns(3)
    sampler = one.selectbox("Trials are chosen", list(SAMPLERS), format_func=SAMPLERS.get, key="sweep_sampler")
    pruner = two.selectbox("Ended early when", list(PRUNERS), format_func=PRUNERS.get, key="sweep_pruner",
                           help="What other trials had reached after as many epochs, by the metric in history.jsonl.")
    seed = three.number_input("Seed of the search", 0, 2**31, 0, key="sweep_seed")
    how = {"trials": trials, "time_limit_s": 60 * minutes, "at_once": at_once, "sampler": sampler, "pruner": pruner,
           "seed": seed}
    if is_git:
        st.caption(f"Compared by the primary metric above, {METRIC} where none is given.")
        return how
    one, two = st.columns([2, 1], vertical_alignment="bottom")
    usual = scores.metric_of(st.session_state["pick_version"])
    metric = one.selectbox("Compared by", list(PRIMARY), list(PRIMARY).index(usual), accept_new_options=True,
                           key=f"sweep_metric_{usual}", help="A number that the recipe writes into history.jsonl and "
                           "metrics.json. Another one may be typed in.")
    return how | {"metric": metric or usual, "lower_is_better": two.toggle("Lower is better", key="sweep_lower")}


def arguments(dataset: str, asked: Asked, space: dict[str, Any], how: dict[str, Any], is_git: bool) -> dict[str, Any]:
    """Of the sweep job. Raises Invalid, as the form does."""
    args = asked.arguments()
    if is_git:
        how["metric"], how["lower_is_better"] = args.pop("primary", METRIC), args.pop("lower_is_better", False)
        if args.get("experiment") == dataset:
            args.pop("experiment")  # a sweep has an experiment of its own
    fixed = {name: value for name, value in (args.pop("params", None) or {}).items() if name not in space}
    return {**args, "space": space, **how, **({"params": fixed} if fixed else {})}


def sweeps_of(dataset: str) -> list[JobStatus]:
    """Newest first."""
    found = session.workbench().jobs.list(limit=10 * SHOWN, kind="sweep")
    return [one for one in found if session.dataset_of(one) == dataset][:SHOWN]


def results(dataset: str) -> None:
    """One sweep, as it goes or as it went."""
    found = {one.id: one for one in sweeps_of(dataset)}
    if not found:
        session.empty("No sweep yet. It trains a recipe with many parameters and keeps the best model.")
        return
    session.watched("sweep", dataset)
    chosen = session.pick("sweep", "Sweep", list(found), lambda name: told(found[name]))
    job = found[chosen]
    session.job_panel(job)
    space = read_space(job.args["space"])
    if job.state == "done" and job.result:
        best(job, job.result)

    @st.fragment(run_every=None if job.is_over else 3)
    def trials() -> None:
        with session.explained():
            draw(job, space)

    trials()


def told(job: JobStatus) -> str:
    what = job.args.get("recipe") or job.args.get("location") or "the workbench's recipe"
    return f"{times.clock(job.created_at)} · {what} on {job.args['version']} · {job.state}"


def best(job: JobStatus, result: dict[str, Any]) -> None:
    """The winner, and what may be done with it."""
    params = ", ".join(f"{name} {sweep_charts.short(value)}" for name, value in result["params"].items())
    with st.container(border=True):
        left, middle, right = st.columns([4, 1, 1], vertical_alignment="center")
        left.markdown(
            f":material/trophy: **{session.literal(result['model'])}** is trial {result['best']} with "
            f"{session.literal(result['metric'])} **{result['value']:.4g}**: {session.literal(params)}."
        )
        if middle.button("Promote …", icon=":material/trophy:", type="primary", key="sweep_promote", width="stretch",
                         help="Let it challenge the champion."):
            session.go("retrain", candidate=result["model"])
        right.button("Retrain …", icon=":material/model_training:", key="sweep_again", on_click=fill, args=(job,),
                     width="stretch", help="Fills the form of Retrain with these, where it may train for longer.")
    if result.get("importance"):
        left, _ = st.columns(2)
        left.markdown("**What made the difference**")
        left.altair_chart(sweep_charts.importance(result["importance"]), key=f"importance_{job.id}")


def fill(job: JobStatus) -> None:
    """Notes what the form on the page Retrain is to hold; the page is left before any of its fields is drawn here."""
    args, found = job.args, {**(job.args.get("params") or {}), **job.result["params"]}
    if args.get("repository"):
        filled = {"retrain_source": GIT, "git_uri": args["repository"], "git_location": args["location"],
                  "git_commit": args["commit"],
                  "git_params": "\n".join(f"{name}={value}" for name, value in found.items())}
    else:
        filled = {"retrain_source": OWN, "chosen_recipe": job.result["recipe"],
                  **{f"param_{job.result['recipe']}_{name}": value if isinstance(value, str) else float(value)
                     for name, value in found.items()}}
    st.session_state["sweep_fills"] = {**filled, "retrain_gpu": args.get("gpu") is True}


def leave_filled() -> None:
    """To the page Retrain, when `fill` asked for it."""
    filled = st.session_state.pop("sweep_fills", None)
    if filled:
        for key, value in filled.items():
            st.session_state[key] = value
        session.go("retrain")


def draw(job: JobStatus, space: Space) -> None:
    """Charts and table of all trials begun so far."""
    folder = session.workbench().config.home / "sweeps" / folder_name(job.id)
    metric, is_lower = job.args.get("metric") or METRIC, bool(job.args.get("lower_is_better"))
    trials = read_trials(folder)
    if not trials:
        if not job.is_over:
            st.caption("Trials appear here as soon as they begin.")
        return
    lines = lines_of(trials, folder, metric, is_lower)
    has_points = any(line.points for line in lines)
    left, right = st.columns(2)
    with left:
        st.markdown("**Learning curves**")
        if has_points:
            st.altair_chart(sweep_charts.curves(lines, metric), key=f"curves_{job.id}")
        else:
            st.caption("Curves appear after the first epoch." if not job.is_over else
                       f"No epoch in history.jsonl has a number {metric}.")
    with right:
        st.markdown("**Parameters and what they led to**")
        st.altair_chart(sweep_charts.parallel(lines, space, metric), key=f"parallel_{job.id}")
    table(trials, lines, metric, is_lower)


def lines_of(trials: list[Trial], folder: Any, metric: str, is_lower: bool) -> list[Line]:
    """Each trial as it is drawn; the best is the best complete one."""
    complete = [one for one in trials if one.state == "complete"]
    first = min(complete, key=lambda one: (one.value if is_lower else -one.value, one.number), default=None)
    lines = []
    for one in trials:
        points = curve(Training(folder_of(folder, one.number)), metric)
        reached = one.value if one.value is not None else points[-1][1] if points else None
        lines.append(Line(one.number, BEST if one is first else one.state, one.params, points, reached))
    return lines


def table(trials: list[Trial], lines: list[Line], metric: str, is_lower: bool) -> None:
    """Best first, then what still runs or did not come to its end."""
    order = {BEST: 0, "complete": 1, "running": 2}
    rows = sorted(
        zip(trials, lines),
        key=lambda pair: (order.get(pair[1].kind, 3), 0 if pair[1].value is None else
                          pair[1].value if is_lower else -pair[1].value, pair[0].number),
    )
    st.dataframe(
        [
            {
                "trial": trial.number,
                "state": line.kind,
                metric: line.value,
                "epochs": len(line.points),
                **{name: value for name, value in trial.params.items()},
                "took": times.duration(trial.started_at, None if trial.state == "running"
                                       else trial.started_at + trial.seconds),
                "why": trial.reason.partition("\n")[0],
            }
            for trial, line in rows
        ],
        hide_index=True,
        placeholder="–",
        column_config={metric: st.column_config.NumberColumn(format="%.4g"),
                       **{name: st.column_config.NumberColumn(format="%.4g") for name, value in trials[0].params.items()
                          if isinstance(value, float)}},
    )


leave_filled()
dataset = session.header(
    "Sweeps",
    "Many trainings of one recipe, side by side, each with other parameters; the best model becomes the challenger.",
)
if dataset is None:
    session.empty("No data set yet. A sweep trains on a published version.", "upload", "Upload frames", "upload")
else:
    with session.explained():
        start(dataset)
    with session.explained():
        results(dataset)

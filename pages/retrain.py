"""A version and a recipe become a student; challenger and champion meet on the same test split."""

from __future__ import annotations

from typing import Any

import streamlit as st

from app import charts, session, times
from workbench.jobs import JobStatus
from workbench.recipe import Recipe, read_recipe, recipes
from workbench.records import Entry
from workbench.steps.deploy import champion_of
from workbench.steps.retrain import model_name
from workbench.steps.rollback import earlier
from workbench.steps.training import Training
from workbench.wiring import PROJECT

# Given by the workbench, never by a person (steps/retrain.py).
OURS = ("data", "output", "name", "base_weights")
FIRST = ("epochs", "time_limit_s", "long_side", "batch_size", "lr", "seed", "threads")
NO_MODEL = "ImageNet weights only"


def start(dataset: str) -> None:
    """The form: version, recipe, parameters with their defaults, and the button."""
    wb = session.workbench()
    names = recipes(PROJECT)
    left, right = st.columns([2, 3], gap="large")
    with left:
        version = session.version_picker(dataset)
        name = session.pick("recipe", "Recipe", names)
        if name is None:
            st.info(
                "No recipe is committed in models/. Commit a folder with an MLproject there.", icon=":material/info:"
            )
            return
        recipe = read_recipe(PROJECT, name)
        bases = (
            [NO_MODEL, *(ref for ref in wb.models.refs() if "weights.pt" in wb.models.card(ref).files)]
            if "base_weights" in recipe.parameters
            else [NO_MODEL]
        )
        base = st.selectbox(
            "Start from", bases, key="retrain_base", help="An earlier student learns on; else from ImageNet."
        )
        about = PROJECT / "models" / name / "README.md"
        if about.exists():
            with st.expander("About this recipe", icon=":material/description:"):
                st.markdown(about.read_text())
        if recipe.uncommitted:
            st.caption(f"Uncommitted changes are left out: commit `{recipe.commit[:12]}` runs.")
    with right:
        params = parameters(recipe)
    job = session.watched("retrain", dataset)
    is_busy = job is not None and not job.is_over
    if version and st.button(
        "Start training",
        type="primary",
        icon=":material/model_training:",
        disabled=is_busy,
        help="A training runs: see below." if is_busy else None,
        key="retrain_go",
    ):
        if session.submit(
            "retrain",
            {
                "dataset": dataset,
                "version": version,
                "recipe": name,
                "params": params,
                "base_model": None if base == NO_MODEL else base,
            },
        ):
            st.rerun()


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
                    name, value=float(default or 0), format="%g", key=key, step=None
                )
            else:
                value = columns[index % 4].text_input(name, value=str(default or ""), key=key, max_chars=200)
            if value != (float(default or 0) if kind in ("float", "int") else str(default or "")):
                given[name] = int(value) if isinstance(value, float) and value.is_integer() else value
    return given


def training(job: JobStatus) -> None:
    """The job as it goes, with its curves."""
    session.job_panel(job)

    @st.fragment(run_every=None if job.is_over else 3)
    def curves() -> None:
        rows = Training(session.workbench().config.home / "trainings" / job.id).history()
        numbers = {name for row in rows for name, value in row.items() if isinstance(value, (int, float))}
        scores = {name: points(rows, name) for name in ("map_50_95", "map_50") if name in numbers}
        losses = {name: points(rows, name) for name in sorted(numbers) if "loss" in name}
        if not scores and not losses:
            if not job.is_over:
                st.caption("Curves appear after the first epoch.")
            return
        left, right = st.columns(2)
        if scores:
            left.altair_chart(charts.learning(scores, "score"), key=f"scores_{job.id}")
        if losses:
            right.altair_chart(charts.learning(losses, "loss"), key=f"losses_{job.id}")

    curves()
    if job.state == "done" and job.result:
        st.success(
            f"{job.result.get('model')} is registered. Let it challenge the champion below.",
            icon=":material/check_circle:",
        )


def points(rows: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(row["epoch"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]


def past_runs(dataset: str) -> None:
    tracker = session.workbench().tracker
    with session.explained():
        runs = tracker.runs(dataset)
        if not runs:
            st.caption("No training yet.")
            return
        # All runs of a data set are in one experiment: one question gives the address of each.
        first = runs[0]["run_id"]
        address = tracker.run_url(first)
        st.dataframe(
            [
                {
                    "started": times.clock(run["started_at"]),
                    "run": run["name"],
                    "state": run["status"].lower(),
                    "took": times.duration(run["started_at"], run["finished_at"]),
                    "mAP@[.5:.95]": run["metrics"].get("map_50_95"),
                    "mAP50": run["metrics"].get("map_50"),
                    "person": run["tags"].get("person", ""),
                    "open": address.replace(first, run["run_id"]),
                }
                for run in runs
            ],
            hide_index=True,
            placeholder="–",
            column_config={
                "mAP@[.5:.95]": st.column_config.NumberColumn(format="%.3f"),
                "mAP50": st.column_config.NumberColumn(format="%.3f"),
                "open": st.column_config.LinkColumn("MLflow", display_text="open run"),
            },
        )


def promote(dataset: str) -> None:
    """Challenger against champion, now, on the test split; then the history of decisions, and deploy."""
    wb = session.workbench()
    mine = model_name(dataset)
    own = sorted((ref for ref in wb.models.refs() if ref.partition("@")[0] == mine), key=_number, reverse=True)
    history = wb.records.entries("promotions", dataset)
    champion = champion_of(dataset, wb.records)
    if not own:
        session.empty("There is no student to promote yet: train one first.")
        return
    left, middle, right = st.columns([2, 2, 1], vertical_alignment="bottom")
    with left:
        candidate = session.pick(
            "candidate", "Challenger", own, lambda ref: f"{ref} · champion" if ref == champion else ref
        )
    with middle:
        version = session.version_picker(dataset, "Scored on the test split of", name="promote_version")
    job = session.watched("promote", dataset)
    if right.button(
        "Promote if better",
        type="primary",
        icon=":material/trophy:",
        width="stretch",
        key="promote_go",
        disabled=version is None or (job is not None and not job.is_over),
        help="Both models are scored now, on the same frames; the challenger leads when it is surely better.",
    ):
        if session.submit("promote", {"dataset": dataset, "candidate": candidate, "version": version}):
            st.rerun()
    if job:
        session.job_panel(job)
        if job.state == "done":
            verdict(job.result or {})
    if champion:
        deploy(dataset, champion)
    roll_back(dataset, champion)
    if history:
        decisions(history)
        champion_on(dataset)


def verdict(facts: dict[str, Any]) -> None:
    """Both scores of a decision, side by side."""
    challenger, champion = facts.get("challenger") or {}, facts.get("champion") or {}
    one, two, three = st.columns([1, 1, 2], vertical_alignment="center")
    new, old = challenger.get("map_50_95"), champion.get("map_50_95")
    one.metric(
        "challenger mAP@[.5:.95]",
        "–" if new is None else f"{new:.3f}",
        None if new is None or old is None else f"{new - old:+.3f}",
    )
    two.metric("champion before", "none" if not champion else "–" if old is None else f"{old:.3f}")
    with three:
        told = session.literal(str(facts.get("reason", "")))
        if facts.get("promoted"):
            st.success(told, icon=":material/trophy:")
        else:
            st.info(told, icon=":material/shield:")


def deploy(dataset: str, champion: str) -> None:
    deployed = session.workbench().records.deployed(dataset)
    with st.container(border=True, horizontal=True, vertical_alignment="center"):
        if deployed == champion:
            st.markdown(
                f":material/rocket_launch: **{session.literal(champion)}** is champion and annotates the next upload."
            )
            session.link("annotate", "Annotate", "auto_awesome")
        else:
            now = session.literal(deployed) if deployed else "no model"
            st.markdown(
                f":material/trophy: **{session.literal(champion)}** is champion; {now} annotates the next upload."
            )
            if st.button("Deploy the champion", type="primary", icon=":material/rocket_launch:", key="deploy_go"):
                if session.submit("deploy", {"dataset": dataset, "model": champion}):
                    st.rerun()
    job = session.watched("deploy", dataset)
    if job and job.state != "done":
        session.job_panel(job)


def roll_back(dataset: str, champion: str | None) -> None:
    """The champion before leads again: a click, and a second one that says which."""
    before = earlier(dataset, session.workbench().records)
    job = session.watched("rollback", dataset)
    if before and champion:
        with st.popover("Roll back", icon=":material/undo:", disabled=job is not None and not job.is_over):
            st.markdown(
                f"**{session.literal(before.subject)}** was champion before **{session.literal(champion)}** and takes "
                "its place again. Nothing is measured; what annotates stays until you deploy."
            )
            if st.button("Yes, make it champion again", type="primary", key="rollback_go"):
                if session.submit("rollback", {"dataset": dataset, "to": before.subject}):
                    st.rerun()
    if job and job.state == "done":
        st.success(session.literal(str((job.result or {}).get("reason", ""))), icon=":material/undo:")
    elif job:
        session.job_panel(job)


def champion_on(dataset: str) -> None:
    day = st.date_input("Who was champion on", value=None, key="champion_on", format="YYYY-MM-DD", width=220)
    if day:
        found = champion_of(dataset, session.workbench().records, day.isoformat())
        told = f"**{session.literal(found)}** was champion" if found else "There was no champion"
        st.markdown(f"{told} at the end of {day.isoformat()} (UTC).")


def decisions(history: list[Entry]) -> None:
    def score(one: Entry, side: str, key: str = "map_50_95") -> float | None:
        return (one.facts.get(side) or {}).get(key)

    def decided(one: Entry) -> str:
        if one.facts.get("rollback"):
            return "champion again"
        return "champion" if one.facts.get("promoted") else "stays out"

    def within(one: Entry) -> str | None:
        interval = one.facts.get("interval")
        return f"{interval[0]:+.3f} to {interval[1]:+.3f}" if interval else None

    st.markdown("**Decisions**")
    st.dataframe(
        [
            {
                "when": times.clock(one.at),
                "challenger": one.subject,
                "decision": decided(one),
                "challenger mAP": score(one, "challenger"),
                "champion mAP": score(one, "champion"),
                "difference, 95 %": within(one),
                "challenger mAP50": score(one, "challenger", "map_50"),
                "test frames of": str(one.facts.get("version", "")),
                "person": one.person,
                "why": str(one.facts.get("reason", "")),
            }
            for one in history
        ],
        hide_index=True,
        placeholder="–",
        column_config={
            name: st.column_config.NumberColumn(format="%.3f")
            for name in ("challenger mAP", "champion mAP", "challenger mAP50")
        },
    )


def _number(ref: str) -> tuple[int, str]:
    version = ref.partition("@")[2]
    return (int(version) if version.isdigit() else 0, ref)


dataset = session.header(
    "Retrain and promote",
    "A student learns from a version; if it beats the champion on the untouched test split, it takes its place.",
)
if dataset is None:
    session.empty("No data set yet. Students learn from a published version.", "upload", "Upload frames", "upload")
else:
    with session.explained():
        start(dataset)
    with session.explained():
        job = session.watched("retrain", dataset)
        if job:
            training(job)
    st.subheader("Promote and deploy", anchor=False)
    with session.explained():
        promote(dataset)
    st.subheader("Trainings", anchor=False)
    past_runs(dataset)

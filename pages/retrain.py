"""A version and a recipe become a student; challenger and champion meet on the same test split."""

from __future__ import annotations

from typing import Any

import streamlit as st

from app import charts, rules, session, times
from app.scores import NAMES, of_runs
from app.training_form import Asked, form
from workbench.jobs import JobStatus
from workbench.model import ModelCard
from workbench.records import Entry
from workbench.steps.deploy import champion_of, is_served_by
from workbench.steps.retrain import model_name
from workbench.steps.rollback import earlier
from workbench.steps.training import Training

# What may follow a promotion (steps/redeploy), as the page says it.
THEN = {"deploy": "Deploy it", "int8": "in INT8, if certified", "cvat": "also in CVAT"}


def start(dataset: str) -> Asked | None:
    """What to train with, the button, and what may start it by itself. Returns the filled form."""
    asked = form(dataset)
    job = session.watched("retrain", dataset)
    is_busy = job is not None and not job.is_over
    if asked and st.button(
        "Start training",
        type="primary",
        icon=":material/model_training:",
        disabled=is_busy,
        help="A training runs: see below." if is_busy else None,
        key="retrain_go",
    ):
        with session.explained():
            if session.submit("retrain", asked.arguments()):
                st.rerun()
    return asked


def training(job: JobStatus) -> None:
    """The job as it goes, with its curves."""
    session.job_panel(job)

    @st.fragment(run_every=None if job.is_over else 3)
    def curves() -> None:
        rows = Training(session.workbench().config.home / "trainings" / job.id).history()
        numbers = {name for row in rows for name, value in row.items() if isinstance(value, (int, float))}
        scores = {name: points(rows, name) for name in NAMES if name in numbers}
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
        columns = of_runs(runs)
        st.dataframe(
            [
                {
                    "started": times.clock(run["started_at"]),
                    "run": run["name"],
                    "state": run["status"].lower(),
                    "took": times.duration(run["started_at"], run["finished_at"]),
                    **{name: run["metrics"].get(metric) for metric, name in columns.items()},
                    "person": run["tags"].get("person", ""),
                    "open": address.replace(first, run["run_id"]),
                }
                for run in runs
            ],
            hide_index=True,
            placeholder="–",
            column_config={
                **{name: st.column_config.NumberColumn(format="%.3f") for name in columns.values()},
                "open": st.column_config.LinkColumn("MLflow", display_text="open run"),
            },
        )


def promote(dataset: str) -> None:
    """Challenger against champion, now, on the test split; then what follows, rollback and the history of decisions."""
    wb = session.workbench()
    students = students_of(dataset)
    history = wb.records.entries("promotions", dataset)
    if not students:
        session.empty("There is no student to promote yet: train one first.")
        return
    champions = {name: champion_of(dataset, wb.records, name=name) for name in {one.name for one in students}}
    left, middle, right = st.columns([2, 2, 1], vertical_alignment="bottom")
    with left:
        candidate = session.pick(
            "candidate",
            "Challenger",
            [one.ref for one in students],
            lambda ref: f"{ref} · champion" if ref in champions.values() else ref,
        )
    with middle:
        version = session.version_picker(dataset, "Scored on the test split of", name="promote_version")
    then = st.pills(
        "When it leads",
        list(THEN),
        selection_mode="multi",
        format_func=THEN.get,
        key="promote_then",
        help="In INT8 it is deployed when its certificate passes, else in FP32; in CVAT it takes the place of earlier "
        "champions.",
    )
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
        asked = {"dataset": dataset, "candidate": candidate, "version": version}
        if session.submit("promote", asked | ({"then": then} if then else {})):
            st.rerun()
    if job:
        session.job_panel(job)
        if job.state == "done":
            verdict(job.result or {})
    name = str(candidate).partition("@")[0]
    champion = champions.get(name)
    if champion:
        deploy(dataset, champion)
    redeployed(dataset)
    roll_back(dataset, name, champion)
    if history:
        decisions(history)
        champion_on(dataset, name)


def students_of(dataset: str) -> list[ModelCard]:
    """Models that may be promoted: those trained here on the data set, under whatever name; newest first, those of
    `<data set>-detector` before others. INT8 versions follow their origin."""
    models, mine = session.workbench().models, model_name(dataset)
    cards = [models.card(ref) for ref in models.refs()]
    found = [
        one
        for one in cards
        if not one.quantization
        and (one.name == mine or (one.run_id and one.trained_on.get("ref", "").partition("@")[0] == dataset))
    ]
    return sorted(found, key=lambda one: (one.name == mine, one.name, _number(one.ref)), reverse=True)


def verdict(facts: dict[str, Any]) -> None:
    """Both scores of a decision, side by side."""
    challenger, champion = facts.get("challenger") or {}, facts.get("champion") or {}
    one, two, three = st.columns([1, 1, 2], vertical_alignment="center")
    primary = facts.get("primary") or "map_50_95"
    new, old = challenger.get(primary), champion.get(primary)
    one.metric(
        f"challenger {NAMES.get(primary, primary)}",
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
        if is_served_by(champion, deployed):
            form = "" if deployed == champion else f" as {session.literal(deployed)}"
            st.markdown(
                f":material/rocket_launch: **{session.literal(champion)}** is champion and annotates the next "
                f"upload{form}."
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


def redeployed(dataset: str) -> None:
    """What follows a promotion or a rollback, stage by stage."""
    for kind in ("promote", "rollback"):
        before = session.watched(kind, dataset)
        if before and (before.result or {}).get("redeploy"):
            st.session_state["job_redeploy"] = before.result["redeploy"]
    job = session.watched("redeploy", dataset)
    if job is None:
        return
    if job.state != "done":
        session.job_panel(job)
        return
    with st.container(border=True):
        st.markdown(f"**What followed** · {times.clock(job.finished_at)}")
        for stage in (job.result or {}).get("stages", []):
            icon = "warning" if stage.get("passed") is False else "check_circle"
            st.markdown(f":material/{icon}: {session.literal(stage['told'])}")


def roll_back(dataset: str, name: str, champion: str | None) -> None:
    """The champion before leads again: a click, and a second one that says which."""
    before = earlier(dataset, session.workbench().records, name)
    job = session.watched("rollback", dataset)
    if before and champion:
        with st.popover("Roll back", icon=":material/undo:", disabled=job is not None and not job.is_over):
            st.markdown(
                f"**{session.literal(before.subject)}** was champion before **{session.literal(champion)}** and takes "
                "its place again. Nothing is measured."
            )
            back = st.checkbox(
                "Bring back what was deployed with it",
                key="rollback_back",
                help="What annotated here, and what CVAT was shown of it, before the present champion led. Else what "
                "annotates stays until you deploy.",
            )
            if st.button("Yes, make it champion again", type="primary", key="rollback_go"):
                asked = {"dataset": dataset, "to": before.subject}
                if session.submit("rollback", asked | ({"bring_back": True} if back else {})):
                    st.rerun()
    if job and job.state == "done":
        st.success(session.literal(str((job.result or {}).get("reason", ""))), icon=":material/undo:")
    elif job:
        session.job_panel(job)


def champion_on(dataset: str, name: str) -> None:
    day = st.date_input("Who was champion on", value=None, key="champion_on", format="YYYY-MM-DD", width=220)
    if day:
        found = champion_of(dataset, session.workbench().records, day.isoformat(), name)
        told = f"**{session.literal(found)}** was champion" if found else "There was no champion"
        st.markdown(f"{told} at the end of {day.isoformat()} (UTC).")


def decisions(history: list[Entry]) -> None:
    def primary(one: Entry) -> str:
        return one.facts.get("primary") or "map_50_95"

    def score(one: Entry, side: str) -> float | None:
        return (one.facts.get(side) or {}).get(primary(one))

    def decided(one: Entry) -> str:
        if one.facts.get("rollback"):
            return "champion again"
        return "champion" if one.facts.get("promoted") else "stays out"

    def within(one: Entry) -> str | None:
        interval = one.facts.get("interval")
        return f"{interval[0]:+.3f} to {interval[1]:+.3f}" if interval else None

    st.markdown("**Decisions**")
    if history[0].facts.get("reason"):
        st.caption(session.literal(f"The last: {history[0].facts['reason']}"))
    st.dataframe(
        [
            {
                "when": times.clock(one.at),
                "challenger": one.subject,
                "decision": decided(one),
                "metric": NAMES.get(primary(one), primary(one)),
                "challenger scores": score(one, "challenger"),
                "champion scored": score(one, "champion"),
                "difference, 95 %": within(one),
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
            for name in ("challenger scores", "champion scored")
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
        rules.alarm(dataset)
    asked = None
    with session.explained():
        asked = start(dataset)
    with session.explained():
        job = session.watched("retrain", dataset)
        if job:
            training(job)
    st.subheader("Train automatically", anchor=False)
    with session.explained():
        rules.cards(dataset, asked)
    st.subheader("Promote and deploy", anchor=False)
    with session.explained():
        promote(dataset)
    st.subheader("Trainings", anchor=False)
    past_runs(dataset)

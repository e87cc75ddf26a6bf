"""The loop as a picture with live counts, and the next thing to do."""

from __future__ import annotations

import streamlit as st

from app import draw, rules, session, times
from app.loop import JOB_STATION, Loop, gather, next_step, picture
from workbench import quickstart
from workbench.errors import WorkbenchError
from workbench.evaluation.primary import task_of
from workbench.jobs import JobStatus
from workbench.records import Entry

LEDGERS = ("uploads", "machine_runs", "reviews", "promotions", "deployments", "drift", "retrain_events")
SAMPLES = 4
# Enough labelled frames to train a first student, and new ones for it to annotate.
QUICKSTART = {"train": 220, "val": 30, "test": 50, "unlabeled": 120}
RECENT = 8


def first_visit() -> None:
    """Nothing is there yet: two ways to begin."""
    st.html(picture(Loop("", by_status={}, evaluations=0, runs=0), "upload"))
    st.subheader("Begin with frames", anchor=False)
    own, ready = st.columns(2)
    with own, st.container(border=True, height="stretch"):
        st.markdown("**Your own photographs**")
        st.write("A folder, a zip, or a COCO, YOLO or VOC data set; with labels or without.")
        session.link("upload", "Upload a folder or a zip", "upload")
    with ready, st.container(border=True, height="stretch"):
        st.markdown("**The quick-start data set**")
        st.write(
            "Handwritten digits on photographs, with exact boxes: made on this machine in a few seconds, no download."
        )
        job = session.watched("upload", "digits")
        if job:
            session.job_panel(job)
        if (job is None or job.is_over) and st.button(
            "Make the quick-start data set", type="primary", icon=":material/rocket_launch:"
        ):
            with session.explained(), st.spinner("Pasting digits onto photographs …"):
                folder = quickstart.generate(session.workbench().config.home / "quickstart", **QUICKSTART)
                if session.submit("upload", {"dataset": "digits", "source": str(folder), "split": None}):
                    st.rerun()


def running(dataset: str) -> dict[str, JobStatus]:
    """station -> the job that runs there now."""
    try:
        jobs = session.active_jobs()
    except WorkbenchError as failure:
        session.error(failure)
        return {}
    return {
        JOB_STATION[job.kind]: job
        for job in reversed(jobs)
        if job.kind in JOB_STATION and session.dataset_of(job) == dataset
    }


@st.fragment(run_every=5)
def draw_loop(dataset: str) -> None:
    active = {station: (job.done, job.total) for station, job in running(dataset).items()}
    place = None
    if f"loop_{dataset}" not in st.session_state:
        # The first time, what needs no other part stands there at once. Later an empty place would be a gap on the page
        # for as long as the parts take to answer.
        place = st.empty()
        place.html(picture(gather(session.workbench(), dataset, active, is_partial=True)[0], query=session.chosen()))
        st.session_state[f"loop_{dataset}"] = True
    loop, failures = gather(session.workbench(), dataset, active)
    todo = next_step(loop)
    (place or st).html(picture(loop, todo.station, session.chosen()))
    with st.container(border=True, horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        st.markdown(f":material/arrow_circle_right: **Next:** {session.literal(todo.sentence)}", width="content")
        if st.button(todo.button, type="primary", key="next_step"):
            session.go(todo.page, dataset=dataset)
    for failure in failures:
        session.error(failure)


def samples(dataset: str) -> None:
    """A few labelled frames of the latest version."""
    with session.explained():
        versions = session.workbench().datasets.versions(dataset)
        if not versions:
            return
        manifest = session.workbench().datasets.manifest(versions[0].ref)
        shown = (
            sorted(manifest.labeled, key=lambda one: -len(one.annotations or ()))[:SAMPLES] or manifest.frames[:SAMPLES]
        )
        st.subheader(f"Frames of {versions[0].ref}", anchor=False)
        draw.gallery([draw.of_labeled(one.frame, one.annotations) for one in shown], manifest.taxonomy.labels, SAMPLES)
        draw.legend(manifest.taxonomy.labels, has_lines=task_of(manifest.frames) != "tags")


def recent(dataset: str) -> None:
    """What was done lately, by whom."""
    records = session.workbench().records
    entries = sorted(
        (
            (one.at, ledger, one)
            for ledger in LEDGERS
            for one in records.entries(ledger, dataset, limit=RECENT)
            if is_news(ledger, one)
        ),
        key=lambda row: row[0],
        reverse=True,
    )
    if entries:
        st.subheader("Lately", anchor=False)
        st.dataframe(
            [
                {"when": times.clock(at), "what": in_words(ledger, one), "who": one.person}
                for at, ledger, one in entries[:RECENT]
            ],
            hide_index=True,
            column_config={"what": st.column_config.TextColumn(width="large")},
        )


def is_news(ledger: str, one: Entry) -> bool:
    """Looks that found no drift and rules that found nothing to train on are for the page Retrain and promote."""
    return bool({"drift": one.facts.get("is_new"), "retrain_events": one.facts.get("args")}.get(ledger, True))


def in_words(ledger: str, one: Entry) -> str:
    facts = one.facts
    if ledger == "machine_runs":
        if facts.get("undone"):
            return f"run {one.subject[:12]} taken back"
        return (
            f"{facts.get('model', '')} drew {facts['boxes']} {facts.get('task', 'boxes')} on {facts['frames']} frames"
            if facts.get("is_finished")
            else f"{facts.get('model', '')} began to annotate"
        )
    if ledger == "promotions":
        if facts.get("rollback"):
            before = (facts.get("champion") or {}).get("model")
            return f"{one.subject} is champion again" + (f": {before} was rolled back" if before else "")
        return f"{one.subject} became champion" if facts.get("promoted") else f"{one.subject} did not become champion"
    if ledger == "reviews":
        return f"{one.subject} {facts.get('decision', 'reviewed')}"
    if ledger == "drift":
        return f"drift alarm of {one.subject}"
    if ledger == "retrain_events":
        return str(facts["told"])
    if ledger == "uploads":
        return f"{one.subject}: {facts.get('added', 0)} frames from {facts.get('source', 'an upload')}"
    return f"{one.subject} deployed"


dataset = session.header("Overview", "Raw frames in, a better detector out, over and over.")
if dataset is None:
    first_visit()
else:
    with session.explained():
        rules.alarm(dataset)
    draw_loop(dataset)
    samples(dataset)
    recent(dataset)

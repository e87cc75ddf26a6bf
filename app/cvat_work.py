"""The lower part of the CVAT page: progress per stage, who works on what, frames for people, accepted work, webhook."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from html import escape
from typing import Any

import streamlit as st

from app import session, times
from workbench.errors import WorkbenchError
from workbench.steps.cvat_pull import connect, disconnect, offer
from workbench.steps.cvat_review import TRUTHS, measured, sent

# What a job's stage and state mean for its frames, in the order work goes, with a colour each.
STEPS = {"to annotate": "#9ca3af", "being annotated": "#2563eb", "to validate": "#d97706", "to accept": "#7c3aed",
         "accepted": "#16a34a", "rejected": "#dc2626"}
STAGES, STATES = ("annotation", "validation", "acceptance"), ("new", "in progress", "completed", "rejected")
TRUTH_WORDS = {"none": "none", "ground_truth": "a job for an expert", "honeypots": "honeypots from accepted frames"}


def section() -> None:
    """Everything about people's work on one data set; nothing is drawn while none is in this CVAT."""
    workbench = session.workbench()
    st.subheader("Work on a data set", anchor=False)
    with session.explained():
        names = workbench.cvat.datasets()
        chosen = st.session_state.get("chosen_dataset") or st.query_params.get("dataset")
        names.sort(key=lambda name: (name != chosen, name))
        dataset = session.pick("cvat_dataset", "Data set in CVAT", names)
        if dataset is None:
            session.empty("No data set lies in this CVAT yet.", "upload", "Upload frames", "upload")
            return
        # A job also shows frames that were sent to people in another one, and honeypots: neither counts here.
        frames = Counter(workbench.cvat.jobs_of(dataset).values())
        jobs = [replace(job, frames=frames[job.id] if job.type == "annotation" else job.frames)
                for job in workbench.cvat.people(dataset).jobs()]
        jobs = [job for job in jobs if job.frames]
        _offer(dataset)
        _progress(workbench.cvat.task(dataset), jobs)
        people, send, quality, hook = st.tabs(["Who works on what", "Send frames to people", "Quality", "Webhook"])
        with people, session.explained():
            _people(dataset, jobs)
        with send, session.explained():
            _send(dataset, jobs)
        with quality, session.explained():
            _quality(dataset, jobs)
        with hook, session.explained():
            _hook(dataset)


def step_of(job: Any) -> str:
    """Which of STEPS a job's frames are in."""
    if job.state == "rejected":
        return "rejected"
    if job.is_accepted:
        return "accepted"
    # "completed" in an earlier stage hands the job on.
    stage = STAGES.index(job.stage) + (job.state == "completed" and job.stage != "acceptance")
    if stage == 0:
        return "to annotate" if job.state == "new" else "being annotated"
    return "to validate" if stage == 1 else "to accept"


def bars(jobs: Sequence[Any]) -> str:
    """A bar per task as HTML: its frames by step, the largest task as wide as the page."""
    tasks: dict[int, Counter[str]] = {}
    for job in jobs:
        if job.type == "annotation":
            tasks.setdefault(job.task_id, Counter())[step_of(job)] += job.frames
    widest = max((count.total() for count in tasks.values()), default=1)
    rows = []
    for task, count in sorted(tasks.items()):
        link = next(job.url for job in jobs if job.task_id == task).rpartition("/jobs/")[0]
        pieces = "".join(f"<i style='width:{100 * count[step] / count.total():.2f}%;background:{colour}' "
                         f"title='{count[step]} {step}'></i>" for step, colour in STEPS.items() if count[step])
        done = count["accepted"]
        rows.append(f"<a href='{escape(link)}' target='_blank' rel='noopener'>task {task}</a>"
                    f"<span class='bar' style='width:{max(8, 100 * count.total() / widest):.1f}%'>{pieces}</span>"
                    f"<span>{done} of {count.total()} accepted</span>")
    legend = "".join(f"<span><b style='background:{colour}'></b>{step}</span>" for step, colour in STEPS.items())
    return f"<style>{_STYLE}</style><div class='cvat-bars'>{''.join(rows)}</div><div class='cvat-legend'>{legend}</div>"


def _offer(dataset: str) -> None:
    workbench = session.workbench()
    entry = offer(dataset, store=workbench.datasets, records=workbench.records)
    if entry is not None:
        facts = entry.facts
        with st.container(border=True, horizontal=True, vertical_alignment="center"):
            st.markdown(f"**{facts['frames']} frames** are accepted in CVAT ({len(facts['jobs'])} "
                        f"{'job' if len(facts['jobs']) == 1 else 'jobs'}, {times.clock(entry.at)}): publish them as "
                        f"**{session.literal(facts['next'])}**.")
            if st.button(f"Publish {facts['next']}", type="primary", icon=":material/publish:", key="cvat_publish"):
                session.submit("version", {"dataset": dataset,
                                           "message": f"Accepted in CVAT: {facts['frames']} frames"})
                st.rerun()
    for kind in ("version", "pull"):
        job = session.watched(kind, dataset)
        if job is not None:
            session.job_panel(job)


def _progress(task: Any, jobs: Sequence[Any]) -> None:
    workbench = session.workbench()
    st.html(bars(jobs))
    new = task.by_status.get("new", 0)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        refs = workbench.models.refs()
        deployed = workbench.records.deployed(task.dataset)
        refs = sorted(refs, key=lambda ref: ref != deployed)
        model = st.selectbox("Model", refs, key="cvat_work_model", disabled=not refs) if refs else None
        is_asked = st.button(f"Pre-annotate {new} new frames", icon=":material/auto_awesome:", key="cvat_annotate",
                             disabled=not new or not model)
        is_pull = st.button("Pull accepted work", icon=":material/download:", key="cvat_pull",
                            help="Enters what is accepted and offers the next version; it also happens by itself.")
    if not refs:
        session.empty("No model is here to pre-annotate with.", "models", "Add a model", "model_training")
    if is_asked:
        session.submit("annotate", {"dataset": task.dataset, "model": model, "statuses": ["new"]})
    if is_pull:
        session.submit("pull", {"dataset": task.dataset})
        st.rerun()
    job = session.watched("annotate", task.dataset)
    if job is not None:
        session.job_panel(job)


def _people(dataset: str, jobs: Sequence[Any]) -> None:
    """The jobs, and a form that moves one on."""
    load = Counter(job.assignee or "nobody" for job in jobs if not job.is_accepted and job.type == "annotation")
    if load:
        st.caption(session.literal("Open jobs: " + ", ".join(f"{who} {count}" for who, count in load.most_common())))
    rows = [{"job": job.url, "task": job.task_id, "kind": job.type.replace("_", " "), "frames": job.frames,
             "stage": job.stage, "state": job.state, "assignee": job.assignee or "–",
             "changed": times.clock(job.updated_at)} for job in jobs]
    chosen = st.dataframe(
        rows, hide_index=True, width="stretch", on_select="rerun", selection_mode="single-row", key="cvat_jobs",
        column_config={"job": st.column_config.LinkColumn(display_text=r"/jobs/(\d+)$")}).selection.rows
    if not chosen or chosen[0] >= len(jobs):
        st.caption("Choose a row to hand its job to somebody or move it on: annotation, validation, acceptance. A job "
                   "that is completed in the stage acceptance is accepted.")
        return
    job = jobs[chosen[0]]
    with st.form(f"cvat_job_{job.id}", border=True):
        left, middle, right = st.columns(3)
        stage = left.selectbox("Stage", STAGES, index=STAGES.index(job.stage))
        state = middle.selectbox("State", STATES, index=STATES.index(job.state))
        who = right.text_input("Assignee", value=job.assignee, max_chars=150, placeholder="CVAT user name")
        if st.form_submit_button(f"Move job {job.id}", icon=":material/arrow_forward:"):
            session.workbench().cvat.people(dataset).set_job(job.id, stage, state, who.strip())
            st.rerun()


def _send(dataset: str, jobs: Sequence[Any]) -> None:
    workbench = session.workbench()
    st.caption("The chosen frames become a CVAT task of their own, in jobs of your size; their drawings go along. "
               "Their pixels are sent to CVAT a second time, because an open CVAT cannot put a frame into another job. "
               "Frames whose job somebody has begun stay there.")
    with st.form("cvat_send", border=True):
        one, two, three = st.columns(3)
        low = one.number_input("With the least confidence", 0, 1000, 20)
        apart = two.number_input("Where two models disagree", 0, 1000, 0)
        chance = three.number_input("By chance", 0, 1000, 0)
        model = two.selectbox("Second model", ["", *workbench.models.refs()],
                              format_func=lambda ref: ref or "the last two that ran on a frame")
        people = one.text_input("People", placeholder="anna, ben", max_chars=500,
                                help="CVAT user names; jobs are dealt out.")
        size = three.number_input("Frames of a job", 1, 1000, 20)
        truth = one.selectbox("Ground truth", TRUTHS, format_func=TRUTH_WORDS.get)
        truth_frames = two.number_input("Ground truth frames", 1, 500, 5)
        if st.form_submit_button("Send to people", type="primary", icon=":material/send:"):
            session.submit("send", {
                "dataset": dataset, "low_confidence": int(low), "disagreement": int(apart), "random": int(chance),
                "model": model, "people": [name.strip() for name in people.split(",") if name.strip()],
                "job_size": int(size), "truth": truth, "truth_frames": int(truth_frames)})
    job = session.watched("send", dataset)
    if job is not None:
        session.job_panel(job)
        if job.state == "done" and job.result:
            st.success(session.literal(f"{job.result['frames']} frames are in CVAT task {job.result['task']}, in "
                                       f"{len(job.result['jobs'])} jobs; {len(job.result['skipped'])} were left out."))
    entries = sent(dataset, records=workbench.records)
    if entries:
        st.dataframe([{"at": times.clock(entry.at), "by": entry.person, "frames": len(entry.facts["chosen"]),
                       "why": ", ".join(f"{count} {why}" for why, count in Counter(
                           one["why"] for one in entry.facts["chosen"]).items()),
                       "people": ", ".join(entry.facts["people"]) or "–", "ground truth": entry.facts["truth"]}
                      for entry in entries], hide_index=True, width="stretch")


def _quality(dataset: str, jobs: Sequence[Any]) -> None:
    """CVAT's report of each task that has a ground truth, beside what our own records say."""
    workbench, people = session.workbench(), session.workbench().cvat.people(dataset)
    truths = {job.task_id: job for job in jobs if job.type == "ground_truth"}
    rows = []
    for task in truths:
        for report in people.quality(task)[:1]:
            rows.append({"what": f"people against the ground truth, CVAT task {task}", "by": "CVAT",
                         "frames": report.frames, "precision": report.precision, "recall": report.recall,
                         "accuracy": report.accuracy, "at": times.clock(report.created_at)})
    kept = st.session_state.get(f"cvat_measured_{dataset}")
    last = [entry for entry in workbench.records.entries("pulls", dataset, limit=1) if entry.facts.get("agreement")]
    ours, at = kept or ((last[0].facts["agreement"], last[0].at) if last else (None, ""))
    if ours:
        rows.append({"what": "what models proposed against what people accepted", "by": "workbench",
                     "frames": ours["frames"], "precision": ours["precision"], "recall": ours["recall"],
                     "accuracy": ours["accuracy"], "at": times.clock(at)})
    number = st.column_config.NumberColumn(format="%.3f")
    if rows:
        st.dataframe(rows, hide_index=True, width="stretch",
                     column_config={name: number for name in ("precision", "recall", "accuracy")})
        st.caption("CVAT pairs boxes from IoU 0.4 on by default (its quality settings), the workbench from 0.5 on with "
                   "the same label. A model's mAP on a published version is on the evaluate page.")
    else:
        st.caption("Nothing is measured yet: accept frames that a model annotated, or send frames with a ground truth.")
    session.link("evaluate", "Evaluate a model on the reviewed frames", "analytics")
    with st.container(horizontal=True):
        if st.button("Compare models with reviewers", icon=":material/balance:", key="cvat_compare"):
            found = measured(dataset, server=workbench.cvat)
            st.session_state[f"cvat_measured_{dataset}"] = (found.to_json(), datetime.now(timezone.utc).isoformat())
            st.rerun()
        for task, job in truths.items():
            if st.button(f"Measure task {task} in CVAT", icon=":material/fact_check:", disabled=not job.is_accepted,
                         key=f"cvat_quality_{task}",
                         help="Needs its ground truth job completed in the stage acceptance."):
                people.measure_quality(task)
                st.rerun()


def _hook(dataset: str) -> None:
    workbench = session.workbench()
    config, in_cvat = workbench.config, workbench.cvat.hooks(dataset)
    hook, known = in_cvat.find(), workbench.hooks.followed(dataset)
    with st.container(horizontal=True, vertical_alignment="center"):
        is_ours = hook is not None and hook.is_active and workbench.hooks.secret(dataset) is not None
        st.badge("connected" if is_ours else "not connected", color="green" if is_ours else "gray")
        alone = "CVAT tells the workbench nothing by itself; it is asked instead."
        st.caption(session.literal(hook.address if hook else alone))
    said = []
    if hook and hook.last:
        is_good = hook.last.status is not None and 200 <= hook.last.status < 300
        said.append(f"last delivery {times.clock(hook.last.at)}: {hook.last.event}, "
                    + ("taken" if is_good else f"answered with {hook.last.status}"))
        if not is_good:
            st.warning(session.literal(
                f"CVAT could not deliver its last message ({hook.last.status}). 502: it does not reach {hook.address}: "
                "mend the setting 'gateway_url', and SMOKESCREEN_OPTS of CVAT where that is a private address. "
                "401: connect again. "
                "409: it was a repetition, nothing is lost."), icon=":material/power_off:")
    if known.looked_at:
        every = f", every {config.cvat_look_s} s" if config.cvat_look_s else ""
        said.append(f"last look {times.clock(known.looked_at)}{every}")
    nothing = "Neither a message nor a look so far: the HTTP service looks when it runs."
    st.caption(session.literal(" · ".join(said) or nothing))
    with st.form("cvat_hook", border=True):
        address = st.text_input("Address of this workbench's HTTP service, as CVAT sees it", max_chars=300,
                                value=config.gateway_url or config.gateway)
        if st.form_submit_button("Connect again" if hook else "Connect", icon=":material/webhook:"):
            status = connect(dataset, address.strip(), in_cvat=in_cvat, hooks=workbench.hooks)
            st.session_state["cvat_hook_said"] = status
            st.rerun()
    status = st.session_state.pop("cvat_hook_said", None)
    if status is not None and 200 <= status < 300:
        st.success("CVAT's test message arrived.", icon=":material/check_circle:")
    if hook is not None and st.button("Remove the webhook", icon=":material/link_off:", key="cvat_unhook"):
        try:
            disconnect(dataset, in_cvat=in_cvat, hooks=workbench.hooks)
        except WorkbenchError as failure:
            session.error(failure)
        else:
            st.rerun()


_STYLE = """
.cvat-bars{display:grid;grid-template-columns:max-content 1fr max-content;gap:.45rem 1rem;align-items:center;
 font-size:.9rem}
.cvat-bars .bar{display:flex;height:1.05rem;border-radius:.4rem;overflow:hidden;background:rgba(120,120,120,.15)}
.cvat-bars .bar i{display:block;height:100%}
.cvat-legend{display:flex;flex-wrap:wrap;gap:.2rem 1rem;font-size:.78rem;opacity:.8;margin:.5rem 0 .2rem}
.cvat-legend b{display:inline-block;width:.7rem;height:.7rem;border-radius:.2rem;margin-right:.35rem}
"""

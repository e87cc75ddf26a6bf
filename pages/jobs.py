"""Every job: what runs, what waits, what failed and why."""

from __future__ import annotations

import streamlit as st

from app import session, times

STATES = ("queued", "running", "done", "failed", "cancelled")
MOST = 200


def table(jobs: list) -> str | None:
    """The list; returns the id of the row that was clicked."""
    rows = [
        {
            "state": job.state,
            "kind": job.kind,
            "data set": session.dataset_of(job),
            "progress": 1.0 if job.state == "done" else min(1.0, job.done / job.total) if job.total else 0.0,
            "items": f"{job.done} of {job.total}" if job.total else "",
            "failed items": job.failed_items,
            "person": job.person,
            "created": times.clock(job.created_at),
            "took": times.duration(job.started_at, job.finished_at),
        }
        for job in jobs
    ]
    event = st.dataframe(
        rows,
        hide_index=True,
        on_select="rerun",
        selection_mode="single-row",
        key="jobs_table",
        column_config={
            "progress": st.column_config.ProgressColumn(format="percent", min_value=0.0, max_value=1.0, width="small"),
            "failed items": st.column_config.NumberColumn(width="small"),
        },
    )
    chosen = event["selection"]["rows"]
    return jobs[chosen[0]].id if chosen and chosen[0] < len(jobs) else None


def detail(job_id: str) -> None:
    status = session.workbench().jobs.get(job_id)
    session.job_panel(status, open_log=True)
    asked, result = st.columns(2)
    with asked:
        st.markdown("**Arguments**")
        st.json(status.args, expanded=2)
    with result:
        st.markdown("**Result**")
        if status.result is None:
            st.caption("A job has a result when it is done.")
        else:
            st.json(status.result, expanded=1)


session.header(
    "Jobs", "Long work goes on when the browser is closed, and is taken up again after a crash.", with_dataset=False
)
with session.explained():
    everything = session.workbench().jobs.list(limit=MOST)
    if not everything:
        session.empty("No job was ever started. Uploading frames is the first.", "upload", "Upload frames", "upload")
    else:
        left, right = st.columns([2, 1], vertical_alignment="bottom")
        wanted = left.segmented_control(
            "State", STATES, selection_mode="multi", key="jobs_state", label_visibility="collapsed"
        )
        kinds = right.multiselect(
            "Kind",
            sorted({job.kind for job in everything}),
            key="jobs_kind",
            placeholder="All kinds",
            label_visibility="collapsed",
        )
        shown = [job for job in everything if (not wanted or job.state in wanted) and (not kinds or job.kind in kinds)]
        asked = st.query_params.get("job")
        if shown:
            clicked = table(shown)
            st.caption(
                f"{len(shown)} of {len(everything)} jobs, newest first. Click a row for its log, failed items and "
                "result."
            )
        else:
            clicked = None
            st.info("No job matches the filter.", icon=":material/filter_alt_off:")
        if clicked:
            st.query_params["job"] = asked = clicked
        if any(not job.is_over for job in everything) and not asked:
            asked = next(job.id for job in everything if not job.is_over)
        if asked:
            detail(asked)

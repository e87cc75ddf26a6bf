"""What the review page draws with: progress, one frame to look at, and where each of its boxes comes from."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

import streamlit as st

from app import draw, session, times
from workbench.ports import TaskSummary
from workbench.records import Entry
from workbench.run import WorkingFrame, settle, touch, written_by_machines

PICTURE_PX = 1100
PROBE_S = 2.0
STATUS_COLOUR = {"new": "gray", "annotated": "blue", "accepted": "green", "rejected": "red"}


@st.cache_data(ttl=10, show_spinner=False)
def app_answers(url: str) -> bool:
    """Whether FiftyOne's app is served there; asked every 10 s at most."""
    try:
        with urllib.request.urlopen(f"{url}/fiftyone", timeout=PROBE_S) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


def progress(task: TaskSummary) -> None:
    """How far the review is: a bar and the number of frames per status."""
    reviewed = task.by_status["accepted"] + task.by_status["rejected"]
    with st.container(horizontal=True, vertical_alignment="center"):
        st.progress(reviewed / task.frames if task.frames else 0.0, text=f"{reviewed} of {task.frames} frames reviewed")
        for status, count in task.by_status.items():
            st.badge(f"{count} {status}", color=STATUS_COLOUR[status])


def heading(working: WorkingFrame) -> None:
    """Which frame this is and what was decided about it."""
    frame = working.frame
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown(f"**{session.literal(frame.name)}**", width="content")
        st.badge(working.status, color=STATUS_COLOUR[working.status])
        facts = [f"{frame.width} × {frame.height} px", working.split or "no split"]
        if working.reviewed_by:
            facts.append(f"by {working.reviewed_by}, {times.clock(working.reviewed_at)}")
        st.caption(session.literal(" · ".join(facts)), width="content")


def picture(working: WorkingFrame, labels: Sequence[str], person: str) -> None:
    """The frame with its boxes: what the person changed is drawn solid, what stands as a machine drew it dashed."""
    annotations = settle(working, person)
    draw.gallery([draw.Picture(working.frame.blob, annotations)], labels, columns=1, width=PICTURE_PX)
    draw.legend(labels, {annotation.label for annotation in annotations})


def provenance(working: WorkingFrame) -> list[dict[str, Any]]:
    """A row per box: what it is, who drew it, how sure the model was, and who touched it since."""
    written, people = written_by_machines(working), {annotation.id for annotation in touch(working).human}
    rows = []
    for annotation in working.annotations or ():
        touched = annotation.attributes.get("touched_by", "")
        if not touched and annotation.id in people and annotation.id in written:
            touched = "changed, signed when you decide"
        source = "drawn, signed when you decide" if annotation.source == "human:unknown" else annotation.source
        size = "" if annotation.xyxy is None else \
            f"{annotation.xyxy[2] - annotation.xyxy[0]:.0f} × {annotation.xyxy[3] - annotation.xyxy[1]:.0f}"
        rows.append({"label": annotation.label, "source": source, "confidence": annotation.confidence,
                     "touched by": touched, "size (px)": size})
    return rows


def provenance_table(working: WorkingFrame) -> None:
    rows = provenance(working)
    if rows:
        st.dataframe(rows, hide_index=True, width="stretch", height=min(38 + 35 * len(rows), 460), column_config={
            "confidence": st.column_config.NumberColumn(format="%.2f")})
    else:
        st.caption("Nothing is drawn on this frame. Accepting it says that there is nothing on it (background).")
    gone = touch(working).deleted
    if gone:
        st.caption(f"Deleted by a person: {', '.join(session.literal(annotation.label) for annotation in gone)}.")


def decisions(entries: Sequence[Entry]) -> str | None:
    """The ledger's last decisions; the frame of the one that is selected."""
    counted = ("drawn", "touched", "deleted", "seconds")
    rows = [{"frame": entry.subject, "decision": entry.facts.get("decision"), "by": entry.person,
             "at": times.clock(entry.at), **{name: entry.facts.get(name) for name in counted}} for entry in entries]
    if not rows:
        st.caption("Nobody has decided anything yet.")
        return None
    chosen = st.dataframe(rows, hide_index=True, width="stretch", on_select="rerun", selection_mode="single-row",
                          key="review_decisions").selection.rows
    return entries[chosen[0]].subject if chosen else None

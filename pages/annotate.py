"""A registered model draws on frames nobody has decided on yet; every run can be taken back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import streamlit as st

from app import draw, session, times
from workbench.annotation import Annotation
from workbench.errors import WorkbenchError
from workbench.inference.detector import Detector
from workbench.inference.pipeline import detect_frames
from workbench.model import ModelCard
from workbench.ports import TaskSummary
from workbench.records import Entry
from workbench.steps.annotate import preview_labels
from workbench.steps.deploy import Offer, offers
from workbench.taxonomy import LabelMap, Taxonomy

NOWHERE = "leave out"
FRAMES = {"new: nobody looked at them": ("new",), "all that are not reviewed": ("new", "annotated")}
PREVIEWED = 3
RUNS_SHOWN = 20


@dataclass(frozen=True)
class Choice:
    """What a run would do."""

    model: str
    card: ModelCard
    confidence: float
    statuses: tuple[str, ...]
    renames: dict[str, str]
    labels: LabelMap


def choose(dataset: str, task: TaskSummary) -> Choice | None:
    """Model, frames and confidence on the left; on the right what becomes of the model's labels, mismatches first."""
    wb, taxonomy = session.workbench(), Taxonomy(task.labels)
    offered = offers(dataset, taxonomy, models=wb.models, records=wb.records)
    shown = {offer.model: about(offer, taxonomy) for offer in offered}
    # A model that shares no label can still be mapped by hand.
    shown |= {ref: f"{ref} · shares no label" for ref in wb.models.refs() if ref not in shown}
    if not shown:
        session.empty(
            "No model is registered yet: train a student on the labelled frames, or register a YOLOX or NanoDet.",
            "models",
            "Register a model",
            "deployed_code",
        )
        session.link("retrain", "Train a student", "model_training")
        return None
    left, right = st.columns([2, 3], gap="large")
    with left:
        model = session.model_picker(list(shown), about=shown)
        card = wb.models.card(model)
        counts = {name: sum(task.by_status.get(status, 0) for status in statuses) for name, statuses in FRAMES.items()}
        which = st.radio(
            "Frames", list(FRAMES), format_func=lambda name: f"{name} ({counts[name]})", key="annotate_frames"
        )
        confidence = st.slider(
            "Least confidence of a box",
            0.05,
            0.95,
            float(card.decoder.get("confidence", 0.3)),
            0.05,
            key=f"confidence_{model}",
            help="The model's own value stands here first.",
        )
        if by_label := card.decoder.get("confidence_by_label"):
            st.caption(
                "The model brings a threshold per label; the slider's value replaces them when it is moved: "
                + session.literal(", ".join(f"{label} {value:.2f}" for label, value in by_label.items()))
            )
    with right:
        renames = mapping(card, taxonomy)
        labels = preview_labels(card, taxonomy, renames)
    return Choice(model, card, confidence, FRAMES[which], renames, labels)


def about(offer: Offer, taxonomy: Taxonomy) -> str:
    marks = ["deployed"] * offer.is_deployed + ["champion"] * offer.is_champion
    marks += [f"{len(taxonomy) - len(offer.labels.unreached)} of {len(taxonomy)} labels"] if len(taxonomy) else []
    marks += [f"mAP {offer.metrics['map_50_95']:.2f}"] if "map_50_95" in offer.metrics else []
    return " · ".join([offer.model, *marks])


def mapping(card: ModelCard, taxonomy: Taxonomy) -> dict[str, str]:
    """The table of labels, what does not match first; returns what a person mapped by hand (ours -> theirs)."""
    if not len(taxonomy):
        st.info("The data set has no labels yet: the model's own are taken over.", icon=":material/new_label:")
        return {}
    by_name = card.labels.map_to(taxonomy)
    if by_name.unmatched or by_name.unreached:
        lost = f"{len(by_name.unmatched)} of the model's labels are not in the data set" if by_name.unmatched else ""
        never = f"by name, nothing draws {', '.join(by_name.unreached[:8])}" if by_name.unreached else ""
        st.warning(
            session.literal("; ".join(part for part in (lost, never) if part).capitalize() + ".")
            + (" Map them where they mean the same; the rest is left out." if by_name.unmatched else ""),
            icon=":material/rule:",
        )
    edited = (
        st.data_editor(
            [{"the model says": label, "drawn as": NOWHERE} for label in by_name.unmatched],
            hide_index=True,
            key=f"mapping_{card.ref}",
            height=min(38 + 35 * len(by_name.unmatched), 320),
            disabled=["the model says"],
            column_config={
                "drawn as": st.column_config.SelectboxColumn(options=[NOWHERE, *taxonomy.labels], required=True)
            },
        )
        if by_name.unmatched
        else []
    )
    if by_name.pairs:
        st.markdown(
            f":material/check_circle: **{len(by_name.pairs)} match by name:** "
            + " ".join(f":green-badge[{session.literal(label)}]" for label in by_name.pairs)
        )
    return {row["the model says"]: row["drawn as"] for row in edited if row["drawn as"] != NOWHERE}


def preview(dataset: str, choice: Choice) -> None:
    """What the model would draw on three frames; nothing is written."""
    wb = session.workbench()
    names = [name for status in choice.statuses for name in wb.server.frame_names(dataset, status)]
    step = max(1, len(names) // PREVIEWED)
    frames = [one.frame for one in wb.server.read(dataset, names[::step][:PREVIEWED]).values()]
    labels, pictures = wb.server.task(dataset).labels or choice.card.labels.labels, []
    with (
        st.spinner("Running the model …"),
        Detector(choice.card, wb.models.folder(choice.model), wb.open_backend, **thresholds(choice)) as detector,
    ):
        for frame, found in detect_frames(
            detector, ((frame, frame) for frame in frames), lambda one: wb.blobs.get(one.blob)
        ):
            if isinstance(found, WorkbenchError):
                session.error(found)
                continue
            drawn = []
            for xyxy, class_id, confidence in zip(found.xyxy, found.class_id, found.confidence):
                label = choice.labels(choice.card.labels.labels[class_id])
                if label is not None:
                    drawn.append(
                        Annotation(
                            label,
                            tuple(map(float, xyxy)),
                            source=choice.card.source,
                            confidence=min(1.0, float(confidence)),
                        )
                    )
            left_out = len(found) - len(drawn)
            pictures.append(
                draw.Picture(
                    frame.blob,
                    tuple(drawn),
                    f"{frame.name} · {len(drawn)} boxes" + (f", {left_out} left out" if left_out else ""),
                )
            )
    draw.gallery(pictures, labels, PREVIEWED)
    draw.legend(labels, {a.label for picture in pictures for a in picture.annotations})


def thresholds(choice: Choice) -> dict[str, object]:
    """The slider only where a person moved it: a model's thresholds per label stand otherwise."""
    is_moved = abs(choice.confidence - float(choice.card.decoder.get("confidence", 0.3))) > 0.026
    return {"confidence": choice.confidence, "confidence_by_label": {}} if is_moved else {}


def history(dataset: str, entries: list[Entry]) -> None:
    """Past runs, newest first, each with its undo."""
    st.subheader("Runs", anchor=False)
    undo_job = session.watched("undo", dataset)
    if undo_job and undo_job.state != "done":
        session.job_panel(undo_job)
    runs: dict[str, dict[str, Any]] = {}
    for entry in entries:
        # A run has an entry when it begins, one with its counts when it is finished, and one when it is taken back.
        facts = runs.setdefault(entry.subject, {})
        runs[entry.subject] = {**entry.facts, **facts, "at": entry.at}
    if not runs:
        st.caption("No model has drawn on this data set yet.")
    for run_id, facts in list(runs.items())[:RUNS_SHOWN]:
        with st.container(border=True, horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
            counted = ", ".join(f"{facts[name]} {name}" for name in ("frames", "boxes", "failed") if facts.get(name))
            skipped = ", ".join(f"{count} {reason}" for reason, count in (facts.get("skipped") or {}).items())
            st.markdown(
                f"**{session.literal(str(facts.get('model', '')))}** · {counted or 'unfinished'}"
                f"{session.literal(f' · skipped: {skipped}') if skipped else ''}  \n"
                f":small[:gray[{times.clock(facts['at'])} · run {session.literal(run_id[:16])}]]",
                width="content",
            )
            if facts.get("undone"):
                st.badge("taken back", color="gray", icon=":material/undo:")
            elif st.button(
                "Undo",
                key=f"undo_{run_id}",
                icon=":material/undo:",
                help="Takes back what this run drew, except on frames a person reviewed since.",
            ):
                if session.submit("undo", {"dataset": dataset, "run_id": run_id}):
                    st.rerun()


def page(dataset: str) -> None:
    wb = session.workbench()
    task = wb.server.task(dataset)
    choice = choose(dataset, task)
    job = session.watched("annotate", dataset)
    if choice:
        count = sum(task.by_status.get(status, 0) for status in choice.statuses)
        with st.container(horizontal=True):
            is_previewed = st.button(
                f"Preview on {PREVIEWED} frames",
                icon=":material/visibility:",
                disabled=not count,
                key="annotate_preview",
            )
            is_busy = job is not None and not job.is_over
            if st.button(
                f"Annotate {count} frame{'' if count == 1 else 's'}",
                type="primary",
                icon=":material/auto_awesome:",
                key="annotate_go",
                disabled=not count or is_busy or not choice.labels.pairs,
            ):
                arguments = {
                    "dataset": dataset,
                    "model": choice.model,
                    "statuses": list(choice.statuses),
                    "renames": choice.renames,
                }
                if "confidence" in thresholds(choice):
                    arguments["confidence"] = choice.confidence
                if session.submit("annotate", arguments):
                    st.rerun()
        if not count:
            st.caption(
                "No frame waits for a model: all of them are reviewed, or drawn on already. Upload more, or choose "
                "all frames that are not reviewed."
            )
        if is_previewed:
            with session.explained():
                preview(dataset, choice)
    if job:
        session.job_panel(job)
        if job.state == "done":
            session.link("review", "Review what it drew", "fact_check")
    history(dataset, wb.records.entries("machine_runs", dataset))


dataset = session.header(
    "Annotate", "A model draws the first boxes. What a person drew, touched or accepted is never changed."
)
if dataset is None:
    session.empty("No data set yet.", "upload", "Upload frames", "upload")
else:
    with session.explained():
        page(dataset)

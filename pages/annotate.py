"""A registered model draws on frames nobody has decided on yet; every run can be taken back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import streamlit as st

from app import certificate, draw, scores, session, times
from workbench.annotation import Annotation
from workbench.errors import WorkbenchError
from workbench.inference.certificate import METRICS
from workbench.inference.pipeline import detect_frames
from workbench.inference.tiling import Tiling
from workbench.model import ModelCard
from workbench.ports import TaskSummary
from workbench.records import Entry
from workbench.steps.annotate import drawing, preview_labels, tiles
from workbench.steps.certify import open_annotator
from workbench.steps.deploy import Offer, offers
from workbench.taxonomy import LabelMap, Taxonomy

NOWHERE = "leave out"
THING = {"boxes": "box", "polygons": "polygon", "tags": "tag"}
FRAMES = {"new: nobody looked at them": ("new",), "all that are not reviewed": ("new", "annotated")}
PREVIEWED = 3
# How a frame is looked at -> side of a piece, in sides of the model's input; 0: only the whole.
PIECES = {"off": 0, "in pieces": 2, "in small pieces": 1}
OVERLAP = 0.2
DRAWS = {
    "boxes": "It draws boxes.",
    "polygons": "It draws polygons around what it finds.",
    "tags": "It sets tags on whole frames and draws no boxes.",
}
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
    tiling: dict[str, Any] | None = None
    why_not: str = ""


def choose(dataset: str, task: TaskSummary) -> Choice | None:
    """Model, frames and confidence on the left; on the right what becomes of the model's labels, mismatches first."""
    wb, taxonomy = session.workbench(), Taxonomy(task.labels)
    offered = offers(dataset, taxonomy, models=wb.models, records=wb.records)
    shown = {offer.model: about(offer, taxonomy) for offer in offered}
    # A model that shares no label can still be mapped by hand.
    shown |= {ref: f"{ref} · shares no label" for ref in wb.models.refs() if ref not in shown}
    if not shown:
        session.empty(
            "No model is registered yet: train a student on the labelled frames, or register one of your own.",
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
        standing = certificate.standing(card)
        if standing.is_int8:
            may_not(standing, card)
        if card.task != "boxes":
            st.caption(DRAWS[card.task])
        counts = {name: sum(task.by_status.get(status, 0) for status in statuses) for name, statuses in FRAMES.items()}
        which = st.radio(
            "Frames", list(FRAMES), format_func=lambda name: f"{name} ({counts[name]})", key="annotate_frames"
        )
        confidence = st.slider(
            f"Least confidence of a {THING[card.task]}",
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
        tiling = pieces(dataset, card, FRAMES[which])
    with right:
        renames = mapping(card, taxonomy)
        labels = preview_labels(card, taxonomy, renames)
    return Choice(model, card, confidence, FRAMES[which], renames, labels, tiling, standing.why_not)


def may_not(standing: certificate.Standing, card: ModelCard) -> None:
    """What an INT8 version says of itself: how it compares, or why it may not annotate here and what to do."""
    if not standing.why_not:
        found = standing.certificate
        st.markdown(
            f":violet-badge[INT8] :green-badge[certified here] {found['speedup']:.1f} × as fast as FP32, "
            f"{METRICS[found['metric']][0]} {certificate.change(found)}"
        )
        return
    st.warning(session.literal(standing.why_not), icon=":material/lock:")
    session.link("models", "See its certificate, or certify it here", "verified")


def pieces(dataset: str, card: ModelCard, statuses: tuple[str, ...]) -> dict[str, Any] | None:
    """Whether large frames are also looked at piece by piece, and what that costs."""
    if card.task != "boxes":
        return None
    side = max(card.input.size)
    how = st.segmented_control(
        "Small objects in large frames",
        list(PIECES),
        default="off",
        required=True,
        key="annotate_pieces",
        help=f"The model sees a frame shrunk to {side} px, so small things can vanish. In pieces it also looks at "
        "overlapping parts of the frame, each at a larger size, and joins what lies on their borders. Every piece "
        "takes as long as a frame.",
    )
    if not PIECES[how]:
        return None
    tiling = {"size": PIECES[how] * side, "overlap": OVERLAP}
    server = session.workbench().server
    frames = server.read(dataset, [name for status in statuses for name in server.frame_names(dataset, status)[:1]])
    for one in list(frames.values())[:1]:
        width, height = one.frame.width, one.frame.height
        count = len(Tiling(**tiling).tiles(width, height))
        st.caption(
            f"A frame of {width} × {height} px fits into one piece of {tiling['size']} px: nothing changes for it."
            if count == 1
            else f"A frame of {width} × {height} px is looked at whole and in {count} pieces of {tiling['size']} px: "
            f"about {count + 1} times the work."
        )
    return tiling


def about(offer: Offer, taxonomy: Taxonomy) -> str:
    marks = ["deployed"] * offer.is_deployed + ["champion"] * offer.is_champion
    marks += [f"{len(taxonomy) - len(offer.labels.unreached)} of {len(taxonomy)} labels"] if len(taxonomy) else []
    metric = scores.primary(session.workbench().models.card(offer.model))
    marks += [f"{scores.NAMES[metric]} {offer.metrics[metric]:.2f}"] if metric else []
    return " · ".join([offer.model, *marks])


def mapping(card: ModelCard, taxonomy: Taxonomy) -> dict[str, str]:
    """The table of labels, what does not match first; returns what a person mapped by hand (ours -> theirs)."""
    if not len(taxonomy):
        st.info("The data set has no labels yet: the model's own are taken over.", icon=":material/new_label:")
        return {}
    by_name = card.labels.map_to(taxonomy)
    if by_name.unmatched or by_name.unreached:
        count = len(by_name.unmatched)
        lost = f"{count} of the model's labels {'is' if count == 1 else 'are'} not in the data set" if count else ""
        never = f"by name, nothing draws {', '.join(by_name.unreached[:8])}" if by_name.unreached else ""
        said = "; ".join(part for part in (lost, never) if part) + "."
        st.warning(
            session.literal(said[0].upper() + said[1:])
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
        open_annotator(
            choice.model,
            models=wb.models,
            open_backend=wb.open_backend,
            certificates=wb.certificates,
            **thresholds(choice),
        ) as detector,
    ):
        for frame, found in detect_frames(
            detector,
            ((frame, frame) for frame in frames),
            lambda one: wb.blobs.get(one.blob),
            tiling=tiles(choice.card, choice.tiling),
        ):
            if isinstance(found, WorkbenchError):
                session.error(found)
                continue
            drawn = []
            for index, (class_id, confidence) in enumerate(zip(found.class_id, found.confidence)):
                label = choice.labels(choice.card.labels.labels[class_id])
                if label is not None:
                    drawn.append(
                        Annotation(
                            label,
                            **drawing(choice.card, found, index),
                            source=choice.card.source,
                            confidence=min(1.0, float(confidence)),
                        )
                    )
            left_out = len(found) - len(drawn)
            thing = THING[choice.card.task] if len(drawn) == 1 else choice.card.task
            pictures.append(
                draw.Picture(
                    frame.blob,
                    tuple(drawn),
                    f"{frame.name} · {len(drawn)} {thing}" + (f", {left_out} left out" if left_out else ""),
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
            counted = ", ".join(
                f"{facts[name]} {facts.get('task', name) if name == 'boxes' else name}"
                for name in ("frames", "boxes", "failed")
                if facts.get(name)
            )
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
                disabled=not count or bool(choice.why_not),
                key="annotate_preview",
            )
            is_busy = job is not None and not job.is_over
            if st.button(
                f"Annotate {count} frame{'' if count == 1 else 's'}",
                type="primary",
                icon=":material/auto_awesome:",
                key="annotate_go",
                disabled=not count or is_busy or not choice.labels.pairs or bool(choice.why_not),
            ):
                arguments = {
                    "dataset": dataset,
                    "model": choice.model,
                    "statuses": list(choice.statuses),
                    "renames": choice.renames,
                }
                if "confidence" in thresholds(choice):
                    arguments["confidence"] = choice.confidence
                if choice.tiling:
                    arguments["tiling"] = choice.tiling
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


dataset = session.header("Annotate", "A model draws first. What a person drew, touched or accepted is never changed.")
if dataset is None:
    session.empty("No data set yet.", "upload", "Upload frames", "upload")
else:
    with session.explained():
        page(dataset)

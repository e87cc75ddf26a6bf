"""Registered detectors: what each is, how good it is, which one annotates; and how to register one's own."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import streamlit as st

from app import certificate, scores, session
from workbench.errors import Invalid, WorkbenchError
from workbench.inference.detector import check_card
from workbench.inference.graph import file_record
from workbench.inference.known import KNOWN, card_for
from workbench.model import ModelCard
from workbench.steps.deploy import champion_of

CARD = "Another: with its card.json"
COCO_LABELS = "the 80 categories of COCO"
DRAWS = {"boxes": "boxes", "polygons": "polygons", "tags": "tags for the whole frame"}
PICTURES = ["jpg", "jpeg", "png"]


def cards() -> dict[str, ModelCard]:
    """Every registered model by reference; a damaged one is told and left out."""
    store, found = session.workbench().models, {}
    for ref in store.refs():
        with session.explained():
            card = store.card(ref)
            certificate.is_int8(card)  # reads its graph, once
            found[ref] = card
    return found


def marks(card: ModelCard, dataset: str | None, aliases: dict[str, tuple[str, ...]]) -> list[str]:
    """What this model is for the data set: champion and deployed by our ledger, the rest by the tracker's aliases."""
    ref, said = card.ref, []
    if dataset and champion_of(dataset, session.workbench().records) == ref:
        said.append("champion")
    if dataset and session.workbench().records.deployed(dataset) == ref:
        said.append("deployed")
    if certificate.is_int8(card):
        said.append("INT8")
    # The registry calls a version challenger until the next one is trained; of a champion that would only confuse.
    told = {"champion", "deployed", *(["challenger"] if "champion" in said else [])}
    return said + [alias for alias in aliases.get(ref, ()) if alias not in told]


def aliases_of(found: dict[str, ModelCard]) -> dict[str, tuple[str, ...]]:
    """Reference -> aliases in MLflow's registry. Raises Unavailable when it does not answer."""
    tracker, said = session.workbench().tracker, {}
    for name in {card.name for card in found.values() if card.run_id}:
        said |= {f"{one.name}@{one.version}": one.aliases for one in tracker.versions(name)}
    return said


def best_first(found: dict[str, ModelCard], dataset: str | None, aliases: dict[str, tuple[str, ...]]) -> list[str]:
    """References: the deployed one, the champion, then by name, newest first."""
    said = {ref: marks(card, dataset, aliases) for ref, card in found.items()}
    return sorted(
        found,
        key=lambda ref: ("deployed" not in said[ref], "champion" not in said[ref], found[ref].name, _descending(ref)),
    )


def table(
    order: list[str], found: dict[str, ModelCard], dataset: str | None, aliases: dict[str, tuple[str, ...]]
) -> None:
    """Each with the metric that stands for its task, and what it reached in it."""
    primary = {ref: scores.primary(found[ref]) for ref in order}
    st.dataframe(
        [
            {
                "model": ref,
                "is": marks(found[ref], dataset, aliases),
                "draws": found[ref].task,
                "metric": scores.NAMES.get(primary[ref]),
                "score": found[ref].metrics.get(primary[ref]),
                "measured on": found[ref].metrics.get("on"),
                "trained on": found[ref].trained_on.get("ref"),
                "labels": len(found[ref].labels),
                "MB": sum(file.get("size_bytes", 0) for file in found[ref].files.values()) / 1e6,
                "licence": found[ref].licence or None,
            }
            for ref in order
        ],
        hide_index=True,
        placeholder="–",
        column_config={
            "is": st.column_config.ListColumn(width="medium"),
            "score": st.column_config.NumberColumn(format="%.3f"),
            "MB": st.column_config.NumberColumn(format="%.1f"),
        },
    )


def detail(card: ModelCard, dataset: str | None, aliases: dict[str, tuple[str, ...]]) -> None:
    wb, standing = session.workbench(), certificate.standing(card)
    with st.container(border=True):
        head, action = st.columns([3, 2], vertical_alignment="center")
        with head, st.container(horizontal=True, vertical_alignment="center"):
            st.markdown(f"**{session.literal(card.ref)}**", width="content")
            for mark in marks(card, dataset, aliases):
                st.badge(mark, color={"deployed": "green", "champion": "orange", "INT8": "violet"}.get(mark, "gray"))
        with action, st.container(horizontal=True, horizontal_alignment="right"):
            if card.run_id and aliases:
                st.link_button("Open in MLflow", wb.tracker.run_url(card.run_id), icon=":material/open_in_new:")
            if dataset and wb.records.deployed(dataset) != card.ref:
                if st.button(
                    f"Deploy for {dataset}",
                    type="primary",
                    icon=":material/rocket_launch:",
                    key="deploy_model",
                    disabled=bool(standing.why_not),
                    help="An INT8 version may annotate only with a certificate from this machine."
                    if standing.why_not
                    else "The next annotate job of this data set offers it first.",
                ):
                    if session.submit("deploy", {"dataset": dataset, "model": card.ref}):
                        st.rerun()
        if card.description:
            st.markdown(session.literal(card.description))
        with session.explained():
            precision(card, standing, dataset)
        spec = card.input
        left, right = st.columns(2)
        left.dataframe(
            [
                {"what": name, "value": value}
                for name, value in (
                    ("input", f"{spec.size[0]} × {spec.size[1]}, {spec.layout} {spec.dtype}, {spec.colour}"),
                    ("padding", f"{spec.padding}, grey {spec.pad}"),
                    ("decoder", card.decoder["name"]),
                    ("draws", DRAWS[card.task]),
                    ("confidence, IoU", f"{card.decoder.get('confidence', '–')}, {card.decoder.get('iou', '–')}"),
                    ("scores", measured(card)),
                    ("measured on", card.metrics.get("on") or "not said"),
                    ("licence", card.licence or "not said"),
                    ("trained on", card.trained_on.get("ref", "not said")),
                    ("files", ", ".join(card.files)),
                )
            ],
            hide_index=True,
            # Widths in pixels: three scores fit into a line.
            column_config={"what": st.column_config.TextColumn(width=115),
                           "value": st.column_config.TextColumn(width=345)},
        )
        with right:
            st.markdown(f"**{len(card.labels)} labels**")
            st.markdown(" ".join(f":gray-badge[{session.literal(label)}]" for label in card.labels.labels))
        with st.expander("card.json", icon=":material/data_object:"):
            st.json(card.to_json(), expanded=1)


def measured(card: ModelCard) -> str:
    """`mIoU 0.412, mAP@[.5:.95] 0.300`: all that its card knows."""
    known = {name: card.metrics.get(name) for name in scores.FIRST[card.task]}
    said = [f"{scores.NAMES[name]} {value:.3f}" for name, value in known.items() if isinstance(value, (int, float))]
    return ", ".join(said) or "not measured"


def precision(card: ModelCard, standing: certificate.Standing, dataset: str | None) -> None:
    """INT8: the certificate and a new measurement of it; FP32: how to make an INT8 version."""
    is_int8 = standing.is_int8
    kind = "certify" if is_int8 else "quantize"
    if is_int8:
        certificate.show(standing)
    made = f"{card.ref}-int8"
    if not is_int8 and made in session.workbench().models.refs():
        st.caption(
            f":material/bolt: Its INT8 version is {session.literal(made)}: choose it above to see its certificate."
        )
    elif dataset is None:
        st.caption("An INT8 version is made and measured on labelled frames: upload a data set first.")
    else:
        title = "Certify on this machine" if is_int8 else "Make an INT8 version"
        with st.expander(title, icon=":material/bolt:"):
            ask(card, dataset, kind, title)
    job = session.watched(kind, dataset)
    if job and job.args.get("model") == card.ref and (job.state != "done" or not is_int8):
        session.job_panel(job)


def ask(card: ModelCard, dataset: str, kind: str, title: str) -> None:
    st.caption(
        "Runs FP32 and INT8 in turns over labelled frames the model did not learn from: how much accuracy INT8 costs "
        "and how much faster it is, on this machine."
        if kind == "certify"
        else "Whole numbers instead of fractions: usually about twice as fast on this machine, at a small cost in "
        "accuracy that is measured on held-out frames. Only a version that passes is registered; FP32 stays as it is."
    )
    left, right = st.columns(2)
    with left:
        version = session.version_picker(dataset, "Data set version", name=f"version_{kind}")
    if version is None:
        session.empty("No version is published yet.", "versions", "Publish one", "sell")
        return
    split = right.selectbox(
        "Held-out split",
        ["test", "val"],
        key=f"split_{kind}",
        help="Its labelled frames measure; the other frames choose the ranges.",
    )
    if st.button(title, type="primary", icon=":material/bolt:", key=f"{kind}_go"):
        if session.submit(kind, {"model": card.ref, "version": version, "split": split, "dataset": dataset}):
            st.rerun()


def register() -> None:
    """An ONNX file of a known family, or with its card, is checked by running it, then registered."""
    family = st.selectbox(
        "Family",
        [*KNOWN, CARD],
        format_func=lambda name: KNOWN[name].title if name in KNOWN else name,
        key="register_family",
    )
    known = KNOWN.get(family)
    st.caption(
        "The card says everything: decoder, input, labels. See docs/adopting.md." if known is None else known.how
    )
    left, right = st.columns(2, gap="large")
    with left:
        files = st.file_uploader(
            "The .onnx file (and its .onnx.data or weights.pt, if it has them)",
            type=["onnx", "data", "pt", *(PICTURES if known is None else [])],
            accept_multiple_files=True,
            key="register_files",
        )
        if known is None:
            card_file = st.file_uploader("card.json", type=["json"], key="register_card", help="See docs/adopting.md.")
        else:
            picture = st.file_uploader(
                "A picture it must understand (optional)",
                type=PICTURES,
                key="register_sample",
                help="Registered only when the model finds on it what you say. A decoder that fits the shapes but not "
                "the weights, or labels in the wrong order, show here.",
            )
            seen = st.text_input(
                "What is on it",
                placeholder="person, car",
                key="register_seen",
                disabled=picture is None,
                help="Labels of the model, with commas between them.",
            )
    with right:
        if known is not None:
            name = st.text_input("Name", placeholder="traffic-yolox", max_chars=63, key="register_name")
            version = st.text_input("Version", value="1", max_chars=63, key="register_version")
            licence = st.text_input("Licence", value=known.licence, max_chars=60, key=f"register_licence_{family}")
            labels = st.text_area(
                "Labels, one a line, in the order of their class_id",
                placeholder=COCO_LABELS if known.labels else "",
                height=110,
                help=f"Left empty: {COCO_LABELS}." if known.labels else None,
                key="register_labels",
            )
            size = st.number_input(
                "Side of the input in pixels",
                0,
                4096,
                0,
                step=32,
                key="register_size",
                help="Only where the file takes images of any size; 0: as the file says.",
            )
    if st.button("Check and register", type="primary", icon=":material/verified:", key="register_go"):
        if not files:
            st.info("Choose the .onnx file first.", icon=":material/info:")
            return
        with tempfile.TemporaryDirectory() as temporary, st.spinner("Running the model once …"):
            folder = Path(temporary)
            for file in files:
                (folder / _plain_name(file.name)).write_bytes(file.getbuffer())
            if known is None:
                card = _read_card(card_file)
            else:
                onnx = [folder / file.name for file in files if file.name.endswith(".onnx")]
                if len(onnx) != 1:
                    raise Invalid(f"Exactly one .onnx file is needed, got {len(onnx)}.")
                card = card_for(
                    family,
                    onnx[0],
                    name.strip(),
                    version.strip(),
                    labels=tuple(line.strip() for line in labels.splitlines() if line.strip()),
                    licence=licence.strip(),
                    size=(int(size), int(size)) if size else None,
                )
                card = _with_sample(card, folder, picture, seen)
            report = check_card(card, folder, session.workbench().open_backend)
            session.workbench().models.register(card, folder)
        st.session_state["registered"] = (
            f"{card.ref} is registered; it runs on {report['backend']} ({report['precision']})."
        )
        st.rerun()


def _with_sample(card: ModelCard, folder: Path, picture: Any, seen: str) -> ModelCard:
    if picture is None:
        return card
    labels = [label.strip() for label in seen.split(",") if label.strip()]
    if not labels:
        raise Invalid(f"Say what is on {picture.name}: labels of the model, with commas between them.")
    file = folder / f"sample{Path(picture.name).suffix.lower()}"
    file.write_bytes(picture.getbuffer())
    return replace(
        card,
        files={**card.files, file.name: file_record(file)},
        sample={"file": file.name, "expect": [{"label": label} for label in labels]},
    )


def _plain_name(name: str) -> str:
    if Path(name).name != name or name.startswith("."):
        raise Invalid(f"File name {name!r} must be a plain name without folders.")
    return name


def _read_card(file: Any) -> ModelCard:
    if file is None:
        raise Invalid("Add the model's card.json. See docs/adopting.md for its fields.")
    try:
        return ModelCard.from_json(json.loads(file.getvalue()))
    except ValueError as failure:
        if isinstance(failure, WorkbenchError):
            raise
        raise Invalid(f"{file.name} is not JSON: {failure}. Mend it and add it again.") from failure


def _descending(ref: str) -> int:
    version = ref.partition("@")[2]
    return -int(version) if version.isdigit() else 0


dataset = session.header(
    "Models", "What can annotate: your own students, and detectors, mask models and classifiers you bring."
)
if said := st.session_state.pop("registered", None):
    st.success(session.literal(said), icon=":material/verified:")
with session.explained():
    found = cards()
    known: dict[str, tuple[str, ...]] = {}
    with session.explained():
        known = aliases_of(found)
    if found:
        order = best_first(found, dataset, known)
        table(order, found, dataset, known)
        detail(found[session.model_picker(order, "Card of")], dataset, known)
        job = session.watched("deploy", dataset)
        if job and job.state != "done":
            session.job_panel(job)
    else:
        session.empty(
            "No model is registered yet. Train a student on labelled frames, or register one below.",
            "retrain",
            "Train a student",
            "model_training",
        )
with st.expander("Register a model", expanded=not found, icon=":material/add_circle:"), session.explained():
    register()

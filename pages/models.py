"""Registered detectors: what each is, how good it is, which one annotates; and how to register one's own."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import streamlit as st

from app import session
from workbench.errors import Invalid, WorkbenchError
from workbench.inference.detector import check_card
from workbench.inference.known import COCO_80, card_for_nanodet, card_for_yolox
from workbench.model import ModelCard
from workbench.steps.deploy import champion_of

FAMILIES = {"YOLOX": card_for_yolox, "NanoDet-Plus": card_for_nanodet}
CARD = "Another: with its card.json"
COCO_LABELS = "the 80 categories of COCO"


def cards() -> dict[str, ModelCard]:
    """Every registered model by reference; a damaged one is told and left out."""
    store, found = session.workbench().models, {}
    for ref in store.refs():
        with session.explained():
            found[ref] = store.card(ref)
    return found


def marks(ref: str, dataset: str | None, aliases: dict[str, tuple[str, ...]]) -> list[str]:
    """What this model is for the data set: champion and deployed by our ledger, the rest by the tracker's aliases."""
    said = []
    if dataset and champion_of(dataset, session.workbench().records) == ref:
        said.append("champion")
    if dataset and session.workbench().records.deployed(dataset) == ref:
        said.append("deployed")
    return said + [alias for alias in aliases.get(ref, ()) if alias not in ("champion", "deployed")]


def aliases_of(found: dict[str, ModelCard]) -> dict[str, tuple[str, ...]]:
    """Reference -> aliases in MLflow's registry. Raises Unavailable when it does not answer."""
    tracker, said = session.workbench().tracker, {}
    for name in {card.name for card in found.values() if card.run_id}:
        said |= {f"{one.name}@{one.version}": one.aliases for one in tracker.versions(name)}
    return said


def best_first(found: dict[str, ModelCard], dataset: str | None, aliases: dict[str, tuple[str, ...]]) -> list[str]:
    """References: the deployed one, the champion, then by name, newest first."""
    said = {ref: marks(ref, dataset, aliases) for ref in found}
    return sorted(
        found,
        key=lambda ref: ("deployed" not in said[ref], "champion" not in said[ref], found[ref].name, _descending(ref)),
    )


def table(
    order: list[str], found: dict[str, ModelCard], dataset: str | None, aliases: dict[str, tuple[str, ...]]
) -> None:
    st.dataframe(
        [
            {
                "model": ref,
                "is": marks(ref, dataset, aliases),
                "mAP@[.5:.95]": found[ref].metrics.get("map_50_95"),
                "mAP50": found[ref].metrics.get("map_50"),
                "measured on": str(found[ref].metrics.get("on", "")),
                "trained on": found[ref].trained_on.get("ref", ""),
                "labels": len(found[ref].labels),
                "MB": sum(file.get("size_bytes", 0) for file in found[ref].files.values()) / 1e6,
                "licence": found[ref].licence,
            }
            for ref in order
        ],
        hide_index=True,
        placeholder="–",
        column_config={
            "is": st.column_config.ListColumn(),
            "mAP@[.5:.95]": st.column_config.NumberColumn(format="%.3f"),
            "mAP50": st.column_config.NumberColumn(format="%.3f"),
            "MB": st.column_config.NumberColumn(format="%.1f"),
        },
    )


def detail(card: ModelCard, dataset: str | None, aliases: dict[str, tuple[str, ...]]) -> None:
    wb = session.workbench()
    with st.container(border=True):
        head, action = st.columns([3, 2], vertical_alignment="center")
        with head, st.container(horizontal=True, vertical_alignment="center"):
            st.markdown(f"**{session.literal(card.ref)}**", width="content")
            for mark in marks(card.ref, dataset, aliases):
                st.badge(mark, color={"deployed": "green", "champion": "orange"}.get(mark, "gray"))
        with action, st.container(horizontal=True, horizontal_alignment="right"):
            if card.run_id and aliases:
                st.link_button("Open in MLflow", wb.tracker.run_url(card.run_id), icon=":material/open_in_new:")
            if dataset and wb.records.deployed(dataset) != card.ref:
                if st.button(
                    f"Deploy for {dataset}",
                    type="primary",
                    icon=":material/rocket_launch:",
                    key="deploy_model",
                    help="The next annotate job of this data set offers it first.",
                ):
                    if session.submit("deploy", {"dataset": dataset, "model": card.ref}):
                        st.rerun()
        if card.description:
            st.markdown(session.literal(card.description))
        spec = card.input
        left, right = st.columns(2)
        left.dataframe(
            [
                {"": name, "value": value}
                for name, value in (
                    ("input", f"{spec.size[0]} × {spec.size[1]}, {spec.layout} {spec.dtype}, {spec.colour}"),
                    ("padding", f"{spec.padding}, grey {spec.pad}"),
                    ("decoder", card.decoder["name"]),
                    ("confidence, IoU", f"{card.decoder.get('confidence', '–')}, {card.decoder.get('iou', '–')}"),
                    ("licence", card.licence or "not said"),
                    ("trained on", card.trained_on.get("ref", "not said")),
                    ("files", ", ".join(card.files)),
                )
            ],
            hide_index=True,
        )
        with right:
            st.markdown(f"**{len(card.labels)} labels**")
            st.markdown(" ".join(f":gray-badge[{session.literal(label)}]" for label in card.labels.labels))
        with st.expander("card.json", icon=":material/data_object:"):
            st.json(card.to_json(), expanded=1)


def register() -> None:
    """An ONNX file of a known family, or with its card, is checked by running it, then registered."""
    family = st.segmented_control("Family", [*FAMILIES, CARD], default="YOLOX", required=True, key="register_family")
    left, right = st.columns(2, gap="large")
    with left:
        files = st.file_uploader(
            "The .onnx file (and its .onnx.data or weights.pt, if it has them)",
            type=["onnx", "data", "pt"],
            accept_multiple_files=True,
            key="register_files",
        )
        if family == CARD:
            card_file = st.file_uploader("card.json", type=["json"], key="register_card", help="See docs/adopting.md.")
        else:
            st.caption(
                "YOLOX as tools/export_onnx.py writes it, without --decode_in_inference."
                if family == "YOLOX"
                else "NanoDet-Plus as tools/export_onnx.py writes it."
            )
    with right:
        if family != CARD:
            name = st.text_input("Name", placeholder="traffic-yolox", max_chars=63, key="register_name")
            version = st.text_input("Version", value="1", max_chars=63, key="register_version")
            licence = st.text_input("Licence", value="Apache-2.0", max_chars=60, key="register_licence")
            labels = st.text_area(
                "Labels, one a line, in the order of their class_id",
                placeholder=COCO_LABELS,
                height=110,
                help=f"Left empty: {COCO_LABELS}.",
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
            if family == CARD:
                card = _read_card(card_file)
            else:
                onnx = [folder / file.name for file in files if file.name.endswith(".onnx")]
                if len(onnx) != 1:
                    raise Invalid(f"Exactly one .onnx file is needed, got {len(onnx)}.")
                given = tuple(line.strip() for line in labels.splitlines() if line.strip())
                card = FAMILIES[family](
                    onnx[0],
                    name.strip(),
                    version.strip(),
                    labels=given or COCO_80,
                    licence=licence.strip(),
                    size=(int(size), int(size)) if size else None,
                )
            report = check_card(card, folder, session.workbench().open_backend)
            session.workbench().models.register(card, folder)
        st.session_state["registered"] = (
            f"{card.ref} is registered; it runs on {report['backend']} ({report['precision']})."
        )
        st.rerun()


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
    "Models", "Detectors that can annotate: your own students, and any YOLOX or NanoDet you bring."
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

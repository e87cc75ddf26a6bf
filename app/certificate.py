"""An INT8 model's certificate as a picture: cost and speed against FP32, and whether it may annotate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import altair as alt
import pandas as pd
import streamlit as st

from app import scores, session, times
from workbench.errors import WorkbenchError
from workbench.inference.certificate import METRICS
from workbench.inference.graph import read_graph
from workbench.inference.quantize import is_quantized
from workbench.model import ModelCard
from workbench.ports import BackendReport

FP32, INT8 = "#94a3b8", "#0f766e"
# What the metric of a certificate counts in the truth.
COUNTED = {"map_50_95": "boxes", "miou": "regions", "accuracy": "tags", "map": "tags"}
ALL = "all labels"
# More labels than this are a wall of bars; the ones that lose most are shown.
LABELS_SHOWN = 12


@dataclass(frozen=True)
class Standing:
    """Whether a model may annotate here.

    certificate  of an INT8 model, the one that counts here or else the newest; None: there is none
    why_not      "" when it may, else a sentence with the next step
    """

    is_int8: bool
    certificate: Mapping[str, Any] | None = None
    why_not: str = ""


def standing(card: ModelCard) -> Standing:
    """As the door does it (steps.certify.open_annotator), without running the model."""
    wb, sha256 = session.workbench(), card.files[card.onnx]["sha256"]
    if not is_int8(card):
        return Standing(is_int8=False)
    kept = wb.certificates.of(card.ref)
    try:
        report = BackendReport(**_report(sha256, card.ref, card.onnx, wb.config.backend))
        found = wb.certificates.check(
            card.ref,
            file_sha256=sha256,
            report=report,
            calibration_digest=str(card.quantization.get("calibration_digest", "")),
        )
    except WorkbenchError as failure:
        return Standing(True, kept[0] if kept else None, str(failure))
    return Standing(True, found)


def is_int8(card: ModelCard) -> bool:
    """By its card, or by the graph itself."""
    return bool(card.quantization) or _is_quantized(card.files[card.onnx]["sha256"], card.ref, card.onnx)


@st.cache_data(max_entries=500, show_spinner=False)
def _is_quantized(sha256: str, ref: str, onnx: str) -> bool:
    return is_quantized(read_graph(session.workbench().models.folder(ref) / onnx)[1])


@st.cache_data(max_entries=50, show_spinner="Asking what runs the INT8 version here …")
def _report(sha256: str, ref: str, onnx: str, backend: str) -> dict[str, str]:
    wb = session.workbench()
    with wb.open_backend(wb.models.folder(ref) / onnx) as opened:
        return vars(opened.report)


def show(one: Standing) -> None:
    """An INT8 model's certificate, its verdict first; what to do next when there is none or it does not count."""
    certificate = one.certificate
    if certificate is None:
        st.warning(session.literal(one.why_not), icon=":material/lock:")
        return
    if not one.why_not:
        st.success(
            "This INT8 version passed its certificate on this machine: it may annotate.", icon=":material/verified:"
        )
    elif certificate["passed"]:
        st.warning("It may not annotate here. " + session.literal(one.why_not), icon=":material/lock:")
    else:
        st.error(
            "It failed its certificate, so it may not annotate. The FP32 version still may.", icon=":material/block:"
        )
        st.markdown("\n".join(f"- {session.literal(reason)}" for reason in certificate["reasons"]))
        st.caption("Next: quantise again with more frames (a new version of the FP32 model first), or go on with FP32.")
    fp32, int8 = certificate["fp32"], certificate["int8"]
    metric, (low, high) = certificate["metric"], certificate["loss_interval"]
    is_worse = certificate["loss"] > certificate["limits"]["loss"]
    name = METRICS[metric][0]
    tiles = st.columns(4)
    tiles[0].metric(
        f"FP32 {name}",
        f"{fp32[metric]:.3f}",
        certificate["against"]["model"],
        delta_color="off",
        delta_arrow="off",
        border=True,
        help=f"{scores.NAMES[metric]} of the model it was made from.",
    )
    tiles[1].metric(
        f"INT8 {name}",
        f"{int8[metric]:.3f}",
        change(certificate),
        border=True,
        delta_arrow="off",
        delta_color="normal" if is_worse else "off",
        help=f"With 95 % certainty INT8 loses between {low:+.4f} and {high:+.4f} on other frames like these (below 0: "
        f"it gains). A loss of {certificate['limits']['loss']} is allowed.",
    )
    tiles[2].metric(
        "Speed-up",
        f"{certificate['speedup']:.2f} ×",
        f"{fp32['images_per_s']:.0f} → {int8['images_per_s']:.0f} images/s",
        delta_color="off",
        delta_arrow="off",
        border=True,
        help="Of the bare model on this machine, FP32 and INT8 in turns.",
    )
    likeness(tiles[3], certificate)
    st.altair_chart(bars(certificate), width="stretch")
    more = len(certificate["per_class"]) - LABELS_SHOWN
    st.caption(
        f"Bars: {charted(metric)}, higher is better. The orange line: where INT8 lies with 95 % certainty."
        + (f" Shown are the {LABELS_SHOWN} labels that lose most; {more} more lose less." if more > 0 else "")
    )
    st.caption(
        session.literal(
            f"Measured on {certificate['frames']} frames with {certificate['truth']} {COUNTED[metric]} of "
            f"{certificate['on']}, "
            f"which took no part in quantising · {certificate['device']} · {certificate['library']} · "
            f"{certificate['precision']} · {times.clock(certificate['created_at'])}"
        )
    )


def change(certificate: Mapping[str, Any]) -> str:
    """What INT8 gains (+) or loses (-) of the metric; nothing is +0.0000."""
    return f"{round(-certificate['loss'], 4) + 0.0:+.4f}"


def likeness(tile: Any, certificate: Mapping[str, Any]) -> None:
    """How much alike what both versions draw is, in the way of the task."""
    if "box_shift_px" in certificate:
        shift = certificate["box_shift_px"]
        name, median, p95 = "Boxes move by", shift["median"], shift["p95"]
        value = "–" if median is None else f"{median:.1f} px"
        more = "no box to compare" if p95 is None else f"19 of 20 by < {p95:.1f} px"
        how = "Boxes that both versions draw; the first figure is the median."
    elif "same_tags" in certificate:
        name, value, more = "Same tags", f"{certificate['same_tags']:.1%}", "of the frames"
        how = "The share of frames on which both versions set the same tags."
    else:
        share = certificate["same_pixels"]
        name, value = "Same label", "–" if share is None else f"{share:.1%}"
        more = "no region to compare" if share is None else "of the labelled pixels"
        how = "Of the pixels that at least one version gives a label, the share to which both give the same one."
    tile.metric(name, value, more, delta_color="off", delta_arrow="off", border=True, help=how)


def charted(metric: str) -> str:
    """What the bars show of one label."""
    part = METRICS[metric][1]
    return "average precision" if part == "AP" else part


def bars(certificate: Mapping[str, Any]) -> alt.Chart:
    """FP32 beside INT8, all labels together first, then each, the ones that lose most first."""
    metric, (low, high) = certificate["metric"], certificate["loss_interval"]
    measured = {ALL: (certificate["fp32"][metric], certificate["int8"][metric], low, high, certificate["truth"])}
    labels = sorted(certificate["per_class"].items(), key=lambda item: item[1]["int8"] - item[1]["fp32"])
    for label, row in labels[:LABELS_SHOWN]:
        measured[label] = (row["fp32"], row["int8"], *row["interval"], row["truth"])
    rows = []
    counted = COUNTED[metric]
    for label, (fp32, int8, low, high, truth) in measured.items():
        rows.append({"label": label, "model": "FP32", "score": fp32, counted: truth})
        rows.append(
            {
                "label": label,
                "model": "INT8",
                "score": int8,
                counted: truth,
                "least": max(0.0, fp32 - high),
                "most": min(1.0, fp32 - low),
            }
        )
    table = pd.DataFrame(rows, columns=["label", "model", "score", counted, "least", "most"])
    base = alt.Chart(table).encode(
        y=alt.Y("label:N", sort=list(measured), title=None, axis=alt.Axis(labelOverlap=False, labelLimit=200)),
        yOffset=alt.YOffset("model:N", sort=["FP32", "INT8"]),
    )
    drawn = base.mark_bar(cornerRadiusEnd=2).encode(
        x=alt.X("score:Q", scale=alt.Scale(domain=[0, 1]), title=charted(metric), axis=alt.Axis(tickCount=5)),
        color=alt.Color(
            "model:N",
            scale=alt.Scale(domain=["FP32", "INT8"], range=[FP32, INT8]),
            legend=alt.Legend(orient="top", title=None),
        ),
        tooltip=[
            "label",
            "model",
            alt.Tooltip("score:Q", format=".3f", title="AP@[.5:.95]" if metric == "map_50_95" else charted(metric)),
            counted,
            alt.Tooltip("least:Q", format=".3f", title="at least"),
            alt.Tooltip("most:Q", format=".3f", title="at most"),
        ],
    )
    intervals = (
        base.transform_filter("isValid(datum.least)")
        .mark_rule(strokeWidth=2, color="#d97706")
        .encode(x=alt.X("least:Q"), x2="most:Q")
    )
    return (drawn + intervals).properties(height=110 + 44 * len(measured))

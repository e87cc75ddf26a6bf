"""An INT8 model's certificate as a picture: cost and speed against FP32, and whether it may annotate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import altair as alt
import pandas as pd
import streamlit as st

from app import session, times
from workbench.errors import WorkbenchError
from workbench.inference.graph import read_graph
from workbench.inference.quantize import is_quantized
from workbench.model import ModelCard
from workbench.ports import BackendReport

FP32, INT8 = "#94a3b8", "#0f766e"
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
    low, high = certificate["map_loss_interval"]
    shift = certificate["box_shift_px"]
    is_worse = certificate["map_loss"] > certificate["limits"]["map_loss"]
    tiles = st.columns(4)
    tiles[0].metric(
        "mAP, FP32",
        f"{fp32['map_50_95']:.3f}",
        certificate["against"]["model"],
        delta_color="off",
        delta_arrow="off",
        border=True,
        help="mAP@[.5:.95] of the model it was made from.",
    )
    tiles[1].metric(
        "mAP, INT8",
        f"{int8['map_50_95']:.3f}",
        f"{-certificate['map_loss']:+.4f}",
        border=True,
        delta_arrow="off",
        delta_color="normal" if is_worse else "off",
        help=f"With 95 % certainty INT8 loses between {low:+.4f} and {high:+.4f} on other frames like these (below 0: it "
        f"gains). A loss of {certificate['limits']['map_loss']} is allowed.",
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
    tiles[3].metric(
        "Boxes move by",
        "–" if shift["median"] is None else f"{shift['median']:.1f} px",
        "no box to compare" if shift["p95"] is None else f"19 of 20 by < {shift['p95']:.1f} px",
        delta_color="off",
        delta_arrow="off",
        border=True,
        help="Boxes that both versions draw; the first figure is the median.",
    )
    st.altair_chart(bars(certificate), width="stretch")
    more = len(certificate["per_class"]) - LABELS_SHOWN
    st.caption(
        "Average precision, higher is better. The orange line: where INT8 lies with 95 % certainty."
        + (f" Shown are the {LABELS_SHOWN} labels that lose most; {more} more lose less." if more > 0 else "")
    )
    st.caption(
        session.literal(
            f"Measured on {certificate['frames']} frames with {certificate['boxes']} boxes of {certificate['on']}, which "
            f"took no part in quantising · {certificate['device']} · {certificate['library']} · {certificate['precision']} · "
            f"{times.clock(certificate['created_at'])}"
        )
    )


def bars(certificate: Mapping[str, Any]) -> alt.Chart:
    """FP32 beside INT8, all labels together first, then each, the ones that lose most first."""
    low, high = certificate["map_loss_interval"]
    measured = {
        ALL: (certificate["fp32"]["map_50_95"], certificate["int8"]["map_50_95"], low, high, certificate["boxes"])
    }
    labels = sorted(certificate["per_class"].items(), key=lambda item: item[1]["int8"] - item[1]["fp32"])
    for label, row in labels[:LABELS_SHOWN]:
        measured[label] = (row["fp32"], row["int8"], *row["interval"], row["boxes"])
    rows = []
    for label, (fp32, int8, low, high, boxes) in measured.items():
        rows.append({"label": label, "model": "FP32", "ap": fp32, "boxes": boxes})
        rows.append(
            {
                "label": label,
                "model": "INT8",
                "ap": int8,
                "boxes": boxes,
                "least": max(0.0, fp32 - high),
                "most": min(1.0, fp32 - low),
            }
        )
    table = pd.DataFrame(rows, columns=["label", "model", "ap", "boxes", "least", "most"])
    base = alt.Chart(table).encode(
        y=alt.Y("label:N", sort=list(measured), title=None, axis=alt.Axis(labelOverlap=False, labelLimit=200)),
        yOffset=alt.YOffset("model:N", sort=["FP32", "INT8"]),
    )
    drawn = base.mark_bar(cornerRadiusEnd=2).encode(
        x=alt.X("ap:Q", scale=alt.Scale(domain=[0, 1]), title="average precision", axis=alt.Axis(tickCount=5)),
        color=alt.Color(
            "model:N",
            scale=alt.Scale(domain=["FP32", "INT8"], range=[FP32, INT8]),
            legend=alt.Legend(orient="top", title=None),
        ),
        tooltip=[
            "label",
            "model",
            alt.Tooltip("ap:Q", format=".3f", title="AP@[.5:.95]"),
            "boxes",
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

"""Charts of an evaluation and of a training run, in Altair, which Streamlit brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import altair as alt
import pandas as pd

HEIGHT = 300
NOTHING = "nothing there"


def pr_curves(curves: Mapping[str, Sequence[tuple[float, float]]]) -> alt.Chart:
    """Precision over recall, one line a label. curves: label -> [(recall, precision)]."""
    rows = pd.DataFrame(
        [
            {"label": label, "recall": recall, "precision": precision}
            for label, points in curves.items()
            for recall, precision in points
        ],
        columns=["label", "recall", "precision"],
    )
    return (
        alt.Chart(rows)
        .mark_line(interpolate="step-after", strokeWidth=2)
        .encode(
            x=alt.X("recall:Q", scale=alt.Scale(domain=[0, 1])),
            y=alt.Y("precision:Q", scale=alt.Scale(domain=[0, 1])),
            color=alt.Color("label:N", sort=list(curves)),
            tooltip=["label", alt.Tooltip("recall", format=".2f"), alt.Tooltip("precision", format=".2f")],
        )
        .properties(height=HEIGHT)
    )


def confusion(
    labels: Sequence[str], matrix: Sequence[Sequence[int]], nothing: str = NOTHING, things: str = "boxes"
) -> alt.Chart:
    """Truth in rows, prediction in columns; the last row and column stand for `nothing`. things: what is counted, of
    pixels their share is written."""
    names = list(labels) + [nothing] * (len(matrix) - len(labels))
    rows = pd.DataFrame(
        [
            {"truth": names[i], "prediction": names[j], "boxes": int(count), "share": count / max(1, sum(row))}
            for i, row in enumerate(matrix)
            for j, count in enumerate(row)
        ],
        columns=["truth", "prediction", "boxes", "share"],
    )
    base = alt.Chart(rows).encode(
        x=alt.X("prediction:N", sort=names, axis=alt.Axis(labelAngle=-35, orient="bottom")),
        y=alt.Y("truth:N", sort=names),
    )
    squares = base.mark_rect(cornerRadius=2).encode(
        color=alt.Color(
            "share:Q",
            scale=alt.Scale(range=["rgba(15,118,110,0.05)", "rgba(15,118,110,1)"], domain=[0, 1]),
            legend=None,
        ),
        tooltip=[
            "truth",
            "prediction",
            alt.Tooltip("boxes:Q", title=things, format=","),
            alt.Tooltip("share", format=".0%"),
        ],
    )
    if things == "pixels":
        written = alt.Text("share:Q", format=".1%")
    else:
        written = alt.condition("datum.boxes > 0", "boxes:Q", alt.value(""))
    text = base.mark_text(fontSize=11).encode(
        text=written,
        color=alt.condition("datum.share > 0.55", alt.value("white"), alt.value("#66757a")),
    )
    return (squares + text).properties(height=max(HEIGHT, 90 + 26 * len(names)))


def ap_bars(
    per_label: Mapping[str, Mapping[str, float | None]], names: tuple[str, str] = ("AP@[.5:.95]", "AP50")
) -> alt.Chart:
    """One bar and one tick ("ap", "ap50") a label, worst first; names: what the two are called."""
    # Altair takes a colon in a column's name for a type, so the columns have plain names.
    rows = pd.DataFrame(
        [
            {"label": label, "ap": values.get("ap", 0.0), "ap50": values.get("ap50", 0.0)}
            for label, values in per_label.items()
        ],
        columns=["label", "ap", "ap50"],
    )
    order = list(rows.sort_values("ap")["label"])
    base = alt.Chart(rows).encode(y=alt.Y("label:N", sort=order, title=None, axis=alt.Axis(labelOverlap=False)))
    scale = alt.Scale(domain=[0, 1])
    bars = base.mark_bar(cornerRadiusEnd=2, color="#0f766e").encode(
        x=alt.X("ap:Q", scale=scale, title="average precision" if names[0].startswith("AP") else names[0]),
        tooltip=[
            "label",
            alt.Tooltip("ap:Q", format=".3f", title=names[0]),
            alt.Tooltip("ap50:Q", format=".3f", title=names[1]),
        ],
    )
    ticks = base.mark_tick(thickness=3, color="#d97706").encode(x=alt.X("ap50:Q", scale=scale))
    # The axis below takes its part of the height.
    return (bars + ticks).properties(height=86 + 26 * len(order))


def learning(histories: Mapping[str, Sequence[tuple[float, float]]], y: str = "value", x: str = "epoch") -> alt.Chart:
    """One line a metric over epochs. histories: name -> [(epoch, value)]."""
    rows = pd.DataFrame(
        [{"metric": name, x: step, y: value} for name, points in histories.items() for step, value in points],
        columns=["metric", x, y],
    )
    return (
        alt.Chart(rows)
        .mark_line(point=alt.OverlayMarkDef(size=22), strokeWidth=2)
        .encode(
            x=alt.X(f"{x}:Q", axis=alt.Axis(tickMinStep=1, format="d")),
            y=alt.Y(f"{y}:Q", scale=alt.Scale(zero=False), axis=alt.Axis(format="~g")),
            color=alt.Color("metric:N", legend=alt.Legend(orient="top", title=None)),
            tooltip=["metric", x, alt.Tooltip(y, format=".4f")],
        )
        .properties(height=240)
    )

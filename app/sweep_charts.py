"""Charts of a sweep, in Altair: learning curves of all trials, parallel coordinates, what mattered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import pandas as pd

from workbench.search_space import Choice, Range, Space

BEST = "best"
# What a line looks like: colour, and dotted or not.
LOOKS = {
    BEST: ("#0f766e", [1, 0]),
    "complete": ("#94a3b8", [1, 0]),
    "running": ("#2563eb", [1, 0]),
    "pruned": ("#d97706", [2, 3]),
    "stopped": ("#a8a29e", [2, 3]),
    "failed": ("#dc2626", [2, 3]),
}
# A scale from the first to the last value of more than this is drawn logarithmically.
WIDE = 100
HEIGHT = 320


@dataclass(frozen=True)
class Line:
    """A trial as it is drawn. kind: a key of LOOKS; points: (epoch, value) of the sweep's metric; value: the figure it
    is judged by, or the last one it reached."""

    number: int
    kind: str
    params: Mapping[str, Any]
    points: Sequence[tuple[int, float]]
    value: float | None


def curves(lines: Sequence[Line], metric: str) -> alt.LayerChart:
    """One line a trial over epochs: the best one stands out, pruned ones are dotted."""
    rows = pd.DataFrame(
        [
            {"trial": line.number, "kind": line.kind, "epoch": epoch, "value": value, "with": _told(line.params)}
            for line in lines
            for epoch, value in line.points
            if math.isfinite(value)
        ],
        columns=["trial", "kind", "epoch", "value", "with"],
    )
    values = list(rows["value"])
    is_log = bool(values) and min(values) > 0 and max(values) > WIDE * min(values)
    last = int(rows["epoch"].max()) if len(rows) else 1
    base = alt.Chart(rows).encode(
        x=alt.X(
            "epoch:Q",
            scale=alt.Scale(domain=[1, max(2, last)], nice=False),
            axis=alt.Axis(tickMinStep=1, format="d", grid=False),
        ),
        y=alt.Y(
            "value:Q",
            title=metric,
            scale=alt.Scale(type="log" if is_log else "linear", zero=False),
            axis=alt.Axis(format="~g", tickCount=5, grid=not is_log),
        ),
        detail="trial:N",
        tooltip=["trial:Q", "kind:N", "epoch:Q", alt.Tooltip("value:Q", format=".5~g", title=metric), "with:N"],
    )
    looks = {"color": _colours(lines), "strokeDash": _dashes(lines)}
    rest = base.transform_filter(alt.datum.kind != BEST).mark_line(strokeWidth=1.4, opacity=0.75).encode(**looks)
    best = base.transform_filter(alt.datum.kind == BEST).mark_line(strokeWidth=3.5).encode(**looks)
    # A single epoch is no line.
    dots = base.mark_point(filled=True).encode(
        color=looks["color"], size=alt.condition(alt.datum.kind == BEST, alt.value(45), alt.value(14))
    )
    return alt.layer(rest, best, dots).properties(height=HEIGHT)


def parallel(lines: Sequence[Line], space: Space, metric: str) -> alt.LayerChart:
    """One line a trial across an axis for each searched parameter and, last, the metric."""
    axes = {name: _axis(one) for name, one in space.parameters.items()}
    reached = [line.value for line in lines if line.value is not None and math.isfinite(line.value)]
    axes[metric] = _measured(reached)
    order, rows, ticks = list(axes), [], []
    for line in lines:
        for name in order:
            value = line.value if name == metric else line.params.get(name)
            if value is None or name == metric and value not in reached:
                continue
            rows.append(
                {
                    "trial": line.number,
                    "kind": line.kind,
                    "axis": name,
                    "at": axes[name].place(value),
                    "value": short(line.value),
                    "with": _told(line.params),
                }
            )
    for name in order:
        ticks += [{"axis": name, "at": axes[name].place(value), "tick": short(value)} for value in axes[name].ticks]
    table = pd.DataFrame(rows, columns=["trial", "kind", "axis", "at", "value", "with"])
    x = alt.X("axis:N", sort=order, title=None, scale=alt.Scale(padding=0.35), axis=_above(len(order)))
    y = alt.Y("at:Q", axis=None, scale=alt.Scale(domain=[-0.04, 1.04]))
    base = alt.Chart(table).encode(
        x=x,
        y=y,
        detail="trial:N",
        tooltip=["trial:Q", "kind:N", alt.Tooltip("value:N", title=metric), "with:N"],
        color=_colours(lines),
        strokeDash=_dashes(lines),
    )
    bars = (
        alt.Chart(pd.DataFrame([{"axis": name, "at": 0, "to": 1} for name in order]))
        .mark_rule(strokeWidth=1.5, color="#64748b")
        .encode(x=x, y=y, y2="to:Q")
    )
    marks = alt.Chart(pd.DataFrame(ticks, columns=["axis", "at", "tick"])).encode(x=x, y=y)
    rest = base.transform_filter(alt.datum.kind != BEST).mark_line(strokeWidth=1.4, opacity=0.7)
    best = base.transform_filter(alt.datum.kind == BEST).mark_line(strokeWidth=3.5)
    labels = marks.mark_text(
        align="left", dx=7, dy=-7, fontSize=11, color="#475569", stroke="white", strokeWidth=3
    ).encode(text="tick:N")
    named = marks.mark_text(align="left", dx=7, dy=-7, fontSize=11, color="#334155").encode(text="tick:N")
    notches = marks.mark_tick(orient="horizontal", size=8, thickness=1.5, color="#64748b")
    return alt.layer(rest, best, bars, notches, labels, named).properties(height=HEIGHT)


def importance(shares: Mapping[str, float]) -> alt.Chart:
    """Bars: how much of the differences between trials each parameter explains."""
    rows = pd.DataFrame(sorted(shares.items(), key=lambda one: -one[1]), columns=["parameter", "share"])
    return (
        alt.Chart(rows)
        .mark_bar(cornerRadiusEnd=2, color="#0f766e", height=14)
        .encode(
            y=alt.Y("parameter:N", sort=list(rows["parameter"]), title=None),
            x=alt.X("share:Q", title=None, scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%", tickCount=5)),
            tooltip=["parameter", alt.Tooltip("share", format=".0%")],
        )
        .properties(height=40 + 26 * len(rows))
    )


@dataclass(frozen=True)
class _Axis:
    """Where values lie between 0 and 1, and which of them are written beside the axis."""

    ticks: tuple[Any, ...]
    low: float = 0.0
    high: float = 1.0
    is_log: bool = False
    names: tuple[Any, ...] = ()

    def place(self, value: Any) -> float:
        if self.names:
            return self.names.index(value) / (len(self.names) - 1) if len(self.names) > 1 else 0.5
        low, high, value = (math.log(one) if self.is_log else one for one in (self.low, self.high, value))
        return (value - low) / (high - low) if high > low else 0.5


def _axis(one: Choice | Range) -> _Axis:
    if isinstance(one, Choice):
        # Numbers in their order, words in that of the list.
        are_numbers = all(isinstance(value, (int, float)) for value in one.values)
        names = tuple(sorted(one.values)) if are_numbers else one.values
        return _Axis(names, names=names)
    return _Axis(_ticks(one.low, one.high, one.is_log, one.is_whole), one.low, one.high, one.is_log)


def _measured(values: Sequence[float]) -> _Axis:
    if not values:
        return _Axis(())
    low, high = min(values), max(values)
    is_log = low > 0 and high > WIDE * low
    return _Axis(_ticks(low, high, is_log, False), low, high, is_log)


def _ticks(low: float, high: float, is_log: bool, is_whole: bool) -> tuple[float, ...]:
    """Both ends and what divides the way between them in four, or the powers of ten where it is logarithmic."""
    if low == high:
        return (low,)
    if is_log:
        powers = [10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
        step = max(1, len(powers) // 4)
        inner = [
            one
            for one in powers[::step]
            if math.log(one / low) > 0.08 * math.log(high / low)
            and math.log(high / one) > 0.08 * math.log(high / low)
        ]
        return (low, *inner, high)
    inner = [low + (high - low) * part / 4 for part in (1, 2, 3)]
    return tuple(dict.fromkeys([low, *(round(one) for one in inner), high] if is_whole else [low, *inner, high]))


def _above(count: int) -> alt.Axis:
    return alt.Axis(orient="top", labelAngle=0, labelFontWeight="bold", labelLimit=max(60, 640 // count), ticks=False,
                    domain=False, labelPadding=8, grid=False)


def _kinds(lines: Sequence[Line]) -> list[str]:
    return [kind for kind in LOOKS if any(line.kind == kind for line in lines)]


def _colours(lines: Sequence[Line]) -> alt.Color:
    kinds = _kinds(lines)
    return alt.Color(
        "kind:N",
        scale=alt.Scale(domain=kinds, range=[LOOKS[kind][0] for kind in kinds]),
        legend=alt.Legend(orient="bottom", title=None, symbolType="stroke", symbolStrokeWidth=2),
    )


def _dashes(lines: Sequence[Line]) -> alt.StrokeDash:
    kinds = _kinds(lines)
    return alt.StrokeDash(
        "kind:N",
        scale=alt.Scale(domain=kinds, range=[LOOKS[kind][1] for kind in kinds]),
        legend=alt.Legend(orient="bottom", title=None, symbolType="stroke", symbolStrokeWidth=2),
    )


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)


def _told(params: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {short(value)}" for name, value in params.items())

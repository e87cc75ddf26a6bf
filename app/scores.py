"""What an evaluation measured, on screen: numbers, one table a label, curves and confusions, as the task has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import streamlit as st

from app import charts, session
from workbench.errors import Invalid, NotFound
from workbench.evaluation.primary import Scored, default_metric, task_of
from workbench.evaluation.tags import TagMetrics
from workbench.model import ModelCard

# Metric -> what its column is called, as they stand in the tracker's runs.
NAMES = {"map_50_95": "mAP@[.5:.95]", "map_50": "mAP50", "miou": "mIoU", "accuracy": "accuracy",
         "macro_f1": "macro F1", "map": "mAP of tags"}

# What a model draws -> its metrics, the one that stands for it first.
FIRST = {"boxes": ("map_50_95", "map_50"), "polygons": ("miou", "map_50_95", "map_50"),
         "tags": ("accuracy", "map", "macro_f1")}


@st.cache_data(show_spinner=False, max_entries=200)
def metric_of(version: str, task: str | None = None) -> str:
    """What models that draw `task` (None: what people drew) are compared by on a version, where nobody says. A version
    never changes. Raises NotFound."""
    frames = session.workbench().datasets.manifest(version).frames
    return default_metric(task or task_of(frames), frames)


def first(task: str, measured: Mapping[str, Any], usual: str | None = None) -> str | None:
    """The metric that stands for a model: `usual` where that was measured, else the first of its task that was."""
    return next((name for name in (usual, *FIRST[task]) if isinstance(measured.get(name), (int, float))), None)


def primary(card: ModelCard) -> str | None:
    """The metric of its card that stands for a model: what promotion decides by on the version it was trained on."""
    usual, ref = None, card.trained_on.get("ref")
    if ref and card.task != "boxes":
        try:
            usual = metric_of(ref, card.task)
        except (NotFound, Invalid):
            usual = None  # trained elsewhere, or on a version that is gone: the card's own numbers still stand
    return first(card.task, card.metrics, usual)


def tiles(metrics: Scored) -> list[tuple[str, float | None]]:
    """(name, value or None) of the numbers that stand first."""
    if isinstance(metrics, TagMetrics):
        at = [] if metrics.is_exclusive else [("at confidence", metrics.confidence)]
        return [("accuracy", metrics.accuracy), ("macro F1", metrics.macro_f1), ("mAP", metrics.map), *at]
    ends = [("best F1", metrics.best_f1), ("at confidence", metrics.best_confidence)]
    if metrics.regions is None:
        return [("mAP@[.5:.95]", metrics.map_50_95), ("mAP50", metrics.map_50), ("mAP75", metrics.coco.get("map_75")),
                ("recall, 100 boxes", metrics.coco.get("ar_100")), *ends]
    of_masks = metrics.regions.coco
    one_by_one = [(f"mask {NAMES[name]}", of_masks[name]) for name in ("map_50_95", "map_50") if of_masks]
    return [("mIoU", metrics.regions.miou), *one_by_one, ("box mAP@[.5:.95]", metrics.map_50_95), *ends]


def counted(metrics: Scored) -> str:
    """How much was counted, in a line."""
    if isinstance(metrics, TagMetrics):
        at = f"from confidence {metrics.confidence:.2f} on"
        how = "the surest label of each frame" if metrics.is_exclusive else at
        return f"{metrics.frames} frames, {metrics.truth} tags in the truth, {metrics.detections} set ({how})"
    things = "boxes" if metrics.regions is None else "regions"
    return (f"{metrics.frames} frames, {metrics.truth} {things} in the truth, {metrics.detections} drawn at confidence "
            f"{metrics.confidence:.2f}")


def by_label(metrics: Scored) -> None:
    """A bar and a row a label."""
    if isinstance(metrics, TagMetrics):
        _bars({label: (row["f1"], row["ap"]) for label, row in metrics.per_class.items()}, ("F1", "AP"), [
            {"label": label, "F1": row["f1"], "precision": row["precision"], "recall": row["recall"], "AP": row["ap"],
             "top-1": row["accuracy"], "truth": row["truth"], "set": row["detections"]}
            for label, row in metrics.per_class.items()], "Bar: F1 of the tags that are set. Tick: average precision.")
        return
    rows = [{"label": label, "AP": row["ap"], "AP50": row["ap50"], "truth": row["truth"], "drawn": row["detections"],
             "best F1": row["best_f1"], "at": row["best_confidence"]} for label, row in metrics.per_class.items()]
    if metrics.regions is None:
        _bars({label: (row["ap"], row["ap50"]) for label, row in metrics.per_class.items()},
              ("AP@[.5:.95]", "AP50"), rows, "Bar: AP@[.5:.95]. Tick: AP at IoU 0.5.")
        return
    ious, of_masks = metrics.regions.iou, metrics.regions.ap
    shown = [{"label": row["label"], "IoU": ious.get(row["label"]),
              **({"mask AP": of_masks.get(row["label"])} if of_masks else {}), "box AP": row["AP"],
              "box AP50": row["AP50"], "truth": row["truth"], "drawn": row["drawn"]} for row in rows]
    tick = " Tick: AP@[.5:.95] of the masks one by one." if of_masks else ""
    _bars({label: (value, of_masks.get(label)) for label, value in ious.items()}, ("IoU", "mask AP@[.5:.95]"), shown,
          f"Bar: IoU of the label's pixels over all frames.{tick}")


def curves(metrics: Scored) -> None:
    shown = {label: [(index / 100, value) for index, value in enumerate(curve["precision"])]
             for label, curve in metrics.curves.items()}
    st.altair_chart(charts.pr_curves(shown), key="pr")
    at = "Of the tags" if isinstance(metrics, TagMetrics) else (
        "Of the boxes, at IoU 0.5" if metrics.regions is None else "Of the boxes around the regions, at IoU 0.5")
    st.caption(f"{at}. A curve that stays high and reaches far to the right is a label the model knows.")


def confusion(metrics: Scored) -> None:
    if isinstance(metrics, TagMetrics):
        st.altair_chart(charts.confusion(metrics.labels, metrics.confusion, "none", "frames"), key="confusion")
        st.caption("Frames by their tags. Last column: a tag that was not set; last row: one that should not be.")
        return
    if metrics.regions is not None:
        st.altair_chart(charts.confusion(metrics.labels, metrics.regions.confusion, "background", "pixels"),
                        key="confusion_of_pixels")
        st.caption("Pixels of all frames, as shares of each row. Below, the boxes around the regions.")
    st.altair_chart(charts.confusion(metrics.labels, metrics.confusion), key="confusion")
    st.caption(f"Boxes at IoU 0.5 and confidence {metrics.confidence:.2f}. Last column: missed; last row: spurious.")


def of_runs(runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Metric -> column, of those that at least one evaluation has, boxes first."""
    there = {metric: name for metric, name in NAMES.items() if any(metric in run["metrics"] for run in runs)}
    return there or {"map_50_95": NAMES["map_50_95"]}


def _bars(values: Mapping[str, tuple[float, float | None]], names: tuple[str, str], rows: list[dict[str, Any]],
          said: str) -> None:
    left, right = st.columns([1, 1])
    shown = {label: {"ap": bar, "ap50": tick} for label, (bar, tick) in values.items()}
    left.altair_chart(charts.ap_bars(shown, names), key="ap")
    left.caption(said)
    right.dataframe(rows, hide_index=True, placeholder="–", column_config={
        name: st.column_config.NumberColumn(format="%.3f")
        for name in ("AP", "AP50", "best F1", "at", "IoU", "mask AP", "box AP", "box AP50", "F1", "precision", "recall",
                     "top-1")})

"""A model's score on a split of a version: numbers, curves, confusions, and the frames it does worst on."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st

from app import charts, draw, session, times
from workbench.annotation import Annotation
from workbench.boxes import Detections
from workbench.dataset import SPLITS, Manifest
from workbench.errors import Invalid, NotFound
from workbench.evaluation.matching import box_of, match
from workbench.evaluation.metrics import Metrics
from workbench.steps.deploy import offers
from workbench.taxonomy import Taxonomy

WORST = 6
ROWS = 6  # more of them scroll


def start(dataset: str) -> None:
    """Model, version, split, and the button."""
    wb = session.workbench()
    model, version, split, button = st.columns([3, 3, 1.4, 1.4], vertical_alignment="bottom")
    with version:
        ref = session.version_picker(dataset)
    if ref is None:
        session.empty("This data set has no version yet.", "upload", "Upload frames", "upload")
        return
    manifest = wb.datasets.manifest(ref)
    refs = [
        offer.model
        for offer in offers(dataset, manifest.taxonomy, models=wb.models, records=wb.records)
        if offer.labels.pairs
    ]
    with model:
        chosen = session.model_picker(refs)
    if chosen is None:
        session.empty(
            "No registered model shares a label with this data set: train a student, or register a model.",
            "retrain",
            "Train a student",
            "model_training",
        )
        return
    counts = {name: len(manifest.split(name)) for name in SPLITS}
    with split:
        part = st.selectbox(
            "Split",
            [*reversed(SPLITS)],
            format_func=lambda name: f"{name} ({counts[name]})",
            key="evaluate_split",
            help="In brackets: its labelled frames.",
        )
    job = session.watched("evaluate", dataset)
    is_busy = job is not None and not job.is_over
    if button.button(
        "Evaluate",
        type="primary",
        icon=":material/monitoring:",
        width="stretch",
        key="evaluate_go",
        disabled=is_busy or not counts[part],
    ):
        if session.submit("evaluate", {"dataset": dataset, "model": chosen, "version": ref, "split": part}):
            st.rerun()
    if not counts[part]:
        st.caption(f"No frame of {part} is labelled in this version.")
    if job and not (job.state == "done"):
        session.job_panel(job)


def choose_run(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The table of evaluations; returns the one to show (the newest, or the row clicked)."""
    rows = [
        {
            "when": times.clock(run["started_at"]),
            "model": run["tags"].get("model", run["name"]),
            "version": run["tags"].get("version", ""),
            "split": run["tags"].get("split", ""),
            "mAP@[.5:.95]": run["metrics"].get("map_50_95"),
            "mAP50": run["metrics"].get("map_50"),
            "frames": run["params"].get("frames", ""),
            "boxes": run["params"].get("truth", ""),
        }
        for run in runs
    ]
    event = st.dataframe(
        rows,
        hide_index=True,
        on_select="rerun",
        selection_mode="single-row",
        key="evaluations_table",
        height="auto" if len(rows) <= ROWS else 250,
        column_config={name: st.column_config.NumberColumn(format="%.3f") for name in ("mAP@[.5:.95]", "mAP50")},
    )
    chosen = event["selection"]["rows"]
    return runs[chosen[0]] if chosen and chosen[0] < len(runs) else runs[0]


@st.cache_data(max_entries=20, show_spinner="Reading the evaluation …")
def evaluation_of(_home: str, run_id: str) -> dict[str, Any]:
    """evaluation.json of a run: it never changes, so it is fetched once."""
    with tempfile.TemporaryDirectory() as folder:
        place = session.workbench().tracker.artifacts(run_id, "evaluation", Path(folder))
        found = next(Path(place).rglob("evaluation.json"), None)
        if found is None:
            raise NotFound(f"Run {run_id} has no evaluation.json; it was not finished. Evaluate again.")
        try:
            return json.loads(found.read_text())
        except ValueError as failure:
            raise Invalid(f"evaluation.json of run {run_id} is damaged: {failure}. Evaluate again.") from failure


def show(record: dict[str, Any], dataset: str) -> None:
    metrics = Metrics.from_json(record["metrics"])
    st.subheader(f"{record['model']} on {record['version']}, {record['split']}", anchor=False)
    for column, (name, value) in zip(
        st.columns(6),
        (
            ("mAP@[.5:.95]", metrics.map_50_95),
            ("mAP50", metrics.map_50),
            ("mAP75", metrics.coco.get("map_75")),
            ("recall, 100 boxes", metrics.coco.get("ar_100")),
            ("best F1", metrics.best_f1),
            ("at confidence", metrics.best_confidence),
        ),
    ):
        column.metric(name, "–" if value is None else f"{value:.3f}")
    st.caption(
        session.literal(
            f"{metrics.frames} frames, {metrics.truth} boxes in the truth, {metrics.detections} drawn at confidence "
            f"{metrics.confidence:.2f}; "
            f"{record['backend'].get('backend', '')} {record['backend'].get('precision', '')}, {record['seconds']:.0f} s."
        )
    )
    for names, told in (
        (record["unmatched_labels"], "labels of the model are not in the data set and were not scored"),
        (record["unreached_labels"], "labels of the data set are never given by the model: their AP is 0"),
    ):
        if names:
            st.info(session.literal(f"{len(names)} {told}: {', '.join(names[:12])}{' …' * (len(names) > 12)}."))
    frames, labels, curves, confusion = st.tabs(
        [
            ":material/photo_library: Worst frames",
            ":material/label: Labels",
            ":material/show_chart: Precision and recall",
            ":material/grid_on: Confusion",
        ]
    )
    with labels:
        left, right = st.columns([1, 1])
        left.altair_chart(charts.ap_bars(metrics.per_class), key="ap")
        left.caption("Bar: AP@[.5:.95]. Tick: AP at IoU 0.5.")
        right.dataframe(
            [
                {
                    "label": label,
                    "AP": row["ap"],
                    "AP50": row["ap50"],
                    "truth": row["truth"],
                    "drawn": row["detections"],
                    "best F1": row["best_f1"],
                    "at": row["best_confidence"],
                }
                for label, row in metrics.per_class.items()
            ],
            hide_index=True,
            placeholder="–",
            column_config={
                name: st.column_config.NumberColumn(format="%.3f") for name in ("AP", "AP50", "best F1", "at")
            },
        )
    with curves:
        shown = {
            label: [(index / 100, value) for index, value in enumerate(curve["precision"])]
            for label, curve in metrics.curves.items()
        }
        st.altair_chart(charts.pr_curves(shown), key="pr")
        st.caption("At IoU 0.5. A curve that stays high and reaches far to the right is a label the model knows.")
    with confusion:
        st.altair_chart(charts.confusion(metrics.labels, metrics.confusion), key="confusion")
        st.caption(
            f"Boxes at IoU 0.5 and confidence {metrics.confidence:.2f}. Last column: missed; last row: spurious."
        )
    with frames, session.explained():
        manifest = session.workbench().datasets.manifest(record["version"])
        worst(record, manifest)
        in_fiftyone(record, manifest, dataset)


def errors_of(truth: tuple[Annotation, ...], drawn: list[Annotation]) -> tuple[int, int, int]:
    """(missed, drawn where nothing is, right place but wrong label) on one frame, at IoU 0.5."""
    wanted = [(box_of(one), one.label) for one in truth if box_of(one)]
    pairs = match(
        np.array([box for box, _ in wanted]).reshape(-1, 4),
        [label for _, label in wanted],
        np.array([one.xyxy for one in drawn]).reshape(-1, 4),
        [one.label for one in drawn],
    )
    return len(wanted) - len(pairs), len(drawn) - len(pairs), sum(not pair.is_same_label for pair in pairs)


def worst(record: dict[str, Any], manifest: Manifest) -> None:
    """The frames with the most mistakes: the truth on the left, what the model draws on the right."""
    rows = []
    for labeled in manifest.split(record["split"]):
        drawn = [
            Annotation(label, (x1, y1, x2, y2), source=f"model:{record['model']}", confidence=confidence)
            for x1, y1, x2, y2, label, confidence in record["found"].get(labeled.frame.name, ())
            if x2 > x1 and y2 > y1
        ]
        missed, spurious, wrong = errors_of(labeled.annotations, drawn)
        rows.append(
            (
                missed + spurious + wrong,
                labeled,
                drawn,
                ", ".join(
                    f"{count} {what}"
                    for count, what in ((missed, "missed"), (spurious, "spurious"), (wrong, "wrong label"))
                    if count
                )
                or "no mistake",
            )
        )
    rows.sort(key=lambda row: (-row[0], row[1].frame.name))
    perfect = sum(not row[0] for row in rows)
    st.caption(f"{perfect} of {len(rows)} frames are without a mistake. Left: the truth; right: what the model draws.")
    labels = manifest.taxonomy.labels
    for start in range(0, min(WORST, len(rows)), 2):
        pictures = []
        for _, labeled, drawn, said in rows[start : start + 2]:
            pictures += [
                draw.of_labeled(labeled.frame, labeled.annotations),
                draw.Picture(labeled.frame.blob, tuple(drawn), said),
            ]
        draw.gallery(pictures, labels, 4)
    draw.legend(labels)


def in_fiftyone(record: dict[str, Any], manifest: Manifest, dataset: str) -> None:
    """Builds the view on demand; it can be thrown away and made again."""
    wb, key = session.workbench(), f"fiftyone_{record['run_id']}"
    if address := st.session_state.get(key):
        st.link_button("Open in FiftyOne", address, icon=":material/open_in_new:")
        return
    if st.button(
        "Show in FiftyOne",
        icon=":material/filter_center_focus:",
        key="show_fiftyone",
        help="Filter by label, confidence, true and false positives.",
    ):
        truth, labels = manifest.split(record["split"]), manifest.taxonomy
        with st.spinner("Handing the frames to FiftyOne …"):
            st.session_state[key] = wb.fiftyone.show_evaluation(
                dataset,
                record["model"],
                truth,
                {name: _detections(rows, labels) for name, rows in record["found"].items()},
                labels,
                {one.frame.name: wb.blobs.path(one.frame.blob) for one in truth},
            )
        st.rerun()


def _detections(rows: list[list[Any]], labels: Taxonomy) -> Detections:
    return Detections(
        np.array([row[:4] for row in rows], float).reshape(-1, 4),
        np.array([labels.class_id(row[4]) for row in rows], int),
        np.array([row[5] for row in rows], float),
    )


dataset = session.header("Evaluate", "How good a model is on frames it was not trained on, measured now.")
if dataset is None:
    session.empty(
        "No data set yet. A model is scored on labelled frames of a published version.",
        "upload",
        "Upload frames",
        "upload",
    )
else:
    with session.explained():
        start(dataset)
    with session.explained():
        runs = session.workbench().tracker.runs(f"{dataset}/evaluations")
        # A run that was interrupted has no result to show.
        runs = [run for run in runs if run["status"] == "FINISHED"]
        if runs:
            st.divider()
            run = choose_run(runs)
            show(evaluation_of(str(session.workbench().config.home), run["run_id"]), dataset)
        else:
            st.caption("No evaluation yet. Its result will stand here.")

"""A model's score on a split of a version: numbers, curves, confusions, and the frames it does worst on."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st

from app import draw, scores, session, times
from workbench.annotation import Annotation
from workbench.boxes import Detections
from workbench.dataset import SPLITS, LabeledFrame, Manifest
from workbench.errors import Invalid, NotFound
from workbench.evaluation.matching import box_of, match
from workbench.evaluation.primary import scored_from
from workbench.evaluation.regions import pixels, with_outlines
from workbench.evaluation.tags import TagMetrics, is_tag
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
    columns = scores.of_runs(runs)
    rows = [
        {
            "when": times.clock(run["started_at"]),
            "model": run["tags"].get("model", run["name"]),
            "version": run["tags"].get("version", ""),
            "split": run["tags"].get("split", ""),
            **{name: run["metrics"].get(metric) for metric, name in columns.items()},
            "frames": run["params"].get("frames", ""),
            "truth": run["params"].get("truth", ""),
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
        column_config={name: st.column_config.NumberColumn(format="%.3f") for name in columns.values()},
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
    metrics = scored_from(record["metrics"])
    st.subheader(f"{record['model']} on {record['version']}, {record['split']}", anchor=False)
    shown = scores.tiles(metrics)
    for column, (name, value) in zip(st.columns(len(shown)), shown):
        column.metric(name, "–" if value is None else f"{value:.3f}")
    backend = f"{record['backend'].get('backend', '')} {record['backend'].get('precision', '')}"
    st.caption(session.literal(f"{scores.counted(metrics)}; {backend}, {record['seconds']:.0f} s."))
    for names, told in (
        (record["unmatched_labels"], "labels of the model are not in the data set and were not scored"),
        (record["unreached_labels"], "labels of the data set are never given by the model: they score 0"),
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
        scores.by_label(metrics)
    with curves:
        scores.curves(metrics)
    with confusion:
        scores.confusion(metrics)
    with frames, session.explained():
        manifest = session.workbench().datasets.manifest(record["version"])
        is_tags = isinstance(metrics, TagMetrics)
        worst(record, manifest, is_tags, not is_tags and metrics.regions is not None)
        if not is_tags:
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


def tag_errors(truth: tuple[Annotation, ...], drawn: list[Annotation]) -> tuple[int, int, int]:
    """(missed, spurious, one label for another) of the tags of one frame."""
    wanted, given = {one.label for one in truth if is_tag(one)}, {one.label for one in drawn}
    missed, spurious = len(wanted - given), len(given - wanted)
    wrong = min(missed, spurious)
    return missed - wrong, spurious - wrong, wrong


def drawing(row: list[Any], source: str, is_tags: bool) -> Annotation | None:
    """What the model draws by one row of an evaluation's "found"; None for a box without area."""
    x1, y1, x2, y2, label, confidence, *outline = row
    if is_tags:
        return Annotation(label, source=source, confidence=confidence)
    if x2 <= x1 or y2 <= y1:
        return None
    polygon = tuple(zip(outline[0][::2], outline[0][1::2])) if outline else None
    return Annotation(label, (x1, y1, x2, y2), polygon, source=source, confidence=confidence)


@st.cache_data(max_entries=20, show_spinner="Comparing regions …")
def overlaps(_home: str, run_id: str, _record: dict[str, Any], _manifest: Manifest) -> dict[str, tuple[int, float]]:
    """Frame name -> (pixels that have another label than the truth, IoU of all labelled pixels; 1 without any)."""
    frames, source = with_outlines(_manifest.split(_record["split"])), f"model:{_record['model']}"
    taxonomy, found = _manifest.taxonomy, {}
    for name, rows in _record["found"].items():
        drawn = [one for row in rows if (one := drawing(row, source, False)) is not None and one.polygon]
        found[name] = Detections(
            np.array([one.xyxy for one in drawn], float).reshape(-1, 4),
            np.array([taxonomy.class_id(one.label) for one in drawn], int),
            np.ones(len(drawn)),
            polygons=tuple(np.array(one.polygon) for one in drawn),
        )
    told = {}
    for labeled in frames:
        counts = pixels([labeled], found, taxonomy).confusion[0]
        labelled = counts.sum() - counts[-1, -1]
        wrong = counts.sum() - np.trace(counts)
        told[labeled.frame.name] = int(wrong), float((labelled - wrong) / labelled) if labelled else 1.0
    return told


def worst(record: dict[str, Any], manifest: Manifest, is_tags: bool, has_regions: bool) -> None:
    """The frames with the most mistakes: the truth on the left, what the model draws on the right."""
    rows = []
    home = str(session.workbench().config.home)
    shared = overlaps(home, record["run_id"], record, manifest) if has_regions else {}
    for labeled in with_outlines(manifest.split(record["split"])):
        given = record["found"].get(labeled.frame.name, ())
        made = (drawing(row, f"model:{record['model']}", is_tags) for row in given)
        drawn = [one for one in made if one is not None]
        if has_regions:
            wrong, iou = shared[labeled.frame.name]
            rows.append((wrong, labeled, drawn, f"IoU {iou:.2f}"))
            continue
        missed, spurious, wrong = (tag_errors if is_tags else errors_of)(labeled.annotations, drawn)
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
    st.caption(
        f"{perfect} of {len(rows)} frames are without a mistake. Left: the truth; right: what the model draws"
        f"{', with the IoU of all labelled pixels' if has_regions else ''}."
    )
    labels = manifest.taxonomy.labels
    for start in range(0, min(WORST, len(rows)), 2):
        pictures = []
        for _, labeled, drawn, said in rows[start : start + 2]:
            pictures += [
                draw.of_labeled(labeled.frame, labeled.annotations, _tagged(labeled) if is_tags else ""),
                draw.Picture(labeled.frame.blob, tuple(drawn), said),
            ]
        draw.gallery(pictures, labels, 4)
    draw.legend(labels, has_lines=not is_tags)


def _tagged(labeled: LabeledFrame) -> str:
    """The caption of a frame whose tags are looked at."""
    tags = sorted(one.label for one in labeled.annotations or () if is_tag(one))
    return f"{labeled.frame.name} · {', '.join(tags) or 'no tag'}"


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

"""Drift: does the deployed model still see what the version it learned from looked like?

Compared are the model's own boxes on frames of that version which it did not learn from, and those that it drew in the
last annotate runs: how sure it is, which labels it finds, on how many frames it finds nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from workbench.blobs import Blobs
from workbench.certificates import Certificates
from workbench.dataset import check_dataset_name
from workbench.errors import Invalid, NotFound, WorkbenchError
from workbench.inference.detector import OpenBackend
from workbench.inference.pipeline import detect_frames
from workbench.model import ModelCard
from workbench.ports import AnnotationServer, DatasetStore, Job, ModelStore
from workbench.records import Records
from workbench.records import now as moment
from workbench.steps.certify import open_annotator
from workbench.steps.deploy import ALL
from workbench.taxonomy import LabelMap, Taxonomy

LEDGER = "drift"
# Below 0.1 a population has not changed, from 0.1 to 0.25 it has somewhat, above it has: N. Siddiqi, Credit Risk
# Scorecards (Wiley, 2006), where the index comes from; 0.2 is the customary alarm between the two.
THRESHOLD = 0.2
# Fewer frames than this tell nothing about a share of 10 % (its standard error is 4 % at 50).
LEAST_FRAMES = 50
# Frames of each side: with 300 the index of two samples of the same frames is about 0.03 in ten bins.
WINDOW = 300
BINS = 10
# How often chance alone may look like what is seen, for each of the three indices.
SIGNIFICANCE = 0.001
DRAWS = 2000
# Frames that are looked through for those of the last runs, and frames read at once.
MOST_READ, READ = 20_000, 200

# What a model found in one frame: (label, confidence) of each box.
Seen = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Drift:
    """What a look found.

    psi, chance      "confidence", "labels", "empty" -> population stability index, and how often frames that differ by
                     chance alone give one as large; empty without enough frames
    frames           of the last runs, and of the version (`on`)
    mean_confidence  in the version, now; share_empty: of frames without a box; labels: label -> share of the boxes
    is_enough        there are enough frames to tell; alarm: it drifted; is_new: and did not in the look before
    since            when the first look of this alarm was, "" without one
    """

    dataset: str
    model: str
    on: str
    runs: tuple[str, ...]
    frames: tuple[int, int]
    is_enough: bool
    alarm: bool
    is_new: bool
    reason: str
    since: str = ""
    psi: dict[str, float] | None = None
    chance: dict[str, float] | None = None
    mean_confidence: tuple[float, float] | None = None
    share_empty: tuple[float, float] | None = None
    labels: dict[str, tuple[float, float]] | None = None

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))


def psi(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    """(...,) population stability index of counts (..., bins): sum of (q - p) * ln(q / p) over the bins' shares p, q.

    Half a count is added to each bin (Jeffreys' prior), so that an empty one gives a large index and no infinity.
    """
    p = (before + 0.5) / (before + 0.5).sum(axis=-1, keepdims=True)
    q = (now + 0.5) / (now + 0.5).sum(axis=-1, keepdims=True)
    return ((q - p) * np.log(q / p)).sum(axis=-1)


def compare(before: Sequence[Seen], now: Sequence[Seen], labels: Sequence[str], threshold: float = THRESHOLD,
            seed: int = 0) -> tuple[dict[str, float], dict[str, float], list[str]]:
    """(index, chance, those that alarm), each by "confidence", "labels" and "empty".

    Confidences are counted in BINS bins that hold a tenth of the version's boxes each. `chance` is a permutation test
    (R. A. Fisher): all frames are dealt anew to the two sides DRAWS times, and the index is computed of each deal.
    Whole frames are dealt, because boxes of one frame are alike. An index alarms when it is above the threshold and no more
    than SIGNIFICANCE of the deals reach it.
    """
    sure = np.array([confidence for seen in before for _, confidence in seen])
    edges = np.unique(np.quantile(sure, np.linspace(0, 1, BINS + 1)[1:-1])) if len(sure) else np.zeros(0)
    rows = np.stack([_row(seen, edges, labels) for seen in (*before, *now)])
    total, random = rows.sum(axis=0), np.random.default_rng(seed)
    dealt = np.stack([rows[random.permutation(len(rows))[:len(before)]].sum(axis=0) for _ in range(DRAWS)])
    observed = rows[:len(before)].sum(axis=0)
    start, index, chance = 0, {}, {}
    for name, width in (("confidence", len(edges) + 1), ("labels", len(labels)), ("empty", 2)):
        part, start = slice(start, start + width), start + width
        index[name] = float(psi(observed[part], (total - observed)[part]))
        by_chance = psi(dealt[:, part], (total - dealt)[:, part])
        chance[name] = float((1 + (by_chance >= index[name] - 1e-12).sum()) / (1 + DRAWS))
    return index, chance, [name for name in index if index[name] > threshold and chance[name] <= SIGNIFICANCE]


def look_for_drift(
    dataset: str, *, threshold: float = THRESHOLD, least_frames: int = LEAST_FRAMES, server: AnnotationServer,
    store: DatasetStore, models: ModelStore, blobs: Blobs, records: Records, certificates: Certificates,
    open_backend: OpenBackend, job: Job, person: str, scratch: Path,
) -> Drift:
    """Compares what the deployed model saw lately with its version; the result is an entry of the ledger "drift".

    Of annotate runs count those of the deployed model with its card's threshold, without renames and tiling: others
    would differ by that. The same job again returns its entry. scratch: keeps what the model sees in its version.

    Raises Invalid when nothing is deployed, or the model does not say which version it learned from.
    """
    check_settings(threshold, least_frames)
    key = f"drift:{job.id}"
    for entry in records.entries(LEDGER, check_dataset_name(dataset), limit=ALL):
        if entry.facts.get("key") == key:
            return Drift(**{name: value for name, value in entry.facts.items() if name != "key"})
    model = records.deployed(dataset)
    if model is None:
        raise Invalid(f"No model is deployed for {dataset}, so nothing can drift. Deploy one.")
    card, on = models.card(model), models.card(model).trained_on.get("ref")
    if not on:
        raise Invalid(f"{model} does not say which version it was trained on, so there is nothing to compare with. "
                      f"Deploy a model that was trained on {dataset}.")
    labels = card.labels.map_to(Taxonomy(server.task(dataset).labels))
    names = list(dict.fromkeys(labels.pairs.values()))
    runs = last_runs(dataset, model, records)
    now = _seen_lately(dataset, runs, server, job)
    common = {"dataset": dataset, "model": model, "on": on, "runs": tuple(runs)}
    if len(now) < least_frames:
        drift = Drift(**common, frames=(len(now), 0), is_enough=False, alarm=False, is_new=False, reason=(
            f"{model} annotated {len(now)} frames lately; {least_frames} are needed to tell whether it drifts."))
    else:
        before = _seen_in_version(card, on, labels, store, blobs, models, certificates, open_backend, job, scratch)
        drift = _judged(common, before, now, names, threshold, least_frames, records)
    # Of two workers that did the same at once, the ledger keeps one.
    records.add(LEDGER, dataset, model, person, {**drift.to_json(), "key": key}, key=key)
    job.log(drift.reason)
    return drift


def standing_alarm(dataset: str, records: Records) -> Drift | None:
    """The last look at the deployed model, when it was an alarm."""
    entries = records.entries(LEDGER, dataset, subject=records.deployed(dataset) or "", limit=1)
    if not entries or not entries[0].facts.get("alarm"):
        return None
    return Drift(**{name: value for name, value in entries[0].facts.items() if name != "key"})


def last_runs(dataset: str, model: str, records: Records) -> list[str]:
    """Ids of the newest finished annotate runs of a model that can be compared, enough for WINDOW frames."""
    entries = records.entries("machine_runs", dataset)
    taken_back = {entry.subject for entry in entries if "undone" in entry.facts}
    usual = {entry.subject for entry in entries if "statuses" in entry.facts and entry.facts.get("confidence") is None
             and not entry.facts.get("renames") and not entry.facts.get("tiling")}
    found, frames = [], 0
    for entry in entries:
        if (entry.facts.get("is_finished") and entry.facts.get("model") == model and entry.subject in usual - taken_back
                and frames < WINDOW):
            found.append(entry.subject)
            frames += entry.facts.get("frames", 0)
    return found


def check_settings(threshold: float, least_frames: int) -> None:
    """Raises Invalid."""
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 < threshold <= 10:
        raise Invalid(f"The threshold of a drift alarm must be a number above 0, at most 10, got {threshold!r}; "
                      f"{THRESHOLD} is customary.")
    if isinstance(least_frames, bool) or not isinstance(least_frames, int) or not 10 <= least_frames <= WINDOW:
        raise Invalid(f"The least number of frames must be a whole number from 10 to {WINDOW}, got {least_frames!r}.")


def _judged(common: dict[str, Any], before: list[Seen], now: list[Seen], labels: Sequence[str], threshold: float,
            least_frames: int, records: Records) -> Drift:
    model, on, counts = common["model"], common["on"], (len(now), len(before))
    if len(before) < least_frames:
        return Drift(**common, frames=counts, is_enough=False, alarm=False, is_new=False, reason=(
            f"{on} has {len(before)} labelled frames outside its train split; {least_frames} are needed to tell "
            f"whether {model} drifts. Review more frames of val and test, publish and retrain."))
    index, chance, alarms = compare(before, now, labels, threshold)
    sure, empty, mix = (tuple(each(side) for side in (before, now)) for each in (_mean, _share_empty, _mix))
    words = {"confidence": f"it is {sure[1]:.2f} sure on average, {sure[0]:.2f} in {on}",
             "labels": f"its mix of labels is another ({_most_changed(mix[0], mix[1])})",
             "empty": f"it finds nothing on {empty[1]:.0%} of the frames, {empty[0]:.0%} in {on}"}
    last = records.entries(LEDGER, common["dataset"], subject=model, limit=1)
    was = last[0].facts if last and last[0].facts.get("alarm") else {}
    found = {name: round(value, 4) for name, value in index.items()}
    if alarms:
        reason = (f"{model} sees something else than {on} on its last {len(now)} frames: "
                  + "; ".join(f"{words[name]} (stability index {index[name]:.2f})" for name in alarms)
                  + ". Review these frames, publish a version and retrain on it.")
    else:
        reason = (f"{model} sees its last {len(now)} frames about as it sees {on}: the largest stability index is "
                  f"{max(index.values()):.2f}.")
    return Drift(**common, frames=counts, is_enough=True, alarm=bool(alarms), is_new=bool(alarms) and not was,
                 reason=reason, since=(was.get("since") or moment()) if alarms else "", psi=found,
                 chance={name: round(value, 5) for name, value in chance.items()},
                 mean_confidence=(round(sure[0], 4), round(sure[1], 4)),
                 share_empty=(round(empty[0], 4), round(empty[1], 4)),
                 labels={label: tuple(round(side.get(label, 0.0), 4) for side in mix) for label in labels})


def _row(seen: Seen, edges: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    """(bins + labels + 2,) counts of one frame: boxes by confidence and by label, and whether there is none or some."""
    sure = np.bincount(np.searchsorted(edges, [confidence for _, confidence in seen]).astype(int),
                       minlength=len(edges) + 1)
    named = [sum(label == one for one, _ in seen) for label in labels]
    return np.array([*sure, *named, not seen, bool(seen)], float)


def _seen_lately(dataset: str, runs: Sequence[str], server: AnnotationServer, job: Job) -> list[Seen]:
    """What the runs drew, of at most WINDOW frames; which ones is left to the names' digests, so that it is no folder's
    beginning."""
    found: list[Seen] = []
    if not runs:
        return found
    names = sorted(server.frame_names(dataset), key=lambda name: hashlib.md5(name.encode()).hexdigest())[:MOST_READ]
    for start in range(0, len(names), READ):
        job.check()
        for working in server.read(dataset, names[start:start + READ]).values():
            run = next((run for run in working.runs if run.run_id in runs and not run.is_undone), None)
            if run is not None:
                found.append(tuple((one.label, one.confidence or 0.0) for one in run.added))
        if len(found) >= WINDOW:
            break
    return found[:WINDOW]


def _seen_in_version(card: ModelCard, on: str, labels: LabelMap, store: DatasetStore, blobs: Blobs, models: ModelStore,
                     certificates: Certificates, open_backend: OpenBackend, job: Job, scratch: Path) -> list[Seen]:
    """What the model sees on the frames of a version that it did not learn from: it is surer on the others."""
    try:
        manifest = store.manifest(on)
    except NotFound as error:
        raise Invalid(f"{card.ref} was trained on {on}, which is not here, so there is nothing to compare with: "
                      f"{error}") from error
    frames = sorted((one.frame for split in ("val", "test") for one in manifest.split(split)),
                    key=lambda frame: frame.blob)[:WINDOW]
    about = [card.files[card.onnx]["sha256"], card.decoder, [frame.blob for frame in frames]]
    file = scratch / f"{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]}.json"
    if not file.is_file():
        scratch.mkdir(parents=True, exist_ok=True)
        half = file.with_suffix(f".{os.getpid()}")
        half.write_text(json.dumps(_detected(card, frames, blobs, models, certificates, open_backend, job)))
        half.replace(file)
    return [_named(seen, labels) for seen in json.loads(file.read_text())]


def _detected(card: ModelCard, frames: Sequence[Any], blobs: Blobs, models: ModelStore, certificates: Certificates,
              open_backend: OpenBackend, job: Job) -> list[list[tuple[str, float]]]:
    seen = []
    with open_annotator(card.ref, models=models, open_backend=open_backend, certificates=certificates) as detector:
        for name, found in detect_frames(detector, ((frame.name, frame) for frame in frames),
                                         lambda frame: blobs.get(frame.blob)):
            job.check()
            if isinstance(found, WorkbenchError):
                job.fail_item(name, str(found))
                continue
            seen.append([(card.labels.labels[class_id], round(float(confidence), 4))
                         for class_id, confidence in zip(found.class_id, found.confidence)])
            job.progress(len(seen), len(frames), "looking at the version again")
    return seen


def _named(seen: Sequence[Sequence[Any]], labels: Callable[[str], str | None]) -> Seen:
    """With the data set's labels, as annotating draws them: what has none is left out."""
    return tuple((labels(label), confidence) for label, confidence in seen if labels(label) is not None)


def _mean(side: Sequence[Seen]) -> float:
    sure = [confidence for seen in side for _, confidence in seen]
    return float(np.mean(sure)) if sure else 0.0


def _share_empty(side: Sequence[Seen]) -> float:
    return sum(not seen for seen in side) / len(side)


def _mix(side: Sequence[Seen]) -> dict[str, float]:
    found = [label for seen in side for label, _ in seen]
    return {label: found.count(label) / len(found) for label in set(found)}


def _most_changed(before: dict[str, float], now: dict[str, float]) -> str:
    label = max(sorted(before.keys() | now.keys()), key=lambda one: abs(now.get(one, 0) - before.get(one, 0)))
    return f"{label} {before.get(label, 0):.0%} to {now.get(label, 0):.0%}"

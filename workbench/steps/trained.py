"""Trained: what a training left behind, read, checked and made a registered version."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from workbench.annotation import Annotation
from workbench.blobs import Blobs
from workbench.boxes import Detections
from workbench.dataset import DatasetVersion, Manifest
from workbench.errors import Invalid, Unavailable, WorkbenchError
from workbench.evaluation.effort import THRESHOLDS, least_effort
from workbench.evaluation.primary import PRIMARY, counts, default_metric
from workbench.evaluation.tags import least_touched, table
from workbench.inference.detector import OpenBackend, check_card
from workbench.inference.graph import file_record, read_graph
from workbench.model import InputSpec, ModelCard
from workbench.ports import DatasetStore, Job, Tracker
from workbench.steps.evaluate import evaluate
from workbench.steps.keeper import KILLED, MIB
from workbench.steps.limits import told
from workbench.steps.training import JSON_MB, Training

# What a recipe leaves in its output folder; weights.pt (to continue from), history.jsonl and plots/ are welcome extras.
# Each with the most MiB it may have: a protobuf, and so an ONNX file, ends at 2 GiB.
MODEL_FILES = {"model.onnx": 2048, "weights.pt": 32768}
THRESHOLD_FRAMES = 300
# For opening a graph and two images: generous, on a busy machine too, for those come by the hundred later.
TRY_S = 180
RESULTS = ("model.onnx", "card.json", "metrics.json")
# The tracker failed, not the training; sysexits.h calls it EX_TEMPFAIL.
TRY_AGAIN = 75
MOST = sys.float_info.max


def results(training: Training) -> dict[str, Any]:
    """metrics.json of a training that ended well. Raises Invalid for one that did not, with the end of its log, and
    Unavailable when it was only the tracker that failed."""
    code, passed = training.exit_code(), training.passed_limit()
    if passed is not None:
        raise Invalid(f"{told(passed)} {_end_of_log(training)}")
    missing = [name for name in RESULTS if not os.path.lexists(training.output / name)]
    if code == TRY_AGAIN and missing:
        training.forget_end()
        raise Unavailable("The training stopped because MLflow did not answer; run it again, it goes on. "
                          f"{_end_of_log(training)}")
    if code not in (0, TRY_AGAIN):
        how = "was killed from outside (is there enough memory?)" if code in (None, KILLED) else (
            f"ended with exit code {code}{_signal(code)}")
        raise Invalid(f"The training {how}. {_end_of_log(training)}")
    if missing:
        raise Invalid(f"The training ended without an error but left no {', '.join(missing)} in {training.output}; a "
                      f"recipe writes {', '.join(RESULTS)} (docs/adopting.md). {_end_of_log(training)}")
    metrics = _json(training, "metrics.json")
    for place, value in numbers({"metrics.json": metrics, "history.jsonl": training.history()}):
        # Python's integers go beyond every float.
        if not -MOST < value < MOST:
            raise Invalid(f"The training's {place} is {str(value)[:40]}: it did not learn. Lower the learning rate or "
                          f"look for damaged frames; a number that was not measured is left out. {_end_of_log(training)}")
    for name, most_mb in MODEL_FILES.items():
        with contextlib.suppress(FileNotFoundError), training.open_output(name, most_mb):
            pass
    return metrics


def _json(training: Training, name: str) -> dict[str, Any]:
    """A JSON object that the recipe wrote. Raises Invalid."""
    try:
        with training.open_output(name, JSON_MB) as file:
            value = json.loads(file.read())
    except FileNotFoundError as error:
        raise Invalid(f"{training.output / name} is gone; run the training again as another job.") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, Invalid):
            raise
        raise Invalid(f"{training.output / name} is not JSON: {str(error)[:200]}. {_end_of_log(training)}") from error
    if not isinstance(value, dict):
        raise Invalid(f"{training.output / name} is no JSON object. {_end_of_log(training)}")
    return value


def _end_of_log(training: Training) -> str:
    return f"The end of {training.log}:\n{training.last_lines() or '(it printed nothing)'}"


def _signal(code: int) -> str:
    """Which signal ended it, where a shell tells one by that exit code."""
    try:
        return f" ({signal.Signals(code - 128).name})"
    except ValueError:
        return ""


def numbers(value: Any) -> Iterator[tuple[str, float]]:
    """Every number in a JSON value with the path to it; however deep, for it may be a stranger's."""
    left = [("", value)]
    while left:
        place, value = left.pop()
        if isinstance(value, (int, float)):
            yield place, value
        elif isinstance(value, (dict, list)):
            inner = list(value.items() if isinstance(value, dict) else enumerate(value))
            left += [(f"{place} {key}"[:200].strip(), one) for key, one in reversed(inner)]


def log_epochs(training: Training, tracker: Tracker, run_id: str) -> None:
    """Gives the run the epochs that the recipe did not log itself."""
    logged = tracker.run(run_id)["metrics"]
    known: dict[str, set[int]] = {}
    rows: dict[int, dict[str, float]] = {}
    for row in training.history():
        numbers = {name: float(value) for name, value in ((_metric(key), value) for key, value in row.items())
                   if name not in ("", "epoch", "epochs") and isinstance(value, (int, float)) and -MOST < value < MOST}
        for key in numbers.keys() - known.keys():
            known[key] = {step for step, _ in tracker.history(run_id, key)} if key in logged else set()
        missing = {key: value for key, value in numbers.items() if int(row["epoch"]) not in known[key]}
        if missing:
            rows[int(row["epoch"])] = missing
    if rows:
        tracker.log_steps(run_id, rows)


def _metric(key: str) -> str:
    """A name that MLflow takes (mlflow.utils.validation: letters, digits, _ - . : / and blanks, no path that leads
    elsewhere, 250 characters), "" for none: mAP@0.5 is mAP_0.5 there."""
    parts = (part.strip() for part in re.sub(r"[^\w.:/ -]", "_", key).split("/"))
    return "/".join(part for part in parts if part.strip("."))[:250].rstrip("/ ")


def publish(training: Training, name: str, run_id: str, manifest: Manifest, version: DatasetVersion,
            metrics: dict[str, Any], base_model: str | None, store: DatasetStore, blobs: Blobs, tracker: Tracker,
            open_backend: OpenBackend, job: Job, *, registers: bool = True) -> dict[str, Any]:
    """Tries the model out, chooses its confidence on the val split and makes it a version in the tracker's registry,
    unless it `registers` nothing: then it only stays with its run.

    Leaves the files in `<training>/model` and the final card in `<training>/card.json`, which it returns.
    """
    staged = training.folder / "model"
    staged.mkdir(exist_ok=True)
    files = [file for file in MODEL_FILES if os.path.lexists(training.output / file)]
    for file in files:
        with training.open_output(file, MODEL_FILES[file]) as source, open(staged / file, "wb") as target:
            shutil.copyfileobj(source, target, MIB)
    _into_one_file(training, staged / "model.onnx")
    card = _card(training, name, {file: file_record(staged / file) for file in files})
    foreign = [label for label in card.labels.labels if label not in manifest.taxonomy]
    if foreign:
        raise Invalid(f"The trained model knows {', '.join(foreign)}, {version.ref} does not; its recipe has to take "
                      "the labels from train.json.")
    report = _tried(card, staged, open_backend, job)
    job.log(f"The model runs on {report['library']}, {report['device']}, {report['precision']}.")
    chosen, measured = _operating_point(card, staged, manifest, version, metrics, store, blobs, open_backend, job)
    trained_on = {"ref": version.ref, "digest": version.digest}
    if base_model is not None:
        trained_on["base_model"] = base_model
    card = replace(card, decoder={**card.decoder, **chosen}, metrics=measured, trained_on=trained_on, run_id=run_id)
    tracker.log_files(run_id, staged, "model")
    if registers:
        card = replace(card, version=tracker.register(name, run_id, "model", {
            "dataset": version.ref, "dataset_digest": version.digest,
            "sha256": card.files[card.onnx]["sha256"]}).version)
    record = card.to_json()
    (staged / "card.json").write_text(json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False))
    tracker.log_files(run_id, staged / "card.json", "model")
    training.write("card.json", record)
    return record


def _tried(card: ModelCard, folder: Path, open_backend: OpenBackend, job: Job) -> dict[str, Any]:
    """check_card, waited for at most TRY_S: a stranger's graph may loop without end, and no call of a backend is ended
    from outside. It then goes on in its thread until the worker ends; the worker itself goes on too. Raises Invalid."""
    ended: list[dict[str, Any] | BaseException] = []

    def check() -> None:
        try:
            ended.append(check_card(card, folder, open_backend))
        except BaseException as error:  # raised below, where the job waits
            ended.append(error)

    thread = threading.Thread(target=check, name=f"try {card.ref}", daemon=True)
    thread.start()
    until = time.monotonic() + TRY_S
    while thread.is_alive():
        thread.join(0.5)
        job.check()
        if time.monotonic() > until and thread.is_alive():
            raise Invalid(f"The trained model did not look at two images within {TRY_S} s. Look for a loop in its graph; "
                          "the worker that tried it is busy with it until it is started again.")
    (found,) = ended
    if isinstance(found, BaseException):
        raise found
    return found


def _into_one_file(training: Training, file: Path) -> None:
    """Takes into a graph the tensors that its exporter kept in files beside it, as torch.onnx.export does unless told
    otherwise. Raises Invalid; a file that is no graph is left to whoever opens it."""
    import onnx
    from google.protobuf.message import DecodeError, EncodeError
    try:
        model = onnx.load(file, load_external_data=False)
    except DecodeError:
        return
    names = {entry.value for tensor in onnx.external_data_helper._get_all_tensors(model)
             for entry in tensor.external_data if entry.key == "location"}
    # Any other place is refused when the graph is opened.
    beside = [name for name in sorted(names) if Path(name).name == name and name not in MODEL_FILES
              and os.path.lexists(training.output / name)]
    if not beside:
        return
    try:
        for name in beside:
            with (training.open_output(name, MODEL_FILES["model.onnx"]) as source,
                  open(file.parent / name, "wb") as target):
                shutil.copyfileobj(source, target, MIB)
        data, _ = read_graph(file)
        file.write_bytes(data)
    except (EncodeError, onnx.checker.ValidationError, ValueError, OSError) as error:
        if isinstance(error, WorkbenchError):
            raise
        raise Invalid(f"{training.output / 'model.onnx'} keeps tensors in {', '.join(beside)[:200]}, which cannot be "
                      f"taken into it: {str(error)[:200]}. Export the model into one file of less than 2 GiB.") from error
    finally:
        for name in beside:
            (file.parent / name).unlink(missing_ok=True)


def _operating_point(card: ModelCard, folder: Path, manifest: Manifest, version: DatasetVersion,
                     metrics: dict[str, Any], store: DatasetStore, blobs: Blobs, open_backend: OpenBackend,
                     job: Job) -> tuple[dict[str, Any], dict[str, Any]]:
    """({"confidence": ...} for the card's decoder, its metrics), measured on the val split.

    Of boxes and tags it is the confidence that leaves a person the least to touch (evaluation.effort.least_effort,
    evaluation.tags.least_touched). A model that draws polygons keeps the confidence of its recipe: a region that joins
    two things is one touch or many, which no count of boxes tells.

    Without a val split the recipe's own figures stand, and its threshold where it names one.
    """
    val = manifest.split("val")
    metric = default_metric(card.task, val)
    if not any(counts(metric, annotation) for one in val for annotation in one.annotations or ()):
        own = {key: metrics[key] for key in PRIMARY if isinstance(metrics.get(key), (int, float))}
        held_out = metrics.get("val") if isinstance(metrics.get("val"), dict) else {}
        confidence = held_out.get("best_f1_confidence")
        chosen = {"confidence": round(confidence, 4)} if isinstance(confidence, float) and 0 < confidence < 1 else {}
        return chosen, {**own, "on": "frames the recipe held out of the train split"}
    scored = evaluate(card.ref, version.ref, "val", models=_Unregistered(card, folder), store=store, blobs=blobs,
                      open_backend=open_backend, tracker=None, job=job)
    found = scored.metrics
    measured = {**found.values, "on": f"{version.ref}/val"}
    # A sample is enough to choose one number by, and the pairing of boxes is not free.
    sample = sorted(val, key=lambda one: one.frame.blob)[:THRESHOLD_FRAMES]
    truth = {one.frame.name: one.annotations or () for one in sample}
    if card.task == "tags":
        tags = table(truth, scored.found, manifest.taxonomy, 0.0, found.is_exclusive)
        confidence, touched = least_touched(tags)
        job.log(f"From confidence {confidence} on its tags are worth proposing: {touched} touches instead of "
                f"{tags.truth.sum()} set tags on {len(sample)} val frames.")
        return {"confidence": confidence}, measured | {"val_touched": touched, "val_tags": int(tags.truth.sum())}
    measured["best_f1"] = found.best_f1
    if not found.best_f1 or card.task != "boxes":
        return {}, measured
    proposed = {one.frame.name: _annotations(scored.found[one.frame.name], found.labels, card) for one in sample
                if one.frame.name in scored.found}
    confidence, left = least_effort(proposed, truth)
    job.log(f"From confidence {confidence} on its boxes are worth proposing: {left.touched} touches instead of "
            f"{left.boxes_total} drawn boxes on {len(sample)} val frames.")
    return {"confidence": confidence}, measured | {"val_touched": left.touched, "val_boxes": left.boxes_total}


def _annotations(boxes: Detections, labels: Sequence[str], card: ModelCard) -> list[Annotation]:
    return [Annotation(labels[class_id], tuple(map(float, xyxy)), source=card.source, confidence=float(confidence))
            for xyxy, class_id, confidence in zip(boxes.xyxy, boxes.class_id, boxes.confidence)
            if confidence >= THRESHOLDS[0] and xyxy[2] > xyxy[0] and xyxy[3] > xyxy[1]]


@dataclass(frozen=True)
class _Unregistered:
    """As much of a ModelStore as an evaluation asks for, around one model that is in no store yet."""

    only: ModelCard
    files: Path

    def card(self, ref: str) -> ModelCard:
        return self.only

    def folder(self, ref: str) -> Path:
        return self.files


def _card(training: Training, name: str, files: dict[str, dict[str, Any]]) -> ModelCard:
    """The recipe's card under our name; what it notes beside a card's own fields is left out."""
    file, record = training.output / "card.json", _json(training, "card.json")
    for place, value in numbers(record):
        if not -MOST < value < MOST:
            raise Invalid(f"{file}: {place} is {str(value)[:40]}; a card has finite numbers only.")
    try:
        spec = dict(record["input"])
        spec["padding"] = str(spec.get("padding", "topleft")).removeprefix("letterbox-")
        spec["pad"] = spec.pop("pad_value", spec.get("pad", 114))
        known = {field.name for field in fields(InputSpec)} | {"width", "height"}
        return ModelCard.from_json({**record, "name": name, "version": "new", "files": files,
                                    "input": {key: value for key, value in spec.items() if key in known}})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = str(error).rstrip(".") if isinstance(error, WorkbenchError) else repr(error)
        raise Invalid(f"{file} does not describe a model: {why}. See docs/adopting.md for its fields.") from error

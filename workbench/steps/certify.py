"""Certify: an INT8 model is measured against its FP32 origin on this device; and the door through which models
annotate."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from workbench.blobs import Blobs
from workbench.boxes import Detections
from workbench.certificates import Certificates
from workbench.dataset import Frame, LabeledFrame
from workbench.errors import Invalid, WorkbenchError
from workbench.evaluation.primary import default_metric, figure
from workbench.inference.certificate import LIMITS, Measured, compare, judge
from workbench.inference.detector import Detector, OpenBackend
from workbench.inference.graph import read_graph
from workbench.inference.pipeline import detect_frames
from workbench.inference.quantize import is_quantized
from workbench.model import ModelCard
from workbench.ports import DatasetStore, Job, ModelStore
from workbench.records import now
from workbench.steps.evaluate import class_ids, labelled_split, scored, telling_all, translated
from workbench.taxonomy import Taxonomy

# FP32 and INT8 take turns, so that whatever else the machine does meets both; medians of ROUNDS count.
ROUNDS, ROUND_S = 5, 0.4


@dataclass(frozen=True)
class HeldOut:
    """Labelled frames that neither trained nor calibrated: `on` names them ("cells@1.0.0/test"), `read` gives
    pixels."""

    on: str
    frames: tuple[LabeledFrame, ...]
    taxonomy: Taxonomy
    read: Callable[[Frame], bytes]


@dataclass(frozen=True)
class Opened:
    """A model and where its files lie."""

    card: ModelCard
    folder: Path


@contextmanager
def open_annotator(ref: str, *, models: ModelStore, open_backend: OpenBackend, certificates: Certificates,
                   **thresholds: Any) -> Iterator[Detector]:
    """The opened Detector of a registered model: the one door through which a model comes to annotate.

    thresholds  as Detector takes them

    A quantised graph, whatever its card says of it, needs a certificate that passed, is whole, and is about this very
    file, backend, device and library; otherwise Invalid, which names the next step. An FP32 graph needs none.
    """
    card, folder = models.card(ref), models.folder(ref)
    needs_certificate = is_quantized(read_graph(folder / card.onnx)[1]) or bool(card.quantization)
    with Detector(card, folder, open_backend, **thresholds) as detector:
        if needs_certificate:
            certificates.check(ref, file_sha256=card.files[card.onnx]["sha256"],
                               calibration_digest=calibration_of(card), report=detector.report)
        yield detector


def certify(model: str, version: str, *, split: str = "test", against: str = "",
            limits: Mapping[str, float] | None = None, models: ModelStore, store: DatasetStore, blobs: Blobs,
            certificates: Certificates, open_backend: OpenBackend, job: Job, person: str) -> dict[str, Any]:
    """Measures a registered INT8 version against its FP32 origin on a split, here and now; seals, keeps and returns the
    certificate, whether it passed or not.

    against  the FP32 version; default: the one the card says it was made from
    limits   over certificate.LIMITS

    Raises Invalid for a model that is not quantised or whose origin is unknown, draws something else or is another file
    now, a split without labels of its task, and labels that do not fit; NotFound.
    """
    card = models.card(model)
    opened = Opened(card, models.folder(model))
    if not is_quantized(read_graph(opened.folder / card.onnx)[1]):
        raise Invalid(f"{model} is no INT8 model, so it needs no certificate. `workbench quantize {model}` "
                      "makes one of it.")
    against = against or card.quantization.get("from", "")
    if not against:
        raise Invalid(f"{model} does not say which FP32 version it was made from. Name it with --against.")
    origin = Opened(models.card(against), models.folder(against))
    expected, given = card.quantization.get("from_sha256"), origin.card.files[origin.card.onnx]["sha256"]
    if expected not in (None, given):
        raise Invalid(f"{model} was made from a file of sha256 {expected[:12]}..., {against} is {given[:12]}.... Name "
                      "the right FP32 version with --against.")
    if origin.card.task != card.task:
        raise Invalid(f"{model} draws {card.task}, {against} draws {origin.card.task}: it cannot be what {model} was "
                      "made from. Name the right FP32 version with --against.")
    held_out = held_out_of(version, split, origin.card, store, blobs)
    return certificates.add(measure(opened, origin, held_out, open_backend, job, limits), person)


def held_out_of(version: str, split: str, card: ModelCard, store: DatasetStore, blobs: Blobs) -> HeldOut:
    """Raises Invalid as `labelled_split` does."""
    frames, taxonomy = labelled_split(card, version, split, store)
    return HeldOut(f"{version}/{split}", frames, taxonomy, lambda frame: blobs.get(frame.blob))


def measure(int8: Opened, fp32: Opened, held_out: HeldOut, open_backend: OpenBackend, job: Job,
            limits: Mapping[str, float] | None = None, known: Measured | None = None) -> dict[str, Any]:
    """A certificate's facts, unsealed, by the metric that promotion compares models of the task by. `known`: what `see`
    gave of FP32, where it was made before.

    Raises Invalid for a limit that does not exist and for a frame that cannot be read.
    """
    # "map_loss" is what the limit was called while certificates were about boxes alone; jobs and rules of then say it.
    limits = {"loss" if name == "map_loss" else name: value for name, value in (limits or {}).items()}
    strange = sorted(set(limits) - set(LIMITS))
    if strange:
        raise Invalid(f"A certificate has no limit {strange[0]!r}; there are {', '.join(LIMITS)}.")
    limits = {**LIMITS, **limits}
    wrong = [name for name, value in limits.items() if isinstance(value, bool) or not isinstance(value, (int, float))]
    if wrong:
        raise Invalid(f"The limit {wrong[0]} must be a number, got {limits[wrong[0]]!r}.")
    metric = default_metric(fp32.card.task, held_out.frames)
    figures = compare(metric, held_out.frames, known or see(fp32, held_out, open_backend, job),
                      see(int8, held_out, open_backend, job))
    job.check()
    speeds, report = throughput({"fp32": fp32, "int8": int8}, open_backend)
    for name, images_per_s in speeds.items():
        figures[name]["images_per_s"] = round(images_per_s, 2)
    facts = {
        "model": int8.card.ref, "file_sha256": int8.card.files[int8.card.onnx]["sha256"], "backend": report.backend,
        "device": report.device, "precision": report.precision, "library": report.library,
        "calibration_digest": calibration_of(int8.card),
        "against": {"model": fp32.card.ref, "file_sha256": fp32.card.files[fp32.card.onnx]["sha256"]},
        "on": held_out.on, **figures, "speedup": round(speeds["int8"] / speeds["fp32"], 3), "limits": limits,
        "created_at": now()}
    reasons = judge(facts, limits)
    return {**facts, "passed": not reasons, "reasons": reasons}


def see(model: Opened, held_out: HeldOut, open_backend: OpenBackend, job: Job) -> Measured:
    """What a model finds on the frames and how it is scored. Raises Invalid as `detect` does."""
    frames, taxonomy, found = held_out.frames, held_out.taxonomy, detect(model, held_out, open_backend, job)
    metrics = scored(model.card, frames, found, taxonomy)
    metric = default_metric(model.card.task, frames)
    return Measured(found, metrics, figure(metric, frames, found, metrics, taxonomy))


def detect(model: Opened, held_out: HeldOut, open_backend: OpenBackend, job: Job) -> dict[str, Detections]:
    """Frame name -> all that a model finds there, of tags the confidence of each label; class ids of the data set's
    taxonomy. Raises Invalid for an unreadable frame."""
    (card, least), found = telling_all(model.card), {}
    translate = class_ids(card.labels, card.labels.map_to(held_out.taxonomy), held_out.taxonomy)
    with Detector(card, model.folder, open_backend, confidence=least, confidence_by_label={}) as detector:
        for name, result in detect_frames(detector, ((one.frame.name, one.frame) for one in held_out.frames),
                                          held_out.read):
            job.check()
            if isinstance(result, WorkbenchError):
                job.fail_item(name, str(result))
                raise Invalid(f"{held_out.on} cannot be measured: {result}") from result
            found[name] = translated(result, translate)
    return found


def throughput(models: Mapping[str, Opened], open_backend: OpenBackend, rounds: int | None = None,
               round_s: float | None = None) -> tuple[dict[str, float], Any]:
    """Images per second of each model's graph in its standard form, fed with ready canvases by as many threads as its
    backend has streams; and the BackendReport of the last. The models take turns; the median of the rounds counts."""
    rounds, round_s = rounds or ROUNDS, round_s or ROUND_S
    seen: dict[str, list[float]] = {name: [] for name in models}
    with ExitStack() as stack:
        detectors = {name: stack.enter_context(Detector(one.card, one.folder, open_backend))
                     for name, one in models.items()}
        for detector in detectors.values():
            _runs(detector, round_s / 4)
        for _ in range(rounds):
            for name, detector in detectors.items():
                seen[name].append(_runs(detector, round_s))
        return {name: statistics.median(values) for name, values in seen.items()}, detector.report


def calibration_of(card: ModelCard) -> str:
    """The digest of the calibration a card says its graph comes from, "" when it says none."""
    return str(card.quantization.get("calibration_digest", ""))


def _runs(detector: Detector, seconds: float) -> float:
    """Runs per second, on noise."""
    width, height = detector.card.input.size
    canvas = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), np.uint8)

    def work(_: int) -> int:
        count = 0
        while not count or time.perf_counter() - started < seconds:
            detector.outputs(canvas)
            count += 1
        return count

    with ThreadPoolExecutor(detector.streams) as pool:
        started = time.perf_counter()
        count = sum(pool.map(work, range(detector.streams)))
    return count / (time.perf_counter() - started)

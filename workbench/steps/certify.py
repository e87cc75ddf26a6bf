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
from workbench.dataset import SPLITS, Frame, LabeledFrame
from workbench.errors import Invalid, WorkbenchError
from workbench.evaluation.metrics import DEFAULT_CONFIDENCE
from workbench.inference.certificate import LIMITS, compare, judge
from workbench.inference.detector import Detector, OpenBackend
from workbench.inference.graph import read_graph
from workbench.inference.pipeline import detect_frames
from workbench.inference.quantize import is_quantized
from workbench.model import ModelCard
from workbench.ports import DatasetStore, Job, ModelStore
from workbench.records import now
from workbench.steps.evaluate import LEAST_CONFIDENCE, class_ids, translated
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

    Raises Invalid for a model that is not quantised or whose origin is unknown or another file now, a split without
    boxes, and labels that do not fit; NotFound.
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
    held_out = held_out_of(version, split, origin.card, store, blobs)
    return certificates.add(measure(opened, origin, held_out, open_backend, job, limits), person)


def held_out_of(version: str, split: str, card: ModelCard, store: DatasetStore, blobs: Blobs) -> HeldOut:
    """Raises Invalid for a split that does not exist or has no labelled box, and when the model knows none of its
    labels or draws no boxes."""
    if split not in SPLITS:
        raise Invalid(f"Split {split!r} must be one of {', '.join(SPLITS)}.")
    if card.task != "boxes":
        raise Invalid(f"{card.ref} draws {card.task}; certificates are about boxes and would not show what INT8 costs "
                      "it. Use its FP32 version.")
    manifest = store.manifest(version)
    frames = manifest.split(split)
    if not any(one.annotations for one in frames):
        raise Invalid(f"{version} has no labelled box in its {split} split, so nothing can be certified on it. Review "
                      "frames of that split and publish a version.")
    if not card.labels.map_to(manifest.taxonomy).pairs:
        raise Invalid(f"{card.ref} knows none of the labels of {version}: {', '.join(card.labels.labels[:10])} against "
                      f"{', '.join(manifest.taxonomy.labels[:10])}. Choose a data set of the model's own kind.")
    return HeldOut(f"{version}/{split}", frames, manifest.taxonomy, lambda frame: blobs.get(frame.blob))


def measure(int8: Opened, fp32: Opened, held_out: HeldOut, open_backend: OpenBackend, job: Job,
            limits: Mapping[str, float] | None = None, known: dict[str, Detections] | None = None) -> dict[str, Any]:
    """A certificate's facts, unsealed. `known`: FP32's detections from `detect`, where they were made before.

    Raises Invalid for a limit that does not exist and for a frame that cannot be read.
    """
    strange = sorted(set(limits or {}) - set(LIMITS))
    if strange:
        raise Invalid(f"A certificate has no limit {strange[0]!r}; there are {', '.join(LIMITS)}.")
    limits = {**LIMITS, **(limits or {})}
    wrong = [name for name, value in limits.items() if isinstance(value, bool) or not isinstance(value, (int, float))]
    if wrong:
        raise Invalid(f"The limit {wrong[0]} must be a number, got {limits[wrong[0]]!r}.")
    truth = {one.frame.name: one.annotations for one in held_out.frames}
    found = {"fp32": detect(fp32, held_out, open_backend, job) if known is None else known,
             "int8": detect(int8, held_out, open_backend, job)}
    confidence = fp32.card.decoder.get("confidence", DEFAULT_CONFIDENCE)
    figures = compare(truth, found["fp32"], found["int8"], held_out.taxonomy, confidence)
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


def detect(model: Opened, held_out: HeldOut, open_backend: OpenBackend, job: Job) -> dict[str, Detections]:
    """Frame name -> all boxes a model finds there, class ids of the data set's taxonomy; Invalid for an unreadable
    frame."""
    card, found = model.card, {}
    translate = class_ids(card.labels, card.labels.map_to(held_out.taxonomy), held_out.taxonomy)
    with Detector(card, model.folder, open_backend, confidence=LEAST_CONFIDENCE, confidence_by_label={}) as detector:
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

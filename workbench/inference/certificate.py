"""Certificate: what INT8 costs against FP32 on frames neither was fitted to, sealed so that nobody can change a figure.

The seal is a workbench's own (HMAC-SHA256 with a key in its home folder): it shows that this workbench measured these
figures for this very file. It proves nothing to others, who do not hold the key.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from workbench.annotation import Annotation
from workbench.boxes import Detections
from workbench.dataset import LabeledFrame
from workbench.errors import Invalid
from workbench.evaluation.matching import match
from workbench.evaluation.paired import Figure, drawn, interval
from workbench.evaluation.primary import PRIMARY, Scored, counts
from workbench.evaluation.regions import pixels
from workbench.evaluation.tags import TagMetrics, TagTable, table
from workbench.taxonomy import Taxonomy

# What a certificate compares by (evaluation.primary.default_metric) -> what people call it over all labels, and of one.
METRICS: Mapping[str, tuple[str, str]] = {"map_50_95": ("mAP", "AP"), "miou": ("mIoU", "IoU"),
                                          "accuracy": ("accuracy", "accuracy"), "map": ("mAP", "AP")}
# loss        what the task's metric may fall by, in 0..1
# class_loss  what a label with LEAST_TRUTH may lose of it, as far as the frames prove it: the lower end of its interval
#             counts
# speedup     int8 below it is of no use on this device
# frames      with fewer that have labels the figures prove nothing
LIMITS: Mapping[str, float] = {"loss": 0.005, "class_loss": 0.03, "speedup": 1.0, "frames": 10}
# A label with fewer boxes, regions or tags is not judged by itself: draws of so few do not show how far chance reaches.
LEAST_TRUTH = 20
# Names of before models of tags and polygons had certificates, too.
RENAMED: Mapping[str, str] = {"map_loss": "loss", "map_loss_interval": "loss_interval", "boxes": "truth"}


@dataclass(frozen=True)
class Measured:
    """What one of the two models does on the held-out frames.

    found   frame name -> Detections down to a low confidence, of tags every label; class_id indexes the taxonomy
    scored  what evaluation makes of them, at the model's own confidence
    figure  the compared metric over draws of the frames
    """

    found: Mapping[str, Detections]
    scored: Scored
    figure: Figure


def compare(metric: str, frames: Sequence[LabeledFrame], fp32: Measured, int8: Measured,
            seed: int = 0) -> dict[str, Any]:
    """The figures of a certificate that come from what both models find: {"metric", "frames", "labelled", "truth",
    "fp32", "int8", "loss", "loss_interval", "per_class"} and, by what the metric is about, one of
      box_shift_px  {"median", "p95"} over boxes that both draw at FP32's confidence: the largest of a box's four shifts
      same_pixels   see `same_pixels`
      same_tags     share of the frames on which both set the same tags, or none

    metric    one of METRICS
    labelled  how many of the frames have something that the metric counts; truth: how many such things there are

    Intervals are 95 % intervals of the loss FP32 - INT8 (of the metric, of a label's part): evaluation/paired.py.
    """
    overall, losses = drawn(fp32.figure, int8.figure, len(frames), seed)
    both = {"fp32": fp32.scored, "int8": int8.scored}
    parts = {name: scored.by_label(metric) for name, scored in both.items()}
    return {
        "metric": metric, "frames": len(frames),
        "labelled": sum(any(counts(metric, drawing) for drawing in one.annotations or ()) for one in frames),
        "truth": fp32.scored.truth, **{name: dict(scored.values) for name, scored in both.items()},
        "loss": both["fp32"].values[metric] - both["int8"].values[metric], "loss_interval": interval(overall),
        "per_class": {label: {"fp32": parts["fp32"][label], "int8": parts["int8"][label],
                              "interval": interval(losses[label]),
                              "truth": int(fp32.scored.per_class[label]["truth"])} for label in parts["fp32"]},
        **_likeness(metric, frames, fp32, int8)}


def judge(figures: Mapping[str, Any], limits: Mapping[str, float]) -> list[str]:
    """Why the figures do not pass; [] when they do."""
    reasons = []
    metric, part = METRICS[figures["metric"]]
    if figures["precision"] != "int8":
        reasons.append(f"{figures['library']} computed the file in {figures['precision']}: no int8 kernel ran.")
    if figures["labelled"] < limits["frames"]:
        reasons.append(f"{figures['labelled']} held-out frames with labels prove nothing; {limits['frames']:.0f} are "
                       "the least.")
    if not figures["loss"] <= limits["loss"]:
        reasons.append(f"The {metric} falls by {figures['loss']:.4f}, {limits['loss']} is allowed.")
    for label, row in figures["per_class"].items():
        if row["truth"] >= LEAST_TRUTH and not row["interval"][0] <= limits["class_loss"]:
            reasons.append(f"The {part} of {label} falls by at least {row['interval'][0]:.4f}, {limits['class_loss']} "
                           "is allowed.")
    if not figures["speedup"] >= limits["speedup"]:
        reasons.append(f"It runs {figures['speedup']:.2f} times as fast as FP32 here, {limits['speedup']} is the "
                       "least.")
    return reasons


def as_now(certificate: Mapping[str, Any]) -> dict[str, Any]:
    """A certificate in today's words: those of before models of tags and polygons had any are about boxes."""
    if "map_loss" not in certificate:
        return dict(certificate)
    now = {RENAMED.get(name, name): value for name, value in certificate.items()}
    rows = {label: {RENAMED.get(name, name): value for name, value in row.items()}
            for label, row in certificate.get("per_class", {}).items()}
    limits = {RENAMED.get(name, name): value for name, value in certificate.get("limits", {}).items()}
    return {"metric": "map_50_95", "labelled": certificate.get("frames"), **now, "per_class": rows, "limits": limits}


def as_truth(found: Detections, confidence: float, taxonomy: Taxonomy, source: str) -> tuple[Annotation, ...]:
    """What a model draws from a confidence on, as if people had drawn it. source: "model:student@3"."""
    shown = found[found.confidence >= np.float32(confidence)]
    rings = shown.polygons or [None] * len(shown)
    return tuple(Annotation(taxonomy.labels[class_id], tuple(map(float, xyxy)),
                            None if ring is None else tuple(map(tuple, ring.tolist())), source=source)
                 for xyxy, class_id, ring in zip(shown.xyxy, shown.class_id, rings))


def same_pixels(frames: Sequence[LabeledFrame], fp32: Mapping[str, Detections], int8: Mapping[str, Detections],
                taxonomy: Taxonomy, confidences: tuple[float, float]) -> float | None:
    """Of the pixels that at least one of two models gives a label, the share to which both give the same one; None when
    both draw nothing.

    confidences  from which on FP32's and INT8's polygons count
    """
    drawn_by_fp32 = [replace(one, annotations=as_truth(fp32[one.frame.name], confidences[0], taxonomy, "model:fp32@1"))
                     for one in frames]
    counted = pixels(drawn_by_fp32, int8, taxonomy, confidences[1]).confusion.sum(axis=0)
    either = counted.sum() - counted[-1, -1]
    return float(np.trace(counted[:-1, :-1]) / either) if either else None


def tag_table(frames: Sequence[LabeledFrame], found: Mapping[str, Detections], scored: TagMetrics) -> TagTable:
    """Every label's confidence on every frame, and which of them are set."""
    truth = {one.frame.name: () for one in frames}
    return table(truth, found, Taxonomy(scored.labels), scored.confidence, scored.is_exclusive)


def key(file: Path) -> bytes:
    """The workbench's sealing key, 32 random bytes in a file only its owner reads; made on first use."""
    try:
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        kept = Path(file).read_bytes()
        if len(kept) != 32:
            raise Invalid(f"{file} is damaged: a sealing key has 32 bytes, this has {len(kept)}. Restore it from "
                          "backup, or remove it and certify the INT8 models again.") from None
        return kept
    fresh = secrets.token_bytes(32)
    with os.fdopen(handle, "wb") as stream:
        stream.write(fresh)
        stream.flush()
        os.fsync(stream.fileno())
    return fresh


def sign(facts: Mapping[str, Any], sealing_key: bytes) -> dict[str, Any]:
    """The certificate: the facts, which key sealed them ("sealed_by"), and the signature over both."""
    sealed = {**facts, "sealed_by": _name(sealing_key)}
    return {**sealed, "signature": _signature(sealed, sealing_key)}


def verify(certificate: Mapping[str, Any], sealing_key: bytes, *, model: str, file_sha256: str, backend: str,
           device: str, library: str, calibration_digest: str) -> None:
    """Raises Invalid, each with its own sentence and next step, unless the certificate is whole, sealed by this
    workbench, passed, and about this file, calibration, backend, device and library (major.minor)."""
    again = f"Run `workbench certify {model}` here, or annotate with the FP32 version."
    signature, by = certificate.get("signature"), certificate.get("sealed_by")
    if not isinstance(signature, str) or not re.fullmatch("[0-9a-f]{64}", signature):
        raise Invalid(f"The certificate of {model} carries no signature. {again}")
    if by != _name(sealing_key):
        raise Invalid(f"The certificate of {model} was sealed by another workbench (key {by}, here "
                      f"{_name(sealing_key)}). {again}")
    unsigned = {name: value for name, value in certificate.items() if name != "signature"}
    if not hmac.compare_digest(signature, _signature(unsigned, sealing_key)):
        raise Invalid(f"The certificate of {model} does not fit its signature: a figure was changed after it was "
                      f"sealed. {again}")
    if certificate["file_sha256"] != file_sha256:
        raise Invalid(f"The certificate of {model} is about another file (sha256 {certificate['file_sha256'][:12]}..., "
                      f"the model's is {file_sha256[:12]}...). {again}")
    if certificate["calibration_digest"] != calibration_digest:
        raise Invalid(f"The certificate of {model} is about another calibration "
                      f"({certificate['calibration_digest'][:12]}..., the model's is "
                      f"{calibration_digest[:12] or 'unknown'}...). {again}")
    for name, given in (("backend", backend), ("device", device)):
        if certificate[name] != given:
            raise Invalid(f"The certificate of {model} was measured on the {name} {certificate[name]}, this is "
                          f"{given}. {again}")
    if _major_minor(certificate["library"]) != _major_minor(library):
        raise Invalid(f"The certificate of {model} was measured with {certificate['library']}, this is {library}. "
                      f"{again}")
    if certificate["passed"] is not True:
        raise Invalid(f"{model} failed its certificate: {' '.join(certificate['reasons'])} Annotate with the FP32 "
                      "version, or quantise again with more frames.")


def _likeness(metric: str, frames: Sequence[LabeledFrame], fp32: Measured, int8: Measured) -> dict[str, Any]:
    if PRIMARY[metric] == "tags":
        one, other = (tag_table(frames, model.found, model.scored).is_set for model in (fp32, int8))
        return {"same_tags": float((one == other).all(axis=1).mean())}
    if PRIMARY[metric] == "polygons":
        confidences = fp32.scored.confidence, int8.scored.confidence
        return {"same_pixels": same_pixels(frames, fp32.found, int8.found, Taxonomy(fp32.scored.labels), confidences)}
    return {"box_shift_px": _shift(fp32.found, int8.found, fp32.scored.confidence)}


def _shift(fp32: Mapping[str, Detections], int8: Mapping[str, Detections],
           confidence: float) -> dict[str, float | None]:
    shifts = []
    for name in fp32.keys() & int8.keys():
        one, other = (found[name][found[name].confidence >= confidence] for found in (fp32, int8))
        shifts += [float(np.abs(one.xyxy[pair.one] - other.xyxy[pair.other]).max())
                   for pair in match(one.xyxy, one.class_id, other.xyxy, other.class_id) if pair.is_same_label]
    if not shifts:
        return {"median": None, "p95": None}
    return {"median": float(np.median(shifts)), "p95": float(np.percentile(shifts, 95))}


def _signature(facts: Mapping[str, Any], sealing_key: bytes) -> str:
    canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hmac.new(sealing_key, canonical.encode(), hashlib.sha256).hexdigest()


def _name(sealing_key: bytes) -> str:
    return hashlib.sha256(b"workbench sealing key" + sealing_key).hexdigest()[:12]


def _major_minor(library: str) -> tuple[str, ...]:
    """("openvino", "2026", "4") of "openvino 2026.4.1"."""
    name, _, version = library.partition(" ")
    return (name, *version.split(".")[:2])

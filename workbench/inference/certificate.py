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
from pathlib import Path
from typing import Any

import numpy as np

from workbench.annotation import Annotation
from workbench.boxes import Detections
from workbench.errors import Invalid
from workbench.evaluation.matching import match
from workbench.evaluation.metrics import Metrics, score
from workbench.evaluation.paired import differences, interval
from workbench.taxonomy import Taxonomy

# map_loss    what mAP@[.5:.95] may fall by
# class_loss  what the AP of a label with LEAST_BOXES may fall by, as far as the frames prove it: the lower end of its
#             interval counts
# speedup     int8 below it is of no use on this device
# frames      with fewer the figures prove nothing
LIMITS: Mapping[str, float] = {"map_loss": 0.005, "class_loss": 0.03, "speedup": 1.0, "frames": 10}
# A label with fewer boxes is not judged by itself: draws of so few boxes do not show how far chance alone reaches.
LEAST_BOXES = 20


def compare(truth: Mapping[str, Sequence[Annotation]], fp32: Mapping[str, Detections], int8: Mapping[str, Detections],
            taxonomy: Taxonomy, confidence: float, seed: int = 0) -> dict[str, Any]:
    """The figures of a certificate that come from detections: {"frames", "boxes", "fp32", "int8", "map_loss",
    "map_loss_interval", "per_class", "box_shift_px"}.

    truth, fp32, int8  frame name -> annotations; detections down to a low confidence, class_id indexes `taxonomy`
    confidence         at and above it a box is drawn; box_shift_px is over boxes that both draw, the largest of a
                       box's four shifts

    Intervals are 95 % intervals of the loss FP32 - INT8 (of mAP, of a label's AP): evaluation/paired.py.
    """
    scores = {"fp32": score(truth, fp32, taxonomy, confidence), "int8": score(truth, int8, taxonomy, confidence)}
    overall, losses = differences(truth, fp32, int8, taxonomy, seed)
    return {
        "frames": len(truth), "boxes": scores["fp32"].truth,
        **{name: {"map_50_95": found.map_50_95, "map_50": found.map_50} for name, found in scores.items()},
        "map_loss": scores["fp32"].map_50_95 - scores["int8"].map_50_95, "map_loss_interval": interval(overall),
        "per_class": {label: {**_aps(scores, label), "interval": interval(losses[label]),
                              "boxes": int(scores["fp32"].per_class[label]["truth"])} for label in losses},
        "box_shift_px": _shift(fp32, int8, confidence)}


def judge(figures: Mapping[str, Any], limits: Mapping[str, float]) -> list[str]:
    """Why the figures do not pass; [] when they do."""
    reasons = []
    if figures["precision"] != "int8":
        reasons.append(f"{figures['library']} computed the file in {figures['precision']}: no int8 kernel ran.")
    if figures["frames"] < limits["frames"]:
        reasons.append(f"{figures['frames']} held-out frames prove nothing; {limits['frames']:.0f} are the least.")
    if not figures["map_loss"] <= limits["map_loss"]:
        reasons.append(f"mAP falls by {figures['map_loss']:.4f}, {limits['map_loss']} is allowed.")
    for label, row in figures["per_class"].items():
        if row["boxes"] >= LEAST_BOXES and not row["interval"][0] <= limits["class_loss"]:
            reasons.append(f"AP of {label} falls by at least {row['interval'][0]:.4f}, {limits['class_loss']} is "
                           "allowed.")
    if not figures["speedup"] >= limits["speedup"]:
        reasons.append(f"It runs {figures['speedup']:.2f} times as fast as FP32 here, {limits['speedup']} is the "
                       "least.")
    return reasons


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


def _aps(scores: Mapping[str, Metrics], label: str) -> dict[str, float]:
    return {name: found.per_class[label]["ap"] for name, found in scores.items()}


def _signature(facts: Mapping[str, Any], sealing_key: bytes) -> str:
    canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hmac.new(sealing_key, canonical.encode(), hashlib.sha256).hexdigest()


def _name(sealing_key: bytes) -> str:
    return hashlib.sha256(b"workbench sealing key" + sealing_key).hexdigest()[:12]


def _major_minor(library: str) -> tuple[str, ...]:
    """("openvino", "2026", "4") of "openvino 2026.4.1"."""
    name, _, version = library.partition(" ")
    return (name, *version.split(".")[:2])

"""ModelCard: everything that must travel with a detector's weights so that it runs the same everywhere."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

from workbench.errors import Invalid
from workbench.inference.families import FAMILIES, check_decoder
from workbench.taxonomy import Taxonomy

MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
DECODERS = tuple(FAMILIES)
PADDINGS = ("topleft", "centre", "stretch")


@dataclass(frozen=True)
class InputSpec:
    """How an image becomes the model's input tensor.

    size       (width, height) in pixels
    layout     "NHWC" or "NCHW"
    dtype      "uint8" or "float32"
    colour     "RGB" or "BGR"
    mean, std  per channel in the order of `colour`: tensor = (pixel * scale - mean) / std
    padding    "topleft" or "centre": letterbox with `pad` grey; "stretch": both sides scaled on their own
    """

    size: tuple[int, int]
    layout: str = "NHWC"
    dtype: str = "uint8"
    colour: str = "RGB"
    scale: float = 1.0
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    padding: str = "topleft"
    pad: int = 114

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", tuple(int(side) for side in self.size))
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        if len(self.size) != 2 or min(self.size) < 32 or max(self.size) > 4096:
            raise Invalid(f"Input size {self.size} must be (width, height), each 32..4096 pixels.")
        for name, value, allowed in (("layout", self.layout, ("NHWC", "NCHW")), ("dtype", self.dtype, ("uint8", "float32")),
                                     ("colour", self.colour, ("RGB", "BGR")), ("padding", self.padding, PADDINGS)):
            if value not in allowed:
                raise Invalid(f"Input {name} {value!r} must be one of {', '.join(allowed)}.")
        if len(self.mean) != 3 or len(self.std) != 3 or 0 in self.std:
            raise Invalid(f"mean {self.mean} and std {self.std} must be three numbers each, std never 0.")


@dataclass(frozen=True)
class ModelCard:
    """A model version's description, stored as card.json beside its files.

    name, version  together the reference `name@version`
    decoder        {"name": one of DECODERS, ...its settings (inference/families.py), "confidence": 0..1, "iou": 0..1}
    files          file name -> {"sha256": hex, "size_bytes": int}; exactly one ends in .onnx
    trained_on     {"ref": "cells@1.0.0", "digest": ...}, or empty when unknown
    metrics        figures measured by us, e.g. {"map_50_95": 0.58, "map_50": 0.9, "on": "cells@1.0.0/test"}
    sample         a picture among the files and what the model must find on it before it is registered:
                   {"file": "sample.jpg", "expect": [{"label": "cat", "xyxy": [x1, y1, x2, y2] or left out}]}
    quantization   of an INT8 version: {"from": ref, "from_sha256", "calibration_digest", "ranges", "float_layers",
                   "frames"}; empty for every other
    """

    name: str
    version: str
    input: InputSpec
    decoder: dict[str, Any]
    labels: Taxonomy
    files: dict[str, dict[str, Any]]
    licence: str = ""
    trained_on: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    run_id: str = ""
    description: str = ""
    sample: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not MODEL_NAME.fullmatch(self.name):
            raise Invalid(f"Model name {self.name!r} must be lower-case letters, digits, '.', '-' or '_'.")
        if not MODEL_NAME.fullmatch(self.version):
            raise Invalid(f"Model version {self.version!r} must be lower-case letters, digits, '.', '-' or '_'.")
        check_decoder(self.decoder, self.labels.labels, f"Model {self.ref}")
        if not len(self.labels):
            raise Invalid(f"Model {self.ref} has no labels.")
        for file in self.files:
            if PurePosixPath(file).name != file or file.startswith("."):
                raise Invalid(f"Model {self.ref}: file name {file!r} must be a plain name without folders.")
        if sum(file.endswith(".onnx") for file in self.files) != 1:
            raise Invalid(f"Model {self.ref} must have exactly one .onnx file, has {sorted(self.files)}.")
        if self.sample:
            _check_sample(self)

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def source(self) -> str:
        """How an annotation names this model as its author."""
        return f"model:{self.ref}"

    @property
    def onnx(self) -> str:
        """The name of the ONNX file."""
        return next(file for file in self.files if file.endswith(".onnx"))

    @property
    def task(self) -> str:
        """What the model draws: "boxes", "polygons" or "tags"."""
        return FAMILIES[self.decoder["name"]].task

    def with_confidence(self, confidence: float) -> ModelCard:
        return replace(self, decoder={**self.decoder, "confidence": confidence})

    def to_json(self) -> dict[str, Any]:
        spec = self.input
        return {
            "name": self.name, "version": self.version, "labels": list(self.labels.labels), "licence": self.licence,
            "input": {"width": spec.size[0], "height": spec.size[1], "layout": spec.layout, "dtype": spec.dtype,
                      "colour": spec.colour, "scale": spec.scale, "mean": list(spec.mean), "std": list(spec.std),
                      "padding": spec.padding, "pad": spec.pad},
            "decoder": self.decoder, "files": self.files, "trained_on": self.trained_on, "metrics": self.metrics,
            "run_id": self.run_id, "description": self.description,
            **({"sample": self.sample} if self.sample else {}),
            **({"quantization": self.quantization} if self.quantization else {}),
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> ModelCard:
        """Raises Invalid when a field is missing or wrong."""
        try:
            spec = dict(record["input"])
            size = (spec.pop("width"), spec.pop("height"))
            return cls(
                name=record["name"], version=str(record["version"]), input=InputSpec(size=size, **spec),
                decoder=dict(record["decoder"]), labels=Taxonomy(tuple(record["labels"])), files=dict(record["files"]),
                licence=record.get("licence", ""), trained_on=dict(record.get("trained_on") or {}),
                metrics=dict(record.get("metrics") or {}), run_id=record.get("run_id", ""),
                description=record.get("description", ""), sample=dict(record.get("sample") or {}),
                quantization=dict(record.get("quantization") or {}),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise Invalid(f"card.json is not a model card: {error!r}. See docs/adopting.md for its fields.") from error


def _check_sample(card: ModelCard) -> None:
    file, expect = card.sample.get("file"), card.sample.get("expect")
    if file not in card.files or file == card.onnx:
        raise Invalid(
            f"Model {card.ref}: its sample picture {file!r} must be one of its files ({', '.join(card.files)}).")
    for one in expect if isinstance(expect, list) else [None]:
        if not isinstance(one, dict) or one.get("label") not in card.labels or not _is_box(one.get("xyxy")):
            raise Invalid(
                f"Model {card.ref}: its sample's \"expect\" must be a list of {{\"label\": one of its labels, "
                f"\"xyxy\": [x1, y1, x2, y2]}}, got {one if one is not None else expect!r}.")
    if not expect:
        raise Invalid(f"Model {card.ref}: its sample must expect at least one thing, else it checks nothing.")


def _is_box(box: Any) -> bool:
    """Left out, or four numbers with an area."""
    if box is None:
        return True
    if not isinstance(box, (list, tuple)) or len(box) != 4:
        return False
    if not all(isinstance(side, (int, float)) and math.isfinite(side) for side in box):
        return False
    return box[0] < box[2] and box[1] < box[3]


def parse_model_ref(ref: str) -> tuple[str, str]:
    """`student@3` -> ("student", "3"). Raises Invalid for another form."""
    name, _, version = ref.partition("@")
    if not MODEL_NAME.fullmatch(name) or not MODEL_NAME.fullmatch(version):
        raise Invalid(f"Model reference {ref!r} must read name@version.")
    return name, version

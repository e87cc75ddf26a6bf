"""Detector: a model card and an opened graph, from images to Detections in their pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from workbench.boxes import Detections
from workbench.errors import Invalid
from workbench.inference.decode import decode
from workbench.inference.graph import check_files
from workbench.inference.letterbox import Letterbox, letterbox
from workbench.inference.nms import MAX_DETECTIONS, nms
from workbench.model import ModelCard

# Gives the opened workbench.ports.Backend of an .onnx file.
OpenBackend = Callable[[Path], Any]

DEFAULT_CONFIDENCE = 0.3
DEFAULT_IOU = 0.6
# What is thinner than a pixel shows nothing, and would have no area once published at a hundredth of a pixel.
MIN_SIDE_PX = 1.0


@dataclass(frozen=True)
class Prepared:
    """One image as the model takes it: tensor without its batch axis, and the way back to the image."""

    tensor: np.ndarray
    letterbox: Letterbox


class Detector:
    """Runs one registered model; a context manager that opens the graph and frees it.

    open_backend           gives the Backend of an .onnx file
    confidence             least confidence of a box; default: the card's
    iou                    NMS threshold; default: the card's
    confidence_by_label    {label: least confidence}, over `confidence`; default: the card's
                           decoder["confidence_by_label"]

    Opening raises Invalid when a file has another sha256 than the card says or the graph's input is not what the card
    describes.
    """

    def __init__(self, card: ModelCard, folder: Path, open_backend: OpenBackend, *, confidence: float | None = None,
                 iou: float | None = None, confidence_by_label: Mapping[str, float] | None = None) -> None:
        self.card = card
        self._folder, self._open = Path(folder), open_backend
        decoder = card.decoder
        confidence = decoder.get("confidence", DEFAULT_CONFIDENCE) if confidence is None else confidence
        by_label = decoder.get("confidence_by_label", {}) if confidence_by_label is None else confidence_by_label
        self._least = np.full(len(card.labels), confidence, np.float32)
        for label, least in by_label.items():
            self._least[card.labels.class_id(label)] = least
        self._iou = decoder.get("iou", DEFAULT_IOU) if iou is None else iou
        if not all(0 <= value <= 1 for value in (*self._least, self._iou)):
            raise Invalid(
                f"Thresholds of {card.ref} must lie in 0..1, got {confidence}, {by_label} and IoU {self._iou}."
            )
        self._most = int(decoder.get("max_detections", MAX_DETECTIONS))
        # mean and std in the order of the card's colours: tensor = (pixel * scale - mean) / std.
        spec = card.input
        self._gain = np.float32(spec.scale) / np.array(spec.std, np.float32)
        self._shift = np.array(spec.mean, np.float32) / np.array(spec.std, np.float32)
        self._is_plain = spec.scale == 1 and not any(spec.mean) and all(value == 1 for value in spec.std)
        if spec.dtype == "uint8" and not self._is_plain:
            raise Invalid(f"Model {card.ref}: a uint8 input cannot be scaled; scale, mean and std must be 1, 0 and 1.")

    def __enter__(self) -> Detector:
        check_files(self.card, self._folder)
        self._backend = self._open(self._folder / self.card.onnx).__enter__()
        try:
            self._check_input()
        except BaseException:
            self._backend.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._backend.__exit__(*exc_info)

    @property
    def report(self) -> Any:
        """The BackendReport of what really runs."""
        return self._backend.report

    def detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """images: (H, W, 3) uint8 RGB of any sizes. Raises Invalid when the graph does not fit its card."""
        return self.detect_prepared([self.prepare(image) for image in images])

    def prepare(self, image: np.ndarray) -> Prepared:
        """Letterboxes and normalises one (H, W, 3) uint8 RGB image; may run in any thread."""
        spec = self.card.input
        canvas, box = letterbox(image, spec.size, spec.padding, spec.pad)
        tensor = canvas if spec.colour == "RGB" else canvas[:, :, ::-1]
        if spec.dtype == "float32":
            tensor = tensor.astype(np.float32)
            if not self._is_plain:
                tensor = tensor * self._gain - self._shift
        if spec.layout == "NCHW":
            tensor = tensor.transpose(2, 0, 1)
        return Prepared(np.ascontiguousarray(tensor), box)

    def detect_prepared(self, prepared: Sequence[Prepared]) -> list[Detections]:
        """One batch where the graph's batch size is free, one by one otherwise; results in the order given."""
        if not prepared:
            return []
        group = len(prepared) if self._backend.batch_is_dynamic else 1
        found: list[Detections] = []
        for start in range(0, len(prepared), group):
            part = prepared[start:start + group]
            outputs = self._backend.run(np.stack([one.tensor for one in part]))
            found += [self._finish(candidates, one.letterbox)
                      for candidates, one in zip(decode(self.card, outputs, self._least), part, strict=True)]
        return found

    def _finish(self, candidates: Detections, box: Letterbox) -> Detections:
        boxes = box.to_image(candidates.xyxy)
        visible = np.nonzero(((boxes[:, 2:] - boxes[:, :2]) >= MIN_SIDE_PX).all(axis=1))[0]
        kept = visible[
            nms(boxes[visible], candidates.confidence[visible], candidates.class_id[visible], self._iou, self._most)
        ]
        return Detections(boxes[kept], candidates.class_id[kept], candidates.confidence[kept])

    def _check_input(self) -> None:
        spec, shape = self.card.input, self._backend.input_shape
        sides = spec.size[::-1]
        wanted = (1, *sides, 3) if spec.layout == "NHWC" else (1, 3, *sides)
        if len(shape) != 4 or any(given not in (None, need) for given, need in zip(shape[1:], wanted[1:])) or (
                shape[0] not in (None, 1)):
            raise Invalid(
                f"{self.card.onnx} of {self.card.ref}: the graph takes {_shape(shape)}, its card says {spec.layout} "
                f"{_shape(wanted)} with a batch of 1 or any. Correct the card's input or export the graph again."
            )


def check_card(card: ModelCard, folder: Path, open_backend: OpenBackend) -> dict[str, Any]:
    """The smoke check before a model is registered: opens the graph, runs a sample, decodes it.

    Returns {"backend", "device", "precision", "library", "detections"}. Raises Invalid when files, input or outputs do
    not fit the card; then nothing may be registered.
    """
    width, height = card.input.size
    # A soft ramp with a square in it, of another aspect ratio than the input, so that letterboxing takes part.
    ramp = np.linspace(0, 255, width + width // 2, dtype=np.uint8)
    sample = np.repeat(np.broadcast_to(ramp, (height, len(ramp)))[:, :, None], 3, axis=2)
    sample[height // 4:height // 2, width // 4:width // 2] = (200, 60, 30)
    with Detector(card, folder, open_backend, confidence=0.0) as detector:
        found, again = detector.detect([sample, sample])
        if len(found) != len(again):
            raise Invalid(
                f"{card.onnx} of {card.ref} finds {len(found)} boxes, then {len(again)} in the same image; a graph "
                "whose result depends on its batch cannot annotate. Export it in evaluation mode."
            )
        return {**vars(detector.report), "detections": len(found)}


def _shape(shape: Sequence[int | None]) -> str:
    return "(" + ", ".join("n" if side is None else str(side) for side in shape) + ")"

"""Detector: a model card and an opened graph, from images to Detections in their pixels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from workbench.boxes import Detections
from workbench.errors import Invalid
from workbench.inference.candidates import Candidates
from workbench.inference.decode import decode
from workbench.inference.families import FAMILIES
from workbench.inference.graph import Graph, check_files, read_graph
from workbench.inference.letterbox import Letterbox, fit, letterbox
from workbench.inference.masks import outlined
from workbench.inference.nms import MAX_DETECTIONS, nms
from workbench.inference.standard import dynamic_batch, gain_and_shift, pixels_inside
from workbench.model import ModelCard

# Gives the opened workbench.ports.Backend of an .onnx file or of a graph in memory (read_graph takes both).
OpenBackend = Callable[[Path | Graph], Any]

DEFAULT_CONFIDENCE = 0.3
DEFAULT_IOU = 0.6
# What is thinner than a pixel shows nothing, and would have no area once published at a hundredth of a pixel.
MIN_SIDE_PX = 1.0


@dataclass(frozen=True)
class Prepared:
    """One image as the model takes it: the (H, W, 3) uint8 RGB canvas, and the way back to the image."""

    tensor: np.ndarray
    letterbox: Letterbox


class Detector:
    """Runs one registered model; a context manager that opens the graph and frees it.

    open_backend           gives the Backend of an .onnx file
    confidence             least confidence of a box; default: the card's
    iou                    NMS threshold; default: the card's
    confidence_by_label    {label: least confidence}, over `confidence`; default: the card's
                           decoder["confidence_by_label"]
    batch                  how many images a run is to take: above 1, a graph exported for one image is opened for any
                           number, if it then treats them alike

    The graph is opened in its standard form (inference/standard.py), so a canvas of pixels is all it takes. detect,
    prepare and detect_prepared may be called from several threads; `streams` runs go at once. Opening raises Invalid
    when a file has another sha256 than the card says or the graph's input is not what the card describes.
    """

    def __init__(self, card: ModelCard, folder: Path, open_backend: OpenBackend, *, confidence: float | None = None,
                 iou: float | None = None, confidence_by_label: Mapping[str, float] | None = None,
                 batch: int = 1) -> None:
        self.card, self._batch = card, batch
        self._folder, self._open = Path(folder), open_backend
        decoder = card.decoder
        confidence = decoder.get("confidence", DEFAULT_CONFIDENCE) if confidence is None else confidence
        by_label = decoder.get("confidence_by_label", {}) if confidence_by_label is None else confidence_by_label
        self._least = np.full(len(card.labels), confidence, np.float32)
        for label, least in by_label.items():
            self._least[card.labels.class_id(label)] = least
        self.iou = decoder.get("iou", DEFAULT_IOU) if iou is None else iou
        if not all(0 <= value <= 1 for value in (*self._least, self.iou)):
            raise Invalid(
                f"Thresholds of {card.ref} must lie in 0..1, got {confidence}, {by_label} and IoU {self.iou}."
            )
        self.most = int(decoder.get("max_detections", MAX_DETECTIONS))
        gain, shift = gain_and_shift(card.input)
        if card.input.dtype == "uint8" and ((gain != 1).any() or shift.any()):
            raise Invalid(f"Model {card.ref}: a uint8 input cannot be scaled; scale, mean and std must be 1, 0 and 1.")

    def __enter__(self) -> Detector:
        check_files(self.card, self._folder)
        file = self._folder / self.card.onnx
        _, model = read_graph(file)
        try:
            standard, _ = pixels_inside(model, self.card.input)
        except Invalid as error:
            raise Invalid(f"{self.card.onnx} of {self.card.ref}: {error}") from error
        freed = dynamic_batch(standard) if self._batch > 1 else standard
        self._backend = self._opened_for_many(Graph(file, freed)) if freed is not standard else None
        if self._backend is None:
            self._backend = self._opened(file if standard is model else Graph(file, standard))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._backend.__exit__(*exc_info)

    @property
    def report(self) -> Any:
        """The BackendReport of what really runs."""
        return self._backend.report

    @property
    def streams(self) -> int:
        """How many runs of the graph go at once."""
        return self._backend.streams

    @property
    def batch_is_dynamic(self) -> bool:
        """Whether the graph takes several images in one run."""
        return self._backend.batch_is_dynamic

    def at(self, confidence: float) -> Detector:
        """The same opened model with another least confidence, of all labels; usable as long as this one is open."""
        view = copy.copy(self)
        view._least = np.full(len(self.card.labels), confidence, np.float32)
        return view

    def detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """images: (H, W, 3) uint8 RGB of any sizes. Raises Invalid when the graph does not fit its card."""
        return self.detect_prepared([self.prepare(image) for image in images])

    def prepare(self, image: np.ndarray, image_size: tuple[int, int] | None = None) -> Prepared:
        """Letterboxes one (H, W, 3) uint8 RGB image; may run in any thread.

        image_size  (width, height) of the image it shows as a whole, if it was reduced when it was decoded
        """
        spec = self.card.input
        return Prepared(*letterbox(image, spec.size, spec.padding, spec.pad, image_size))

    def least_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) of an image of `image_size` on the canvas: what a reduced one should have at least."""
        return fit(image_size, self.card.input.size, self.card.input.padding)[0]

    def outputs(self, canvases: np.ndarray) -> dict[str, np.ndarray]:
        """One run of the graph on (n, H, W, 3) uint8 RGB canvases: its outputs as they are."""
        return self._backend.run(canvases)

    def detect_prepared(self, prepared: Sequence[Prepared]) -> list[Detections]:
        """One batch where the graph's batch size is free, one by one otherwise; results in the order given."""
        if not prepared:
            return []
        group = len(prepared) if self._backend.batch_is_dynamic else 1
        found: list[Detections] = []
        for start in range(0, len(prepared), group):
            part = prepared[start:start + group]
            outputs = self.outputs(part[0].tensor[None] if len(part) == 1 else np.stack([one.tensor for one in part]))
            found += [self._finish(candidates, one.letterbox)
                      for candidates, one in zip(decode(self.card, outputs, self._least), part, strict=True)]
        return found

    def _finish(self, candidates: Candidates, box: Letterbox) -> Detections:
        boxes = box.to_image(candidates.xyxy)
        kept = np.nonzero(((boxes[:, 2:] - boxes[:, :2]) >= MIN_SIDE_PX).all(axis=1))[0]
        if FAMILIES[self.card.decoder["name"]].suppresses:
            kept = kept[nms(boxes[kept], candidates.confidence[kept], candidates.class_id[kept], self.iou, self.most)]
        return outlined(self.card, candidates, kept[:self.most], boxes, box)

    def _opened(self, source: Path | Graph) -> Any:
        backend = self._open(source).__enter__()
        width, height = self.card.input.size
        if backend.input_shape[1:] != (height, width, 3):
            backend.__exit__(None, None, None)
            raise Invalid(f"{self.card.onnx} of {self.card.ref}: opened by {backend.report.library} the graph takes "
                          f"{backend.input_shape} instead of (n, {height}, {width}, 3). Use another backend.")
        return backend

    def _opened_for_many(self, source: Graph) -> Any | None:
        """The backend of a graph whose batch axis was freed; None when it does not treat every image alike."""
        width, height = self.card.input.size
        canvases = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
        try:
            with ExitStack() as stack:
                backend = self._opened(source)
                stack.push(backend)
                both, singles = backend.run(canvases), [backend.run(canvas[None]) for canvas in canvases]
                if all(_alike(values, np.concatenate([one[name] for one in singles])) for name, values in both.items()):
                    stack.pop_all()
                    return backend
        except Invalid:
            return None  # it fixes its batch in other places too, so it cannot be opened or run
        return None


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    # Sums of float32 in another order differ in their last bits, more so after many layers.
    return one.shape == other.shape and np.allclose(one, other, rtol=1e-3, atol=1e-3 * np.abs(other).max())


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
        report = {**vars(detector.report), "detections": len(found)}
    if card.sample:
        from workbench.inference.sample import check_sample  # it decodes pictures as the pipeline does, which needs us
        with Detector(card, folder, open_backend) as detector:
            check_sample(card, folder, detector.detect)
    return report

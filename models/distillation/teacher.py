"""The teacher: an ONNX model with its card, and what it sees on frames."""
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.card import latency
from training.coco import Sample
from training.detection import Decode, Found
from training.errors import TrainingError
from training.images import PAD_VALUE, letterbox, read_image

TOP_LEFT = ("topleft", "letterbox-topleft")


@dataclasses.dataclass(frozen=True)
class Teacher:
    """card: its card.json; labels: its own, in class-id order; decode: as in training.detection.Decode, for its outputs in
    the order of `names`."""

    file: Path
    card: Mapping[str, Any]
    session: Any
    labels: tuple[str, ...]
    names: tuple[str, ...]
    decode: Decode

    @property
    def size(self) -> tuple[int, int]:
        return self.card["input"]["width"], self.card["input"]["height"]

    def label(self, sample: Sample, labels: Sequence[str]) -> Found:
        """What it sees on a frame, in original pixels; class ids are those of `labels`, what these lack is left out."""
        spec = self.card["input"]
        canvas, scale = letterbox(read_image(sample.path), self.size, spec.get("pad_value", spec.get("pad", PAD_VALUE)))
        outputs = self.session.run(list(self.names), {self.session.get_inputs()[0].name: self._tensor(canvas)})
        parts = self.decode(tuple(torch.from_numpy(one[0]) for one in outputs), scale, (sample.width, sample.height))
        boxes, scores, class_ids = (part.numpy() for part in parts)
        own = np.array([labels.index(label) if label in labels else -1 for label in self.labels])[class_ids]
        return boxes[own >= 0], scores[own >= 0], own[own >= 0]

    def figures(self) -> dict[str, Any]:
        """{"teacher_parameter_count", "teacher_size_mb", "teacher_latency_ms"}"""
        import onnx

        graph = onnx.load(self.file).graph
        count = sum(int(np.prod(one.dims)) for one in graph.initializer if one.data_type == onnx.TensorProto.FLOAT)
        frame = self._tensor(np.full((self.size[1], self.size[0], 3), PAD_VALUE, np.uint8))
        return {"teacher_parameter_count": count, "teacher_size_mb": self.file.stat().st_size / 1e6,
                "teacher_latency_ms": latency(frame, self.file, runs=10)["latency_ms"]}

    def _tensor(self, canvas: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 RGB as its card wants it, a batch of one."""
        spec = self.card["input"]
        pixels = canvas if spec.get("colour", "RGB") == "RGB" else canvas[..., ::-1]
        if spec.get("dtype", "uint8") == "float32":
            pixels = ((pixels.astype(np.float32) * spec.get("scale", 1) - np.float32(spec.get("mean", 0)))
                      / np.float32(spec.get("std", 1)))
        if spec.get("layout", "NHWC") == "NCHW":
            pixels = pixels.transpose(2, 0, 1)
        return np.ascontiguousarray(pixels[None])


def open_teacher(file: Path, card_file: Path, labels: Sequence[str], threads: int) -> Teacher:
    """Raises TrainingError when a file is missing or damaged, when the card's decoder is none that is known here, and when
    teacher and data set have no label in common."""
    try:
        import onnxruntime
    except ImportError as error:
        raise TrainingError("The teacher runs in ONNX Runtime, which is not installed. Run: pip install onnxruntime") from error
    for one, what in ((file, "teacher"), (card_file, "teacher_card")):
        if not one.is_file():
            raise TrainingError(f"{what} {one} does not exist. Give a model of the workbench (teacher=NAME@VERSION), or the "
                                "files model.onnx and card.json of an earlier training.")
    try:
        card = json.loads(card_file.read_text())
        given = tuple(card["labels"])
        card["input"]["width"], card["input"]["height"]
        names, decode = _decoder(card)
        (record,) = [record for name, record in card["files"].items() if name.endswith(".onnx")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"{card_file} is not the card of a model: {error!r}. Give the card.json beside the teacher's "
                            "model.onnx.") from error
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != record["sha256"]:
        raise TrainingError(f"{file} has sha256 {digest}, its card says {record['sha256']}. Give model and card of one "
                            "version.")
    if not set(given) & set(labels):
        raise TrainingError(f"The teacher knows {list(given)}, the data set {list(labels)}: no label in common. Choose "
                            "another teacher.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        absent = set(names) - {one.name for one in session.get_outputs()}
    except Exception as error:  # onnxruntime's own classes share no public ancestor
        raise TrainingError(f"{file} cannot be opened by ONNX Runtime: {error!r:.200}. Export the teacher again.") from error
    if absent:
        raise TrainingError(f"{file} has no output {', '.join(sorted(absent))}, which its card names. Give model and card of "
                            "one version.")
    return Teacher(file, card, session, given, names, decode)


def _decoder(card: Mapping[str, Any]) -> tuple[tuple[str, ...], Decode]:
    """The outputs' names in the order that the recipe's own decoder takes them, and that decoder."""
    from efficientnet_lite0_fcos import evaluate as fcos
    from fasterrcnn import network as rcnn
    from ssdlite320_mobilenet_v3 import network as ssd

    given, spec = card["decoder"], card["input"]
    size, said = (spec["width"], spec["height"]), given["name"]
    if spec.get("padding") not in TOP_LEFT:
        raise TrainingError(f"The teacher's padding is {spec.get('padding')}, this recipe letterboxes top-left only. Choose "
                            "another teacher.")
    if said == "detections":
        kept, decode, keys = {}, rcnn.decode, ("box", "score", "label")
    elif said == "fcos":
        kept, keys = {"strides": fcos.CARD["strides"], "score": fcos.CARD["score"]}, ("cls", "box", "ctr")

        def decode(outputs, scale, image_size):
            return fcos.decode(outputs, size, scale, image_size)
    elif said == "ssd":
        own = ssd.decoder(given["scales"])
        kept, keys = {key: own[key] for key in ("strides", "aspect_ratios", "weights")}, ("cls", "box")
        anchors = ssd.default_boxes(size, given["scales"])

        def decode(outputs, scale, image_size):
            return ssd.decode(outputs, anchors, scale, image_size)
    else:
        raise TrainingError(f"The teacher's decoder is {said}; this recipe reads detections, fcos and ssd, which fasterrcnn, "
                            "efficientnet_lite0_fcos and ssdlite320_mobilenet_v3 write. Train a teacher with one of them.")
    other = [key for key, value in kept.items() if given.get(key, value) != value]
    if other:
        raise TrainingError(f"The teacher's {said} decoder has other {', '.join(other)} than this repository's recipes "
                            "write. Train a teacher with one of them.")
    return tuple(given["outputs"][key] for key in keys), decode

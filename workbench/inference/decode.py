"""Decoders: a model's raw outputs into candidates on its canvas, one function per family of heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from workbench.errors import Invalid
from workbench.inference import anchors, heads, masks
from workbench.inference.candidates import Candidates, Outputs
from workbench.model import ModelCard

_DECODERS: Mapping[str, Callable[[ModelCard, Outputs, np.ndarray], list[Candidates]]] = {
    "yolox": heads.yolox, "nanodet": heads.nanodet, "fcos": heads.fcos, "yolov5": heads.yolov5, "yolov8": heads.yolov8,
    "retinanet": anchors.retinanet, "ssd": anchors.ssd, "detr": heads.detr,
    "detections": heads.detections, "classification": heads.classification,
    "semantic": masks.semantic, "yolov8_seg": masks.yolov8_seg}


def decode(card: ModelCard, outputs: Outputs, least: np.ndarray) -> list[Candidates]:
    """One Candidates per image of the batch, in canvas pixels, best first, before NMS.

    outputs  what Backend.run returned
    least    (C,) the confidence a candidate of each class must exceed

    Raises Invalid, naming the model's file and what was expected, when the outputs do not fit the card's decoder,
    labels and input size, hold a NaN or an infinity, or scores that are none.
    """
    if not outputs:
        raise Invalid(f"{card.onnx} of {card.ref} gives no output. Export the model again.")
    for name, output in outputs.items():
        if not np.isfinite(output).all():
            raise Invalid(f"{card.onnx} of {card.ref}: output {name!r} holds a NaN or an infinity; the weights or the "
                          "input's scale, mean and std are broken. Export the model again or mend its card.")
    return _DECODERS[card.decoder["name"]](card, outputs, least)

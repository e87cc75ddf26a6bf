"""The sample on a model's card: what the model must find on its own picture before anybody may register it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from workbench.boxes import Detections, iou
from workbench.errors import Invalid
from workbench.inference.pipeline import decode_image
from workbench.model import ModelCard

# The match threshold of PASCAL VOC (Everingham et al., 2010, section 4.2).
SAME_OBJECT_IOU = 0.5
TOLD = 5


def check_sample(card: ModelCard, folder: Path, detect: Callable[[Sequence[np.ndarray]], list[Detections]]) -> None:
    """Runs the model on the card's sample picture.

    detect  what Detector.detect is, with the card's own thresholds

    Raises Invalid, saying what was found, when something the card expects is not there: a decoder, colour order,
    padding or label list that fits the shapes but not the weights shows here.
    """
    picture = Path(folder) / card.sample["file"]
    found = detect([decode_image(picture.read_bytes(), picture.name)])[0]
    labels = [card.labels.labels[class_id] for class_id in found.class_id]
    for one in card.sample["expect"]:
        same = [index for index, label in enumerate(labels) if label == one["label"]]
        box = one.get("xyxy") if card.task != "tags" else None
        if not same or box and iou(np.array([box]), found.xyxy[same]).max() < SAME_OBJECT_IOU:
            said = "; ".join(
                f"{label} {confidence:.2f} at {np.round(xyxy).astype(int).tolist()}"
                for label, confidence, xyxy in zip(labels[:TOLD], found.confidence, found.xyxy)
            )
            more = f" and {len(found) - TOLD} more" if len(found) > TOLD else ""
            raise Invalid(
                f"{card.onnx} of {card.ref} does not find {one['label']}{f' at {list(box)}' if box else ''} on "
                f"{picture.name}; it finds {said + more or 'nothing'}. Check the card's decoder "
                f"({card.decoder['name']}), the order of its labels, colour, mean and std, and padding."
            )

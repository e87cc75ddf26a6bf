"""RetinaNet, FCOS and SSD against torchvision's own postprocessing: the same raw outputs, every box compared."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from workbench.inference.anchors import default_boxes, retinanet_anchors
from workbench.inference.candidates import points
from workbench.inference.decode import decode
from workbench.inference.letterbox import Letterbox
from workbench.inference.masks import outlined
from workbench.inference.nms import nms
from workbench.model import InputSpec, ModelCard
from workbench.taxonomy import Taxonomy

torch = pytest.importorskip("torch")
detection = pytest.importorskip("torchvision.models.detection")
LABELS = ("cat", "dog", "bird")
FEW = 0.5


class Pyramid(torch.nn.Module):
    """Feature maps as a backbone with these strides gives them; their values do not matter here."""

    def __init__(self, strides: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.strides, self.out_channels = strides, channels

    def forward(self, images: Any) -> dict[str, Any]:
        height, width = images.shape[-2:]
        return {
            str(stride): torch.zeros(
                len(images), self.out_channels, math.ceil(height / stride), math.ceil(width / stride)
            )
            for stride in self.strides
        }


def raw(model: Any, size: tuple[int, int], seed: int) -> tuple[dict[str, Any], list[Any], list[int]]:
    """Random outputs in the shapes that the model's own head gives, its anchors, and anchors a level."""
    torch.manual_seed(seed)
    images = torch.zeros(1, 3, size[1], size[0])
    with torch.no_grad():
        features = list(model.backbone(images).values())
        shapes = {name: value.shape for name, value in model.head(features).items()}
    anchors = model.anchor_generator(detection.image_list.ImageList(images, [size[::-1]]), features)
    outputs = {name: torch.randn(shape) * 1.5 for name, shape in shapes.items()}
    outputs["cls_logits"] -= 1.5
    outputs["bbox_regression"] *= 0.5
    per_level = [
        len(anchors[0]) * one.shape[2] * one.shape[3] // sum(f.shape[2] * f.shape[3] for f in features)
        for one in features
    ]
    return outputs, anchors, per_level


def card(name: str, size: tuple[int, int], labels: tuple[str, ...] = LABELS, **decoder: Any) -> ModelCard:
    return ModelCard(
        "m",
        "1",
        InputSpec(size),
        {"name": name, "max_candidates": 10**6, "max_detections": 10**4, **decoder},
        Taxonomy(labels),
        {"m.onnx": {"sha256": "0"}},
    )


def ours(one: ModelCard, outputs: dict[str, Any], iou: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    least = np.full(len(one.labels), FEW, np.float32)
    (found,) = decode(one, {name: value.numpy() for name, value in outputs.items()}, least)
    box = Letterbox((1, 1), (0, 0), one.input.size)
    boxes = box.to_image(found.xyxy)
    seen = np.nonzero(_is_seen(boxes))[0]
    kept = seen[nms(boxes[seen], found.confidence[seen], found.class_id[seen], iou, 10**4)]
    done = outlined(one, found, kept, boxes, box)
    return done.xyxy, done.confidence, done.class_id


def _is_seen(boxes: np.ndarray) -> np.ndarray:
    """Not cut to a line at the frame's edge: torchvision keeps such boxes, we do not."""
    return (boxes[:, 2:] - boxes[:, :2] >= 1).all(axis=1)


def assert_same(found: tuple[np.ndarray, np.ndarray, np.ndarray], theirs: dict[str, Any], first: int) -> None:
    """first: the label that torchvision gives our class 0."""
    boxes, scores, ids = found
    theirs = {name: value[_is_seen(theirs["boxes"])] for name, value in theirs.items()}
    assert len(boxes) == len(theirs["boxes"]) > 30
    order, their_order = np.lexsort((boxes[:, 0], -scores)), np.lexsort((theirs["boxes"][:, 0], -theirs["scores"]))
    np.testing.assert_allclose(scores[order], theirs["scores"][their_order], atol=2e-6)
    # float32 sums at 512 px: 1e-3 px.
    np.testing.assert_allclose(boxes[order], theirs["boxes"][their_order], atol=2e-3)
    assert (ids[order] + first).tolist() == theirs["labels"][their_order].tolist()


@pytest.mark.parametrize("size", [(256, 128), (416, 224)], ids=["divisible", "cells that do not fill the input"])
def test_retinanet_decodes_as_torchvision_does(size: tuple[int, int]) -> None:
    strides = (8, 16, 32, 64, 128)
    model = detection.RetinaNet(
        Pyramid(strides, 8),
        len(LABELS),
        anchor_generator=detection.retinanet._default_anchorgen(),
        score_thresh=FEW,
        nms_thresh=0.5,
        detections_per_img=10**4,
        topk_candidates=10**6,
    ).eval()
    outputs, anchors, per_level = raw(model, size, seed=3)
    one = card("retinanet", size)
    np.testing.assert_allclose(retinanet_anchors(one), anchors[0].numpy())
    split = {name: list(value.split(per_level, dim=1)) for name, value in outputs.items()}
    (theirs,) = model.postprocess_detections(split, [list(anchors[0].split(per_level))], [size[::-1]])
    assert_same(ours(one, outputs, 0.5), {name: value.numpy() for name, value in theirs.items()}, first=0)


def test_fcos_decodes_as_torchvision_does() -> None:
    size, strides = (256, 128), (8, 16, 32, 64, 128)
    model = detection.FCOS(
        Pyramid(strides, 32),
        len(LABELS),
        score_thresh=FEW,
        nms_thresh=0.6,
        detections_per_img=10**4,
        topk_candidates=10**6,
    ).eval()
    outputs, anchors, per_level = raw(model, size, seed=4)
    outputs["bbox_regression"] = outputs["bbox_regression"].abs() + 0.2
    split = {name: list(value.split(per_level, dim=1)) for name, value in outputs.items()}
    (theirs,) = model.postprocess_detections(split, [list(anchors[0].split(per_level))], [size[::-1]])
    one = card("fcos", size, strides=list(strides), centre=0)
    assert len(points(one, 0)[0]) == len(anchors[0])
    assert_same(ours(one, outputs, 0.6), {name: value.numpy() for name, value in theirs.items()}, first=0)


@pytest.mark.parametrize("kind", ["ssd300", "ssdlite320"])
def test_ssd_decodes_as_torchvision_does(kind: str) -> None:
    generator = detection.anchor_utils.DefaultBoxGenerator
    if kind == "ssd300":
        size, strides, decoder = (300, 300), (8, 16, 32, 64, 100, 300), {}
        boxes = generator(
            [[2], [2, 3], [2, 3], [2, 3], [2], [2]],
            scales=[0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05],
            steps=[8, 16, 32, 64, 100, 300],
        )
    else:
        size, strides = (320, 320), (16, 32, 64, 107, 160, 320)
        boxes = generator([[2, 3]] * 6, min_ratio=0.2, max_ratio=0.95)
        decoder = {"strides": list(strides), "aspect_ratios": [[2, 3]] * 6, "scales": list(boxes.scales)}
    model = detection.ssd.SSD(
        Pyramid(strides, 8),
        boxes,
        size,
        len(LABELS) + 1,
        score_thresh=FEW,
        nms_thresh=0.45,
        detections_per_img=10**4,
        topk_candidates=10**6,
        head=detection.ssd.SSDHead([8] * 6, boxes.num_anchors_per_location(), len(LABELS) + 1),
    ).eval()
    outputs, anchors, _ = raw(model, size, seed=5)
    outputs["cls_logits"][..., 0] += 2
    one = card("ssd", size, **decoder)
    np.testing.assert_allclose(default_boxes(one), anchors[0].numpy(), atol=1e-4)
    (theirs,) = model.postprocess_detections(outputs, anchors, [size[::-1]])
    assert_same(ours(one, outputs, 0.45), {name: value.numpy() for name, value in theirs.items()}, first=1)


def test_labels_of_a_head_with_more_columns_are_the_ones_the_card_names() -> None:
    size = (256, 128)
    model = detection.RetinaNet(
        Pyramid((8, 16, 32, 64, 128), 8),
        7,
        anchor_generator=detection.retinanet._default_anchorgen(),
        score_thresh=FEW,
        nms_thresh=0.5,
        detections_per_img=10**4,
        topk_candidates=10**6,
    ).eval()
    outputs, anchors, per_level = raw(model, size, seed=6)
    outputs["cls_logits"][..., [0, 2, 3, 5]] = -20  # columns that no label of ours stands for
    split = {name: list(value.split(per_level, dim=1)) for name, value in outputs.items()}
    (theirs,) = model.postprocess_detections(split, [list(anchors[0].split(per_level))], [size[::-1]])
    theirs = {name: value.numpy() for name, value in theirs.items()}
    theirs["labels"] = np.searchsorted([1, 4, 6], theirs["labels"])
    assert_same(ours(card("retinanet", size, columns=[1, 4, 6]), outputs, 0.5), theirs, first=0)

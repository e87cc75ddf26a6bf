"""SSDLite (Sandler et al., MobileNetV2, 2018, section 6.2; Howard et al., MobileNetV3, 2019, section 6.3), as torchvision
builds it, on MobileNetV3-Large or on EfficientNet-Lite0; its default boxes, decoding and ONNX graph."""
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops import Conv2dNormActivation, batched_nms

from training import backbones, export
from training.coco import Sample
from training.detection import CONFIDENCE, MAX_DETECTIONS
from training.weights import LITE0_MEAN, LITE0_STD

BACKBONES = ("mobilenet_v3_large", "efficientnet_lite0")
STRIDES = (16, 32, 64, 128, 256, 512)
RATIOS = (2, 3)  # and their inverses: six boxes a cell with the two squares
WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # of x, y, log width, log height (torchvision, ssd.py)
# torchvision's ssdlite320 starts at 0.2 of the side, made for COCO; smaller objects need smaller boxes.
LARGEST_START, SMALLEST_START, SCALE_END = 0.2, 0.04, 0.95
NMS_IOU = 0.55  # torchvision, ssdlite320_mobilenet_v3_large
MAX_CANDIDATES = 1000
# BoxCoder's limit of log width and height (torchvision, _utils.py).
MAX_LOG_SIDE = float(np.log(1000 / 16))


class Detector(nn.Module):
    """uint8 images in, raw heads out; decoding and NMS are outside.

    forward(images (N, H, W, 3) uint8 RGB, H and W multiples of 32) returns
      cls_logits       (N, A, 1 + C)  logits, the first is the background's
      bbox_regression  (N, A, 4)      offsets of the default boxes, times WEIGHTS
    A runs over STRIDES, then rows, then columns, then six shapes: the order of `default_boxes`.
    """

    def __init__(self, class_count: int, backbone: str = BACKBONES[0]):
        super().__init__()
        if backbone == "efficientnet_lite0":
            norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)  # torchvision, ssdlite.py
            self.backbone, self.mean, self.std = backbones.lite0((3, 4)), LITE0_MEAN, LITE0_STD
            channels = self.backbone.feature_info.channels()
            widths = (512, 256, 256, 128)
            self.extra = nn.ModuleList(_extra(inside, outside, norm)
                                       for inside, outside in zip((channels[-1], *widths), widths))
            self.head = SSDLiteHead([*channels, *widths], [2 + 2 * len(RATIOS)] * len(STRIDES), class_count + 1, norm)
        else:
            ssd = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=class_count + 1)
            # (pixel / 255 - 0.5) / 0.5, as torchvision's weights were trained.
            self.backbone, self.head, self.extra, self.mean, self.std = ssd.backbone, ssd.head, None, 127.5, 127.5

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.backbone((images.permute(0, 3, 1, 2).float() - self.mean) * (1 / self.std))
        levels = list(features.values()) if isinstance(features, OrderedDict) else list(features)
        for block in self.extra or ():
            levels.append(block(levels[-1]))
        heads = self.head(levels)
        return heads["cls_logits"], heads["bbox_regression"]

    def freeze(self, stages: int) -> None:
        """Stops the first `stages` parts of the backbone from learning: Lite0's 7 stages, or MobileNetV3's 18 blocks."""
        if self.extra is not None:
            parts = backbones.lite0_stages(self.backbone)
        else:
            parts = [[block] for half in self.backbone.features for block in half]
        backbones.freeze(parts, stages)

    @staticmethod
    def class_rows(labels: Sequence[str]) -> Mapping[str, Mapping[str, Sequence[int]]]:
        """Which rows of which tensors are a label's (training.weights.ClassRows): each of six shapes has 1 + C."""
        shapes = range(2 + 2 * len(RATIOS))
        rows = {label: [shape * (1 + len(labels)) + at for shape in shapes] for at, label in enumerate(["", *labels])}
        return {f"head.classification_head.module_list.{level}.1.{part}": rows
                for level in range(len(STRIDES)) for part in ("weight", "bias")}


def _extra(inside: int, outside: int, norm: Any) -> nn.Module:
    """Half the side again: 1x1, 3x3 depthwise with stride 2, 1x1 (torchvision, ssdlite.py, _extra_block)."""
    middle, layer = outside // 2, partial(Conv2dNormActivation, norm_layer=norm, activation_layer=nn.ReLU6)
    return nn.Sequential(layer(inside, middle, kernel_size=1),
                         layer(middle, middle, kernel_size=3, stride=2, groups=middle),
                         layer(middle, outside, kernel_size=1))


def scales(samples: Sequence[Sample], size: tuple[int, int], smallest: float) -> list[float]:
    """Sides of the default boxes as shares of the input, one a stride and 1: evenly from `smallest` to 0.95.

    smallest  0: the 10th percentile of the training boxes' sides, within 0.04..0.2
    """
    if not smallest:
        sides = [np.sqrt((sample.boxes[:, 2:] - sample.boxes[:, :2]).prod(axis=1))
                 * min(size[0] / sample.width, size[1] / sample.height) for sample in samples]
        sides = np.concatenate(sides) / np.sqrt(size[0] * size[1])
        smallest = float(np.clip(np.percentile(sides, 10), SMALLEST_START, LARGEST_START)) if len(sides) else LARGEST_START
    return [*(round(float(one), 4) for one in np.linspace(smallest, SCALE_END, len(STRIDES))), 1.0]


def default_boxes(size: tuple[int, int], scales: Sequence[float]) -> torch.Tensor:
    """(A, 4) xyxy in canvas pixels, from torchvision's own generator."""
    made = DefaultBoxGenerator([list(RATIOS)] * len(STRIDES), scales=list(scales))
    grids = [torch.zeros(1, 1, -(-size[1] // stride), -(-size[0] // stride)) for stride in STRIDES]
    return made(ImageList(torch.zeros(1, 3, size[1], size[0]), [(size[1], size[0])]), grids)[0]


def decoder(scales: Sequence[float]) -> dict[str, Any]:
    """What the card says: how `decode` works."""
    return {"name": "ssd", "strides": list(STRIDES), "aspect_ratios": [list(RATIOS)] * len(STRIDES),
            "scales": list(scales), "weights": list(WEIGHTS), "score": "softmax(cls), column 0 is the background",
            "outputs": {"cls": "cls_logits", "box": "bbox_regression"}, "confidence": CONFIDENCE, "iou": NMS_IOU,
            "nms": "per class, after clipping", "max_candidates": MAX_CANDIDATES, "max_detections": MAX_DETECTIONS}


def decode(outputs: tuple[torch.Tensor, ...], anchors: torch.Tensor, scale: float, image_size: tuple[int, int],
           confidence: float = CONFIDENCE, nms_iou: float = NMS_IOU) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One image's heads (A, 1 + C), (A, 4) to boxes (n, 4) xyxy in original pixels, scores (n,), class_ids (n,).

    torchvision, models/detection/ssd.py, postprocess_detections; scale: canvas pixels per image pixel.
    """
    scores = outputs[0].softmax(-1)[:, 1:]
    at, class_ids = (scores > confidence).nonzero(as_tuple=True)
    scores = scores[at, class_ids]
    if len(scores) > MAX_CANDIDATES:
        scores, best = scores.topk(MAX_CANDIDATES)
        at, class_ids = at[best], class_ids[best]
    boxes = moved(anchors[at], outputs[1][at]) / scale
    boxes[:, 0::2] = boxes[:, 0::2].clamp(0, image_size[0])
    boxes[:, 1::2] = boxes[:, 1::2].clamp(0, image_size[1])
    kept = batched_nms(boxes, scores, class_ids, nms_iou)[:MAX_DETECTIONS]
    return boxes[kept], scores[kept], class_ids[kept]


def moved(anchors: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """(n, 4) default boxes and offsets to (n, 4) xyxy (torchvision, _utils.py, BoxCoder.decode_single)."""
    sides = anchors[:, 2:] - anchors[:, :2]
    offsets = offsets / offsets.new_tensor(WEIGHTS)
    centres = offsets[:, :2] * sides + anchors[:, :2] + sides / 2
    halves = offsets[:, 2:].clamp(max=MAX_LOG_SIDE).exp() * sides / 2
    return torch.cat([centres - halves, centres + halves], 1)


def offsets_of(anchors: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """The offsets with which `moved` gives `boxes` (BoxCoder.encode_single)."""
    sides, wanted = anchors[:, 2:] - anchors[:, :2], boxes[:, 2:] - boxes[:, :2]
    shift = (boxes[:, :2] + wanted / 2 - anchors[:, :2] - sides / 2) / sides
    return torch.cat([shift, (wanted / sides).log()], 1) * boxes.new_tensor(WEIGHTS)


def export_onnx(model: Detector, size: tuple[int, int], file: Path) -> None:
    export.export_onnx(model, size, file, ["cls_logits", "bbox_regression"])

"""EfficientNet-Lite0 + feature pyramid + FCOS head, and its ONNX graph.

The head keeps FCOS' outputs (Tian et al., 2019: per point a class, four distances and a centre-ness) on strides 8, 16, 32.
"""
import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.ops import FeaturePyramidNetwork

from training import backbones, export
from training.weights import LITE0_MEAN, LITE0_STD

STRIDES = (8, 16, 32)
# Chance of an object at a point before training (Lin et al., focal loss, 2017, section 4.1).
PRIOR = 0.01
# exp(5) strides = 4,700 px at stride 32: far beyond any frame, and it keeps exp finite.
MAX_LOG_DISTANCE = 5.0


class Detector(nn.Module):
    """The whole network: uint8 images in, raw heads out; decoding and NMS are outside (evaluate.py).

    forward(images (N, H, W, 3) uint8 RGB, H and W multiples of 32) returns
      cls_logits       (N, A, C)  logits
      bbox_regression  (N, A, 4)  left, top, right, bottom distances from the point, >= 0, in units of the point's stride
      bbox_ctrness     (N, A, 1)  logit of how well the box fits
    A runs over strides 8, 16, 32, then rows, then columns: the order of `points`.
    """

    def __init__(self, class_count: int, channels: int = 96, depth: int = 2):
        super().__init__()
        self.backbone = backbones.lite0((2, 3, 4))
        self.pyramid = FeaturePyramidNetwork(self.backbone.feature_info.channels(), channels, norm_layer=nn.BatchNorm2d)
        self.cls_tower = nn.ModuleList(_SharedConv(channels) for _ in range(depth))
        self.box_tower = nn.ModuleList(_SharedConv(channels) for _ in range(depth))
        self.cls_logits = nn.Conv2d(channels, class_count, 3, padding=1)
        self.bbox_regression = nn.Conv2d(channels, 4, 3, padding=1)
        self.bbox_ctrness = nn.Conv2d(channels, 1, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(len(STRIDES)))
        for conv in (self.cls_logits, self.bbox_regression, self.bbox_ctrness):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)
        nn.init.constant_(self.cls_logits.bias, -math.log((1 - PRIOR) / PRIOR))
        # Starts at 2 strides to each side: boxes of 32, 64 and 128 px, one octave per level.
        nn.init.constant_(self.bbox_regression.bias, math.log(2))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pixels = (images.permute(0, 3, 1, 2).float() - LITE0_MEAN) * (1 / LITE0_STD)
        levels = list(self.pyramid({str(i): f for i, f in enumerate(self.backbone(pixels))}).values())
        cls, box, ctr = [], [], []
        for level, features in enumerate(levels):
            of_class, of_box = features, features
            for conv in self.cls_tower:
                of_class = conv(of_class, level)
            for conv in self.box_tower:
                of_box = conv(of_box, level)
            cls.append(_flat(self.cls_logits(of_class)))
            logs = _flat(self.bbox_regression(of_box)) * self.scales[level]
            box.append(logs.clamp(max=MAX_LOG_DISTANCE).exp())
            ctr.append(_flat(self.bbox_ctrness(of_box)))
        return torch.cat(cls, 1), torch.cat(box, 1), torch.cat(ctr, 1)

    def freeze(self, stages: int) -> None:
        """Stops the stem and the first `stages` of the backbone's 7 stages from learning; 0 freezes nothing."""
        backbones.freeze(backbones.lite0_stages(self.backbone), stages)

    @staticmethod
    def class_rows(labels: Sequence[str]) -> Mapping[str, Mapping[str, Sequence[int]]]:
        """Which rows of which tensors are a label's (training.weights.ClassRows)."""
        rows = {label: [at] for at, label in enumerate(labels)}
        return {"cls_logits.weight": rows, "cls_logits.bias": rows}


class _SharedConv(nn.Module):
    """One 3x3 convolution used by all levels, a batch norm of each level's own (as NanoDet and RTMDet do): the levels'
    statistics differ, and at export each norm folds into its convolution, which group norm cannot."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in STRIDES)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")

    def fold(self) -> nn.Module:
        """The same layer for inference: one convolution per level, its batch norm inside."""
        return _FoldedConv([fuse_conv_bn_eval(self.conv, norm) for norm in self.norms])

    def forward(self, features: torch.Tensor, level: int) -> torch.Tensor:
        return nn.functional.relu(self.norms[level](self.conv(features)), inplace=True)


class _FoldedConv(nn.Module):
    def __init__(self, convs: list[nn.Conv2d]):
        super().__init__()
        self.convs = nn.ModuleList(convs)

    def forward(self, features: torch.Tensor, level: int) -> torch.Tensor:
        return nn.functional.relu(self.convs[level](features))


def _flat(maps: torch.Tensor) -> torch.Tensor:
    """(N, K, H, W) to (N, H * W, K), row-major."""
    return maps.permute(0, 2, 3, 1).flatten(1, 2)


def points(size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The centres (A, 2) in canvas pixels and strides (A,) of a (width, height) input, in the order of the outputs."""
    centres, strides = [], []
    for stride in STRIDES:
        ys, xs = torch.meshgrid(
            (torch.arange(size[1] // stride) + 0.5) * stride, (torch.arange(size[0] // stride) + 0.5) * stride, indexing="ij"
        )
        centres.append(torch.stack([xs.flatten(), ys.flatten()], 1))
        strides.append(torch.full((xs.numel(),), float(stride)))
    return torch.cat(centres), torch.cat(strides)


def boxes_of(distances: torch.Tensor, centres: torch.Tensor, strides: torch.Tensor) -> torch.Tensor:
    """(..., A, 4) distances in strides to (..., A, 4) xyxy in canvas pixels."""
    pixels = distances * strides[:, None]
    return torch.cat([centres - pixels[..., :2], centres + pixels[..., 2:]], -1)


def export_onnx(model: Detector, size: tuple[int, int], file: Path) -> None:
    """Writes the network as ONNX opset 18: `images` (N, H, W, 3) uint8 in, the three raw heads out, N free.

    No batch norm is left: the head's are folded here because the exporter's optimiser does not touch a convolution that
    several norms share; it folds the backbone's and the pyramid's. INT8 quantisation needs it so.
    """
    model = copy.deepcopy(model).cpu().eval()
    for tower in (model.cls_tower, model.box_tower):
        for i, conv in enumerate(tower):
            tower[i] = conv.fold()
    export.export_onnx(model, size, file, ["cls_logits", "bbox_regression", "bbox_ctrness"])

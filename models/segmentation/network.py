"""EfficientNet-Lite0 + feature pyramid + one map of class scores.

The pyramid's levels are brought to stride 4 and added (Kirillov et al., Panoptic Feature Pyramid Networks, 2019,
section 3), with one convolution after the sum instead of several a level.
"""
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import interpolate
from torchvision.ops import FeaturePyramidNetwork

from training.backbones import freeze, lite0, lite0_stages
from training.weights import LITE0_MEAN, LITE0_STD, ClassRows

# Canvas pixels of a cell of the output.
STRIDE = 2


class Segmenter(nn.Module):
    """forward(images (N, H, W, 3) uint8 RGB, H and W multiples of 32) returns logits (N, 1 + C, H / 2, W / 2), the
    background first."""

    def __init__(self, class_count: int, channels: int = 64):
        super().__init__()
        self.backbone = lite0((1, 2, 3, 4))
        self.pyramid = FeaturePyramidNetwork(self.backbone.feature_info.channels(), channels, norm_layer=nn.BatchNorm2d)
        self.joint = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels),
                                   nn.ReLU(inplace=True))
        self.logits = nn.Conv2d(channels, 1 + class_count, 1)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                # timm's 0.01 forgets the first statistics after hundreds of steps; there may be a hundred in all.
                module.momentum = 0.1

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = (images.permute(0, 3, 1, 2).float() - LITE0_MEAN) * (1 / LITE0_STD)
        levels = list(self.pyramid({str(i): f for i, f in enumerate(self.backbone(pixels))}).values())
        added = levels[0]
        for number, level in enumerate(levels[1:], 1):
            added = added + interpolate(level, scale_factor=2.0 ** number, mode="bilinear", align_corners=False)
        return interpolate(self.logits(self.joint(added)), scale_factor=2.0, mode="bilinear", align_corners=False)

    def freeze(self, stages: int) -> None:
        """Stops the first `stages` of the backbone's 7 stages from learning; 0 freezes nothing."""
        freeze(lite0_stages(self.backbone), stages)

    def class_rows(self, labels: Sequence[str]) -> ClassRows:
        """Where each label stands in the tensors whose rows are labels; the background comes first."""
        rows = {label: [at] for at, label in enumerate(["", *labels])}
        return {"logits.weight": rows, "logits.bias": rows}

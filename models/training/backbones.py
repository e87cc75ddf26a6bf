"""Backbones that recipes share, and how the beginning of one is kept from learning."""
from collections.abc import Sequence

from torch import nn


def lite0(indices: tuple[int, ...]) -> nn.Module:
    """timm's tf_efficientnet_lite0 as features: ReLU6, no squeeze-and-excitation, made for INT8.

    indices  which of its levels with strides 2, 4, 8, 16, 32 it gives; they have 16, 24, 40, 112 and 320 channels
    """
    import timm  # here: what only decodes or reads data does not need it

    return timm.create_model("tf_efficientnet_lite0", pretrained=False, features_only=True, out_indices=indices)


def lite0_stages(backbone: nn.Module) -> list[list[nn.Module]]:
    """The stem with the first stage, then the other six."""
    first, *rest = backbone.blocks
    return [[backbone.conv_stem, backbone.bn1, first], *([stage] for stage in rest)]


def freeze(stages: Sequence[Sequence[nn.Module]], count: int) -> None:
    """Stops the first `count` stages from learning, their batch norms' statistics included; 0 freezes nothing.

    Called again after every `train()`, which wakes the norms.
    """
    for stage in stages[: max(0, count)]:
        for module in stage:
            module.requires_grad_(False)
            module.eval()

"""Networks that tag whole frames, EfficientNet-Lite0 and MobileNetV3, and the weights they start from."""
from collections.abc import Sequence

import torch
from torch import nn

from training.backbones import freeze, lite0_stages
from training.weights import LITE0_MEAN, LITE0_STD, ClassRows, from_hub

# Per architecture: mean and std of a pixel of 0..255. MobileNetV3's: torchvision's ImageNet presets
# (transforms/_presets.py).
_TORCHVISION = ((0.485 * 255, 0.456 * 255, 0.406 * 255), (0.229 * 255, 0.224 * 255, 0.225 * 255))
NORMALISATION = {
    "efficientnet_lite0": ((LITE0_MEAN,) * 3, (LITE0_STD,) * 3),
    "mobilenet_v3_small": _TORCHVISION,
    "mobilenet_v3_large": _TORCHVISION,
}
ARCHITECTURES = tuple(NORMALISATION)
# Architectures whose ImageNet weights are in torchvision's hub, and the licence there.
HUB = {"mobilenet_v3_small": "MobileNet_V3_Small_Weights", "mobilenet_v3_large": "MobileNet_V3_Large_Weights"}
LICENCES = {"efficientnet_lite0": "Apache-2.0", "mobilenet_v3_small": "BSD-3-Clause",
            "mobilenet_v3_large": "BSD-3-Clause"}


class Classifier(nn.Module):
    """A backbone that gives one vector a frame, and one linear layer.

    is_frozen  whether the whole backbone is kept from learning

    forward(images (N, H, W, 3) uint8 RGB) returns logits (N, C), as it does of `features(images)` (N, F).
    """

    def __init__(self, architecture: str, class_count: int, dropout: float = 0.2, is_frozen: bool = False):
        super().__init__()
        self.backbone = _Lite0() if architecture == "efficientnet_lite0" else _MobileNetV3(architecture)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(self.backbone.width, class_count)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)
        self._is_frozen = is_frozen
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                # Both libraries' 0.01 forgets the first statistics after hundreds of steps; there may be a hundred.
                module.momentum = 0.1
        mean, std = NORMALISATION[architecture]
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(N, F): what the backbone sees in (N, H, W, 3) uint8 RGB images."""
        return self.backbone((images.permute(0, 3, 1, 2).float() - self.mean) / self.std)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        features = inputs if inputs.ndim == 2 else self.features(inputs)
        return self.linear(self.dropout(features))

    def freeze(self, stages: int) -> None:
        """Stops the first `stages` of the backbone from learning, or all of it; 0 freezes nothing."""
        if self._is_frozen:
            freeze([[self.backbone]], 1)
        else:
            freeze(self.backbone.stages(), stages)

    def class_rows(self, labels: Sequence[str]) -> ClassRows:
        """Where each label stands in the tensors whose rows are labels."""
        rows = {label: [at] for at, label in enumerate(labels)}
        return {"linear.weight": rows, "linear.bias": rows}


def load_hub(model: Classifier, architecture: str) -> str:
    """Copies torchvision's ImageNet weights into a MobileNetV3 and says which. Raises TrainingError without them."""
    import torchvision

    weights = getattr(torchvision.models, HUB[architecture]).DEFAULT
    names = {"features.": "net.", "classifier.0.": "hidden.0."}
    given = {ours + name.removeprefix(theirs): tensor for name, tensor in from_hub(weights).items()
             for theirs, ours in names.items() if name.startswith(theirs)}
    model.backbone.load_state_dict(given)
    return f"ImageNet ({weights} of torchvision's hub)"


class _Lite0(nn.Module):
    width = 1280  # of its last convolution

    def __init__(self):
        super().__init__()
        import timm  # here: the data side does not need it

        self.net = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.net(pixels)

    def stages(self) -> list[list[nn.Module]]:
        return lite0_stages(self.net)


class _MobileNetV3(nn.Module):
    """torchvision's, with the hidden layer of its classifier: the features before the last layer."""

    def __init__(self, architecture: str):
        super().__init__()
        import torchvision

        whole = getattr(torchvision.models, architecture)(weights=None)
        self.net, self.pool, self.hidden = whole.features, whole.avgpool, whole.classifier[:2]
        self.width = whole.classifier[0].out_features

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.hidden(self.pool(self.net(pixels)).flatten(1))

    def stages(self) -> list[list[nn.Module]]:
        return [[self.net[0], self.net[1]], *([stage] for stage in self.net[2:])]

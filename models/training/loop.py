"""The loop every recipe trains in: epochs, validation, checkpoint and resume, early stopping, tracking, time limit."""
import argparse
import hashlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from training import distributed
from training.errors import TrainingError
from training.output import STARTED, save, say, write_json, write_text
from training.state import State, schedule, update_average
from training.tracking import Tracker

# What may differ between the process that wrote a checkpoint and the one that goes on from it.
BAD_GRADIENTS = 10  # steps in a row without a usable gradient, after which it is the training and not the arithmetic
_FREE = {"data", "output", "base_weights", "teacher", "teacher_card", "threads", "processes", "name"}


@dataclass(frozen=True)
class Course:
    """What the loop has to know of a training.

    recipe      the recipe's name; noted in weights.pt, so that another recipe can refuse them
    labels      in class-id order
    size        (width, height) of the network's input in pixels
    counts      numbers of training, validation and test frames
    dataset     dataset.json
    start_from  where the weights came from, in words
    primary     the figure of `validate` that says which epoch is best; higher is better
    files       further files that the training depends on: with another content a checkpoint is not continued
    facts       further parameters to note in the run
    """

    recipe: str
    labels: list[str]
    size: tuple[int, int]
    counts: tuple[int, int, int]
    dataset: dict[str, Any]
    start_from: str
    primary: str = "map_50_95"
    files: tuple[Path, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """indices (n,) of training frames; seed: integers that make this batch's randomness its own; is_gentle: whether the
    last share of the training has begun, whose augmentation is weak."""

    indices: np.ndarray
    seed: tuple[int, ...]
    is_gentle: bool


def run(
    options: argparse.Namespace, model: nn.Module, course: Course,
    losses: Callable[[nn.Module, Batch], dict[str, torch.Tensor]],
    validate: Callable[[nn.Module], dict[str, float]],
    finish: Callable[[nn.Module, State], dict[str, Any]],
) -> dict[str, Any]:
    """The whole training; returns what it wrote to metrics.json ({} in all processes but the first).

    model     the network with its first weights; see State for what it must have
    losses    loss parts of one batch of the network, by name; their sum is trained on
    validate  figures of a network (in eval mode) on the validation frames; not called where there are none
    finish    exports, measures, draws, writes card.json; gives metrics.json's content but for State.summary's

    Leaves checkpoint.pt, weights.pt, history.jsonl, metrics.json in the output folder and logs to MLflow.
    """
    output = options.output
    output.mkdir(parents=True, exist_ok=True)
    model.to(distributed.device(), memory_format=torch.channels_last)  # 1.4x faster convolutions on a CPU
    state = State(model, options, course.primary)
    about = {"format": 1, "recipe": course.recipe, "labels": course.labels, "size": list(course.size)}
    mark = fingerprint(options, course)
    said = state.resume(output / "checkpoint.pt", mark)
    wrapped = distributed.wrapped(model)
    if not distributed.is_first():
        _epochs(state, options, course, wrapped, losses, validate, lambda row: None)
        return {}
    say(said)
    with Tracker(state.run_id) as tracker:
        state.run_id = tracker.run_id
        tracker.parameters({**parameters(options), "input": f"{course.size[0]}x{course.size[1]}",
                            "start_from": course.start_from, "dataset_ref": course.dataset.get("ref"),
                            "dataset_digest": course.dataset.get("digest"), **course.facts})
        for row in state.history:
            tracker.epoch(row)

        def keep(row: dict[str, Any]) -> None:
            save(state.as_dict(mark, about), output / "checkpoint.pt")
            write_text(output / "history.jsonl", "".join(json.dumps(one) + "\n" for one in state.history))
            tracker.epoch(row)
            say(_line(row))

        _epochs(state, options, course, wrapped, losses, validate, keep)
        model = state.chosen(options.patience)
        save({**about, "model": model.state_dict()}, output / "weights.pt")
        metrics = {"dataset": course.dataset, "parameters": parameters(options), "start_from": course.start_from,
                   **finish(model, state), **state.summary()}
        metrics["total_s"] = time.monotonic() - STARTED
        write_json(output / "metrics.json", metrics)
        tracker.results(output, metrics)
        say(f"done: {json.dumps({k: v for k, v in metrics.items() if isinstance(v, (int, float))})}")
        return metrics


def _epochs(state: State, options: argparse.Namespace, course: Course, model: nn.Module, losses, validate, keep) -> None:
    """Trains until the schedule or the patience ends, in every process alike; `keep` gets each history row."""
    while state.epoch < state.epochs and not state.is_exhausted(options.patience):
        state.plan(options, *course.counts)
        _agree(state)
        row = _one_epoch(state, options, course, model, losses)
        is_last = state.epoch + 1 == state.epochs
        if distributed.is_first() and course.counts[1] and ((state.epoch + 1) % state.eval_every == 0 or is_last):
            began = time.monotonic()
            row.update(validate(state.average))
            row["eval_s"] = time.monotonic() - began
        row = distributed.share(row)
        state.finish_epoch(row, options.patience)
        keep(row)


def _one_epoch(state: State, options: argparse.Namespace, course: Course, model: nn.Module, losses) -> dict[str, Any]:
    """Trains one epoch and returns its history row: losses, learning rate, seconds (wall and CPU), memory."""
    began, began_cpu = time.monotonic(), time.process_time()
    rank, world = distributed.place()
    device, dtype = distributed.device(), distributed.precision(options.amp)
    is_gentle = state.progress >= 1 - options.plain_tail
    first = state.progress
    state.model.train()
    state.model.freeze(options.freeze)  # train() woke the frozen batch norms
    # Seeded per epoch, not carried over, so that a resumed training sees the frames in the same order.
    torch.manual_seed(int(np.random.SeedSequence((options.seed, state.epoch, rank)).generate_state(1)[0]))
    rng = np.random.default_rng((options.seed, state.epoch))
    passes = math.ceil(state.steps_per_epoch * options.batch_size / course.counts[0])
    order = np.concatenate([rng.permutation(course.counts[0]) for _ in range(passes)])
    sums: dict[str, float] = {}
    count, bad, timed = 0, 0, None
    while count < state.steps_per_epoch:
        indices = order[count * options.batch_size : (count + 1) * options.batch_size][rank::world]
        state.progress = first + (1 - first) / (state.epochs - state.epoch) * count / state.steps_per_epoch
        factor = schedule(state.progress)
        for group in state.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        seed = (options.seed, state.epoch, count) + ((rank,) if world > 1 else ())
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            parts = losses(model, Batch(indices, seed, is_gentle))
        loss = sum(parts.values())
        if not math.isfinite(loss.item()):
            raise TrainingError(
                f"The loss is not finite in epoch {state.epoch + 1}, step {count + 1} "
                f"({ {k: v.item() for k, v in parts.items()} }). Lower lr (now {options.lr}) and lr_backbone (now "
                f"{options.lr_backbone}), or look for damaged frames.")
        state.optimizer.zero_grad(set_to_none=True)
        state.scaler.scale(loss).backward()
        state.scaler.unscale_(state.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        # The scaler of float16 leaves such a step out by itself. In bfloat16 on a CPU single gradients come out as NaN, at
        # other steps in each run (oneDNN; seen with SSDLite): one would spoil all weights.
        if torch.isfinite(norm) or state.scaler.is_enabled():
            state.scaler.step(state.optimizer)
            bad = 0
        elif (bad := bad + 1) > BAD_GRADIENTS:
            raise TrainingError(f"{bad} steps in a row gave gradients that are no numbers (epoch {state.epoch + 1}, step "
                                f"{count + 1}). Lower lr (now {options.lr}) and lr_backbone (now {options.lr_backbone}).")
        state.scaler.update()
        state.step += 1
        count += 1
        update_average(state.average, state.model, state.step)
        for name, part in {**parts, "train": loss}.items():
            sums[name] = sums.get(name, 0.0) + part.item()
        if options.time_limit_s and state.epoch == 0:
            if count == 1:
                timed = time.monotonic()  # the first step warms up caches and decodes most
            elif count == 4:
                said = state.plan_from_steps(options, (time.monotonic() - timed) / 3, *course.counts[1:])
                _agree(state)
                if distributed.is_first():
                    say(said)
    state.progress = first + (1 - first) / (state.epochs - state.epoch)
    seconds, cpu_s = time.monotonic() - began, time.process_time() - began_cpu
    return {"epoch": state.epoch + 1, "epochs": state.epochs,
            **{f"{name}_loss": total / count for name, total in sums.items()}, "lr": options.lr * factor,
            "seconds": seconds, "cpu_s": cpu_s, **_hardware(seconds, cpu_s, device)}


def _agree(state: State) -> None:
    """The first process' plan, which its clock made, in all of them."""
    state.epochs, state.steps_per_epoch, state.eval_every = distributed.share(
        (state.epochs, state.steps_per_epoch, state.eval_every))


def _hardware(seconds: float, cpu_s: float, device: torch.device) -> dict[str, float]:
    """cpu_percent (100 a core), peak memory_mb of this process, and gpu_memory_mb of the epoch where there is a GPU."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS (getrusage(2))
    found = {"cpu_percent": 100 * cpu_s / max(seconds, 1e-9),
             "memory_mb": peak / (2**20 if sys.platform == "darwin" else 2**10)}
    if device.type == "cuda":
        found["gpu_memory_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
        torch.cuda.reset_peak_memory_stats(device)
    return found


def parameters(options: argparse.Namespace) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}


def fingerprint(options: argparse.Namespace, course: Course) -> str:
    """One digest of all that a checkpoint must agree with: parameters, labels, input size and files."""
    facts = {name: value for name, value in parameters(options).items() if name not in _FREE}
    facts.update(recipe=course.recipe, labels=course.labels, size=course.size)
    for file in (options.data / "train.json", options.data / "val.json", Path(options.base_weights), *course.files):
        facts[f"file {file.name}"] = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _line(row: dict[str, Any]) -> str:
    known = {"epoch", "epochs", "lr", "seconds", "cpu_s", "eval_s", "train_loss"}
    parts = [f"{name.removesuffix('_loss')} {value:.3f}" for name, value in row.items() if name.endswith("_loss")
             and name not in known]
    figures = "".join(f" {name} {value:.3f}" for name, value in row.items() if name not in known
                      and not name.endswith(("_loss", "_mb", "_percent")) and isinstance(value, float))
    return (f"epoch {row['epoch']}/{row['epochs']} loss {row['train_loss']:.3f} ({' '.join(parts)}){figures} "
            f"{row['seconds']:.1f} s, {row['cpu_s']:.1f} CPU-s")

"""What a training changes while it runs, its schedule and time budget, and how it is continued after a kill."""
import argparse
import copy
import math
import time
from pathlib import Path

import torch
from torch import nn

from training import distributed
from training.output import STARTED

# An epoch of fewer steps would be spent on checkpoints and validation: a tiny data set is passed several times in one.
LEAST_STEPS = 8
# The fewest steps whatever the time limit: on handwritten digits 25 steps reach mAP@.5 0.13, 50 0.36 and 75 0.57.
USEFUL_STEPS = 60
# What a time limit keeps for the end, in seconds: export, plots, check against ONNX Runtime. Measured 13 s with the
# validation of 87 frames, which is counted apart.
EXPORT_S = 12.0
CHECKPOINT_S = 0.3


class State:
    """Everything that a training changes: weights, their average, optimiser, position in the schedule, history.

    model    has `freeze(stages)`; parameters whose names begin with its `backbone_prefix` ("backbone." where it has none)
             learn at lr_backbone
    primary  the figure in a history row that says which epoch is best; higher is better
    """

    def __init__(self, model: nn.Module, options: argparse.Namespace, primary: str, started: float = STARTED):
        self._started = started  # time.monotonic() of this process
        self.primary = primary
        model.freeze(options.freeze)
        self.model = model
        self.average = copy.deepcopy(model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(_groups(model, options.lr, options.lr_backbone))
        self.epoch, self.step, self.epochs = 0, 0, options.epochs
        self.progress = 0.0  # 0..1: where the learning-rate schedule stands
        self.steps_per_epoch, self.eval_every = 0, 1
        self.spent_s = 0.0  # by earlier processes that worked on this training
        self.history: list[dict] = []
        self.best, self.best_value, self.best_epoch = None, -math.inf, 0
        self.run_id = None
        # Only float16 needs its loss scaled; it does nothing otherwise.
        is_half = distributed.precision(options.amp) is torch.float16
        self.scaler = torch.amp.GradScaler(distributed.device().type, enabled=is_half)

    def plan(self, options: argparse.Namespace, frame_count: int, val_count: int, test_count: int) -> None:
        """Before an epoch: how many there will be; under a time limit as many as fit what past epochs took."""
        if not self.steps_per_epoch:
            self.steps_per_epoch = max(LEAST_STEPS, frame_count // options.batch_size)
        if not options.time_limit_s or not self.history:
            return
        recent = self.history[-3:]
        step_s = sum(row["seconds"] for row in recent) / (len(recent) * self.steps_per_epoch)
        evaluations = [row["eval_s"] for row in self.history if "eval_s" in row]
        self._fit(options, step_s, evaluations[-1] if evaluations else 0.0, test_count / max(1, val_count))

    def plan_from_steps(self, options: argparse.Namespace, step_s: float, val_count: int, test_count: int) -> str:
        """Inside the first epoch, from its first steps: the same, and shorter epochs when not even five would fit."""
        # A forward pass is about a third of a step; measured 0.30 s of 0.96 s.
        eval_s = val_count * step_s / options.batch_size / 3
        affordable = max(USEFUL_STEPS, int((options.time_limit_s - self.elapsed_s() - EXPORT_S) / step_s))
        self.steps_per_epoch = min(self.steps_per_epoch, affordable // 5)
        self._fit(options, step_s, eval_s, test_count / max(1, val_count))
        return f"{step_s:.2f} s a step: {self.epochs} epochs of {self.steps_per_epoch} steps fit {options.time_limit_s:g} s"

    def _fit(self, options: argparse.Namespace, step_s: float, eval_s: float, test_share: float) -> None:
        epoch_s = step_s * self.steps_per_epoch
        # Validation may take a quarter of the time at most; where it is slower, only every n-th epoch has one.
        self.eval_every = max(1, math.ceil(eval_s / (0.25 * epoch_s)))
        left_s = options.time_limit_s - self.elapsed_s() - EXPORT_S - eval_s * (1 + test_share)
        fitting = int(left_s / (epoch_s + eval_s / self.eval_every + CHECKPOINT_S))
        missing = math.ceil((USEFUL_STEPS - self.epoch * self.steps_per_epoch) / self.steps_per_epoch)
        self.epochs = self.epoch + max(1, min(options.epochs - self.epoch, max(fitting, missing)))

    def elapsed_s(self) -> float:
        return self.spent_s + time.monotonic() - self._started

    def is_exhausted(self, patience: int) -> bool:
        return bool(patience) and self.best is not None and self.epoch - self.best_epoch >= patience

    def chosen(self, patience: int) -> nn.Module:
        """The weights to publish: the average at the end, or the best epoch's when there was early stopping."""
        if patience and self.best is not None:
            self.average.load_state_dict(self.best)
        return self.average

    def finish_epoch(self, row: dict, patience: int) -> None:
        self.epoch += 1
        self.history.append(row)
        if patience and row.get(self.primary, -math.inf) > self.best_value:
            self.best = {name: tensor.clone() for name, tensor in self.average.state_dict().items()}
            self.best_value, self.best_epoch = row[self.primary], self.epoch

    def summary(self) -> dict:
        """What metrics.json says of the course: epochs, best_epoch, train_s, train_cpu_s, seconds_per_epoch."""
        rows = self.history
        return {"epochs": self.epoch, "best_epoch": self.best_epoch or self.epoch,
                "train_s": sum(row["seconds"] + row.get("eval_s", 0) for row in rows),
                "train_cpu_s": sum(row["cpu_s"] for row in rows),
                "seconds_per_epoch": sum(row["seconds"] for row in rows) / max(1, len(rows))}

    def as_dict(self, fingerprint: str, about: dict) -> dict:
        """What a checkpoint holds. about: recipe, labels and size, as in weights.pt"""
        return {
            **about, "fingerprint": fingerprint,
            "model": self.model.state_dict(), "ema": self.average.state_dict(), "optimizer": self.optimizer.state_dict(),
            "scheduler": {"progress": self.progress, "epochs": self.epochs, "steps_per_epoch": self.steps_per_epoch,
                          "eval_every": self.eval_every},
            "epoch": self.epoch, "step": self.step, "history": self.history, "spent_s": self.elapsed_s(),
            "scaler": self.scaler.state_dict(), "best": self.best, "best_value": self.best_value,
            "best_epoch": self.best_epoch, "run_id": self.run_id,
        }

    def resume(self, file: Path, fingerprint: str) -> str:
        """Continues from a checkpoint of the same training; anything else is left alone. Returns what to tell the user."""
        if not file.is_file():
            return "no checkpoint: starts anew"
        try:
            saved = torch.load(file, map_location="cpu", weights_only=True)
            is_same = saved["fingerprint"] == fingerprint
        except Exception as error:  # whatever a damaged file raises, the cure is the same
            return f"{file.name} cannot be read ({type(error).__name__}): starts anew"
        if not is_same:
            return f"{file.name} belongs to a training with other parameters or data: starts anew and replaces it"
        self.model.load_state_dict(saved["model"])
        self.average.load_state_dict(saved["ema"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        schedule = saved["scheduler"]
        for name in ("progress", "epochs", "steps_per_epoch", "eval_every"):
            setattr(self, name, schedule[name])
        for name in ("epoch", "step", "history", "spent_s", "best", "best_value", "best_epoch", "run_id"):
            setattr(self, name, saved[name])
        return f"continues after epoch {self.epoch} of {self.epochs}"


def schedule(progress: float) -> float:
    """The learning rate's share of its peak: 5 % linear warm-up, then cosine down to 1 %."""
    if progress < 0.05:
        return 0.05 + 0.95 * progress / 0.05
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - 0.05) / 0.95))


def update_average(average: nn.Module, model: nn.Module, step: int) -> None:
    """Exponential moving average of weights and batch-norm statistics, over about a ninth of the steps so far at first
    (TensorFlow's ExponentialMovingAverage with num_updates), so that short trainings have one too."""
    keep = min(0.998, (1 + step) / (10 + step))
    with torch.no_grad():
        own = model.state_dict()
        for name, tensor in average.state_dict().items():
            if tensor.is_floating_point():
                tensor.lerp_(own[name], 1 - keep)
            else:
                tensor.copy_(own[name])


def _groups(model: nn.Module, lr: float, lr_backbone: float) -> list[dict]:
    """AdamW groups: backbone and rest, weights with and one-dimensional tensors (norms, biases) without weight decay."""
    groups, prefix = [], getattr(model, "backbone_prefix", "backbone.")
    for is_backbone, peak in ((True, lr_backbone), (False, lr)):
        for decay in (0.05, 0.0):
            chosen = [p for n, p in model.named_parameters()
                      if p.requires_grad and n.startswith(prefix) == is_backbone and (p.ndim > 1) == (decay > 0)]
            if chosen:
                groups.append({"params": chosen, "weight_decay": decay, "lr": peak, "peak_lr": peak})
    return groups

"""Trials: the trainings of a sweep, one folder each, as they are recorded and as they are watched."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from workbench.errors import Cancelled, Invalid
from workbench.steps.training import Training

STATES = ("running", "complete", "pruned", "failed", "stopped")
RECORD = "trial.json"
# What stays of a trial that is over: its curve and its figures. Weights are what fills a disk.
KEPT = ("history.jsonl", "metrics.json")


@dataclass(frozen=True)
class Trial:
    """One training of a sweep.

    params     what the search chose for it
    state      running, complete, pruned, failed, or stopped (the sweep ended before it did)
    value      of the sweep's metric, once complete
    is_settled whether nothing is left to do for it: its run in the tracker is closed, what it left is tidied up
    memory     bytes its processes held at most
    """

    number: int
    params: dict[str, Any]
    state: str = "running"
    value: float | None = None
    reason: str = ""
    run_id: str = ""
    gpu: str = ""
    threads: int = 1
    started_at: float = 0.0
    seconds: float = 0.0
    memory: int = 0
    is_settled: bool = False

    @property
    def name(self) -> str:
        return f"trial {self.number}"

    def ended(self, state: str, reason: str = "", value: float | None = None) -> Trial:
        return replace(self, state=state, reason=reason, value=value,
                       seconds=round(max(0.0, time.time() - self.started_at), 2))


class Ends(Cancelled):
    """Ends a trial's training, with what the trial is from then on."""

    def __init__(self, trial: Trial) -> None:
        super().__init__(trial.reason)
        self.trial = trial


class Left(BaseException):
    """The worker ends and leaves trainings running for the next one; no Exception, so that nobody takes it for a
    failure."""


def folder_of(sweep: Path, number: int) -> Path:
    return sweep / "trials" / f"{number:04d}"


def read_trials(sweep: Path) -> list[Trial]:
    """All trials begun so far, by number."""
    return [Trial(**json.loads(file.read_text())) for file in sorted((sweep / "trials").glob(f"*/{RECORD}"))]


def write_trial(sweep: Path, trial: Trial) -> None:
    training = Training(folder_of(sweep, trial.number))
    training.folder.mkdir(parents=True, exist_ok=True)
    training.write(RECORD, asdict(trial))


def curve(training: Training, metric: str) -> list[tuple[int, float]]:
    """(epoch, value) of one metric from output/history.jsonl; an epoch written twice by a repeated training counts
    once, as it was last. Not-a-number values are kept."""
    found = {int(row["epoch"]): float(row[metric]) for row in training.history()
             if isinstance(row.get(metric), (int, float)) and not isinstance(row[metric], bool)}
    return sorted(found.items())


def value_of(training: Training, metrics: dict[str, Any], metric: str) -> float:
    """The figure a trial is judged by: the metric in metrics.json, else in the last epoch. Raises Invalid."""
    value = metrics.get(metric)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    points = curve(training, metric)
    if not points:
        told = {key for row in training.history()[-1:] for key in row} | set(metrics)
        raise Invalid(f"Neither metrics.json nor history.jsonl has a number {metric}, by which the trials are compared; "
                      f"they have {', '.join(sorted(map(str, told)))[:300]}. Ask for one of these.")
    return points[-1][1]


def trim(training: Training) -> None:
    """Removes all that a trial left behind except its curve, its figures, its record and its log."""
    if training.output.is_symlink():
        training.output.unlink()
    for file in training.output.glob("*"):
        if file.name in KEPT:
            continue
        shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()
    for folder in ("model", "fetched"):
        shutil.rmtree(training.folder / folder, ignore_errors=True)
    (training.folder / "data").unlink(missing_ok=True)  # a link to the sweep's


def tidy(whole: Training) -> None:
    """Removes what a sweep that is over needs no more: data, and weights of all trials. May be repeated."""
    for trial in read_trials(whole.folder):
        trim(Training(folder_of(whole.folder, trial.number)))
    whole.clear(("data", "data.half", "data.md5.json"))


class Watch:
    """The Job that a trial's training is followed with: every look may end it.

    ending   asked first; raises Ends or Left when the whole sweep is to end
    judge    (epoch, value) of the trial's metric -> whether to prune it
    """

    def __init__(self, trial: Trial, training: Training, metric: str, ending: Callable[[Trial], None],
                 judge: Callable[[int, float], bool]) -> None:
        self.id = trial.name
        self._trial, self._training, self._metric = trial, training, metric
        self._ending, self._judge = ending, judge
        self._judged = 0

    def check(self) -> None:
        self._ending(self._trial)
        behind = self.catch_up()
        # A training at its last epoch is as good as done.
        if behind and self._training.history()[-1].get("epochs") != self._judged:
            epoch, value = behind[0]
            raise Ends(self._trial.ended("pruned", f"{self._metric} {value:.4g} in epoch {epoch} falls behind the other "
                                                   "trials."))

    def catch_up(self) -> list[tuple[int, float]]:
        """Tells the search every epoch since the last look, which may be several, also those of a training that ended
        before anybody looked; returns those that fall behind. Raises Ends for a value that is no number."""
        behind = []
        for epoch, value in curve(self._training, self._metric):
            if epoch <= self._judged:
                continue
            self._judged = epoch
            if not math.isfinite(value):
                raise Ends(self._trial.ended("failed", f"{self._metric} is {value} in epoch {epoch}: it did not learn."))
            if self._judge(epoch, value):
                behind.append((epoch, value))
        return behind

    def progress(self, done: int, total: int, note: str = "") -> None:
        return None

    def log(self, text: str) -> None:
        return None

    def fail_item(self, item: str, reason: str) -> None:
        return None

"""The boundaries of the workbench, one Protocol each; the docstrings are the specification that tests/contracts/ checks.

Backend        runs a model's graph              adapters: openvino, onnxruntime, tensorrt
AnnotationServer  keeps labels being worked on   adapters: fiftyone, cvat
ModelStore     keeps annotator models            adapters: local_models
DatasetStore   keeps published versions          adapters: git_datasets
Tracker        keeps runs and registered models  adapters: mlflow
Search         proposes the trials of a sweep    adapters: optuna
Job            what a step tells its surroundings: progress, failed items, "has anybody cancelled?"
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from workbench.dataset import DatasetVersion, LabeledFrame, Manifest
from workbench.model import ModelCard
from workbench.run import WorkingFrame
from workbench.taxonomy import Taxonomy


@dataclass(frozen=True)
class BackendReport:
    """What really runs: no silent fallback."""

    backend: str
    device: str
    precision: str
    library: str


@runtime_checkable
class Backend(Protocol):
    """An opened model graph; a context manager that frees it.

    `report` tells library, device and precision in use, "int8" only when int8 kernels really run. `run` takes one batch
    shaped as the graph's input and returns every output by name, as new float32 arrays; a batch of another shape or
    dtype is Invalid; batches of 1 and of n give the same numbers. `run` may be called from several threads; `streams`
    is how many calls it serves at once, further ones wait. Opening a file that is no ONNX graph is Invalid and names the
    file; a missing library is Unavailable and names the package to install.
    """

    report: BackendReport
    input_name: str
    input_shape: tuple[int | None, ...]
    batch_is_dynamic: bool
    streams: int

    def __enter__(self) -> Backend: ...
    def __exit__(self, *exc_info: object) -> None: ...
    def run(self, batch: np.ndarray) -> dict[str, np.ndarray]: ...


@dataclass(frozen=True)
class TaskSummary:
    """A working copy: its data set, taxonomy, and number of frames per status of workbench.run.STATUSES."""

    dataset: str
    labels: tuple[str, ...]
    frames: int
    by_status: dict[str, int]
    url: str = ""


class AnnotationServer(Protocol):
    """Keeps one working copy (a task) per data set, in which people and machine runs annotate.

    ids, sources, confidences and attributes survive every round trip; geometry survives within 0.05 px.
    All methods on a task that does not exist raise NotFound; a server that does not answer is Unavailable.

    write_batch  frames a long run should write at once: what a write costs, whatever is in it, is shared by so many
    """

    write_batch: int

    def open_task(self, dataset: str, taxonomy: Taxonomy) -> None:
        """Creates the task, or widens the taxonomy of the one there is; calling it again changes nothing."""
        ...

    def tasks(self) -> list[TaskSummary]: ...

    def task(self, dataset: str) -> TaskSummary: ...

    def delete_task(self, dataset: str) -> None: ...

    def add_frames(self, dataset: str, frames: Iterable[tuple[LabeledFrame, Path]]) -> int:
        """Adds frames that are not there yet (by name) with the path of their pixels; returns how many were added.

        A frame with annotations arrives "accepted" (they are published, a machine may not change them); one with
        None arrives "new". A frame that is already there is left exactly as it is.
        """
        ...

    def frame_names(self, dataset: str, status: str | None = None, order: str = "name") -> list[str]:
        """Names, all or those of one status; sorted, or with order "confidence" by their least confident machine box
        as it was last written, lowest first and frames without a machine box last."""
        ...

    def read(self, dataset: str, names: Sequence[str]) -> dict[str, WorkingFrame]:
        """The frames as they stand now, with runs and revision; names that are not there are left out."""
        ...

    def write(self, dataset: str, frames: Sequence[WorkingFrame]) -> list[str]:
        """Stores annotations, runs, status, split, reviewed_by and reviewed_at; each frame whole, also after a kill: in
        one atomic update, or carried through by the next reader where the server has none (such a server says in its
        docstring what of a person's simultaneous edit it may overwrite).

        Returns the names whose stored revision differed from the one given: those were changed by somebody since they
        were read and are NOT written. The others are. Nothing else of the frame is touched.
        """
        ...

    def review_url(self, dataset: str, name: str) -> str:
        """Where a person edits that frame in a browser."""
        ...


class ModelStore(Protocol):
    """Keeps model versions: a card and its files; a version never changes.

    `register` checks every file's sha256 against the card, is a no-op for the same content and a Conflict for another
    content under the same reference; nothing half-written stays behind. `folder` gives a local directory with card and
    files, verified; an unknown reference is NotFound.
    """

    def refs(self) -> list[str]: ...
    def card(self, ref: str) -> ModelCard: ...
    def folder(self, ref: str) -> Path: ...
    def register(self, card: ModelCard, folder: Path) -> ModelCard: ...


class DatasetStore(Protocol):
    """Keeps published versions; a version never changes. Unknown data sets and versions are NotFound."""

    def names(self) -> list[str]: ...

    def versions(self, dataset: str) -> list[DatasetVersion]:
        """Newest first; an empty list for a data set without a version."""
        ...

    def version(self, ref: str) -> DatasetVersion: ...

    def manifest(self, ref: str) -> Manifest: ...

    def publish(self, dataset: str, manifest: Manifest, message: str, author: str, bump: str | None = None,
                after: str | None = None) -> DatasetVersion:
        """Makes the next version; creates the data set on its first.

        The number moves as `workbench.dataset.Diff.bump` says unless `bump` is given. The same content as the latest
        version returns that version and changes nothing. Killed at any moment, the version is there whole or not at
        all, and publishing again ends the same way. A frame whose pixels are missing is Invalid and named. `after` is
        the version number the manifest was made from, "" for none: when another one is the latest by now, Conflict.
        """
        ...

    def checkout_url(self, dataset: str) -> str:
        """What `git clone` takes."""
        ...


@dataclass(frozen=True)
class RegisteredModel:
    """A version in the tracker's registry with its aliases ("champion", "challenger", "previous")."""

    name: str
    version: str
    run_id: str
    aliases: tuple[str, ...] = ()
    tags: dict[str, str] | None = None
    created_at: str = ""


class Tracker(Protocol):
    """Keeps training runs and registered versions (MLflow). A server that does not answer is Unavailable."""

    url: str

    def start_run(self, experiment: str, name: str, tags: dict[str, str], parent: str | None = None,
                  is_first: bool = False) -> str:
        """Creates a run and returns its id; the same `job` tag again returns the run there is. `parent` is the id of a
        run of the same experiment that it is part of. Who knows that there is no run of that job yet, says `is_first`:
        it is not looked for, which would take longer than all else about it."""
        ...

    def log(self, run_id: str, params: dict[str, Any] | None = None, metrics: dict[str, float] | None = None,
            tags: dict[str, str] | None = None, step: int = 0) -> None: ...

    def log_steps(self, run_id: str, rows: dict[int, dict[str, float]]) -> None:
        """Adds metrics of many steps at once: step -> name -> value."""
        ...

    def log_files(self, run_id: str, files: Path, folder: str) -> None:
        """Stores a file, or all files below a directory, as artifacts of the run under `folder`."""
        ...

    def delete_files(self, run_id: str, folder: str) -> None:
        """Removes the artifacts of the run under `folder`; nothing happens where there are none."""
        ...

    def runs(self, experiment: str, limit: int = 50) -> list[dict[str, Any]]:
        """Newest first: {"run_id", "name", "status", "started_at", "finished_at", "params", "metrics", "tags"}."""
        ...

    def run(self, run_id: str) -> dict[str, Any]:
        """One run, as `runs` tells it. Raises NotFound."""
        ...

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """(step, value) of one metric, in order."""
        ...

    def finish_run(self, run_id: str, status: str) -> None:
        """status: FINISHED, FAILED or KILLED."""
        ...

    def artifacts(self, run_id: str, folder: str, to: Path) -> Path:
        """Downloads a folder of a run's artifacts and returns where it lies."""
        ...

    def register(self, name: str, run_id: str, folder: str, tags: dict[str, str]) -> RegisteredModel:
        """A new version from a run's folder; the same run again returns the version there is."""
        ...

    def versions(self, name: str) -> list[RegisteredModel]:
        """Newest first, [] for a model nobody registered."""
        ...

    def set_alias(self, name: str, alias: str, version: str) -> None: ...

    def by_alias(self, name: str, alias: str) -> RegisteredModel | None: ...

    def run_url(self, run_id: str) -> str: ...


class Search(Protocol):
    """Proposes the trials of a sweep and tells which are not worth going on with (Optuna); keeps nothing itself.

    Trials have numbers from 0. After a restart every trial begun so far is told again, in the order of their numbers,
    with `begin`, `report` and `tell`; the search then goes on as if it had never stopped.
    """

    def ask(self, number: int) -> dict[str, Any]:
        """The parameters of a new trial, which has begun with that; such as were not tried yet, where there are some."""
        ...

    def begin(self, number: int, params: dict[str, Any]) -> None:
        """A trial that was asked for earlier has begun with these parameters."""
        ...

    def report(self, number: int, epoch: int, value: float) -> bool:
        """Takes what a running trial has reached; True when it should be pruned."""
        ...

    def tell(self, number: int, state: str, value: float | None = None) -> None:
        """A trial is over: "complete" with its value, "pruned", or "failed"."""
        ...

    def importance(self) -> dict[str, float]:
        """Parameter -> its share in how values differ, adding up to 1; {} while too few trials are complete."""
        ...


class Job(Protocol):
    """What a running step says and asks. Cheap to call for every item: writes are throttled by the implementation."""

    id: str

    def progress(self, done: int, total: int, note: str = "") -> None: ...

    def fail_item(self, item: str, reason: str) -> None:
        """One item failed, the rest goes on; the same item and reason again counts once."""
        ...

    def log(self, text: str) -> None: ...

    def check(self) -> None:
        """Raises Cancelled when a person has cancelled the job; call it between items."""
        ...


@dataclass
class Quiet:
    """A Job that only remembers: for the command line, tests and steps that run outside a worker."""

    id: str = "inline"
    done: int = 0
    total: int = 0

    def __post_init__(self) -> None:
        self.failed: dict[str, str] = {}
        self.lines: list[str] = []

    def progress(self, done: int, total: int, note: str = "") -> None:
        self.done, self.total = done, total

    def fail_item(self, item: str, reason: str) -> None:
        self.failed[item] = reason

    def log(self, text: str) -> None:
        self.lines.append(text)

    def check(self) -> None:
        return None

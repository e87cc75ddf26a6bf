"""The only file that names adapters: from settings to the parts that steps, pages, service and command line use."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from workbench.blobs import Blobs
from workbench.config import Config
from workbench.errors import Invalid
from workbench.ports import AnnotationServer, Backend, DatasetStore, Job, ModelStore, Tracker

PROJECT = Path(__file__).resolve().parent.parent


class Workbench:
    """All parts of one workbench, each opened on first use."""

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or Config.read()
        self.config.home.mkdir(parents=True, exist_ok=True)

    @cached_property
    def blobs(self) -> Blobs:
        return Blobs(self.config.blobs, cache=self.config.home / "blob-cache")

    @cached_property
    def records(self):
        from workbench.records import Records
        return Records(self.config.database)

    @cached_property
    def jobs(self):
        from workbench.jobs import Jobs
        return Jobs(self.config, self.records.engine)

    @cached_property
    def datasets(self) -> DatasetStore:
        from workbench.adapters.git_datasets import GitDatasets
        return GitDatasets(self.config.home / "datasets", self.blobs)

    @cached_property
    def server(self) -> AnnotationServer:
        from workbench.adapters.fiftyone import FiftyOneServer
        return FiftyOneServer(mongo_url=self.config.mongo, app_url=self.config.fiftyone)

    @cached_property
    def models(self) -> ModelStore:
        from workbench.adapters.local_models import LocalModels
        return LocalModels(self.config.home / "models")

    @cached_property
    def tracker(self) -> Tracker:
        from workbench.adapters.mlflow import MlflowTracker
        return MlflowTracker(self.config.mlflow)

    def open_backend(self, onnx: Path, backend: str | None = None) -> Backend:
        """Raises Invalid for a backend that does not exist."""
        name = backend or self.config.backend
        if name == "openvino":
            from workbench.adapters.openvino import OpenVINO
            return OpenVINO(onnx, threads=self.config.worker_threads)
        if name == "onnxruntime":
            from workbench.adapters.onnxruntime import OnnxRuntime
            return OnnxRuntime(onnx, threads=self.config.worker_threads)
        raise Invalid(f"Backend {name!r} does not exist; choose openvino or onnxruntime (setting 'backend').")

    def job_kinds(self) -> dict[str, Callable[[dict[str, Any], Job], dict[str, Any]]]:
        """What a worker can do: kind -> function of (arguments, job) that gives a JSON result."""
        from workbench import kinds
        return kinds.all_of(self)

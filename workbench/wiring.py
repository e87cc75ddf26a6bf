"""The only file that names adapters: from settings to the parts that steps, pages, service and command line use."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.blobs import Blobs
from workbench.capacity import processors
from workbench.config import Config
from workbench.errors import Invalid
from workbench.ports import AnnotationServer, Backend, DatasetStore, Job, ModelStore, Search, Tracker

if TYPE_CHECKING:  # numpy and OpenCV are not imported before something runs
    from workbench.inference.graph import Graph
    from workbench.inference.probe import Plan
    from workbench.model import ModelCard
    from workbench.notifications import Channel

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
        """Where people annotate: CVAT when the settings name one, else the embedded FiftyOne."""
        return self.cvat if self.config.cvat_url else self.fiftyone

    @cached_property
    def fiftyone(self):
        from workbench.adapters.fiftyone import FiftyOneServer
        return FiftyOneServer(mongo_url=self.config.mongo, app_url=self.config.fiftyone)

    @cached_property
    def cvat(self):
        """Raises Invalid when the settings name no CVAT."""
        from workbench.adapters.cvat import Connection, CvatServer
        return CvatServer(Connection(self.config.cvat_url, self.config.cvat_token), self.records.engine)

    @cached_property
    def cvat_tools(self):
        """CVAT's AI tools. Raises Invalid when the settings name no CVAT."""
        from workbench.adapters.cvat import AiTools, Connection
        from workbench.adapters.cvat.tools import CALL_S
        return AiTools(Connection(self.config.cvat_url, self.config.cvat_token, CALL_S))

    @staticmethod
    def cvat_version_at(address: str) -> str:
        """The version of the CVAT at any address, without a token. Raises Invalid and Unavailable."""
        from workbench.adapters.cvat.tools import about
        return about(address)

    @cached_property
    def nuclio(self):
        """Raises Invalid when the settings name no Nuclio."""
        from workbench.adapters.nuclio import Nuclio
        return Nuclio(self.config.nuclio_url)

    @cached_property
    def hooks(self):
        """What CVAT has announced, and the secrets it signs with."""
        from workbench.hooks import Hooks
        return Hooks(self.records.engine, self.config.home / "hooks")

    @cached_property
    def models(self) -> ModelStore:
        from workbench.adapters.local_models import LocalModels
        return LocalModels(self.config.home / "models")

    @cached_property
    def certificates(self):
        from workbench.certificates import Certificates
        return Certificates(self.records, self.config.home / "certificate.key")

    @cached_property
    def tracker(self) -> Tracker:
        from workbench.adapters.mlflow import MlflowTracker
        return MlflowTracker(self.config.mlflow)

    @staticmethod
    def open_search(space: Any, **how: Any) -> Search:
        """Chooses the trials of a sweep. Raises Invalid for a sampler or pruner that does not exist."""
        from workbench.adapters.optuna import OptunaSearch
        return OptunaSearch(space, **how)

    def channels(self) -> list[Channel]:
        """Where messages about jobs go, as the settings say. Raises Invalid for an address that is none."""
        found: list[Channel] = []
        if self.config.discord_webhook:
            from workbench.adapters.discord import Discord
            found.append(Discord(self.config.discord_webhook))
        if self.config.notify_urls:
            from workbench.adapters.apprise import Apprise, addresses
            found += [Apprise(one, at) for at, one in enumerate(addresses(self.config.notify_urls), 1)]
        return found

    @cached_property
    def outbox(self):
        """Sends messages beside the work. Wrong settings are a warning here: they stop no worker."""
        from workbench.notifications import Outbox, logger
        try:
            return Outbox(self.channels())
        except Invalid as error:
            logger.warning("%s Until then no messages are sent.", error)
            return Outbox([])

    def open_backend(self, onnx: Path | Graph, backend: str | None = None, *, streams: int = 0, batch: int = 1) -> Backend:
        """The opened graph of a file or in memory; `streams` and `batch` as a plan says. Raises Invalid for a backend
        that does not exist."""
        name = backend or self.config.backend
        if name == "openvino":
            from workbench.adapters.openvino import OpenVINO
            return OpenVINO(onnx, threads=self.config.worker_threads, streams=streams, batch=batch)
        if name == "onnxruntime":
            from workbench.adapters.onnxruntime import OnnxRuntime
            return OnnxRuntime(onnx, threads=self.config.worker_threads, streams=streams, batch=batch)
        if name == "tensorrt":
            # One engine serves batches of all sizes: `batch` changes nothing here.
            from workbench.adapters.tensorrt import TensorRT
            return TensorRT(onnx, self.config.home / "engines", streams=streams)
        raise Invalid(f"Backend {name!r} does not exist; choose openvino, onnxruntime or tensorrt (setting 'backend').")

    def plan_for(self, card: ModelCard, folder: Path) -> Plan:
        """Batch and streams with which a model runs fastest here: measured for 3 s the first time, then remembered."""
        from workbench.inference.probe import plan_for
        try:
            where = " ".join([self.config.backend, version(self.config.backend), *processors()])
        except PackageNotFoundError:
            where = ""  # opening the model says so
        return plan_for(card, folder, self.open_backend, self.config.home / "plans.json",
                        cores=self.config.worker_threads, where=where)

    def job_kinds(self) -> dict[str, Callable[[dict[str, Any], Job], dict[str, Any]]]:
        """What a worker can do: kind -> function of (arguments, job) that gives a JSON result."""
        from workbench import kinds
        return kinds.all_of(self)

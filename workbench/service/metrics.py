"""Prometheus metrics: what predict does, and the jobs, data sets and models of the workbench."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import psutil

from workbench import kinds
from workbench.config import Config
from workbench.jobs import STATES
from workbench.wiring import Workbench

# Seconds: from a small model on a GPU to a full queue on one core.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
BATCHES = (1, 2, 4, 8, 16)


class Metrics:
    """What this process counts, by labels that are few: references of registered models, codes and names of ours.

    With several service processes each keeps its figures in files of one folder, and whichever is asked adds them up
    (prometheus_client's multiprocess mode).
    """

    def __init__(self, config: Config) -> None:
        folder = config.service_metrics
        if config.service_workers > 1 and "prometheus_client" not in sys.modules:
            # The library looks at this once, when it is imported.
            folder.mkdir(parents=True, exist_ok=True)
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
        import prometheus_client as client
        from prometheus_client import values

        self._folder = folder if values.ValueClass._multiprocess else None
        self._registry = client.CollectorRegistry()
        client.disable_created_metrics()
        given: dict[str, Any] = {"namespace": "workbench_predict", "registry": self._registry}
        self.requests = client.Counter(
            "requests", "Predict requests by model (empty: none was opened) and HTTP code.", ("model", "code"), **given
        )
        self.rejected = client.Counter(
            "rejected", "Requests refused for want of room, by what was full.", ("full",), **given
        )
        self.images = client.Counter(
            "images", "Images by model and what became of them: ok, failed or dropped.", ("model", "result"), **given
        )
        self.seconds = client.Histogram(
            "seconds",
            "Time of an image by model and stage: decode, wait, infer.",
            ("model", "stage"),
            buckets=SECONDS,
            **given,
        )
        self.batch = client.Histogram(
            "batch_images", "Images a run of the model's graph.", ("model",), buckets=BATCHES, **given
        )
        self.queue = client.Gauge(
            "queue_images", "Images taken and not done yet.", multiprocess_mode="livesum", **given
        )

    def text(self, workbench: Workbench) -> bytes:
        """Prometheus text format 0.0.4, also of what the stores hold now."""
        import prometheus_client as client
        from prometheus_client import multiprocess

        registry = client.CollectorRegistry()
        if self._folder is None:
            registry.register(self._registry)
        else:
            for file in self._folder.glob("gauge_live*_*.db"):
                pid = int(file.stem.rpartition("_")[2])
                if not psutil.pid_exists(pid):  # a process that was killed takes its images with it
                    multiprocess.mark_process_dead(pid, str(self._folder))
            multiprocess.MultiProcessCollector(registry, str(self._folder))
        registry.register(_Stores(workbench))
        return client.generate_latest(registry)


class _Stores:
    def __init__(self, workbench: Workbench) -> None:
        self._workbench = workbench

    def describe(self) -> list[Any]:
        return []  # otherwise registering reads all stores once for their names

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import GaugeMetricFamily

        jobs, datasets = self._workbench.jobs, self._workbench.datasets
        counts = jobs.counts()
        gauge = GaugeMetricFamily("workbench_jobs", "Jobs by kind and state.", labels=("kind", "state"))
        for kind in sorted(kinds.ARGUMENTS.keys() | {kind for kind, _ in counts}):
            for state in STATES:
                gauge.add_metric((kind, state), counts.get((kind, state), 0))
        yield gauge
        yield GaugeMetricFamily("workbench_workers", "Worker processes that live.", len(jobs.workers()))
        gauge = GaugeMetricFamily(
            "workbench_dataset_versions", "Published versions of each data set.", labels=("dataset",)
        )
        for name in datasets.names():
            gauge.add_metric((name,), len(datasets.versions(name)))
        yield gauge
        yield GaugeMetricFamily("workbench_models", "Registered detectors.", len(self._workbench.models.refs()))

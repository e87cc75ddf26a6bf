"""Which batch and how many streams make a model fastest on a device: measured for three seconds, then remembered."""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from workbench.errors import WorkbenchError
from workbench.inference.detector import Detector
from workbench.model import ModelCard

# Combinations measured at most; each gets its share of the time.
MOST = 6
BATCHES = (4, 16)
# Another batch or number of streams must be so much faster, twice, to be worth it: less is the noise of a short
# measurement on a machine that does other things too, and one image a run needs the least memory.
GAIN = 1.1


@dataclass(frozen=True)
class Plan:
    """How a model runs fastest here: batch images a run, streams runs at once, measured images_per_s of the bare graph.

    streams 0 leaves the choice to the backend.
    """

    batch: int = 1
    streams: int = 0
    images_per_s: float = 0.0

    def opening(self, open_backend: Callable[..., Any]) -> Callable[..., Any]:
        """`open_backend` with this plan; it must take `streams` and `batch` by name."""
        return partial(open_backend, streams=self.streams, batch=self.batch)


def plan_for(card: ModelCard, folder: Path, open_backend: Callable[..., Any], memory: Path, *, seconds: float = 3.0,
             cores: int = 0, where: str = "") -> Plan:
    """The remembered plan of this file, backend, device, library and number of cores, else a measured one.

    open_backend  gives the Backend of a graph; takes `streams` and `batch` by name
    memory        a JSON file of plans; one that is damaged is written anew
    seconds       for the measurements together, opening and second rounds not counted
    cores         0: all of this machine
    where         backend, library and device if they are known without opening the model, which a remembered plan then
                  spares; asked of the opened backend otherwise

    A combination that cannot be opened or run is left out. Raises what Detector raises when the model cannot be opened
    at all.
    """
    cores = cores or os.cpu_count() or 1
    file, remembered = card.files[card.onnx]["sha256"], _remembered(memory)
    keys = [f"{file}/{where}/{cores} cores"] if where else []
    if where and keys[0] in remembered:
        return remembered[keys[0]]
    with Detector(card, folder, open_backend) as detector:
        report, first = detector.report, detector.streams
        keys.append("/".join((file, report.backend, report.device, report.library, report.precision, f"{cores} cores")))
        known = remembered.get(keys[-1])
        if known is not None:
            _remember(memory, keys, known)
            return known
        best = Plan(1, first, _images_per_s(detector, 1, seconds / MOST))

    def better(plan: Plan, batch: int, streams: int) -> Plan:
        """The plan, unless the other combination wins two rounds in turn."""
        tried = None
        for _ in range(2):
            tried = _measured(card, folder, open_backend, batch, streams, seconds / MOST)
            if tried is None or tried.images_per_s <= GAIN * plan.images_per_s:
                return plan
            plan = _measured(card, folder, open_backend, plan.batch, plan.streams, seconds / MOST) or plan
        return tried

    for streams in sorted({cores, cores // 2, 2, 1} - {first, 0}, reverse=True)[:MOST - 1 - len(BATCHES)]:
        best = better(best, 1, streams)
    for batch in BATCHES:
        before, best = best, better(best, batch, best.streams)
        if best.batch == before.batch:
            break
    _remember(memory, keys, best)
    return best


def _measured(card: ModelCard, folder: Path, open_backend: Callable[..., Any], batch: int, streams: int,
              seconds: float) -> Plan | None:
    try:
        with Detector(card, folder, Plan(batch, streams).opening(open_backend), batch=batch) as detector:
            if batch > 1 and not detector.batch_is_dynamic:
                return None
            return Plan(batch, detector.streams, _images_per_s(detector, batch, seconds))
    except WorkbenchError:
        return None


def _images_per_s(detector: Detector, batch: int, seconds: float) -> float:
    width, height = detector.card.input.size
    canvases = np.random.default_rng(0).integers(0, 256, (batch, height, width, 3), np.uint8)
    detector.outputs(canvases)  # the first run sets memory aside
    runs, errors = [0] * detector.streams, []
    started = time.perf_counter()

    def work(stream: int) -> None:
        try:
            while not runs[stream] or time.perf_counter() < started + seconds:
                detector.outputs(canvases)
                runs[stream] += 1
        except WorkbenchError as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(stream,)) for stream in range(detector.streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return round(sum(runs) * batch / (time.perf_counter() - started), 2)


def _remembered(memory: Path) -> dict[str, Plan]:
    try:
        plans = {key: Plan(**record) for key, record in json.loads(memory.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # not there yet, or damaged: it holds nothing that cannot be measured again
    return {key: plan for key, plan in plans.items()
            if all(isinstance(side, int) and not isinstance(side, bool) and 1 <= side <= 4096
                   for side in (plan.batch, plan.streams))}


def _remember(memory: Path, keys: list[str], plan: Plan) -> None:
    before = _remembered(memory)
    plans = {**before, **dict.fromkeys(keys, plan)}
    if plans == before:
        return
    memory.parent.mkdir(parents=True, exist_ok=True)
    handle, half = tempfile.mkstemp(dir=memory.parent, prefix=".half-")
    with os.fdopen(handle, "w") as file:
        json.dump({key: asdict(one) for key, one in plans.items()}, file, indent=1)
    os.replace(half, memory)

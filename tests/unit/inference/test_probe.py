"""The choice of batch and streams: measured once, remembered, and never in anybody's way."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doubles import graphs

from workbench.adapters.onnxruntime import OnnxRuntime
from workbench.errors import Invalid
from workbench.inference.detector import Detector
from workbench.inference.probe import Plan, plan_for
from workbench.model import ModelCard


class Slow:
    """A backend whose runs take as long as `cost` says; it counts how often it was opened."""

    def __init__(self, opened: OnnxRuntime, streams: int, cost: Callable[[int, int], float]) -> None:
        self._opened, self.streams, self._cost = opened, streams, cost
        self.report, self.input_shape = opened.report, opened.input_shape
        self.batch_is_dynamic = opened.batch_is_dynamic

    def __enter__(self) -> Slow:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._opened.__exit__(*exc_info)

    def run(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        time.sleep(self._cost(len(batch), self.streams))
        return {}


@pytest.fixture
def card(tmp_path: Path) -> ModelCard:
    return graphs.red_finder(tmp_path)


def opener(cost: Callable[[int, int], float], opened: list[tuple[int, int]], first: int = 2) -> Callable[..., Any]:
    def open_backend(source: Any, streams: int = 0, batch: int = 1) -> Slow:
        opened.append((batch, streams))
        return Slow(OnnxRuntime(source, threads=1), streams or first, cost)
    return open_backend


@pytest.mark.parametrize(("cost", "expected"), [
    (lambda batch, streams: 0.01 * batch ** 1.3, (1, 2)),  # two streams serve twice as many, a batch costs more
    (lambda batch, streams: 0.01 * batch ** 1.3 * streams ** 2.5, (1, 1)),  # streams get in each other's way
    (lambda batch, streams: 0.02 + 0.001 * batch, (16, 2)),  # a run costs the same whatever is in it
], ids=["streams", "one", "batch"])
def test_the_fastest_combination_is_chosen(
    tmp_path: Path, card: ModelCard, cost: Callable[[int, int], float], expected: tuple[int, int]
) -> None:
    plan = plan_for(card, tmp_path, opener(cost, []), tmp_path / "plans.json", seconds=1.2, cores=2)
    assert (plan.batch, plan.streams) == expected and plan.images_per_s > 0


def test_a_plan_is_remembered_for_its_file_device_and_cores(tmp_path: Path, card: ModelCard) -> None:
    opened, memory = [], tmp_path / "home" / "plans.json"
    open_backend = opener(lambda batch, streams: 0.001, opened)
    first = plan_for(card, tmp_path, open_backend, memory, seconds=0.2, cores=2)
    count = len(opened)
    assert plan_for(card, tmp_path, open_backend, memory, seconds=0.2, cores=2) == first and len(opened) == count + 1
    plan_for(card, tmp_path, open_backend, memory, seconds=0.2, cores=3)
    other = graphs.red_finder(tmp_path / "other", labels=("red",))
    plan_for(other, tmp_path / "other", open_backend, memory, seconds=0.2, cores=2)
    assert len(json.loads(memory.read_text())) == 3 and [p.name for p in memory.parent.iterdir()] == ["plans.json"]


def test_a_plan_remembered_for_a_known_place_is_found_without_opening_the_model(tmp_path: Path, card: ModelCard) -> None:
    opened, memory = [], tmp_path / "plans.json"
    open_backend = opener(lambda batch, streams: 0.001, opened)
    first = plan_for(card, tmp_path, open_backend, memory, seconds=0.2, cores=2)
    count = len(opened)
    for place, more in (("here", 1), ("here", 1), ("there", 2), ("there", 2)):  # known by its backend, then by its place
        assert plan_for(card, tmp_path, open_backend, memory, seconds=0.2, cores=2, where=place) == first
        assert len(opened) == count + more
    plan_for(card, tmp_path, open_backend, memory, seconds=0.2, cores=3, where="here")
    assert len(opened) > count + 3


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"a": 1}', '{"KEY": {"batch": 0, "streams": 2}}',
                                     '{"KEY": {"batch": "many", "streams": 2}}', '{"KEY": {"speed": 1}}'])
def test_a_damaged_memory_is_measured_again_and_mended(tmp_path: Path, card: ModelCard, content: str) -> None:
    open_backend, memory = opener(lambda batch, streams: 0.001, []), tmp_path / "plans.json"
    plan_for(card, tmp_path, open_backend, memory, seconds=0.1, cores=2)
    (key,) = json.loads(memory.read_text())
    memory.write_text(content.replace("KEY", key))
    plan = plan_for(card, tmp_path, open_backend, memory, seconds=0.1, cores=2)
    assert plan.batch >= 1 and plan.streams >= 1
    assert json.loads(memory.read_text())[key] == {"batch": plan.batch, "streams": plan.streams,
                                                   "images_per_s": plan.images_per_s}


def test_a_combination_that_does_not_open_is_left_out(tmp_path: Path, card: ModelCard) -> None:
    plain = opener(lambda batch, streams: 0.001, [])

    def open_backend(source: Any, streams: int = 0, batch: int = 1) -> Slow:
        if batch > 1 or streams == 1:
            raise Invalid("out of memory")
        return plain(source, streams, batch)

    plan = plan_for(card, tmp_path, open_backend, tmp_path / "plans.json", seconds=0.2, cores=2)
    assert (plan.batch, plan.streams) == (1, 2)


def test_a_model_that_cannot_be_opened_at_all_is_told(tmp_path: Path, card: ModelCard) -> None:
    with pytest.raises(Invalid, match="sha256"):
        plan_for(replace(card, files={"model.onnx": {"sha256": "0" * 64}}), tmp_path, opener(lambda b, s: 0, []),
                 tmp_path / "plans.json")


def test_a_real_backend_is_probed_and_opened_as_planned(tmp_path: Path, card: ModelCard) -> None:
    def open_backend(source: Any, streams: int = 0, batch: int = 1) -> OnnxRuntime:
        return OnnxRuntime(source, threads=2, streams=streams, batch=batch)

    plan = plan_for(card, tmp_path, open_backend, tmp_path / "plans.json", seconds=0.3, cores=2)
    with Detector(card, tmp_path, plan.opening(open_backend), batch=plan.batch) as detector:
        assert detector.streams == plan.streams
    assert Plan().streams == 0

"""TensorRT on a real card: the contract of all backends, and what the doubles cannot show."""

from __future__ import annotations

import inspect
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from contracts import test_backend as contract
from doubles import graphs, quantized

from workbench.adapters.onnxruntime import OnnxRuntime
from workbench.inference.graph import Graph, read_graph
from workbench.inference.known import card_for_nanodet, card_for_yolox
from workbench.inference.standard import dynamic_batch, pixels_inside

for _name, _test in vars(contract).items():
    # TensorRT takes symmetric int8 only: the other dialects are refused (tests/unit/adapters/test_tensorrt_build.py).
    if _name.startswith("test_") and "open_graph" in inspect.signature(_test).parameters and (
            "quantised_graph_gives" not in _name):
        globals()[_name] = _test


@pytest.mark.parametrize("options", [{}, {"graphs": False}, {"streams": 1}], ids=["default", "no graph", "one stream"])
def test_many_threads_and_batch_sizes_each_get_their_own_result(
    open_graph: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    wrong = []

    def work(value: int) -> None:
        for count in (1, value, 7, 70):
            found = backend.run(np.full((count, 2, 2, 3), value, np.uint8))
            if found["next"].shape != (count, 2, 2, 3) or not (found["next"] == value + 1).all():
                wrong.append((value, count))

    with open_graph(graphs.affine(tmp_path / "m.onnx"), **options) as backend:
        assert backend.graph_failure == ""
        threads = [threading.Thread(target=work, args=(value,)) for value in range(1, 33)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_the_second_opening_takes_the_engine_from_the_cache(open_graph: Any, tmp_path: Path) -> None:
    path = tmp_path / graphs.red_finder(tmp_path, side=128).onnx
    with open_graph(path) as first, open_graph(path) as second:
        assert (first.from_cache, second.from_cache) == (False, True)


def test_a_quantised_convolution_runs_in_int8_and_gives_the_numbers_of_the_cpu(open_graph: Any, tmp_path: Path) -> None:
    path = quantized.convolution(tmp_path / "q.onnx")
    images = np.random.default_rng(0).normal(0, 4, (5, 3, 16, 16)).astype(np.float32)
    with open_graph(path) as gpu, OnnxRuntime(path, threads=1) as cpu:
        assert gpu.report.precision == "int8"
        # Integers are summed exactly; only the two scales are multiplied in another order.
        np.testing.assert_allclose(gpu.run(images)["found"], cpu.run(images)["found"], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name, card", [("yolox_nano", card_for_yolox), ("nanodet_plus_m", card_for_nanodet)])
def test_the_shared_models_give_the_numbers_of_the_cpu(open_graph: Any, shared: Path, name: str, card: Any) -> None:
    file = shared / "data" / "models" / name / f"{name}_416.onnx"
    model, _ = pixels_inside(read_graph(file)[1], card(file, "m", size=(416, 416)).input)
    graph = Graph(file, dynamic_batch(model))
    images = np.random.default_rng(0).integers(0, 256, (3, 416, 416, 3)).astype(np.uint8)
    with open_graph(graph) as gpu, OnnxRuntime(graph, threads=2) as cpu:
        assert gpu.report.precision == "f32"
        for output, expected in cpu.run(images).items():
            # float32 without TF32; hundreds of layers of sums in another order.
            np.testing.assert_allclose(gpu.run(images)[output], expected, rtol=1e-2, atol=1e-2)


def test_memory_comes_back_when_a_model_is_closed(open_graph: Any, tmp_path: Path) -> None:
    from pycuda import driver

    driver.init()
    context = driver.Device(0).retain_primary_context()
    context.push()
    try:
        free = []
        for _ in range(4):
            with open_graph(graphs.affine(tmp_path / "m.onnx")) as backend:
                for count in (1, 64, 3):
                    backend.run(np.zeros((count, 2, 2, 3), np.uint8))
            free.append(driver.mem_get_info()[0])
        # The first round may load kernels that stay; after it nothing may be lost.
        assert free[1] - free[-1] < 4 << 20
    finally:
        driver.Context.pop()


def test_the_graph_of_an_observed_tensor_is_built_too(open_graph: Any, tmp_path: Path) -> None:
    """Calibration looks at tensors inside a graph."""
    from workbench.inference.calibration import observed

    path = graphs.affine(tmp_path / "m.onnx")
    with open_graph(Graph(path, observed(onnx.load(path), ["x"]))) as backend:
        assert (backend.run(np.full((2, 2, 2, 3), 9, np.uint8))["x"] == 9).all()

"""The TensorRT adapter on doubles of CUDA and TensorRT: who holds which slot, what is freed, what is refused. That it
runs on a GPU is shown by tests/gpu and bench/gpu.py only."""

from __future__ import annotations

import gc
import importlib.util
import inspect
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from contracts import test_backend as contract
from doubles import graphs, quantized
from doubles.cuda import Gpu

from workbench.adapters.tensorrt import MOST_SIZES, TensorRT
from workbench.config import Config
from workbench.errors import Invalid, Unavailable
from workbench.inference.engine import EngineOptions
from workbench.inference.graph import Graph
from workbench.ports import Backend
from workbench.wiring import Workbench

Open = Callable[..., Backend]
# What the contract says of batches, shapes, files and closing holds for the adapter also on a double; what the real
# library computes and refuses is tested with the real library.
for _name, _test in vars(contract).items():
    if _name.startswith("test_") and "open_graph" in inspect.signature(_test).parameters and not any(
            word in _name for word in ("operator", "quantised")):
        globals()[_name] = _test


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu().install(monkeypatch)


@pytest.fixture
def open_graph(gpu: Gpu, tmp_path: Path) -> Open:
    # How many threads of the CPU and which batch a graph is compiled for means nothing here.
    return lambda path, threads=1, streams=0, batch=1: TensorRT(path, tmp_path / "engines", streams=streams)


def alive(gpu: Gpu) -> dict[str, int]:
    return {what: count for what, count in gpu.live.items() if count}


def images(count: int, value: int = 0) -> np.ndarray:
    return np.full((count, 2, 2, 3), value, np.uint8)


def test_batches_of_many_threads_each_get_their_own_result(gpu: Gpu, open_graph: Open, tmp_path: Path) -> None:
    gpu.delay_s, wrong = 0.005, []

    def work(value: int) -> None:
        for count in (1, value, 3):
            found = backend.run(images(count, value))
            if found["next"].shape != (count, 2, 2, 3) or not (found["next"] == value + 1).all():
                wrong.append(value)

    with open_graph(graphs.affine(tmp_path / "m.onnx")) as backend:
        assert backend.streams == 2
        threads = [threading.Thread(target=work, args=(value,)) for value in range(1, 9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert gpu.most_at_once == 2, "as many batches are under way as there are streams"


def test_one_stream_runs_one_batch_at_a_time(gpu: Gpu, tmp_path: Path) -> None:
    gpu.delay_s = 0.005
    with TensorRT(graphs.affine(tmp_path / "m.onnx"), tmp_path / "engines", streams=1) as backend:
        threads = [threading.Thread(target=backend.run, args=(images(1),)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert gpu.most_at_once == 1


def test_closing_frees_everything_whoever_opened_it(gpu: Gpu, open_graph: Open, tmp_path: Path) -> None:
    backend = open_graph(graphs.affine(tmp_path / "m.onnx"))
    for count in (1, 5, 2):
        backend.run(images(count))
    assert {"context", "engine", "execution context", "executable", "mem_alloc"} <= alive(gpu).keys()
    closer = threading.Thread(target=backend.__exit__, args=(None, None, None))
    closer.start()
    closer.join()
    backend.__exit__(None, None, None)
    assert alive(gpu) == {}


def test_closing_waits_for_the_batch_under_way_and_refuses_the_ones_that_wait(
    gpu: Gpu, tmp_path: Path
) -> None:
    gpu.delay_s, told = 0.2, []
    backend = TensorRT(graphs.affine(tmp_path / "m.onnx"), tmp_path / "engines", streams=1)

    def work() -> None:
        try:
            told.append(float(backend.run(images(1, 4))["next"].max()))
        except Invalid as error:
            told.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    while gpu.running == 0:
        threading.Event().wait(0.005)
    backend.__exit__(None, None, None)
    for thread in threads:
        thread.join(timeout=20)
    assert len(told) == 3 and 5.0 in told and alive(gpu) == {}
    assert all(one == 5.0 or "closed" in one for one in told)


@pytest.mark.parametrize("step", ["Stream", "Event", "mem_alloc", "pagelocked_empty", "create_execution_context",
                                  "memcpy", "synchronize", "execute", "deserialize", "Builder"])
def test_opening_that_fails_anywhere_frees_everything_and_says_what_to_do(
    gpu: Gpu, open_graph: Open, tmp_path: Path, step: str
) -> None:
    gpu.fail.add(step)
    with pytest.raises(Unavailable, match="nvidia-smi|docs/gpu.md") as caught:
        open_graph(graphs.affine(tmp_path / "m.onnx"))
    gpu.forget(caught.value)
    gc.collect()
    # The traceback still holds every frame of the failed opening.
    assert caught.value.__traceback__ is not None and alive(gpu) == {}


def test_a_batch_that_fails_is_unavailable_and_its_slot_serves_the_next(
    gpu: Gpu, open_graph: Open, tmp_path: Path
) -> None:
    with open_graph(graphs.affine(tmp_path / "m.onnx")) as backend:
        for _ in range(3):  # more often than there are slots
            gpu.fail.add("mem_alloc")
            with pytest.raises(Unavailable, match="memory"):
                backend.run(images(9))
            gpu.fail.clear()
            assert (backend.run(images(9, 1))["double"] == 2).all()
    assert alive(gpu) == {}


def test_every_batch_size_is_captured_once_and_then_launched(gpu: Gpu, open_graph: Open, tmp_path: Path) -> None:
    with open_graph(graphs.affine(tmp_path / "m.onnx")) as backend:
        for _ in range(4):
            backend.run(images(1))
        assert gpu.launches == 4 and alive(gpu)["executable"] == 2, "one graph per slot"
        for count in range(1, 4 * MOST_SIZES):
            backend.run(images(count % 20 + 1))
        assert alive(gpu)["executable"] <= 2 * MOST_SIZES


def test_a_graph_that_cannot_be_captured_runs_without_and_says_so(gpu: Gpu, open_graph: Open, tmp_path: Path) -> None:
    gpu.fail.add("capture")
    with open_graph(graphs.affine(tmp_path / "m.onnx")) as backend:
        assert "CAPTURE" in backend.graph_failure
        assert (backend.run(images(3, 7))["next"] == 8).all() and gpu.launches == 0
    with TensorRT(tmp_path / "m.onnx", tmp_path / "engines", graphs=False) as backend:
        assert backend.graph_failure == "" and (backend.run(images(1, 7))["next"] == 8).all() and gpu.launches == 0


def test_a_batch_beyond_the_profile_runs_in_parts(gpu: Gpu, tmp_path: Path) -> None:
    path = graphs.affine(tmp_path / "m.onnx")
    with TensorRT(path, tmp_path / "engines", options=EngineOptions(batches=(1, 2, 3))) as backend:
        batch = np.arange(8 * 12, dtype=np.uint8).reshape(8, 2, 2, 3)
        found = backend.run(batch)
    np.testing.assert_array_equal(found["double"], batch * 2.0)
    assert list(found) == ["double", "next"] and gpu.launches == 3


def test_an_engine_is_built_once_and_then_taken_from_the_cache(gpu: Gpu, tmp_path: Path) -> None:
    path, built = graphs.affine(tmp_path / "m.onnx"), []
    for _ in range(3):
        with TensorRT(path, tmp_path / "engines") as backend:
            built.append((backend.from_cache, gpu.builds))
    assert built == [(False, 1), (True, 1), (True, 1)]
    gpu.driver.get_driver_version = lambda: 13010
    with TensorRT(path, tmp_path / "engines") as backend:
        assert not backend.from_cache and gpu.builds == 2, "another driver needs another engine"


def test_a_graph_in_memory_has_an_engine_of_its_own(gpu: Gpu, tmp_path: Path) -> None:
    model = onnx.load(graphs.affine(tmp_path / "m.onnx"))
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.float32(3), "two"))
    for source, factor in ((tmp_path / "m.onnx", 2), (Graph(tmp_path / "m.onnx", model), 3)):
        with TensorRT(source, tmp_path / "engines") as backend:
            assert (backend.run(images(1, 5))["double"] == 5 * factor).all()
    assert gpu.builds == 2


@pytest.mark.parametrize("damage", ["damaged", "foreign"])
def test_a_damaged_or_foreign_engine_in_the_cache_is_never_loaded(gpu: Gpu, tmp_path: Path, damage: str) -> None:
    path, engines, loaded = graphs.affine(tmp_path / "m.onnx"), tmp_path / "engines", []
    TensorRT(path, engines).__exit__()
    inner = gpu.tensorrt.Runtime.deserialize_cuda_engine
    gpu.tensorrt.Runtime.deserialize_cuda_engine = lambda self, data: (loaded.append(bytes(data)), inner(self, data))[1]
    kept = next(engines.glob("*.engine"))
    if damage == "damaged":
        kept.write_bytes(kept.read_bytes()[:-1] + b"!")
    else:
        (engines / ".secret").write_bytes(b"the secret of another machine")
    bad = kept.read_bytes()
    with TensorRT(path, engines) as backend:
        assert not backend.from_cache and (backend.run(images(1, 5))["next"] == 6).all()
    assert gpu.builds == 2 and (damage == "foreign" or bad not in loaded)
    with TensorRT(path, engines) as backend:
        assert backend.from_cache


def test_an_intact_engine_that_the_library_does_not_take_is_built_again(gpu: Gpu, tmp_path: Path) -> None:
    path, inner = graphs.affine(tmp_path / "m.onnx"), gpu.tensorrt.Runtime.deserialize_cuda_engine
    TensorRT(path, tmp_path / "engines").__exit__()
    answers = [None]
    gpu.tensorrt.Runtime.deserialize_cuda_engine = lambda self, data: answers.pop() if answers else inner(self, data)
    with TensorRT(path, tmp_path / "engines") as backend:
        assert not backend.from_cache and gpu.builds == 2


def test_an_engine_that_cannot_be_kept_runs_all_the_same(
    gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with TensorRT(graphs.affine(tmp_path / "m.onnx"), tmp_path / "engines") as backend:
        assert (backend.run(images(1, 5))["next"] == 6).all()
    assert "No space left" in caplog.text


def test_precision_is_int8_only_when_the_engine_has_int8_layers_for_what_the_graph_quantises(
    gpu: Gpu, tmp_path: Path
) -> None:
    path = quantized.convolution(tmp_path / "q.onnx")
    with TensorRT(path, tmp_path / "engines") as backend:
        assert backend.report.precision == "f32", "Q/DQ nodes alone say nothing of what runs"
    layer = ("Name: conv, LayerType: CaskConvolution, Inputs: [ {{ Name: x, Format/Datatype: {0} format }}], Outputs: "
             "[ {{ Name: y, Format/Datatype: Row major linear FP32 }}], ParameterType: Convolution, Weights: "
             "{{\"Type\": \"{0}\", \"Count\": 216}}, TacticName: t")
    gpu.layers = layer.format("Int8")
    with TensorRT(path, tmp_path / "engines") as backend:
        assert backend.report.precision == "int8"
    with TensorRT(graphs.affine(tmp_path / "m.onnx"), tmp_path / "engines") as backend:
        assert backend.report.precision == "f32", "a graph without Q/DQ nodes is never int8"


def test_progress_of_a_build_is_told_and_what_is_raised_there_stops_the_opening(gpu: Gpu, tmp_path: Path) -> None:
    def build(self: object, network: object, config: object) -> bytes | None:
        monitor = config.__dict__["progress_monitor"]
        monitor.phase_start("Building", None, 2)
        return b"" if monitor.step_complete("Building", 0) and monitor.step_complete("Building", 1) else None

    gpu.tensorrt.Builder.build_serialized_network = build
    told = []

    def tell(*step: object) -> None:
        told.append(step)
        raise Invalid("enough")

    with pytest.raises(Invalid, match="enough"):
        TensorRT(graphs.affine(tmp_path / "m.onnx"), tmp_path / "engines", tell=tell)
    assert told == [("Building", 1, 2)] and alive(gpu) == {}


def test_a_side_that_depends_on_the_image_is_invalid(gpu: Gpu, open_graph: Open, tmp_path: Path) -> None:
    gpu.tensorrt.IExecutionContext.get_tensor_shape = lambda self, name: (-1, 3)
    with pytest.raises(Invalid, match="depends on what the image shows"):
        open_graph(graphs.affine(tmp_path / "m.onnx"))
    gc.collect()
    assert alive(gpu) == {}


@pytest.mark.parametrize("missing, says", [
    ("tensorrt", "TensorRT is not installed"), ("pycuda", "pycuda is not installed"),
    ("cuda.bindings", "cuda-bindings is not installed")])
def test_a_missing_library_is_named_with_what_to_install(
    gpu: Gpu, open_graph: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, says: str
) -> None:
    for name in (missing, f"{missing}.driver"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Unavailable, match=rf"{says}.*pip install \"\.\[gpu\]\""):
        open_graph(graphs.affine(tmp_path / "m.onnx"))


def test_no_gpu_no_such_gpu_and_an_old_library_are_told(gpu: Gpu, open_graph: Open, tmp_path: Path) -> None:
    path = graphs.affine(tmp_path / "m.onnx")
    with pytest.raises(Unavailable, match="1 GPUs, number 3"):
        TensorRT(path, tmp_path / "engines", device=3)

    def none() -> None:
        raise gpu.driver.Error("cuInit failed: no CUDA-capable device is detected")

    gpu.driver.init = none
    with pytest.raises(Unavailable, match="No GPU can be used.*nvidia-smi"):
        open_graph(path)
    gpu.tensorrt.__version__ = "10.3.0"
    with pytest.raises(Unavailable, match="10.3.0 is too old"):
        open_graph(path)


@pytest.mark.skipif(importlib.util.find_spec("pycuda") is not None, reason="pycuda is installed here")
def test_the_setting_backend_opens_tensorrt_and_says_what_is_missing_here(tmp_path: Path) -> None:
    wiring = Workbench(Config(home=tmp_path / "home", backend="tensorrt"))
    with pytest.raises(Unavailable, match=r"pip install \"\.\[gpu\]\".*openvino"):
        wiring.open_backend(graphs.affine(tmp_path / "m.onnx"))


@pytest.mark.parametrize("tag", [b"ftrt", b"ptrt", b"vtrt"])
def test_an_engine_handed_in_as_a_model_is_refused_by_name(
    open_graph: Open, tmp_path: Path, tag: bytes
) -> None:
    (tmp_path / "model.onnx").write_bytes(tag + bytes(1000))
    for opened in (open_graph, Workbench(Config(home=tmp_path / "home")).open_backend):
        with pytest.raises(Invalid, match="model.onnx is a TensorRT engine.*only built here.*onnx file"):
            opened(tmp_path / "model.onnx")

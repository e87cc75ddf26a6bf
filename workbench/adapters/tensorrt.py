"""TensorRT: runs a model's graph on an NVIDIA GPU.

pycuda holds device, context, pinned buffers, streams and events; cuda-bindings captures and launches CUDA graphs on the
same streams. Each slot has a stream, buffers and execution contexts of its own, so that one batch is copied while
another is computed. All of a batch, both copies included, is one CUDA graph per batch size.
"""

from __future__ import annotations

import hashlib
import logging
import math
import queue
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from workbench.errors import Invalid, Unavailable
from workbench.inference.engine import (EngineOptions, Tell, build, float_type, int8_layers, log_of,
                                        recorder_of)
from workbench.inference.engine_cache import EngineCache, EngineKey
from workbench.inference.graph import Graph, quantized_layers, read_graph
from workbench.inference.quantize import is_quantized
from workbench.ports import BackendReport

logger = logging.getLogger("workbench.engines")

# The first release whose builder takes what TensorRT 11 takes.
LEAST_VERSION = (10, 16)
# CU_STREAM_NON_BLOCKING (cuda.h): work of others on the default stream neither waits for ours nor breaks a capture.
NON_BLOCKING = 1
STREAMS = 2
# Batch sizes a slot keeps ready; each costs an execution context and a CUDA graph.
MOST_SIZES = 8
INSTALL = 'Run: pip install ".[gpu]" (docs/gpu.md)'


class TensorRT:
    """Backend of TensorRT on one GPU.

    onnx      the file, or a graph in memory
    engines   folder of the engine cache
    device    number of the GPU
    streams   batches that are under way at once, each with buffers of its own; 0: two, so that one is copied while the
              other is computed
    graphs    whether batches run as CUDA graphs; `graph_failure` says why this model's do not
    tell      hears of the build, which takes from seconds to minutes, and may stop it by raising

    `from_cache` says whether the engine was there already. A batch larger than the engine takes runs in parts. Raises
    Unavailable, naming what is missing, without TensorRT, pycuda, cuda-bindings, driver or GPU.
    """

    def __init__(self, onnx: Path | Graph, engines: Path, *, device: int = 0, streams: int = 0, graphs: bool = True,
                 options: EngineOptions | None = None, tell: Tell | None = None) -> None:
        data, model = read_graph(onnx)
        self._onnx, self._graphs, self.graph_failure = onnx, graphs, ""
        self.streams = streams or STREAMS
        self._free: queue.Queue[_Slot | None] = queue.Queue()
        self._trt, drv, cu = _libraries()
        self._gpu = _Gpu(drv, cu, device)
        self._slots: list[_Slot] = []
        self._creating = threading.Lock()  # contexts of one engine are made one after another
        self._engine = self._runtime = None
        try:
            with self._gpu.current(f"open {onnx}"):
                self._open_engine(data, model, EngineCache(engines), options or EngineOptions(), tell)
                self._describe(model)
                for _ in range(self.streams):
                    self._slots.append(_Slot(self))
                    self._slots[-1].open()
                    self._free.put(self._slots[-1])
        except BaseException:
            self._release()
            raise

    def __enter__(self) -> TensorRT:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if not self._slots:
            return
        for _ in self._slots:  # waits for the batches under way
            self._free.get()
        self._free.put(None)
        self._release()

    def run(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        if not self._slots:
            raise Invalid(f"{self._onnx} is closed; open it again.")
        if batch.dtype != self._dtype or len(batch.shape) != len(self.input_shape) or any(
                side not in (None, given) for side, given in zip(self.input_shape, batch.shape)) or not batch.size:
            raise Invalid(f"{self._onnx} takes {self._dtype} {self.input_shape}, got {batch.dtype} {batch.shape}.")
        slot = self._free.get()
        if slot is None:
            self._free.put(None)
            raise Invalid(f"{self._onnx} is closed; open it again.")
        try:
            with self._gpu.current(f"run {self._onnx} on {batch.shape}"):
                found = [slot.run(batch[start:start + self._most]) for start in range(0, len(batch), self._most)]
        finally:
            self._free.put(slot)
        return found[0] if len(found) == 1 else {name: np.concatenate([part[name] for part in found])
                                                 for name in self._outputs}

    def _open_engine(self, data: bytes, model: Any, cache: EngineCache, options: EngineOptions,
                     tell: Tell | None) -> None:
        trt, gpu = self._trt, self._gpu
        # The recorder and the log must outlive what they are set on.
        self._log, self._recorder = log_of(trt), recorder_of(trt)
        key = EngineKey(hashlib.sha256(data).hexdigest(), f"tensorrt {trt.__version__}", gpu.name, gpu.capability,
                        gpu.driver, options.profile, options.flags)
        self._runtime = trt.Runtime(self._log)
        self._runtime.error_recorder = self._recorder
        kept = cache.read(key)
        self._engine = self._runtime.deserialize_cuda_engine(kept) if kept is not None else None
        self.from_cache = self._engine is not None
        if self._engine is None:
            built = build(trt, self._onnx, model, options, timing=cache.read(key.of_timings(), "timing") or b"",
                          log=self._log, tell=tell)
            self._engine = self._runtime.deserialize_cuda_engine(built.engine)
            if self._engine is None:
                raise Unavailable(f"The engine of {self._onnx} does not load on {gpu.name}: {self._recorder.last()}. "
                                  "Check that TensorRT and the driver fit each other (docs/gpu.md).")
            try:
                cache.write(key, built.engine)
                cache.write(key.of_timings(), built.timing, "timing")
            except OSError as error:
                logger.warning("The engine of %s is not kept and will be built again: %s", self._onnx, error)

    def _describe(self, model: Any) -> None:
        trt = self._trt
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self.input_name = next(name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT)
        sides = self._engine.get_tensor_shape(self.input_name)
        self.input_shape = tuple(None if side == -1 else side for side in sides)
        self.batch_is_dynamic = self.input_shape[0] is None
        least, _, most = (self._engine.get_tensor_profile_shape(self.input_name, 0) if self.batch_is_dynamic
                          else [self.input_shape] * 3)
        self._least, self._most = least[0], most[0]
        self._outputs = {}
        for name in (output.name for output in model.graph.output):
            if self._engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
                raise Invalid(f"{self._onnx}: output {name!r} is a shape, no numbers of the image. Export the model "
                              "with its head's raw outputs.")
            self._outputs[name] = self._numpy_type(name)
        self._dtype = self._numpy_type(self.input_name)
        layers = self._engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.ONELINE)
        wanted, running = quantized_layers(model), int8_layers(layers)
        # The same measure as on the CPU: most of what the graph quantises. Layers may have been fused into one.
        is_int8 = is_quantized(model) and running and len(running) * 2 >= len(wanted)
        precision = "int8" if is_int8 else float_type(layers)
        self.report = BackendReport("tensorrt", self._gpu.name, precision, f"tensorrt {trt.__version__}")

    def _numpy_type(self, name: str) -> np.dtype:
        kind = self._engine.get_tensor_dtype(name)
        try:
            return np.dtype(self._trt.nptype(kind))
        except TypeError as error:
            raise Invalid(f"{self._onnx}: {name!r} is {kind}, which NumPy does not know. Export the model with uint8 "
                          "or float32 images and float32 outputs.") from error

    def _release(self) -> None:
        """Frees everything, also what is only half there and after a failure of the GPU."""
        slots, self._slots = self._slots, []
        try:
            with self._gpu.current("free it"):
                for slot in slots:
                    slot.close()
                self._engine = self._runtime = None
        except Unavailable as error:  # the GPU has failed: its driver frees everything when the process ends
            logger.warning("%s is not closed properly: %s", self._onnx, error)
        self._engine = self._runtime = None
        self._gpu.release()


class _Gpu:
    """The primary context of one device, which TensorRT, pycuda and cuda-bindings share."""

    def __init__(self, drv: Any, cu: Any, device: int) -> None:
        self.drv, self.cu = drv, cu
        try:
            drv.init()
            count = drv.Device.count()
            if device >= count:
                raise Unavailable(f"There are {count} GPUs, number {device} is not among them. Check `nvidia-smi`.")
            card = drv.Device(device)
            self.name, self.capability = card.name(), ".".join(map(str, card.compute_capability()))
            self._context = card.retain_primary_context()
        except drv.Error as error:
            raise Unavailable(f"No GPU can be used: {error}. Check `nvidia-smi`; without a GPU choose the backend "
                              "openvino.") from error
        # pycuda only knows the CUDA version of the driver; engines depend on the driver itself.
        version = Path("/proc/driver/nvidia/version")
        self.driver = f"{drv.get_driver_version()} {version.read_text().splitlines()[0] if version.exists() else ''}"

    @contextmanager
    def current(self, doing: str) -> Iterator[None]:
        """Makes the context this thread's while something is done; errors of CUDA become Unavailable."""
        try:
            self._context.push()
            try:
                yield
            finally:
                self.drv.Context.pop()
        except self.drv.MemoryError as error:
            raise Unavailable(f"{self.name} has not enough memory to {doing}: {error}. Free memory (`nvidia-smi` shows "
                              "who holds it) or use smaller batches.") from error
        except (self.drv.Error, RuntimeError) as error:
            raise Unavailable(f"{self.name} failed to {doing}: {error}. Check `nvidia-smi`; a GPU that has failed once "
                              "needs this process to be started again.") from error

    def check(self, answer: tuple[Any, ...]) -> Any:
        """What a function of cuda-bindings gave, (status, value); raises RuntimeError for a failure."""
        status, *value = answer
        if status != self.cu.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"CUDA says {status.name}")
        return value[0] if value else None

    def release(self) -> None:
        """Gives the context back. pycuda does so only while it is current, and then leaves it on the driver's stack."""
        try:
            self._context.push()
            self._context.detach()
            self.check(self.cu.cuCtxPopCurrent())
        except (self.drv.Error, RuntimeError) as error:
            logger.warning("The context of %s is not given back: %s", self.name, error)


@dataclass
class _Ready:
    """What runs batches of one shape. Nothing in it may change once its graph is captured (TensorRT, developer guide,
    CUDA graphs), so every shape has an execution context of its own."""

    context: Any = None
    given: np.ndarray | None = None
    input_address: Any = None
    outputs: dict[str, tuple[np.ndarray, Any]] = field(default_factory=dict)
    graph: Any = None


class _Slot:
    """One stream with its buffers; used by one thread at a time."""

    def __init__(self, owner: TensorRT) -> None:
        self._owner, self._gpu = owner, owner._gpu
        self._ready: OrderedDict[tuple[int, ...], _Ready] = OrderedDict()
        # Tensor name -> (pinned bytes here, bytes on the GPU).
        self._buffers: dict[str, tuple[np.ndarray, Any]] = {}
        # What layers keep for each other; the contexts of a slot share it, since they never run at once.
        self._scratch, self._scratch_bytes = None, 0
        self._stream = self._done = None

    def open(self) -> None:
        """Also runs the smallest batch: what does not run is told now."""
        drv, shape = self._gpu.drv, self._owner.input_shape
        self._stream = drv.Stream(NON_BLOCKING)
        # Waiting for it sleeps instead of spinning: the cores are needed to decode images.
        self._done = drv.Event(drv.event_flags.BLOCKING_SYNC | drv.event_flags.DISABLE_TIMING)
        self.ready((self._owner._least, *shape[1:]))

    def run(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        ready = self.ready(batch.shape)
        np.copyto(ready.given, batch)
        if ready.graph is None:
            self._enqueue(ready)
        else:
            self._gpu.check(self._gpu.cu.cuGraphLaunch(ready.graph, self._stream.handle))
        self._wait()
        # Copied: the next batch writes into the same memory.
        return {name: np.array(host, np.float32) for name, (host, _) in ready.outputs.items()}

    def ready(self, shape: tuple[int, ...]) -> _Ready:
        """What runs batches of this shape, made on first use; the one unused longest goes when there are too many."""
        if shape not in self._ready:
            while len(self._ready) >= MOST_SIZES:
                self._drop(next(iter(self._ready)))
            try:
                self._make(shape)
            except BaseException:
                self._drop(shape)
                raise
        self._ready.move_to_end(shape)
        return self._ready[shape]

    def close(self) -> None:
        """Frees everything now: a traceback may hold what would be freed with its last reference."""
        for shape in list(self._ready):
            self._drop(shape)
        self._free_buffers()
        self._stream = self._done = None

    def _make(self, shape: tuple[int, ...]) -> None:
        ready = self._ready[shape] = _Ready()
        with self._owner._creating:
            ready.context = self._owner._engine.create_execution_context(
                self._owner._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if ready.context is None:
            raise Unavailable("TensorRT cannot make an execution context. Free GPU memory (`nvidia-smi` shows who "
                              "holds it) or use smaller batches.")
        self._bind(ready, shape)
        # TensorRT settles what depends on the shape in a first run, which no graph may hold.
        ready.given[...] = 0
        self._enqueue(ready)
        self._wait()
        if self._owner._graphs:
            try:
                self._capture(ready)
            except (RuntimeError, self._gpu.drv.Error) as error:
                # Some operations cannot be captured; such a model runs all the same.
                self._owner._graphs, self._owner.graph_failure = False, str(error)
                logger.warning("CUDA graphs are off: %s", error)
                self._drop(shape)
                self._make(shape)

    def _bind(self, ready: _Ready, shape: tuple[int, ...]) -> None:
        """Tells the context its shapes and where everything lies."""
        if ready.context.active_optimization_profile != 0 and not ready.context.set_optimization_profile_async(
                0, self._stream.handle):
            raise Unavailable("TensorRT does not share a profile between contexts. Install a later TensorRT.")
        given = self._owner.input_name
        if not ready.context.set_input_shape(given, shape):
            raise Invalid(f"The engine does not take a batch of {shape}; its profile begins with {self._owner._least}.")
        kinds = {given: self._owner._dtype, **self._owner._outputs}
        shapes = {name: shape if name == given else tuple(ready.context.get_tensor_shape(name)) for name in kinds}
        for name, sides in shapes.items():
            if min(sides, default=0) < 0:
                raise Invalid(f"The size of output {name!r} depends on what the image shows: {sides}. Export the model "
                              "with its head's raw outputs.")
        sizes = {name: math.prod(sides) * kinds[name].itemsize for name, sides in shapes.items()}
        self._reserve(sizes, ready.context.update_device_memory_size_for_shapes(), ready)
        ready.context.set_device_memory(int(self._scratch), self._scratch_bytes)
        for name, sides in shapes.items():
            host, address = self._buffers[name]
            ready.outputs[name] = host[:sizes[name]].view(kinds[name]).reshape(sides), address
            if not ready.context.set_tensor_address(name, int(address)):
                raise Unavailable(f"TensorRT does not take the buffer of {name!r}. Install a later TensorRT.")
        ready.given, ready.input_address = ready.outputs.pop(given)

    def _reserve(self, sizes: dict[str, int], scratch_bytes: int, but: _Ready) -> None:
        """Buffers only grow; what was captured with the smaller ones goes with them."""
        held = {name: host.nbytes for name, (host, _) in self._buffers.items()}
        if self._scratch is not None and self._scratch_bytes >= scratch_bytes and all(
                held.get(name, 0) >= size for name, size in sizes.items()):
            return
        for shape in [shape for shape, ready in self._ready.items() if ready is not but]:
            self._drop(shape)
        self._free_buffers()
        drv = self._gpu.drv
        for name, size in sizes.items():
            size = max(size, held.get(name, 0), 1)
            self._buffers[name] = drv.pagelocked_empty(size, np.uint8), drv.mem_alloc(size)
        self._scratch_bytes = max(self._scratch_bytes, scratch_bytes)
        self._scratch = drv.mem_alloc(max(self._scratch_bytes, 1))

    def _free_buffers(self) -> None:
        for host, address in self._buffers.values():
            address.free()
            host.base.free()
        self._buffers.clear()
        if self._scratch is not None:
            self._scratch.free()
            self._scratch = None

    def _enqueue(self, ready: _Ready) -> None:
        drv = self._gpu.drv
        drv.memcpy_htod_async(ready.input_address, ready.given, self._stream)
        if not ready.context.execute_async_v3(self._stream.handle):
            raise RuntimeError(f"TensorRT refused to run: {self._owner._recorder.last()}")
        for host, address in ready.outputs.values():
            if host.size:
                drv.memcpy_dtoh_async(host, address, self._stream)

    def _wait(self) -> None:
        self._done.record(self._stream)
        self._done.synchronize()

    def _capture(self, ready: _Ready) -> None:
        """Makes the graph of a batch. Thread-local: what other threads do meanwhile, allocating for instance, is no
        part of it and does not break it."""
        cu, check, stream = self._gpu.cu, self._gpu.check, self._stream.handle
        check(cu.cuStreamBeginCapture(stream, cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL))
        try:
            self._enqueue(ready)
        finally:
            ended = cu.cuStreamEndCapture(stream)
        graph = check(ended)
        try:
            ready.graph = check(cu.cuGraphInstantiate(graph, 0))
        finally:
            cu.cuGraphDestroy(graph)

    def _drop(self, shape: tuple[int, ...]) -> None:
        ready = self._ready.pop(shape, None)
        if ready is None:
            return
        if ready.graph is not None:
            # Its status says nothing that could be helped: what is left goes with the context.
            self._gpu.cu.cuGraphExecDestroy(ready.graph)
        ready.context = ready.given = ready.input_address = ready.graph = None
        ready.outputs.clear()


def rtx_library() -> Any:
    """The module tensorrt_rtx, whose builder needs no GPU: what it builds shows that a graph can be built, not that it
    runs. Raises Unavailable where it is not installed."""
    try:
        try:
            import tensorrt_rtx as library  # the whole package, which needs a download from its vendor
        except ImportError:
            import tensorrt_rtx_bindings as library
    except ImportError as error:
        raise Unavailable(f"TensorRT for RTX is not installed ({error}). Run: pip install tensorrt-rtx-cu13-libs "
                          "tensorrt-rtx-cu13-bindings") from error
    return library


def _libraries() -> tuple[Any, Any, Any]:
    """(tensorrt, pycuda.driver, cuda.bindings.driver); raises Unavailable naming the first that is missing."""
    try:
        import tensorrt
    except (ImportError, OSError) as error:
        raise Unavailable(f"TensorRT is not installed ({error}). {INSTALL}, or choose the backend openvino.") from error
    version = tuple(int(part) for part in tensorrt.__version__.split(".")[:2])
    if version < LEAST_VERSION:
        raise Unavailable(f"TensorRT {tensorrt.__version__} is too old; 10.16 or later is needed. {INSTALL}.")
    try:
        from pycuda import driver as drv
    except ImportError as error:
        if "libcuda" in str(error):
            raise Unavailable(f"There is no NVIDIA driver here ({error}). Install it, or choose the backend "
                              "openvino.") from error
        raise Unavailable(f"pycuda is not installed ({error}). {INSTALL}, or choose the backend openvino.") from error
    try:
        from cuda.bindings import driver as cu
    except ImportError as error:
        raise Unavailable(f"cuda-bindings is not installed ({error}). {INSTALL}.") from error
    return tensorrt, drv, cu

"""Doubles of tensorrt, pycuda.driver and cuda.bindings.driver for what can be tested of the adapter without a GPU: who
holds which slot, which thread has which context, what is freed. They compute with ONNX Runtime on the CPU and
say nothing about whether TensorRT runs."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from enum import IntEnum
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

KINDS = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.UINT8: np.uint8, onnx.TensorProto.INT64: np.int64}


class Gpu:
    """One card: `live` counts what is allocated, `fail` names calls that fail, `most_at_once` the batches in flight."""

    def __init__(self) -> None:
        self.live: Counter[str] = Counter()
        self.fail: set[str] = set()
        self.builds = self.launches = self.running = self.most_at_once = 0
        self.layers = "Layers:\nName: a, LayerType: kgen, Inputs: [ { Datatype: Float }], Outputs: []"
        self.streams: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self.local, self.lock = threading.local(), threading.Lock()
        self.delay_s = 0.0
        self.tensorrt = self._tensorrt()
        self.driver, self.bindings = self._driver(), self._bindings()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Gpu:
        modules = {"tensorrt": self.tensorrt, "pycuda": ModuleType("pycuda"), "pycuda.driver": self.driver,
                   "cuda.bindings": ModuleType("cuda.bindings"), "cuda.bindings.driver": self.bindings}
        modules["pycuda"].driver, modules["cuda.bindings"].driver = self.driver, self.bindings
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        return self

    def call(self, name: str) -> None:
        if not getattr(self.local, "stack", []):
            raise AssertionError(f"{name} without a current context")
        if name in self.fail:
            raise self.driver.MemoryError(f"{name} failed")

    @staticmethod
    def forget(error: BaseException | None) -> None:
        """Clears the frames of this file in a traceback: the real libraries leave none."""
        while error is not None:
            trace = error.__traceback__
            while trace is not None:
                if trace.tb_frame.f_code.co_filename == __file__:
                    trace.tb_frame.clear()
                trace = trace.tb_next
            error = error.__cause__ or error.__context__

    def enqueue(self, handle: int, work: Callable[[], None]) -> None:
        stream = self.streams[handle]
        work() if stream.captured is None else stream.captured.append(work)

    def _compute(self, work: Callable[[], None]) -> None:
        with self.lock:
            self.running += 1
            self.most_at_once = max(self.most_at_once, self.running)
        time.sleep(self.delay_s)
        work()
        with self.lock:
            self.running -= 1

    def _driver(self) -> ModuleType:
        gpu, driver = self, ModuleType("pycuda.driver")

        class Counted:
            held = False

            def __init__(self, *args: Any) -> None:
                gpu.call(self.kind)
                gpu.live[self.kind] += 1
                self.held = True

            def __del__(self) -> None:
                self.free()

            def free(self) -> None:
                if self.held:
                    gpu.live[self.kind] -= 1
                self.held = False

        class Memory(Counted):
            kind = "mem_alloc"

            def __init__(self, size: int) -> None:
                super().__init__()
                self.bytes = np.zeros(size, np.uint8)
                self.__array_interface__ = self.bytes.__array_interface__

            def __int__(self) -> int:
                return self.bytes.ctypes.data

        class Pinned(Memory):
            kind = "pagelocked_empty"

        class Stream(Counted):
            kind = "Stream"

            def __init__(self, flags: int) -> None:
                super().__init__()
                self.handle, self.captured = id(self), None
                gpu.streams[self.handle] = self

        class Event(Counted):
            kind = "Event"

            def record(self, stream: Any) -> None:
                assert stream.captured is None

            def synchronize(self) -> None:
                gpu.call("synchronize")

        class Context:
            valid = True

            def push(self) -> None:
                gpu.local.stack = [*getattr(gpu.local, "stack", []), self]

            @staticmethod
            def pop() -> None:
                gpu.local.stack.pop()

            def detach(self) -> None:
                gpu.live["context"] -= 1

        class Device:
            def __init__(self, number: int) -> None: ...

            count = staticmethod(lambda: 1)

            def name(self) -> str:
                return "double"

            def compute_capability(self) -> tuple[int, int]:
                return (8, 6)

            def retain_primary_context(self) -> Context:
                gpu.live["context"] += 1
                return Context()

        class Error(Exception): ...

        class MemoryError(Error): ...  # noqa: A001 - as pycuda names it

        def copy(to: int, source: int, size: int, stream: Any) -> None:
            gpu.call("memcpy")
            gpu.enqueue(stream.handle, lambda: ctypes.memmove(to, source, size))

        driver.Error, driver.MemoryError, driver.Stream, driver.Event = Error, MemoryError, Stream, Event
        driver.Context, driver.Device, driver.mem_alloc = Context, Device, Memory
        driver.init, driver.get_driver_version = lambda: None, lambda: 13000
        driver.event_flags = SimpleNamespace(BLOCKING_SYNC=1, DISABLE_TIMING=2)
        driver.pagelocked_empty = lambda size, kind: np.asarray(Pinned(size))
        driver.memcpy_htod_async = lambda to, host, stream: copy(int(to), host.ctypes.data, host.nbytes, stream)
        driver.memcpy_dtoh_async = lambda host, source, stream: copy(host.ctypes.data, int(source), host.nbytes, stream)
        return driver

    def _bindings(self) -> ModuleType:
        gpu, cu = self, ModuleType("cuda.bindings.driver")

        class CUresult(IntEnum):
            CUDA_SUCCESS = 0
            CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900

        def begin(handle: int, mode: int) -> tuple[CUresult]:
            if "capture" in gpu.fail:
                return (CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
            gpu.streams[handle].captured = []
            return (CUresult.CUDA_SUCCESS,)

        def end(handle: int) -> tuple[CUresult, Any]:
            captured, gpu.streams[handle].captured = gpu.streams[handle].captured, None
            gpu.live["graph"] += 1
            return CUresult.CUDA_SUCCESS, captured

        def instantiate(graph: Any, flags: int) -> tuple[CUresult, Any]:
            gpu.live["executable"] += 1
            return CUresult.CUDA_SUCCESS, graph

        def launch(graph: Any, handle: int) -> tuple[CUresult]:
            gpu.launches += 1
            for work in graph:
                work()
            return (CUresult.CUDA_SUCCESS,)

        def freed(what: str) -> Callable[[Any], tuple[CUresult]]:
            return lambda _: (gpu.live.subtract([what]), (CUresult.CUDA_SUCCESS,))[1]

        cu.CUresult = CUresult
        cu.CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
        cu.cuStreamBeginCapture, cu.cuStreamEndCapture, cu.cuGraphInstantiate = begin, end, instantiate
        cu.cuGraphLaunch, cu.cuGraphDestroy, cu.cuGraphExecDestroy = launch, freed("graph"), freed("executable")
        cu.cuCtxPopCurrent = lambda: (CUresult.CUDA_SUCCESS, gpu.local.stack.pop())
        return cu

    def _tensorrt(self) -> ModuleType:
        gpu, trt = self, ModuleType("tensorrt")

        class Dims(tuple): ...

        class Tensor:
            def __init__(self, value: onnx.ValueInfoProto) -> None:
                kind = value.type.tensor_type
                self.name, self.dtype = value.name, KINDS[kind.elem_type]
                self.shape = Dims(side.dim_value or -1 for side in kind.shape.dim)

        class Network:
            num_layers = 0
            num_inputs = property(lambda self: len(self.model.graph.input))

            def get_input(self, index: int) -> Tensor:
                return Tensor(self.model.graph.input[0])

        class Parser:
            num_errors = 0

            def __init__(self, network: Network, log: Any) -> None:
                self.network = network

            def parse(self, data: bytes) -> bool:
                self.network.model = onnx.load_model_from_string(data)
                return True

        class Config:
            def __getattr__(self, name: str) -> Any:
                return lambda *args: gpu.tensorrt.Timing()

            def add_optimization_profile(self, profile: Any) -> int:
                self.profile = profile.shapes
                return 0

        class Profile:
            def set_shape(self, name: str, *shapes: Any) -> None:
                self.shapes = shapes

        class Builder:
            def __init__(self, log: Any) -> None:
                gpu.call("Builder")

            create_network = staticmethod(lambda flags: Network())
            create_builder_config, create_optimization_profile = staticmethod(Config), staticmethod(Profile)

            def build_serialized_network(self, network: Network, config: Config) -> bytes:
                gpu.builds += 1
                most = config.__dict__.get("profile", ((0,),))[-1][0]
                return b"ftrt" + most.to_bytes(4, "little") + network.model.SerializeToString()

        class Runtime:
            def __init__(self, log: Any) -> None: ...

            def deserialize_cuda_engine(self, data: bytes) -> Any:
                return None if "deserialize" in gpu.fail else Engine(data)

        class Engine:
            def __init__(self, data: bytes) -> None:
                gpu.live["engine"] += 1
                self.most, self.model = int.from_bytes(data[4:8], "little"), onnx.load_model_from_string(data[8:])
                settings = onnxruntime.SessionOptions()
                settings.intra_op_num_threads, settings.log_severity_level = 1, 3
                self.evaluator = onnxruntime.InferenceSession(data[8:], settings, providers=["CPUExecutionProvider"])
                values = (*self.model.graph.input, *self.model.graph.output)
                self.tensors = {value.name: Tensor(value) for value in values}
                self.num_io_tensors = len(self.tensors)

            def __del__(self) -> None:
                gpu.live["engine"] -= 1

            def get_tensor_name(self, index: int) -> str:
                return list(self.tensors)[index]

            def get_tensor_mode(self, name: str) -> str:
                return "INPUT" if name == self.model.graph.input[0].name else "OUTPUT"

            def get_tensor_shape(self, name: str) -> Dims:
                return self.tensors[name].shape

            def get_tensor_dtype(self, name: str) -> Any:
                return self.tensors[name].dtype

            def get_tensor_location(self, name: str) -> str:
                return "DEVICE"

            def get_tensor_profile_shape(self, name: str, index: int) -> list[Any]:
                return [(images, *self.tensors[name].shape[1:]) for images in (1, 1, self.most)]

            def create_engine_inspector(self) -> Any:
                return SimpleNamespace(get_engine_information=lambda form: gpu.layers)

            def create_execution_context(self, strategy: Any) -> ExecutionContext:
                gpu.call("create_execution_context")
                return ExecutionContext(self)

        class ExecutionContext:
            active_optimization_profile = 0

            def __init__(self, engine: Engine) -> None:
                gpu.live["execution context"] += 1
                self.engine, self.addresses, self.shapes = engine, {}, {}

            def __del__(self) -> None:
                gpu.live["execution context"] -= 1

            def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
                if not all(1 <= side for side in shape) or self.engine.most and shape[0] > self.engine.most:
                    return False
                self.given = self.engine.evaluator.run(None, {name: np.zeros(shape, self.engine.tensors[name].dtype)})
                self.shapes = {name: shape, **{output.name: value.shape for output, value in zip(
                    self.engine.model.graph.output, self.given)}}
                return True

            def get_tensor_shape(self, name: str) -> Dims:
                return Dims(self.shapes[name])

            def update_device_memory_size_for_shapes(self) -> int:
                return 64 * next(iter(self.shapes.values()))[0]

            def set_device_memory(self, address: int, size: int) -> None:
                assert size >= self.update_device_memory_size_for_shapes()

            def set_tensor_address(self, name: str, address: int) -> bool:
                self.addresses[name] = address
                return True

            def execute_async_v3(self, handle: int) -> bool:
                if "execute" in gpu.fail:
                    return False
                gpu.enqueue(handle, lambda: gpu._compute(self._run))
                return True

            def _run(self) -> None:
                given, *_ = self.engine.model.graph.input
                found = self.engine.evaluator.run(None, {given.name: self._view(given.name).copy()})
                for output, value in zip(self.engine.model.graph.output, found):
                    self._view(output.name)[...] = value

            def _view(self, name: str) -> np.ndarray:
                kind, shape = np.dtype(self.engine.tensors[name].dtype), self.shapes[name]
                size = int(np.prod(shape)) * kind.itemsize
                return np.frombuffer((ctypes.c_uint8 * size).from_address(self.addresses[name]), kind).reshape(shape)

        class Listener: ...

        class ILogger(Listener):
            Severity = IntEnum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING"])

        trt.__version__ = "11.4.0"
        trt.ILogger, trt.IErrorRecorder, trt.IProgressMonitor = ILogger, Listener, Listener
        trt.Timing = lambda: SimpleNamespace(serialize=lambda: b"timings")
        trt.Builder, trt.OnnxParser, trt.Runtime, trt.IExecutionContext = Builder, Parser, Runtime, ExecutionContext
        trt.NetworkDefinitionCreationFlag = IntEnum("Flag", {"STRONGLY_TYPED": 1})
        trt.BuilderFlag, trt.MemoryPoolType = SimpleNamespace(TF32=1), SimpleNamespace(WORKSPACE=0)
        trt.ProfilingVerbosity = SimpleNamespace(DETAILED=2)
        trt.TensorIOMode, trt.TensorLocation = SimpleNamespace(INPUT="INPUT"), SimpleNamespace(DEVICE="DEVICE")
        trt.LayerInformationFormat = SimpleNamespace(ONELINE=0)
        trt.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED=2)
        trt.nptype = lambda kind: kind
        return trt

"""ONNX Runtime: runs a model's graph on the CPU."""

from __future__ import annotations

import os
import platform
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np

from workbench.errors import Invalid, Unavailable
from workbench.inference.graph import Graph, quantized_layers, read_graph
from workbench.inference.unsigned import unsigned_activations
from workbench.ports import BackendReport

DTYPES = {
    "tensor(float)": np.float32,
    "tensor(uint8)": np.uint8,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(double)": np.float64,
}
# What its optimiser makes of quantised layers (docs/ContribOperators.md).
INT8_KERNELS = ("QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat",
                "DynamicQuantizeMatMul")


class OnnxRuntime:
    """Backend of ONNX Runtime's CPU provider.

    onnx     the file, or a graph in memory
    threads  0: one per core
    streams  runs at once, each in its caller's thread, with the threads that are left shared; 0: one per thread, which
             gives the most images a second; 1: every run has all threads, which answers soonest
    batch    no matter here: ONNX Runtime's kernels are the same for a fixed and a free batch axis
    """

    def __init__(self, onnx: Path | Graph, threads: int = 0, streams: int = 0, batch: int = 1) -> None:
        # Its first import sends an event and leaves a device id in ~/.cache unless told before (its Privacy.md).
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
        try:
            import onnxruntime
        except ImportError as error:
            raise Unavailable("ONNX Runtime is not installed. Run: pip install onnxruntime") from error
        data, graph = read_graph(onnx)
        threads = threads or os.cpu_count() or 1
        self.streams = streams or threads
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = max(threads - self.streams, 0) + 1, 1
        # Threads that wait for work by spinning take the cores from those that decode images.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        quantized = quantized_layers(graph)
        if quantized and _has_vnni():
            data = unsigned_activations(graph).SerializeToString()
        try:
            with tempfile.TemporaryDirectory(prefix="onnxruntime-") as folder:
                optimized = Path(folder) / "optimized.onnx"
                if quantized:
                    options.optimized_model_filepath = str(optimized)
                session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
                precision = _precision(optimized, len(quantized)) if quantized else "f32"
        except Exception as error:  # its errors share no class of their own
            raise Invalid(
                f"{onnx} cannot be opened by ONNX Runtime: {str(error)[:300]}. Export the graph again."
            ) from error
        if len(session.get_inputs()) != 1:
            raise Invalid(
                f"{onnx} has {len(session.get_inputs())} inputs; a detector must have exactly one, the images."
            )
        given = session.get_inputs()[0]
        if given.type not in DTYPES:
            raise Invalid(
                f"{onnx} takes {given.type}; a detector's images are uint8 or float32. Export the graph again."
            )
        self.input_name = given.name
        self.input_shape = tuple(side if isinstance(side, int) else None for side in given.shape)
        self.batch_is_dynamic = bool(self.input_shape) and self.input_shape[0] is None
        self._onnx, self._session, self._dtype = onnx, session, np.dtype(DTYPES[given.type])
        self._outputs = [output.name for output in session.get_outputs()]
        self._slots = threading.BoundedSemaphore(self.streams)
        self.report = BackendReport("onnxruntime", platform.processor() or platform.machine() or "CPU", precision,
                                    f"onnxruntime {onnxruntime.__version__}")

    def __enter__(self) -> OnnxRuntime:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._session = None

    def run(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        with self._slots:
            session = self._session  # a run under way keeps it alive when another thread closes the backend
            if session is None:
                raise Invalid(f"{self._onnx} is closed; open it again.")
            if batch.dtype != self._dtype or len(batch.shape) != len(self.input_shape) or any(
                    side not in (None, given) for side, given in zip(self.input_shape, batch.shape)) or not batch.size:
                raise Invalid(f"{self._onnx} takes {self._dtype} {self.input_shape}, got {batch.dtype} {batch.shape}.")
            try:
                outputs = session.run(self._outputs, {self.input_name: np.ascontiguousarray(batch)})
            except Exception as error:  # its errors share no class of their own
                raise Invalid(f"{self._onnx} cannot run on {batch.dtype} {batch.shape}: {str(error)[:300]}") from error
        # Every run gives new arrays.
        return {name: np.asarray(output, np.float32) for name, output in zip(self._outputs, outputs)}


def _precision(optimized: Path, quantized: int) -> str:
    """"int8" when most of the layers that the graph quantises became int8 kernels in the graph that really runs."""
    import onnx

    kernels = [node for node in onnx.load(str(optimized), load_external_data=False).graph.node
               if node.op_type in INT8_KERNELS]
    return "int8" if len(kernels) * 2 >= quantized else "f32"


def _has_vnni() -> bool:
    """Whether the CPU multiplies int8 without saturating in between, as its x86 kernels for unsigned activations do
    otherwise (onnxruntime.ai, Quantize ONNX models, "when and why do I need to try U8U8")."""
    flags = Path("/proc/cpuinfo")
    return flags.is_file() and "vnni" in flags.read_text(errors="replace")

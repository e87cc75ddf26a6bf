"""ONNX Runtime: runs a model's graph on the CPU."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy as np

from workbench.errors import Invalid, Unavailable
from workbench.inference.graph import read_graph
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


class OnnxRuntime:
    """Backend of ONNX Runtime's CPU provider.

    threads  0: as many as ONNX Runtime finds
    """

    def __init__(self, onnx: Path, threads: int = 0) -> None:
        # Its first import sends an event and leaves a device id in ~/.cache unless told before (its Privacy.md).
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
        try:
            import onnxruntime
        except ImportError as error:
            raise Unavailable("ONNX Runtime is not installed. Run: pip install onnxruntime") from error
        data, _ = read_graph(onnx)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        try:
            session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
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
        self.report = BackendReport("onnxruntime", platform.processor() or platform.machine() or "CPU", "f32",
                                    f"onnxruntime {onnxruntime.__version__}")

    def __enter__(self) -> OnnxRuntime:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._session = None

    def run(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        if self._session is None:
            raise Invalid(f"{self._onnx} is closed; open it again.")
        if batch.dtype != self._dtype or len(batch.shape) != len(self.input_shape) or any(
                side not in (None, given) for side, given in zip(self.input_shape, batch.shape)) or not batch.size:
            raise Invalid(f"{self._onnx} takes {self._dtype} {self.input_shape}, got {batch.dtype} {batch.shape}.")
        try:
            outputs = self._session.run(self._outputs, {self.input_name: np.ascontiguousarray(batch)})
        except Exception as error:  # its errors share no class of their own
            raise Invalid(f"{self._onnx} cannot run on {batch.dtype} {batch.shape}: {str(error)[:300]}") from error
        return {name: np.array(output, np.float32) for name, output in zip(self._outputs, outputs)}

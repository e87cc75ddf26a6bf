"""OpenVINO: runs a model's graph on the CPU."""

from __future__ import annotations

import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

from workbench.errors import Invalid, Unavailable
from workbench.inference.graph import Graph, quantized_layers, read_graph
from workbench.inference.unsigned import unsigned_activations
from workbench.ports import BackendReport

# What OpenVINO calls the layers that carry weights.
WEIGHTED = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")


class OpenVINO:
    """Backend of OpenVINO's CPU plugin, in float32 wherever the graph does not ask for int8.

    onnx     the file, or a graph in memory
    threads  0: one per core
    streams  runs at once, each on its share of the threads; 0: one per thread, which gives the most images a second;
             1: every run has all threads, which answers soonest
    batch    images of the runs that shall be fast. OpenVINO's kernels for a free batch axis are 6 to 12 % slower than
             those for a fixed one (NanoDet-Plus, YOLOX-nano, 2026.4), so a graph with a free one is compiled for this
             batch, and once more, with the axis free, when another one comes along.
    """

    def __init__(self, onnx: Path | Graph, threads: int = 0, streams: int = 0, batch: int = 1) -> None:
        openvino = _library()
        data, graph = read_graph(onnx)
        if any(node.op_type == "QuantizeLinear" for node in graph.graph.node):
            data = unsigned_activations(graph).SerializeToString()
        threads = threads or os.cpu_count() or 1
        self.streams = streams or threads
        self._settings = {
            # Without the hint OpenVINO computes in bfloat16 where the CPU has it, and boxes move.
            "INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": str(self.streams),
            "INFERENCE_NUM_THREADS": str(max(threads, self.streams)),
            # Between runs the cores decode images; a run bound to one of them would wait for it beside an idle one.
            "ENABLE_CPU_PINNING": "NO"}
        try:
            self._core = openvino.Core()
            self._model = self._core.read_model(model=data, weights=b"")
            if len(self._model.inputs) != 1:
                raise Invalid(
                    f"{onnx} has {len(self._model.inputs)} inputs; a detector must have exactly one, the images."
                )
            _keep_shuffles(self._model, onnx)
            given = self._model.inputs[0]
            sides = given.get_partial_shape()
            self.input_shape = tuple(None if side.is_dynamic else side.get_length() for side in sides)
            self.batch_is_dynamic = bool(self.input_shape) and self.input_shape[0] is None
            self._batch = batch if self.batch_is_dynamic else None
            first = self._model
            if self.batch_is_dynamic:
                first = self._model.clone()
                sides[0] = batch
                first.reshape(sides)
            compiled = self._core.compile_model(first, "CPU", self._settings)
            device = self._core.get_property("CPU", "FULL_DEVICE_NAME")
            precision = _precision(compiled, graph)
        except RuntimeError as error:
            raise Invalid(
                f"{onnx} cannot be opened by OpenVINO: {_short(error)}. Export the graph again, or use the backend "
                "onnxruntime."
            ) from error
        self.input_name = graph.graph.input[-1].name if len(graph.graph.input) == 1 else given.get_any_name()
        self._dtype = np.dtype(given.get_element_type().to_dtype())
        self._onnx, self._openvino = onnx, openvino
        # The order of results is that of the ONNX outputs; OpenVINO's own names may be those of inner tensors.
        self._outputs = [output.name for output in graph.graph.output]
        # batch -> its compiled model, None for any other batch.
        self._compiled = {self._batch: compiled}
        self._compiling = threading.Lock()
        # A slot is one stream: batch -> its infer request. None tells those who wait that the backend is closed.
        self._slots: queue.SimpleQueue[dict[int | None, Any] | None] = queue.SimpleQueue()
        for _ in range(self.streams):
            self._slots.put({})
        self.report = BackendReport(
            "openvino", str(device), precision, f"openvino {openvino.__version__.split('-')[0]}"
        )

    def __enter__(self) -> OpenVINO:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._compiled:
            for _ in range(self.streams):
                self._slots.get()  # waits for the runs under way
            self._slots.put(None)
            self._compiled, self._model = {}, None

    def run(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        if batch.dtype != self._dtype or len(batch.shape) != len(self.input_shape) or any(
                side not in (None, given) for side, given in zip(self.input_shape, batch.shape)) or not batch.size:
            raise Invalid(f"{self._onnx} takes {self._dtype} {self.input_shape}, got {batch.dtype} {batch.shape}.")
        slot = self._slots.get()
        try:
            if slot is None:
                raise Invalid(f"{self._onnx} is closed; open it again.")
            key = self._batch if len(batch) == self._batch else None
            if key not in slot:
                slot[key] = self._compiled_for(key).create_infer_request()
            request = slot[key]
            # It shares memory only with arrays that may be written to.
            given = np.require(batch, requirements=["C_CONTIGUOUS", "WRITEABLE"])
            request.set_input_tensor(self._openvino.Tensor(given, shared_memory=True))
            request.infer()
            # Copied: the request writes its next results into the same memory.
            return {name: np.array(request.get_output_tensor(index).data, np.float32)
                    for index, name in enumerate(self._outputs)}
        except RuntimeError as error:
            raise Invalid(f"{self._onnx} cannot run on {batch.dtype} {batch.shape}: {_short(error)}") from error
        finally:
            self._slots.put(slot)

    def _compiled_for(self, batch: int | None) -> Any:
        with self._compiling:
            if batch not in self._compiled:
                self._compiled[batch] = self._core.compile_model(self._model, "CPU", self._settings)
            return self._compiled[batch]


def _precision(compiled: Any, graph: Any) -> str:
    """"int8" when most of the layers that the graph quantises really run in int8, else "f32"."""
    quantized = len(quantized_layers(graph))
    if not quantized:
        return str(compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())
    running = 0
    for node in compiled.get_runtime_model().get_ordered_ops():
        facts = node.get_rt_info()
        if facts["layerType"].astype(str) in WEIGHTED and facts["runtimePrecision"].astype(str) in ("i8", "u8"):
            running += 1
    return "int8" if running * 2 >= quantized else "f32"


def _library() -> Any:
    """The module, imported without its telemetry.

    `import openvino` tells Google Analytics that it was imported and leaves ~/intel behind, unless the package
    openvino_telemetry cannot be imported: then it takes its own stub (openvino/tools/ovc/telemetry_utils.py).
    """
    hidden = sys.modules.get("openvino_telemetry")
    sys.modules["openvino_telemetry"] = None
    try:
        import openvino
    except ImportError as error:
        raise Unavailable("OpenVINO is not installed. Run: pip install openvino") from error
    finally:
        sys.modules.pop("openvino_telemetry")
        if hidden is not None:
            sys.modules["openvino_telemetry"] = hidden
    return openvino


def _keep_shuffles(model: Any, onnx: Path | Graph) -> None:
    """Rewrites channel shuffles that OpenVINO would compute wrongly.

    Its ReverseInputChannelsFusion folds a Gather that permutes channels into the next convolution, and applies the
    permutation where the inverse is needed (seen in 2026.4.1: NanoDet-Plus loses all its boxes). A permutation that is
    its own inverse (BGR <-> RGB) comes out right; a shuffle becomes the ShuffleChannels operation, which is left alone.
    Raises Invalid for a permutation that is neither.
    """
    from openvino import opset13

    for node in model.get_ordered_ops():
        if node.get_type_name() != "Gather" or any(
            node.input_value(i).get_node().get_type_name() != "Constant" for i in (1, 2)
        ):
            continue
        order, axis = (node.input_value(i).get_node().data.ravel() for i in (1, 2))
        count = len(order)
        if count < 2 or sorted(order) != list(range(count)) or np.array_equal(order[order], np.arange(count)):
            continue
        groups = [g for g in range(2, count) if count % g == 0 and np.array_equal(
            order, np.arange(count).reshape(g, -1).T.ravel())]
        if not groups:
            raise Invalid(
                f"{onnx} permutes channels in node {node.get_friendly_name()!r}, which OpenVINO computes wrongly. "
                "Use the backend onnxruntime for this model."
            )
        shuffled = opset13.shuffle_channels(node.input_value(0), int(axis[0]), groups[0])
        node.output(0).replace(shuffled.output(0))


def _short(error: Exception) -> str:
    """The last line says what happened; the ones before name OpenVINO's source files."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else repr(error))[:300]

"""OpenVINO: runs a model's graph on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from workbench.errors import Invalid, Unavailable
from workbench.inference.graph import read_graph
from workbench.ports import BackendReport


class OpenVINO:
    """Backend of OpenVINO's CPU plugin, always in float32.

    threads  0: as many as OpenVINO finds
    """

    def __init__(self, onnx: Path, threads: int = 0) -> None:
        openvino = _library()
        data, graph = read_graph(onnx)
        settings = {
            # Without the hint OpenVINO computes in bfloat16 where the CPU has it, and boxes move.
            "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}
        if threads:
            settings["INFERENCE_NUM_THREADS"] = str(threads)
        try:
            core = openvino.Core()
            model = core.read_model(model=data, weights=b"")
            if len(model.inputs) != 1:
                raise Invalid(f"{onnx} has {len(model.inputs)} inputs; a detector must have exactly one, the images.")
            _keep_shuffles(model, onnx)
            compiled = core.compile_model(model, "CPU", settings)
            device = core.get_property("CPU", "FULL_DEVICE_NAME")
        except RuntimeError as error:
            raise Invalid(
                f"{onnx} cannot be opened by OpenVINO: {_short(error)}. Export the graph again, or use the backend "
                "onnxruntime."
            ) from error
        given = model.inputs[0]
        self.input_name = graph.graph.input[-1].name if len(graph.graph.input) == 1 else given.get_any_name()
        self.input_shape = tuple(None if side.is_dynamic else side.get_length() for side in given.get_partial_shape())
        self.batch_is_dynamic = bool(self.input_shape) and self.input_shape[0] is None
        self._dtype = np.dtype(given.get_element_type().to_dtype())
        self._onnx, self._compiled = onnx, compiled
        # The order of results is that of the ONNX outputs; OpenVINO's own names may be those of inner tensors.
        self._outputs = [output.name for output in graph.graph.output]
        self._request = compiled.create_infer_request()
        precision = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        self.report = BackendReport(
            "openvino", str(device), str(precision), f"openvino {openvino.__version__.split('-')[0]}"
        )

    def __enter__(self) -> OpenVINO:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._request = self._compiled = None

    def run(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        if self._request is None:
            raise Invalid(f"{self._onnx} is closed; open it again.")
        if batch.dtype != self._dtype or len(batch.shape) != len(self.input_shape) or any(
                side not in (None, given) for side, given in zip(self.input_shape, batch.shape)) or not batch.size:
            raise Invalid(f"{self._onnx} takes {self._dtype} {self.input_shape}, got {batch.dtype} {batch.shape}.")
        try:
            self._request.infer([np.ascontiguousarray(batch)])
        except RuntimeError as error:
            raise Invalid(f"{self._onnx} cannot run on {batch.dtype} {batch.shape}: {_short(error)}") from error
        # Copied: the request writes its next results into the same memory.
        return {name: np.array(self._request.get_output_tensor(index).data, np.float32)
                for index, name in enumerate(self._outputs)}


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


def _keep_shuffles(model: Any, onnx: Path) -> None:
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

"""Engine: a TensorRT engine built from the ONNX graph that every backend runs.

One code for tensorrt (10.16 and 11) and tensorrt_rtx (1.7): the library is handed in, nothing here imports it. Networks
are strongly typed: int8 stands in the graph as Q/DQ nodes and nowhere else, so there is no calibrator and no flag that
lets the library choose a type. TF32 is off: float32 layers compute in float32.
"""

from __future__ import annotations

import logging
import math
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from workbench.errors import Invalid, Unavailable, WorkbenchError
from workbench.inference.graph import Graph

logger = logging.getLogger("workbench.engines")

# What a build tells while it goes on: (phase, steps done, steps); what it raises stops the build and is raised again.
Tell = Callable[[str, int, int], None]

# A batch of 64 images of 640 x 640 px keeps a detector's activations within a few GB.
MOST_IMAGES = 64
MOST_PIXELS = MOST_IMAGES * 640 * 640
# Operations that only move values about: they do to floats what they do to bytes.
MOVING = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Identity",
          "SpaceToDepth", "DepthToSpace")
INT8_AGAIN = "Make the INT8 version here from the FP32 file, which quantises symmetrically and keeps biases in float."
# One layer as the library describes it, in one line.
LAYER = re.compile(r"\s*Name: (?P<name>.*?), LayerType: (?P<type>.*?), Inputs: (?P<inputs>.*?)"
                   r"(?:, Constants: (?P<constants>.*?))?, Outputs: (?P<rest>.*)")
PRODUCT = re.compile(r"conv|correlation|gemm|matmul", re.IGNORECASE)
WEIGHTS = re.compile(r"Weights: \{[^}]*Int8")
OTHER_BACKEND = "Export the model without it, or use the backend onnxruntime or openvino for this model."


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is built; all of it is part of the engine's key.

    batches          (fewest, tuned for, most) images of a run where the graph's batch axis is free; empty: 1, 8 and as
                     many as MOST_IMAGES and MOST_PIXELS allow
    workspace_bytes  GPU memory that the engine may use while it computes
    targets          tensorrt_rtx only: the cards to build for, ("SM75", "SM86"); empty: every card it knows
    """

    batches: tuple[int, ...] = ()
    workspace_bytes: int = 4 << 30
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.batches and (len(self.batches) != 3 or not 1 <= self.batches[0] <= self.batches[1] <= self.batches[2]):
            raise Invalid(f"Engine batches {self.batches} must be (fewest, tuned for, most), each at least 1.")

    @property
    def profile(self) -> str:
        return ",".join(map(str, self.batches)) or f"1,8,{MOST_IMAGES} or {MOST_PIXELS} px"

    @property
    def flags(self) -> str:
        return f"cast first, strongly typed, no TF32, workspace {self.workspace_bytes}, for {','.join(self.targets)}"

    def profile_of(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(fewest, tuned for, most) images of an input of this shape."""
        if self.batches:
            return self.batches[0], self.batches[1], self.batches[2]
        most = max(1, min(MOST_IMAGES, MOST_PIXELS * 3 // math.prod(shape[1:])))
        return 1, min(8, most), most


@dataclass(frozen=True)
class Built:
    """engine, timing  bytes to be kept; layers  what the builder says of the engine's layers, "" when it says nothing
    (its log goes to whoever opened the library first in this process)"""

    engine: bytes
    timing: bytes
    layers: str


def check_dialect(file: Path | Graph, model: Any) -> None:
    """Raises Invalid for what TensorRT would refuse, or take for something else, in an onnx.ModelProto.

    TensorRT reads uint8 Q/DQ nodes as int8 with no more than a warning, and other numbers come out.
    """
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    constants |= {node.output[0]: node.attribute[0].t for node in model.graph.node
                  if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value"}
    for index, node in enumerate(model.graph.node):
        if node.op_type == "NonMaxSuppression":
            raise Invalid(f"{_place(file, index, node.name, node.op_type)} selects boxes inside the graph; the "
                          "workbench does that outside. Export the model with its head's raw outputs.")
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        zero = constants.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        given = constants.get(node.input[0])
        kind = str(numpy_helper.to_array(zero).dtype) if zero is not None else ""
        if node.op_type == "DequantizeLinear" and given is not None:
            kind = str(numpy_helper.to_array(given).dtype)
        if node.op_type == "QuantizeLinear" and zero is None and not any(
                attribute.name == "output_dtype" and attribute.i for attribute in node.attribute):
            kind = "uint8"  # what the operator gives when nothing is said
        if kind in ("uint8", "int16", "uint16", "int32"):
            raise Invalid(f"{_place(file, index, node.name, node.op_type)} holds {kind}; TensorRT computes in int8 "
                          f"with float biases. {INT8_AGAIN}")
        if zero is not None and numpy_helper.to_array(zero).astype("float32").any():
            raise Invalid(f"{_place(file, index, node.name, node.op_type)} has a zero point other than 0. {INT8_AGAIN}")


def cast_first(model: Any) -> Any:
    """The graph with its uint8 images made float32 by the very first node; the same graph where that is so already.

    TensorRT takes uint8 into a network but computes nothing with it, while exporters like to transpose the bytes before
    they cast them. Moving 0..255 about as floats changes no number.
    """
    import onnx
    from onnx import TensorProto, helper

    given = model.graph.input[0]
    if given.type.tensor_type.elem_type != TensorProto.UINT8:
        return model
    bytes_still, moved = {given.name}, False
    for node in model.graph.node:
        # To ask for its shape is no computing with it.
        if bytes_still.isdisjoint(node.input) or node.op_type in ("Cast", "Shape"):
            continue
        if node.op_type not in MOVING or node.input[0] not in bytes_still:
            return model  # something really computes with bytes: the parser names it
        bytes_still |= set(node.output)
        moved = True
    if not moved:
        return model
    made = onnx.ModelProto()
    made.CopyFrom(model)
    floats = f"{given.name}_as_float32"
    for node in made.graph.node:
        node.input[:] = [floats if name == given.name else name for name in node.input]
    made.graph.node.insert(0, helper.make_node("Cast", [given.name], [floats], name=floats, to=TensorProto.FLOAT))
    del made.graph.value_info[:]  # some say uint8
    return made


def build(trt: Any, file: Path | Graph, model: Any, options: EngineOptions | None = None, *, timing: bytes = b"",
          log: Any = None, tell: Tell | None = None) -> Built:
    """Builds the engine of a graph.

    trt      the module tensorrt or tensorrt_rtx; the first needs a GPU, the second builds without one
    file     names the graph in errors
    model    the onnx.ModelProto that workbench.inference.graph.read_graph gives
    timing   what an earlier build of this card measured
    log      a logger of `log_of(trt)` that other objects of the library share

    Where memory does not suffice and `options` leave the batches open, half as many images are tried. Raises Invalid,
    naming file, node and next step, for a graph the library cannot build; Unavailable when it cannot work here.
    """
    check_dialect(file, model)
    options, data = options or EngineOptions(), cast_first(model).SerializeToString()
    may_shrink = not options.batches
    # These outlive what they are set on in _attempt.
    log, recorder, monitor = log or log_of(trt), recorder_of(trt), _monitor_of(trt, tell) if tell else None
    while True:
        try:
            return _attempt(trt, file, data, options, timing, log, recorder, monitor)
        except _OutOfMemory as error:
            if not error.fewer or not may_shrink:
                raise
            logger.warning("%s Trying at most %d images.", error, error.fewer)
            options = replace(options, batches=(1, min(8, error.fewer), error.fewer))
            recorder.clear()


class _OutOfMemory(Unavailable):
    """fewer  images of the next attempt; 0 when there is none"""

    fewer = 0


def _attempt(trt: Any, file: Path | Graph, data: bytes, options: EngineOptions, timing: bytes, log: Any, recorder: Any,
             monitor: Any) -> Built:
    version = f"{trt.__name__.removesuffix('_bindings')} {trt.__version__}"
    try:
        builder = trt.Builder(log)
    except (TypeError, RuntimeError) as error:  # the constructor got nothing from the library
        raise Unavailable(f"{version} finds no GPU to build on: {log.last() or error}. Check `nvidia-smi`.") from error
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(data):
        raise _refused(file, version, parser)
    # Only now: a parser whose network has a recorder crashes when it is freed (seen in tensorrt_rtx 1.7.1).
    builder.error_recorder = recorder
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    # Detailed, so that the engine can be asked which of its layers compute in int8.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.targets:
        config.num_compute_capabilities = len(options.targets)
        for index, target in enumerate(options.targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target), index)
    most = _set_profile(file, builder, network, config, options)
    # The timing cache of TensorRT for RTX does nothing; its methods warn.
    keeps_timings = not trt.__name__.startswith("tensorrt_rtx")
    for kept in (timing, b"") if keeps_timings else ():
        timings = config.create_timing_cache(kept)
        if timings is not None and config.set_timing_cache(timings, False):
            break
    if monitor is not None:
        config.progress_monitor = monitor
    engine = builder.build_serialized_network(network, config)
    if monitor is not None and monitor.failure is not None:
        raise monitor.failure
    if engine is None:
        error = _failed(file, version, recorder.last() or log.last(), network)
        if isinstance(error, _OutOfMemory):
            error.fewer = most // 2
        raise error
    return Built(bytes(engine), bytes(config.get_timing_cache().serialize()) if keeps_timings else b"", log.layers)


def int8_layers(layers: str) -> list[str]:
    """Names of the layers that compute in int8, from the library's own description of an engine, one line a layer (its
    inspector's form ONELINE). Such a layer takes int8 and is a convolution or a product of matrices, or has int8
    weights; one that only converts to int8 or back is none."""
    found = []
    for line in layers.splitlines():
        told = LAYER.match(line)
        if told and "Int8" in told["inputs"] and (
                PRODUCT.search(told["type"]) or "Int8" in (told["constants"] or "") or WEIGHTS.search(told["rest"])):
            found.append(told["name"])
    return found


def float_type(layers: str) -> str:
    """"f16" or "bf16" when a layer of the description takes such numbers, else "f32"."""
    inputs = " ".join(told["inputs"] for line in layers.splitlines() if (told := LAYER.match(line)))
    return "bf16" if re.search("BFloat16|BF16", inputs) else "f16" if re.search("Half|FP16", inputs) else "f32"


def log_of(trt: Any) -> Any:
    """A logger that keeps the last errors and what the builder says of the layers. The library has one logger in a
    process: while an object made with another one lives, this one hears nothing."""
    worst = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=20)
            self.layers = ""

        def log(self, severity: Any, text: str) -> None:
            if severity in worst:
                self.errors.append(text)
            elif text.startswith("Layers:"):
                self.layers += text + "\n"

        def last(self) -> str:
            return _plain(self.errors[-1]) if self.errors else ""

    return Log()


def recorder_of(trt: Any) -> Any:
    """Keeps the errors of the objects it is set on (`error_recorder`), whoever has the process' logger; it must outlive
    them."""
    class Recorder(trt.IErrorRecorder):
        def __init__(self) -> None:
            trt.IErrorRecorder.__init__(self)
            self.errors: list[tuple[Any, str]] = []

        def num_errors(self) -> int:
            return len(self.errors)

        def get_error_code(self, index: int) -> Any:
            return self.errors[index][0]

        def get_error_desc(self, index: int) -> str:
            return self.errors[index][1]

        def has_overflowed(self) -> bool:
            return False

        def clear(self) -> None:
            self.errors.clear()

        def report_error(self, code: Any, text: str) -> bool:
            self.errors = [*self.errors[-19:], (code, text)]
            return False  # the library decides itself whether it goes on

        def last(self) -> str:
            return _plain(self.errors[-1][1]) if self.errors else ""

    return Recorder()


def _monitor_of(trt: Any, tell: Tell) -> Any:
    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.failure: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                tell(phase_name, step + 1, self.steps.get(phase_name, 0))
            except BaseException as failure:  # an exception may not pass through the library
                self.failure = failure
            return self.failure is None

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def _set_profile(file: Path | Graph, builder: Any, network: Any, config: Any, options: EngineOptions) -> int:
    """Returns the most images of a run, 0 where the graph fixes them."""
    if network.num_inputs != 1:
        raise Invalid(f"{file} has {network.num_inputs} inputs; a detector must have exactly one, the images.")
    given = network.get_input(0)
    shape = tuple(given.shape)
    if -1 in shape[1:]:
        raise Invalid(f"{file} leaves sides of its input {given.name!r} free: {shape}. TensorRT needs all but the "
                      "batch fixed: export the model with its height and width.")
    if not shape or shape[0] != -1:
        return 0
    profile = builder.create_optimization_profile()
    profile.set_shape(given.name, *((images, *shape[1:]) for images in options.profile_of(shape)))
    config.add_optimization_profile(profile)
    return options.profile_of(shape)[2]


def _refused(file: Path | Graph, version: str, parser: Any) -> WorkbenchError:
    """What the parser says, of the first node it stumbled over."""
    if not parser.num_errors:
        return Invalid(f"{file} cannot be read by {version}. Export the model again.")
    error = parser.get_error(0)
    operator, why = error.node_operator(), _plain(error.desc())
    # For an operator that nobody knows the parser looks for a plugin and says that there is none.
    if not why or why == "false" or "lugin" in why:
        why = "it has no such operator"
    step = INT8_AGAIN if operator in ("QuantizeLinear", "DequantizeLinear") else OTHER_BACKEND
    place = _place(file, error.node(), error.node_name(), operator)
    return Invalid(f"{place} cannot be built by {version}: {why}. {step}")


def _failed(file: Path | Graph, version: str, why: str, network: Any) -> WorkbenchError:
    if re.search(r"out of memory|OutOfMemory|insufficient memory", why, re.IGNORECASE):
        return _OutOfMemory(f"{version} ran out of memory while it built {file}: {why}. Free GPU memory (`nvidia-smi` "
                            "shows who holds it) or ask for smaller batches.")
    if re.search(r"Cuda (Runtime|Driver|Error)|cudaError", why, re.IGNORECASE):
        return Unavailable(f"{version} cannot use the GPU while it builds {file}: {why}. Check `nvidia-smi`.")
    # The library names its layers after the graph's nodes.
    layers = (network.get_layer(index) for index in range(network.num_layers))
    node = next((f" layer {layer.name!r} ({layer.type.name})" for layer in layers if layer.name in why), "")
    return Invalid(f"{file}:{node} cannot be built by {version}: {why}. {OTHER_BACKEND}")


def _place(file: Path | Graph, index: int, name: str, operator: str) -> str:
    return f"{file}: node {index} {name!r} ({operator})"


def _plain(text: str) -> str:
    """The first line that says something, without the places in the library's own sources."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = next((line for line in lines if not line.startswith("Invalid Node")), "")
    first = re.sub(r"\s*In \w+ at /\S+\)", ")", re.sub(r"^\[[\w.:]+\]\s*", "", first))
    return first[:300].rstrip(".")

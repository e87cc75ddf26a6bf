"""Model files from outside: verified before anything opens them, and an ONNX graph read from those very bytes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from workbench.errors import Invalid, NotFound
from workbench.model import ModelCard

# TensorRT's plan files begin with "ftrt" or "ptrt", those of TensorRT for RTX with "vtrt".
ENGINE_TAG = b"trt"


def file_record(file: Path) -> dict[str, Any]:
    """{"sha256", "size_bytes"} as ModelCard.files holds it."""
    data = _bytes(file)
    return {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}


def check_files(card: ModelCard, folder: Path) -> None:
    """Raises NotFound for a file the card names and `folder` lacks, Invalid for one with another content."""
    for name, record in card.files.items():
        given = file_record(Path(folder) / name)
        if given["sha256"] != record.get("sha256"):
            raise Invalid(f"{name} of {card.ref} in {folder} has sha256 {given['sha256']}, its card says "
                          f"{record.get('sha256')}. Copy the file again from where it came.")


@dataclass(frozen=True)
class Graph:
    """A graph in memory, made from the one in `file`; a backend opens it like a file, and errors name the file.

    model  onnx.ModelProto without external data
    """

    file: Path
    model: Any

    def __str__(self) -> str:
        return str(self.file)

    def __fspath__(self) -> str:
        return str(self.file)


def read_graph(source: Path | Graph) -> tuple[bytes, Any]:
    """The ONNX graph of a file or in memory as (bytes without external data, onnx.ModelProto).

    Tensors kept in other files are taken in; only plain files in the same folder are allowed. Raises Invalid when the
    file is no ONNX graph or reaches outside its folder, NotFound when it is missing.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if isinstance(source, Graph):
        return source.model.SerializeToString(), source.model
    file, data = source, _bytes(source)
    if data[1:4] == ENGINE_TAG:
        raise Invalid(f"{file} is a TensorRT engine. Engines are programs and are only built here, from an ONNX graph: take "
                      "the .onnx file it was built from.")
    try:
        model = onnx.load_model_from_string(data)
    except DecodeError as error:
        raise Invalid(f"{file} is not an ONNX graph: {error}. Export the model again.") from error
    if not model.graph.node or not model.graph.input or not model.graph.output:
        raise Invalid(f"{file} is not an ONNX graph: it has no nodes, inputs or outputs. Export the model again.")
    outside = [tensor for tensor in onnx.external_data_helper._get_all_tensors(model)
               if onnx.external_data_helper.uses_external_data(tensor)]
    for tensor in outside:
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        beside = file.parent / location
        if PurePosixPath(location).name != location or "\\" in location or beside.is_symlink() or not beside.is_file():
            raise Invalid(f"{file} keeps tensor {tensor.name!r} in {location!r}; only a file beside it is allowed. "
                          "Export the model into one file.")
    if outside:
        onnx.load_external_data_for_model(model, str(file.parent))
        data = model.SerializeToString()
    return data, model


def quantized_layers(model: Any) -> list[str]:
    """The first outputs of the layers with weights that a Q/DQ graph wants in int8: what they take was dequantised."""
    dequantized = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    constants = {tensor.name for tensor in model.graph.initializer}
    weights = {node.output[0] for node in model.graph.node
               if node.op_type == "DequantizeLinear" and node.input[0] in constants}
    return [node.output[0] for node in model.graph.node
            if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul") and node.input[0] in dequantized - weights]


def _bytes(file: Path) -> bytes:
    try:
        return Path(file).read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise NotFound(f"{file} is not there. Copy the model's file into {Path(file).parent}.") from error

"""Cards of well-known detectors, so that one's own YOLOX or NanoDet export can be registered by naming its file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workbench.errors import Invalid
from workbench.inference.decode import STRIDES
from workbench.inference.graph import file_record, read_graph
from workbench.model import InputSpec, ModelCard
from workbench.taxonomy import Taxonomy

# The 80 categories of COCO in the order that detectors trained on it give them (Lin et al., 2014; instances_*.json).
COCO_80 = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush")


def card_for_yolox(
    onnx: Path,
    name: str,
    version: str = "1",
    *,
    labels: Sequence[str] = COCO_80,
    size: tuple[int, int] | None = None,
    licence: str = "Apache-2.0",
    description: str = "",
) -> ModelCard:
    """The card of a YOLOX export (YOLOX, tools/export_onnx.py, without --decode_in_inference).

    Pixels go in as they are, 0..255 in BGR, letterboxed at the top left with 114 (yolox/data/data_augment.py, preproc).
    size: (width, height), needed only where the graph leaves its sides open. Raises Invalid or NotFound.
    """
    spec = InputSpec(size=_size(onnx, size), layout="NCHW", dtype="float32", colour="BGR", padding="topleft", pad=114)
    # Thresholds of YOLOX' own demo: score 0.3, NMS 0.45.
    return _card(
        onnx, name, version, spec, labels, licence, description, {"name": "yolox", "confidence": 0.3, "iou": 0.45}
    )


def card_for_nanodet(
    onnx: Path,
    name: str,
    version: str = "1",
    *,
    labels: Sequence[str] = COCO_80,
    size: tuple[int, int] | None = None,
    licence: str = "Apache-2.0",
    description: str = "",
) -> ModelCard:
    """The card of a NanoDet-Plus export (nanodet, tools/export_onnx.py).

    ImageNet mean and std in BGR, image stretched to the input (keep_ratio: False in config/nanodet-plus-m_416.yml).
    size: (width, height), needed only where the graph leaves its sides open. Raises Invalid or NotFound.
    """
    spec = InputSpec(
        size=_size(onnx, size),
        layout="NCHW",
        dtype="float32",
        colour="BGR",
        mean=(103.53, 116.28, 123.675),
        std=(57.375, 57.12, 58.395),
        padding="stretch",
    )
    # NMS 0.6 is NanoDet's own (nanodet_plus_head.py, get_bboxes); its demos show boxes from 0.35 on.
    decoder = {"name": "nanodet", "confidence": 0.35, "iou": 0.6, "reg_max": 7}
    return _card(onnx, name, version, spec, labels, licence, description, decoder)


def _card(onnx: Path, name: str, version: str, spec: InputSpec, labels: Sequence[str], licence: str, description: str,
          decoder: dict[str, Any]) -> ModelCard:
    onnx = Path(onnx)
    return ModelCard(
        name,
        version,
        spec,
        {**decoder, "strides": list(STRIDES[decoder["name"]])},
        Taxonomy(tuple(labels)),
        {onnx.name: file_record(onnx)},
        licence=licence,
        description=description,
    )


def _size(onnx: Path, size: tuple[int, int] | None) -> tuple[int, int]:
    """The (width, height) that the NCHW graph fixes, else `size`."""
    _, model = read_graph(Path(onnx))
    initialised = {tensor.name for tensor in model.graph.initializer}
    given = [value for value in model.graph.input if value.name not in initialised]
    sides = [dim.dim_value for dim in given[0].type.tensor_type.shape.dim] if given else []
    if len(given) != 1 or len(sides) != 4:
        raise Invalid(
            f"{onnx} must have one input of four axes (images, channels, height, width), has {len(given)} inputs, the "
            f"first of {len(sides)} axes."
        )
    fixed = (sides[3], sides[2]) if sides[2] and sides[3] else None
    if fixed is None and size is None:
        raise Invalid(f"{onnx} takes images of any size: say which (width, height) it was trained with.")
    if fixed and size and tuple(size) != fixed:
        raise Invalid(f"{onnx} takes {fixed[0]}x{fixed[1]} images, not {size[0]}x{size[1]}.")
    return fixed or tuple(size)

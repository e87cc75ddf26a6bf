"""Cards of well-known models, so that one's own export of a family can be registered by naming its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workbench.errors import Invalid
from workbench.inference import families
from workbench.inference.graph import file_record, read_graph
from workbench.model import InputSpec, ModelCard
from workbench.taxonomy import Taxonomy

# The 80 categories of COCO in the order that detectors trained on it give them (Lin et al., 2014; instances_*.json).
COCO_80 = (
    "person",
    "bicycle",
    "car",
    "motorcycle",
    "airplane",
    "bus",
    "train",
    "truck",
    "boat",
    "traffic light",
    "fire hydrant",
    "stop sign",
    "parking meter",
    "bench",
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "backpack",
    "umbrella",
    "handbag",
    "tie",
    "suitcase",
    "frisbee",
    "skis",
    "snowboard",
    "sports ball",
    "kite",
    "baseball bat",
    "baseball glove",
    "skateboard",
    "surfboard",
    "tennis racket",
    "bottle",
    "wine glass",
    "cup",
    "fork",
    "knife",
    "spoon",
    "bowl",
    "banana",
    "apple",
    "sandwich",
    "orange",
    "broccoli",
    "carrot",
    "hot dog",
    "pizza",
    "donut",
    "cake",
    "chair",
    "couch",
    "potted plant",
    "bed",
    "dining table",
    "toilet",
    "tv",
    "laptop",
    "mouse",
    "remote",
    "keyboard",
    "cell phone",
    "microwave",
    "oven",
    "toaster",
    "sink",
    "refrigerator",
    "book",
    "clock",
    "vase",
    "scissors",
    "teddy bear",
    "hair drier",
    "toothbrush",
)
# The category ids that COCO gives COCO_80: 1..90 with ten left out (instances_*.json). Heads of 91 columns use them.
COCO_IDS = tuple(one for one in range(1, 91) if one not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
IMAGENET = {"scale": 1 / 255, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclass(frozen=True)
class Known:
    """A family of models as its makers export it.

    how      one sentence: which export of which project fits
    spec     fields of InputSpec; `size` is the graph's
    decoder  settings of the card's decoder
    parts    part of the head -> usual name of its output, for heads of several outputs
    labels   what its public weights were trained on; () when nobody can know
    """

    title: str
    how: str
    spec: Mapping[str, Any]
    decoder: Mapping[str, Any]
    parts: Mapping[str, str] = field(default_factory=dict)
    labels: tuple[str, ...] = COCO_80
    licence: str = ""


RAW = {"cls": "cls_logits", "box": "bbox_regression"}
BYTES = {"scale": 1 / 255}
KNOWN: Mapping[str, Known] = {
    # Pixels go in as they are, 0..255 in BGR, letterboxed at the top left with 114 (yolox/data/data_augment.py,
    # preproc); thresholds of YOLOX' own demo: score 0.3, NMS 0.45.
    "yolox": Known(
        "YOLOX",
        "As tools/export_onnx.py writes it, without --decode_in_inference.",
        {"colour": "BGR", "padding": "topleft"},
        {"name": "yolox", "confidence": 0.3, "iou": 0.45},
        licence="Apache-2.0",
    ),
    # ImageNet mean and std in BGR, image stretched to the input (keep_ratio: False in config/nanodet-plus-m_416.yml).
    # NMS 0.6 is NanoDet's own (nanodet_plus_head.py, get_bboxes); its demos show boxes from 0.35 on.
    "nanodet": Known(
        "NanoDet-Plus",
        "As tools/export_onnx.py writes it.",
        {"colour": "BGR", "padding": "stretch", "mean": (103.53, 116.28, 123.675), "std": (57.375, 57.12, 58.395)},
        {"name": "nanodet", "confidence": 0.35, "iou": 0.6, "reg_max": 7},
        licence="Apache-2.0",
    ),
    "yolov5": Known(
        "YOLOv5, v7",
        "An ONNX export of the whole model without NMS: one output (n, anchors, 5 + labels).",
        {**BYTES, "padding": "centre"},
        {"name": "yolov5", "confidence": 0.25, "iou": 0.45},
    ),
    "yolov8": Known(
        "YOLOv8, v9, v11",
        "An ONNX export for detection without NMS: one output (n, 4 + labels, anchors).",
        {**BYTES, "padding": "centre"},
        {"name": "yolov8", "confidence": 0.25, "iou": 0.7},
    ),
    "yolov8_seg": Known(
        "YOLOv8, v11 segmentation",
        "An ONNX export for segmentation without NMS: (n, 4 + labels + 32, anchors) and 32 prototypes; draws polygons.",
        {**BYTES, "padding": "centre"},
        {"name": "yolov8_seg", "confidence": 0.25, "iou": 0.7},
    ),
    # torchvision's detectors normalise outside backbone and head, and pad with zeros, which is ImageNet's mean grey.
    "fcos": Known(
        "FCOS",
        "torchvision's fcos_resnet50_fpn: export backbone and head, outputs cls_logits, bbox_regression, "
        "bbox_ctrness, one fixed size.",
        IMAGENET,
        {"name": "fcos", "strides": (8, 16, 32, 64, 128), "centre": 0.0, "confidence": 0.3, "iou": 0.6},
        {**RAW, "ctr": "bbox_ctrness"},
        licence="BSD-3-Clause",
    ),
    "retinanet": Known(
        "RetinaNet",
        "torchvision's retinanet_resnet50_fpn: export backbone and head, outputs cls_logits and "
        "bbox_regression, one fixed size.",
        IMAGENET,
        {"name": "retinanet", "confidence": 0.3, "iou": 0.5},
        RAW,
        licence="BSD-3-Clause",
    ),
    # ssd300_vgg16 divides by 1 / 255 after taking the mean away, so pixels stay 0..255 wide (models/detection/ssd.py).
    "ssd": Known(
        "SSD300",
        "torchvision's ssd300_vgg16: export backbone and head, outputs cls_logits and bbox_regression, 300 x 300.",
        {"scale": 1 / 255, "mean": (0.48235, 0.45882, 0.40784), "std": (1 / 255,) * 3, "padding": "stretch"},
        {"name": "ssd", "confidence": 0.3, "iou": 0.45},
        RAW,
        licence="BSD-3-Clause",
    ),
    "detr": Known(
        "DETR",
        "Outputs logits and pred_boxes, one fixed size, no mask input.",
        {**IMAGENET, "padding": "stretch"},
        {"name": "detr", "score": "softmax", "confidence": 0.7},
        {"cls": "pred_logits", "box": "pred_boxes"},
        licence="Apache-2.0",
    ),
    "rt_detr": Known(
        "RT-DETR, Deformable DETR",
        "Outputs logits and pred_boxes before their postprocessor (a graph that also takes the "
        "image's size will not do).",
        {**BYTES, "padding": "stretch"},
        {"name": "detr", "score": "sigmoid", "confidence": 0.5},
        {"cls": "pred_logits", "box": "pred_boxes"},
        licence="Apache-2.0",
    ),
    "classification": Known(
        "Classifier",
        "Any ImageNet-style network with one output (n, labels) of logits; sets one tag a frame.",
        {**IMAGENET, "padding": "stretch"},
        {"name": "classification", "confidence": 0.5},
        labels=(),
    ),
    "semantic": Known(
        "Semantic masks",
        "FCN, DeepLab, SegFormer and the like with one output (n, labels, h, w), a background first if "
        "there is one; draws a polygon around each region.",
        IMAGENET,
        {"name": "semantic", "confidence": 0.5},
        labels=(),
    ),
}


def card_for(
    family: str,
    onnx: Path,
    name: str,
    version: str = "1",
    *,
    labels: Sequence[str] = (),
    size: tuple[int, int] | None = None,
    licence: str = "",
    description: str = "",
) -> ModelCard:
    """The card of an export of one of KNOWN.

    labels   in the order of their class ids; left out: the 80 of COCO, where the family's public weights have them
    size     (width, height), needed only where the graph leaves its sides open
    licence  left out: the licence of the family's own weights, where that is known

    Raises Invalid, or NotFound for a file that is not there.
    """
    if family not in KNOWN:
        raise Invalid(f"There is no family {family!r}; there are {', '.join(KNOWN)}.")
    known = KNOWN[family]
    labels = tuple(labels) or known.labels
    if not labels:
        raise Invalid(f"{known.title}: say the labels of {Path(onnx).name}, in the order of their class ids.")
    size, outputs = _size_and_outputs(onnx, size)
    decoder = {key: list(value) if isinstance(value, tuple) else value for key, value in known.decoder.items()}
    if "strides" in families.FAMILIES[decoder["name"]].defaults:
        decoder = {"strides": list(families.settings(decoder)["strides"]), **decoder}
    if known.parts:
        decoder["outputs"] = _named(known.parts, outputs)
        # Public weights of these heads score COCO's 91 category ids, not the 80 that are in use.
        width = (outputs.get(decoder["outputs"]["cls"]) or [None])[-1]
        if labels == COCO_80 and width in (91, 92):
            decoder["columns"] = list(COCO_IDS)
    spec = InputSpec(size=size, layout="NCHW", dtype="float32", **known.spec)
    return ModelCard(
        name,
        version,
        spec,
        decoder,
        Taxonomy(labels),
        {Path(onnx).name: file_record(Path(onnx))},
        licence=licence or known.licence,
        description=description,
    )


def card_for_yolox(onnx: Path, name: str, version: str = "1", **about: Any) -> ModelCard:
    """The card of a YOLOX export; the rest as card_for has it."""
    return card_for("yolox", onnx, name, version, **about)


def card_for_nanodet(onnx: Path, name: str, version: str = "1", **about: Any) -> ModelCard:
    """The card of a NanoDet-Plus export; the rest as card_for has it."""
    return card_for("nanodet", onnx, name, version, **about)


def _named(parts: Mapping[str, str], outputs: dict[str, list[int | None]]) -> dict[str, str]:
    """Part of a head -> its output: by the usual name, else boxes by their four columns and centre-ness by its one."""
    found = {part: name for part, name in parts.items() if name in outputs}
    widths = {"box": 4, "ctr": 1}
    for part in sorted(parts.keys() - found.keys(), key=("box", "ctr", "cls").index):
        free = [name for name in outputs if name not in found.values()]
        fitting = [name for name in free if part == "cls" or (outputs[name] or [None])[-1] == widths[part]]
        found[part] = fitting[0] if fitting else parts[part]
    return {part: found[part] for part in parts}


def _size_and_outputs(onnx: Path, size: tuple[int, int] | None) -> tuple[tuple[int, int], dict[str, list[int | None]]]:
    """The (width, height) that the NCHW graph fixes, else `size`; and the sides its outputs declare."""
    _, model = read_graph(Path(onnx))
    initialised = {tensor.name for tensor in model.graph.initializer}
    given = [value for value in model.graph.input if value.name not in initialised]
    sides = _sides(given[0]) if given else []
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
    return fixed or tuple(size), {value.name: _sides(value) for value in model.graph.output}


def _sides(value: Any) -> list[int | None]:
    return [dim.dim_value or None for dim in value.type.tensor_type.shape.dim]

"""card.json, and the checks and measurements of the ONNX file it describes."""
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from training.errors import TrainingError
from training.images import PAD_VALUE
from training.output import file_record, write_json

# How far ONNX Runtime's outputs may lie from torch's: float32 sums in another order give about 1e-4 on logits.
AGREEMENT = 1e-2


def write_card(output: Path, name: str, size: tuple[int, int], labels: Sequence[str], decoder: dict[str, Any],
               licence: str, dataset: dict[str, Any], metrics: dict[str, Any], note: str = "") -> None:
    """Writes card.json for model.onnx and weights.pt of the output folder (docs/adopting.md has its fields).

    decoder  the decoder's name and settings; metrics: what to say of the model; note: what is inside the graph
    """
    card = {
        "name": name, "labels": list(labels), "licence": licence, "decoder": decoder, "metrics": metrics,
        "input": {
            "tensor": "images", "width": size[0], "height": size[1], "layout": "NHWC", "dtype": "uint8", "colour": "RGB",
            "scale": 1, "mean": [0, 0, 0], "std": [1, 1, 1],
            "padding": "letterbox-topleft", "pad_value": PAD_VALUE, "interpolation": "linear",
            "note": "scale = min(width/image_width, height/image_height); image resized with cv2.INTER_LINEAR to "
                    "(round(image_width*scale), round(image_height*scale)), placed top-left, padded right and below. " + note,
        },
        "files": {"model.onnx": file_record(output / "model.onnx")},
        "weights": {"name": "weights.pt", **file_record(output / "weights.pt")},
        "trained_on": {"ref": dataset.get("ref"), "digest": dataset.get("digest")},
    }
    write_json(output / "card.json", card)


def agreement(model: nn.Module, size: tuple[int, int], file: Path) -> float | None:
    """The largest difference between ONNX Runtime's and torch's outputs on noise; None without onnxruntime.

    Raises TrainingError when it is too large or not a number: such a file must not leave the training.
    """
    try:
        import onnxruntime
    except ImportError:
        return None
    noise = np.random.default_rng(0).integers(0, 256, (1, size[1], size[0], 3), np.uint8)
    with torch.inference_mode():
        outputs = model.cpu()(torch.from_numpy(noise))
        expected = [one.numpy() for one in (outputs if isinstance(outputs, (tuple, list)) else [outputs])]
    found = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"images": noise})
    # Distances grow exponentially, so they are compared relative to their size.
    difference = max(float(np.max(np.abs(e - f) / np.maximum(1, np.abs(e)))) for e, f in zip(expected, found, strict=True))
    check_difference(difference, file)
    return difference


def check_difference(difference: float, file: Path) -> None:
    if not difference <= AGREEMENT:
        raise TrainingError(f"{file.name} differs from the trained network by {difference}, at most {AGREEMENT} is right. "
                            "Report the versions of torch and onnxscript.")


def measure(model: nn.Module, size: tuple[int, int], file: Path, runs: int = 20) -> dict[str, Any]:
    """{"parameter_count", "size_mb"} and what `latency` gives."""
    return {"parameter_count": sum(one.numel() for one in model.parameters()), "size_mb": file.stat().st_size / 1e6,
            **latency(np.random.default_rng(0).integers(0, 256, (1, size[1], size[0], 3), np.uint8), file, runs)}


def latency(frame: np.ndarray, file: Path, runs: int = 20) -> dict[str, Any]:
    """{"latency_ms", "latency_on"}: the median of `runs` frames, one at a time, in ONNX Runtime on this machine's CPU with
    as many threads as torch has; {} without onnxruntime. frame: what the graph takes, a batch of one."""
    try:
        import onnxruntime
    except ImportError:
        return {}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    seconds = []
    for _ in range(runs + 3):  # the first three warm up
        began = time.perf_counter()
        session.run(None, {session.get_inputs()[0].name: frame})
        seconds.append(time.perf_counter() - began)
    return {"latency_ms": 1000 * float(np.median(seconds[3:])),
            "latency_on": f"ONNX Runtime, {options.intra_op_num_threads} threads, {platform.machine()}, one input of "
                          f"{'x'.join(map(str, frame.shape))}"}

"""A recipe that learns nothing: its model always sees the first box of the first training frame, `shift` pixels aside.

It keeps the contract of a recipe (docs/adopting.md) and trains in no time. `mood` makes it fail in the ways that real
trainings do.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIDE, STRIDES = 64, (8, 16, 32)


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in ("data", "output", "name", "base_weights", "mood"):
        parser.add_argument(f"--{name}")
    for name in ("epochs", "pause_s", "shift"):
        parser.add_argument(f"--{name}", type=float)
    options = parser.parse_args()
    output = Path(options.output)
    with open(output / "starts.txt", "a") as starts:
        starts.write(f"{os.getpid()} {os.environ.get('GIT_COMMIT')}\n")
    print("environment:", " ".join(sorted(os.environ)), flush=True)
    if options.mood == "fork":
        for extra in ({}, {"start_new_session": True}, {"env": {}}):
            child = subprocess.Popen([sys.executable, "-c", "import signal, time\n"
                                      "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)"], **extra)
            with open(output / "children.txt", "a") as children:
                children.write(f"{child.pid}\n")
    if options.mood == "fail":
        print("error: the loss is not finite in epoch 1", file=sys.stderr)
        return 3

    history = output / "history.jsonl"
    done = len(history.read_text().splitlines()) if history.exists() else 0
    for epoch in range(done + 1, int(options.epochs) + 1):
        time.sleep(options.pause_s)
        with open(history, "a") as file:
            file.write(json.dumps({"epoch": epoch, "epochs": int(options.epochs), "train_loss": 1 / epoch, "map_50": epoch / 10}) + "\n")
    if options.mood == "nomodel":
        return 0
    coco = json.loads((Path(options.data) / "train.json").read_text())
    record = json.loads((Path(options.data) / "dataset.json").read_text())
    first = coco["annotations"][0]
    x, y, width, height = first["bbox"]
    box = np.array([x, y, x + width, y + height]) + options.shift
    write_model(output / "model.onnx", box, first["category_id"], len(coco["categories"]))
    (output / "weights.pt").write_bytes(b"plain weights")
    files = {name: {"sha256": hashlib.sha256((output / name).read_bytes()).hexdigest(), "size_bytes": (output / name).stat().st_size}
             for name in ("model.onnx", "weights.pt")}
    (output / "card.json").write_text(json.dumps({
        "name": options.name, "version": "0", "licence": "CC0-1.0", "labels": [one["name"] for one in coco["categories"]],
        "input": {"width": SIDE, "height": SIDE, "padding": "topleft"}, "files": files,
        "decoder": {"name": "fcos", "strides": list(STRIDES), "confidence": 0.05, "iou": 0.6},
        "trained_on": {"ref": record["ref"], "digest": record["digest"]}}))
    (output / "metrics.json").write_text(json.dumps({"map_50": float("nan") if options.mood == "nan" else 0.5, "epochs": options.epochs}))
    return 0


def write_model(file: Path, box: np.ndarray, class_id: int, classes: int) -> None:
    """Constant FCOS heads: one point is certain of `box` (xyxy in input pixels), every other is certain of nothing."""
    points = np.concatenate([
        np.array([((column + 0.5) * stride, (row + 0.5) * stride, stride) for row in range(SIDE // stride)
                  for column in range(SIDE // stride)]) for stride in STRIDES])
    centre = (box[:2] + box[2:]) / 2
    chosen = int(np.abs(points[:, :2] - centre).sum(axis=1).argmin())
    x, y, stride = points[chosen]
    heads = {"cls_logits": np.full((1, len(points), classes), -10.0), "bbox_regression": np.ones((1, len(points), 4)),
             "bbox_ctrness": np.full((1, len(points), 1), 5.0)}
    heads["cls_logits"][0, chosen, class_id] = 5
    heads["bbox_regression"][0, chosen] = np.array([x - box[0], y - box[1], box[2] - x, box[3] - y]) / stride
    # 0 * the sum of the image carries the batch size into outputs that do not depend on it.
    nodes = [helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
             helper.make_node("ReduceSum", ["floats", "axes"], ["sums"], keepdims=1),
             helper.make_node("Mul", ["sums", "zero"], ["flat"]), helper.make_node("Reshape", ["flat", "column"], ["batch"])]
    constants = [numpy_helper.from_array(np.array([1, 2, 3], np.int64), "axes"), numpy_helper.from_array(np.float32(0), "zero"),
                 numpy_helper.from_array(np.array([-1, 1, 1], np.int64), "column")]
    outputs = []
    for name, values in heads.items():
        constants.append(numpy_helper.from_array(values.astype(np.float32), f"{name}_values"))
        nodes.append(helper.make_node("Add", ["batch", f"{name}_values"], [name]))
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *values.shape[1:]]))
    image = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", SIDE, SIDE, 3])
    graph = helper.make_graph(nodes, "tiny", [image], outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), file)


if __name__ == "__main__":
    sys.exit(main())

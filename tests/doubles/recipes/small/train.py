"""A recipe that really learns, in about a second: which 8 x 8 cells of a 64 x 64 picture lie in a box of which label.

Two layers in plain NumPy, trained by gradient descent with momentum; learning rate, its schedule, batch size and frozen
layers matter as they do elsewhere. It keeps the contract of a recipe (docs/adopting.md) and goes on from its checkpoint.
`mood` makes it fail as real trainings do: fail, nan, fork, memory.
"""

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIDE, CELL, HIDDEN = 64, 8, 16


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in ("data", "output", "name", "schedule", "mood"):
        parser.add_argument(f"--{name}")
    for name in ("epochs", "learning_rate", "batch_size", "frozen", "seed", "threads", "pause_s"):
        parser.add_argument(f"--{name}", type=float)
    options = parser.parse_args()
    output = Path(options.output)
    told = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
    with open(output / "starts.jsonl", "a") as starts:
        starts.write(json.dumps({"pid": os.getpid(), "threads": options.threads, "at": time.time(), **told}) + "\n")
    if options.mood == "fork":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True, env={})
    if options.mood == "fail":
        print("error: no learning rate would help here", file=sys.stderr)
        return 3
    held = np.ones(2**25 if options.mood == "memory" else 1)  # 256 MiB
    history = output / "history.jsonl"
    coco = json.loads((Path(options.data) / "train.json").read_text())
    labels = [one["name"] for one in coco["categories"]]
    train, val = (read(Path(options.data), split, len(labels)) for split in ("train", "val"))
    net, done = restore(output / "checkpoint.npz", len(labels), int(options.seed))
    rows = [json.loads(line) for line in history.read_text().splitlines()][:done] if done else []
    epochs = int(options.epochs)
    for epoch in range(done + 1, epochs + 1):
        time.sleep(options.pause_s)
        rate = options.learning_rate * (0.5 + 0.5 * math.cos(math.pi * (epoch - 1) / epochs) if options.schedule == "cosine"
                                        else 0.1 ** (2 * (epoch - 1) // epochs))
        chance = np.random.default_rng([int(options.seed), epoch])
        train_loss = learn(net, *train, rate, max(1, int(options.batch_size)), int(options.frozen), chance)
        if options.mood == "nan" and epoch == 2:
            train_loss = math.nan
        rows.append({"epoch": epoch, "epochs": epochs, "train_loss": train_loss, "val_loss": loss(net, *val)
                     if options.mood != "nan" or epoch < 2 else math.nan, "rate": rate})
        np.savez(output / "half.npz", epoch=epoch, **net)
        (output / "half.npz").replace(output / "checkpoint.npz")
        history.with_suffix(".half").write_text("".join(json.dumps(row) + "\n" for row in rows))
        history.with_suffix(".half").replace(history)
    del held
    write_model(output / "model.onnx", net, len(labels))
    (output / "weights.pt").write_bytes((output / "checkpoint.npz").read_bytes())
    files = {name: {"sha256": hashlib.sha256((output / name).read_bytes()).hexdigest(),
                    "size_bytes": (output / name).stat().st_size} for name in ("model.onnx", "weights.pt")}
    record = json.loads((Path(options.data) / "dataset.json").read_text())
    (output / "card.json").write_text(json.dumps({
        "name": options.name, "version": "0", "licence": "CC0-1.0", "labels": labels, "files": files,
        "input": {"width": SIDE, "height": SIDE, "padding": "topleft"},
        "decoder": {"name": "fcos", "strides": [CELL], "confidence": 0.5, "iou": 0.6},
        "trained_on": {"ref": record["ref"], "digest": record["digest"]}}))
    (output / "metrics.json").write_text(json.dumps({"val_loss": rows[-1]["val_loss"], "epochs": epochs}))
    return 0


def read(data: Path, split: str, labels: int) -> tuple[np.ndarray, np.ndarray]:
    """(cells, 192) patches around 0 and (cells, labels) of 0 and 1: is the middle of the cell in a box of that label."""
    coco = json.loads((data / f"{split}.json").read_text())
    if not coco["images"]:
        coco = json.loads((data / "train.json").read_text())
    patches, truth = [], []
    for image in coco["images"]:
        pixels = cv2.imread(str(data / "frames" / image["file_name"]))[:, :, ::-1]
        pixels = cv2.resize(pixels, (SIDE, SIDE)).astype(np.float32) / 128 - 1
        count = SIDE // CELL
        patches.append(pixels.reshape(count, CELL, count, CELL, 3).transpose(0, 2, 1, 3, 4).reshape(count * count, -1))
        middles = (np.stack(np.meshgrid(np.arange(count), np.arange(count)), -1).reshape(-1, 2) + 0.5) * CELL
        wanted = np.zeros((count * count, labels), np.float32)
        for one in coco["annotations"]:
            if one["image_id"] == image["id"]:
                scale = np.array([SIDE / image["width"], SIDE / image["height"]])
                low, size = np.array(one["bbox"][:2]) * scale, np.array(one["bbox"][2:]) * scale
                wanted[((middles >= low) & (middles < low + size)).all(1), one["category_id"]] = 1
        truth.append(wanted)
    return np.concatenate(patches), np.concatenate(truth)


def restore(file: Path, labels: int, seed: int) -> tuple[dict[str, np.ndarray], int]:
    if file.exists():
        kept = dict(np.load(file))
        return kept, int(kept.pop("epoch"))
    chance, inputs = np.random.default_rng(seed), 3 * CELL * CELL
    return {"first": chance.normal(0, inputs ** -0.5, (inputs, HIDDEN)), "first_bias": np.zeros(HIDDEN),
            "second": chance.normal(0, HIDDEN ** -0.5, (HIDDEN, labels)), "second_bias": np.full(labels, -1.0),
            **{f"speed_{index}": np.zeros(shape) for index, shape in
               enumerate([(inputs, HIDDEN), HIDDEN, (HIDDEN, labels), labels])}}, 0


def loss(net: dict[str, np.ndarray], patches: np.ndarray, truth: np.ndarray) -> float:
    """Mean binary cross-entropy."""
    logits = np.maximum(patches @ net["first"] + net["first_bias"], 0) @ net["second"] + net["second_bias"]
    return float((np.logaddexp(0, logits) - truth * logits).mean())


def learn(net: dict[str, np.ndarray], patches: np.ndarray, truth: np.ndarray, rate: float, batch: int, frozen: int,
          chance: np.random.Generator) -> float:
    order = chance.permutation(len(patches))
    for start in range(0, len(order), batch):
        x, y = patches[order[start:start + batch]], truth[order[start:start + batch]]
        hidden = np.maximum(x @ net["first"] + net["first_bias"], 0)
        error = (1 / (1 + np.exp(-np.clip(hidden @ net["second"] + net["second_bias"], -50, 50))) - y) / len(x)
        back = (error @ net["second"].T) * (hidden > 0)
        slopes = [x.T @ back, back.sum(0), hidden.T @ error, error.sum(0)]
        for index, name in enumerate(("first", "first_bias", "second", "second_bias")):
            if index >= 2 or frozen < 1:
                net[f"speed_{index}"] = 0.9 * net[f"speed_{index}"] - rate * slopes[index]
                net[name] = net[name] + net[f"speed_{index}"]
    return loss(net, patches, truth)


def write_model(file: Path, net: dict[str, np.ndarray], labels: int) -> None:
    """The two layers as convolutions with FCOS heads; every box is a cell and a half around the middle of its cell."""
    first = net["first"].reshape(CELL, CELL, 3, HIDDEN).transpose(3, 2, 0, 1)
    constants = {"first": first, "first_bias": net["first_bias"], "second": net["second"].T.reshape(labels, HIDDEN, 1, 1),
                 "second_bias": net["second_bias"], "middle": np.float32(128), "one": np.float32(1), "nought": np.float32(0),
                 "sides": np.full((1, 1, 4), 1.5), "sure": np.full((1, 1, 1), 20.0)}
    points = (SIDE // CELL) ** 2
    nodes = [helper.make_node(*one[:3], **(one[3] if len(one) > 3 else {})) for one in (
        ("Cast", ["images"], ["floats"], {"to": TensorProto.FLOAT}), ("Div", ["floats", "middle"], ["scaled"]),
        ("Sub", ["scaled", "one"], ["centred"]), ("Transpose", ["centred"], ["x"], {"perm": [0, 3, 1, 2]}),
        ("Conv", ["x", "first", "first_bias"], ["h"], {"strides": [CELL, CELL]}), ("Relu", ["h"], ["hidden"]),
        ("Conv", ["hidden", "second", "second_bias"], ["maps"]), ("Reshape", ["maps", "flat"], ["rows"]),
        ("Transpose", ["rows"], ["cls_logits"], {"perm": [0, 2, 1]}),
        ("ReduceMax", ["cls_logits"], ["largest"], {"axes": [2], "keepdims": 1}), ("Mul", ["largest", "nought"], ["zeros"]),
        ("Add", ["zeros", "sides"], ["bbox_regression"]), ("Add", ["zeros", "sure"], ["bbox_ctrness"]))]
    graph = helper.make_graph(
        nodes, "small", [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", SIDE, SIDE, 3])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", points, size])
         for name, size in (("cls_logits", labels), ("bbox_regression", 4), ("bbox_ctrness", 1))],
        [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in constants.items()]
        + [numpy_helper.from_array(np.array([0, labels, points], np.int64), "flat")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), file)


if __name__ == "__main__":
    sys.exit(main())

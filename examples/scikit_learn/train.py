"""Tags whole frames by colour and texture: scikit-learn's logistic regression, as an ONNX graph written by hand."""

import argparse
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

SIDE, GRID = 64, 4


def graph(weights=None, bias=None):
    """(N, 64, 64, 3) uint8 RGB -> mean and deviation of each colour in 4 x 4 fields, (N, 96); with weights, logits."""
    field = {"kernel_shape": [SIDE // GRID] * 2, "strides": [SIDE // GRID] * 2}
    nodes = [helper.make_node(*one[:3], **one[3]) for one in (
        ("Cast", ["images"], ["pixels"], {"to": TensorProto.FLOAT}),
        ("Transpose", ["pixels"], ["planes"], {"perm": [0, 3, 1, 2]}),
        ("Div", ["planes", "white"], ["shares"], {}),
        ("AveragePool", ["shares"], ["mean"], field),
        ("Resize", ["mean", "", "scales"], ["level"], {"mode": "nearest"}),
        ("Sub", ["shares", "level"], ["rest"], {}),
        ("Abs", ["rest"], ["size"], {}),
        ("AveragePool", ["size"], ["deviation"], field),
        ("Concat", ["mean", "deviation"], ["both"], {"axis": 1}),
        ("Flatten", ["both"], ["features"], {}))]
    constants = {"white": 255.0, "scales": [1, 1, SIDE // GRID, SIDE // GRID]}
    name, width = "features", 6 * GRID * GRID
    if weights is not None:
        nodes.append(helper.make_node("Gemm", ["features", "weights", "bias"], ["logits"], transB=1))
        constants |= {"weights": weights, "bias": bias}
        name, width = "logits", len(weights)
    made = helper.make_model(helper.make_graph(
        nodes, "tags", [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", SIDE, SIDE, 3])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width])],
        [numpy_helper.from_array(np.asarray(value, np.float32), key) for key, value in constants.items()]),
        opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(made, full_check=True)
    return made


def load(data, split):
    """The frames of a split that have exactly one tag: features (N, 96) and category ids (N,)."""
    found = [image for image in json.loads((data / f"{split}.json").read_text())["images"] if len(image["tags"]) == 1]
    if not found:
        return np.zeros((0, 6 * GRID * GRID)), np.zeros(0, int)
    frames = [cv2.cvtColor(cv2.imread(str(data / "frames" / image["file_name"])), cv2.COLOR_BGR2RGB) for image in found]
    images = np.stack([cv2.resize(frame, (SIDE, SIDE)) for frame in frames])
    # The very graph of the model, so that training and use cannot differ.
    return ReferenceEvaluator(graph()).run(None, {"images": images})[0], np.array([image["tags"][0] for image in found])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--inverse_regularization", type=float, default=1.0, help="C of LogisticRegression")
    options = parser.parse_args()
    features, tags = load(options.data, "train")
    if len(set(tags)) < 2:
        sys.exit("train.json has frames of fewer than two tags, so there is nothing to tell apart. Tag more frames.")
    model = make_pipeline(StandardScaler(), LogisticRegression(C=options.inverse_regularization, max_iter=1000))
    model.fit(features, tags)
    scaler, regression = model[0], model[1]
    weights, bias = regression.coef_, regression.intercept_
    if len(regression.classes_) == 2:  # one logit z of the second tag; softmax of (0, z) is its sigmoid
        weights, bias = np.concatenate([0 * weights, weights]), np.concatenate([0 * bias, bias])
    weights = weights / scaler.scale_
    onnx.save(graph(weights, bias - weights @ scaler.mean_), options.output / "model.onnx")
    names = {one["id"]: one["name"] for one in json.loads((options.data / "train.json").read_text())["categories"]}
    (options.output / "card.json").write_text(json.dumps({
        "labels": [names[tag] for tag in regression.classes_.tolist()], "licence": "Apache-2.0",
        "input": {"width": SIDE, "height": SIDE, "padding": "stretch"},
        "decoder": {"name": "classification", "score": "softmax", "confidence": 0.0}}))
    metrics = {"train_accuracy": accuracy_score(tags, model.predict(features))}
    features, tags = load(options.data, "val")
    if len(tags):
        metrics["accuracy"] = accuracy_score(tags, model.predict(features))
    (options.output / "metrics.json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    main()

"""What a training leaves behind: model.onnx, card.json, plots, final metrics."""
import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import torch

from data import PAD_VALUE
from evaluate import CONFIDENCE, MAX_CANDIDATES, MAX_DETECTIONS, NMS_IOU, coco_metrics, detect
from network import STRIDES, export_onnx

# How far ONNX Runtime's heads may lie from torch's: float32 sums in another order give about 1e-4 on logits.
AGREEMENT = 1e-2


def write_results(output: Path, model, size, labels, images, splits, state, dataset, name, parameters, start_from) -> dict:
    """Exports, evaluates val and test with the published weights, draws, writes card.json; returns the final metrics."""
    export_onnx(model, size, output / "model.onnx")
    plots = output / "plots"
    plots.mkdir(exist_ok=True)
    metrics: dict = {"dataset": dataset, "parameters": parameters, "start_from": start_from}
    curves, shown = {}, None
    for split in ("val", "test"):
        if not splits[split]:
            continue
        found = detect(model, splits[split], images, size)
        result = coco_metrics(splits[split], found, labels)
        curves, shown = result.pop("pr"), (splits[split], found)
        metrics[split] = {**result, "frames": len(splits[split])}
        metrics.update(split=split, map_50_95=result["map_50_95"], map_50=result["map_50"])
    rows = state.history
    metrics.update(
        epochs=state.epoch, best_epoch=state.best_epoch or state.epoch, train_s=sum(r["seconds"] + r.get("eval_s", 0) for r in rows),
        train_cpu_s=sum(r["cpu_s"] for r in rows), seconds_per_epoch=sum(r["seconds"] for r in rows) / max(1, len(rows)),
        onnx_difference=agreement(model, size, output / "model.onnx"),
    )
    card = _card(output, size, labels, dataset, name, metrics)
    partial = output / "card.json.partial"
    partial.write_text(json.dumps(card, indent=1, ensure_ascii=False))
    partial.replace(output / "card.json")
    _draw_curves(plots, rows, curves)
    if shown:
        _draw_predictions(plots / "predictions.png", *shown, labels, metrics[metrics["split"]]["best_f1_confidence"])
    return metrics


def agreement(model, size, file: Path) -> float | None:
    """The largest difference between ONNX Runtime's and torch's heads on noise; None without onnxruntime.

    Raises ValueError when it is too large or not a number: such a file must not leave the training.
    """
    try:
        import onnxruntime
    except ImportError:
        return None
    noise = np.random.default_rng(0).integers(0, 256, (1, size[1], size[0], 3), np.uint8)
    with torch.inference_mode():
        expected = [o.numpy() for o in model(torch.from_numpy(noise))]
    found = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"images": noise})
    # Distances grow exponentially, so they are compared relative to their size.
    difference = max(float(np.max(np.abs(e - f) / np.maximum(1, np.abs(e)))) for e, f in zip(expected, found))
    if not difference <= AGREEMENT:
        raise ValueError(f"{file.name} differs from the trained network by {difference}, at most {AGREEMENT} is right. Report the versions of torch and onnxscript.")
    return difference


def _card(output: Path, size, labels, dataset, name, metrics) -> dict:
    final = metrics.get(metrics.get("split"), {})
    return {
        "name": name,
        "input": {
            "tensor": "images", "width": size[0], "height": size[1], "layout": "NHWC", "dtype": "uint8", "colour": "RGB",
            "scale": 1, "mean": [0, 0, 0], "std": [1, 1, 1],
            "padding": "letterbox-topleft", "pad_value": PAD_VALUE, "interpolation": "linear",
            "note": "scale = min(width/image_width, height/image_height); image resized with cv2.INTER_LINEAR to "
                    "(round(image_width*scale), round(image_height*scale)), placed top-left, padded right and below. "
                    "(x-127)/128 is inside the graph.",
        },
        "decoder": {
            "name": "fcos", "strides": list(STRIDES), "score": "sqrt(sigmoid(cls)*sigmoid(ctr))",
            "outputs": {"cls": "cls_logits", "box": "bbox_regression", "ctr": "bbox_ctrness"},
            "box": "x -/+ distance*stride: left, top, right, bottom, in canvas pixels, then / scale and clipped to the image",
            "points": "strides in the order given; per stride rows, then columns; point (column, row) lies at "
                      "((column+0.5)*stride, (row+0.5)*stride)",
            "candidates": "every (point, class) pair above confidence; at most max_candidates, best first",
            "confidence": CONFIDENCE, "iou": NMS_IOU, "nms": "per class, after clipping",
            "max_candidates": MAX_CANDIDATES, "max_detections": MAX_DETECTIONS,
        },
        "labels": labels,
        "licence": "Apache-2.0",
        "files": {"model.onnx": _file(output / "model.onnx")},
        "weights": {"name": "weights.pt", **_file(output / "weights.pt")},
        "trained_on": {"ref": dataset.get("ref"), "digest": dataset.get("digest")},
        "metrics": {"split": metrics.get("split"), "map_50_95": metrics.get("map_50_95"), "map_50": metrics.get("map_50"),
                    "ap": final.get("ap", {}), "best_f1": final.get("best_f1"),
                    "best_f1_confidence": final.get("best_f1_confidence"), "epochs": metrics["epochs"]},
    }


def _file(file: Path) -> dict:
    return {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "size_bytes": file.stat().st_size}


def _draw_curves(plots: Path, rows: list[dict], curves: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def figure(name, title, x, y, lines):
        fig, axes = pyplot.subplots(figsize=(6, 4), dpi=100)
        for label, xs, ys in lines:
            axes.plot(xs, ys, label=label)
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
        if lines:
            axes.legend()
        fig.tight_layout()
        fig.savefig(plots / name)
        pyplot.close(fig)

    epochs = [r["epoch"] for r in rows]
    figure("loss.png", "Training loss", "epoch", "loss",
           [(n, epochs, [r[f"{n}_loss"] for r in rows]) for n in ("train", "cls", "box", "ctr")])
    evaluated = [r for r in rows if "map_50" in r]
    figure("map.png", "Validation mAP", "epoch", "mAP",
           [(label, [r["epoch"] for r in evaluated], [r[key] for r in evaluated])
            for label, key in (("mAP@[.5:.95]", "map_50_95"), ("mAP@.5", "map_50"))])
    figure("pr.png", "Precision and recall at IoU 0.5", "recall", "precision",
           [(label, np.linspace(0, 1, 101), np.maximum(curve, 0)) for label, curve in curves.items()])


def _draw_predictions(file: Path, samples, found, labels, confidence: float, count: int = 6) -> None:
    """A sheet of frames: what people drew in white, what the model found in its class' colour, above the best-F1 confidence."""
    tiles = []
    for sample, (boxes, scores, class_ids) in list(zip(samples, found))[:count]:
        from data import read_image

        image = read_image(sample.path)
        scale = 480 / max(image.shape[:2])
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        for box in sample.boxes * scale:
            cv2.rectangle(image, *_corners(box), (255, 255, 255), 1)
        for box, score, class_id in zip(boxes * scale, scores, class_ids):
            if score >= confidence:
                hue = np.uint8([[[180 * class_id // max(1, len(labels)), 255, 255]]])
                colour = cv2.cvtColor(hue, cv2.COLOR_HSV2RGB)[0, 0].tolist()
                cv2.rectangle(image, *_corners(box), colour, 2)
                cv2.putText(image, f"{labels[class_id]} {score:.2f}", _corners(box)[0], cv2.FONT_HERSHEY_SIMPLEX, 0.4, colour, 1, cv2.LINE_AA)
        tile = np.full((480, 480, 3), 40, np.uint8)
        tile[: image.shape[0], : image.shape[1]] = image[:480, :480]
        tiles.append(tile)
    while len(tiles) % 3:
        tiles.append(np.full((480, 480, 3), 40, np.uint8))
    sheet = np.concatenate([np.concatenate(tiles[i : i + 3], axis=1) for i in range(0, len(tiles), 3)])
    cv2.imwrite(str(file), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))


def _corners(box) -> tuple[tuple[int, int], tuple[int, int]]:
    x0, y0, x1, y1 = (int(round(float(side))) for side in box)
    return (x0, y0), (x1, y1)

"""Detections of a network on frames, and what they are worth: COCO mAP, best F1, confusion, in original image pixels."""
import contextlib
import io
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from torchvision.ops import box_iou

from training.coco import Sample
from training.images import Images

# The confidence a card's decoder starts from; the workbench chooses a better one on its val split.
CONFIDENCE = 0.05
MAX_DETECTIONS = 100  # COCO's maxDets
# One frame's boxes (n, 4) xyxy in original pixels, scores (n,) and class_ids (n,), best first.
Found = tuple[np.ndarray, np.ndarray, np.ndarray]
# (the network's outputs for one frame, canvas pixels per image pixel, (width, height) of the image) -> the same in torch
Decode = Callable[[tuple[torch.Tensor, ...], float, tuple[int, int]], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


@torch.inference_mode()
def detect(model: nn.Module, decode: Decode, samples: Sequence[Sample], images: Images, batch_size: int = 8) -> list[Found]:
    """Runs the network (in eval mode) over samples, whose letterboxed canvases it takes as (N, H, W, 3) uint8."""
    device = next(model.parameters()).device
    found = []
    for start in range(0, len(samples), batch_size):
        chunk = samples[start : start + batch_size]
        canvases = [images.letterboxed(sample) for sample in chunk]
        outputs = model(torch.from_numpy(np.stack([canvas for canvas, _ in canvases])).to(device))
        outputs = [output.float().cpu() for output in outputs]
        for i, sample in enumerate(chunk):
            parts = decode(tuple(output[i] for output in outputs), canvases[i][1], (sample.width, sample.height))
            found.append(tuple(part.numpy() for part in parts))
    return found


def coco_metrics(samples: Sequence[Sample], found: Sequence[Found], labels: Sequence[str]) -> dict:
    """COCO numbers of detections against samples: map_50_95, map_50, per-label AP, and PR curves at IoU 0.5.

    Returns {"map_50_95", "map_50", "map_75", "ap": {label: ...}, "ap_50": {label: ...}, "pr": {label: (101,) precision},
    "best_f1", "best_f1_confidence"}; a label without an object in `samples` has no entry. Values are in 0..1.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    truth, rows = [], []
    for number, (sample, (boxes, scores, class_ids)) in enumerate(zip(samples, found)):
        for box, class_id, crowd in zip(sample.boxes.tolist(), sample.class_ids.tolist(), sample.crowds.tolist()):
            xywh = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            truth.append({"id": len(truth) + 1, "image_id": number, "category_id": class_id, "bbox": xywh,
                          "area": xywh[2] * xywh[3], "iscrowd": int(crowd)})
        for box, score, class_id in zip(boxes.tolist(), scores.tolist(), class_ids.tolist()):
            rows.append({"image_id": number, "category_id": class_id, "score": score,
                         "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]]})
    present = sorted({row["category_id"] for row in truth if not row["iscrowd"]})
    if not present or not rows:
        zeros = {labels[k]: 0.0 for k in present}
        return {"map_50_95": 0.0, "map_50": 0.0, "map_75": 0.0, "ap": zeros, "ap_50": dict(zeros),
                "pr": {labels[k]: np.zeros(101) for k in present}, "best_f1": 0.0, "best_f1_confidence": CONFIDENCE}
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO({
            "images": [{"id": i, "width": s.width, "height": s.height} for i, s in enumerate(samples)],
            "annotations": truth, "categories": [{"id": k, "name": name} for k, name in enumerate(labels)],
        })
        evaluation = COCOeval_faster(coco, coco.loadRes(rows), "bbox")
        evaluation.params.maxDets = [1, 10, MAX_DETECTIONS]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = np.asarray(evaluation.eval["precision"])  # (10 IoUs, 101 recalls, C, areas, maxDets)
    ap = {labels[k]: float(precision[:, :, k, 0, -1].mean()) for k in present}
    ap_50 = {labels[k]: float(precision[0, :, k, 0, -1].mean()) for k in present}
    best_f1, best_confidence = _best_f1(samples, found)
    return {
        "map_50_95": float(np.mean(list(ap.values()))), "map_50": float(np.mean(list(ap_50.values()))),
        "map_75": float(np.mean([precision[5, :, k, 0, -1].mean() for k in present])), "ap": ap, "ap_50": ap_50,
        "pr": {labels[k]: precision[0, :, k, 0, -1] for k in present},
        "best_f1": best_f1, "best_f1_confidence": best_confidence,
    }


def _best_f1(samples: Sequence[Sample], found: Sequence[Found]) -> tuple[float, float]:
    """The highest F1 over all classes at IoU 0.5 and the confidence it is reached at; greedy matching, best score first."""
    scores, hits, total = [], [], 0
    for sample, (boxes, confidences, class_ids) in zip(samples, found):
        is_used = ~sample.crowds
        truth, truth_ids = torch.from_numpy(sample.boxes[is_used]), sample.class_ids[is_used]
        total += len(truth)
        overlaps = box_iou(torch.from_numpy(boxes), truth).numpy()
        free = np.ones(len(truth), bool)
        for i, class_id in enumerate(class_ids):
            usable = overlaps[i] * (free & (truth_ids == class_id)) if len(truth) else np.zeros(0)
            is_hit = bool(len(usable)) and usable.max() >= 0.5
            if is_hit:
                free[usable.argmax()] = False
            scores.append(confidences[i])
            hits.append(is_hit)
    if not scores or not total:
        return 0.0, CONFIDENCE
    order = np.argsort(scores)[::-1]
    true_positives = np.cumsum(np.array(hits)[order])
    f1 = 2 * true_positives / (np.arange(1, len(order) + 1) + total)
    best = int(f1.argmax())
    return float(f1[best]), float(np.array(scores)[order][best])


def confusion(samples: Sequence[Sample], found: Sequence[Found], class_count: int, confidence: float) -> np.ndarray:
    """(C + 1, C + 1) counts: row the drawn label, column the detected one, the last of each "nothing".

    Of the detections from `confidence` on, pairs of any labels with an IoU of 0.5 or more are taken, best IoU first; what
    is left over was missed or is spurious. Crowds are left out.
    """
    counts = np.zeros((class_count + 1, class_count + 1), np.int64)
    for sample, (boxes, scores, class_ids) in zip(samples, found):
        truth, truth_ids = sample.boxes[~sample.crowds], sample.class_ids[~sample.crowds]
        boxes, class_ids = boxes[scores >= confidence], class_ids[scores >= confidence]
        overlaps = box_iou(torch.from_numpy(boxes), torch.from_numpy(truth)).numpy()
        missed, spurious = set(range(len(truth))), set(range(len(boxes)))
        for at in np.argsort(-overlaps, axis=None, kind="stable"):
            i, j = divmod(int(at), len(truth))
            if overlaps[i, j] < 0.5:
                break
            if i in spurious and j in missed:
                spurious.remove(i)
                missed.remove(j)
                counts[truth_ids[j], class_ids[i]] += 1
        for j in missed:
            counts[truth_ids[j], -1] += 1
        for i in spurious:
            counts[-1, class_ids[i]] += 1
    return counts


def per_class(counts: np.ndarray, metrics: dict, labels: Sequence[str]) -> list[dict]:
    """A row a label: objects, AP, AP at IoU 0.5, and precision and recall at the confidence of `confusion`'s counts; None
    where nothing was drawn or detected."""
    rows = []
    for k, label in enumerate(labels):
        objects, detected, hits = int(counts[k].sum()), int(counts[:, k].sum()), int(counts[k, k])
        rows.append({"label": label, "objects": objects, "ap_50_95": metrics["ap"].get(label),
                     "ap_50": metrics["ap_50"].get(label), "precision": hits / detected if detected else None,
                     "recall": hits / objects if objects else None})
    return rows

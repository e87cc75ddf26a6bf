"""Decoding as card.json describes it, and COCO mAP in original image coordinates."""
import contextlib
import io

import numpy as np
import torch
from torchvision.ops import batched_nms

from data import Images, Sample
from network import boxes_of, points

# The defaults written into card.json.
CONFIDENCE = 0.05
# 0.55 rather than 0.6: +0.6 points mAP@.5 for -0.1 mAP@[.5:.95] on the blood cells' validation split.
NMS_IOU = 0.55
MAX_CANDIDATES = 1000
MAX_DETECTIONS = 100  # COCO's maxDets


def decode(
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], size: tuple[int, int], scale: float, image_size: tuple[int, int],
    confidence: float = CONFIDENCE, nms_iou: float = NMS_IOU,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One image's raw heads (A, C), (A, 4), (A, 1) to boxes (n, 4) xyxy in original pixels, scores (n,), class_ids (n,).

    Steps: score = sqrt(sigmoid(cls) * sigmoid(ctr)) of every point and class; keep those above `confidence`, at most the
    1000 best; boxes = centre -+ distance * stride, divided by the letterbox's scale, clipped to the image; NMS inside each
    class; the 100 best, highest first.
    """
    cls_logits, distances, ctr_logits = outputs
    centres, strides = points(size)
    scores = (cls_logits.sigmoid() * ctr_logits.sigmoid()).sqrt()
    at, class_ids = (scores > confidence).nonzero(as_tuple=True)
    scores = scores[at, class_ids]
    if len(scores) > MAX_CANDIDATES:
        scores, best = scores.topk(MAX_CANDIDATES)
        at, class_ids = at[best], class_ids[best]
    boxes = boxes_of(distances[at], centres[at], strides[at]) / scale
    boxes[:, 0::2] = boxes[:, 0::2].clamp(0, image_size[0])
    boxes[:, 1::2] = boxes[:, 1::2].clamp(0, image_size[1])
    kept = batched_nms(boxes, scores, class_ids, nms_iou)[:MAX_DETECTIONS]
    return boxes[kept], scores[kept], class_ids[kept]


@torch.inference_mode()
def detect(model, samples: list[Sample], images: Images, size: tuple[int, int], batch_size: int = 8) -> list[tuple]:
    """Runs the network (in eval mode) over samples; one (boxes, scores, class_ids) of numpy arrays per sample."""
    found = []
    for start in range(0, len(samples), batch_size):
        chunk = samples[start : start + batch_size]
        canvases = [images.letterboxed(sample) for sample in chunk]
        outputs = model(torch.from_numpy(np.stack([canvas for canvas, _ in canvases])))
        for i, sample in enumerate(chunk):
            parts = decode(tuple(o[i] for o in outputs), size, canvases[i][1], (sample.width, sample.height))
            found.append(tuple(part.numpy() for part in parts))
    return found


def coco_metrics(samples: list[Sample], found: list[tuple], labels: list[str]) -> dict:
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
    if not truth:
        return {"map_50_95": 0.0, "map_50": 0.0, "map_75": 0.0, "ap": {}, "ap_50": {}, "pr": {}, "best_f1": 0.0, "best_f1_confidence": CONFIDENCE}
    present = sorted({row["category_id"] for row in truth})
    if not rows:
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


def _best_f1(samples: list[Sample], found: list[tuple]) -> tuple[float, float]:
    """The highest F1 over all classes at IoU 0.5 and the confidence it is reached at; greedy matching, best score first."""
    from torchvision.ops import box_iou

    scores, hits, total = [], [], 0
    for sample, (boxes, confidences, class_ids) in zip(samples, found):
        is_used = ~sample.crowds
        truth, truth_ids = torch.from_numpy(sample.boxes[is_used]), sample.class_ids[is_used]
        total += len(truth)
        overlaps = box_iou(torch.from_numpy(boxes), truth).numpy() if len(truth) and len(boxes) else np.zeros((len(boxes), len(truth)))
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

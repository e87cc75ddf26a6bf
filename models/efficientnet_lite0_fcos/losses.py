"""Which points learn which object, and what they are told: dynamic soft-label assignment, quality focal loss, GIoU.

Chosen over FCOS' centre sampling because boxes of touching cells overlap: the points that already fit an object best are
its positives (RTMDet: Lyu et al., 2022, section 3.3), and the class score learns the IoU it reached (Li et al.,
Generalized Focal Loss, 2020), so that sorting by score sorts by box quality.
"""
import torch
import torch.nn.functional as F
from torchvision.ops import box_iou, generalized_box_iou_loss

# RTMDet's constants (mmdetection, dynamic_soft_label_assigner.py).
SOFT_CENTRE_RADIUS = 3.0
IOU_WEIGHT = 3.0
CANDIDATES = 13
BOX_WEIGHT = 2.0
NEVER = 1e8


def detection_loss(
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], boxes: torch.Tensor,
    targets: list[tuple[torch.Tensor, torch.Tensor]], centres: torch.Tensor, strides: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The loss parts {"cls", "box", "ctr"} of a batch; their sum is trained on.

    outputs  of Detector; boxes (N, A, 4) xyxy decoded from them in pixels; targets per image (boxes (m, 4), class_ids (m,))
    """
    cls_logits, _, ctr_logits = outputs
    quality = torch.zeros_like(cls_logits)
    predicted, wanted, reached, fit = [], [], [], []
    for i, (gt_boxes, gt_ids) in enumerate(targets):
        if len(gt_boxes) == 0:
            continue
        at, gt, iou = assign(cls_logits[i].detach(), boxes[i].detach(), gt_boxes, gt_ids, centres, strides)
        quality[i, at, gt_ids[gt]] = iou
        predicted.append(boxes[i, at])
        wanted.append(gt_boxes[gt])
        reached.append(iou)
        fit.append(ctr_logits[i, at, 0])
    scores = cls_logits.sigmoid()
    cls = F.binary_cross_entropy_with_logits(cls_logits, quality, reduction="none") * (quality - scores).abs().square()
    if not predicted:
        zero = boxes.sum() * 0 + ctr_logits.sum() * 0
        return {"cls": cls.sum(), "box": zero, "ctr": zero}
    weights = torch.cat(reached)
    # At the very start hardly a box overlaps; without the floor one lucky point would set the whole step.
    total = weights.sum().clamp(min=1.0)
    box = (generalized_box_iou_loss(torch.cat(predicted), torch.cat(wanted), reduction="none") * weights.clamp(min=0.1)).sum()
    ctr = F.binary_cross_entropy_with_logits(torch.cat(fit), weights, reduction="none").mean()
    return {"cls": cls.sum() / total, "box": BOX_WEIGHT * box / total, "ctr": ctr}


@torch.no_grad()
def assign(cls_logits, boxes, gt_boxes, gt_ids, centres, strides) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Matches points to the objects of one image.

    cls_logits (A, C), boxes (A, 4) xyxy px, gt_boxes (m, 4), gt_ids (m,), centres (A, 2), strides (A,)
    Returns (at (k,) point indices, gt (k,) object indices, iou (k,) of prediction and object). An object has as many
    points as the sum of its 13 best IoUs, at least one; a point that several objects want goes to the cheapest.
    """
    gt_centres = (gt_boxes[:, :2] + gt_boxes[:, 2:]) / 2
    sides = torch.cat([centres[:, None] - gt_boxes[:, :2], gt_boxes[:, 2:] - centres[:, None]], -1).min(-1).values
    distance = (centres[:, None] - gt_centres).square().sum(-1).sqrt()
    # An object smaller than the finest grid may contain no point: its nearest ones stand in.
    is_candidate = (sides > 0) | (distance <= strides.min())
    at = is_candidate.any(1).nonzero()[:, 0]
    is_candidate, distance, strides = is_candidate[at], distance[at], strides[at]
    iou = box_iou(boxes[at], gt_boxes)
    logits = cls_logits[at]
    scores = logits.sigmoid()
    as_background = F.softplus(logits) * scores.square()
    own, own_scores = logits[:, gt_ids], scores[:, gt_ids]
    as_object = F.binary_cross_entropy_with_logits(own, iou, reduction="none") * (iou - own_scores).square()
    cost = as_background.sum(1, keepdim=True) - as_background[:, gt_ids] + as_object
    cost = cost - IOU_WEIGHT * (iou + 1e-7).log() + 10 ** (distance / strides[:, None] - SOFT_CENTRE_RADIUS)
    cost = torch.where(is_candidate, cost, NEVER)
    counts = torch.where(is_candidate, iou, 0).topk(min(CANDIDATES, len(at)), dim=0).values.sum(0).int().clamp(min=1)
    ranks = cost.argsort(0).argsort(0)
    is_matched = (ranks < counts) & (cost < NEVER)
    cost = torch.where(is_matched, cost, NEVER)
    best, gt = cost.min(1)
    is_positive = best < NEVER
    kept = is_positive.nonzero()[:, 0]
    return at[kept], gt[kept], iou[kept, gt[kept]]

"""What a student learns from a teacher: soft targets for the classes of its default boxes.

Chen et al., Learning Efficient Object Detection Models with Knowledge Distillation, NIPS 2017, section 3.2: the class loss
is share * hard + (1 - share) * soft, and the soft one is a cross-entropy with the teacher's chances in which the background
weighs more than a label, for it is what a detector mostly takes objects for. It is Hinton et al.'s (Distilling the
Knowledge in a Neural Network, 2015) at temperature 1. Written here as Kullback-Leibler divergence, which has the same
gradient and is 0 where the student agrees. That paper's two other terms (bounded regression, hints) need the teacher's
inner layers or boxes of the same anchors, and are left out: boxes are learned from labels.
"""
import torch
from torch.nn.functional import log_softmax
from torchvision.ops import box_iou

from ssdlite320_mobilenet_v3.losses import MATCHED, NEGATIVES

BACKGROUND_WEIGHT = 1.5  # Chen et al., below formula 4; labels weigh 1


@torch.no_grad()
def soft_targets(anchors: torch.Tensor, boxes: torch.Tensor, class_ids: torch.Tensor, confidences: torch.Tensor,
                 class_count: int) -> torch.Tensor:
    """(A, 1 + C) chances, the background first, which sum to 1: for each label the highest confidence of the teacher's
    boxes (m, 4) of it that overlap a default box with IoU 0.5 or more, or have no better one than it."""
    chances = torch.zeros(len(anchors), class_count, device=anchors.device)
    if len(boxes):
        overlaps = box_iou(anchors, boxes)
        is_near = overlaps >= MATCHED
        is_near[overlaps.argmax(0), torch.arange(len(boxes), device=anchors.device)] = True
        chances.scatter_reduce_(1, class_ids.expand(len(anchors), -1), is_near * confidences, "amax")
    chances = chances / chances.sum(1, keepdim=True).clamp(min=1)
    # A sum of shares may be just above 1 by a rounding, and the logarithm of less than nothing is no number.
    return torch.cat([(1 - chances.sum(1, keepdim=True)).clamp(min=0), chances], 1)


def soft_loss(cls_logits: torch.Tensor, targets: torch.Tensor, is_taught: torch.Tensor) -> torch.Tensor:
    """How far the student is from the teacher on a batch; a scalar.

    cls_logits, targets (N, A, 1 + C); is_taught (N, A) false where the frame shows what the teacher does not know

    As in the multi-box loss all default boxes take part on which the teacher sees something, and three times as many of
    an image's others, those with the highest loss; divided by the number of the former.
    """
    weights = torch.ones_like(targets[0, 0])
    weights[0] = BACKGROUND_WEIGHT
    each = (weights * (torch.xlogy(targets, targets) - targets * log_softmax(cls_logits, -1))).sum(-1)
    is_seen = (targets[..., 1:].sum(-1) > 0) & is_taught
    ranks = each.detach().masked_fill(is_seen | ~is_taught, -torch.inf).argsort(1, descending=True).argsort(1)
    most = (NEGATIVES * is_seen.sum(1, keepdim=True)).clamp(min=NEGATIVES)
    is_other = ~is_seen & is_taught & (ranks < most)
    return each[is_seen | is_other].sum() / is_seen.sum().clamp(min=1)

"""The multi-box loss: smooth L1 of matched default boxes, cross-entropy with hard negatives (Liu et al., SSD, 2016)."""
import torch
import torch.nn.functional as F
from torchvision.ops import box_iou

from ssdlite320_mobilenet_v3.network import offsets_of

MATCHED = 0.5  # least IoU of a default box with its object; section 2.2
NEGATIVES = 3  # as many background boxes a matched one take part, those with the highest loss; section 2.2


def multibox_loss(outputs: tuple[torch.Tensor, torch.Tensor], targets: list[tuple[torch.Tensor, torch.Tensor]],
                  anchors: torch.Tensor) -> dict[str, torch.Tensor]:
    """The loss parts {"cls", "box"} of a batch.

    outputs  of Detector; targets per image: boxes (m, 4) xyxy in canvas pixels, class_ids (m,); anchors (A, 4)
    """
    cls_logits, offsets = outputs
    wanted = torch.stack([match(anchors, boxes) for boxes, _ in targets])
    classes = torch.zeros_like(wanted)
    box = offsets.sum() * 0
    for i, (boxes, ids) in enumerate(targets):
        at = (wanted[i] >= 0).nonzero()[:, 0]
        if len(at):
            classes[i, at] = ids[wanted[i, at]] + 1
            box = box + F.smooth_l1_loss(offsets[i, at], offsets_of(anchors[at], boxes[wanted[i, at]]), reduction="sum")
    each = F.cross_entropy(cls_logits.flatten(0, 1), classes.flatten(), reduction="none").view_as(classes)
    is_matched = classes > 0
    # The i-th highest loss of an image's background boxes takes part when i < 3 * its matched boxes; a frame without an
    # object teaches its own background too.
    ranks = each.detach().masked_fill(is_matched, -1).argsort(1, descending=True).argsort(1)
    is_negative = ~is_matched & (ranks < (NEGATIVES * is_matched.sum(1, keepdim=True)).clamp(min=NEGATIVES))
    total = is_matched.sum().clamp(min=1)
    return {"cls": each[is_matched | is_negative].sum() / total, "box": box / total}


@torch.no_grad()
def match(anchors: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """(A,) index of the object a default box learns, -1 for the background: the one it overlaps most with IoU 0.5 or
    more; and every object has its own best default box."""
    if not len(boxes):
        return torch.full((len(anchors),), -1, dtype=torch.long, device=anchors.device)
    overlaps = box_iou(anchors, boxes)
    best, found = overlaps.max(1)
    found[best < MATCHED] = -1
    found[overlaps.argmax(0)] = torch.arange(len(boxes), device=anchors.device)
    return found

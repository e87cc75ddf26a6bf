"""What a segmentation learns by: cross entropy of every pixel and the overlap of every label."""
import torch
from torch.nn.functional import cross_entropy

from segmentation.regions import IGNORED


def segmentation_loss(logits: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """{"ce", "dice"} of logits (N, K, h, w) and class ids (N, h, w) int64, 0 the background; IGNORED is left out.

    dice  1 - the mean soft Dice of the labels (not the background) that are in the batch: 2 sum(p g) / (sum p + sum g),
          as Sudre et al., Generalised Dice overlap, 2017, section 2 has it; it weighs a small label like a large one,
          which cross entropy does not. 1 is added above and below (Jadon, A survey of loss functions, 2020).
    """
    is_known = target != IGNORED
    ce = cross_entropy(logits, target, ignore_index=IGNORED, reduction="sum") / is_known.sum().clamp(min=1)
    chances = logits.float().softmax(1) * is_known[:, None]
    truth = torch.zeros_like(chances).scatter_(1, (target * is_known)[:, None], 1.0) * is_known[:, None]
    both, apart = (chances * truth).sum((0, 2, 3)), (chances + truth).sum((0, 2, 3))
    is_there = truth.sum((0, 2, 3)) > 0
    is_there[0] = False
    dice = 1 - (2 * both + 1) / (apart + 1)
    return {"ce": ce, "dice": (dice * is_there).sum() / is_there.sum().clamp(min=1)}

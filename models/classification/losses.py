"""What tags are learned by: softmax cross entropy where one label applies, binary cross entropy where any number do."""
import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

# A label of very few frames would otherwise decide each step that it is in.
MOST_WEIGHT = 10.0


def class_weights(truth: np.ndarray, is_single: bool) -> np.ndarray:
    """(C,) float32 weights against imbalance, of the (n, C) bool tags of the training frames; 1 for all where balanced.

    One label a frame: n / (C n_c), King and Zeng, Logistic Regression in Rare Events Data, 2001 (scikit-learn's
    "balanced"), C counting the labels that are there. Several: frames without / frames with, PyTorch's pos_weight. Both
    at most MOST_WEIGHT; 1 for a label that no frame has.
    """
    count = truth.sum(0)
    some = np.maximum(count, 1)
    weights = len(truth) / (max(1, (count > 0).sum()) * some) if is_single else (len(truth) - count) / some
    return np.where(count > 0, np.clip(weights, 1 / MOST_WEIGHT, MOST_WEIGHT), 1).astype(np.float32)


def tag_loss(logits: torch.Tensor, truth: torch.Tensor, weights: torch.Tensor, is_single: bool,
             smoothing: float) -> dict[str, torch.Tensor]:
    """{"tags": loss} of logits (N, C) and 0/1 tags (N, C) float. smoothing: the share of the truth that goes to all
    labels alike (Szegedy et al., Rethinking the Inception Architecture, 2016, section 7)."""
    if is_single:
        return {"tags": cross_entropy(logits, truth.argmax(1), weight=weights, label_smoothing=smoothing)}
    smooth = truth * (1 - smoothing) + smoothing / 2
    return {"tags": binary_cross_entropy_with_logits(logits, smooth, pos_weight=weights)}

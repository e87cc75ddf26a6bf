"""How well painted class ids cover those that people drew."""
import numpy as np

from segmentation.regions import IGNORED


def confusion(found: np.ndarray, truth: np.ndarray, kinds: int) -> np.ndarray:
    """(kinds, kinds) counts of pixels, rows what people drew, columns what was found, without pixels of IGNORED."""
    is_known = truth != IGNORED
    pairs = truth[is_known].astype(np.int64) * kinds + found[is_known]
    return np.bincount(pairs, minlength=kinds * kinds).reshape(kinds, kinds)


def overlap(matrix: np.ndarray, labels: list[str]) -> dict:
    """{"miou", "pixel_accuracy", "background_iou", "per_class": [{"label", "pixels", "iou",
    "dice", "precision", "recall"}]}.

    matrix  of `confusion`, the background first

    IoU = both / (drawn + found - both) over all frames together (Everingham et al., PASCAL VOC, 2010). `miou` is the
    mean over the labels that people drew somewhere, without the background; 0 when they drew none.
    """
    both, drawn, found = np.diag(matrix), matrix.sum(1), matrix.sum(0)

    def share(part, whole):
        return float(part / whole) if whole else 0.0

    rows = [{"label": label, "pixels": int(drawn[k]), "iou": share(both[k], drawn[k] + found[k] - both[k]),
             "dice": share(2 * both[k], drawn[k] + found[k]), "precision": share(both[k], found[k]),
             "recall": share(both[k], drawn[k])} for k, label in enumerate(labels, 1) if drawn[k]]
    return {"miou": float(np.mean([row["iou"] for row in rows])) if rows else 0.0,
            "pixel_accuracy": share(both.sum(), matrix.sum()),
            "background_iou": share(both[0], drawn[0] + found[0] - both[0]), "per_class": rows}

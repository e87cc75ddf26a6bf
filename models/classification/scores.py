"""How well tags were set: accuracy, precision, recall, F1 and average precision of every label."""
import numpy as np

THRESHOLDS = np.arange(0.05, 0.96, 0.05)


def scores(chances: np.ndarray, truth: np.ndarray, labels: list[str], threshold: float | None) -> dict:
    """Figures of (n, C) chances against (n, C) bool tags.

    threshold  None where exactly one label applies: the most likely one is set; else those above it are

    Returns {"accuracy", "macro_f1", "map", "per_class": [{"label", "frames", "precision", "recall", "f1", "ap"}], "pr":
    {label: (recall, precision)}}. accuracy: of the frames with tags, the share whose likeliest label is one
    (top-1). macro_f1 and map: means over the labels that some frame has; AP = sum of (R_n - R_n-1) P_n over all
    thresholds.
    """
    from sklearn.metrics import average_precision_score, precision_recall_curve

    found = tags_of(chances, threshold)
    both, wanted, given = (found & truth).sum(0), truth.sum(0), found.sum(0)
    rows, curves = [], {}
    for k, label in enumerate(labels):
        if wanted[k]:
            precision, recall, _ = precision_recall_curve(truth[:, k], chances[:, k])
            curves[label] = (recall[::-1], precision[::-1])
            rows.append({"label": label, "frames": int(wanted[k]), "precision": float(both[k] / max(1, given[k])),
                         "recall": float(both[k] / wanted[k]), "f1": float(2 * both[k] / (wanted[k] + given[k])),
                         "ap": float(average_precision_score(truth[:, k], chances[:, k]))})
    figures = {name: float(np.mean([row[key] for row in rows])) if rows else 0.0
               for name, key in (("macro_f1", "f1"), ("map", "ap"))}
    hits = tags_of(chances, None) & truth
    figures["accuracy"] = float(hits.any(1).sum() / max(1, truth.any(1).sum()))
    return {**figures, "per_class": rows, "pr": curves}


def tags_of(chances: np.ndarray, threshold: float | None) -> np.ndarray:
    """(n, C) bool: the tags that (n, C) chances set."""
    if threshold is not None:
        return chances > threshold
    return np.eye(chances.shape[1], dtype=bool)[chances.argmax(1)]


def confusion(chances: np.ndarray, truth: np.ndarray, threshold: float | None) -> np.ndarray:
    """(C + 1, C + 1) counts: row a label people set, column one the model set, the last of each "nothing".

    A label both set is on the diagonal. Of a frame's others each one missed is paired with each one set wrongly, or
    with nothing; where one label applies that is the plain confusion matrix.
    """
    count = truth.shape[1]
    matrix = np.zeros((count + 1, count + 1), int)
    for found, drawn in zip(tags_of(chances, threshold), truth):
        np.add.at(matrix, (np.flatnonzero(found & drawn),) * 2, 1)
        missed, spurious = np.flatnonzero(drawn & ~found), np.flatnonzero(found & ~drawn)
        if len(missed) or len(spurious):
            pairs = np.meshgrid(missed if len(missed) else [count], spurious if len(spurious) else [count])
            np.add.at(matrix, tuple(one.ravel() for one in pairs), 1)
    return matrix


def best_threshold(chances: np.ndarray, truth: np.ndarray) -> float:
    """The one of THRESHOLDS above which tags agree best with people's: the highest F1 over all tags together."""
    f1 = [2 * ((chances > one) & truth).sum() / max(1, (chances > one).sum() + truth.sum()) for one in THRESHOLDS]
    return float(THRESHOLDS[int(np.argmax(f1))].round(2))

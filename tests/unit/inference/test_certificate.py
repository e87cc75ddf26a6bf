"""The figures of a certificate, its seal, and every reason why one is refused."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from workbench.annotation import Annotation
from workbench.boxes import Detections
from workbench.certificates import Certificates
from workbench.dataset import Frame, LabeledFrame
from workbench.errors import Invalid
from workbench.evaluation.metrics import score
from workbench.evaluation.paired import matches
from workbench.evaluation.primary import figure
from workbench.evaluation.regions import score_regions
from workbench.evaluation.tags import score_tags
from workbench.inference.certificate import LIMITS, Measured, as_now, compare, judge, key, sign, verify
from workbench.ports import BackendReport
from workbench.records import Records
from workbench.taxonomy import Taxonomy

COLOURS = Taxonomy(("red", "blue", "never"))
FACTS: dict[str, Any] = {
    "model": "student@3-int8", "file_sha256": "f" * 64, "backend": "openvino", "device": "A CPU", "precision": "int8",
    "library": "openvino 2026.4.1", "calibration_digest": "c" * 64, "on": "cells@1.0.0/test", "metric": "map_50_95",
    "frames": 72, "labelled": 70, "loss": 0.001,
    "per_class": {"red": {"fp32": 0.6, "int8": 0.599, "interval": [-0.002, 0.004], "truth": 500}},
    "speedup": 2.1, "limits": dict(LIMITS), "passed": True, "reasons": []}
ABOUT = {"model": "student@3-int8", "file_sha256": "f" * 64, "backend": "openvino", "device": "A CPU",
         "library": "openvino 2026.4.2", "calibration_digest": "c" * 64}
KEY = bytes(range(32))


Scene = tuple[dict[str, tuple[Annotation, ...]], dict[str, Detections], dict[str, Detections]]


def scene(seed: int, frames: int = 12) -> Scene:
    """Truth with a crowd here and there, and two detectors that see most of it, shifted by some pixels."""
    random = np.random.default_rng(seed)
    truth, found = {}, ({}, {})
    for index in range(frames):
        count = int(random.integers(0, 7))
        corners = random.uniform(0, 80, (count, 2))
        boxes = np.concatenate([corners, corners + random.uniform(5, 20, (count, 2))], axis=1)
        ids = random.integers(0, 2, count)
        truth[f"{index}.png"] = tuple(
            Annotation(COLOURS.labels[class_id], tuple(box),
                       attributes={"iscrowd": True} if random.random() < 0.1 else {})
            for box, class_id in zip(boxes.tolist(), ids))
        for detector, spread in zip(found, (1.0, 2.5)):
            moved = boxes + random.normal(0, spread, boxes.shape)
            strays = random.uniform(0, 80, (4, 2))
            moved = np.concatenate([moved, np.concatenate([strays, strays + 12], axis=1)])
            detector[f"{index}.png"] = Detections(
                np.sort(moved.reshape(-1, 2, 2), axis=1).reshape(-1, 4),
                np.concatenate([ids, random.integers(0, 3, 4)]),
                np.concatenate([random.uniform(0.3, 1, count), random.uniform(0, 0.6, 4)]).astype(np.float32))
    return truth, *found


def labelled(truth: Mapping[str, Sequence[Annotation]], side: int = 100) -> list[LabeledFrame]:
    return [LabeledFrame(Frame(name, side, side, "0" * 32, "0" * 64, 1), tuple(drawn), "test")
            for name, drawn in truth.items()]


def measured(metric: str, frames: list[LabeledFrame], found: Mapping[str, Detections], confidence: float,
             is_exclusive: bool = True) -> Measured:
    """As the steps measure a model of the metric's task."""
    truth = {one.frame.name: one.annotations for one in frames}
    if metric in ("accuracy", "map"):
        scored = score_tags(truth, found, COLOURS, confidence, is_exclusive)
    else:
        scored = score(truth, found, COLOURS, confidence)
    if metric == "miou":
        scored = replace(scored, regions=score_regions(frames, found, COLOURS, confidence, has_instances=False))
    return Measured(found, scored, figure(metric, frames, found, scored, COLOURS))


def compared(truth: Mapping[str, Sequence[Annotation]], fp32: Mapping[str, Detections], int8: Mapping[str, Detections],
             confidence: float, metric: str = "map_50_95", is_exclusive: bool = True) -> dict[str, Any]:
    frames = labelled(truth)
    both = (measured(metric, frames, found, confidence, is_exclusive) for found in (fp32, int8))
    return compare(metric, frames, *both)


def square(left: float, label: str = "red", side: float = 20) -> Annotation:
    ring = ((left, 10.0), (left + side, 10.0), (left + side, 10.0 + side), (left, 10.0 + side))
    return Annotation(label, (left, 10, left + side, 10 + side), ring)


def regions(*drawn: Annotation, confidence: float = 0.9) -> Detections:
    ids = [COLOURS.class_id(one.label) for one in drawn]
    return Detections(np.array([one.xyxy for one in drawn]).reshape(-1, 4), ids, np.full(len(drawn), confidence),
                      polygons=tuple(np.array(one.polygon) for one in drawn))


def tags(**confidences: float) -> Detections:
    count = len(confidences)
    return Detections(np.tile([0, 0, 9, 9], (count, 1)), [COLOURS.class_id(label) for label in confidences],
                      list(confidences.values()))


class TestFigures:
    @pytest.mark.parametrize("seed", range(6))
    def test_average_precision_is_coco_s(self, seed: int) -> None:
        truth, fp32, _ = scene(seed)
        expected = score(truth, fp32, COLOURS).per_class
        names = sorted(truth)
        for class_id, label in enumerate(COLOURS.labels[:2]):
            found = matches([truth[name] for name in names], [fp32[name] for name in names], label, class_id)
            assert found.average_precision(np.ones(len(names))) == pytest.approx(expected[label]["ap"], abs=1e-9)

    def test_a_frame_drawn_twice_counts_as_two_equal_frames(self) -> None:
        truth, fp32, _ = scene(3)
        names = sorted(truth)
        weights = np.arange(len(names)) % 3
        twice = [name for name, weight in zip(names, weights) for _ in range(weight)]

        def matched(order: list[str]) -> Any:
            return matches([truth[name] for name in order], [fp32[name] for name in order], "red", 0)
        assert matched(names).average_precision(weights) == pytest.approx(
            matched(twice).average_precision(np.ones(len(twice))), abs=1e-9)

    def test_losses_lie_in_their_intervals_and_the_worse_detector_loses(self) -> None:
        truth, fp32, int8 = scene(1, frames=60)
        figures = compared(truth, fp32, int8, confidence=0.3)
        low, high = figures["loss_interval"]
        assert 0 < low <= figures["loss"] <= high
        assert figures["loss"] == pytest.approx(figures["fp32"]["map_50_95"] - figures["int8"]["map_50_95"])
        assert figures["frames"] == 60 and figures["per_class"].keys() == {"red", "blue"}
        assert sum(row["truth"] for row in figures["per_class"].values()) == figures["truth"]
        for row in figures["per_class"].values():
            assert row["interval"][0] <= row["fp32"] - row["int8"] <= row["interval"][1]
        json.dumps(figures, allow_nan=False)

    def test_the_same_detections_lose_nothing_for_certain(self) -> None:
        truth, fp32, _ = scene(2)
        figures = compared(truth, fp32, fp32, confidence=0.3)
        assert figures["loss"] == 0 and figures["loss_interval"] == [0, 0]
        assert figures["box_shift_px"] == {"median": 0, "p95": 0}

    def test_box_shift_is_the_largest_side_s_in_pixels_over_boxes_both_draw(self) -> None:
        truth = {"a": (Annotation("red", (10, 10, 30, 30)),)}
        fp32 = {"a": Detections([[10, 10, 30, 30], [50, 50, 60, 60]], [0, 0], [0.9, 0.2])}
        int8 = {"a": Detections([[10, 11, 30, 33], [50, 50, 65, 65]], [0, 0], [0.8, 0.2])}
        assert compared(truth, fp32, int8, confidence=0.5)["box_shift_px"] == {"median": 3, "p95": 3}
        nothing = {"a": Detections.empty()}
        assert compared(truth, fp32, nothing, 0.5)["box_shift_px"] == {"median": None, "p95": None}


class TestFiguresOfTags:
    TRUTH = {f"{number}.png": (Annotation(("red", "blue")[number % 2]),) for number in range(40)}
    RIGHT = {name: tags(**{one.label: 0.9, "never": 0.1}) for name, (one,) in TRUTH.items()}

    def test_they_are_about_accuracy_and_how_often_the_same_tag_is_set(self) -> None:
        wrong = {**self.RIGHT, "0.png": tags(red=0.4, blue=0.6), "2.png": tags(red=0.4, blue=0.6)}
        figures = compared(self.TRUTH, self.RIGHT, wrong, 0.5, "accuracy")
        assert (figures["metric"], figures["frames"], figures["labelled"], figures["truth"]) == ("accuracy", 40, 40, 40)
        assert figures["fp32"]["accuracy"] == 1 and figures["int8"]["accuracy"] == pytest.approx(0.95)
        assert figures["loss"] == pytest.approx(0.05) and figures["same_tags"] == pytest.approx(0.95)
        assert figures["loss_interval"][0] <= 0.05 <= figures["loss_interval"][1] < 0.2
        assert figures["per_class"]["red"] | {"interval": 0} == {
            "fp32": 1, "int8": pytest.approx(0.9), "truth": 20, "interval": 0}
        assert figures["per_class"]["blue"]["interval"] == [0, 0] and figures["per_class"].keys() == {"red", "blue"}
        assert "box_shift_px" not in figures and "same_pixels" not in figures
        json.dumps(figures, allow_nan=False)

    def test_frames_without_a_tag_prove_nothing(self) -> None:
        untagged = {f"more {number}.png": () for number in range(5)}
        figures = compared({**self.TRUTH, **untagged}, self.RIGHT, self.RIGHT, 0.5, "accuracy")
        assert (figures["frames"], figures["labelled"], figures["loss"]) == (45, 40, 0) and figures["same_tags"] == 1

    def test_of_several_tags_a_frame_all_that_are_set_have_to_be_the_same(self) -> None:
        truth = {name: (*drawn, Annotation("never")) for name, drawn in self.TRUTH.items()}
        fp32 = {name: tags(**{drawn[0].label: 0.9, "never": 0.8}) for name, drawn in truth.items()}
        int8 = {**fp32, "0.png": tags(red=0.9, never=0.4)}
        figures = compared(truth, fp32, int8, 0.5, "map", is_exclusive=False)
        assert figures["same_tags"] == pytest.approx(39 / 40) and figures["loss"] == 0, "frames rank as before"


class TestFiguresOfRegions:
    TRUTH = {f"{number}.png": (square(10), square(60, "blue")) for number in range(12)}
    RIGHT = {name: regions(*drawn) for name, drawn in TRUTH.items()}

    def test_they_are_about_miou_and_pixels_of_the_same_label(self) -> None:
        # INT8 draws half of every red square.
        half = {name: regions(square(10, side=20 / 2 ** 0.5), square(60, "blue")) for name in self.TRUTH}
        figures = compared(self.TRUTH, self.RIGHT, half, 0.5, "miou")
        assert figures["metric"] == "miou" and figures["fp32"]["miou"] == 1 and figures["truth"] == 24
        assert figures["loss"] == pytest.approx(0.25, abs=0.03)
        by_int8 = {label: row["int8"] for label, row in figures["per_class"].items()}
        assert by_int8 == {"red": pytest.approx(0.5, abs=0.06), "blue": 1}
        assert figures["same_pixels"] == pytest.approx(0.75, abs=0.03) and "box_shift_px" not in figures
        assert figures["loss_interval"] == pytest.approx([figures["loss"]] * 2), "every frame is alike"
        json.dumps(figures, allow_nan=False)

    def test_a_region_of_another_label_is_not_the_same(self) -> None:
        swapped = {name: regions(square(10, "blue"), square(60, "blue")) for name in self.TRUTH}
        assert compared(self.TRUTH, self.RIGHT, swapped, 0.5, "miou")["same_pixels"] == pytest.approx(0.5)

    def test_int8_that_draws_nothing_loses_all_and_two_that_do_have_nothing_to_compare(self) -> None:
        nothing = {name: regions() for name in self.TRUTH}
        unsure = {name: regions(*drawn, confidence=0.2) for name, drawn in self.TRUTH.items()}
        assert compared(self.TRUTH, self.RIGHT, nothing, 0.5, "miou")["loss"] == 1
        assert compared(self.TRUTH, unsure, nothing, 0.5, "miou")["same_pixels"] is None


class TestJudge:
    def test_figures_within_the_limits_pass(self) -> None:
        assert judge(FACTS, LIMITS) == []

    @pytest.mark.parametrize(("change", "reason"), [
        ({"loss": 0.0051}, "The mAP falls by 0.0051, 0.005 is allowed"),
        ({"loss": float("nan")}, "mAP falls by nan"),
        ({"metric": "accuracy", "loss": 0.02}, "The accuracy falls by 0.0200, 0.005 is allowed"),
        ({"metric": "miou", "loss": 0.02}, "The mIoU falls by 0.0200"),
        ({"metric": "miou", "per_class": {"sky": {"interval": [0.04, 0.05], "truth": 20}}}, "The IoU of sky falls by"),
        ({"speedup": 0.9}, "0.90 times as fast"), ({"labelled": 9}, "9 held-out frames with labels prove nothing"),
        ({"precision": "f32"}, "no int8 kernel ran"),
        ({"per_class": {"red": {"interval": [0.031, 0.05], "truth": 20}}}, "AP of red falls by at least 0.0310")])
    def test_each_limit_gives_its_reason(self, change: dict[str, Any], reason: str) -> None:
        reasons = judge({**FACTS, **change}, LIMITS)
        assert len(reasons) == 1 and reason in reasons[0]

    def test_a_label_of_few_things_is_not_judged_by_itself(self) -> None:
        assert judge({**FACTS, "per_class": {"red": {"interval": [0.5, 0.5], "truth": 19}}}, LIMITS) == []


class TestOldCertificates:
    """Of before models of tags and polygons had any."""
    OLD = {**{name: value for name, value in FACTS.items() if name not in ("metric", "labelled", "loss")},
           "boxes": 500, "map_loss": 0.001, "map_loss_interval": [0, 0.002], "box_shift_px": {"median": 1, "p95": 2},
           "per_class": {"red": {"fp32": 0.6, "int8": 0.599, "interval": [-0.002, 0.004], "boxes": 500}},
           "limits": {"map_loss": 0.005, "class_loss": 0.03, "speedup": 1.0, "frames": 10}}

    def test_they_read_as_those_of_today(self) -> None:
        now = as_now(self.OLD)
        assert {name: now[name] for name in FACTS if name in now} == {**FACTS, "labelled": 72}
        assert now["loss_interval"] == [0, 0.002] and now["truth"] == 500 and judge(now, now["limits"]) == []
        assert as_now(FACTS) == FACTS

    def test_they_still_let_their_model_annotate_and_no_figure_of_them_can_be_changed(self, tmp_path: Path) -> None:
        records = Records(f"sqlite:///{tmp_path / 'r.sqlite'}")
        kept, about = Certificates(records, tmp_path / "k"), TestCertificates.REPORT
        kept.add(self.OLD, "ann")
        given = {"file_sha256": "f" * 64, "calibration_digest": "c" * 64, "report": about}
        assert kept.check("student@3-int8", **given)["loss"] == kept.of("student@3-int8")[0]["loss"] == 0.001
        sealed = records.entries("certificates")[0].facts
        assert "map_loss" in sealed and "loss" not in sealed, "what was signed stays as it was"
        records.add("certificates", "cells", "student@3-int8", "ann", {**sealed, "map_loss": 0.0})
        with pytest.raises(Invalid, match="a figure was changed"):
            kept.check("student@3-int8", **given)


class TestKey:
    def test_it_is_made_once_and_only_its_owner_reads_it(self, tmp_path: Path) -> None:
        made = key(tmp_path / "k")
        assert len(made) == 32 and key(tmp_path / "k") == made != key(tmp_path / "other")
        assert stat.S_IMODE(os.stat(tmp_path / "k").st_mode) == 0o600

    def test_a_damaged_one_is_not_used(self, tmp_path: Path) -> None:
        (tmp_path / "k").write_bytes(b"")
        with pytest.raises(Invalid, match="32 bytes, this has 0"):
            key(tmp_path / "k")


class TestVerify:
    def test_a_certificate_survives_its_trip_through_json(self) -> None:
        verify(json.loads(json.dumps(sign(FACTS, KEY))), KEY, **ABOUT)

    @pytest.mark.parametrize(("about", "says"), [
        ({"file_sha256": "0" * 64}, "is about another file"),
        ({"backend": "onnxruntime"}, "on the backend openvino, this is onnx"),
        ({"device": "Another CPU"}, "on the device A CPU, this is Another"),
        ({"library": "openvino 2026.5.0"}, "with openvino 2026.4.1, this is openvino 2026.5.0"),
        ({"calibration_digest": "d" * 64}, "about another calibration"),
        ({"calibration_digest": ""}, "another calibration")])
    def test_it_holds_for_nothing_else(self, about: dict[str, str], says: str) -> None:
        with pytest.raises(Invalid, match=f"{says}.*workbench certify student@3-int8"):
            verify(sign(FACTS, KEY), KEY, **{**ABOUT, **about})

    @pytest.mark.parametrize("name", sorted({*FACTS, "sealed_by"}))
    def test_no_fact_can_be_changed(self, name: str) -> None:
        with pytest.raises(Invalid, match="certificate of student@3-int8"):
            verify({**sign(FACTS, KEY), name: "changed"}, KEY, **ABOUT)

    def test_a_changed_figure_is_said_to_be_one(self) -> None:
        sealed = sign({**FACTS, "passed": False, "reasons": ["mAP falls."]}, KEY)
        with pytest.raises(Invalid, match="a figure was changed after it was sealed"):
            verify({**sealed, "passed": True}, KEY, **ABOUT)
        with pytest.raises(Invalid, match="a figure was changed"):
            verify({**sealed, "extra": 1}, KEY, **ABOUT)

    def test_another_workbench_s_certificate_is_foreign(self) -> None:
        with pytest.raises(Invalid, match="sealed by another workbench"):
            verify(sign(FACTS, bytes(32)), KEY, **ABOUT)

    @pytest.mark.parametrize("signature", [None, "", "abc", 5, "é" * 64])
    def test_without_a_signature_it_is_none(self, signature: Any) -> None:
        with pytest.raises(Invalid, match="carries no signature"):
            verify({**sign(FACTS, KEY), "signature": signature}, KEY, **ABOUT)

    @pytest.mark.parametrize("passed", [False, 1, "true", None])
    def test_one_that_failed_lets_nothing_annotate(self, passed: Any) -> None:
        failed = sign({**FACTS, "passed": passed, "reasons": ["mAP falls by 0.1."]}, KEY)
        with pytest.raises(Invalid, match="failed its certificate: mAP falls by 0.1. Annotate with the FP32"):
            verify(failed, KEY, **ABOUT)


class TestCertificates:
    REPORT = BackendReport("openvino", "A CPU", "int8", "openvino 2026.4.1")

    @pytest.fixture
    def kept(self, tmp_path: Path) -> Certificates:
        return Certificates(Records(f"sqlite:///{tmp_path / 'r.sqlite'}"), tmp_path / "k")

    def check(self, kept: Certificates, report: BackendReport = REPORT) -> dict[str, Any]:
        return kept.check("student@3-int8", file_sha256="f" * 64, calibration_digest="c" * 64, report=report)

    def test_the_newest_of_this_device_counts(self, kept: Certificates) -> None:
        kept.add(FACTS, "ann")
        kept.add({**FACTS, "device": "Another CPU", "passed": False, "reasons": ["Slow."]}, "ann")
        assert self.check(kept)["passed"] is True
        kept.add({**FACTS, "passed": False, "reasons": ["mAP falls."]}, "ann")
        with pytest.raises(Invalid, match="mAP falls"):
            self.check(kept)
        assert [one["passed"] for one in kept.of("student@3-int8")] == [False, False, True]

    def test_without_any_or_with_one_of_another_device_it_is_refused(self, kept: Certificates) -> None:
        with pytest.raises(Invalid, match="without a certificate.*workbench certify"):
            self.check(kept)
        kept.add(FACTS, "ann")
        with pytest.raises(Invalid, match="on the device A CPU, this is Another CPU"):
            self.check(kept, BackendReport("openvino", "Another CPU", "int8", "openvino 2026.4.1"))

"""The figures of a certificate, its seal, and every reason why one is refused."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from workbench.annotation import Annotation
from workbench.boxes import Detections
from workbench.certificates import Certificates
from workbench.errors import Invalid
from workbench.evaluation.metrics import score
from workbench.evaluation.paired import matches
from workbench.inference.certificate import LIMITS, compare, judge, key, sign, verify
from workbench.ports import BackendReport
from workbench.records import Records
from workbench.taxonomy import Taxonomy

COLOURS = Taxonomy(("red", "blue", "never"))
FACTS: dict[str, Any] = {
    "model": "student@3-int8", "file_sha256": "f" * 64, "backend": "openvino", "device": "A CPU", "precision": "int8",
    "library": "openvino 2026.4.1", "calibration_digest": "c" * 64, "on": "cells@1.0.0/test", "frames": 72,
    "map_loss": 0.001, "per_class": {"red": {"fp32": 0.6, "int8": 0.599, "interval": [-0.002, 0.004], "boxes": 500}},
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
        figures = compare(truth, fp32, int8, COLOURS, confidence=0.3)
        low, high = figures["map_loss_interval"]
        assert 0 < low <= figures["map_loss"] <= high
        assert figures["map_loss"] == pytest.approx(figures["fp32"]["map_50_95"] - figures["int8"]["map_50_95"])
        assert figures["frames"] == 60 and figures["per_class"].keys() == {"red", "blue"}
        assert sum(row["boxes"] for row in figures["per_class"].values()) == figures["boxes"]
        for row in figures["per_class"].values():
            assert row["interval"][0] <= row["fp32"] - row["int8"] <= row["interval"][1]
        json.dumps(figures, allow_nan=False)

    def test_the_same_detections_lose_nothing_for_certain(self) -> None:
        truth, fp32, _ = scene(2)
        figures = compare(truth, fp32, fp32, COLOURS, confidence=0.3)
        assert figures["map_loss"] == 0 and figures["map_loss_interval"] == [0, 0]
        assert figures["box_shift_px"] == {"median": 0, "p95": 0}

    def test_box_shift_is_the_largest_side_s_in_pixels_over_boxes_both_draw(self) -> None:
        truth = {"a": (Annotation("red", (10, 10, 30, 30)),)}
        fp32 = {"a": Detections([[10, 10, 30, 30], [50, 50, 60, 60]], [0, 0], [0.9, 0.2])}
        int8 = {"a": Detections([[10, 11, 30, 33], [50, 50, 65, 65]], [0, 0], [0.8, 0.2])}
        assert compare(truth, fp32, int8, COLOURS, confidence=0.5)["box_shift_px"] == {"median": 3, "p95": 3}
        nothing = {"a": Detections.empty()}
        assert compare(truth, fp32, nothing, COLOURS, 0.5)["box_shift_px"] == {"median": None, "p95": None}


class TestJudge:
    def test_figures_within_the_limits_pass(self) -> None:
        assert judge(FACTS, LIMITS) == []

    @pytest.mark.parametrize(("change", "reason"), [
        ({"map_loss": 0.0051}, "mAP falls by 0.0051, 0.005 is allowed"),
        ({"map_loss": float("nan")}, "mAP falls by nan"),
        ({"speedup": 0.9}, "0.90 times as fast"), ({"frames": 9}, "9 held-out frames prove nothing"),
        ({"precision": "f32"}, "no int8 kernel ran"),
        ({"per_class": {"red": {"interval": [0.031, 0.05], "boxes": 20}}}, "AP of red falls by at least 0.0310")])
    def test_each_limit_gives_its_reason(self, change: dict[str, Any], reason: str) -> None:
        reasons = judge({**FACTS, **change}, LIMITS)
        assert len(reasons) == 1 and reason in reasons[0]

    def test_a_label_of_few_boxes_is_not_judged_by_itself(self) -> None:
        assert judge({**FACTS, "per_class": {"red": {"interval": [0.5, 0.5], "boxes": 19}}}, LIMITS) == []


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

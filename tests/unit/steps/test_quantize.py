"""From an FP32 version to a certified INT8 one, and the door that lets a model annotate or not; with real stores."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import sqlalchemy as sa
from doubles import graphs
from doubles.quantizable import deep_finder

from workbench.adapters.git_datasets import GitDatasets
from workbench.adapters.local_models import LocalModels
from workbench.adapters.onnxruntime import OnnxRuntime
from workbench.adapters.openvino import OpenVINO
from workbench.annotation import Annotation
from workbench.blobs import Blobs
from workbench.certificates import Certificates
from workbench.dataset import Frame, LabeledFrame, Manifest
from workbench.errors import Cancelled, Conflict, Invalid, NotFound
from workbench.inference.detector import Detector
from workbench.inference.quantize import is_quantized
from workbench.ports import Quiet
from workbench.records import LEDGERS, Records
from workbench.steps import certify as certifying
from workbench.steps.quantize import certify, open_annotator, quantize
from workbench.taxonomy import Taxonomy

RED, BLUE, GREEN = (250, 10, 10), (10, 10, 250), (0, 255, 0)
COLOURS = Taxonomy(("red", "blue"))
# The tiny graphs of these tests may well be slower in int8; accuracy is what they are about.
EASY = {"speedup": 0.0, "loss": 0.02}


def openvino(onnx: Path) -> OpenVINO:
    return OpenVINO(onnx, threads=1)


@dataclass(frozen=True)
class Stores:
    home: Path
    models: LocalModels
    datasets: GitDatasets
    blobs: Blobs
    certificates: Certificates
    records: Records

    def parts(self, **changed: Any) -> dict[str, Any]:
        return {"models": self.models, "store": self.datasets, "blobs": self.blobs, "certificates": self.certificates,
                "open_backend": openvino, "job": Quiet(), "person": "ann", **changed}

    def quantize(self, model: str = "deep@1", version: str = "", **changed: Any) -> Any:
        options = {"limits": EASY, "frames": 16, "scratch": self.home / "scratch", **changed}
        return quantize(model, version or self.newest(), **self.parts(**options))

    def certify(self, model: str = "deep@1-int8", **changed: Any) -> dict[str, Any]:
        return certify(model, self.newest(), **self.parts(**{"limits": EASY, **changed}))

    def newest(self) -> str:
        return self.datasets.versions("squares")[0].ref

    def annotate(self, model: str, open_backend: Callable[[Path], Any] = openvino) -> int:
        with open_annotator(model, models=self.models, open_backend=open_backend, certificates=self.certificates,
                            confidence=0.4) as detector:
            assert isinstance(detector, Detector)
            return len(detector.detect([picture(0)])[0])

    def frame(self, name: str, pixels: np.ndarray) -> Frame:
        made = self.blobs.put(cv2.imencode(".png", pixels[:, :, ::-1])[1].tobytes())
        return Frame(name, pixels.shape[1], pixels.shape[0], made.md5, made.sha256, made.size_bytes)

    def publish(self, frames: list[LabeledFrame], taxonomy: Taxonomy = COLOURS) -> str:
        return self.datasets.publish("squares", Manifest(taxonomy, tuple(frames)), "Squares",
                                     "ann <ann@example.com>").ref


def picture(index: int) -> np.ndarray:
    """64 x 64 greyish noise with a red square at (8, 8 * row) and a blue one at (40, 8 * row)."""
    random = np.random.default_rng(index)
    pixels = random.integers(60, 90, (64, 64, 3)).astype(np.uint8)
    row = 8 * (1 + index % 6)
    pixels[row:row + 8, 8:16], pixels[row:row + 8, 40:48] = RED, BLUE
    return pixels


def labelled(stores: Stores, count: int, split: str, start: int = 0) -> list[LabeledFrame]:
    made = []
    for index in range(start, start + count):
        row = 8 * (1 + index % 6)
        made.append(LabeledFrame(stores.frame(f"{split}/{index}.png", picture(index)), split=split, annotations=(
            Annotation("red", (4, row - 4, 20, row + 12)), Annotation("blue", (36, row - 4, 52, row + 12)))))
    return made


@pytest.fixture
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stores:
    # Speed is measured as ever, only not for seconds.
    monkeypatch.setattr(certifying, "ROUND_S", 0.01)
    blobs, records = Blobs(str(tmp_path / "blobs")), Records(f"sqlite:///{tmp_path / 'r.sqlite'}")
    made = Stores(tmp_path, LocalModels(tmp_path / "models"), GitDatasets(tmp_path / "datasets", blobs), blobs,
                  Certificates(records, tmp_path / "certificate.key"), records)
    made.models.register(deep_finder(tmp_path / "deep"), tmp_path / "deep")
    made.publish(labelled(made, 20, "train") + labelled(made, 12, "test", start=100))
    return made


class TestQuantize:
    def test_an_int8_version_is_registered_with_the_certificate_that_lets_it_annotate(self, stores: Stores) -> None:
        job = Quiet()
        made = stores.quantize(job=job)
        card = stores.models.card("deep@1-int8")
        folder = stores.models.folder("deep@1-int8")
        assert made.model == "deep@1-int8" and made.is_new
        assert made.agreement.keys() == {"entropy", "percentile", "minmax"}
        assert is_quantized(onnx.load(str(folder / "model.onnx")))
        assert card.quantization["from"] == "deep@1" and card.quantization["frames"] == 16
        assert card.quantization["from_sha256"] == stores.models.card("deep@1").files["model.onnx"]["sha256"]
        assert card.quantization["ranges"] == made.ranges and card.input.dtype == "uint8"
        facts = made.certificate
        assert facts["passed"] is True and facts["precision"] == "int8" and facts["frames"] == 12
        assert facts["truth"] == 24
        assert facts["file_sha256"] == card.files["model.onnx"]["sha256"] and facts["on"] == f"{stores.newest()}/test"
        assert facts["calibration_digest"] == card.quantization["calibration_digest"]
        assert facts["against"] == {"model": "deep@1", "file_sha256": card.quantization["from_sha256"]}
        assert facts["fp32"]["map_50"] == pytest.approx(1) and abs(facts["loss"]) <= 0.02 and facts["speedup"] > 0
        assert stores.certificates.of("deep@1-int8") == [facts]
        assert stores.annotate("deep@1-int8") == stores.annotate("deep@1") == 2
        assert job.total and any("falls by" in line for line in job.lines)
        json.dumps(made.to_json(), allow_nan=False)

    def test_the_same_again_changes_nothing(self, stores: Stores) -> None:
        first = stores.quantize()
        again = stores.quantize()
        assert not again.is_new and again.certificate == first.certificate
        assert len(stores.certificates.of("deep@1-int8")) == 1

    def test_another_calibration_under_the_same_reference_is_a_conflict(self, stores: Stores) -> None:
        stores.quantize()
        with pytest.raises(Conflict, match="deep@1-int8 is registered already, made with another calibration"):
            stores.quantize(seed=5)

    def test_one_killed_between_registration_and_certificate_is_completed_by_its_repeat(self, stores: Stores) -> None:
        class Killed(BaseException):
            pass

        class Fragile(Certificates):
            def add(self, *_: Any) -> dict[str, Any]:
                raise Killed

        with pytest.raises(Killed):
            stores.quantize(certificates=Fragile(stores.records, stores.home / "certificate.key"))
        assert "deep@1-int8" in stores.models.refs()
        with pytest.raises(Invalid, match="without a certificate"):
            stores.annotate("deep@1-int8")
        assert stores.quantize().certificate["passed"] and stores.annotate("deep@1-int8") == 2

    def test_a_repeat_does_not_calibrate_anew_and_makes_the_same_file(self, stores: Stores) -> None:
        stores.quantize()
        kept = list((stores.home / "scratch").glob("ranges-*.json"))
        assert len(kept) == 1 and set(json.loads(kept[0].read_text())) == {"entropy", "percentile", "minmax"}
        other = LocalModels(stores.home / "others")
        other.register(stores.models.card("deep@1"), stores.models.folder("deep@1"))
        job = Quiet()
        stores.quantize(models=other, job=job)
        assert other.card("deep@1-int8").files == stores.models.card("deep@1-int8").files

    def test_a_cancelled_job_registers_nothing(self, stores: Stores) -> None:
        class CancelledAt(Quiet):
            checks = 0

            def check(self) -> None:
                self.checks += 1
                if self.checks > 40:
                    raise Cancelled("The job was cancelled.")

        with pytest.raises(Cancelled):
            stores.quantize(job=CancelledAt())
        assert stores.models.refs() == ["deep@1"] and not stores.certificates.of("deep@1-int8")

    def test_when_the_limits_fail_the_most_sensitive_layers_go_back_to_float_until_it_passes(
            self, stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
        stores.models.register(deep_finder(stores.home / "hard", name="hard", hard=True), stores.home / "hard")
        # Depthwise layers stay int8 whatever their speed.
        monkeypatch.setattr("workbench.steps.quantize.ABOUT_AS_FAST", 100)
        monkeypatch.setattr("workbench.steps.quantize.METHODS", ("minmax",))
        made = stores.quantize("hard@1")
        assert len(made.attempts) >= 2 and made.attempts[0]["reasons"] and made.attempts[-1]["reasons"] == []
        assert "third" in made.float_layers and "first" not in made.float_layers
        assert "they alone move the outputs by" in made.attempts[1]["why"] and "speedup" in made.attempts[1]
        float_layers = stores.models.card("hard@1-int8").quantization["float_layers"]
        assert list(made.float_layers) == float_layers


class TestRefusals:
    def nothing_new(self, stores: Stores, *there: str) -> None:
        assert stores.models.refs() == sorted({"deep@1", *there}) and not stores.certificates.of("deep@1-int8")

    def test_three_frames(self, stores: Stores) -> None:
        version = stores.publish(labelled(stores, 3, "train") + labelled(stores, 12, "test", start=100))
        with pytest.raises(Invalid, match="3 frames are too few.*16 are the least.*Upload more frames"):
            stores.quantize(version=version)
        self.nothing_new(stores)

    def test_a_wrong_taxonomy(self, stores: Stores) -> None:
        frames = labelled(stores, 20, "train") + labelled(stores, 12, "test", start=100)
        frames[3] = replace(frames[3], annotations=(Annotation("lorry", (0, 0, 9, 9)),))
        version = stores.publish(frames, Taxonomy(("red", "blue", "lorry")))
        with pytest.raises(Invalid, match="train/3.png has the label 'lorry', which deep@1 does not know"):
            stores.quantize(version=version)
        self.nothing_new(stores)

    def test_no_label_in_common(self, stores: Stores) -> None:
        frames = [replace(one, annotations=(Annotation("lorry", (0, 0, 9, 9)),))
                  for one in labelled(stores, 20, "train") + labelled(stores, 12, "test", start=100)]
        with pytest.raises(Invalid, match="deep@1 knows none of the labels"):
            stores.quantize(version=stores.publish(frames, Taxonomy(("lorry",))))

    def test_held_out_pixels_among_the_calibration_frames(self, stores: Stores) -> None:
        version = stores.publish(labelled(stores, 20, "train") + labelled(stores, 12, "test", start=8))
        with pytest.raises(Invalid, match="has the same pixels as test/.*the same split"):
            stores.quantize(version=version)
        self.nothing_new(stores)

    def test_too_few_held_out_frames_to_prove_anything(self, stores: Stores) -> None:
        version = stores.publish(labelled(stores, 20, "train") + labelled(stores, 4, "test", start=100))
        with pytest.raises(Invalid, match="4 held-out frames with labels prove nothing.*Nothing was registered"):
            stores.quantize(version=version)
        self.nothing_new(stores)

    def test_a_split_without_labels(self, stores: Stores) -> None:
        with pytest.raises(Invalid, match="no labelled box in its val split"):
            stores.quantize(split="val")
        with pytest.raises(Invalid, match="'all' must be one of"):
            stores.quantize(split="all")

    def test_limits_that_cannot_be_met_name_the_figures(self, stores: Stores) -> None:
        with pytest.raises(Invalid, match=r"cannot be quantised within the limits: .*times as fast as FP32 here, 1000"):
            stores.quantize(limits={"speedup": 1000})
        self.nothing_new(stores)

    @pytest.mark.parametrize(("limits", "says"), [
        ({"accuracy": 1}, "no limit 'accuracy'"), ({"loss": "x"}, "loss must be a number"), ({"map_loss": "x"}, "loss must be a number")])
    def test_limits_that_are_none(self, stores: Stores, limits: dict[str, Any], says: str) -> None:
        with pytest.raises(Invalid, match=says):
            stores.quantize(limits=limits)

    def test_a_nan_during_calibration_names_the_frame(self, stores: Stores) -> None:
        stores.models.register(deep_finder(stores.home / "p", name="poisoned", poison=True), stores.home / "p")
        frames = labelled(stores, 20, "train") + labelled(stores, 12, "test", start=100)
        green = picture(7)
        green[0, 0] = GREEN
        frames[7] = replace(frames[7], frame=stores.frame("train/7.png", green))
        with pytest.raises(Invalid, match="train/7.png: tensor .* holds a NaN"):
            stores.quantize("poisoned@1", version=stores.publish(frames), frames=20)
        self.nothing_new(stores, "poisoned@1")

    def test_a_model_that_is_int8_already(self, stores: Stores) -> None:
        stores.quantize()
        with pytest.raises(Invalid, match="model.onnx of deep@1-int8: .*quantised already"):
            stores.quantize("deep@1-int8")

    def test_a_model_with_nothing_to_quantise(self, stores: Stores) -> None:
        stores.models.register(graphs.red_finder(stores.home / "f"), stores.home / "f")
        with pytest.raises(Invalid, match="model.onnx of finder@1: .*nothing to quantise"):
            stores.quantize("finder@1")

    def test_what_does_not_exist(self, stores: Stores) -> None:
        with pytest.raises(NotFound):
            stores.quantize("nobody@1")
        with pytest.raises(NotFound):
            stores.quantize(version="squares@9.9.9")


class TestDoor:
    def test_an_fp32_model_needs_no_certificate(self, stores: Stores) -> None:
        assert stores.annotate("deep@1") == 2

    def test_a_quantised_graph_is_refused_whatever_its_card_says(self, stores: Stores) -> None:
        stores.quantize()
        card, folder = stores.models.card("deep@1-int8"), stores.models.folder("deep@1-int8")
        stores.models.register(replace(card, name="sly", version="1", quantization={}), folder)
        with pytest.raises(Invalid, match="sly@1 is an INT8 model without a certificate.*workbench certify sly@1"):
            stores.annotate("sly@1")
        assert stores.annotate("deep@1") == 2

    def test_a_certificate_of_another_backend_opens_nothing_until_it_is_certified_there(self, stores: Stores) -> None:
        stores.quantize()

        def elsewhere(onnx: Path) -> OnnxRuntime:
            return OnnxRuntime(onnx, threads=1)

        with pytest.raises(Invalid, match="backend openvino, this is onnxruntime.*workbench certify deep@1-int8"):
            stores.annotate("deep@1-int8", elsewhere)
        made = stores.certify(open_backend=elsewhere)
        if made["passed"]:
            assert stores.annotate("deep@1-int8", elsewhere) == 2
        else:  # a CPU without the instructions for it runs no int8 kernels
            assert "no int8 kernel" in " ".join(made["reasons"])
        assert stores.annotate("deep@1-int8") == 2

    def test_a_certificate_altered_in_the_database_is_refused(self, stores: Stores) -> None:
        stores.quantize()
        stores.certify(limits={**EASY, "speedup": 1000})
        table = LEDGERS["certificates"]
        with pytest.raises(Invalid, match="failed its certificate"):
            stores.annotate("deep@1-int8")
        with stores.records.engine.begin() as connection:
            row = connection.execute(sa.select(table).order_by(table.c.id.desc())).first()
            facts = {**json.loads(row.facts), "passed": True, "reasons": []}
            connection.execute(table.update().where(table.c.id == row.id).values(facts=json.dumps(facts)))
        with pytest.raises(Invalid, match="a figure was changed after it was sealed"):
            stores.annotate("deep@1-int8")

    def test_a_certificate_of_another_workbench_is_refused(self, stores: Stores) -> None:
        stores.quantize()
        (stores.home / "certificate.key").unlink()
        with pytest.raises(Invalid, match="sealed by another workbench"):
            stores.annotate("deep@1-int8")

    def test_the_backend_is_closed_when_the_door_stays_shut(self, stores: Stores) -> None:
        stores.quantize()
        (stores.home / "certificate.key").unlink()
        opened = []

        def remembered(onnx: Path) -> OpenVINO:
            opened.append(OpenVINO(onnx, threads=1))
            return opened[-1]

        with pytest.raises(Invalid):
            stores.annotate("deep@1-int8", remembered)
        assert len(opened) == 1
        with pytest.raises(Invalid, match="closed"):
            opened[0].run(np.zeros((1, 64, 64, 3), np.uint8))


class TestCertify:
    def test_a_failed_certificate_is_kept_and_shuts_the_door(self, stores: Stores) -> None:
        stores.quantize()
        made = stores.certify(limits={"speedup": 1000})
        assert made["passed"] is False and "times as fast" in made["reasons"][0]
        assert stores.certificates.of("deep@1-int8")[0] == made
        with pytest.raises(Invalid, match="failed its certificate.*Annotate with the FP32"):
            stores.annotate("deep@1-int8")

    def test_a_quantised_file_from_elsewhere_is_certified_against_a_named_origin(self, stores: Stores) -> None:
        stores.quantize()
        card, folder = stores.models.card("deep@1-int8"), stores.models.folder("deep@1-int8")
        stores.models.register(replace(card, name="own", version="1", quantization={}), folder)
        with pytest.raises(Invalid, match="does not say which FP32 version.*--against"):
            stores.certify("own@1")
        assert stores.certify("own@1", against="deep@1")["passed"] and stores.annotate("own@1") == 2

    def test_an_fp32_model_needs_none_and_a_wrong_origin_is_refused(self, stores: Stores) -> None:
        stores.quantize()
        with pytest.raises(Invalid, match="deep@1 is no INT8 model"):
            stores.certify("deep@1")
        stores.models.register(deep_finder(stores.home / "o", name="other", scale=1 / 128), stores.home / "o")
        with pytest.raises(Invalid, match="made from a file of sha256"):
            stores.certify(against="other@1")

"""A model's score on a split of a published version, measured with real repositories and a real MLflow server."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from doubles import graphs

from workbench.adapters.git_datasets import GitDatasets
from workbench.adapters.local_models import LocalModels
from workbench.adapters.mlflow import MlflowTracker
from workbench.adapters.onnxruntime import OnnxRuntime
from workbench.annotation import Annotation
from workbench.blobs import Blobs
from workbench.dataset import Frame, LabeledFrame, Manifest
from workbench.errors import Invalid, NotFound
from workbench.evaluation.metrics import Metrics
from workbench.ports import Quiet, Tracker
from workbench.steps.evaluate import Evaluation, evaluate
from workbench.taxonomy import Taxonomy

RED, BLUE = (255, 0, 0), (0, 0, 255)


@dataclass(frozen=True)
class Stores:
    models: LocalModels
    datasets: GitDatasets
    blobs: Blobs

    def frame(self, name: str, *squares: tuple[int, int, tuple[int, int, int]]) -> Frame:
        """A 64 x 64 picture with 8 px squares at (x, y)."""
        image = np.full((64, 64, 3), sum(name.encode()) % 50, np.uint8)
        for x, y, colour in squares:
            image[y:y + 8, x:x + 8] = colour
        made = self.blobs.put(cv2.imencode(".png", image[:, :, ::-1])[1].tobytes())
        return Frame(name, 64, 64, made.md5, made.sha256, made.size_bytes)

    def evaluate(self, version: str, split: str = "test", model: str = "finder@1", tracker: Tracker | None = None,
                 job: Quiet | None = None) -> Evaluation:
        return evaluate(
            model,
            version,
            split,
            models=self.models,
            store=self.datasets,
            blobs=self.blobs,
            tracker=tracker,
            open_backend=lambda path: OnnxRuntime(path, threads=1),
            job=job or Quiet(),
        )


@pytest.fixture
def stores(tmp_path: Path) -> Stores:
    blobs = Blobs(str(tmp_path / "blobs"))
    made = Stores(LocalModels(tmp_path / "models"), GitDatasets(tmp_path / "datasets", blobs), blobs)
    made.models.register(graphs.red_finder(tmp_path / "finder"), tmp_path / "finder")
    return made


@pytest.fixture
def version(stores: Stores) -> str:
    """Test: a red and a blue square, both labelled, a frame where a red square has no label, and one nobody looked at;
    train: one frame."""
    frames = (
        LabeledFrame(
            stores.frame("1.png", (8, 8, RED), (40, 16, BLUE)),
            split="test",
            annotations=(Annotation("red", (4, 4, 20, 20)), Annotation("blue", (36, 12, 52, 28))),
        ),
        LabeledFrame(stores.frame("2.png", (8, 8, RED)), split="test", annotations=()),
        LabeledFrame(
            stores.frame("3.png", (8, 8, RED)), split="train", annotations=(Annotation("red", (4, 4, 20, 20)),)
        ),
        LabeledFrame(stores.frame("4.png", (24, 8, RED)), split="test", annotations=None),
    )
    return stores.datasets.publish("squares", Manifest(Taxonomy(("blue", "red", "green")), frames), "first", "ann").ref


def test_boxes_are_scored_in_the_data_set_s_own_labels(stores: Stores, version: str) -> None:
    job = Quiet()
    found = stores.evaluate(version, job=job)
    # By name although the model counts red first: blue is right, red has one hit and one mistake of equal confidence.
    assert found.metrics.per_class["blue"]["ap"] == pytest.approx(1)
    assert found.metrics.confusion == ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 0, 0), (0, 1, 0, 0))
    assert (found.metrics.frames, found.metrics.truth, found.metrics.detections) == (2, 2, 3)
    assert found.metrics.confidence == pytest.approx(0.5) and found.digest == stores.datasets.version(version).digest
    assert (found.unmatched_labels, found.unreached_labels) == ((), ("green",))
    assert sorted(found.found) == ["1.png", "2.png"] and (job.done, job.total) == (2, 2)


def test_what_the_model_alone_knows_is_left_out_and_told(stores: Stores) -> None:
    frames = (
        LabeledFrame(
            stores.frame("1.png", (8, 8, RED), (40, 16, BLUE)), (Annotation("blue", (36, 12, 52, 28)),), "val"
        ),
    )
    ref = stores.datasets.publish("skies", Manifest(Taxonomy(("blue",)), frames), "first", "ann").ref
    found = stores.evaluate(ref, "val")
    assert found.metrics.map_50_95 == pytest.approx(1) and found.unmatched_labels == ("red",)


def test_an_evaluation_is_json_with_the_boxes_to_draw(stores: Stores, version: str) -> None:
    record = json.loads(json.dumps(stores.evaluate(version).to_json(), allow_nan=False))
    rows = sorted(record["found"]["1.png"], key=lambda row: row[4])
    assert [row[:5] for row in rows] == [[36, 12, 52, 28, "blue"], [4, 4, 20, 20, "red"]] and all(
        row[5] > 0.9 for row in rows
    )
    assert Metrics.from_json(record["metrics"]).map_50_95 == record["metrics"]["coco"]["map_50_95"]
    assert "found" not in stores.evaluate(version).to_json(with_boxes=False)


def test_it_is_kept_by_the_tracker_once_per_job(stores: Stores, version: str, mlflow_url: str, tmp_path: Path) -> None:
    tracker = MlflowTracker(mlflow_url)
    first = stores.evaluate(version, tracker=tracker, job=Quiet(id="job-1"))
    again = stores.evaluate(version, tracker=tracker, job=Quiet(id="job-1"))
    assert first.run_id and again.run_id == first.run_id
    other = stores.evaluate(version, "train", tracker=tracker, job=Quiet(id="job-1"))
    assert other.run_id != first.run_id
    runs = {run["run_id"]: run for run in tracker.runs("squares/evaluations")}
    assert set(runs) == {first.run_id, other.run_id}
    kept = runs[first.run_id]
    assert kept["status"] == "FINISHED" and kept["name"] == f"finder@1 on {version}/test"
    assert kept["metrics"]["map_50_95"] == pytest.approx(first.metrics.map_50_95)
    assert kept["metrics"]["ap/blue"] == pytest.approx(1)
    assert (kept["params"]["model"], kept["params"]["digest"], kept["tags"]["backend"]) == (
        "finder@1",
        first.digest,
        "onnxruntime",
    )
    folder = tracker.artifacts(first.run_id, "evaluation", tmp_path / "artifacts")
    assert json.loads((folder / "evaluation.json").read_text())["metrics"] == json.loads(
        json.dumps(first.metrics.to_json())
    )


def test_labels_with_odd_characters_are_kept_too(stores: Stores, mlflow_url: str, tmp_path: Path) -> None:
    labels = ("größe (cm)", "a:b")
    stores.models.register(replace(graphs.red_finder(tmp_path / "odd", labels=labels), name="odd"), tmp_path / "odd")
    frames = (LabeledFrame(stores.frame("1.png", (8, 8, RED)), (Annotation(labels[0], (4, 4, 20, 20)),), "test"),)
    ref = stores.datasets.publish("odd", Manifest(Taxonomy(labels), frames), "first", "ann").ref
    tracker = MlflowTracker(mlflow_url)
    stores.evaluate(ref, model="odd@1", tracker=tracker)
    assert tracker.runs("odd/evaluations")[0]["metrics"]["ap/gr__e _cm_"] == pytest.approx(1)


def test_a_frame_that_cannot_be_read_stops_the_evaluation(stores: Stores, version: str) -> None:
    path = stores.blobs.path(stores.datasets.manifest(version).by_name["2.png"].frame.blob)
    path.chmod(0o644)
    path.write_bytes(b"damaged")
    job = Quiet()
    with pytest.raises(Invalid, match=f"{version} cannot be evaluated: .*damaged"):
        stores.evaluate(version, job=job)
    assert list(job.failed) == ["2.png"]


def test_what_cannot_be_evaluated_is_told(stores: Stores, version: str) -> None:
    with pytest.raises(Invalid, match="no labelled box in its val split"):
        stores.evaluate(version, "val")
    with pytest.raises(Invalid, match="must be one of train, val, test"):
        stores.evaluate(version, "holdout")
    with pytest.raises(NotFound, match="nobody@1"):
        stores.evaluate(version, model="nobody@1")
    with pytest.raises(NotFound):
        stores.evaluate("squares@9.0.0")
    cats = (LabeledFrame(stores.frame("1.png"), (Annotation("cat", (4, 4, 20, 20)),), "test"),)
    ref = stores.datasets.publish("cats", Manifest(Taxonomy(("cat",)), cats), "first", "ann").ref
    with pytest.raises(Invalid, match="knows none of the labels of cats@0.1.0: red, blue against cat"):
        stores.evaluate(ref)

"""The loop for models that set tags or draw polygons: annotate, review, version, evaluate, promote, on real parts.

The models really look (doubles/graphs.py): what is right and wrong about them follows from the pictures.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from doubles import graphs
from doubles.annotation_server import MemoryServer
from parts_mongo import mongod
from parts_training import Bench

from workbench.adapters.fiftyone import FiftyOneServer
from workbench.annotation import Annotation
from workbench.certificates import Certificates
from workbench.dataset import Frame, LabeledFrame
from workbench.evaluation.primary import scored_from
from workbench.ports import AnnotationServer, Quiet
from workbench.steps.annotate import annotate
from workbench.steps.evaluate import Evaluation, evaluate
from workbench.steps.promote import Decision, promote
from workbench.steps.review import decide
from workbench.steps.version import version
from workbench.taxonomy import Taxonomy

RED, BLUE = (255, 0, 0), (0, 0, 255)
LABELS = ("red", "blue", "dark")
MAKE = {"tags": graphs.red_tags, "masks": graphs.red_masks}
# Frames of each kind: red, blue, dark.
EACH = 4


@dataclass
class Loop(Bench):
    """A bench with a working copy of twelve frames and the two models, registered as the data set's."""

    server: AnnotationServer | None = None

    def fill(self) -> None:
        frames = []
        for number in range(3 * EACH):
            image = np.full((128, 256, 3), number, np.uint8)
            if number % 3 < 2:
                image[16:112, 32:224] = (RED, BLUE)[number % 3]
            made = self.parts["blobs"].put(cv2.imencode(".png", image[:, :, ::-1])[1].tobytes())
            frame = Frame(f"{number:02d}.png", 256, 128, made.md5, made.sha256, made.size_bytes)
            frames.append((LabeledFrame(frame, None, "test"), self.parts["blobs"].path(made.md5)))
        self.server.open_task(self.dataset, Taxonomy(LABELS))
        self.server.add_frames(self.dataset, frames)

    def register(self, kind: str, labels: tuple[str, ...] | None = None, **decoder: Any) -> str:
        """A version of the model in both registries; other `labels` make it call things by a wrong name."""
        folder = self.folder / f"made-{uuid.uuid4().hex[:8]}"
        card, name, tracker = MAKE[kind](folder), f"{self.dataset}-detector", self.parts["tracker"]
        run_id = tracker.start_run(self.dataset, "made", {})
        tracker.log_files(run_id, folder, "model")
        found = tracker.register(name, run_id, "model", {}).version
        card = replace(card, name=name, version=found, run_id=run_id, labels=Taxonomy(labels or card.labels.labels),
                       decoder={**card.decoder, **decoder})
        return self.parts["models"].register(card, folder).ref

    def annotate(self, model: str) -> Any:
        return annotate(self.dataset, model, run_id="run1", server=self.server, records=self.records, job=Quiet(),
                        certificates=self.certificates, **{name: self.parts[name] for name in ("models", "blobs", "open_backend")})

    @property
    def certificates(self) -> Certificates:
        return Certificates(self.records, self.folder / "key")

    def accept(self) -> str:
        for name in self.server.frame_names(self.dataset):
            decide(self.dataset, name, "accepted", person="ann", server=self.server, records=self.records)
        return version(self.dataset, server=self.server, store=self.parts["store"], job=Quiet(), person="ann", message="first").ref

    def evaluate(self, model: str, ref: str) -> Evaluation:
        return evaluate(model, ref, "test", job=Quiet(id=f"e-{model}"),
                        **{name: self.parts[name] for name in ("models", "store", "blobs", "open_backend", "tracker")})

    def promote(self, model: str, ref: str, **more: Any) -> Decision:
        return promote(self.dataset, model, ref, records=self.records, job=Quiet(id=uuid.uuid4().hex), **more, **{
            name: self.parts[name] for name in ("models", "store", "blobs", "tracker", "open_backend", "person")})

    def champion(self) -> str | None:
        found = self.parts["tracker"].by_alias(f"{self.dataset}-detector", "champion")
        return found and f"{found.name}@{found.version}"


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mongod(tmp_path_factory.mktemp("mongo")) as url:
        yield url


@pytest.fixture(params=["double", "fiftyone"])
def loop(request: pytest.FixtureRequest, tmp_path: Path, mlflow_url: str) -> Iterator[Loop]:
    server = MemoryServer() if request.param == "double" else FiftyOneServer(request.getfixturevalue("database"), "http://127.0.0.1:1")
    made = Loop(tmp_path, mlflow_url, f"l{uuid.uuid4().hex[:10]}", server=server)
    made.fill()
    yield made
    server.delete_task(made.dataset)


def test_tags_go_through_the_loop(loop: Loop) -> None:
    good, worse = loop.register("tags"), loop.register("tags", ("blue", "red", "dark"))
    report = loop.annotate(good)
    assert (report.task, report.boxes) == ("tags", 3 * EACH)
    # A person calls the first red frame dark.
    working = loop.server.read(loop.dataset, ["00.png"])["00.png"]
    assert [(one.label, one.xyxy, one.polygon) for one in working.annotations] == [("red", None, None)]
    assert loop.server.write(loop.dataset, [replace(working, annotations=(Annotation("dark", source="human:ann"),))]) == []
    ref = loop.accept()
    frames = loop.parts["store"].manifest(ref).by_name
    assert [(one.label, one.xyxy) for one in frames["00.png"].annotations] == [("dark", None)]
    assert [(one.label, one.xyxy) for one in frames["01.png"].annotations] == [("blue", None)]

    found = loop.evaluate(good, ref)
    # All right but the frame a person changed: red has 3 frames and 4 set, dark 5 and 4.
    assert found.metrics.accuracy == pytest.approx(11 / 12)
    assert found.metrics.macro_f1 == pytest.approx(np.mean([2 * 3 / 7, 1, 2 * 4 / 9]))
    assert found.metrics.by_label("accuracy") == pytest.approx({"red": 1, "blue": 1, "dark": 4 / 5})
    assert found.metrics.confusion == ((3, 0, 0, 0), (0, 4, 0, 0), (1, 0, 4, 0), (0, 0, 0, 0))
    # Average precision needs the confidence of all labels, not of the surest alone.
    unsure = found.found["02.png"]
    assert len(unsure) == 3 and unsure.confidence.sum() == pytest.approx(1)
    record = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert scored_from(record["metrics"]) == found.metrics
    assert [[row[4] for row in rows] for _, rows in sorted(record["found"].items())][:3] == [["red"], ["blue"], ["dark"]]
    (run,) = (one for one in loop.parts["tracker"].runs(f"{loop.dataset}/evaluations") if one["run_id"] == found.run_id)
    assert run["metrics"]["accuracy"] == pytest.approx(11 / 12) and run["metrics"]["f1/blue"] == 1

    first = loop.promote(worse, ref)
    assert first.promoted and first.primary == "accuracy" and first.challenger["accuracy"] == pytest.approx(4 / 12)
    assert first.challenger["per_class"] == pytest.approx({"red": 0, "blue": 0, "dark": 4 / 5})
    better = loop.promote(good, ref)
    assert better.promoted and better.difference == pytest.approx(7 / 12) and better.interval[0] > 0
    assert better.interval[0] <= better.difference <= better.interval[1] and loop.champion() == good
    for primary in ("macro_f1", "map", "accuracy"):
        kept = loop.promote(worse, ref, primary=primary)
        assert not kept.promoted and kept.primary == primary and "the champion stays" in kept.reason
        assert kept.interval[1] < 0 and kept.challenger[primary] < kept.champion[primary]
    boxes = loop.promote(worse, ref, primary="map_50_95")
    assert not boxes.promoted and "draws tags, so on" in boxes.reason and "only accuracy, macro_f1, map" in boxes.reason
    assert loop.champion() == good


def test_polygons_go_through_the_loop(loop: Loop) -> None:
    good, worse = loop.register("masks"), loop.register("masks", ("red", "dark"))
    report = loop.annotate(good)
    assert (report.task, report.by_label) == ("polygons", {"blue": EACH, "red": EACH})
    # A person cuts the first red region in half.
    working = loop.server.read(loop.dataset, ["00.png"])["00.png"]
    half = Annotation("red", (32, 16, 128, 112), ((32, 16), (128, 16), (128, 112), (32, 112)), source="human:ann")
    assert loop.server.write(loop.dataset, [replace(working, annotations=(half,))]) == []
    ref = loop.accept()
    frames = loop.parts["store"].manifest(ref).by_name
    assert frames["00.png"].annotations[0].polygon == half.polygon and len(frames["03.png"].annotations[0].polygon) >= 4

    found = loop.evaluate(good, ref)
    assert found.metrics.regions.iou == pytest.approx({"red": 3.5 / 4, "blue": 1}, abs=0.03)
    assert found.metrics.regions.coco == {}, "a semantic model does not tell one thing from the next"
    assert found.metrics.values["miou"] == pytest.approx(0.9375, abs=0.02)
    rows = json.loads(json.dumps(found.to_json(), allow_nan=False))["found"]["01.png"]
    assert [row[4] for row in rows] == ["blue"] and len(rows[0][6]) >= 8 and len(rows[0][6]) % 2 == 0
    (run,) = (one for one in loop.parts["tracker"].runs(f"{loop.dataset}/evaluations") if one["run_id"] == found.run_id)
    assert run["metrics"]["miou"] == pytest.approx(found.metrics.values["miou"])

    first = loop.promote(worse, ref)
    assert first.promoted and first.primary == "miou" and first.challenger["per_class"]["blue"] == 0
    better = loop.promote(good, ref)
    assert better.promoted and better.interval[0] > 0 and loop.champion() == good
    kept = loop.promote(worse, ref, max_class_drop=0.1)
    assert not kept.promoted and "the champion stays" in kept.reason
    by_boxes = loop.promote(worse, ref, primary="map_50")
    assert not by_boxes.promoted and by_boxes.primary == "map_50" and by_boxes.challenger["map_50"] == pytest.approx(0.5, abs=0.01)


def test_models_of_two_tasks_are_not_compared(loop: Loop) -> None:
    tags, masks = loop.register("tags"), loop.register("masks")
    loop.annotate(masks)
    working = loop.server.read(loop.dataset, loop.server.frame_names(loop.dataset))
    loop.server.write(loop.dataset, [replace(one, annotations=(*one.annotations, Annotation("dark", source="human:ann")))
                                     for one in working.values()])
    ref = loop.accept()
    assert loop.promote(tags, ref).promoted
    refused = loop.promote(masks, ref)
    assert not refused.promoted and "has no miou" in refused.reason and "under different names (model_name)" in refused.reason
    assert loop.champion() == tags


def test_a_challenger_that_forgets_a_label_is_kept_out_by_the_limit_of_a_label(loop: Loop) -> None:
    """On the whole the challenger is better, but it never says blue."""
    old = loop.register("tags", ("dark", "blue", "red"))  # red and dark for each other
    new = loop.register("tags", ("red", "sky", "dark"))
    loop.annotate(loop.register("tags"))
    working = loop.server.read(loop.dataset, ["04.png", "07.png", "10.png"])
    loop.server.write(loop.dataset, [replace(one, annotations=()) for one in working.values()])
    ref = loop.accept()
    assert loop.promote(old, ref).challenger["accuracy"] == pytest.approx(1 / 9), "frames without a tag say nothing of it"
    limited = loop.promote(new, ref, max_class_drop=0.5)
    assert not limited.promoted and "'blue' falls by 1.0000, more than 0.5" in limited.reason
    assert loop.promote(new, ref).promoted and loop.champion() == new

"""Drift of the deployed model: an alarm when it sees something else, none when it sees the same."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from doubles import graphs
from doubles.annotation_server import MemoryServer

from workbench.adapters.git_datasets import GitDatasets
from workbench.adapters.local_models import LocalModels
from workbench.adapters.onnxruntime import OnnxRuntime
from workbench.annotation import Annotation
from workbench.blobs import Blobs
from workbench.certificates import Certificates
from workbench.dataset import Frame, LabeledFrame, Manifest
from workbench.errors import Invalid
from workbench.ports import Quiet
from workbench.records import Records
from workbench.steps.annotate import annotate
from workbench.steps.drift import Drift, Seen, compare, last_runs, look_for_drift, psi, standing_alarm
from workbench.taxonomy import Taxonomy

RED, BLUE = (255, 0, 0), (0, 0, 255)
LABELS = ("red", "blue")


def test_the_index_is_that_of_two_shares_worked_out_by_hand() -> None:
    # 4 of 10 and 6 of 10 against 6 and 4, each with half a count more: shares 4.5/11 and 6.5/11, twice 2/11 * ln(6.5/4.5).
    assert psi(np.array([4, 6]), np.array([6, 4])) == pytest.approx(2 * 2 / 11 * math.log(6.5 / 4.5))
    assert psi(np.array([3, 9, 0]), np.array([3, 9, 0])) == 0
    assert 1 < psi(np.array([50, 0]), np.array([0, 50])) < 20, "an empty bin is no infinity"


def frames(count: int, seed: int, sure: float = 0.7, red: float = 0.5, empty: float = 0.2) -> list[Seen]:
    """What a model may find: 0 to 12 boxes a frame, those of one frame about equally sure."""
    random, found = np.random.default_rng(seed), []
    for _ in range(count):
        boxes = 0 if random.random() < empty else random.integers(1, 13)
        around = np.clip(random.normal(sure, 0.15), 0.1, 0.95)
        found.append(tuple((LABELS[int(random.random() > red)], float(np.clip(random.normal(around, 0.05), 0, 1)))
                           for _ in range(boxes)))
    return found


def test_resampled_from_the_same_frames_there_is_no_alarm() -> None:
    pool, random = frames(400, 0), np.random.default_rng(1)
    for trial, count in enumerate([50, 50, 60, 80, 120, 200] * 5):
        before, now = ([pool[index] for index in random.integers(0, len(pool), size)] for size in (count, 50))
        _, _, alarms = compare(before, now, LABELS, seed=trial)
        assert alarms == [], trial


@pytest.mark.parametrize(("changed", "alarm"), [({"sure": 0.4}, "confidence"), ({"red": 0.9}, "labels"),
                                                ({"empty": 0.75}, "empty")])
def test_what_changes_is_what_alarms(changed: dict[str, float], alarm: str) -> None:
    index, chance, alarms = compare(frames(200, 0), frames(80, 1, **changed), LABELS)
    assert alarms == [alarm] and index[alarm] > 0.2 and chance[alarm] <= 0.001
    assert compare(frames(200, 0), frames(80, 1, **changed), LABELS) == (index, chance, alarms), "the same, the same again"


def test_a_large_index_of_a_few_crowded_frames_is_chance() -> None:
    # 40 red boxes in one of 10 frames move the labels' shares far, but one frame is one frame.
    before = [(("red", 0.8), ("blue", 0.8))] * 60
    now = [*before[:9], tuple(("red", 0.8) for _ in range(40))]
    index, chance, alarms = compare(before, now, LABELS)
    assert index["labels"] > 0.2 and chance["labels"] > 0.001 and alarms == []


def test_a_model_that_finds_nothing_any_more_or_never_did_is_no_division_by_zero() -> None:
    full, nothing = frames(60, 0, empty=0), [()] * 60
    assert "empty" in compare(full, nothing, LABELS)[2] and "empty" in compare(nothing, full, LABELS)[2]
    assert compare(nothing, nothing, LABELS)[0] == {"confidence": 0, "labels": 0, "empty": 0}


class Line:
    """A version of red and blue squares, the finder of both that was trained on it, and a working copy."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.blobs = folder, Blobs(str(folder / "blobs"))
        self.records, self.server = Records(f"sqlite:///{folder / 'r.sqlite'}"), MemoryServer()
        self.store, self.models = GitDatasets(folder / "datasets", self.blobs), LocalModels(folder / "models")
        self.certificates = Certificates(self.records, folder / "key")
        made = [self.frame(number, "version", (RED, BLUE)) for number in range(60)]
        labelled = tuple(LabeledFrame(frame, (Annotation("red", (4, 4, 20, 20)),), "val") for frame in made)
        ref = self.store.publish("cells", Manifest(Taxonomy(LABELS), labelled), "m", "ann <ann@example.org>").ref
        card = replace(graphs.red_finder(folder / "finder"), trained_on={"ref": ref})
        self.models.register(card, folder / "finder")
        self.model = card.ref
        self.records.add("deployments", "cells", card.ref, "ann", {})
        self.server.open_task("cells", Taxonomy(LABELS))
        self.opened = 0

    def open(self, file: Path, *args: Any, **more: Any) -> OnnxRuntime:
        self.opened += 1
        return OnnxRuntime(file, threads=1)

    def frame(self, number: int, folder: str, colours: tuple[Any, ...]) -> Frame:
        """The first colour in a corner, the second, if there is one, beside it."""
        image = np.full((64, 64, 3), number, np.uint8)
        for place, colour in zip((8, 40), colours, strict=False):
            image[8:16, place:place + 8] = colour
        image[0, :, 0] = hash(folder) % 50
        made = self.blobs.put(cv2.imencode(".png", image[:, :, ::-1])[1].tobytes())
        return Frame(f"{folder}/{number}.png", 64, 64, made.md5, made.sha256, made.size_bytes)

    def annotate(self, run: str, colours: tuple[Any, ...], count: int = 60, **more: Any) -> None:
        new = [self.frame(number, run, colours) for number in range(count)]
        self.server.add_frames("cells", [(LabeledFrame(one, None, "train"), self.blobs.path(one.blob)) for one in new])
        annotate("cells", self.model, run_id=run, server=self.server, models=self.models, blobs=self.blobs,
                 records=self.records, open_backend=self.open, certificates=self.certificates, job=Quiet(), **more)

    def look(self, job: str, **more: Any) -> Drift:
        return look_for_drift("cells", **{
            "server": self.server, "store": self.store, "models": self.models, "blobs": self.blobs, "records": self.records,
            "certificates": self.certificates, "open_backend": self.open, "job": Quiet(id=job), "person": "ann",
            "scratch": self.folder / "drift", **more})


@pytest.fixture
def line(tmp_path: Path) -> Line:
    return Line(tmp_path)


def test_the_same_kind_of_frames_is_no_alarm_and_another_kind_is_one(line: Line) -> None:
    line.annotate("r1", (RED, BLUE))
    well = line.look("d1")
    assert not well.alarm and well.is_enough and well.frames == (60, 60) and "about as it sees cells@0.1.0" in well.reason
    assert standing_alarm("cells", line.records) is None
    opened = line.opened
    for run in ("r2", "r3", "r4", "r5", "r6"):
        line.annotate(run, (RED,))
    found = line.look("d2", least_frames=30)
    assert line.opened == opened + 5, "what the model sees in its version is not looked up a second time"
    assert found.alarm and found.is_new and found.runs == ("r6", "r5", "r4", "r3", "r2") and found.frames == (300, 60)
    assert found.labels["blue"] == (0.5, 0.0) and found.psi["labels"] > 1
    assert "its mix of labels is another (" in found.reason and "Review these frames" in found.reason
    assert json.loads(json.dumps(found.to_json(), allow_nan=False)) == found.to_json()


def test_an_alarm_is_new_once_and_stands_until_all_is_well(line: Line) -> None:
    line.annotate("r1", ())
    first, second = line.look("d1"), line.look("d2")
    assert (first.alarm, first.is_new, second.alarm, second.is_new) == (True, True, True, False)
    assert first.since == second.since and "finds nothing on 100% of the frames, 0% in cells@0.1.0" in first.reason
    assert standing_alarm("cells", line.records).reason == second.reason
    entries = len(line.records.entries("drift", "cells"))
    assert line.look("d1").to_json() == first.to_json() and len(line.records.entries("drift", "cells")) == entries
    line.records.add("deployments", "cells", "another@1", "ann", {})
    assert standing_alarm("cells", line.records) is None, "the alarm was about another model"


def test_too_few_frames_tell_nothing(line: Line) -> None:
    line.annotate("r1", (), count=49)
    few = line.look("d1")
    assert not few.alarm and not few.is_enough and "annotated 49 frames lately; 50 are needed" in few.reason
    line.annotate("r2", (), count=40)
    assert "60 labelled frames outside its train split; 80 are needed" in line.look("d3", least_frames=80).reason


def test_runs_that_were_asked_for_something_else_or_taken_back_do_not_count(line: Line) -> None:
    line.annotate("r1", (RED, BLUE))
    line.annotate("r2", (RED,), confidence=0.9)
    line.annotate("r3", (RED,), renames={"blue": "red"})
    line.annotate("r4", (RED,))
    line.records.add("machine_runs", "cells", "r4", "ann", {"undone": "r4"}, key="r4/undone")
    assert last_runs("cells", line.model, line.records) == ["r1"] and last_runs("cells", "another@1", line.records) == []


@pytest.mark.parametrize(("wrong", "sentence"), [({"threshold": 0}, "threshold"), ({"threshold": "much"}, "threshold"),
                                                 ({"threshold": float("nan")}, "threshold"),
                                                 ({"least_frames": 9}, "least number of frames"),
                                                 ({"least_frames": 50.5}, "least number of frames")])
def test_settings_that_make_no_sense_are_refused(line: Line, wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Invalid, match=sentence):
        line.look("d1", **wrong)


def test_without_a_deployed_model_or_its_version_there_is_nothing_to_compare(line: Line) -> None:
    with pytest.raises(Invalid, match="No model is deployed for signs"):
        look_for_drift("signs", server=line.server, store=line.store, models=line.models, blobs=line.blobs,
                       records=line.records, certificates=line.certificates, open_backend=line.open, job=Quiet(),
                       person="ann", scratch=line.folder)
    card = line.models.card(line.model)
    for version, on, sentence in (("8", "", "does not say which version"), ("9", "cells@7.0.0", "which is not here")):
        made = line.models.register(replace(card, version=version, trained_on={"ref": on} if on else {}),
                                    line.models.folder(line.model))
        line.records.add("deployments", "cells", made.ref, "ann", {})
        line.model = made.ref
        line.annotate(f"run{version}", (RED,))
        with pytest.raises(Invalid, match=sentence):
            line.look(f"d{version}")

"""Promotion with hand-made models whose scores are known: a box that is always seen, `shift` pixels aside.

The box is 32 x 32 px. Shifted by s both ways, IoU = (32 - s)^2 / (2 * 32^2 - (32 - s)^2): 1 for s = 0, 0.884 for 1, 0.784 for
2, 0.620 for 4. AP at a threshold is 1 below the IoU and 0 above, so mAP@[.5:.95] is the share of the ten thresholds that lie
below: 1.0, 0.8, 0.6 and 0.3.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from parts_training import BOX, RECIPES, Bench

from workbench.errors import Invalid, NotFound, Unavailable
from workbench.inference.graph import file_record
from workbench.model import InputSpec, ModelCard
from workbench.ports import Quiet
from workbench.steps.promote import Decision, promote, verdict
from workbench.taxonomy import Taxonomy


def _tiny() -> Any:
    spec = importlib.util.spec_from_file_location("tiny_train", RECIPES / "tiny" / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Promotions(Bench):
    """A Bench that registers hand-made models and promotes them."""

    def model(self, shift: float, trained_on: str = "", base_model: str = "", label: str = "cell", is_broken: bool = False) -> str:
        folder = self.folder / f"made {shift} {trained_on} {base_model} {label} {is_broken}".replace("/", "-")
        folder.mkdir()
        _tiny().write_model(folder / "model.onnx", np.array(BOX) + shift, 0, 1)
        if is_broken:
            graph = onnx.load(folder / "model.onnx")
            for tensor in graph.graph.initializer:
                if tensor.name == "cls_logits_values":
                    tensor.CopyFrom(numpy_helper.from_array(np.full_like(numpy_helper.to_array(tensor), np.nan), tensor.name))
            onnx.save(graph, folder / "model.onnx")
        name, tracker = f"{self.dataset}-detector", self.parts["tracker"]
        run_id = tracker.start_run(self.dataset, "made", {})
        tracker.log_files(run_id, folder, "model")
        version = tracker.register(name, run_id, "model", {}).version
        card = ModelCard(name, version, InputSpec((64, 64)), {"name": "fcos", "confidence": 0.5, "iou": 0.6}, Taxonomy((label,)),
                         {"model.onnx": file_record(folder / "model.onnx")}, run_id=run_id,
                         trained_on={"ref": trained_on, "base_model": base_model})
        return self.parts["models"].register(card, folder).ref

    def promote(self, candidate: str, version: str, job: str = "job-1", **changed: Any) -> Decision:
        parts = {name: self.parts[name] for name in ("models", "store", "blobs", "tracker", "open_backend", "person")}
        return promote(self.dataset, candidate, version, **{"records": self.records, "job": Quiet(id=job), **parts, **changed})

    def alias(self, name: str) -> str | None:
        found = self.parts["tracker"].by_alias(f"{self.dataset}-detector", name)
        return f"{found.name}@{found.version}" if found else None


@pytest.fixture
def bench(tmp_path: Path, mlflow_url: str, request: pytest.FixtureRequest) -> Iterator[Promotions]:
    yield Promotions(tmp_path, mlflow_url, f"p{tmp_path.parent.name[-6:]}-{tmp_path.name}".lower().replace("_", "-")[:50])


def test_the_first_model_that_finds_something_becomes_champion_and_a_better_one_takes_over(bench: Promotions) -> None:
    version = bench.publish()
    first, better = bench.model(2, version), bench.model(1, version)
    decision = bench.promote(first, version)
    assert decision.promoted and decision.champion is None
    assert decision.challenger["map_50_95"] == pytest.approx(0.6, abs=1e-6) and decision.challenger["map_50"] == pytest.approx(1, abs=1e-6)
    assert (bench.alias("champion"), bench.alias("previous")) == (first, None)

    decision = bench.promote(better, version, "job-2")
    assert decision.promoted and decision.challenger["map_50_95"] == pytest.approx(0.8, abs=1e-6)
    assert decision.champion["model"] == first and decision.champion["map_50_95"] == pytest.approx(0.6, abs=1e-6)
    assert decision.reason == (f"{better} scores map_50_95 0.8000, {first} 0.6000: better by 0.2000 (more than 0.005), the new "
                               "champion.")
    assert (bench.alias("champion"), bench.alias("previous")) == (better, first)

    entry, older = bench.records.entries("promotions", bench.dataset)
    assert (entry.subject, entry.person, older.subject) == (better, "ann", first)
    facts = entry.facts
    assert facts["challenger"]["per_class"] == {"cell": pytest.approx(0.8, abs=1e-6)}
    assert facts["champion"]["sha256"] == bench.parts["models"].card(first).files["model.onnx"]["sha256"]
    assert facts["dataset_digest"] == bench.parts["store"].version(version).digest
    assert (facts["margin"], facts["frames"], facts["version"], facts["split"]) == (0.005, 1, version, "test")
    tags = {run["run_id"]: run["tags"] for run in bench.parts["tracker"].runs(bench.dataset)}
    assert tags[bench.parts["models"].card(better).run_id]["promotion"] == "champion"


def test_a_tie_a_loss_and_exactly_the_margin_keep_the_champion(bench: Promotions) -> None:
    version = bench.publish()
    champion = bench.model(2, version)
    bench.promote(champion, version)
    for number, (shift, margin, is_promoted) in enumerate([(2.001, 0.005, False), (4, 0.0, False), (1, 0.2, False), (1.001, 0.199, True)]):
        candidate = bench.model(shift, version)
        decision = bench.promote(candidate, version, f"job-{number + 2}", margin=margin)
        assert decision.promoted == is_promoted
        assert bench.alias("champion") == (candidate if is_promoted else champion)
    assert len(bench.records.entries("promotions", bench.dataset)) == 5


def test_the_champion_is_not_promoted_over_itself(bench: Promotions) -> None:
    version = bench.publish()
    champion = bench.model(2, version)
    bench.promote(champion, version)
    decision = bench.promote(champion, version, "job-2", margin=0)
    assert not decision.promoted and decision.reason == f"{champion} is the champion already."
    assert bench.alias("previous") is None


@pytest.mark.parametrize("way", ["itself", "the model it started from"])
def test_a_model_that_has_seen_test_frames_is_refused(bench: Promotions, way: str) -> None:
    leaky = bench.publish(("train", "train", "train", "val"))  # the frame that is in the test split later is in val here
    version = bench.publish(("train", "train", "val", "test"))
    honest = bench.model(2, version)
    bench.promote(honest, version)
    cheat = bench.model(0, leaky)
    if way != "itself":
        cheat = bench.model(0.5, version, base_model=cheat)
    decision = bench.promote(cheat, version, "job-2")
    assert not decision.promoted and decision.leaked == 1
    assert decision.reason.startswith(f"Refused: 1 of 1 test frames of {version} were in the training or validation data of {cheat}, "
                                      "for example 0-3.png")
    assert decision.challenger["map_50_95"] is None and bench.alias("champion") == honest
    assert bench.records.entries("promotions", bench.dataset)[0].facts["leaked"] == 1


def test_a_model_whose_outputs_are_nan_is_refused(bench: Promotions) -> None:
    version = bench.publish()
    decision = bench.promote(bench.model(0, version, is_broken=True), version)
    assert not decision.promoted and "Refused" in decision.reason and "NaN" in decision.reason
    assert bench.alias("champion") is None and len(bench.records.entries("promotions", bench.dataset)) == 1


def test_a_first_model_that_finds_nothing_does_not_lead(bench: Promotions) -> None:
    version = bench.publish()
    decision = bench.promote(bench.model(20, version), version)  # IoU 0.076
    assert not decision.promoted and "finds nothing" in decision.reason and bench.alias("champion") is None


def test_a_champion_of_other_labels_finds_none_of_today_s(bench: Promotions) -> None:
    version = bench.publish()
    old = bench.model(0, version)
    bench.promote(old, version)
    renamed = bench.publish(label="thrombocyte")
    candidate = bench.model(2, renamed, label="thrombocyte")
    decision = bench.promote(candidate, renamed, "job-2")
    assert decision.promoted and decision.champion["map_50_95"] == 0


def test_the_same_job_again_adds_nothing_and_measures_nothing(bench: Promotions) -> None:
    version = bench.publish()
    decision = bench.promote(bench.model(2, version), version)

    def never(file: Path) -> Any:
        raise AssertionError("a decision that stands is not measured again")

    assert bench.promote(decision.challenger["model"], version, open_backend=never) == decision
    assert len(bench.records.entries("promotions", bench.dataset)) == 1
    assert json.loads(json.dumps(decision.to_json(), allow_nan=False)) == decision.to_json()


def test_a_kill_between_ledger_and_alias_is_mended_by_the_repeat_but_a_late_repeat_undoes_nothing(bench: Promotions) -> None:
    version = bench.publish()
    first, second = bench.model(2, version), bench.model(1, version)

    class Dies:
        def __init__(self, tracker: Any) -> None:
            self._tracker = tracker

        def __getattr__(self, name: str) -> Any:
            if name == "set_alias":
                raise Unavailable("The tracker went away.")
            return getattr(self._tracker, name)

    with pytest.raises(Unavailable):
        bench.promote(first, version, tracker=Dies(bench.parts["tracker"]))
    assert bench.alias("champion") is None
    assert bench.promote(first, version).promoted and bench.alias("champion") == first
    bench.promote(second, version, "job-2")
    assert bench.promote(first, version).promoted  # what was decided then
    assert bench.alias("champion") == second
    assert len(bench.records.entries("promotions", bench.dataset)) == 2


def test_what_cannot_be_compared_is_refused_with_what_to_do(bench: Promotions) -> None:
    version, without = bench.publish(), None
    candidate = bench.model(0, version)
    without = bench.publish(("train", "train", "val"))
    with pytest.raises(Invalid, match="no labelled box in its test split.*upload gives every frame a split"):
        bench.promote(candidate, without)
    with pytest.raises(Invalid, match=f"is not a registered version of {bench.dataset}-detector; there are 1"):
        bench.promote(f"{bench.dataset}-detector@7", version)
    with pytest.raises(Invalid, match="is not a registered version"):
        bench.promote("yolox@1", version)
    with pytest.raises(NotFound):
        bench.promote(candidate, f"{bench.dataset}@9.9.9")
    for changed in ({"primary": "accuracy"}, {"margin": math.nan}, {"margin": -1}):
        with pytest.raises(Invalid, match="Promotion compares"):
            bench.promote(candidate, version, **changed)
    with pytest.raises(Invalid, match="Promotion compares"):
        bench.promote(candidate, "another@0.1.0")
    assert bench.records.entries("promotions", bench.dataset) == []


OLD = {"model": "m@1", "map_50_95": 0.5, "map_50": 0.9, "per_class": {"a": 0.7, "b": 0.3}}
NEW = {"model": "m@2", "map_50_95": 0.55, "map_50": 0.89, "per_class": {"a": 0.6, "b": 0.5}}


def test_the_verdict_goes_by_the_figure_that_was_asked_for() -> None:
    assert verdict(NEW, OLD)[0]
    assert not verdict(NEW, OLD, primary="map_50")[0]
    assert not verdict(NEW, OLD, margin=0.05)[0]
    assert not verdict(OLD, OLD, margin=0)[0]


def test_a_label_that_falls_too_far_keeps_the_champion() -> None:
    assert verdict(NEW, OLD, max_class_drop=0.1)[0]
    is_promoted, reason = verdict(NEW, OLD, max_class_drop=0.09)
    assert not is_promoted and "'a' falls by 0.1000, more than 0.09" in reason
    is_promoted, reason = verdict({**NEW, "per_class": {"a": 0.7}}, OLD, max_class_drop=0.09)
    assert not is_promoted and "'b' falls by 0.3000" in reason


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_refused_on_either_side(broken: float) -> None:
    for challenger, champion in (({**NEW, "map_50": broken}, OLD), (NEW, {**OLD, "map_50_95": broken}), ({**NEW, "map_50_95": broken}, None)):
        is_promoted, reason = verdict(challenger, champion)
        assert not is_promoted and "is not a number" in reason

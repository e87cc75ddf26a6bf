"""Promotion with hand-made models whose scores are known: a box that is always seen, `shift` pixels aside.

The box is 32 x 32 px. Shifted by s both ways, IoU = (32 - s)^2 / (2 * 32^2 - (32 - s)^2): 1 for s = 0, 0.884 for 1, 0.784 for
2, 0.620 for 4. AP at a threshold is 1 below the IoU and 0 above, so mAP@[.5:.95] is the share of the ten thresholds that lie
below: 1.0, 0.8, 0.6 and 0.3.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from parts_training import BOX, RECIPES, Bench

from workbench.errors import Conflict, Invalid, NotFound, Unavailable
from workbench.inference.graph import file_record
from workbench.model import InputSpec, ModelCard
from workbench.ports import Quiet
from workbench.steps.deploy import champion_of
from workbench.steps.promote import Decision, digest_of, promote, verdict
from workbench.steps.rollback import Rollback, earlier, rollback
from workbench.taxonomy import Taxonomy

SPLITS = ("train", "train", "val", *["test"] * 6)


def _tiny() -> Any:
    spec = importlib.util.spec_from_file_location("tiny_train", RECIPES / "tiny" / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Promotions(Bench):
    """A Bench that registers hand-made models and promotes them."""

    def publish(self, splits: tuple[str, ...] = SPLITS, label: str = "cell", shade: int = 0, moved: int = 0) -> str:
        """`moved` of the test frames have their box 2 px aside."""
        ref, store = super().publish(splits, label, shade), self.parts["store"]
        if not moved:
            return ref
        manifest = store.manifest(ref)
        names = {one.frame.name for one in manifest.split("test")[:moved]}
        frames = tuple(one if one.frame.name not in names else replace(one, annotations=tuple(
            replace(box, xyxy=tuple(value + 2 for value in BOX)) for box in one.annotations)) for one in manifest.frames)
        return store.publish(self.dataset, replace(manifest, frames=frames), "test", "ann <ann@example.org>").ref

    def model(self, shift: float, trained_on: str = "", base_model: str = "", label: str = "cell", is_broken: bool = False,
              name: str = "", tags: dict[str, str] | None = None) -> str:
        folder = self.folder / f"made {shift} {trained_on} {base_model} {label} {is_broken} {name}".replace("/", "-")
        folder.mkdir()
        _tiny().write_model(folder / "model.onnx", np.array(BOX) + shift, 0, 1)
        if is_broken:
            graph = onnx.load(folder / "model.onnx")
            for tensor in graph.graph.initializer:
                if tensor.name == "cls_logits_values":
                    tensor.CopyFrom(numpy_helper.from_array(np.full_like(numpy_helper.to_array(tensor), np.nan), tensor.name))
            onnx.save(graph, folder / "model.onnx")
        name, tracker = name or f"{self.dataset}-detector", self.parts["tracker"]
        run_id = tracker.start_run(self.dataset, "made", tags or {})
        tracker.log_files(run_id, folder, "model")
        version = tracker.register(name, run_id, "model", {}).version
        card = ModelCard(name, version, InputSpec((64, 64)), {"name": "fcos", "confidence": 0.5, "iou": 0.6}, Taxonomy((label,)),
                         {"model.onnx": file_record(folder / "model.onnx")}, run_id=run_id,
                         trained_on={"ref": trained_on, "base_model": base_model})
        return self.parts["models"].register(card, folder).ref

    def promote(self, candidate: str, version: str, job: str | Quiet = "job-1", **changed: Any) -> Decision:
        job = Quiet(id=job) if isinstance(job, str) else job
        parts = {name: self.parts[name] for name in ("models", "store", "blobs", "tracker", "open_backend", "person")}
        return promote(self.dataset, candidate, version, **{"records": self.records, "job": job, **parts, **changed})

    def rollback(self, job: str = "back-1", **changed: Any) -> Rollback:
        parts = {name: self.parts[name] for name in ("models", "tracker", "person")}
        return rollback(self.dataset, **{"records": self.records, "job": Quiet(id=job), **parts, **changed})

    def aliases(self) -> tuple[str | None, str | None]:
        return self.alias("champion"), self.alias("previous")

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
    assert decision.reason == (f"{better} scores map_50_95 0.8000, {first} 0.6000 (95 % interval of the difference 0.2000 to 0.2000 "
                               "over 6 frames): better by 0.2000 (more than 0.005), the new champion.")
    assert decision.difference == pytest.approx(0.2) and decision.interval == pytest.approx([0.2, 0.2])
    assert (bench.alias("champion"), bench.alias("previous")) == (better, first)

    entry, older = bench.records.entries("promotions", bench.dataset)
    assert (entry.subject, entry.person, older.subject) == (better, "ann", first)
    facts = entry.facts
    assert facts["challenger"]["per_class"] == {"cell": pytest.approx(0.8, abs=1e-6)}
    assert facts["champion"]["sha256"] == bench.parts["models"].card(first).files["model.onnx"]["sha256"]
    assert facts["dataset_digest"] == bench.parts["store"].version(version).digest
    assert facts["split_digest"] == digest_of(bench.parts["store"].manifest(version).split("test")) == decision.split_digest
    assert (facts["margin"], facts["frames"], facts["version"], facts["split"]) == (0.005, 6, version, "test")
    assert (facts["interval"], facts["draws"], facts["seed"], facts["lower_is_better"]) == (decision.interval, 300, 0, False)
    assert older.facts["interval"] is None and older.facts["difference"] is None
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


def test_a_split_of_too_few_frames_keeps_the_champion_however_much_better_the_challenger_looks(bench: Promotions) -> None:
    version = bench.publish(SPLITS[:-1])
    champion = bench.model(4, version)
    assert bench.promote(champion, version).promoted
    decision = bench.promote(bench.model(0, version), version, "job-2")
    assert not decision.promoted and decision.difference == pytest.approx(0.7, abs=1e-6)
    assert "fewer than 6 frames that have boxes the split is too small to tell" in decision.reason
    assert bench.alias("champion") == champion


def test_a_difference_that_a_few_frames_make_is_not_told_from_chance(bench: Promotions) -> None:
    version = bench.publish((*SPLITS, "test"), moved=4)
    champion, challenger = bench.model(0, version), bench.model(2, version)  # better on four frames, worse on three
    bench.promote(champion, version)
    decision = bench.promote(challenger, version, "job-2")
    assert not decision.promoted and decision.difference > 0.005 and decision.interval[0] < 0 < decision.interval[1]
    assert "too small to tell it from chance" in decision.reason and bench.alias("champion") == champion
    assert bench.promote(challenger, version, "job-3").interval == decision.interval, "the same seed, the same interval"
    by_map_50 = bench.promote(challenger, version, "job-4", primary="map_50")
    assert by_map_50.difference == pytest.approx(0) and by_map_50.interval == pytest.approx([0, 0])


def test_an_entry_of_before_there_were_intervals_is_read(bench: Promotions) -> None:
    version = bench.publish()
    candidate = bench.model(2, version)
    facts = {"dataset": bench.dataset, "version": version, "split": "test", "promoted": True, "reason": "It was so.",
             "primary": "map_50_95", "margin": 0.005, "challenger": {"model": candidate, "map_50_95": 0.6}, "champion": None,
             "dataset_digest": "d", "frames": 1, "leaked": 0, "job": "job-1", "key": "promote:job-1"}
    bench.records.add("promotions", bench.dataset, candidate, "ann", facts, key="promote:job-1")
    decision = bench.promote(candidate, version)
    assert (decision.reason, decision.interval, decision.split_digest) == ("It was so.", None, "")
    assert bench.alias("champion") == candidate


def test_the_digest_of_a_split_moves_with_its_names_and_pixels_alone(bench: Promotions) -> None:
    frames = bench.parts["store"].manifest(bench.publish()).split("test")
    assert digest_of(frames) == digest_of(frames[::-1])
    assert digest_of(tuple(replace(one, annotations=()) for one in frames)) == digest_of(frames)
    for changed in ({"name": "other.png"}, {"blob": "0" * 32}):
        other = (replace(frames[0], frame=replace(frames[0].frame, **changed)), *frames[1:])
        assert digest_of(other) != digest_of(frames)
    assert digest_of(frames[1:]) != digest_of(frames)


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


@pytest.mark.parametrize("trained_on", ["", "gone@1.0.0"])
def test_of_a_model_whose_training_data_is_not_known_the_decision_says_that_it_was_not_checked(bench: Promotions, trained_on: str) -> None:
    version = bench.publish()
    known, other = bench.model(2, version), bench.model(1, trained_on)
    assert "not checked" not in bench.promote(known, version, "known").reason
    decision = bench.promote(other, version, "other")
    assert decision.promoted and decision.reason.endswith(
        f"What {other} was trained on is not known here, so whether it has seen test frames was not checked.")


@pytest.mark.parametrize("split", ["train", "tset", "", ["test"]])
def test_nothing_is_compared_on_another_split_than_test_or_val(bench: Promotions, split: Any) -> None:
    version = bench.publish()
    with pytest.raises(Invalid, match="on the split test, or on val, not on"):
        bench.promote(bench.model(2, version), version, split=split)


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

    with pytest.raises(Unavailable):
        bench.promote(first, version, tracker=Dies(bench.parts["tracker"]))
    assert bench.alias("champion") is None
    assert bench.promote(first, version).promoted and bench.alias("champion") == first
    bench.promote(second, version, "job-2")
    assert bench.promote(first, version).promoted  # what was decided then
    assert bench.alias("champion") == second
    assert len(bench.records.entries("promotions", bench.dataset)) == 2


class Meanwhile(Quiet):
    """A job that does something the first time it is asked whether it was cancelled: when it is about to measure."""

    def __init__(self, do: Callable[[], Any], **named: Any) -> None:
        super().__init__(**named)
        self._do = do

    def check(self) -> None:
        do, self._do = self._do, lambda: None
        do()


def test_of_two_promotions_at_once_the_second_is_measured_against_the_winner_of_the_first(bench: Promotions) -> None:
    version = bench.publish()
    old, best, better = bench.model(4, version), bench.model(0, version), bench.model(2, version)
    bench.promote(old, version, "old")
    late = bench.promote(better, version, job=Meanwhile(lambda: bench.promote(best, version, "best"), id="late"))
    assert not late.promoted and late.champion["model"] == best and bench.aliases() == (best, old)
    assert [entry.facts["promoted"] for entry in bench.records.entries("promotions", bench.dataset)] == [False, True, True]


def test_a_promotion_that_was_measured_against_a_champion_rolled_back_meanwhile_is_measured_again(bench: Promotions) -> None:
    version = bench.publish()
    old, present, new = bench.model(2, version), bench.model(1, version), bench.model(0, version)
    bench.promote(old, version, "old")
    bench.promote(present, version, "present")
    decision = bench.promote(new, version, job=Meanwhile(lambda: bench.rollback(to=old), id="late"))
    assert decision.promoted and decision.champion["model"] == old and bench.aliases() == (new, old)


def test_a_rollback_of_a_champion_who_was_replaced_meanwhile_is_a_conflict(bench: Promotions, monkeypatch: pytest.MonkeyPatch) -> None:
    version = bench.publish()
    old, present, new = bench.model(2, version), bench.model(1, version), bench.model(0, version)
    bench.promote(old, version, "old")
    bench.promote(present, version, "present")
    folder, models = bench.parts["models"].folder, bench.parts["models"]

    def promoted_first(ref: str) -> Path:
        monkeypatch.setattr(models, "folder", folder)
        bench.promote(new, version, "new")
        return folder(ref)

    monkeypatch.setattr(models, "folder", promoted_first)
    with pytest.raises(Conflict, match=f"Another model became champion.*in place of {present}"):
        bench.rollback()
    assert bench.aliases() == (new, present)


def test_a_champion_whose_alias_was_not_yet_set_is_the_one_to_beat(bench: Promotions) -> None:
    version = bench.publish()
    old, best, better = bench.model(4, version), bench.model(0, version), bench.model(2, version)
    bench.promote(old, version, "old")
    bench.promote(best, version, "best")
    bench.parts["tracker"].set_alias(f"{bench.dataset}-detector", "champion", old.partition("@")[2])
    decision = bench.promote(better, version, "late")
    assert not decision.promoted and decision.champion["model"] == best


def test_what_cannot_be_compared_is_refused_with_what_to_do(bench: Promotions) -> None:
    version, without = bench.publish(), None
    candidate = bench.model(0, version)
    without = bench.publish(("train", "train", "val"))
    with pytest.raises(Invalid, match="no label in its test split.*upload gives every frame a split"):
        bench.promote(candidate, without)
    with pytest.raises(Invalid, match=f"is not a registered version of {bench.dataset}-detector; there are 1"):
        bench.promote(f"{bench.dataset}-detector@7", version)
    with pytest.raises(Invalid, match="is not a registered version"):
        bench.promote("yolox@1", version)
    with pytest.raises(NotFound):
        bench.promote(candidate, f"{bench.dataset}@9.9.9")
    with pytest.raises(Invalid, match="compares map_50_95 or map_50 or miou or .* or map; there is no metric 'mAP50-95'"):
        bench.promote(candidate, version, primary="mAP50-95")
    for wrong in (True, "yes", 1):
        with pytest.raises(Invalid, match="more of map_50 is better: lower_is_better must be false"):
            bench.promote(candidate, version, primary="map_50", lower_is_better=wrong)
    for changed in ({"primary": "f2"}, {"primary": ["map_50"]}, {"margin": math.nan}, {"margin": -1}, {"margin": "0.1"}, {"margin": True},
                    {"max_class_drop": math.nan}, {"max_class_drop": 5}):
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


def test_scores_alone_do_not_win_when_the_interval_reaches_0() -> None:
    assert verdict(NEW, OLD, within=(0.001, 0.1), frames=6)[0]
    for within, frames in (((0.0, 0.1), 60), ((-0.01, 0.1), 60), ((math.nan, math.nan), 60), ((0.01, 0.1), 5)):
        is_promoted, reason = verdict(NEW, OLD, within=within, frames=frames)
        assert not is_promoted and "too small to tell" in reason and "Review more frames" in reason
    assert verdict(NEW, None, within=None, frames=1)[0], "a first champion needs only a score"


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_refused_on_either_side(broken: float) -> None:
    for challenger, champion in (({**NEW, "map_50": broken}, OLD), (NEW, {**OLD, "map_50_95": broken}), ({**NEW, "map_50_95": broken}, None)):
        is_promoted, reason = verdict(challenger, champion)
        assert not is_promoted and "is not a number" in reason


class Dies:
    """A tracker that goes away when an alias is set."""

    def __init__(self, tracker: Any) -> None:
        self._tracker = tracker

    def __getattr__(self, name: str) -> Any:
        if name == "set_alias":
            raise Unavailable("The tracker went away.")
        return getattr(self._tracker, name)


def test_a_rollback_swaps_champion_and_previous_and_can_be_rolled_back(bench: Promotions) -> None:
    version = bench.publish()
    first, second = bench.model(2, version), bench.model(1, version)
    bench.promote(first, version)
    bench.promote(second, version, "job-2")
    done = bench.rollback(to=first)
    assert bench.aliases() == (first, second) and champion_of(bench.dataset, bench.records) == first
    assert done.reason == f"{first} is champion again in place of {second}, rolled back by ann; nothing was measured."
    entry = bench.records.entries("promotions", bench.dataset, limit=1)[0]
    assert (entry.subject, entry.person, entry.facts["promoted"], entry.facts["rollback"]) == (first, "ann", True, True)
    assert entry.facts["challenger"]["map_50_95"] == pytest.approx(0.6, abs=1e-6) and entry.facts["champion"] == {"model": second}
    assert bench.rollback() == done and len(bench.records.entries("promotions", bench.dataset)) == 3
    assert json.loads(json.dumps(done.to_json(), allow_nan=False)) == done.to_json()
    assert earlier(bench.dataset, bench.records).subject == second
    with pytest.raises(Conflict, match=f"is {second} by now, not {first}"):
        bench.rollback("back-2", to=first)
    bench.rollback("back-2")
    assert bench.aliases() == (second, first)
    bench.rollback("back-1")
    assert bench.aliases() == (second, first), "a late repeat undoes nothing"


def test_a_rollback_is_followed_by_a_promotion_against_the_model_that_leads_again(bench: Promotions) -> None:
    version = bench.publish()
    models = [bench.model(shift, version) for shift in (4, 1, 2)]
    bench.promote(models[0], version)
    bench.promote(models[1], version, "job-2")
    bench.rollback()
    decision = bench.promote(models[2], version, "job-3")
    assert decision.promoted and decision.champion["model"] == models[0]
    assert bench.aliases() == (models[2], models[0]) and earlier(bench.dataset, bench.records).subject == models[0]


def test_a_rollback_killed_between_ledger_and_aliases_is_mended_even_after_a_refused_challenger(bench: Promotions) -> None:
    version = bench.publish()
    first, second = bench.model(2, version), bench.model(1, version)
    bench.promote(first, version)
    bench.promote(second, version, "job-2")
    with pytest.raises(Unavailable):
        bench.rollback(tracker=Dies(bench.parts["tracker"]))
    assert bench.aliases() == (second, first) and champion_of(bench.dataset, bench.records) == first
    bench.promote(bench.model(20, version), version, "job-3")
    bench.rollback()
    assert bench.aliases() == (first, second) and len(bench.records.entries("promotions", bench.dataset)) == 4


def test_a_rollback_to_nothing_or_to_a_model_that_cannot_lead_is_refused(bench: Promotions) -> None:
    with pytest.raises(Invalid, match="no champion before the present one"):
        bench.rollback()
    with pytest.raises(Invalid, match="Data set name"):
        rollback("../x", models=bench.parts["models"], tracker=bench.parts["tracker"], records=bench.records, job=Quiet(id="j"),
                 person="ann")
    version = bench.publish()
    first, second = bench.model(2, version), bench.model(1, version)
    bench.promote(first, version)
    bench.promote(bench.model(4, version), version, "job-1b")  # refused: it never led
    with pytest.raises(Invalid, match="no champion before the present one"):
        bench.rollback()
    bench.promote(second, version, "job-2")
    file = bench.parts["models"].folder(first) / "model.onnx"
    good = file.read_bytes()
    for spoil in (lambda: file.write_bytes(good[:-1] + b"x"), file.unlink):
        spoil()
        with pytest.raises(Invalid, match=f"{first} cannot be champion again: .*promote another model"):
            bench.rollback()
    file.write_bytes(good)
    stranger = {"promoted": True, "challenger": {"model": first, "sha256": "0" * 64}}
    bench.records.add("promotions", bench.dataset, first, "ann", stranger, key="a")
    bench.records.add("promotions", bench.dataset, second, "ann", {"promoted": True}, key="b")
    with pytest.raises(Invalid, match=f"{first} cannot be champion again: its file is another"):
        bench.rollback()
    for key, ref in (("c", f"{bench.dataset}-detector@77"), ("d", second)):
        bench.records.add("promotions", bench.dataset, ref, "ann", {"promoted": True}, key=key)
    with pytest.raises(Invalid, match="@77 cannot be champion again: .*is not registered"):
        bench.rollback()
    assert bench.aliases() == (second, first) and len(bench.records.entries("promotions", bench.dataset)) == 7


def test_a_name_of_its_own_has_a_champion_and_a_rollback_of_its_own(bench: Promotions) -> None:
    version = bench.publish()
    own = bench.model(4, version)
    bench.promote(own, version)
    first, second = (bench.model(shift, version, name=f"{bench.dataset}-night") for shift in (2, 1))
    assert (first, second) == (f"{bench.dataset}-night@1", f"{bench.dataset}-night@2")
    assert bench.promote(first, version, "job-2").champion is None, "it is the first of its name"
    assert bench.promote(second, version, "job-3").champion["model"] == first
    led = [champion_of(bench.dataset, bench.records, name=name) for name in (None, f"{bench.dataset}-night")]
    assert led == [own, second] and bench.aliases() == (own, None)
    assert earlier(bench.dataset, bench.records) is None
    with pytest.raises(Invalid, match="no champion before the present one"):
        bench.rollback()
    assert bench.rollback("back-2", to=first).champion == {"model": second}
    assert champion_of(bench.dataset, bench.records, name=f"{bench.dataset}-night") == first
    assert bench.parts["tracker"].by_alias(f"{bench.dataset}-night", "champion").version == "1"
    assert bench.rollback("back-3", name=f"{bench.dataset}-night").challenger["model"] == second
    assert bench.aliases() == (own, None), "the data set's own champion stays"


def test_a_data_set_whose_only_champion_has_another_name_is_led_by_that(bench: Promotions) -> None:
    version = bench.publish()
    night = bench.model(1, version, name=f"{bench.dataset}-night")
    bench.promote(night, version)
    assert champion_of(bench.dataset, bench.records) == night
    own = bench.model(4, version)
    bench.promote(own, version, "job-2")
    assert champion_of(bench.dataset, bench.records) == own


def test_the_metric_that_a_training_was_asked_for_decides_when_we_measure_it(bench: Promotions) -> None:
    version = bench.publish()
    asked = bench.model(2, version, tags={"primary_metric": "map_50", "lower_is_better": "false"})
    decision = bench.promote(asked, version)
    assert decision.promoted and decision.primary == "map_50" and "scores map_50 1.0000" in decision.reason
    assert bench.promote(bench.model(1, version), version, "job-2").primary == "map_50_95"
    assert bench.promote(asked, version, "job-3", primary="map_50_95").primary == "map_50_95", "who says one decides"


def test_a_metric_of_the_recipe_s_own_or_a_renamed_one_is_refused_with_those_we_measure(bench: Promotions) -> None:
    version = bench.publish()
    for number, tags in enumerate(({"primary_metric": "mAP50-95"}, {"primary_metric": "val_loss", "lower_is_better": "true"},
                                   {"primary_metric": "map_50", "lower_is_better": "true"})):
        decision = bench.promote(bench.model(1 + number, version, tags=tags), version, f"job-{number}")
        assert not decision.promoted and decision.reason.startswith("Refused: ") and "map_50_95 or map_50" in decision.reason
        assert decision.challenger["map_50_95"] is None, "nothing is measured"
    assert bench.alias("champion") is None and len(bench.records.entries("promotions", bench.dataset)) == 3

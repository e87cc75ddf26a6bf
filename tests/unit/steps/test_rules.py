"""What starts a training by itself: each slot, version and alarm once, whoever is killed when; and nothing for nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from workbench.annotation import Annotation
from workbench.blobs import digests
from workbench.config import Config
from workbench.dataset import Frame, LabeledFrame, Manifest
from workbench.errors import Invalid, NotFound
from workbench.inference.graph import file_record
from workbench.model import InputSpec, ModelCard
from workbench.records import Entry
from workbench.service import rules as service_rules
from workbench.service.rules import RuleLooks
from workbench.steps.rules import Rule, events, look, next_slot, rules, set_rule, slot, switch_off
from workbench.taxonomy import Taxonomy
from workbench.wiring import Workbench

TINY = {"recipe": "tiny", "params": {"epochs": 2}}
HOUR = timedelta(hours=1)


class Killed(BaseException):
    """The process ends at this very point."""


@dataclass
class Shelf:
    """A data set `cells`, its models and rules, and the jobs that looks asked for: (kind, key) -> arguments."""

    folder: Path
    jobs: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    waiting: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.wb = Workbench(Config(home=self.folder))
        self.records = self.wb.records

    def publish(self, labelled: int, unlabelled: int = 0) -> str:
        made = self.wb.blobs.put(b"pixels")
        assert made.md5 == digests(b"pixels").md5
        frames = tuple(LabeledFrame(
            Frame(f"{number}.png", 9, 9, made.md5, made.sha256, made.size_bytes),
            (Annotation("cell", (1, 1, 5, 5), source="human:ann", id=f"{number:032}"),) if number < labelled else None,
            "train") for number in range(labelled + unlabelled))
        return self.wb.datasets.publish("cells", Manifest(Taxonomy(("cell",)), frames), "m", "ann <ann@example.org>").ref

    def trained(self, on: str, name: str = "cells-detector", version: str = "1") -> str:
        folder = self.folder / f"{name}-{version}"
        folder.mkdir()
        (folder / "model.onnx").write_bytes(name.encode() + version.encode())
        card = ModelCard(name, version, InputSpec((64, 64)), {"name": "fcos", "confidence": 0.5, "iou": 0.6},
                         Taxonomy(("cell",)), {"model.onnx": file_record(folder / "model.onnx")}, trained_on={"ref": on},
                         run_id="run")
        return self.wb.models.register(card, folder).ref

    def set(self, kind: str, **more: Any) -> Rule:
        return set_rule(Rule("cells", kind, **{"training": TINY, **more}), records=self.records, person="lea")

    def look(self, now: datetime | None = None, submit: Callable[..., str] | None = None) -> list[Entry]:
        return look("cells", store=self.wb.datasets, models=self.wb.models, records=self.records,
                    submit=submit or self.submit, find=lambda kind, key: (kind, key) in self.jobs,
                    waiting=lambda: self.waiting, now=now)

    def submit(self, kind: str, args: dict[str, Any], person: str, key: str) -> str:
        assert self.jobs.get((kind, key), args) == args, "a key stands for one job"
        self.jobs[kind, key] = args
        return key

    def trainings(self) -> list[dict[str, Any]]:
        return [args for (kind, _), args in self.jobs.items() if kind == "retrain"]


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


def at(rule: Rule) -> datetime:
    return datetime.fromisoformat(rule.at)


def test_each_slot_of_a_schedule_trains_once_on_the_latest_version(shelf: Shelf) -> None:
    shelf.publish(1)
    start = at(shelf.set("schedule", every_h=12))
    assert shelf.look(start + 11 * HOUR) == [] and shelf.trainings() == []
    (event,) = shelf.look(start + 12.1 * HOUR)
    assert shelf.trainings() == [{**TINY, "dataset": "cells", "version": "cells@0.1.0"}] and event.person == "lea"
    assert shelf.look(start + 13 * HOUR) == [] and len(shelf.trainings()) == 1
    shelf.publish(2)
    # Two slots were missed while nobody looked: the newest one counts.
    shelf.look(start + 50 * HOUR)
    assert [one["version"] for one in shelf.trainings()] == ["cells@0.1.0", "cells@0.1.1"]
    assert [one.facts["key"][-25:] for one in events("cells", records=shelf.records)] == [
        (start + hours * HOUR).isoformat(timespec="seconds") for hours in (48, 12)]


def test_a_cron_expression_fires_at_its_minutes_and_not_for_those_before_it_was_set(shelf: Shelf) -> None:
    shelf.publish(1)
    rule = replace(shelf.set("schedule", cron="0 3 * * *"), at="2026-11-21T16:00:00.000+00:00")
    day = datetime(2026, 11, 21, tzinfo=timezone.utc)
    assert slot(rule, day + 23 * HOUR) is None
    assert slot(rule, day + 27 * HOUR) == day + 27 * HOUR == slot(rule, day + 40 * HOUR)
    assert next_slot(rule, day + 20 * HOUR) == day + 27 * HOUR and next_slot(rule, day + 27 * HOUR) == day + 51 * HOUR
    assert rule.in_words() == "at 0 3 * * * (UTC)" and shelf.set("schedule", every_h=48).in_words() == "every 2 days"


def test_nothing_new_is_said_and_trains_nothing(shelf: Shelf) -> None:
    first = shelf.publish(2)
    shelf.trained(first)
    start = at(shelf.set("schedule", every_h=1))
    (event,) = shelf.look(start + 1.5 * HOUR)
    assert "Nothing new since the last training: cells-detector@1 was trained on cells@0.1.0" in event.facts["told"]
    shelf.publish(2, unlabelled=3)  # frames nobody looked at teach nothing
    (event,) = shelf.look(start + 2.5 * HOUR)
    assert "cells@0.1.1 has the same labelled frames to learn from as cells@0.1.0" in event.facts["told"]
    latest = shelf.publish(4)
    shelf.waiting = [{"version": latest}]
    (event,) = shelf.look(start + 3.5 * HOUR)
    assert f"{latest} is being trained on already" in event.facts["told"] and shelf.trainings() == []
    shelf.waiting = [{"version": latest, "register_as": "another"}]  # under another name: that is another model
    shelf.look(start + 4.5 * HOUR)
    assert [one["version"] for one in shelf.trainings()] == [latest]


def test_a_look_that_is_killed_at_any_point_starts_the_same_training_later_and_only_once(shelf: Shelf) -> None:
    shelf.publish(1)
    start = at(shelf.set("schedule", every_h=1))

    def dies(*_: Any) -> str:
        raise Killed

    with pytest.raises(Killed):
        shelf.look(start + 1.5 * HOUR, dies)
    shelf.publish(2)  # what was decided is decided: the version of then
    assert shelf.look(start + 1.6 * HOUR) == [] and [one["version"] for one in shelf.trainings()] == ["cells@0.1.0"]

    def dies_after(*asked: Any) -> str:
        shelf.submit(*asked)
        raise Killed

    with pytest.raises(Killed):
        shelf.look(start + 2.5 * HOUR, dies_after)
    for _ in range(3):
        shelf.look(start + 2.6 * HOUR)
    assert [one["version"] for one in shelf.trainings()] == ["cells@0.1.0", "cells@0.1.1"]


def test_the_last_rule_of_a_kind_counts_and_one_that_is_off_does_nothing(shelf: Shelf) -> None:
    shelf.publish(1)
    shelf.set("schedule", every_h=1)
    changed = shelf.set("schedule", every_h=1, training={"recipe": "other"})
    switch_off("cells", "schedule", records=shelf.records, person="ann")
    assert shelf.look(at(changed) + 5 * HOUR) == [] and shelf.jobs == {}
    off = rules("cells", records=shelf.records)["schedule"]
    assert (off.is_on, off.training, off.person) == (False, {"recipe": "other"}, "ann")
    with pytest.raises(NotFound, match="no rule 'drift'"):
        switch_off("cells", "drift", records=shelf.records, person="ann")
    assert len(shelf.records.entries("retrain_rules")) == 3, "rules are only added"


@pytest.mark.parametrize(("wrong", "sentence"), [
    ({"kind": "moon"}, "A rule is one of"), ({"every_h": None}, "either as hours"),
    ({"cron": "0 3 * * *"}, "either as hours"), ({"every_h": 0}, "must be a number from"),
    ({"every_h": float("nan")}, "must be a number from"), ({"every_h": True}, "must be a number from"),
    ({"every_h": None, "cron": "0 0 30 2 *"}, "ever comes true"), ({"every_h": None, "cron": "@daily"}, "Five fields"),
    ({"every_h": None, "cron": "R 3 * * *"}, "Five fields"), ({"every_h": None, "cron": "61 * * * *"}, "out of range"),
    ({"every_h": None, "cron": "* * * * * *"}, "Five fields"), ({"kind": "accepted"}, "Only a schedule"),
    ({"threshold": 0}, "threshold"), ({"least_frames": 3}, "least number of frames"), ({"dataset": "../x"}, "Data set name")])
def test_a_rule_that_makes_no_sense_is_refused_with_what_to_write(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Invalid, match=sentence):
        Rule(**{"dataset": "cells", "kind": "schedule", "every_h": 1.0, **wrong})


def test_work_accepted_in_cvat_starts_a_training_when_it_is_published(shelf: Shelf) -> None:
    shelf.publish(1)
    shelf.set("accepted")
    assert shelf.look() == []

    def pulled(next_version: str, published: str = "") -> None:
        shelf.records.add("pulls", "cells", "0.1.0", "ann", {"jobs": [7], "next": next_version, "published": published})

    pulled("0.1.1")  # offered: a person has not published it yet
    assert shelf.look() == []
    shelf.publish(2)
    (event,) = shelf.look()
    assert event.facts["told"] == ("Work accepted in CVAT was published as cells@0.1.1: a training on cells@0.1.1 starts.")
    pulled("0.1.2", shelf.publish(3))
    shelf.look()
    assert shelf.look() == [] and [one["version"] for one in shelf.trainings()] == ["cells@0.1.1", "cells@0.1.2"]


def test_work_published_before_the_rule_was_set_starts_nothing(shelf: Shelf) -> None:
    ref = shelf.publish(1)
    shelf.records.add("pulls", "cells", "", "ann", {"jobs": [7], "next": "0.1.0", "published": ref})
    shelf.set("accepted")
    assert shelf.look() == [] and shelf.jobs == {}


def drifted(shelf: Shelf, since: str, alarm: bool = True, model: str = "cells-detector@1") -> None:
    facts = {"dataset": "cells", "model": model, "on": "cells@0.1.0", "runs": ["r"], "frames": [60, 60], "is_enough": True,
             "alarm": alarm, "is_new": True, "reason": "It sees something else.", "since": since, "key": since}
    shelf.records.add("drift", "cells", model, "lea", facts)


def test_a_drift_alarm_waits_for_something_to_learn_and_then_trains_once(shelf: Shelf) -> None:
    shelf.trained(shelf.publish(1))
    shelf.records.add("deployments", "cells", "cells-detector@1", "lea", {})
    shelf.set("drift")
    assert shelf.look() == []
    drifted(shelf, "then")
    (event,) = shelf.look()
    assert "Drift alarm of cells-detector@1: Nothing new" in event.facts["told"] and shelf.look() == []
    shelf.publish(5)
    (event,) = shelf.look()
    assert event.facts["args"]["version"] == "cells@0.1.1"
    shelf.publish(6)
    assert shelf.look() == [], "one alarm, one training"
    shelf.records.add("deployments", "cells", "cells-detector@2", "lea", {})
    assert shelf.look() == [] and len(shelf.trainings()) == 1, "the alarm was about another model"


def test_a_drift_rule_that_only_tells_trains_nothing(shelf: Shelf) -> None:
    shelf.publish(1)
    shelf.records.add("deployments", "cells", "cells-detector@1", "lea", {})
    shelf.set("drift", retrain=False)
    drifted(shelf, "then")
    assert shelf.look() == [] and shelf.trainings() == []


def test_the_deployed_model_s_newest_run_is_looked_at_once(shelf: Shelf) -> None:
    shelf.publish(1)
    shelf.records.add("deployments", "cells", "cells-detector@1", "lea", {})
    shelf.set("drift", threshold=0.3)
    shelf.look()
    assert shelf.jobs == {}
    for run in ("r1", "r2"):
        shelf.records.add("machine_runs", "cells", run, "m", {"model": "cells-detector@1", "statuses": ["new"]})
        shelf.look()
        shelf.records.add("machine_runs", "cells", run, "m",
                          {"is_finished": True, "model": "cells-detector@1", "frames": 9})
        for _ in range(3):
            shelf.look()
    assert list(shelf.jobs.values()) == [{"dataset": "cells", "threshold": 0.3, "least_frames": 50}] * 2
    assert [key for _, key in shelf.jobs] == [f"cells:{run}:1" for run in ("r1", "r2")]


def test_two_service_processes_that_look_at_once_make_one_job(shelf: Shelf) -> None:
    shelf.publish(1)
    shelf.set("accepted")
    shelf.records.add("pulls", "cells", "", "ann", {"jobs": [7], "next": "0.1.0", "published": "cells@0.1.0"})
    for looks in [RuleLooks(Workbench(Config(home=shelf.folder))) for _ in range(2)] * 2:
        looks.look_once()
    (job,) = shelf.wb.jobs.list(kind="retrain")
    assert (job.state, job.person, job.args) == ("queued", "lea", {**TINY, "dataset": "cells", "version": "cells@0.1.0"})
    shelf.wb.jobs.cancel(job.id)
    RuleLooks(shelf.wb).look_once()
    assert len(shelf.wb.jobs.list(kind="retrain")) == 1, "a cancelled training does not come back"


def test_looks_that_fail_for_one_data_set_cost_the_others_nothing(
        shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not by caplog: libraries that other tests of this process use set logging up anew.
    told: list[str] = []
    monkeypatch.setattr(service_rules.LOG, "warning", lambda text, *args: told.append(text % args))
    shelf.publish(1)
    shelf.set("accepted")
    shelf.records.add("pulls", "cells", "", "ann", {"jobs": [7], "next": "0.1.0", "published": "cells@0.1.0"})
    set_rule(Rule("another", "accepted", training=TINY), records=shelf.records, person="lea")
    shelf.records.add("pulls", "another", "", "ann", {"jobs": [7], "next": "0.1.0", "published": "another@0.1.0"})
    RuleLooks(shelf.wb).look_once()
    assert len(shelf.wb.jobs.list(kind="retrain")) == 1 and [one[:21] for one in told] == ["The rules of another:"]
    with pytest.raises(Invalid, match="retrain_look_s"):
        RuleLooks(Workbench(Config(home=shelf.folder, retrain_look_s=-1)))


def test_the_thread_looks_while_the_service_runs(shelf: Shelf) -> None:
    looked = RuleLooks(Workbench(Config(home=shelf.folder, retrain_look_s=1)))
    shelf.publish(1)
    shelf.set("accepted")
    shelf.records.add("pulls", "cells", "", "ann", {"jobs": [7], "next": "0.1.0", "published": "cells@0.1.0"})
    looked.start()
    try:
        until = datetime.now(timezone.utc) + timedelta(seconds=60)
        while not shelf.wb.jobs.list(kind="retrain") and datetime.now(timezone.utc) < until:
            time.sleep(0.1)
    finally:
        looked.close()
    assert len(shelf.wb.jobs.list(kind="retrain")) == 1

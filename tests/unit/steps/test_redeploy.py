"""What follows a promotion: INT8 with its certificate, the next annotator, CVAT; killed anywhere, the same end."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from doubles.quantizable import deep_finder
from test_quantize import EASY, Stores, labelled, openvino

from workbench.adapters.git_datasets import GitDatasets
from workbench.adapters.local_models import LocalModels
from workbench.blobs import Blobs
from workbench.certificates import Certificates
from workbench.config import Config
from workbench.errors import Cancelled, Conflict, Invalid
from workbench.formats.nuclio import Function
from workbench.kinds import all_of, check
from workbench.ports import Quiet, RegisteredModel
from workbench.records import Records
from workbench.steps import certify as certifying
from workbench.steps.cvat_gateway import deploy_to_cvat, served
from workbench.steps.quantize import quantize
from workbench.steps.redeploy import Redeployed, redeploy
from workbench.wiring import Workbench


class Aliases:
    """As much of a Tracker as deploying asks for."""

    def __init__(self) -> None:
        self.set: dict[str, str] = {}

    def versions(self, name: str) -> list[RegisteredModel]:
        return [RegisteredModel(name, number, "") for number in ("1", "2", "3")]

    def set_alias(self, name: str, alias: str, version: str) -> None:
        self.set[f"{name} {alias}"] = version


class Killed(BaseException):
    """The process ends at this very point."""


class Dies(Records):
    """Records of a process that is killed at its n-th entry, before or after it is written."""

    def __init__(self, records: Records, number: int, is_after: bool) -> None:
        self.__dict__.update(records.__dict__)
        self._left, self._is_after = number, is_after

    def add(self, *args: Any, **more: Any) -> bool:
        self._left -= 1
        if self._left < 0 and not self._is_after:
            raise Killed
        added = super().add(*args, **more)
        if self._left < 0:
            raise Killed
        return added


@dataclass
class Floor:
    """deep@1 led, annotates and stands in CVAT; deep@2 has just taken over."""

    stores: Stores
    records: Records
    tracker: Aliases

    def __post_init__(self) -> None:
        for at, ref in enumerate(("deep@1", "deep@2")):
            self.records.add("promotions", "squares", ref, "ann", {"promoted": True, "key": f"p{at}"})
            if not at:
                self.records.add("deployments", "squares", ref, "ann", {})
                deploy_to_cvat(ref, renames={"red": "rot"}, models=self.stores.models, records=self.records,
                               certificates=self.stores.certificates, open_backend=openvino, person="ann")

    def redeploy(self, model: str = "deep@2", job: str | Quiet = "j1", records: Records | None = None,
                 **more: Any) -> Redeployed:
        parts = self.stores.parts(records=records or self.records, tracker=self.tracker,
                                  job=Quiet(id=job) if isinstance(job, str) else job,
                                  scratch=self.stores.home / "scratch", limits=EASY)
        return redeploy("squares", model, **{"version": "squares@0.1.0", **parts, **more})

    def in_cvat(self) -> dict[str, dict[str, str]]:
        found = served(models=self.stores.models, records=self.records, certificates=self.stores.certificates)
        assert all(not one.why_not for one in found)
        return {one.function.model: one.function.renames for one in found}

    def state(self) -> tuple[Any, ...]:
        stages = [(one.subject, one.facts["stage"], one.facts["told"])
                  for one in self.records.entries("redeployments", "squares")]
        return (self.records.deployed("squares"), self.in_cvat(), stages,
                [one.subject for one in self.records.entries("deployments", "squares")])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Stores:
    """deep@1, deep@2 and deep@3, and the INT8 version of deep@2 with its certificate."""
    folder, patch = tmp_path_factory.mktemp("redeploy"), pytest.MonkeyPatch()
    patch.setattr(certifying, "ROUND_S", 0.01)
    blobs, records = Blobs(str(folder / "blobs")), Records(f"sqlite:///{folder / 'r.sqlite'}")
    stores = Stores(folder, LocalModels(folder / "models"), GitDatasets(folder / "datasets", blobs), blobs,
                    Certificates(records, folder / "certificate.key"), records)
    for version in ("1", "2", "3"):
        card = deep_finder(folder / version)
        stores.models.register(replace(card, version=version, description=version), folder / version)
    stores.publish(labelled(stores, 20, "train") + labelled(stores, 12, "test", start=100))
    quantize("deep@2", stores.newest(), **stores.parts(limits=EASY, scratch=folder / "scratch"))
    yield stores
    patch.undo()


@pytest.fixture
def floor(made: Stores, tmp_path: Path) -> Floor:
    return Floor(made, Records(f"sqlite:///{tmp_path / 'r.sqlite'}"), Aliases())


def test_a_champion_is_deployed_in_int8_and_takes_the_earlier_one_s_place_in_cvat(floor: Floor) -> None:
    done = floor.redeploy(then=["cvat", "int8", "deploy"])
    assert done.deployed == floor.records.deployed("squares") == "deep@2-int8"
    assert floor.in_cvat() == {"deep@2-int8": {"red": "rot"}}
    assert [stage["stage"] for stage in done.stages] == ["int8", "deploy", "cvat"]
    assert "deep@2-int8 is certified" in done.reason and "takes the place of deep@1 in CVAT" in done.reason
    assert floor.tracker.set == {"deep deployed": "2"}, "the registry knows what the INT8 version was made from"
    assert floor.redeploy(then=["int8", "cvat"]) == done and len(floor.records.entries("redeployments")) == 3
    assert json.loads(json.dumps(done.to_json())) == done.to_json()


def test_without_a_passing_certificate_fp32_is_deployed_and_the_reason_told(floor: Floor) -> None:
    # deep@3 has no INT8 version yet, and none that loses a negative amount of mAP can be made.
    floor.records.add("promotions", "squares", "deep@3", "ann", {"promoted": True, "key": "p3"})
    done = floor.redeploy("deep@3", then=["int8", "cvat"], limits={**EASY, "frames": 1000})
    assert done.deployed == "deep@3" and done.stages[0]["passed"] is False
    assert "deep@3 stays in FP32: deep@3 cannot be quantised within the limits" in done.reason
    assert floor.in_cvat() == {"deep@3": {"red": "rot"}} and "deep@3-int8" not in floor.stores.models.refs()


def test_an_int8_version_made_with_another_calibration_is_certified_and_kept_out_when_it_fails(floor: Floor) -> None:
    version = floor.stores.publish(labelled(floor.stores, 24, "train") + labelled(floor.stores, 12, "test", start=100))
    failed = floor.redeploy(then=["int8"], version=version, limits={**EASY, "frames": 1000})
    assert failed.deployed == "deep@2" and "the certificate of deep@2-int8 failed" in failed.reason
    passed = floor.redeploy(job="j2", then=["int8"], version=version)
    assert passed.deployed == "deep@2-int8" == floor.records.deployed("squares")


def test_killed_at_any_entry_and_repeated_it_comes_to_the_same_end(floor: Floor, made: Stores, tmp_path: Path) -> None:
    floor.redeploy(then=["int8", "cvat"])
    wanted = floor.state()
    for number in range(8):
        for is_after in (False, True):
            again = Floor(made, Records(f"sqlite:///{tmp_path / f'{number}{is_after}.sqlite'}"), Aliases())
            try:
                again.redeploy(then=["int8", "cvat"], records=Dies(again.records, number, is_after))
            except Killed:
                again.redeploy(then=["int8", "cvat"])
            else:
                assert number >= 6, "six entries are written"
            assert again.state() == wanted


def test_a_repeat_does_not_undo_what_a_person_deployed_since(floor: Floor) -> None:
    floor.redeploy()
    floor.records.add("deployments", "squares", "deep@1", "ann", {})
    floor.redeploy()
    assert floor.records.deployed("squares") == "deep@1"


def test_a_model_that_does_not_lead_any_more_is_not_deployed(floor: Floor) -> None:
    with pytest.raises(Conflict, match="deep@1 does not lead any more, deep@2 does"):
        floor.redeploy("deep@1")
    with pytest.raises(Invalid, match="never led"):
        floor.redeploy("other@1")
    assert floor.records.deployed("squares") == "deep@1" and floor.records.entries("redeployments") == []


def test_a_cancelled_job_leaves_what_was_deployed(floor: Floor) -> None:
    class Stopped(Quiet):
        def check(self) -> None:
            raise Cancelled("cancelled")

    with pytest.raises(Cancelled):
        floor.redeploy(job=Stopped(id="x"))
    assert floor.records.deployed("squares") == "deep@1"


@pytest.mark.parametrize("then", [[], ["int4"], "int8", ["deploy", 3]])
def test_what_cannot_follow_a_promotion_is_refused(floor: Floor, then: Any) -> None:
    with pytest.raises(Invalid, match="What follows a promotion is given as a list of deploy, int8, cvat"):
        floor.redeploy(then=then)


def roll_back(floor: Floor) -> None:
    facts = {"promoted": True, "rollback": True, "key": "back", "champion": {"model": "deep@2"}}
    floor.records.add("promotions", "squares", "deep@1", "ann", facts)


def test_a_rollback_brings_back_what_was_deployed_with_the_model_and_its_own_rollback_too(floor: Floor) -> None:
    floor.redeploy(then=["int8", "cvat"])
    roll_back(floor)
    done = floor.redeploy("deep@1", "back", back=True)
    assert floor.records.deployed("squares") == done.deployed == "deep@1" and len(done.stages) == 2
    assert floor.in_cvat() == {"deep@1": {"red": "rot"}}
    assert "CVAT is shown deep@1 again in place of deep@2-int8." in done.reason
    assert floor.redeploy("deep@1", "back", back=True) == done
    floor.records.add("promotions", "squares", "deep@2", "ann", {"promoted": True, "rollback": True, "key": "forth"})
    floor.redeploy("deep@2", "forth", back=True)
    assert floor.records.deployed("squares") == "deep@2-int8" and list(floor.in_cvat()) == ["deep@2-int8"]


def test_an_int8_version_that_lost_its_certificate_comes_back_in_fp32(floor: Floor, tmp_path: Path) -> None:
    floor.redeploy(then=["int8"])
    roll_back(floor)
    floor.redeploy("deep@1", "back", back=True)
    floor.records.add("promotions", "squares", "deep@2", "ann", {"promoted": True, "rollback": True, "key": "forth"})
    empty = Certificates(Records("sqlite://"), tmp_path / "key")
    done = floor.redeploy("deep@2", "forth", back=True, certificates=empty)
    assert done.deployed == floor.records.deployed("squares") == "deep@2"
    assert "deep@2-int8, which did before, cannot: deep@2-int8 is an INT8 model without a certificate" in done.reason


def test_what_was_never_deployed_leaves_what_annotates_as_it_is(made: Stores, tmp_path: Path) -> None:
    floor = Floor(made, Records(f"sqlite:///{tmp_path / 'n.sqlite'}"), Aliases())
    floor.records.add("promotions", "circles", "deep@3", "ann", {"promoted": True, "key": "c"})
    for ref in ("deep@1", "deep@3"):
        floor.records.add("promotions", "circles", ref, "ann", {"promoted": True, "rollback": True, "key": f"c{ref}"})
    parts = made.parts(records=floor.records, tracker=floor.tracker, job=Quiet(id="c"), scratch=tmp_path)
    done = redeploy("circles", "deep@3", back=True, **parts)
    assert done.deployed == "" and "what annotates stays as it is: no model" in done.reason


def test_a_function_of_another_name_stays_in_cvat(floor: Floor) -> None:
    other = floor.stores.models.card("deep@3")
    floor.stores.models.register(replace(other, name="other", version="1"), floor.stores.models.folder("deep@3"))
    deploy_to_cvat("other@1", models=floor.stores.models, records=floor.records, certificates=floor.stores.certificates,
                   open_backend=openvino, person="ann")
    floor.redeploy(then=["cvat"])
    assert set(floor.in_cvat()) == {"deep@2", "other@1"}
    assert Function("deep@2").name != Function("other@1").name


def test_a_promotion_asks_for_one_redeploy_job_however_often_it_is_repeated(tmp_path: Path,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.steps import promote as promoting

    @dataclass
    class Won:
        promoted: bool

        def to_json(self) -> dict[str, Any]:
            return {"promoted": self.promoted}

    wb = Workbench(Config(home=tmp_path, person="ann"))
    args = {"dataset": "squares", "candidate": "deep@2", "version": "squares@0.1.0", "then": ["int8", "cvat"]}
    check("promote", args)
    monkeypatch.setattr(promoting, "promote", lambda *_, **__: Won(True))
    results = [all_of(wb)["promote"](args, Quiet(id="p1")) for _ in range(2)]
    (job,) = wb.jobs.list(kind="redeploy")
    assert results[0] == results[1] == {"promoted": True, "redeploy": job.id}
    assert job.args == {"dataset": "squares", "model": "deep@2", "then": ["int8", "cvat"], "version": "squares@0.1.0"}
    monkeypatch.setattr(promoting, "promote", lambda *_, **__: Won(False))
    assert all_of(wb)["promote"](args, Quiet(id="p2")) == {"promoted": False}
    assert all_of(wb)["promote"]({**args, "then": None}, Quiet(id="p3")) == {"promoted": False}
    with pytest.raises(Invalid, match="What follows"):
        all_of(wb)["promote"]({**args, "then": ["fp16"]}, Quiet(id="p4"))
    assert len(wb.jobs.list(kind="redeploy")) == 1

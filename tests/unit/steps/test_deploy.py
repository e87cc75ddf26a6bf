"""Deployment: an append-only ledger says who annotates next, and what else could."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from workbench.adapters.local_models import LocalModels
from workbench.adapters.mlflow import MlflowTracker
from workbench.errors import Invalid, NotFound
from workbench.inference.graph import file_record
from workbench.model import InputSpec, ModelCard
from workbench.records import Records
from workbench.steps.deploy import champion_of, deploy, offers
from workbench.taxonomy import Taxonomy


class Shop:
    """A model store, a ledger and a tracker; `add` registers a model that nobody will run."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.models, self.records, self.tracker = LocalModels(folder / "models"), Records(f"sqlite:///{folder / 'r.sqlite'}"), MlflowTracker(url)

    def add(self, ref: str, *labels: str) -> str:
        made = self.folder / ref
        made.mkdir()
        (made / "model.onnx").write_bytes(ref.encode())
        name, _, version = ref.partition("@")
        self.models.register(ModelCard(name, version, InputSpec((64, 64)), {"name": "fcos"}, Taxonomy(labels),
                                       {"model.onnx": file_record(made / "model.onnx")}), made)
        return ref

    def deploy(self, model: str, dataset: str = "cells") -> Any:
        return deploy(dataset, model, models=self.models, records=self.records, tracker=self.tracker, person="ann")

    def offered(self, *labels: str, dataset: str = "cells") -> list[str]:
        return [offer.model for offer in offers(dataset, Taxonomy(labels), models=self.models, records=self.records)]


@pytest.fixture
def shop(tmp_path: Path, mlflow_url: str) -> Shop:
    return Shop(tmp_path, mlflow_url)


def test_a_deployment_is_entered_once_and_the_newest_counts(shop: Shop) -> None:
    one, two = shop.add("student@1", "red"), shop.add("student@2", "red")
    assert shop.deploy(one).to_json() == {"dataset": "cells", "model": one, "previous": None, "changed": True}
    assert shop.deploy(one).changed is False
    assert shop.deploy(two).previous == one
    assert shop.deploy(one).changed  # back to the older one
    entries = shop.records.entries("deployments", "cells")
    assert [entry.subject for entry in entries] == [one, two, one] and entries[0].person == "ann"
    assert entries[0].facts["sha256"] == shop.models.card(one).files["model.onnx"]["sha256"]
    assert shop.records.deployed("cells") == one and shop.records.deployed("signs") is None


def test_a_model_of_the_registry_gets_the_alias(shop: Shop) -> None:
    run_id = shop.tracker.start_run("deploys", "made", {})
    shop.tracker.log_files(run_id, Path(__file__), "model")
    version = shop.tracker.register("deploys-detector", run_id, "model", {}).version
    shop.deploy(shop.add(f"deploys-detector@{version}", "red"), "deploys")
    assert shop.tracker.by_alias("deploys-detector", "deployed").version == version


def test_a_model_that_is_not_there_or_damaged_is_not_deployed(shop: Shop) -> None:
    with pytest.raises(NotFound, match="student@1 is not registered"):
        shop.deploy("student@1")
    shop.add("student@1", "red")
    file = shop.models.folder("student@1") / "model.onnx"
    file.chmod(0o644)
    file.write_bytes(b"other")
    with pytest.raises(Invalid, match="sha256"):
        shop.deploy("student@1")
    with pytest.raises(Invalid, match="Data set name"):
        shop.deploy("student@1", "../cells")
    assert shop.records.entries("deployments") == []


def test_the_deployed_model_is_offered_first_then_the_champion_then_what_shares_labels(shop: Shop) -> None:
    for ref, labels in (("yolox@1", ("cup", "car")), ("student@2", ("red", "white")), ("student@10", ("red", "white")),
                        ("half@1", ("red", "car")), ("champion@3", ("red",)), ("odd@1", ("car",))):
        shop.add(ref, *labels)
    assert shop.offered("red", "white") == ["student@10", "student@2", "champion@3", "half@1"]
    for number, (model, promoted) in enumerate((("student@2", True), ("champion@3", True), ("student@10", False))):
        shop.records.add("promotions", "cells", model, "ann", {"promoted": promoted}, key=str(number))
    assert champion_of("cells", shop.records) == "champion@3" and champion_of("signs", shop.records) is None
    shop.deploy("odd@1")
    assert shop.offered("red", "white") == ["odd@1", "champion@3", "student@10", "student@2", "half@1"]


def test_who_was_champion_on_a_date_is_a_question_to_the_ledger(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    for at, model, facts in (("2026-03-01T08:00:00.000+00:00", "m@1", {"promoted": True}),
                             ("2026-03-02T09:00:00.000+00:00", "m@2", {"promoted": True}),
                             ("2026-03-02T10:00:00.000+00:00", "m@3", {"promoted": False}),
                             ("2026-03-03T23:59:59.999+00:00", "m@1", {"promoted": True, "rollback": True})):
        monkeypatch.setattr("workbench.records.now", lambda at=at: at)
        shop.records.add("promotions", "cells", model, "ann", facts)
    for at, model in (("2026-02-28", None), ("2026-03-01T07:59", None), ("2026-03-01T08:00", "m@1"), ("2026-03-01", "m@1"),
                      ("2026-03-02T10:59+02:00", "m@1"), ("2026-03-02T11:00+02:00", "m@2"), ("2026-03-02", "m@2"),
                      ("2026-03-03T23:00", "m@2"), ("2026-03-03", "m@1"), ("9999-12-31", "m@1"), ("0001-01-01", None),
                      (None, "m@1")):
        assert champion_of("cells", shop.records, at) == model, at
    assert champion_of("signs", shop.records, "2026-03-03") is None


@pytest.mark.parametrize("at", ["yesterday", "2026-02-30", "2026-13-01", "1.3.2026", "2026-03-01T25:00", "-1", "\u0662\u0660\u0662\u0666-03-01T"])
def test_what_is_no_date_is_refused_with_how_to_write_one(shop: Shop, at: str) -> None:
    with pytest.raises(Invalid, match="is no date. Write a day as 2026-05-01"):
        champion_of("cells", shop.records, at)


def test_an_offer_shows_how_its_labels_map(shop: Shop) -> None:
    shop.add("half@1", "red", "car")
    offer, = offers("cells", Taxonomy(("red", "white")), models=shop.models, records=shop.records)
    assert offer.labels.pairs == {"red": "red"} and offer.labels.unmatched == ("car",) and offer.labels.unreached == ("white",)
    assert not offer.is_deployed and not offer.is_champion

"""Deploy: a model becomes the annotator that the next annotate job of a data set offers first."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from workbench.dataset import check_dataset_name
from workbench.model import parse_model_ref
from workbench.ports import ModelStore, Tracker
from workbench.records import Records
from workbench.taxonomy import LabelMap, Taxonomy


@dataclass(frozen=True)
class Deployment:
    """model annotates next; previous did before, None when none did; changed: False when it was deployed already."""

    dataset: str
    model: str
    previous: str | None
    changed: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Offer:
    """A model that could annotate a data set. labels: how its labels map onto the taxonomy, for a person to look at."""

    model: str
    is_deployed: bool
    is_champion: bool
    labels: LabelMap
    metrics: dict[str, Any]


def deploy(dataset: str, model: str, *, models: ModelStore, records: Records, tracker: Tracker,
           person: str) -> Deployment:
    """Enters the deployment into the ledger and sets the alias `deployed` where the tracker knows the model.

    Deploying what is deployed changes nothing. An older model is deployed again the same way: the newest entry counts.
    Raises NotFound when the store has no such model, Invalid when its files are damaged.
    """
    check_dataset_name(dataset)
    models.folder(model)  # verified: a damaged model must not become the annotator
    card = models.card(model)
    previous = records.deployed(dataset)
    name, version = parse_model_ref(model)
    if any(registered.version == version for registered in tracker.versions(name)):
        tracker.set_alias(name, "deployed", version)
    if previous == model:
        return Deployment(dataset, model, previous, changed=False)
    records.add("deployments", dataset, model, person, {
        "previous": previous, "sha256": card.files[card.onnx]["sha256"], "labels": list(card.labels.labels),
        "decoder": card.decoder, "trained_on": card.trained_on})
    return Deployment(dataset, model, previous, changed=True)


def offers(dataset: str, taxonomy: Taxonomy, *, models: ModelStore, records: Records) -> list[Offer]:
    """Models that can annotate a data set: the deployed one, the champion, then all that share a label with it, those
    that share most and are newest first. The deployed one and the champion stand here even when they share none."""
    deployed, champion = records.deployed(dataset), champion_of(dataset, records)
    found = []
    for ref in models.refs():
        card = models.card(ref)
        labels = card.labels.map_to(taxonomy)
        if labels.pairs or ref in (deployed, champion):
            found.append(Offer(ref, ref == deployed, ref == champion, labels, card.metrics))
    return sorted(found, key=lambda offer: (not offer.is_deployed, not offer.is_champion, len(offer.labels.unreached),
                                            *_newest_first(offer.model)))


def champion_of(dataset: str, records: Records) -> str | None:
    """The model that won the last promotion of a data set, by our own ledger."""
    for entry in records.entries("promotions", dataset):
        if entry.facts.get("promoted"):
            return entry.subject
    return None


def _newest_first(ref: str) -> tuple[str, tuple[int, ...]]:
    name, version = parse_model_ref(ref)
    return name, tuple(-int(part) if part.isdigit() else 0 for part in version.split("."))

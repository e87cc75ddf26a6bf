"""Deploy: a model becomes the annotator that the next annotate job of a data set offers first."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

from workbench.dataset import check_dataset_name
from workbench.errors import Invalid
from workbench.model import parse_model_ref
from workbench.ports import ModelStore, Tracker
from workbench.records import Entry, Records
from workbench.taxonomy import LabelMap, Taxonomy

# A date may lie any number of decisions back.
ALL = 1_000_000


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


def champion_of(dataset: str, records: Records, at: str | None = None) -> str | None:
    """The champion of a data set by our own ledger, None when there was none.

    at  the end of that day ("2026-05-01") or that moment ("2026-05-01T12:00", "...+02:00"), UTC unless it says
        otherwise; None: now. Raises Invalid for anything else.
    """
    for entry in champions(dataset, records, at):
        return entry.subject
    return None


def champions(dataset: str, records: Records, at: str | None = None) -> list[Entry]:
    """Entries of the ledger "promotions" that changed who leads, promotions and rollbacks, newest first; those up to
    `at`, as `champion_of` takes it."""
    until = _moment(at) if at else None
    return [entry for entry in records.entries("promotions", dataset, limit=ALL)
            if entry.facts.get("promoted") and (until is None or _moment(entry.at) <= until)]


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
        if len(text) <= len("2026-05-01"):
            moment = moment.replace(hour=23, minute=59, second=59, microsecond=999_999)
    except (TypeError, ValueError):
        raise Invalid(f"{text!r} is no date. Write a day as 2026-05-01 or a moment as 2026-05-01T12:00.") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def _newest_first(ref: str) -> tuple[str, tuple[int, ...]]:
    name, version = parse_model_ref(ref)
    return name, tuple(-int(part) if part.isdigit() else 0 for part in version.split("."))

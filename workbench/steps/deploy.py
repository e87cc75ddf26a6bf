"""Deploy: a model becomes the annotator that the next annotate job of a data set offers first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

from workbench.dataset import check_dataset_name
from workbench.errors import Invalid
from workbench.model import ModelCard, parse_model_ref
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
           person: str, key: str | None = None) -> Deployment:
    """Enters the deployment into the ledger and sets the alias `deployed` where the tracker knows the model, or the one
    that an INT8 version was made from.

    key  of the ledger's entry: with one that is there already nothing changes

    Deploying what is deployed changes nothing. An older model is deployed again the same way: the newest entry counts.
    Raises NotFound when the store has no such model, Invalid when its files are damaged.
    """
    check_dataset_name(dataset)
    models.folder(model)  # verified: a damaged model must not become the annotator
    card = models.card(model)
    previous = records.deployed(dataset)
    if key is not None and any(entry.facts.get("key") == key for entry in records.entries("deployments", dataset)):
        return Deployment(dataset, model, previous, changed=False)
    name, version = parse_model_ref(origin(card))
    if any(registered.version == version for registered in tracker.versions(name)):
        tracker.set_alias(name, "deployed", version)
    if previous == model:
        return Deployment(dataset, model, previous, changed=False)
    records.add("deployments", dataset, model, person, {
        "previous": previous, "sha256": card.files[card.onnx]["sha256"], "labels": list(card.labels.labels),
        "decoder": card.decoder, "trained_on": card.trained_on, **({"key": key} if key else {})}, key=key)
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


def origin(card: ModelCard) -> str:
    """The FP32 version that an INT8 one was made from; of every other model its own reference."""
    return card.quantization.get("from") or card.ref


def is_served_by(champion: str | None, deployed: str | None) -> bool:
    """Whether what is deployed is the champion, in FP32 or INT8 (steps/quantize names that `<version>-int8`)."""
    return champion is not None and deployed in (champion, f"{champion}-int8")


def champion_of(dataset: str, records: Records, at: str | None = None, name: str | None = None) -> str | None:
    """The champion of a data set by our own ledger, None when there was none.

    at    the end of that day ("2026-05-01") or that moment ("2026-05-01T12:00", "...+02:00"), UTC unless it says
          otherwise; None: now. Raises Invalid for anything else.
    name  the registered model, as `champions` takes it
    """
    for entry in champions(dataset, records, at, name):
        return entry.subject
    return None


def champions(dataset: str, records: Records, at: str | None = None, name: str | None = None) -> list[Entry]:
    """Entries of the ledger "promotions" that changed who leads, promotions and rollbacks, newest first; those up to
    `at`, as `champion_of` takes it.

    name  the registered model whose champions they are: each name has its own, whatever data sets it was promoted on.
          None: `<data set>-detector`, or the name that was promoted last where that never had one
    """
    until = _moment(at) if at else None
    entries = [entry for entry in records.entries("promotions", limit=ALL) if entry.facts.get("promoted")]
    if name is None:
        own = names_led(dataset, entries)
        name = own[0] if own else f"{dataset}-detector"
    return [entry for entry in entries if entry.subject.partition("@")[0] == name
            and (until is None or _moment(entry.at) <= until)]


def names_led(dataset: str, entries: Sequence[Entry]) -> list[str]:
    """Names under which a data set has or had a champion, `<data set>-detector` first, then by the latest change.

    entries  of the ledger "promotions", newest first
    """
    names = dict.fromkeys(entry.subject.partition("@")[0] for entry in entries
                          if entry.dataset == dataset and entry.facts.get("promoted"))
    return sorted(names, key=lambda name: name != f"{dataset}-detector")


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

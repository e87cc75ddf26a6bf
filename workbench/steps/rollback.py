"""Rollback: the champion before the present one leads again, without a training or a measurement."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from workbench.dataset import check_dataset_name
from workbench.errors import Conflict, Invalid, NotFound
from workbench.model import parse_model_ref
from workbench.ports import Job, ModelStore, Tracker
from workbench.records import Entry, Records
from workbench.steps.deploy import ALL, champions
from workbench.steps.promote import changed_since, lead


@dataclass(frozen=True)
class Rollback:
    """Who leads again.

    challenger  what the ledger knows of the model that leads again: {"model", scores of when it won, "sha256", ...}
    champion    {"model"} of the one that it replaces
    promoted, rollback  always true: the entry changes who leads, and is no promotion
    """

    dataset: str
    reason: str
    challenger: dict[str, Any]
    champion: dict[str, Any]
    promoted: bool = True
    rollback: bool = True

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def earlier(dataset: str, records: Records, name: str | None = None) -> Entry | None:
    """The ledger's entry that made the champion before the present one champion, None when there is none. After a
    rollback that is the model rolled back from: a rollback can be rolled back.

    name  the registered model, as `champions` takes it
    """
    return _earlier(champions(dataset, records, name=name))


def rollback(dataset: str, *, to: str | None = None, name: str | None = None, models: ModelStore, tracker: Tracker,
             records: Records, job: Job, person: str) -> Rollback:
    """Makes the champion before the present one champion again and the present one `previous`.

    One entry of the ledger "promotions"; the same job again returns it and adds nothing. What is deployed stays so;
    steps/redeploy brings back what was.

    to    the model that the person expects to lead again
    name  the registered model that gets its champion back: default that of `to`, else as `champions` says

    Raises Conflict when that would be another by now; Invalid when there is no earlier champion, or it cannot lead: its
    files are gone, damaged or others than those that won, or the tracker does not know it.
    """
    key = f"rollback:{job.id}"
    name = name or (parse_model_ref(to)[0] if to else None)
    done = _recorded(check_dataset_name(dataset), key, records)
    if done is None:
        entries = champions(dataset, records, name=name)
        before = _earlier(entries)
        if before is None:
            raise Invalid(f"{dataset} has no champion before the present one, so there is nothing to go back to. "
                          "Promotions are listed on the page Retrain and promote.")
        if to is not None and before.subject != to:
            raise Conflict(f"The champion before the present one is {before.subject} by now, not {to}. Look again, "
                           "then roll back to that.")
        _check_usable(before, models, tracker)
        present = entries[0].subject
        done = Rollback(dataset, f"{before.subject} is champion again in place of {present}, rolled back by {person}; "
                        "nothing was measured.",
                        {**(before.facts.get("challenger") or {}), "model": before.subject}, {"model": present})
        # First the ledger, then the aliases, as in a promotion.
        facts = {**done.to_json(), "job": job.id, "key": key}
        if not records.add("promotions", dataset, before.subject, person, facts, key=key,
                           unless=changed_since(entries, parse_model_ref(before.subject)[0])):
            done = _recorded(dataset, key, records)
            if done is None:
                raise Conflict(f"Another model became champion of {dataset} meanwhile, in place of {present}. Look "
                               "again, then roll back from that.")
    lead(dataset, key, done.challenger["model"], done.champion["model"], tracker, records)
    job.log(done.reason)
    return done


def _earlier(entries: list[Entry]) -> Entry | None:
    return next((one for one in entries if one.subject != entries[0].subject), None)


def _recorded(dataset: str, key: str, records: Records) -> Rollback | None:
    for entry in records.entries("promotions", dataset, limit=ALL):
        if entry.facts.get("key") == key:
            return Rollback(**{field.name: entry.facts[field.name] for field in fields(Rollback)})
    return None


def _check_usable(before: Entry, models: ModelStore, tracker: Tracker) -> None:
    ref = before.subject
    instead = "Promote another model instead."
    try:
        card = models.card(ref)
        models.folder(ref)  # verified: a damaged model must not lead
    except (Invalid, NotFound) as error:
        raise Invalid(f"{ref} cannot be champion again: {error} Or promote another model instead.") from error
    won = (before.facts.get("challenger") or {}).get("sha256")
    given = card.files[card.onnx]["sha256"]
    if won not in (None, given):
        raise Invalid(f"{ref} cannot be champion again: its file is another (sha256 {given[:12]}...) than the one that "
                      f"won ({won[:12]}...). {instead}")
    name, version = parse_model_ref(ref)
    if version not in {one.version for one in tracker.versions(name)}:
        raise Invalid(f"{ref} cannot be champion again: it is no registered version of {name}. {instead}")

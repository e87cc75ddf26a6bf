"""Rollback: the champion before the present one leads again, without a training or a measurement."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from workbench.dataset import check_dataset_name
from workbench.errors import Conflict, Invalid, NotFound
from workbench.model import parse_model_ref
from workbench.ports import Job, ModelStore, Tracker
from workbench.records import Entry, Records
from workbench.steps.deploy import champions
from workbench.steps.promote import lead
from workbench.steps.retrain import model_name


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


def earlier(dataset: str, records: Records) -> Entry | None:
    """The ledger's entry that made the champion before the present one champion, None when there is none. After a
    rollback that is the model rolled back from: a rollback can be rolled back."""
    return _earlier(champions(dataset, records))


def rollback(dataset: str, *, to: str | None = None, models: ModelStore, tracker: Tracker, records: Records, job: Job,
             person: str) -> Rollback:
    """Makes the champion before the present one champion again and the present one `previous`.

    One entry of the ledger "promotions"; the same job again returns it and adds nothing. What is deployed stays so.

    to  the model that the person expects to lead again

    Raises Conflict when that would be another by now; Invalid when there is no earlier champion, or it cannot lead: its
    files are gone, damaged or others than those that won, or the tracker does not know it.
    """
    name, key = model_name(check_dataset_name(dataset)), f"rollback:{job.id}"
    done = _recorded(dataset, key, records)
    if done is None:
        entries = champions(dataset, records)
        before = _earlier(entries)
        if before is None:
            raise Invalid(f"{dataset} has no champion before the present one, so there is nothing to go back to. "
                          "Promotions are listed on the page Retrain and promote.")
        if to is not None and before.subject != to:
            raise Conflict(f"The champion before the present one is {before.subject} by now, not {to}. Look again, "
                           "then roll back to that.")
        _check_usable(before, name, models, tracker)
        present = entries[0].subject
        done = Rollback(dataset, f"{before.subject} is champion again in place of {present}, rolled back by {person}; "
                        "nothing was measured.",
                        {**(before.facts.get("challenger") or {}), "model": before.subject}, {"model": present})
        # First the ledger, then the aliases, as in a promotion.
        facts = {**done.to_json(), "job": job.id, "key": key}
        records.add("promotions", dataset, before.subject, person, facts, key=key)
    lead(dataset, key, done.challenger["model"], done.champion["model"], tracker, records)
    job.log(done.reason)
    return done


def _earlier(entries: list[Entry]) -> Entry | None:
    return next((one for one in entries if one.subject != entries[0].subject), None)


def _recorded(dataset: str, key: str, records: Records) -> Rollback | None:
    for entry in champions(dataset, records):
        if entry.facts.get("key") == key:
            return Rollback(**{field.name: entry.facts[field.name] for field in fields(Rollback)})
    return None


def _check_usable(before: Entry, name: str, models: ModelStore, tracker: Tracker) -> None:
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
    model, version = parse_model_ref(ref)
    if model != name or version not in {one.version for one in tracker.versions(name)}:
        raise Invalid(f"{ref} cannot be champion again: it is no registered version of {name}. {instead}")

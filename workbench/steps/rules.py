"""Rules: what starts a retraining of a data set by itself. A schedule, work accepted in CVAT, a drift alarm.

A rule is an entry of the ledger "retrain_rules"; the last one of a kind counts. `look` is asked every few seconds, by
any number of processes: what it decides is first an entry of the ledger "retrain_events" under a key of its own, then a
job under that key with the arguments from the entry. So each slot, version and alarm is decided once, whoever is killed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from typing import Any

from workbench.dataset import check_dataset_name, diff
from workbench.errors import Invalid, NotFound
from workbench.ports import DatasetStore, ModelStore
from workbench.records import Entry, Records
from workbench.steps.deploy import ALL
from workbench.steps.drift import LEAST_FRAMES, THRESHOLD, check_settings, last_runs, standing_alarm
from workbench.steps.retrain import model_name

RULES, EVENTS = "retrain_rules", "retrain_events"
KINDS = {"schedule": "on a schedule", "accepted": "when work accepted in CVAT is published",
         "drift": "when the deployed model drifts"}
# Without croniter's R and H, which mean another moment each time they are read.
CRON = re.compile(r"[0-9*,/-]+( [0-9*,/-]+){2}( ([0-9*,/-]|[A-Za-z]{3})+){2}")
LEAST_H, MOST_H = 1 / 60, 24 * 366
RETRAIN, DRIFT = "retrain", "drift"

# (kind of job, arguments, person, idempotency key) -> its id; and whether there is a job for (kind, key).
Submit = Callable[[str, dict[str, Any], str, str], str]
Find = Callable[[str, str], bool]


@dataclass(frozen=True)
class Rule:
    """When a data set is trained anew, and with what.

    training      arguments of a retrain job without `version` (steps/request makes them); the latest version is used
    every_h       hours between two slots of a schedule, counted from when the rule was set; or
    cron          five fields, in UTC
    retrain       of a drift rule: an alarm starts a training as soon as there is something new to learn; else it only
                  tells. threshold, least_frames: of the alarm
    id, person, at  of the ledger's entry
    """

    dataset: str
    kind: str
    is_on: bool = True
    training: dict[str, Any] = field(default_factory=dict)
    every_h: float | None = None
    cron: str | None = None
    retrain: bool = True
    threshold: float = THRESHOLD
    least_frames: int = LEAST_FRAMES
    id: int = 0
    person: str = ""
    at: str = ""

    def __post_init__(self) -> None:
        check_dataset_name(self.dataset)
        if self.kind not in KINDS:
            raise Invalid(f"A rule is one of {', '.join(KINDS)}, got {self.kind!r}.")
        if self.kind != "schedule" and (self.every_h, self.cron) != (None, None):
            raise Invalid("Only a schedule has hours or a cron expression.")
        if self.kind == "schedule" and self.is_on:
            _check_schedule(self.every_h, self.cron)
        check_settings(self.threshold, self.least_frames)

    def facts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (
            "is_on", "training", "every_h", "cron", "retrain", "threshold", "least_frames")}

    def in_words(self) -> str:
        """When it starts a training, in a few words."""
        if self.kind != "schedule":
            return KINDS[self.kind]
        if self.cron:
            return f"at {self.cron} (UTC)"
        if self.every_h % 24:
            return f"every {self.every_h:g} h"
        return "every day" if self.every_h == 24 else f"every {self.every_h / 24:g} days"


def set_rule(rule: Rule, *, records: Records, person: str) -> Rule:
    """Makes it the rule of its data set and kind; a schedule counts its slots from now."""
    records.add(RULES, rule.dataset, rule.kind, person, rule.facts())
    return rules(rule.dataset, records=records)[rule.kind]


def switch_off(dataset: str, kind: str, *, records: Records, person: str) -> None:
    """Raises NotFound when there is no such rule."""
    rule = rules(dataset, records=records).get(kind)
    if rule is None:
        raise NotFound(f"{dataset} has no rule {kind!r}; `workbench rules list {dataset}` shows those there are.")
    if rule.is_on:
        set_rule(replace(rule, is_on=False), records=records, person=person)


def rules(dataset: str, *, records: Records) -> dict[str, Rule]:
    """kind -> the rule that counts, those that are off too."""
    found: dict[str, Rule] = {}
    for entry in records.entries(RULES, dataset, limit=ALL):
        if entry.subject not in found:
            found[entry.subject] = Rule(dataset, entry.subject, **entry.facts, id=entry.id, person=entry.person,
                                        at=entry.at)
    return found


def slot(rule: Rule, now: datetime) -> datetime | None:
    """The newest moment of a schedule up to `now` and after the rule was set; those missed before it do not count."""
    since = datetime.fromisoformat(rule.at)
    if rule.every_h is not None:
        every = timedelta(hours=rule.every_h)
        passed = math.floor((now - since) / every)
        return since + passed * every if passed >= 1 else None
    # get_prev gives moments before the one it is given.
    last = _croniter(rule.cron, now + timedelta(microseconds=1)).get_prev(datetime)
    return last if last > since else None


def next_slot(rule: Rule, now: datetime) -> datetime:
    """When a schedule fires next."""
    if rule.every_h is not None:
        since, every = datetime.fromisoformat(rule.at), timedelta(hours=rule.every_h)
        return since + (math.floor((now - since) / every) + 1) * every
    return _croniter(rule.cron, now).get_next(datetime)


def look(dataset: str, *, store: DatasetStore, models: ModelStore, records: Records, submit: Submit, find: Find,
         waiting: Callable[[], list[dict[str, Any]]], now: datetime | None = None) -> list[Entry]:
    """Starts what is due; returns the events that were decided now.

    find     whether there is a job for (kind, key)
    waiting  arguments of the retrain jobs that are queued or running

    A training that would learn nothing new is an event that says so, and no job. A drift alarm waits until a version
    with something new is published. Raises nothing for one rule that fails: the others are looked at first.
    """
    now, decided, failure = now or datetime.now(timezone.utc), [], None
    for rule in rules(dataset, records=records).values():
        try:
            entry = _look_at(rule, store, models, records, submit, find, waiting, now)
        except (Invalid, NotFound) as error:
            failure = error
            continue
        if entry is not None:
            decided.append(entry)
    if failure is not None and not decided:
        raise failure
    return decided


def nothing_new(training: Mapping[str, Any], latest: str, *, store: DatasetStore, models: ModelStore,
                waiting: list[dict[str, Any]]) -> str:
    """Why a training on the latest version would learn nothing new, "" when it would.

    What there was to learn are the labelled frames of the train and val splits. Compared is with the newest version
    that a model of the same name was trained on, or is being trained on.
    """
    dataset = latest.partition("@")[0]
    name = training.get("register_as") or model_name(dataset)
    if any(one.get("version") == latest and (one.get("register_as") or model_name(dataset)) == name for one in waiting):
        return f"{latest} is being trained on already."
    cards = [models.card(ref) for ref in models.refs() if ref.partition("@")[0] == name]
    known = {card.trained_on.get("ref", ""): card.ref for card in cards}
    known = {ref: model for ref, model in known.items() if ref.partition("@")[0] == dataset}
    if latest in known:
        return f"Nothing new since the last training: {known[latest]} was trained on {latest}, the latest version."
    for version in store.versions(dataset):
        if version.ref in known:
            old, new = (_lessons(store, ref) for ref in (version.ref, latest))
            changes = diff(old, new)
            if old.taxonomy == new.taxonomy and not (changes.frames_added or changes.frames_removed
                                                     or changes.frames_relabeled):
                return (f"Nothing new since the last training: {latest} has the same labelled frames to learn from as "
                        f"{version.ref}, which {known[version.ref]} was trained on.")
            return ""
    return ""


def events(dataset: str, *, records: Records, kind: str | None = None, limit: int = 20) -> list[Entry]:
    """What rules decided, newest first."""
    return records.entries(EVENTS, dataset, subject=kind, limit=limit)


def _look_at(rule: Rule, store: DatasetStore, models: ModelStore, records: Records, submit: Submit, find: Find,
             waiting: Callable[[], list[dict[str, Any]]], now: datetime) -> Entry | None:
    last = next(iter(events(rule.dataset, records=records, kind=rule.kind, limit=1)), None)
    if last is not None:
        _start(last, submit, find)  # decided by a process that was killed before it could
    if not rule.is_on:
        return None
    if rule.kind == "drift":
        _ask_for_a_look(rule, records, submit, find)
    cause = _cause(rule, store, records, now)
    if cause is None:
        return None
    mark, why = cause
    versions = store.versions(rule.dataset)
    latest = versions[0].ref if versions else ""
    key = f"{rule.kind}:{rule.dataset}:{rule.id if rule.kind == 'schedule' else 0}:{mark}"
    if rule.kind == "drift":
        # Asked anew with each version until one has something to learn.
        before = events(rule.dataset, records=records, kind=rule.kind, limit=ALL)
        if any(one.facts["args"] and one.facts["key"].startswith(f"{key}:") for one in before):
            return None
        key = f"{key}:{latest}"
    if last is not None and last.facts["key"] == key:
        return None
    old = nothing_new(rule.training, latest, store=store, models=models, waiting=waiting()) if latest else (
        f"Data set {rule.dataset} has no version yet.")
    args = None if old else {**rule.training, "dataset": rule.dataset, "version": latest}
    told = f"{why}: {old or f'a training on {latest} starts.'}"
    if not records.add(EVENTS, rule.dataset, rule.kind, rule.person, {"key": key, "args": args, "told": told}, key=key):
        return None  # another process was first
    made = next(one for one in events(rule.dataset, records=records, kind=rule.kind) if one.facts["key"] == key)
    _start(made, submit, find)
    return made


def _cause(rule: Rule, store: DatasetStore, records: Records, now: datetime) -> tuple[str, str] | None:
    """(what happened, as a mark that is its own; in words) when something calls for a training."""
    if rule.kind == "schedule":
        due = slot(rule, now)
        return due and (due.isoformat(timespec="seconds"), f"Scheduled for {due:%Y-%m-%d %H:%M} UTC")
    if rule.kind == "accepted":
        for entry in records.entries("pulls", rule.dataset, limit=1):
            ref = entry.facts.get("published") or f"{rule.dataset}@{entry.facts.get('next')}"
            # At one and the same millisecond the rule was there first: people do not set rules for what they just did.
            if entry.at >= rule.at and entry.facts.get("jobs") and any(
                    one.ref == ref for one in store.versions(rule.dataset)):
                return ref, f"Work accepted in CVAT was published as {ref}"
        return None
    alarm = standing_alarm(rule.dataset, records)
    return (f"{alarm.model}:{alarm.since}", f"Drift alarm of {alarm.model}") if alarm and rule.retrain else None


def _ask_for_a_look(rule: Rule, records: Records, submit: Submit, find: Find) -> None:
    """A drift job for the newest annotate run of the deployed model, once for each."""
    model = records.deployed(rule.dataset)
    runs = last_runs(rule.dataset, model, records) if model else []
    if runs:
        key = f"{rule.dataset}:{runs[0]}:{rule.id}"
        if not find(DRIFT, key):
            submit(DRIFT, {"dataset": rule.dataset, "threshold": rule.threshold, "least_frames": rule.least_frames},
                   rule.person, key)


def _start(event: Entry, submit: Submit, find: Find) -> None:
    if event.facts["args"] and not find(RETRAIN, event.facts["key"]):
        submit(RETRAIN, event.facts["args"], event.person, event.facts["key"])


def _lessons(store: DatasetStore, ref: str) -> Any:
    """What of a version is learned from."""
    manifest = store.manifest(ref)
    return replace(manifest, frames=tuple(one for split in ("train", "val") for one in manifest.split(split)))


def _check_schedule(every_h: float | None, cron: str | None) -> None:
    if (every_h is None) == (cron is None):
        raise Invalid("A schedule is given either as hours between two trainings or as a cron expression.")
    if every_h is not None and (isinstance(every_h, bool) or not isinstance(every_h, (int, float))
                                or not LEAST_H <= every_h <= MOST_H):
        raise Invalid(f"The hours of a schedule must be a number from {LEAST_H:.2g} to {MOST_H}, got {every_h!r}.")
    if cron is None:
        return
    example = "Five fields are minute, hour, day, month and weekday: 0 3 * * 1 is Mondays at 3:00 UTC."
    if not isinstance(cron, str) or len(cron) > 100 or not CRON.fullmatch(cron):
        raise Invalid(f"{cron!r} is no cron expression. {example}")
    try:
        _croniter(cron, datetime.now(timezone.utc)).get_next(datetime)
    except ValueError as error:  # croniter's own errors are ValueErrors
        raise Invalid(f"{cron!r} is no cron expression that ever comes true ({error}). {example}") from error


def _croniter(cron: str | None, at: datetime) -> Any:
    from croniter import croniter
    return croniter(cron, at)

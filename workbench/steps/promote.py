"""Promote: champion and challenger are measured now, by the same code on the same frames; the better one leads."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from workbench.blobs import Blobs
from workbench.dataset import LabeledFrame, Manifest, check_dataset_name, parse_ref
from workbench.errors import Invalid, NotFound
from workbench.evaluation.paired import RESAMPLES, drawn, interval
from workbench.evaluation.primary import PRIMARY, counts, default_metric, figure
from workbench.evaluation.regions import with_outlines
from workbench.inference.detector import OpenBackend
from workbench.model import ModelCard, parse_model_ref
from workbench.ports import DatasetStore, Job, ModelStore, Tracker
from workbench.records import Entry, Records
from workbench.steps.deploy import ALL, champions
from workbench.steps.evaluate import Evaluation, evaluate
from workbench.steps.retrain import name_for

# Two trainings that differ in their seed alone differ by about this much mAP@[.5:.95]; less is no progress.
MARGIN = 0.005
# A challenger that is better on every one of n frames is so by chance with probability 2^-n (sign test); 6 is the first
# n where that is below the 2.5 % that the interval leaves at its lower end.
LEAST_FRAMES = 6
SEED = 0


@dataclass(frozen=True)
class Decision:
    """Who leads from now on and why.

    challenger, champion  {"model", metric: score of all that the model has, "per_class": {label: its part in the primary
                          metric, of map_50 too the AP@[.5:.95]}, "sha256", "trained_on"}, scores None where a refusal
                          came first; champion is the one that led before, None when there was none
    promoted              the challenger leads now
    reason                one sentence for a person
    difference, interval  challenger - champion of the primary metric, and [low, high], its 95 % interval over `draws`
                          draws of the frames from `seed` (paired bootstrap); None without two scores
    dataset_digest        of the version; split_digest: of the names and pixels of the split's frames (`digest_of`)
    """

    dataset: str
    version: str
    split: str
    promoted: bool
    reason: str
    primary: str
    margin: float
    challenger: dict[str, Any]
    champion: dict[str, Any] | None
    dataset_digest: str
    frames: int
    leaked: int = 0
    # What follows came later: entries of before lack it.
    difference: float | None = None
    interval: list[float] | None = None
    draws: int = RESAMPLES
    seed: int = SEED
    lower_is_better: bool = False
    split_digest: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def promote(
    dataset: str, candidate: str, version: str, *, split: str = "test", margin: float = MARGIN,
    primary: str | None = None, lower_is_better: bool | None = None, max_class_drop: float | None = None,
    models: ModelStore, store: DatasetStore, blobs: Blobs, tracker: Tracker, records: Records,
    open_backend: OpenBackend, job: Job, person: str,
) -> Decision:
    """Scores candidate and champion on a split of a version and gives the alias `champion` to the better one.

    The champion is that of the candidate's registered name: `<data set>-detector`, or the name its training was given.

    The candidate has to be better by more than `margin`, and surely so: the 95 % interval of the difference lies above
    0. The champion of before gets the alias `previous`. The decision with both scores is one entry of the ledger
    "promotions"; the same job again returns it and adds nothing.

    version          reference of the data set version whose split both are scored on
    primary          one of PRIMARY; None: the primary metric that the candidate's training was asked for, else the one
                     of its task (evaluation.primary.default_metric)
    lower_is_better  the direction of `primary`, for those who say it; True contradicts every metric there is
    max_class_drop   no label's part in the metric may fall by more than this; None: labels may be traded against each other

    A refusal (test frames that one of them was trained on, a score that is no number, a training that was asked for a
    metric which only its recipe knows) is a Decision too. Raises Invalid for a metric that does not exist or the wrong
    direction, when the split is empty or the candidate is not one of the data set's registered models, NotFound.
    """
    name = parse_model_ref(candidate)[0]
    _check(check_dataset_name(dataset), version, split, primary, lower_is_better, margin, max_class_drop)
    key = f"promote:{job.id}"
    decision = _recorded(records, dataset, key)
    # Again when another model became champion while these were measured: it is measured against that one then.
    while decision is None:
        registered = {one.version: one for one in tracker.versions(name)}
        if parse_model_ref(candidate)[1] not in registered:
            raise Invalid(f"{candidate} is not a registered version of {name}; there are "
                          f"{', '.join(list(registered)[:20]) or 'none'}. Retrain on {dataset} to get one.")
        name_for(dataset, name, store, models)
        led = champions(dataset, records, name=name)[:1]
        # The alias follows the ledger a moment later, or once a promotion that was killed is repeated.
        alias = None if led else tracker.by_alias(name, "champion")
        champion = led[0].subject if led else f"{name}@{alias.version}" if alias else None
        refusal = ""
        if primary is None:
            primary, refusal = _asked_metric(models.card(candidate), tracker, job)
        decision = _decide(dataset, candidate, champion, version, split, margin, primary, refusal, max_class_drop,
                           models, store, blobs, tracker, open_backend, job)
        # First the ledger, then the aliases: a kill between the two is mended by the repeat, which finds the entry.
        facts = {**decision.to_json(), "job": job.id, "key": key}
        if not records.add("promotions", dataset, candidate, person, facts, key=key,
                           unless=changed_since(led, name) if decision.promoted else None):
            job.log("Another model became champion meanwhile, or this was decided elsewhere; looking again.")
            decision = _recorded(records, dataset, key)
    _tell_run(decision, tracker, models)
    if decision.promoted:
        before = decision.champion["model"] if decision.champion else None
        lead(dataset, key, decision.challenger["model"], before, tracker, records)
    job.log(decision.reason)
    return decision


def _recorded(records: Records, dataset: str, key: str) -> Decision | None:
    for entry in records.entries("promotions", dataset, limit=ALL):
        if entry.facts.get("key") == key:
            return Decision(**{field.name: entry.facts[field.name] for field in fields(Decision)
                               if field.name in entry.facts})
    return None


def _asked_metric(card: ModelCard, tracker: Tracker, job: Job) -> tuple[str | None, str]:
    """(the metric that the training was asked for by `primary_metric`, None for none; why it cannot decide, or "").

    A recipe's own numbers decide nothing: only what we measure of both models on the same frames does.
    """
    try:
        tags = tracker.run(card.run_id)["tags"] if card.run_id else {}
    except NotFound as error:
        job.log(f"What metric {card.ref} was trained for is not known: {error}")
        tags = {}
    asked, known = tags.get("primary_metric"), " or ".join(PRIMARY)
    if asked is None:
        return None, ""
    choose = f"Promotion compares {known}, where more is better: name one of them as primary."
    if asked not in PRIMARY:
        return asked, (f"Refused: {card.ref} was trained for {asked!r}, which only its recipe measures, under a name of "
                       f"its own. {choose}")
    if tags.get("lower_is_better") == "true":
        return asked, f"Refused: {card.ref} was trained with {asked} as a metric where less is better. {choose}"
    return asked, ""


def _check(dataset: str, version: str, split: str, primary: str | None, lower_is_better: bool | None, margin: float,
           max_class_drop: float | None) -> None:
    known = " or ".join(PRIMARY)
    if primary not in (None, *PRIMARY):  # what comes as JSON may be unhashable
        raise Invalid(f"Promotion compares {known}; there is no metric {primary!r}.")
    if lower_is_better is not None and (not isinstance(lower_is_better, bool) or lower_is_better):
        raise Invalid(f"Promotion compares {known}, and more of {primary or 'each'} is better: lower_is_better must be false or "
                      f"left out, got {lower_is_better!r}.")
    if split not in ("val", "test"):
        raise Invalid(f"Promotion compares models on the split test, or on val, not on {split!r}.")
    if parse_ref(version)[0] != dataset:
        raise Invalid(f"Promotion compares models on a version of {dataset}, {version} is none.")
    for what, value in (("margin", margin), ("max_class_drop", 0 if max_class_drop is None else max_class_drop)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise Invalid(f"Promotion compares scores of 0..1; {what} must be a number from 0 to below 1, got "
                          f"{value!r}.")


def digest_of(frames: Sequence[LabeledFrame]) -> str:
    """sha256 over the sorted lines "<name> <md5 of its bytes>" of frames: the same frames, the same digest."""
    lines = sorted(f"{one.frame.name} {one.frame.blob}\n" for one in frames)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def changed_since(known: Sequence[Entry], name: str) -> Callable[[Entry], bool]:
    """Whether an entry of the ledger changed who leads under that name after the newest of those `known`."""
    last = max((one.id for one in known), default=0)
    return lambda entry: bool(entry.id > last and entry.facts.get("promoted")
                              and parse_model_ref(entry.subject)[0] == name)


def lead(dataset: str, key: str, champion: str, previous: str | None, tracker: Tracker, records: Records) -> None:
    """Sets the aliases `champion` and `previous` as the ledger's entry `key` says, where that is the last change of
    champion: a job repeated long after must not undo a later one."""
    name = parse_model_ref(champion)[0]
    if champions(dataset, records, name=name)[0].facts.get("key") != key:
        return
    for alias, ref in (("previous", previous), ("champion", champion)):
        if ref is not None:
            tracker.set_alias(name, alias, parse_model_ref(ref)[1])


def _tell_run(decision: Decision, tracker: Tracker, models: ModelStore) -> None:
    run_id = models.card(decision.challenger["model"]).run_id
    if run_id:
        tracker.log(run_id, tags={"promotion": "champion" if decision.promoted else "kept out",
                                  "promotion_reason": decision.reason,
                                  "promotion_on": f"{decision.version}/{decision.split}"})


def _decide(dataset: str, candidate: str, champion: str | None, version: str, split: str, margin: float,
            primary: str | None, refusal: str, max_class_drop: float | None, models: ModelStore, store: DatasetStore, blobs: Blobs, tracker: Tracker,
            open_backend: OpenBackend, job: Job) -> Decision:
    record, manifest = store.version(version), store.manifest(version)
    frames = with_outlines(manifest.split(split))
    if not any(one.annotations for one in frames):
        raise Invalid(f"{version} has no label in its {split} split, so nothing can be compared. Accept "
                      f"labelled frames of that split (upload gives every frame a split and `--split {split}` sets it) "
                      "and publish a version.")
    cards = {ref: models.card(ref) for ref in (candidate, champion) if ref}
    primary = primary or default_metric(cards[candidate].task, frames)
    task = PRIMARY.get(primary, "boxes")
    names = [name for name, needed in PRIMARY.items() if needed == task or (needed, task) == ("boxes", "polygons")]
    scores: dict[str, dict[str, Any]] = {
        ref: {"model": ref, "sha256": card.files[card.onnx]["sha256"], "trained_on": card.trained_on,
              **dict.fromkeys(names), "per_class": {}} for ref, card in cards.items()}

    unknown: list[str] = []

    def decided(promoted: bool, reason: str, leaked: int = 0, **more: Any) -> Decision:
        if promoted and unknown:
            reason += (f" What {' and '.join(unknown)} was trained on is not known here, so whether it has seen {split} frames "
                       "was not checked.")
        return Decision(dataset, version, split, promoted, reason, primary, margin, scores[candidate],
                        scores[champion] if champion else None,
                        record.digest, len(frames), leaked, split_digest=digest_of(frames), **more)

    if refusal:
        return decided(False, refusal)
    for ref, card in cards.items():
        leaked = _leaked(card, manifest, split, store, models, job, unknown)
        if leaked:
            return decided(False, f"Refused: {len(leaked)} of {len(frames)} {split} frames of {version} were in the "
                                  f"training or validation data of {ref}, for example {leaked[0]}; its score would be "
                                  "flattered. Compare on a version and split that neither was trained on.", len(leaked))
    if candidate == champion:
        return decided(False, f"{candidate} is the champion already.")
    scored: dict[str, Evaluation] = {}
    for ref, card in cards.items():
        job.check()
        if ref == champion and not card.labels.map_to(manifest.taxonomy).pairs:
            # A champion of before all labels were renamed finds none of today's.
            scored[ref], scores[ref] = replace(scored[candidate], found={}), scores[ref] | dict.fromkeys(names, 0.0)
            continue
        try:
            scored[ref] = evaluate(ref, version, split, models=models, store=store, blobs=blobs,
                                   open_backend=open_backend, tracker=tracker, job=job)
        except Invalid as error:
            return decided(False, f"Refused: {ref} cannot be scored. {error}")
        metrics = scored[ref].metrics
        scores[ref] |= metrics.values
        if primary not in metrics.values:
            return decided(False, f"Refused: {ref} draws {card.task}, so on {version}/{split} it has no {primary}, only "
                                  f"{', '.join(metrics.values)}. Name one of these as primary, or train models of "
                                  "different tasks under different names (model_name).")
        scores[ref]["per_class"] = metrics.by_label("map_50_95" if PRIMARY[primary] == "boxes" else primary)
    if champion is None:
        return decided(*verdict(scores[candidate], None, margin, primary, max_class_drop))
    job.check()
    draws, _ = drawn(*(figure(primary, frames, scored[ref].found, scored[ref].metrics, manifest.taxonomy)
                       for ref in (candidate, champion)), len(frames), SEED)
    labelled = sum(any(counts(primary, annotation) for annotation in one.annotations or ()) for one in frames)
    within = interval(draws)
    return decided(*verdict(scores[candidate], scores[champion], margin, primary, max_class_drop, within, labelled),
                   difference=scores[candidate][primary] - scores[champion][primary], interval=within)


def verdict(challenger: dict[str, Any], champion: dict[str, Any] | None, margin: float = MARGIN,
            primary: str = "map_50_95", max_class_drop: float | None = None, within: Sequence[float] | None = None,
            frames: int = LEAST_FRAMES) -> tuple[bool, str]:
    """(does the challenger lead, why) by two sets of scores that were measured on the same frames.

    within  95 % interval of the difference challenger - champion; None: the scores alone decide
    frames  number of those frames that have labels
    """
    for one in (challenger, champion):
        if one is not None and not all(math.isfinite(one[key]) for key in PRIMARY if key in one):
            return False, f"Refused: the score of {one['model']} is not a number; its outputs are broken."
    new = challenger[primary]
    if champion is None:
        if new > 0:
            return True, f"{challenger['model']} scores {primary} {new:.4f} and is the first champion."
        return False, (f"{challenger['model']} scores {primary} 0: it finds nothing, and a first champion has to find "
                       "something.")
    old = champion[primary]
    told = f"{challenger['model']} scores {primary} {new:.4f}, {champion['model']} {old:.4f}"
    if within is not None:
        told += f" (95 % interval of the difference {within[0]:.4f} to {within[1]:.4f} over {frames} frames)"
    # Scores come from float sums; 1e-9 keeps "exactly the margin" on the champion's side whatever their last bit is.
    if not new > old + margin + 1e-9:
        return False, f"{told}: not better by more than {margin:g}, the champion stays."
    more = "Review more frames of that split and publish a version."
    if frames < LEAST_FRAMES:
        return False, (f"{told}: with fewer than {LEAST_FRAMES} frames that have {PRIMARY[primary]} the split is too small to tell "
                       f"who is better; the champion stays. {more}")
    if within is not None and not within[0] > 1e-9:
        return False, (f"{told}: better by {new - old:.4f}, but the interval reaches down to 0, so the split is too "
                       f"small to tell it from chance; the champion stays. {more}")
    drops = {label: ap - challenger["per_class"].get(label, 0.0) for label, ap in champion["per_class"].items()}
    worst = max(drops, key=lambda label: drops[label], default=None)
    if max_class_drop is not None and worst is not None and drops[worst] > max_class_drop + 1e-9:
        return False, (f"{told}: better on the whole, but {worst!r} falls by {drops[worst]:.4f}, more than "
                       f"{max_class_drop:g}; the champion stays.")
    return True, f"{told}: better by {new - old:.4f} (more than {margin:g}), the new champion."


def _leaked(card: ModelCard, manifest: Manifest, split: str, store: DatasetStore, models: ModelStore, job: Job,
            unknown: list[str]) -> list[str]:
    """Names of the split's frames whose pixels a model, or one it was started from, was trained or tuned on. Where that
    is not known, the model joins `unknown`."""
    seen: set[str] = set()
    followed: set[str] = set()
    while True:
        ref, followed = card.trained_on.get("ref"), followed | {card.ref}
        try:
            if ref:
                trained = store.manifest(ref)
                seen |= {one.frame.blob for part in ("train", "val") for one in trained.split(part)}
            else:
                unknown.append(card.ref)
                job.log(f"{card.ref} does not say what it was trained on: whether it has seen {split} frames cannot be "
                        "checked.")
            base = card.trained_on.get("base_model")
            if not base or base in followed:
                break
            card = models.card(base)
        except NotFound as error:
            unknown.append(card.ref)
            job.log(f"What {card.ref} was trained on is not here, so it cannot be checked for {split} frames: {error}")
            break
    return [one.frame.name for one in manifest.split(split) if one.frame.blob in seen]

"""Rerun: runs a training again from the facts its run keeps, and compares what comes out."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from workbench.errors import Invalid, NotFound
from workbench.ports import DatasetStore, Job, ModelStore, Tracker
from workbench.recipe import head, read_recipe
from workbench.steps.environments import CURRENT, current
from workbench.steps.facts import FOLDER, read
from workbench.steps.retrain import Trained, sha256_of_base
from workbench.steps.trained import numbers

RUN_ID = re.compile(r"[0-9a-f]{32}")
# Same machine and packages, no GPU: what threads add up in another order. Relative to the larger of 1 and the number.
# Measured on the detection recipe: docs/retrain.md.
SAME_TOLERANCE = 1e-3
# Elsewhere other kernels run: an epoch later, a twentieth of mAP is nothing unusual on small data.
OTHER_TOLERANCE = 0.05
# Numbers that tell how long something took or what it held differ in every run.
_OF_THE_MACHINE = re.compile(r"(^|_)(s|ms|us|sec|secs|seconds?|minutes?|hours?|times?|duration|elapsed|fps|speed|throughput|"
                             r"latency|memory|rss|mem|mib|gib|mb|gb|at|date|timestamp|started|ended|finished)(_|$)",
                             re.IGNORECASE)
# Facts whose change may explain another result.
_PLACE = ("cpu", "cores", "gpus", "system")


@dataclass(frozen=True)
class Rerun:
    """What a training gave the second time.

    run_id     the new run; of: the first one
    is_same    whether every number is within the tolerance
    tolerance  largest difference, relative to the larger of 1 and the first number
    differing  {"place": [first, second]} beyond it; None where one of them lacks the number
    changed    what was not as it was, one sentence each
    """

    run_id: str
    of: str
    is_same: bool
    tolerance: float
    compared: int
    largest: float
    says: str
    differing: dict[str, list[float | None]] = field(default_factory=dict)
    changed: tuple[str, ...] = ()
    metrics: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """compared: how many numbers; largest: difference; differing: as Rerun has it."""

    compared: int
    largest: float
    differing: dict[str, list[float | None]]


def rerun(run_id: str, *, retrain: Callable[..., Trained], tracker: Tracker, store: DatasetStore, models: ModelStore,
          project: Path, job: Job, tolerance: float | None = None, changed_environment: bool = False) -> Rerun:
    """Trains again what the run trained: the same commit, data, weights, parameters, seed, limits and environment.

    retrain              steps.retrain.retrain with the parts of this workbench, still to be told what to train
    tolerance            SAME_TOLERANCE or OTHER_TOLERANCE otherwise, as machine and environment are the same or not
    changed_environment  goes on although packages are not what they were

    Nothing is registered. The comparison becomes tags of the new run and its artifact workbench/comparison.json.

    Raises Invalid, with the reason, when the run keeps no facts, or data, weights, commit or packages are not there or
    are not what they were; and as `retrain` does.
    """
    if not RUN_ID.fullmatch(run_id):
        raise Invalid("A run is named by its id, 32 hexadecimal digits; MLflow shows it on the run's page.")
    if tolerance is not None and not 0 <= tolerance < 1:
        raise Invalid(f"tolerance must be from 0 to below 1, got {tolerance}.")
    facts, first, packages = read(tracker, run_id)
    _check_inputs(run_id, facts, store, models, project)
    if facts["environment"] == CURRENT and not changed_environment:
        told = _changed_packages(packages, current().packages)
        if told:
            raise Invalid(f"Run {run_id} cannot be run again as it was: {told} Restore them, or allow a changed "
                          "environment (--changed-environment); the comparison will tell of it.")
    trained = retrain(
        facts["dataset"], recipe=facts["recipe"], params=facts["params"], base_model=facts["base_model"],
        repository=facts["repository"], commit=facts["commit"], location=facts["location"],
        experiment=facts["experiment"], register_as=facts["register_as"], primary=facts["primary"],
        lower_is_better=facts["lower_is_better"], environment=facts["environment"],
        limits={name: value for name, value in facts["limits"].items() if value and name != "free_disk_mb"},
        rerun_of=run_id)
    facts_now, second, packages_now = read(tracker, trained.run_id)
    changed = [*_changed_place(facts, facts_now), *filter(None, [_changed_packages(packages, packages_now)])]
    if tolerance is None:
        tolerance = OTHER_TOLERANCE if changed or facts["machine"].get("gpus") else SAME_TOLERANCE
    found = compare(first, second, tolerance)
    says = _sentence(run_id, facts, found, tolerance, changed)
    job.log(says)
    result = Rerun(trained.run_id, run_id, not found.differing, tolerance, found.compared, found.largest, says,
                   found.differing, tuple(changed), trained.metrics)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "comparison.json"
        file.write_text(json.dumps(result.to_json(), indent=1))
        tracker.log_files(trained.run_id, file, FOLDER)
    tracker.log(trained.run_id, tags={"same_as_first": str(result.is_same).lower(), "comparison": says[:4000]})
    return result


def compare(first: dict[str, Any], second: dict[str, Any], tolerance: float) -> Comparison:
    """All numbers of two trainings' results, those aside that are the machine's: times, speeds, memory."""
    one, other = _figures(first), _figures(second)
    differing: dict[str, list[float | None]] = {}
    largest = 0.0
    for place in dict.fromkeys([*one, *other]):
        before, now = one.get(place), other.get(place)
        if before is None or now is None:
            differing[place] = [before, now]
            continue
        difference = abs(now - before) / max(1.0, abs(before))
        largest = max(largest, difference)
        if difference > tolerance:
            differing[place] = [before, now]
    return Comparison(len({*one, *other}), largest, differing)


def _figures(results: dict[str, Any]) -> dict[str, float]:
    return {place: float(value) for place, value in numbers(results)
            if not any(_OF_THE_MACHINE.search(part) for part in place.split())}


def _check_inputs(run_id: str, facts: dict[str, Any], store: DatasetStore, models: ModelStore, project: Path) -> None:
    """Raises Invalid when the data, the weights or the commit are gone or not what they were."""
    why = f"Run {run_id} cannot be run again: "
    try:
        digest = store.version(facts["dataset"]).digest
        base = sha256_of_base(facts["base_model"], models) if facts["base_model"] else None
        if facts["repository"] is None:
            head(project)
            read_recipe(project, facts["recipe"], facts["commit"])
    except (NotFound, Invalid, KeyError) as error:
        raise Invalid(f"{why}{error}") from error
    if digest != facts["dataset_digest"]:
        raise Invalid(f"{why}{facts['dataset']} now has digest {digest}, it was trained on {facts['dataset_digest']}. "
                      "Restore the data set's repository from its backup.")
    if base != facts["base_sha256"]:
        raise Invalid(f"{why}the weights of {facts['base_model']} now have sha256 {base}, it began with "
                      f"{facts['base_sha256']}. Restore the model store from its backup.")


def _changed_place(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    places = {name: (before["machine"].get(name), now["machine"].get(name)) for name in _PLACE}
    places["Python"] = (before["python"], now["python"])
    return [f"{name} was {old}, is {new}." for name, (old, new) in places.items() if old != new]


def _changed_packages(before: str, now: str) -> str:
    """What differs between two listings of packages, "" when nothing does."""
    gone, new = (sorted(set(one.splitlines()) - set(other.splitlines())) for one, other in ((before, now), (now, before)))
    if not gone and not new:
        return ""
    return (f"{len(gone)} of its packages are not installed as they were ({', '.join(gone[:5]) or 'none'}), {len(new)} are "
            f"new ({', '.join(new[:5]) or 'none'}).")


def _sentence(run_id: str, facts: dict[str, Any], found: Comparison, tolerance: float, changed: list[str]) -> str:
    if found.differing:
        name, (before, now) = next(iter(found.differing.items()))
        says = (f"NOT the same as run {run_id}: {len(found.differing)} of {found.compared} numbers differ by more than "
                f"{tolerance:g}, such as {name}: {before} then, {now} now.")
    else:
        says = (f"The same as run {run_id}: all {found.compared} numbers within {tolerance:g}, the largest difference is "
                f"{found.largest:.2g}.")
    seed = "" if facts["seed"] is not None else " The recipe has no parameter seed, so its numbers may differ by chance."
    return says + seed + "".join(f" Changed since: {one}" for one in changed)

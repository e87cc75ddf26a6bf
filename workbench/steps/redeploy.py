"""Redeploy: what follows a change of champion. It annotates next, in INT8 where a certificate allows that, and takes
the place of earlier champions among CVAT's tools; or, after a rollback, what was deployed with it comes back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from workbench.blobs import Blobs
from workbench.certificates import Certificates
from workbench.dataset import check_dataset_name
from workbench.errors import Conflict, Invalid, NotFound
from workbench.inference.certificate import METRICS
from workbench.inference.detector import OpenBackend
from workbench.model import parse_model_ref
from workbench.ports import DatasetStore, Job, ModelStore, Tracker
from workbench.records import Entry, Records
from workbench.steps.certify import certify, open_annotator
from workbench.steps.cvat_gateway import LEDGER as CVAT
from workbench.steps.cvat_gateway import deploy_to_cvat, withdraw_from_cvat
from workbench.steps.deploy import ALL, champions, deploy, origin
from workbench.steps.quantize import SUFFIX, quantize

LEDGER = "redeployments"
# What a person may ask for after a promotion; deploying is part of both others.
THEN = ("deploy", "int8", "cvat")


@dataclass(frozen=True)
class Redeployed:
    """What came of it.

    deployed  the version that this job made the annotator, "" when it left that alone
    stages    {"stage", "told", ...} of every stage, in order; `told` is a sentence for a person
    reason    the sentences in one text
    """

    dataset: str
    model: str
    deployed: str
    stages: tuple[dict[str, Any], ...]
    reason: str

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "stages": list(self.stages)}


def check_then(then: Sequence[str]) -> tuple[str, ...]:
    """Raises Invalid for what cannot follow a promotion."""
    strange = [one for one in then if one not in THEN] if isinstance(then, (list, tuple)) else [then]
    if strange or not then:
        raise Invalid(f"What follows a promotion is given as a list of {', '.join(THEN)}, got {then!r}.")
    return tuple(one for one in THEN if one in then)


def redeploy(dataset: str, model: str, *, then: Sequence[str] = THEN[:1], version: str | None = None,
             back: bool = False, limits: Mapping[str, float] | None = None, models: ModelStore, store: DatasetStore,
             blobs: Blobs, tracker: Tracker, records: Records, certificates: Certificates, open_backend: OpenBackend, job: Job,
             person: str, scratch: Path) -> Redeployed:
    """Deploys a champion. Every stage is an entry of the ledger "redeployments" and a line of the job's log.

    then     of THEN: "int8" makes and certifies an INT8 version first, and deploys that where the certificate passes,
             else FP32 with the reason; "cvat" puts it where earlier champions of its name are among CVAT's tools
    version  data set version that calibrates and certifies; default: the latest
    back     after a rollback: what annotated, and what of this model CVAT was shown, when it last stopped leading
    limits   of the certificate, over inference.certificate.LIMITS

    The same job again goes on after the last stage that is in the ledger and decides nothing twice. Raises Conflict
    when the model does not lead any more: nothing further is deployed then; Invalid when it cannot be opened.
    """
    then = check_then(then)
    work = _Redeployment(check_dataset_name(dataset), model, job, person, records, models, certificates, open_backend)
    if back:
        until = work.stopped_leading()
        work.stage("deploy", lambda: work.deploy_again(until, tracker))
        work.stage("cvat", lambda: work.show_again(until))
        return work.report()
    chosen = model
    if "int8" in then:
        version = version or _latest(dataset, store)
        chosen = work.stage("int8", lambda: work.in_int8(
            version, limits, store=store, blobs=blobs, scratch=scratch))["model"]
    work.stage("deploy", lambda: work.deploy(chosen, tracker))
    if "cvat" in then:
        work.stage("cvat", lambda: work.show(chosen))
    return work.report()


class _Redeployment:
    """One job's stages, with what they all need."""

    def __init__(self, dataset: str, model: str, job: Job, person: str, records: Records, models: ModelStore,
                 certificates: Certificates, open_backend: OpenBackend) -> None:
        self.dataset, self.model, self.job, self.person = dataset, model, job, person
        self.records, self.models = records, models
        self._door = {"models": models, "certificates": certificates, "open_backend": open_backend}
        self._done: list[dict[str, Any]] = []

    def stage(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The facts of a stage: those of an earlier attempt, else what `make` does now."""
        key = f"redeploy:{self.job.id}:{name}"
        facts = next((one.facts for one in self.records.entries(LEDGER, self.dataset, limit=ALL)
                      if one.facts.get("key") == key), None)
        if facts is None:
            self.job.check()
            self.check_leads()
            facts = {"stage": name, **make(), "job": self.job.id, "key": key}
            self.records.add(LEDGER, self.dataset, facts["model"] or self.model, self.person, facts, key=key)
            self.job.log(facts["told"])
        self._done.append({name: value for name, value in facts.items() if name not in ("job", "key")})
        return facts

    def report(self) -> Redeployed:
        deployed = next((one["model"] for one in self._done if one["stage"] == "deploy"), "")
        return Redeployed(self.dataset, self.model, deployed, tuple(self._done),
                          " ".join(one["told"] for one in self._done))

    def check_leads(self) -> None:
        leading = self._leading()
        if leading[0].subject != self.model:
            raise Conflict(f"{self.model} does not lead any more, {leading[0].subject} does; nothing further is "
                           "deployed. Deploy what you want on the page Retrain and promote.")

    def in_int8(self, version: str, limits: Mapping[str, float] | None, **parts: Any) -> dict[str, Any]:
        common = {"models": self.models, "store": parts["store"], "blobs": parts["blobs"], "limits": limits,
                  "job": self.job, "person": self.person, "certificates": self._door["certificates"],
                  "open_backend": self._door["open_backend"]}
        ref = f"{self.model}{SUFFIX}"
        try:
            try:
                kept = quantize(self.model, version, scratch=parts["scratch"], **common).certificate
            except Conflict:
                # Somebody made it with another calibration: it is certified as it is.
                kept = certify(ref, version, **common)
        except (Invalid, NotFound) as error:
            return {"model": self.model, "passed": False, "told": f"{self.model} stays in FP32: {error}"}
        if not kept["passed"]:
            return {"model": self.model, "passed": False,
                    "told": f"{self.model} stays in FP32, the certificate of {ref} failed: {' '.join(kept['reasons'])}"}
        short = {name: kept[name] for name in ("metric", "loss", "speedup")}
        return {"model": ref, "passed": True, **short, "told": (
            f"{ref} is certified: {kept['speedup']:.2f} times as fast, the {METRICS[kept['metric']][0]} falls by "
            f"{kept['loss']:.4f}.")}

    def deploy(self, ref: str, tracker: Tracker) -> dict[str, Any]:
        with open_annotator(ref, **self._door):
            pass  # the door through which it will have to go
        deploy(self.dataset, ref, models=self.models, records=self.records, tracker=tracker, person=self.person,
               key=f"redeploy:{self.job.id}")
        return {"model": ref, "told": f"{ref} annotates the next upload."}

    def show(self, ref: str) -> dict[str, Any]:
        """Puts a version in the place of earlier champions among CVAT's tools."""
        earlier = {one.subject for one in self._leading()} - {self.model}
        shown, kept = [], []
        for entry in self._functions():
            if not self._is_shown(entry) or entry.subject == ref or not self._is_of(entry, earlier | {self.model}):
                continue
            try:
                self._show(ref, entry)
            except Invalid as error:
                kept.append(f"{entry.subject} stays in CVAT: {error}")
                continue
            self._withdraw(entry)
            shown.append(entry.subject)
        told = f"{ref} takes the place of {', '.join(shown)} in CVAT." if shown else (
            "" if kept else "No earlier champion is deployed to CVAT, so nothing changes there.")
        return {"model": ref, "replaced": shown, "told": " ".join([told, *kept]).strip()}

    def stopped_leading(self) -> str:
        """When the model last stopped leading before it led again now."""
        entries = self._leading()
        at = next((at for at, one in enumerate(entries) if at and one.subject == self.model), None)
        if at is None or entries[0].subject != self.model:
            raise Conflict(f"{self.model} does not lead again after a rollback, so there is nothing to bring back. "
                           "Deploy it on the page Retrain and promote.")
        return entries[at - 1].at

    def deploy_again(self, until: str, tracker: Tracker) -> dict[str, Any]:
        then = next((one.subject for one in self.records.entries("deployments", self.dataset, limit=ALL)
                     if one.at <= until), None)
        now = self.records.deployed(self.dataset)
        if then is None:
            return {"model": "", "told": (f"Nothing was deployed while {self.model} led before; what annotates stays as "
                                          f"it is: {now or 'no model'}.")}
        try:
            return self.deploy(then, tracker)
        except (Invalid, NotFound) as error:
            plain = self._origin(then)
            if plain == then:
                raise
            done = self.deploy(plain, tracker)
            return {**done, "told": f"{done['told']} {then}, which did before, cannot: {error}"}

    def show_again(self, until: str) -> dict[str, Any]:
        """Shows CVAT what of this model it was shown at that moment, and takes out what replaced it since."""
        now = self._functions()
        then = {one.dataset: one for one in self._functions(until) if one.facts.get("deployed")}
        shown, gone, failed = [], [], []
        for entry in then.values():
            if not self._is_of(entry, {self.model}):
                continue
            try:
                if not any(one.dataset == entry.dataset and one.facts.get("deployed") for one in now):
                    self._show(entry.subject, entry)
                shown.append(entry.subject)
            except (Invalid, NotFound) as error:
                failed.append(f"{entry.subject} cannot come back to CVAT: {error}")
        successors = {one.subject for one in self._leading()} - {self.model}
        for entry in now:
            if shown and self._is_shown(entry) and entry.dataset not in then and self._is_of(entry, successors):
                self._withdraw(entry)
                gone.append(entry.subject)
        told = [*([f"CVAT is shown {', '.join(shown)} again" + (f" in place of {', '.join(gone)}." if gone else ".")]
                  if shown else []), *failed]
        told = told or [f"CVAT was not shown {self.model} before, so nothing changes there."]
        return {"model": self.model, "replaced": gone, "shown": shown, "told": " ".join(told)}

    def _show(self, ref: str, as_before: Entry) -> None:
        card, facts = self.models.card(ref), as_before.facts
        renames = {label: name for label, name in (facts.get("renames") or {}).items() if label in card.labels}
        deploy_to_cvat(ref, kind=facts.get("kind") or "detector", draws=facts.get("draws") or "", renames=renames,
                       key=f"redeploy:{self.job.id}:{ref} {as_before.dataset}", records=self.records,
                       person=self.person, **self._door)

    def _withdraw(self, entry: Entry) -> None:
        withdraw_from_cvat(entry.dataset, records=self.records, person=self.person, key=self._withdrawal(entry))

    def _withdrawal(self, entry: Entry) -> str:
        return f"redeploy:{self.job.id}:without {entry.dataset}"

    def _is_shown(self, entry: Entry) -> bool:
        """Whether CVAT is shown the function, or was until an earlier attempt of this job took it out."""
        return bool(entry.facts.get("deployed")) or entry.facts.get("key") == self._withdrawal(entry)

    def _functions(self, until: str | None = None) -> list[Entry]:
        """The newest entry of each of CVAT's functions, up to a moment."""
        newest: dict[str, Entry] = {}
        for entry in self.records.entries(CVAT, limit=ALL):
            if until is None or entry.at <= until:
                newest.setdefault(entry.dataset, entry)
        return list(newest.values())

    def _is_of(self, entry: Entry, refs: set[str]) -> bool:
        return self._origin(entry.subject) in refs

    def _origin(self, ref: str) -> str:
        try:
            return origin(self.models.card(ref))
        except NotFound:
            return ref.removesuffix(SUFFIX)

    def _leading(self) -> list[Entry]:
        entries = champions(self.dataset, self.records, name=parse_model_ref(self.model)[0])
        if not entries:
            raise Invalid(f"{self.model} never led, so it is not redeployed. Promote it, or deploy it by hand: "
                          f"`workbench deploy {self.dataset} {self.model}`.")
        return entries


def _latest(dataset: str, store: DatasetStore) -> str:
    versions = store.versions(dataset)
    if not versions:
        raise Invalid(f"Data set {dataset} has no version to calibrate and certify on. Publish one, or leave INT8 out.")
    return versions[0].ref

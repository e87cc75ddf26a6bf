"""Pull: what reviewers accept in CVAT becomes known here, and is offered as the next version.

Two ways lead here: a message from CVAT (`receive`) and a look every minute (`look`), which finds what a lost message
missed. Both only announce work; the job (`pull`) reads what is there. Labels stay in CVAT until a version is published:
the working copy's status of a frame is its CVAT job's, so nothing has to be copied for a frame to count as accepted.
What a pull adds are the decisions in the ledger "reviews", the offer of a version in the ledger "pulls", and how far the
model agrees with the reviewers.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from workbench.errors import Conflict, Invalid, NotFound, WorkbenchError
from workbench.evaluation.agreement import Agreement, agreement
from workbench.hooks import AHEAD_S, WINDOW_S, Hooks, age_s, digest, is_signed
from workbench.ports import AnnotationServer, DatasetStore, Job
from workbench.records import Entry, Records
from workbench.run import written_by_machines
from workbench.steps.review import counts
from workbench.steps.version import planned, version

READ = 200
# CVAT sends about ten messages for one change of a job, within a second.
GATHER_S = 1.5
ASK, PUBLISH = "ask", "publish"

Submit = Callable[[str, str], str]  # (data set, idempotency key) -> id of the pull job


class NotSigned(Invalid):
    """The signature does not go with the message and the hook's secret."""


class Crew(Protocol):
    """Who works on what (adapters.cvat.people.People): of a job its id, type, is_accepted, assignee, updated_at."""

    def jobs(self) -> list[Any]: ...
    def changed(self) -> str: ...


class WithCrew(AnnotationServer, Protocol):
    """An annotation server whose frames lie in jobs of people."""

    def people(self, dataset: str) -> Crew: ...

    def jobs_of(self, dataset: str) -> dict[str, int]:
        """frame name -> number of its job"""
        ...


@dataclass(frozen=True)
class Pulled:
    """jobs: accepted now; decisions: frames newly entered into the ledger; next: the version that is offered, "" when
    there is nothing new; published: its reference when it was published by itself."""

    dataset: str
    jobs: tuple[int, ...]
    frames: int
    decisions: int
    next: str
    published: str = ""
    agreement: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "jobs": list(self.jobs)}


def receive(dataset: str, body: bytes, signature: str, *, hooks: Hooks, submit: Submit) -> dict[str, Any]:
    """A message from CVAT: {"taken": whether it announced work, "why", "job"}.

    Raises NotSigned, Invalid for no message, Conflict for one that came before or tells of what is long over: a copy of
    an old message must not set work off for ever.
    """
    try:
        secret = hooks.secret(dataset)
    except Invalid:
        secret = None
    if not is_signed(secret, body, signature):
        raise NotSigned("The signature does not go with this message. Connect the data set again on the CVAT page: that "
                        "gives CVAT a new secret.")
    try:
        message = json.loads(body)
        event = message["event"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Invalid("The body is no message of CVAT: it has no 'event'.") from error
    if event != "update:job":
        return {"taken": False, "why": f"{event} needs no work"}
    age, name = age_s(message, "job", hooks.clock()), digest(message)
    if not -AHEAD_S <= age <= WINDOW_S:
        raise Conflict(f"The message tells of a change {age:.0f} s ago, more than {WINDOW_S} s (or the clocks of CVAT and "
                       "this machine differ: set them). What it missed is found by the next look at CVAT.")
    if hooks.is_taken(name):
        raise Conflict("This very message was taken before; it is not taken twice.")
    answer: dict[str, Any] = {"taken": False, "why": "no accepted job is concerned"}
    if _concerns(message):
        answer = {"taken": True, "why": "", "job": submit(dataset, hooks.announce(dataset))}
    # Last: a message whose work could not be queued is one that CVAT may send again.
    hooks.take(name)
    hooks.note(dataset, heard_at=hooks.clock())
    return answer


def look(dataset: str, *, server: WithCrew, hooks: Hooks, submit: Submit) -> str | None:
    """Asks CVAT whether a job changed since the last look; the id of a pull job when accepted work did.

    One small request while nothing changes. What has changed is forgotten only when its pull is through.
    """
    people, known = server.people(dataset), hooks.followed(dataset)
    seen = people.changed()
    if seen == known.seen:
        return None
    if state_of(people.jobs()) == (known.pulled or state_of(())):
        hooks.note(dataset, seen=seen)
        return None
    return submit(dataset, hooks.announce(dataset))


def pull(dataset: str, *, server: WithCrew, store: DatasetStore, records: Records, hooks: Hooks, job: Job, person: str,
         publish: str = ASK, gather_s: float = GATHER_S) -> Pulled:
    """Enters what was accepted in CVAT into the ledger and offers, or publishes, the next version.

    publish   "ask": a person publishes on a page; "publish": at once
    gather_s  how long to wait for the rest of the messages that one change sets off

    Can be repeated: decisions and offers have keys made of what they are about. A task that was deleted in CVAT
    meanwhile only makes the accepted work less; published versions keep theirs.
    """
    until = time.monotonic() + gather_s
    while time.monotonic() < until:
        job.check()
        time.sleep(0.05)
    hooks.begin(dataset)
    jobs = server.people(dataset).jobs()
    try:
        return _pulled(dataset, jobs, server, store, records, hooks, job, person, publish)
    except (Invalid, NotFound):
        # Fails again until something changes in CVAT: the looks must not set it off every minute.
        hooks.note(dataset, pulled=state_of(jobs))
        raise


def offer(dataset: str, *, store: DatasetStore, records: Records) -> Entry | None:
    """The last pull, when the version that it offers is not published yet."""
    entries = records.entries("pulls", dataset, limit=1)
    if not entries or not entries[0].facts.get("next") or entries[0].facts.get("published"):
        return None
    try:
        versions = store.versions(dataset)
    except NotFound:
        versions = []
    return entries[0] if (versions[0].version if versions else "") == entries[0].facts["after"] else None


def connect(dataset: str, address: str, *, in_cvat: Any, hooks: Hooks) -> int | None:
    """Makes CVAT send its messages to `address` (of the service) and has it try; the status of that try.

    in_cvat  adapters.cvat.hooks.HooksInCvat of the data set's project

    The secret is made anew each time. Raises Invalid when the token's owner may not make hooks.
    """
    before = hooks.secret(dataset)
    target = f"{address.rstrip('/')}/v1/cvat/webhooks/{dataset}"
    secret = hooks.new_secret(dataset)
    try:
        hook_id = in_cvat.connect(target, secret)
    except WorkbenchError:
        if before is None:
            hooks.forget_secret(dataset)
        raise
    hooks.note(dataset, hook_id=hook_id, address=target)
    return in_cvat.ping(hook_id)


def disconnect(dataset: str, *, in_cvat: Any, hooks: Hooks) -> None:
    """Takes the hook out of CVAT and forgets its secret; can be repeated."""
    in_cvat.remove()
    hooks.forget_secret(dataset)
    hooks.note(dataset, hook_id=None, address="")


def state_of(jobs: Iterable[Any]) -> str:
    """Another text when other jobs are accepted, or something in an accepted one changed."""
    done = sorted((one.id, one.updated_at, one.assignee) for one in jobs if _is_done(one))
    return hashlib.sha256(json.dumps(done).encode()).hexdigest()


def _pulled(dataset: str, jobs: list[Any], server: WithCrew, store: DatasetStore, records: Records, hooks: Hooks, job: Job,
            person: str, publish: str) -> Pulled:
    if publish not in (ASK, PUBLISH):
        raise Invalid(f"Setting cvat_publish must be {ASK} or {PUBLISH}, is {publish!r}.")
    accepted, state = {one.id: one for one in jobs if _is_done(one)}, state_of(jobs)
    where = {name: number for name, number in server.jobs_of(dataset).items() if number in accepted}
    names, decisions, agreed = sorted(where), 0, Agreement()
    for start in range(0, len(names), READ):
        job.check()
        for name, working in server.read(dataset, names[start:start + READ]).items():
            if working.status != "accepted":
                continue  # decided on a page since, or the job was reopened in between
            who = accepted[where[name]].assignee or "cvat"
            mark = hashlib.sha256(f"{where[name]}\0{name}\0{working.revision}".encode()).hexdigest()
            decisions += records.add("reviews", dataset, name, who, {
                "decision": "accepted", "in": f"CVAT job {where[name]}", **counts(working)}, key=f"cvat:{dataset}:{mark}")
            proposed = tuple(written_by_machines(working).values())
            if proposed:
                agreed += agreement(proposed, working.annotations or ())
        job.progress(min(start + READ, len(names)), len(names), "accepted frames")
    plan = planned(dataset, server=server, store=store, job=job, person=person)
    published = ""
    if plan.next and accepted and publish == PUBLISH:
        published = version(dataset, server=server, store=store, job=job, person=person,
                            message=f"Accepted in CVAT: {len(names)} frames").ref
    report = Pulled(dataset, tuple(sorted(accepted)), len(names), decisions, plan.next if accepted else "", published,
                    agreed.to_json() if agreed.frames else {})
    records.add("pulls", dataset, plan.after, person, {
        **report.to_json(), "after": plan.after, "frames_changed": len(plan.changed.frames_relabeled) + len(
            plan.changed.frames_added)}, key=f"pull:{dataset}:{plan.after}:{report.next}:{state}")
    hooks.note(dataset, pulled=state)
    return report


def _is_done(one: Any) -> bool:
    return one.is_accepted and one.type == "annotation"


def _concerns(message: dict[str, Any]) -> bool:
    """Whether an accepted job changed, or one stopped being accepted."""
    job, changes = message["job"], message.get("changes")
    changes = {name: one for name, one in changes.items() if isinstance(one, dict)} if isinstance(changes, dict) else {}
    if job.get("type", "annotation") != "annotation":
        return False
    is_accepted = (job.get("stage"), job.get("state")) == ("acceptance", "completed")
    was = {name: changes.get(name, {}).get("from", job.get(name)) for name in ("stage", "state")}
    return is_accepted or (was["stage"], was["state"]) == ("acceptance", "completed")

"""Send: the frames that need a human go to people in CVAT, as jobs of a chosen size, apart from all the others."""

from __future__ import annotations

import random as chance
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from workbench.annotation import Annotation
from workbench.blobs import Blobs
from workbench.certificates import Certificates
from workbench.errors import Invalid, NotFound, WorkbenchError
from workbench.evaluation.agreement import Agreement, agreement, disagreement
from workbench.inference.detector import OpenBackend
from workbench.inference.pipeline import detect_frames
from workbench.ports import Job, ModelStore
from workbench.records import Entry, Records
from workbench.run import WorkingFrame, written_by_machines
from workbench.steps.annotate import drawing, preview_labels
from workbench.steps.certify import open_annotator
from workbench.taxonomy import Taxonomy

READ = 200
LEDGER = "cvat_reviews"
NONE, GROUND_TRUTH, HONEYPOTS = "none", "ground_truth", "honeypots"
TRUTHS = (NONE, GROUND_TRUTH, HONEYPOTS)
REASONS = ("low confidence", "disagreement", "random")


@dataclass(frozen=True)
class Chosen:
    """A frame that needs a human. why: of REASONS; score: the least confidence of its boxes, or the disagreement."""

    name: str
    why: str
    score: float | None = None


@dataclass(frozen=True)
class Sent:
    """task: of CVAT; jobs: its number -> to whom; chosen: reason -> frames; skipped: frame -> why it was not sent."""

    dataset: str
    task: int
    jobs: dict[int, str]
    frames: int
    chosen: dict[str, int]
    skipped: dict[str, str] = field(default_factory=dict)
    truth: str = NONE
    truth_job: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "jobs": {str(number): who for number, who in self.jobs.items()}}


def send(dataset: str, *, low_confidence: int = 0, disagreement: int = 0, random: int = 0, model: str = "",
         people: Sequence[str] = (), job_size: int = 20, truth: str = NONE, truth_frames: int = 5, seed: int = 0,
         server: Any, models: ModelStore, blobs: Blobs, records: Records, open_backend: OpenBackend,
         certificates: Certificates, job: Job, person: str) -> Sent:
    """Chooses frames that a machine annotated and nobody has begun, and makes a CVAT task of exactly these.

    low_confidence, disagreement, random  how many frames of each; a frame counts for the first that finds it
    model         whose boxes are compared with those that stand there; "": the last two models that ran on a frame
    people        CVAT user names; jobs are dealt out to them in turn. None: nobody is assigned
    job_size      frames of one job (without honeypots)
    truth         "ground_truth": a job over `truth_frames` of them for an expert, whom CVAT then measures the others
                  against; "honeypots": `truth_frames` accepted frames, one of which is mixed unmarked into every job

    Repeating it (the same job id) goes on with the frames that were chosen first. Raises Invalid for wrong numbers, a
    user CVAT does not know, or honeypots without accepted frames; NotFound when no frame is left to send.
    """
    _check(low_confidence, disagreement, random, job_size, truth, truth_frames)
    crew, reviews = server.people(dataset), server.reviews(dataset)
    crew.check_people(people)
    plan = records.entries(LEDGER, dataset, job.id, limit=1)
    if plan:
        facts = plan[0].facts
    else:
        facts = _planned(dataset, low_confidence, disagreement, random, model, truth, truth_frames, seed, server, reviews,
                         models, blobs, open_backend, certificates, job)
        facts |= {"people": list(people), "job_size": job_size, "truth": truth}
        records.add(LEDGER, dataset, job.id, person, facts, key=f"send:{job.id}")
    names, pool = [one["name"] for one in facts["chosen"]], list(facts["pool"])
    working = {one: frame for one, frame in _read(server, dataset, [*names, *pool])}
    names = [name for name in names if name in working]
    pixels = {name: blobs.path(frame.frame.blob) for name, frame in working.items()}
    job.progress(0, len(names), "sending pictures")
    task = reviews.make(job.id[:16], names, pixels, job_size=job_size, check=job.check, honeypots=pool, per_job=1)
    if pool:
        reviews.fill(task, {name: (working[name].annotations or (), tuple(written_by_machines(working[name]).values()))
                            for name in pool})
    stay = reviews.take_over(task, names)
    left = reviews.leave({name: place for name, place in facts["places"].items() if name in names and name not in stay})
    late = {name: "somebody drew on it meanwhile: that drawing is in its old task" for name in left}
    for name, why in (stay | late).items():
        job.fail_item(name, f"{why}. Send it again when that is over.")
    truth_job = _ground_truth(crew, task, truth, truth_frames, seed)
    jobs: dict[int, str] = {}
    mine = [one for one in crew.jobs() if one.task_id == task and one.type == "annotation"]
    for index, one in enumerate(mine):
        who = people[index % len(people)] if people else one.assignee
        jobs[one.id] = who
        if who != one.assignee:
            crew.set_job(one.id, assignee=who)
    job.progress(len(names), len(names), f"CVAT task {task}")
    counted = {why: sum(one["why"] == why and one["name"] not in stay for one in facts["chosen"]) for why in REASONS}
    return Sent(dataset, task, jobs, len(names) - len(stay), {why: count for why, count in counted.items() if count},
                {**facts["skipped"], **stay}, truth, truth_job)


def choose(dataset: str, *, low_confidence: int = 0, disagreement: int = 0, random: int = 0, seed: int = 0,
           others: Mapping[str, Sequence[Annotation]] | None = None, server: Any,
           leave_out: Sequence[str] = ()) -> list[Chosen]:
    """The frames that a machine annotated and that need a human most; the worst of each reason first.

    others     frame name -> a second model's boxes; None: those of the last two models that ran on the frame
    leave_out  names that are not chosen

    A frame on which no model drew anything has no confidence; one that only one model looked at has no disagreement.
    """
    names = [name for name in server.frame_names(dataset, "annotated") if name not in set(leave_out)]
    sure: dict[str, float] = {}
    split: dict[str, float] = {}
    for name, working in _read(server, dataset, names):
        certain = [a.confidence for a in working.annotations or () if a.is_machine and a.confidence is not None]
        if certain:
            sure[name] = min(certain)
        boxes = _of_two(working, others)
        if boxes is not None:
            split[name] = round(_differ(*boxes), 4)
    chosen: dict[str, Chosen] = {}
    for why, wanted, ranked in (
            ("low confidence", low_confidence, sorted(sure.items(), key=lambda one: (one[1], one[0]))),
            ("disagreement", disagreement,
             sorted(((name, part) for name, part in split.items() if part > 0), key=lambda one: (-one[1], one[0])))):
        free = [Chosen(name, why, score) for name, score in ranked if name not in chosen]
        chosen |= {one.name: one for one in free[:wanted]}
    rest = [name for name in names if name not in chosen]
    for name in sorted(chance.Random(seed).sample(rest, min(random, len(rest)))):
        chosen[name] = Chosen(name, "random")
    return list(chosen.values())


def measured(dataset: str, *, server: Any) -> Agreement:
    """How far what machines proposed agrees with what people accepted, over the accepted frames a machine drew on."""
    found = Agreement()
    for _, working in _read(server, dataset, server.frame_names(dataset, "accepted")):
        proposed = tuple(written_by_machines(working).values())
        if proposed:
            found += agreement(proposed, working.annotations or ())
    return found


def sent(dataset: str, *, records: Records, limit: int = 20) -> list[Entry]:
    """What was sent to people, newest first."""
    return records.entries(LEDGER, dataset, limit=limit)


# The argument of that name shadows the function in `choose`.
_differ = disagreement


def _planned(dataset: str, low_confidence: int, disagreement: int, random: int, model: str, truth: str, truth_frames: int,
             seed: int, server: Any, reviews: Any, models: ModelStore, blobs: Blobs, open_backend: OpenBackend,
             certificates: Certificates, job: Job) -> dict[str, Any]:
    names = server.frame_names(dataset, "annotated")
    blocked = reviews.blocked(names)
    others = None
    if disagreement and model:
        free = [name for name in names if name not in blocked]
        others = _look(dataset, model, free, server, models, blobs, open_backend, certificates, job)
    chosen = choose(dataset, low_confidence=low_confidence, disagreement=disagreement, random=random, seed=seed,
                    others=others, server=server, leave_out=list(blocked))
    if not chosen:
        why = f" {len(blocked)} wait in jobs that somebody has, or has begun." if blocked else ""
        raise NotFound(f"No frame of {dataset} is left to send: it takes frames that a model annotated and nobody "
                       f"reviewed.{why} Annotate new frames first.")
    pool = _pool(dataset, truth, truth_frames, seed, server)
    return {"chosen": [asdict(one) for one in chosen], "pool": pool, "skipped": blocked,
            "places": reviews.places([one.name for one in chosen])}


def _pool(dataset: str, truth: str, truth_frames: int, seed: int, server: Any) -> list[str]:
    if truth != HONEYPOTS:
        return []
    accepted = server.frame_names(dataset, "accepted")
    if len(accepted) < truth_frames:
        raise Invalid(f"{truth_frames} honeypots need as many accepted frames of {dataset}; there are {len(accepted)}. "
                      "Review some first, or take fewer.")
    return sorted(chance.Random(seed).sample(accepted, truth_frames))


def _ground_truth(crew: Any, task: int, truth: str, truth_frames: int, seed: int) -> int | None:
    there = next((one.id for one in crew.jobs() if one.task_id == task and one.type == "ground_truth"), None)
    if truth != GROUND_TRUTH or there is not None:
        return there
    numbers = [number for one in crew.jobs() if one.task_id == task for number in range(one.first, one.last + 1)]
    return crew.make_ground_truth(task, chance.Random(seed).sample(numbers, min(truth_frames, len(numbers)))).id


def _look(dataset: str, model: str, names: Sequence[str], server: Any, models: ModelStore, blobs: Blobs,
          open_backend: OpenBackend, certificates: Certificates, job: Job) -> dict[str, tuple[Annotation, ...]]:
    """What a second model finds; nothing of it is written. A frame that cannot be read is a failed item."""
    card, found = models.card(model), {}
    labels = preview_labels(card, Taxonomy(server.task(dataset).labels))
    if not labels.pairs:
        raise Invalid(f"{model} and data set {dataset} share no label, so their boxes cannot be compared. Choose a model "
                      "that was trained for it.")
    with open_annotator(model, models=models, open_backend=open_backend, certificates=certificates) as detector:
        frames = ((name, working.frame) for name, working in _read(server, dataset, names))
        for name, detections in detect_frames(detector, frames, lambda frame: blobs.get(frame.blob)):
            job.check()
            if isinstance(detections, WorkbenchError):
                job.fail_item(name, str(detections))
                continue
            mapped = [(index, labels(card.labels.labels[class_id])) for index, class_id in enumerate(detections.class_id)]
            found[name] = tuple(Annotation(label, **drawing(card, detections, index), source=card.source)
                                for index, label in mapped if label is not None)
            job.progress(len(found), len(names), f"{model} looks")
    return found


def _of_two(working: WorkingFrame, others: Mapping[str, Sequence[Annotation]] | None) -> (
        tuple[Sequence[Annotation], Sequence[Annotation]] | None):
    """The boxes of two models on a frame, None where only one looked."""
    by_source = {run.source: run.added for run in working.runs if not run.is_undone}
    last = list(by_source)[-2:]
    if others is not None:
        return (by_source[last[-1]], others[working.frame.name]) if last and working.frame.name in others else None
    return (by_source[last[0]], by_source[last[1]]) if len(last) == 2 else None


def _read(server: Any, dataset: str, names: Sequence[str]) -> list[tuple[str, WorkingFrame]]:
    found: dict[str, WorkingFrame] = {}
    for start in range(0, len(names), READ):
        found |= server.read(dataset, names[start:start + READ])
    return list(found.items())


def _check(low_confidence: int, disagreement: int, random: int, job_size: int, truth: str, truth_frames: int) -> None:
    numbers = {"low_confidence": low_confidence, "disagreement": disagreement, "random": random}
    wrong = {name: value for name, value in numbers.items() if not isinstance(value, int) or value < 0}
    if wrong or not any(numbers.values()):
        raise Invalid(f"Say how many frames of each reason to send, got {numbers}. At least one must be above 0.")
    if truth not in TRUTHS:
        raise Invalid(f"truth must be one of {', '.join(TRUTHS)}, got {truth!r}.")
    if not 1 <= job_size <= 1000 or (truth != NONE and truth_frames < 1):
        raise Invalid(f"job_size must be 1 to 1000 and truth_frames at least 1, got {job_size} and {truth_frames}.")

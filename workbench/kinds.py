"""The kinds of jobs: each joins the parts of a workbench to one step; arguments and result are JSON."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from workbench.annotation import Annotation
from workbench.errors import Invalid
from workbench.ports import Job
from workbench.wiring import PROJECT, Workbench

BATCH = 200
# kind -> (arguments it needs, arguments it may have). "person" may always be given; it is the job's own otherwise.
ARGUMENTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "upload": (("dataset", "source"), ("split",)),
    "annotate": (("dataset", "model"), ("statuses", "confidence", "renames", "tiling", "batch")),
    "undo": (("dataset", "run_id"), ()),
    "correct": (("dataset", "truth"), ()),
    "version": (("dataset",), ("message", "bump", "include")),
    "evaluate": (("model", "version"), ("split", "dataset")),
    "retrain": (("version",), ("recipe", "params", "base_model", "dataset", "repository", "commit", "location",
                               "experiment", "register_as", "primary", "lower_is_better", "request", "environment",
                               "limits", "gpu")),
    "rerun": (("run",), ("tolerance", "changed_environment", "gpu")),
    "sweep": (("version", "space"), ("recipe", "params", "base_model", "dataset", "repository", "commit", "location",
                                     "experiment", "register_as", "metric", "lower_is_better", "trials", "time_limit_s",
                                     "sampler", "pruner", "seed", "at_once", "memory_gb", "environment", "limits",
                                     "gpu")),
    "promote": (("dataset", "candidate", "version"), ("split", "margin", "primary", "lower_is_better",
                                                     "max_class_drop", "then")),
    "rollback": (("dataset",), ("to", "name", "bring_back")),
    "redeploy": (("dataset", "model"), ("then", "version", "back", "limits")),
    "drift": (("dataset",), ("threshold", "least_frames")),
    "deploy": (("dataset", "model"), ()),
    "quantize": (("model", "version"), ("split", "frames", "seed", "limits", "dataset")),
    "certify": (("model", "version"), ("split", "against", "limits", "dataset")),
    "pull": (("dataset",), ()),
    "send": (("dataset",), ("low_confidence", "disagreement", "random", "model", "people", "job_size", "truth",
                            "truth_frames", "seed")),
}


def check(kind: str, args: dict[str, Any]) -> None:
    """Raises Invalid for a kind that does not exist, a missing argument or one the kind does not have."""
    if kind not in ARGUMENTS:
        raise Invalid(f"There are no jobs of kind {kind!r}; there are {', '.join(ARGUMENTS)}.")
    needed, possible = ARGUMENTS[kind]
    missing = [name for name in needed if not args.get(name)]
    foreign = sorted(set(args) - {*needed, *possible, "person"})
    if missing or foreign:
        raise Invalid(f"A {kind} job needs {', '.join(needed)} and may have {', '.join(possible) or 'nothing else'}; "
                      + " and ".join([*([f"{', '.join(missing)} is missing"] if missing else []),
                                      *([f"{', '.join(foreign)} is none of them"] if foreign else [])]) + ".")
    if kind in ("retrain", "sweep") and args.get("repository") is not None:
        from workbench.repository import read_address
        # Before the job is stored: an address with a password must not be.
        read_address(str(args["repository"]))


def all_of(workbench: Workbench) -> dict[str, Callable[[dict[str, Any], Job], dict[str, Any]]]:
    """kind -> function of (arguments, job) that gives the step's report as JSON."""
    steps = {"upload": _upload, "annotate": _annotate, "undo": _undo, "correct": _correct, "version": _version,
             "evaluate": _evaluate, "retrain": _retrain, "rerun": _rerun, "sweep": _sweep, "promote": _promote, "rollback": _rollback, "deploy": _deploy,
             "redeploy": _redeploy, "drift": _drift,
             "quantize": _quantize, "certify": _certify, "pull": _pull, "send": _send}
    from workbench.steps.announce import announced
    return announced({kind: partial(_checked, kind, step, workbench) for kind, step in steps.items()},
                     outbox=workbench.outbox, records=lambda: workbench.records, tracker=lambda: workbench.tracker,
                     models=lambda: workbench.models, public_url=workbench.config.public_url)


def _checked(kind: str, step: Callable[..., dict[str, Any]], workbench: Workbench, args: dict[str, Any],
             job: Job) -> dict[str, Any]:
    check(kind, args)
    # A None is what a page sends for a choice that was not made: the step's own default stands.
    # Where a job runs (gpu) was decided when it was queued.
    args = {name: value for name, value in args.items() if value is not None and name != "gpu"}
    return step(workbench, job, args.pop("person", workbench.config.person), **args)


def _upload(workbench: Workbench, job: Job, person: str, dataset: str, source: str, **more: Any) -> dict[str, Any]:
    from workbench.steps.upload import upload
    report = upload(dataset, Path(source), store=workbench.datasets, server=workbench.server, blobs=workbench.blobs,
                    job=job, person=person, **more)
    workbench.records.add("uploads", dataset, report.version, person, {
        "source": Path(source).name, "added": report.added, "boxes": report.boxes, "refused": len(report.refused)},
        key=f"upload:{job.id}")
    return report.to_json()


def _annotate(workbench: Workbench, job: Job, person: str, dataset: str, model: str, **more: Any) -> dict[str, Any]:
    from workbench.steps.annotate import annotate
    return annotate(dataset, model, run_id=job.id, server=workbench.server, models=workbench.models,
                    blobs=workbench.blobs, records=workbench.records, open_backend=workbench.open_backend,
                    certificates=workbench.certificates, job=job, plan_for=workbench.plan_for, **more).to_json()


def _undo(workbench: Workbench, job: Job, person: str, dataset: str, run_id: str) -> dict[str, Any]:
    from workbench.steps.annotate import undo_run
    return undo_run(dataset, run_id, server=workbench.server, records=workbench.records, job=job).to_json()


def _correct(workbench: Workbench, job: Job, person: str, dataset: str, truth: str) -> dict[str, Any]:
    from workbench.steps.review import correct_from
    return correct_from(dataset, _truth(workbench, job, person, dataset, Path(truth)), person=person,
                        server=workbench.server, records=workbench.records, job=job).to_json()


def _version(workbench: Workbench, job: Job, person: str, dataset: str, message: str = "", **more: Any) -> dict[str, Any]:
    from workbench.steps.version import version
    made = version(dataset, server=workbench.server, store=workbench.datasets, job=job, person=person,
                   message=message or f"Labels of {dataset}", **more)
    return {"version": made.ref, "frames": made.frames, "labeled": made.labeled, "boxes": made.boxes,
            "digest": made.digest, "changed": bool(made.changed and not made.changed.is_empty)}


def _evaluate(workbench: Workbench, job: Job, person: str, model: str, version: str, split: str = "test",
              dataset: str = "") -> dict[str, Any]:
    from workbench.steps.evaluate import evaluate
    found = evaluate(model, version, split, models=workbench.models, store=workbench.datasets, blobs=workbench.blobs,
                     open_backend=workbench.open_backend, tracker=workbench.tracker, job=job)
    return {**found.metrics.values, **found.to_json(with_boxes=False)}


def _retrain(workbench: Workbench, job: Job, person: str, version: str, dataset: str = "", request: str = "",
             **more: Any) -> dict[str, Any]:
    return _trainer(workbench, job, person)(version, **more).to_json()


def _rerun(workbench: Workbench, job: Job, person: str, run: str, **more: Any) -> dict[str, Any]:
    from workbench.steps.rerun import rerun
    return rerun(run, retrain=_trainer(workbench, job, person), tracker=workbench.tracker, store=workbench.datasets,
                 models=workbench.models, project=PROJECT, job=job, **more).to_json()


def _sweep(workbench: Workbench, job: Job, person: str, version: str, dataset: str = "", **more: Any) -> dict[str, Any]:
    from workbench.steps.sweep import sweep
    config = workbench.config
    return _trainer(workbench, job, person, sweep)(version, open_search=workbench.open_search, cores=config.threads,
                                                   **more).to_json()


def _trainer(workbench: Workbench, job: Job, person: str, step: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """retrain, or another step that trains, with the parts of the workbench."""
    from workbench.steps.limits import limits_of
    from workbench.steps.retrain import retrain
    config = workbench.config
    return partial(step or retrain, store=workbench.datasets, blobs=workbench.blobs, tracker=workbench.tracker,
                   models=workbench.models, home=config.home, job=job, project=PROJECT, person=person,
                   repositories=config.retrain_repositories, open_backend=workbench.open_backend,
                   environment=config.retrain_environment, most=limits_of(config), secrets=config.secrets)


def _promote(workbench: Workbench, job: Job, person: str, dataset: str, candidate: str, version: str,
             then: Any = (), **more: Any) -> dict[str, Any]:
    from workbench.steps.promote import promote
    from workbench.steps.redeploy import check_then
    then = check_then(then) if then else ()
    done = promote(dataset, candidate, version, models=workbench.models, store=workbench.datasets,
                   blobs=workbench.blobs, tracker=workbench.tracker, records=workbench.records,
                   open_backend=workbench.open_backend, job=job, person=person, **more)
    follows = done.promoted and then and _follow_up(workbench, job, person, {
        "dataset": dataset, "model": candidate, "then": list(then), "version": version})
    return {**done.to_json(), **({"redeploy": follows} if follows else {})}


def _rollback(workbench: Workbench, job: Job, person: str, dataset: str, bring_back: bool = False,
              **more: Any) -> dict[str, Any]:
    from workbench.steps.rollback import rollback
    done = rollback(dataset, models=workbench.models, tracker=workbench.tracker, records=workbench.records, job=job,
                    person=person, **more)
    follows = bring_back and _follow_up(workbench, job, person, {
        "dataset": dataset, "model": done.challenger["model"], "back": True})
    return {**done.to_json(), **({"redeploy": follows} if follows else {})}


def _follow_up(workbench: Workbench, job: Job, person: str, args: dict[str, Any]) -> str:
    """The redeploy job after a change of champion: one, however often the change is repeated."""
    follows = workbench.jobs.submit("redeploy", args, person=person, key=f"after {job.id}")
    job.log(f"Redeploy job {follows} follows.")
    return follows


def _redeploy(workbench: Workbench, job: Job, person: str, dataset: str, model: str, **more: Any) -> dict[str, Any]:
    from workbench.steps.redeploy import redeploy
    return redeploy(dataset, model, models=workbench.models, store=workbench.datasets, blobs=workbench.blobs,
                    tracker=workbench.tracker, records=workbench.records, certificates=workbench.certificates,
                    open_backend=workbench.open_backend, job=job, person=person,
                    scratch=workbench.config.home / "quantize", **more).to_json()


def _drift(workbench: Workbench, job: Job, person: str, dataset: str, **more: Any) -> dict[str, Any]:
    from workbench.steps.drift import look_for_drift
    return look_for_drift(dataset, server=workbench.server, store=workbench.datasets, models=workbench.models,
                          blobs=workbench.blobs, records=workbench.records, certificates=workbench.certificates,
                          open_backend=workbench.open_backend, job=job, person=person,
                          scratch=workbench.config.home / "drift", **more).to_json()


def _deploy(workbench: Workbench, job: Job, person: str, dataset: str, model: str) -> dict[str, Any]:
    from workbench.steps.deploy import deploy
    return deploy(dataset, model, models=workbench.models, records=workbench.records, tracker=workbench.tracker,
                  person=person).to_json()


def _quantize(workbench: Workbench, job: Job, person: str, model: str, version: str, dataset: str = "",
              **more: Any) -> dict[str, Any]:
    from workbench.steps.quantize import quantize
    return quantize(model, version, models=workbench.models, store=workbench.datasets, blobs=workbench.blobs,
                    certificates=workbench.certificates, open_backend=workbench.open_backend, job=job, person=person,
                    scratch=workbench.config.home / "quantize", **more).to_json()


def _certify(workbench: Workbench, job: Job, person: str, model: str, version: str, dataset: str = "",
             **more: Any) -> dict[str, Any]:
    from workbench.steps.quantize import certify
    return certify(model, version, models=workbench.models, store=workbench.datasets, blobs=workbench.blobs,
                   certificates=workbench.certificates, open_backend=workbench.open_backend, job=job, person=person,
                   **more)


def _pull(workbench: Workbench, job: Job, person: str, dataset: str) -> dict[str, Any]:
    from workbench.steps.cvat_pull import pull
    return pull(dataset, server=workbench.cvat, store=workbench.datasets, records=workbench.records,
                hooks=workbench.hooks, job=job, person=person, publish=workbench.config.cvat_publish).to_json()


def _send(workbench: Workbench, job: Job, person: str, dataset: str, **more: Any) -> dict[str, Any]:
    from workbench.steps.cvat_review import send
    return send(dataset, server=workbench.cvat, models=workbench.models, blobs=workbench.blobs,
                records=workbench.records, open_backend=workbench.open_backend, certificates=workbench.certificates,
                job=job, person=person, **more).to_json()


def _truth(workbench: Workbench, job: Job, person: str, dataset: str, folder: Path) -> dict[str, tuple[Annotation, ...]]:
    """Frame name -> annotations of a labelled COCO, YOLO or VOC data set; frames are found by their pixels, for what a
    frame is called depends on the folder it was uploaded from."""
    from workbench.blobs import digests
    from workbench.formats.images import read_file
    from workbench.formats.labels import place
    from workbench.formats.limits import Limits
    from workbench.formats.source import open_source
    by_blob: dict[str, str] = {}
    names = workbench.server.frame_names(dataset)
    for start in range(0, len(names), BATCH):
        job.check()
        read = workbench.server.read(dataset, names[start:start + BATCH])
        by_blob |= {working.frame.blob: name for name, working in read.items()}
    truth: dict[str, tuple[Annotation, ...]] = {}
    with open_source(folder, check=job.check) as source:
        for image in source.images:
            job.check()
            picture = read_file(source.root / image.path, Limits())
            name = by_blob.get(digests(picture.data).md5)
            placed = place(image.labels, image.name, picture.size, picture.file_size, picture.orientation,
                           f"human:{person}")
            if name is None:
                job.fail_item(image.path, f"Data set {dataset} has no frame with these pixels.")
            elif placed.annotations is not None:
                truth[name] = placed.annotations
    if not truth:
        raise Invalid(f"{folder} has no labelled picture that is a frame of {dataset}.")
    return truth

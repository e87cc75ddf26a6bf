"""Announce: tells the channels that a training or a sweep began, how these, a promotion and what follows one ended,
and of drift; stops no job."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from workbench.errors import Cancelled, WorkbenchError
from workbench.notifications import Found, Message, Outbox, metric_of, of_end, of_failure, of_start
from workbench.ports import Job, ModelStore, Tracker
from workbench.records import Records

Step = Callable[[dict[str, Any], Job], dict[str, Any]]

# Of a promotion only the decision is news.
TOLD_AT_START = ("retrain", "sweep")
TOLD_AT_END = ("retrain", "sweep", "promote", "rollback", "redeploy", "drift")
# The run of a sweep is older than those of all its trials, and runs are listed newest first.
RUNS = {"retrain": 50, "sweep": 2000}

logger = logging.getLogger("workbench.notifications")


def announced(steps: dict[str, Step], *, outbox: Outbox, records: Callable[[], Records], tracker: Callable[[], Tracker],
              models: Callable[[], ModelStore], public_url: str = "") -> dict[str, Step]:
    """The same kinds of jobs, of which those in TOLD_AT_END post messages around their step.

    public_url  where people's browsers reach the tracker, "" for its own address

    All looking up happens in the outbox's thread. What was told of a job is kept in the ledger "notifications", so a
    job that another worker repeats after a crash is not announced a second time.
    """
    if not outbox.channels:
        return steps
    return {kind: partial(_run, kind, step, _Teller(outbox, records, tracker, models, public_url))
            if kind in TOLD_AT_END else step for kind, step in steps.items()}


def _run(kind: str, step: Step, teller: _Teller, args: dict[str, Any], job: Job) -> dict[str, Any]:
    told = {name: value for name, value in args.items() if value is not None}
    if kind in TOLD_AT_START:
        teller.tell(job, kind, "start", told, lambda: of_start(kind, told, job.id))
    try:
        result = step(args, job)
    except Cancelled as error:
        said = str(error)
        teller.tell(job, kind, "end", told, lambda: of_failure(
            kind, told, job.id, said, teller.found(kind, told, {}, job.id), is_cancelled=True))
        raise
    except (Exception, SystemExit) as error:  # not every BaseException: a worker that ends repeats the job
        said = str(error) if isinstance(error, WorkbenchError) else f"{type(error).__name__}: {error}"
        teller.tell(job, kind, "end", told, lambda: of_failure(
            kind, told, job.id, said, teller.found(kind, told, {}, job.id)))
        raise
    if kind == "drift" and not result.get("is_new"):
        return result  # that all is well, or that an alarm still stands, is no news
    teller.tell(job, kind, "end", told, lambda: of_end(
        kind, told, job.id, result, teller.found(kind, told, result, job.id)))
    return result


class _Teller:
    """Posts a job's messages, each once, with what the records tell about its run."""

    def __init__(self, outbox: Outbox, records: Callable[[], Records], tracker: Callable[[], Tracker],
                 models: Callable[[], ModelStore], public_url: str) -> None:
        self._outbox, self._records, self._tracker, self._models = outbox, records, tracker, models
        self._public_url = public_url

    def tell(self, job: Job, kind: str, event: str, args: dict[str, Any], compose: Callable[[], Message]) -> None:
        def once() -> Message | None:
            try:
                dataset = str(args.get("dataset") or args.get("version") or "").partition("@")[0][:64]
                is_first = self._records().add("notifications", dataset, f"{kind} {event}",
                                               str(args.get("person", ""))[:200], {"job": job.id},
                                               key=f"notify:{job.id}:{event}")
            except Exception as error:  # told twice is better than not told
                logger.warning("whether %s of job %s was told cannot be looked up: %s", event, job.id, error)
                is_first = True
            return compose() if is_first else None

        self._outbox.post(once, job.log)

    def found(self, kind: str, args: dict[str, Any], result: dict[str, Any], job_id: str) -> Found:
        """What can be found; a part that does not answer leaves the message poorer, not unsent."""
        metric = metric_of(args, result)
        link, curve = "", ()
        before, before_of = None, ""
        try:
            run_id = self._run_id(kind, args, result, job_id)
            if run_id:
                link = self._link(run_id)
                if kind == "sweep":
                    run_id = self._tracker().run(run_id)["tags"].get("best_run", run_id)
                curve = tuple(value for _, value in self._tracker().history(run_id, metric))
        except Exception as error:
            logger.warning("the run of job %s cannot be looked up: %s", job_id, error)
        try:
            if kind in TOLD_AT_START and isinstance(result.get("model"), str):
                before, before_of = self._champion(result["model"], metric)
        except Exception as error:
            logger.warning("the champion before job %s cannot be looked up: %s", job_id, error)
        return Found(link, before, before_of, curve)

    def _run_id(self, kind: str, args: dict[str, Any], result: dict[str, Any], job_id: str) -> str:
        if isinstance(result.get("run_id"), str):
            return result["run_id"]
        if kind in RUNS:  # one that failed gives no result, but its run carries the job's id
            experiments = {str(args[name]).partition("@")[0]
                           for name in ("experiment", "experiment_name", "dataset", "version")
                           if args.get(name)}
            experiments |= {f"{name} sweeps" for name in experiments if kind == "sweep"}
            return next((run["run_id"] for name in sorted(experiments) for run in self._tracker().runs(name, RUNS[kind])
                         if run["tags"].get("job") == job_id), "")
        model = args.get("candidate") or (result.get("challenger") or {}).get("model")
        return self._models().card(model).run_id or "" if model else ""

    def _link(self, run_id: str) -> str:
        tracker = self._tracker()
        address = tracker.run_url(run_id)
        is_own = self._public_url and address.startswith(tracker.url)
        return self._public_url.rstrip("/") + address[len(tracker.url):] if is_own else address

    def _champion(self, model: str, metric: str) -> tuple[float | None, str]:
        name = model.partition("@")[0]
        champion = self._tracker().by_alias(name, "champion")
        if champion is None:
            return None, ""
        card = self._models().card(f"{name}@{champion.version}")
        value = card.metrics.get(metric)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        on = f" on {card.metrics['on']}" if card.metrics.get("on") else ""
        return (float(value) if is_number else None), f"champion {card.ref}{on}"

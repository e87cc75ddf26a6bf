"""POST /retrain: another system asks for a training; checked as far as that needs no fetching, then queued."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Annotated, Any

import anyio
from fastapi import APIRouter, Header, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from workbench.errors import Conflict, Invalid, NotFound
from workbench.jobs import JobStatus, QueueFull
from workbench.repository import allowed_list
from workbench.service.refusals import Busy
from workbench.service.schema import Problem
from workbench.steps.request import from_repository
from workbench.steps.training import Training
from workbench.wiring import PROJECT, Workbench

KIND = "retrain"
# Trainings take minutes: what could shorten the queue is not seconds away.
RETRY_S = 60
LOG_LINES = 500


class RetrainRequest(BaseModel):
    """The MLproject in a folder of a git repository, at one commit, trains on one version of a data set."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    experiment_name: str = Field(max_length=200, description="MLflow experiment the run appears in.")
    git_uri: str = Field(max_length=1000, description="https://host/path, ssh://git@host/path or a path of the "
                         "worker's machine; in the setting retrain_repositories, or the workbench's own checkout.")
    MLproject_location: str = Field(max_length=500, description="Folder of the MLproject inside it; . for the top.")
    commit_hash: str = Field(max_length=100, description="Full SHA, 40 lower-case hexadecimal digits.")
    dataset_repo: str = Field(max_length=1000, description="Name of a data set, or the path of its git repository.")
    version: str | None = Field(None, max_length=50, description="MAJOR.MINOR.PATCH; the latest one otherwise.")
    base_model: str | None = Field(None, max_length=200, description="NAME@VERSION to start from; from what the recipe "
                                   "starts with otherwise.")
    model_name: str | None = Field(None, max_length=63, description="Registered under; <data set>-detector otherwise.")
    primary_metric: str | None = Field(None, max_length=100, description="A number that metrics.json has to hold.")
    lower_is_better: bool = False
    parameters: dict[str, bool | int | float | str] = Field(
        default_factory=dict, max_length=100, description="Values for parameters that the MLproject declares.")
    environment: str | None = Field(None, max_length=20, description="current: the workbench's own Python; locked: built "
                                    "from the recipe's lock. The setting retrain_environment otherwise.")
    limits: dict[str, StrictInt] = Field(default_factory=dict, max_length=10, description="wall_s, cpu_s, memory_mb, "
                                         "processes, disk_mb, log_mb: lower than the settings', for this training.")
    gpu: bool = Field(False, description="Wait for a worker that serves the lane gpu.")


class RetrainJob(BaseModel):
    """job_id, and where to look."""

    job_id: str
    state: str
    status: str
    log: str


class Retraining:
    """The endpoints below /retrain, and again below /v1/retrain."""

    def __init__(self, workbench: Workbench) -> None:
        if workbench.config.retrain_queue < 1:
            raise Invalid(f"Setting retrain_queue must be at least 1, is {workbench.config.retrain_queue}.")
        allowed_list(workbench.config.retrain_repositories)
        self._workbench = workbench

    def router(self) -> APIRouter:
        router = APIRouter()
        # The database takes one writer at a time: of 40 threads that asked for it some would wait for half a second.
        one_at_a_time = anyio.CapacityLimiter(1)
        says = {code: {"model": Problem, "description": text} for code, text in {
            404: "There is no such retraining.", 409: "The key stands for another request.",
            429: "As many trainings wait as the setting retrain_queue allows."}.items()}
        says[429]["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}

        @router.post("/retrain", status_code=202, response_model=RetrainJob, responses={409: says[409], 429: says[429]})
        @router.post("/v1/retrain", status_code=202, response_model=RetrainJob,
                     responses={409: says[409], 429: says[429]})
        async def retrain(asked: RetrainRequest, request: Request, idempotency_key: Annotated[
                str | None, Header(min_length=1, max_length=150, description="The same key and body again is the same "
                                   "job.")] = None) -> JSONResponse:
            """Queues a training; nothing is fetched before a worker takes it."""
            job_id, state = await anyio.to_thread.run_sync(self.submit, asked, idempotency_key, limiter=one_at_a_time)
            path = f"{request.url.path}/{job_id}"
            return JSONResponse({"job_id": job_id, "state": state, "status": path, "log": f"{path}/log"}, 202,
                                headers={"Location": path})

        @router.get("/retrain/{job_id}", responses={404: says[404]})
        @router.get("/v1/retrain/{job_id}", responses={404: says[404]})
        def status(job_id: str) -> dict[str, Any]:
            """The job: state, epochs done, and in the end its result or why it failed."""
            found = self._get(job_id)
            return {**asdict(found), "is_over": found.is_over}

        @router.get("/retrain/{job_id}/log", response_class=PlainTextResponse, responses={404: says[404]})
        @router.get("/v1/retrain/{job_id}/log", response_class=PlainTextResponse, responses={404: says[404]})
        def log(job_id: str) -> str:
            """What the workbench said, then the end of what the training printed."""
            self._get(job_id)
            config = self._workbench.config
            printed = Training(config.home / "trainings" / job_id, secrets=config.secrets).last_lines(LOG_LINES)
            return "\n".join([*self._workbench.jobs.log_lines(job_id), printed])

        @router.delete("/retrain/{job_id}", responses={404: says[404]})
        @router.delete("/v1/retrain/{job_id}", responses={404: says[404]})
        def cancel(job_id: str) -> dict[str, Any]:
            """A waiting training never starts; a running one ends with all its processes."""
            self._get(job_id)
            found = self._workbench.jobs.cancel(job_id)
            return {**asdict(found), "is_over": found.is_over}

        return router

    def submit(self, asked: RetrainRequest, key: str | None = None) -> tuple[str, str]:
        """Id and state of the job for a request. Raises Invalid for one that cannot be trained, Conflict for a key that stands for
        another request, Busy when the queue is full."""
        jobs = self._workbench.jobs
        body = hashlib.sha256(json.dumps(asked.model_dump(), sort_keys=True).encode()).hexdigest()
        # A key of /v1/jobs is another key.
        key = f"POST {key}" if key is not None else None
        there = self._there(key, body)
        if there is not None:
            return there.id, there.state
        args, limit = self._args(asked) | {"request": body}, self._workbench.config.retrain_queue
        try:
            return jobs.submit(KIND, args, person=self._workbench.config.person, key=key, most_queued=limit), "queued"
        except QueueFull as error:
            raise Busy(f"{limit} trainings wait already (setting retrain_queue).", RETRY_S, full="queue") from error
        except Conflict:
            # The same request came twice at once, and a version was published in between.
            there = self._there(key, body)
            if there is None:
                raise
            return there.id, there.state

    def _there(self, key: str | None, body: str) -> JobStatus | None:
        """The job that a key stands for. Raises Conflict when that is another request's."""
        there = self._workbench.jobs.find(KIND, key) if key is not None else None
        # Compared by what was sent: meanwhile the latest version may be another one.
        if there is not None and there.args.get("request") != body:
            raise Conflict(f"This Idempotency-Key already stands for job {there.id} with another request. Use "
                           "another key for another request.")
        return there

    def _args(self, asked: RetrainRequest) -> dict[str, Any]:
        """Arguments of the job, with all that can be known now checked. Raises Invalid."""
        workbench = self._workbench
        return from_repository(**asked.model_dump(), repositories=workbench.config.retrain_repositories,
                               project=PROJECT, store=workbench.datasets, models=workbench.models)

    def _get(self, job_id: str) -> JobStatus:
        found = self._workbench.jobs.get(job_id)
        if found.kind != KIND:
            raise NotFound(f"Job {job_id!r} is no retraining; see GET /v1/jobs/{job_id}.")
        return found

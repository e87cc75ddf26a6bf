"""POST /retrain: another system asks for a training; checked as far as that needs no fetching, then queued."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field

from workbench.dataset import VERSION
from workbench.errors import Conflict, Invalid, NotFound
from workbench.jobs import JobStatus
from workbench.recipe import plain
from workbench.repository import allowed_list, check_commit, check_location, permitted
from workbench.service.refusals import Busy
from workbench.service.schema import Problem
from workbench.steps.retrain import check_words, name_for
from workbench.steps.training import Training
from workbench.wiring import PROJECT, Workbench

KIND = "retrain"
# Trainings take minutes: what could shorten the queue is not seconds away.
RETRY_S = 60
LOG_LINES = 500
PARAMETER = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,99}")


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
        self._workbench, self._lock = workbench, threading.Lock()

    def router(self) -> APIRouter:
        router = APIRouter()
        says = {code: {"model": Problem, "description": text} for code, text in {
            404: "There is no such retraining.", 409: "The key stands for another request.",
            429: "As many trainings wait as the setting retrain_queue allows."}.items()}
        says[429]["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}

        @router.post("/retrain", status_code=202, response_model=RetrainJob, responses={409: says[409], 429: says[429]})
        @router.post("/v1/retrain", status_code=202, response_model=RetrainJob,
                     responses={409: says[409], 429: says[429]})
        def retrain(asked: RetrainRequest, request: Request, idempotency_key: Annotated[
                str | None, Header(min_length=1, max_length=150, description="The same key and body again is the same "
                                   "job.")] = None) -> JSONResponse:
            """Queues a training; nothing is fetched before a worker takes it."""
            status = self.submit(asked, idempotency_key)
            path = f"{request.url.path}/{status.id}"
            return JSONResponse({"job_id": status.id, "state": status.state, "status": path, "log": f"{path}/log"}, 202,
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
            printed = Training(self._workbench.config.home / "trainings" / job_id).last_lines(LOG_LINES)
            return "\n".join([*self._workbench.jobs.log_lines(job_id), printed])

        @router.delete("/retrain/{job_id}", responses={404: says[404]})
        @router.delete("/v1/retrain/{job_id}", responses={404: says[404]})
        def cancel(job_id: str) -> dict[str, Any]:
            """A waiting training never starts; a running one ends with all its processes."""
            self._get(job_id)
            found = self._workbench.jobs.cancel(job_id)
            return {**asdict(found), "is_over": found.is_over}

        return router

    def submit(self, asked: RetrainRequest, key: str | None = None) -> JobStatus:
        """The job for a request. Raises Invalid for one that cannot be trained, Conflict for a key that stands for
        another request, Busy when the queue is full."""
        jobs = self._workbench.jobs
        body = hashlib.sha256(json.dumps(asked.model_dump(), sort_keys=True).encode()).hexdigest()
        # A key of /v1/jobs is another key.
        key = f"POST {key}" if key is not None else None
        # One at a time: otherwise all who come at once would find a place in the queue.
        with self._lock:
            there = jobs.find(KIND, key) if key is not None else None
            if there is not None:
                # Compared by what was sent: meanwhile the latest version may be another one.
                if there.args.get("request") != body:
                    raise Conflict(f"This Idempotency-Key already stands for job {there.id} with another request. Use "
                                   "another key for another request.")
                return there
            args = self._args(asked) | {"request": body}
            limit = self._workbench.config.retrain_queue
            if jobs.counts().get((KIND, "queued"), 0) >= limit:
                raise Busy(f"{limit} trainings wait already (setting retrain_queue).", RETRY_S, full="queue")
            return jobs.get(jobs.submit(KIND, args, person=self._workbench.config.person, key=key))

    def _args(self, asked: RetrainRequest) -> dict[str, Any]:
        """Arguments of the job, with all that can be known now checked. Raises Invalid."""
        config, models = self._workbench.config, self._workbench.models
        repository = permitted(asked.git_uri, config.retrain_repositories, PROJECT)
        args = {"repository": repository.address, "commit": check_commit(asked.commit_hash),
                "location": check_location(asked.MLproject_location), "experiment": asked.experiment_name}
        check_words(asked.experiment_name, asked.primary_metric)
        for name, value in asked.parameters.items():
            if not PARAMETER.fullmatch(name):
                raise Invalid("Names in parameters must be letters, digits, _ and -, as the MLproject declares them.")
            # Its kind is not known yet: what reads as a number may be one.
            if not isinstance(value, str) or not _is_number(value):
                plain(args["location"], name, "string", value)
        dataset = self._dataset(asked.dataset_repo)
        try:
            args["version"] = f"{dataset}@{self._version(dataset, asked.version)}"
            if asked.base_model is not None:
                models.card(asked.base_model)
        except NotFound as error:
            raise Invalid(str(error)) from error
        if asked.model_name is not None:
            args["register_as"] = name_for(dataset, asked.model_name, self._workbench.datasets, models)
        more = {"base_model": asked.base_model, "primary": asked.primary_metric, "params": asked.parameters or None,
                "lower_is_better": asked.lower_is_better or None}
        return args | {name: value for name, value in more.items() if value is not None}

    def _dataset(self, named: str) -> str:
        """The data set with this name or this repository. Raises Invalid: nothing is fetched from elsewhere."""
        store = self._workbench.datasets
        names = store.names()
        if named in names:
            return named
        path = named.removeprefix("file://")
        if path.startswith("/") and path.isprintable():
            real = os.path.realpath(path)
            for name in names:
                if real == os.path.realpath(store.checkout_url(name)):
                    return name
        raise Invalid("dataset_repo is no data set of this workbench; give a name or the path of its repository as "
                      f"`GET /v1/datasets` lists them: {', '.join(names[:20]) or 'there are none yet'}.")

    def _version(self, dataset: str, asked: str | None) -> str:
        store = self._workbench.datasets
        if asked is None:
            versions = store.versions(dataset)
            if not versions:
                raise Invalid(f"Data set {dataset} has no version yet; publish one first.")
            return versions[0].version
        if not VERSION.fullmatch(asked):
            raise Invalid("version must read MAJOR.MINOR.PATCH, such as 1.0.0, or be left out for the latest one.")
        return store.version(f"{dataset}@{asked}").version

    def _get(self, job_id: str) -> JobStatus:
        found = self._workbench.jobs.get(job_id)
        if found.kind != KIND:
            raise NotFound(f"Job {job_id!r} is no retraining; see GET /v1/jobs/{job_id}.")
        return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

"""The HTTP service: jobs, data sets and models for other programs; says how each part is."""

from __future__ import annotations

import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.middleware.trustedhost import TrustedHostMiddleware

from workbench import __version__, kinds
from workbench.config import Config
from workbench.errors import Cancelled, Conflict, Invalid, NotFound, Unavailable, WorkbenchError
from workbench.jobs import STATES, JobStatus
from workbench.supervise import parts
from workbench.wiring import Workbench

CODES = {NotFound: 404, Conflict: 409, Cancelled: 409, Unavailable: 503, Invalid: 422}
MOST_JOBS = 1000


class JobRequest(BaseModel):
    """args as workbench.kinds lists them for the kind; the same key again is the same job."""

    model_config = ConfigDict(extra="forbid")
    kind: str = Field(max_length=64)
    args: dict[str, Any]
    key: str | None = Field(default=None, max_length=200)
    person: str | None = Field(default=None, min_length=1, max_length=200)


class Refused(WorkbenchError):
    """The bearer token is missing or another one."""


def create(config: Config | None = None) -> FastAPI:
    """The application; uvicorn calls it with the settings of its environment."""
    config = config or Config.read()
    workbench = Workbench(config)
    # Without pages of its own: they would load scripts from another site.
    app = FastAPI(title="Workbench", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=parts.allowed_hosts(config))
    app.add_exception_handler(WorkbenchError, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse_form)

    def permitted(request: Request) -> None:
        if not config.service_token:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Starlette decodes headers as Latin-1: these are the bytes that were sent.
        if scheme.lower() != "bearer" or not secrets.compare_digest(given.encode("latin-1"), config.service_token.encode()):
            raise Refused("This service asks for its token: send the header 'Authorization: Bearer <service_token>'.")

    @app.get("/alive")
    def alive() -> dict[str, str]:
        """This process answers; nothing else is looked at."""
        return {"version": __version__}

    v1 = APIRouter(dependencies=[Depends(permitted)])

    @v1.get("/health")
    def health() -> JSONResponse:
        """Each part and what is wrong with it; 503 when one does not answer."""
        with ThreadPoolExecutor(len(parts.ALL)) as pool:
            found = dict(pool.map(lambda part: (part.name, _state(workbench, part)), parts.ALL))
        is_well = all(said == "ok" for said in found.values())
        return JSONResponse({"ok": is_well, "parts": found}, 200 if is_well else 503)

    @v1.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> PlainTextResponse:
        """Prometheus text format 0.0.4."""
        return PlainTextResponse(_metrics(workbench), media_type="text/plain; version=0.0.4")

    @v1.post("/v1/jobs", status_code=202)
    def submit(request: JobRequest) -> dict[str, Any]:
        kinds.check(request.kind, request.args)
        job_id = workbench.jobs.submit(request.kind, request.args, person=request.person or config.person, key=request.key)
        return _job(workbench.jobs.get(job_id))

    @v1.get("/v1/jobs")
    def list_jobs(limit: int = 50, kind: str | None = None, state: str | None = None) -> list[dict[str, Any]]:
        return [_job(job) for job in workbench.jobs.list(min(max(limit, 1), MOST_JOBS), kind, state)]

    @v1.get("/v1/jobs/{job_id}")
    def job(job_id: str) -> dict[str, Any]:
        status = workbench.jobs.get(job_id)
        return {**_job(status), "failed": workbench.jobs.failed_items(job_id), "log": workbench.jobs.log_lines(job_id)}

    @v1.delete("/v1/jobs/{job_id}")
    def cancel(job_id: str) -> dict[str, Any]:
        return _job(workbench.jobs.cancel(job_id))

    @v1.get("/v1/datasets")
    def datasets() -> list[dict[str, Any]]:
        store = workbench.datasets
        return [{"name": name, "versions": [{**asdict(one), "ref": one.ref} for one in store.versions(name)]}
                for name in store.names()]

    @v1.get("/v1/models")
    def models() -> list[dict[str, Any]]:
        return [{"ref": ref, **workbench.models.card(ref).to_json()} for ref in workbench.models.refs()]

    app.include_router(v1)
    return app


def _job(status: JobStatus) -> dict[str, Any]:
    return {**asdict(status), "is_over": status.is_over}


def _refuse(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, Refused):
        return JSONResponse({"error": str(error)}, 401, headers={"WWW-Authenticate": "Bearer"})
    code = next((code for kind, code in CODES.items() if isinstance(error, kind)), 500)
    return JSONResponse({"error": str(error)}, code)


def _refuse_form(request: Request, error: Exception) -> JSONResponse:
    problems = "; ".join(f"{'.'.join(map(str, one['loc'][1:])) or 'body'}: {one['msg']}" for one in error.errors())
    return JSONResponse({"error": f"The request is not as it should be: {problems}."}, 422)


def _state(workbench: Workbench, part: parts.Part) -> str:
    try:
        if part.name == "mongod":
            workbench.server.tasks()
        elif part.name == "worker":
            if not workbench.jobs.workers():
                raise Unavailable("No worker runs, so jobs stay queued; `workbench up` starts one.")
        else:
            parts.look(workbench.config, part)
    except WorkbenchError as error:
        return str(error)
    return "ok"


def _metrics(workbench: Workbench) -> str:
    counts = workbench.jobs.counts()
    kinds_there = sorted(kinds.ARGUMENTS.keys() | {kind for kind, _ in counts})
    lines = ["# HELP workbench_jobs Jobs by kind and state.", "# TYPE workbench_jobs gauge"]
    lines += [f'workbench_jobs{{kind="{_escaped(kind)}",state="{state}"}} {counts.get((kind, state), 0)}'
              for kind in kinds_there for state in STATES]
    lines += ["# HELP workbench_workers Worker processes that live.", "# TYPE workbench_workers gauge",
              f"workbench_workers {len(workbench.jobs.workers())}",
              "# HELP workbench_dataset_versions Published versions of each data set.",
              "# TYPE workbench_dataset_versions gauge"]
    lines += [f'workbench_dataset_versions{{dataset="{_escaped(name)}"}} {len(workbench.datasets.versions(name))}'
              for name in workbench.datasets.names()]
    lines += ["# HELP workbench_models Registered detectors.", "# TYPE workbench_models gauge",
              f"workbench_models {len(workbench.models.refs())}"]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

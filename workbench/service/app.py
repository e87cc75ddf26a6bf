"""The HTTP service: jobs, data sets and models for other programs; says how each part is."""

from __future__ import annotations

import asyncio
import gc
import secrets
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from workbench import __version__, kinds
from workbench.config import Config
from workbench.errors import Invalid, Unavailable, WorkbenchError
from workbench.jobs import JobStatus
from workbench.service import nuclio
from workbench.service.cvat_hooks import CvatHooks
from workbench.service.metrics import Metrics
from workbench.service.predict import Counted, Predict
from workbench.service.refusals import Refusal, status_of
from workbench.service.retrain import Retraining
from workbench.service.rules import RuleLooks
from workbench.service.schema import Problem
from workbench.supervise import parts
from workbench.wiring import Workbench

MOST_JOBS = 1000
MOST_PROBLEMS = 5
# Requests that are one small JSON object; predict, CVAT's calls and its webhooks have limits of their own.
SMALL = ("/retrain", "/v1/retrain", "/v1/jobs")
SMALL_BYTES = 2**20


class JobRequest(BaseModel):
    """args as workbench.kinds lists them for the kind; the same key again is the same job."""

    model_config = ConfigDict(extra="forbid")
    kind: str = Field(max_length=64)
    args: dict[str, Any]
    key: str | None = Field(default=None, max_length=200)
    person: str | None = Field(default=None, min_length=1, max_length=200)


def create(config: Config | None = None) -> FastAPI:
    """The application; uvicorn calls it with the settings of its environment."""
    config = config or Config.read()
    for name in ("service_workers", "predict_queue", "predict_models", "predict_body_mb", "gateway_body_mb"):
        if getattr(config, name) < 1:
            raise Invalid(f"Setting {name} must be at least 1, is {getattr(config, name)}.")
    # Service processes share the machine's cores.
    config = replace(config, threads=max(1, config.worker_threads // config.service_workers))
    workbench, metrics = Workbench(config), Metrics(config)
    predict = Predict(workbench, metrics)
    gateway = nuclio.Gateway(workbench, predict)
    hooks = CvatHooks(workbench)
    rules = RuleLooks(workbench)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        hooks.start()
        rules.start()
        await asyncio.to_thread(workbench.jobs.prepare)
        # What is imported stays: to look through it for garbage now and then would hold all requests up for 0.1 s.
        gc.collect()
        gc.freeze()
        yield
        gc.unfreeze()
        await asyncio.to_thread(rules.close)
        await asyncio.to_thread(hooks.close)
        await asyncio.to_thread(predict.close)

    # Without pages of its own: they would load scripts from another site.
    app = FastAPI(title="Workbench", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(_Bounded)
    app.add_middleware(Counted, metrics=metrics)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*parts.allowed_hosts(config), *nuclio.hosts(config)])
    app.add_middleware(nuclio.OwnPort, port=config.gateway_port)
    app.add_exception_handler(WorkbenchError, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse_form)
    app.add_exception_handler(HTTPException, _refuse_route)
    app.add_exception_handler(Exception, _fail)

    async def permitted(request: Request) -> None:  # async: a thread of its own for this alone costs more than it does
        if not config.service_token:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Starlette decodes headers as Latin-1: these are the bytes that were sent.
        sent = given.encode("latin-1")
        if scheme.lower() != "bearer" or not secrets.compare_digest(sent, config.service_token.encode()):
            raise Refusal(401, "This service asks for its token: send the header "
                          "'Authorization: Bearer <service_token>'.", {"WWW-Authenticate": "Bearer"})

    @app.get("/alive")
    def alive() -> dict[str, str]:
        """This process answers; nothing else is looked at."""
        return {"version": __version__}

    # HTTPBearer only describes; `permitted` decides.
    v1 = APIRouter(dependencies=[Depends(HTTPBearer(auto_error=False)), Depends(permitted)],
                   responses={401: {"model": Problem, "description": "The bearer token is missing or another one."},
                              422: {"model": Problem, "description": "The request is not as it should be."}})

    @v1.get("/health")
    def health() -> JSONResponse:
        """Each part and what is wrong with it; 503 when one does not answer."""
        with ThreadPoolExecutor(len(parts.ALL)) as pool:
            found = dict(pool.map(lambda part: (part.name, _state(workbench, part)), parts.ALL))
        is_well = all(said == "ok" for said in found.values())
        return JSONResponse({"ok": is_well, "parts": found}, 200 if is_well else 503)

    @v1.get("/metrics", response_class=Response,
            responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    def show_metrics() -> Response:
        """Prometheus text format 0.0.4."""
        return Response(metrics.text(workbench), media_type="text/plain; version=0.0.4; charset=utf-8")

    @v1.post("/v1/jobs", status_code=202)
    def submit(request: JobRequest) -> dict[str, Any]:
        kinds.check(request.kind, request.args)
        job_id = workbench.jobs.submit(request.kind, request.args, person=request.person or config.person,
                                       key=request.key)
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

    v1.include_router(predict.router())
    v1.include_router(Retraining(workbench).router())
    app.include_router(v1)
    # Without the token, which CVAT cannot send: its messages are signed.
    app.include_router(hooks.router())
    app.include_router(gateway.router())
    return app


class _Bounded:
    """Reads at most SMALL_BYTES of a request's body: FastAPI takes it whole before it looks at the token."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left = SMALL_BYTES

        async def bounded() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, f"The body has more than {SMALL_BYTES >> 10} KiB", {"Connection": "close"})
            return message

        is_small = scope["type"] == "http" and scope["path"] in SMALL
        await self._app(scope, bounded if is_small else receive, send)


def _job(status: JobStatus) -> dict[str, Any]:
    return {**asdict(status), "is_over": status.is_over}


def _refuse(request: Request, error: Exception) -> JSONResponse:
    headers = error.headers if isinstance(error, Refusal) else None
    return JSONResponse({"error": str(error)}, status_of(error), headers=headers)


def _refuse_form(request: Request, error: Exception) -> JSONResponse:
    problems = "; ".join(map(_problem, error.errors()[:MOST_PROBLEMS]))
    return JSONResponse({"error": f"The request is not as it should be: {problems}."}, 422)


def _problem(one: dict[str, Any]) -> str:
    if one["type"] == "json_invalid":
        if isinstance(one["loc"][-1], int):  # FastAPI reads the body in its own way, predict with pydantic
            return f"the body is no JSON ({one['ctx']['error']} at character {one['loc'][-1]})"
        return f"the body is no JSON ({one['msg'].removeprefix('Invalid JSON: ')})"
    if one["loc"] == ("body",) and one["type"] == "model_attributes_type":
        return "the body is no JSON object, or it was sent without the header 'Content-Type: application/json'"
    return f"{'.'.join(map(str, one['loc'][1:])) or 'body'}: {one['msg']}"


def _refuse_route(request: Request, error: Exception) -> JSONResponse:
    sentence = f"{request.method} {request.url.path!r}: {error.detail}. See /openapi.json for what there is."
    return JSONResponse({"error": sentence}, error.status_code, headers=error.headers)


def _fail(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": "The service failed; its log says how."}, 500)


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

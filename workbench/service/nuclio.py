"""The part of the Nuclio dashboard API that CVAT calls: our models appear in CVAT without a Nuclio.

CVAT 2.4x to 2.8x asks GET /api/functions, GET /api/functions/NAME before each call, and POST /api/function_invocations
with the header x-nuclio-function-name (recorded: g_nuclio_side). It sends no password, so callers are let in by their
address; it does not repeat a call, so a full queue is waited for here. Of an error it shows the status line and not the
body: workbench/service/sentences.py writes our sentence there.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from workbench.config import Config
from workbench.errors import Invalid, NotFound, WorkbenchError
from workbench.formats.nuclio import TRACKER, answer
from workbench.records import now
from workbench.service import follow
from workbench.service.batching import Call, Seen
from workbench.service.predict import GONE, LOW_CONFIDENCE, Predict, least_of
from workbench.service.reading import READ_S, Sent, Settings
from workbench.service.refusals import Busy, Refusal, status_of
from workbench.service.sentences import SENTENCE
from workbench.steps.cvat_gateway import Served, served
from workbench.wiring import Workbench

LOG = logging.getLogger(__name__)
# CVAT gives up after 120 s (CVAT_NUCLIO_DEFAULT_TIMEOUT): a sentence before that is better than its timeout.
ANSWER_S = 110
PAUSE_S = 0.2
# Bodies that may be in memory at once: CVAT has two of each kind of process in its own compose file.
BODIES = 8
# Beside the image, a call holds a thousand shapes at most; a body of a million brackets is no call.
MOST_MARKS = 100_000
REFUSED_FILE, MOST_REFUSED = "gateway-refused.json", 20

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def networks(config: Config) -> tuple[Network, ...]:
    """Where CVAT may call from. Raises Invalid for what is no network."""
    found = []
    for text in config.gateway_allow.split(","):
        try:
            found += [ipaddress.ip_network(text.strip(), strict=False)] if text.strip() else []
        except ValueError as error:
            raise Invalid(
                f"Setting gateway_allow holds {text.strip()!r}, which is no network: write addresses such as "
                "172.18.0.0/16 or 10.0.0.7, separated by commas."
            ) from error
    return tuple(found)


def hosts(config: Config) -> list[str]:
    """The names by which CVAT calls the gateway."""
    return [name for name in (urlsplit(config.gateway_url).hostname, config.gateway_host) if name]


def refused_callers(config: Config) -> dict[str, str]:
    """Address -> when it was last turned away because gateway_allow does not hold it, newest last."""
    try:
        return {str(address): str(at) for address, at in json.loads((config.home / REFUSED_FILE).read_text()).items()}
    except (OSError, ValueError, AttributeError):
        return {}


class Gateway:
    """The functions that CVAT sees. `predict` opens the models and runs them in the batches of everybody."""

    def __init__(self, workbench: Workbench, predict: Predict) -> None:
        self._workbench, self._predict = workbench, predict
        self._config, self._networks = workbench.config, networks(workbench.config)
        self._port = self._config.gateway_port or self._config.service_port
        self._bodies = asyncio.Semaphore(BODIES)
        self._told: dict[str, str] = {}

    def router(self) -> APIRouter:
        router = APIRouter(include_in_schema=False)

        @router.get("/api/functions")
        async def functions(request: Request) -> Response:
            return await self._answered(request, self._list)

        @router.get("/api/functions/{name}")
        async def function(request: Request, name: str) -> Response:
            return await self._answered(request, self._get, name)

        @router.post("/api/function_invocations")
        async def invoke(request: Request) -> Response:
            return await self._answered(request, self._invoke, request.headers.get("x-nuclio-function-name", ""))

        @router.post("/")
        async def direct(request: Request) -> Response:
            return await self._answered(request, self._direct)

        @router.api_route("/api/{rest:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
        async def other(request: Request, rest: str) -> Response:
            return await self._answered(request, self._other)

        return router

    async def _answered(self, request: Request, handle: Any, *given: str) -> Response:
        """Every failure is a status and a sentence; nothing is done for a caller from elsewhere."""
        try:
            self._check_caller(request)
            return Response(json.dumps(await handle(request, *given), allow_nan=False), media_type="application/json")
        except ClientDisconnect:
            return Response(status_code=GONE)
        except WorkbenchError as error:
            code, sentence = status_of(error), str(error)
            headers = error.headers if isinstance(error, Refusal) else {}
        except Exception as error:
            LOG.error("A call by CVAT failed.", exc_info=error)
            code, sentence, headers = 500, "The service failed; its log says how.", {}
        if self._told.get(request.url.path) != sentence:
            self._told = {request.url.path: sentence}
            LOG.warning("CVAT is answered %d: %s", code, sentence)
        return JSONResponse({"error": sentence}, code, headers={**headers, SENTENCE: _one_line(sentence)})

    def _check_caller(self, request: Request) -> None:
        given = request.client.host if request.client else ""
        try:
            address = ipaddress.ip_address(given)
        except ValueError:
            address = None
        address = getattr(address, "ipv4_mapped", None) or address
        if address is None or not any(address in network for network in self._networks):
            self._remember_refused(str(address or "an unknown address"))
            raise Refusal(
                403,
                f"Calls from {address or 'an unknown address'} are not taken here. If that is CVAT, add "
                "its address or network to the setting gateway_allow of the workbench.",
                {"Connection": "close"},
            )

    def _remember_refused(self, address: str) -> None:
        known = refused_callers(self._config)
        if address in known and known[address][:16] == now()[:16]:
            return  # once a minute is enough
        known = {**{one: at for one, at in known.items() if one != address}, address: now()}
        file = self._config.home / REFUSED_FILE
        try:
            _replace(file, json.dumps(dict(list(known.items())[-MOST_REFUSED:])))
        except OSError as error:
            LOG.warning("%s cannot be written (%s).", file, error)

    async def _list(self, request: Request) -> dict[str, Any]:
        listed = {}
        for one in await self._served():
            if one.why_not:
                LOG.warning("Function %s is not shown to CVAT: %s", one.function.name, one.why_not)
            else:
                listed[one.function.name] = one.function.described(one.card, self._port)
        return listed

    async def _get(self, request: Request, name: str) -> dict[str, Any]:
        one = await self._one(name)
        return one.function.described(one.card, self._port)

    async def _direct(self, request: Request) -> dict[str, Any]:
        raise Invalid(
            "CVAT calls functions directly and does not say which. Set CVAT_NUCLIO_INVOKE_METHOD=dashboard on "
            "cvat_server and cvat_worker_annotation."
        )

    async def _other(self, request: Request) -> dict[str, Any]:
        raise NotFound(
            f"{request.method} {request.url.path!r} is nothing that CVAT asks of a Nuclio. Models are "
            "deployed on the workbench's CVAT page."
        )

    async def _invoke(self, request: Request, name: str) -> Any:
        until = time.monotonic() + ANSWER_S
        one = await self._one(name)
        async with self._bodies:
            asked = await self._read(request)
            try:
                return await asyncio.wait_for(self._call(request, one, asked, until), max(0, until - time.monotonic()))
            except TimeoutError as error:
                raise Refusal(
                    504,
                    f"{one.function.model} was not done with the frame within {ANSWER_S} s. The machine "
                    "is busy: try again later, or use a smaller model.",
                ) from error

    async def _call(self, request: Request, one: Served, asked: dict[str, Any], until: float) -> Any:
        function, sent = one.function, Sent(Settings(), [("of CVAT", _image(asked))])
        if function.kind == TRACKER:
            # In a thread: a thousand states take a while to check.
            to_follow = await asyncio.to_thread(follow.read, asked.get("shapes"), asked.get("states"), one.card)
            call, seen = await self._look(request, function.model, sent, LOW_CONFIDENCE, until)
            return await asyncio.to_thread(follow.follow, to_follow, seen.found, least_of(call.card, None), seen.size)
        call, seen = await self._look(request, function.model, sent, _threshold(asked), until)
        return await asyncio.to_thread(answer, function, call.card, seen.found, seen.size)

    async def _look(
        self, request: Request, ref: str, sent: Sent, confidence: float | None, until: float
    ) -> tuple[Call, Seen]:
        while True:
            try:
                call, seen = await self._predict.look(request, ref, sent, confidence)
                return call, seen[0]
            except Busy:
                if time.monotonic() + PAUSE_S > until - 1:
                    raise
                await asyncio.sleep(PAUSE_S)

    async def _served(self) -> list[Served]:
        workbench = self._workbench
        return await asyncio.to_thread(
            served, models=workbench.models, records=workbench.records, certificates=workbench.certificates
        )

    async def _one(self, name: str) -> Served:
        for one in await self._served():
            if one.function.name == name:
                if one.why_not:
                    raise Invalid(one.why_not)
                return one
        raise NotFound(
            f"No function {name[:100]!r} is deployed to CVAT. Reload CVAT's page: its list shows those that "
            "are; the workbench's CVAT page deploys more."
        )

    async def _read(self, request: Request) -> dict[str, Any]:
        most, body = self._config.gateway_body_mb << 20, bytearray()
        length = request.headers.get("content-length") or "0"
        is_whole = length.isdigit() and int(length) <= most  # a length that is a lie is met while reading
        try:
            async with asyncio.timeout(READ_S):
                stream = request.stream()
                while is_whole and (chunk := await anext(stream, None)) is not None:
                    body += chunk
                    is_whole = len(body) <= most
        except TimeoutError as error:
            raise Refusal(408, f"The call did not arrive within {READ_S:g} s.", {"Connection": "close"}) from error
        if not is_whole:
            raise Refusal(
                413,
                f"The frame is larger than the {most / 2**20:g} MiB taken at once (setting "
                "gateway_body_mb of the workbench).",
                {"Connection": "close"},
            )
        return await asyncio.to_thread(_parsed, bytes(body))


class OwnPort:
    """Middleware: on the gateway's own port there is only the gateway and CVAT's webhooks. port 0: it has none."""

    def __init__(self, app: ASGIApp, port: int) -> None:
        self._app, self._port = app, port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_own = self._port and scope["type"] == "http" and (scope.get("server") or ("", 0))[1] == self._port
        if is_own and scope["path"] != "/" and not scope["path"].startswith(("/api/", "/v1/cvat/")):
            answer = JSONResponse({"error": "Only CVAT's calls are answered on this port."}, 404)
            await answer(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _parsed(body: bytes) -> dict[str, Any]:
    if body.count(b",") + body.count(b"[") + body.count(b"{") > MOST_MARKS:
        raise Invalid("The call holds far more than one image and its shapes.")
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Invalid("The call is not JSON.") from error
    if not isinstance(asked, dict):
        raise Invalid("The call must be a JSON object with an image.")
    return asked


def _image(asked: dict[str, Any]) -> str:
    image = asked.get("image")
    if not isinstance(image, str) or not image:
        raise Invalid("The call has no 'image': it must be a file in base64.")
    return image


def _threshold(asked: dict[str, Any]) -> float | None:
    """None: as the card says. CVAT leaves a threshold of 0 away."""
    given = asked.get("threshold")
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 <= given <= 1:
        raise Invalid(f"The threshold must be a number of 0 to 1, got {str(given)[:40]!r}.")
    return float(given)


def _replace(file: Path, text: str) -> None:
    """Several service processes may write it at once: each file is whole."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
    with os.fdopen(handle, "w") as stream:
        stream.write(text)
    os.replace(name, file)


def _one_line(sentence: str) -> str:
    return "".join(sign if " " <= sign <= "~" else "?" for sign in sentence)[:400]

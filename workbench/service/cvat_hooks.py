"""CVAT's messages: one address per data set, no token but a signature; and the looks that find what was lost."""

from __future__ import annotations

import asyncio
import logging

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from workbench.errors import WorkbenchError
from workbench.hooks import SIGNATURE
from workbench.service.looks import Looks
from workbench.service.refusals import Refusal
from workbench.steps.cvat_pull import NotSigned, look, receive
from workbench.wiring import Workbench

LOG = logging.getLogger(__name__)
# CVAT's messages about a job have about 1.5 kB (recorded: h_webhook_deliveries).
MOST_BYTES = 256 << 10


class CvatHooks(Looks):
    """The endpoint, and the looks at CVAT, when the settings name one."""

    def __init__(self, workbench: Workbench) -> None:
        config = workbench.config
        every_s = min(5.0, config.cvat_look_s) if config.cvat_url and config.cvat_look_s > 0 else 0
        super().__init__("CVAT", every_s)
        self._workbench = workbench

    def router(self) -> APIRouter:
        router = APIRouter()

        @router.post("/v1/cvat/webhooks/{dataset}")
        async def take(request: Request, dataset: str) -> JSONResponse:
            """What CVAT sends when somebody worked on a job; answered before anything is done about it."""
            body = await _body(request)
            try:
                return JSONResponse(await asyncio.to_thread(
                    receive, dataset, body, request.headers.get(SIGNATURE, ""), hooks=self._workbench.hooks,
                    submit=self.submit))
            except NotSigned as error:
                LOG.warning("A message for %r from %s was not signed with our secret.", dataset[:64],
                            request.client.host if request.client else "")
                raise Refusal(401, str(error)) from error

        return router

    def submit(self, dataset: str, token: str) -> str:
        return self._workbench.jobs.submit("pull", {"dataset": dataset}, person=self._workbench.config.person, key=token)

    def look_once(self) -> None:
        """One look at every data set whose turn it is; a failure is told in the log and costs the others nothing."""
        every_s = self._workbench.config.cvat_look_s
        for dataset in self._workbench.cvat.datasets():
            if self.is_ending or not self._workbench.hooks.looks(dataset, every_s):
                continue
            try:
                look(dataset, server=self._workbench.cvat, hooks=self._workbench.hooks, submit=self.submit)
            except WorkbenchError as error:
                LOG.warning("The look at %s in CVAT failed: %s", dataset, error)


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MOST_BYTES:
            raise Refusal(413, f"A message of CVAT has at most {MOST_BYTES >> 10} KiB.", {"Connection": "close"})
    return bytes(body)

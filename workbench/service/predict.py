"""POST /v1/predict: images in, objects out; callers share batches, and tracks go on between requests."""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Annotated, Any

import cv2
import numpy as np
from fastapi import APIRouter, Query, Request, Response
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from workbench.annotation import DECIMALS
from workbench.boxes import Detections
from workbench.errors import Conflict, Invalid, NotFound, WorkbenchError
from workbench.formats.limits import Limits
from workbench.inference.detector import DEFAULT_CONFIDENCE, Detector, OpenBackend, Prepared
from workbench.inference.tracking import Tracker
from workbench.model import ModelCard
from workbench.service.batching import Batcher, Call, Seen
from workbench.service.metrics import Metrics
from workbench.service.reading import Reader, Sent, Settings, prepared
from workbench.service.refusals import Busy
from workbench.service.schema import REQUEST_BODY, RESPONSES, Predictions
from workbench.steps.quantize import open_annotator
from workbench.wiring import Workbench

PATH = "/v1/predict"
# What ByteTrack keeps a track alive with (byte_tracker.py: inds_low = scores > 0.1).
LOW_CONFIDENCE = 0.1
# Cameras whose tracks are kept; the one not seen for longest is forgotten for the next.
MOST_STREAMS = 1000
FIRST_GAP_S = 1 / 25
CHOICES = 20
# What nginx calls a caller who has gone; nobody reads it, the metrics count it.
GONE = 499


class Predict:
    """The endpoint with its threads; `close` finishes what was taken."""

    def __init__(self, workbench: Workbench, metrics: Metrics, limits: Limits = Limits()) -> None:
        cv2.setNumThreads(1)  # its threads would only take cores from those that decode
        config = workbench.config
        self._workbench, self._metrics, self._limits = workbench, metrics, limits
        self._batcher = Batcher(
            self._open_model,
            metrics,
            queue=config.predict_queue,
            models=config.predict_models,
            decoders=config.worker_threads,
            gather_s=config.predict_batch_ms / 1000,
        )
        self._reader = Reader(config.predict_body_mb << 20, config.predict_queue)
        self._streams: OrderedDict[tuple[Any, ...], _Stream] = OrderedDict()

    def router(self) -> APIRouter:
        router = APIRouter()

        @router.post(PATH, response_model=Predictions, responses=RESPONSES, openapi_extra={"requestBody": REQUEST_BODY})
        async def predict(request: Request, query: Annotated[Settings, Query()]) -> Response:
            """Objects in one image or several: files of a multipart form, the bytes of one image, or JSON with base64.

            Images of several callers run in one batch. An image of several that cannot be read has its own `error`;
            when it is the only one the answer is 422.
            """
            began = time.monotonic()
            try:
                async with self._reader.read(request, query, self._batcher.retry_after_s) as sent:
                    return await self._answer(request, sent, began)
            except Busy as error:
                self._metrics.rejected.labels(error.full).inc()
                raise
            except ClientDisconnect:
                return Response(status_code=GONE)

        return router

    def close(self) -> None:
        self._batcher.close()

    async def _answer(self, request: Request, sent: Sent, began: float) -> Response:
        settings = sent.settings
        ref = await asyncio.to_thread(self._chosen, settings)
        request.state.model = ref
        if settings.stream is None:
            call, seen = await self.look(request, ref, sent, settings.confidence)
            ids: list[np.ndarray | None] = [None] * len(seen)
        else:
            stream = self._stream(ref, settings)
            async with stream.lock:  # a stream's images are tracked in the order in which they came
                lowest = LOW_CONFIDENCE if settings.confidence is None else min(LOW_CONFIDENCE, settings.confidence)
                call, seen = await self.look(request, ref, sent, lowest)
                seen, ids = await asyncio.to_thread(stream.track, call.card, seen, began)
        body = await asyncio.to_thread(_body, call, sent, seen, ids, began)
        return Response(body, media_type="application/json")

    async def look(self, request: Request, ref: str, sent: Sent, confidence: float | None) -> tuple[Call, list[Seen]]:
        """What one model sees in the images that were sent, all or none: the request's body must have been read.

        confidence  least confidence; None: as the card says. Raises Busy when there is no room, Invalid when the only
        image cannot be read or the model may not annotate, ClientDisconnect when the caller goes away.
        """
        def prepare(detector: Detector, index: int) -> Prepared:
            return prepared(detector, sent, index, self._limits)

        call = self._batcher.submit(ref, len(sent.images), prepare, confidence)
        done, gone = asyncio.wrap_future(call.future), asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait((done, gone), return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                raise ClientDisconnect
            seen = done.result()
        finally:
            gone.cancel()
            self._batcher.drop(call)
        if len(seen) == 1 and seen[0].error is not None:
            raise seen[0].error
        return call, seen

    def _chosen(self, settings: Settings) -> str:
        """The reference of the model to look with. Raises NotFound or Invalid, naming the choices."""
        models = self._workbench.models
        ref = settings.model or (self._workbench.records.deployed(settings.dataset) if settings.dataset else None)
        if ref:
            return models.card(ref).ref
        refs = models.refs()
        choices = ", ".join(refs[:CHOICES]) + (f" and {len(refs) - CHOICES} more" if len(refs) > CHOICES else "")
        if settings.dataset:
            raise NotFound(
                f"Data set {settings.dataset!r} has no deployed model. Deploy one, or name it with 'model': "
                f"{choices or 'none is registered'}."
            )
        raise Invalid(
            "Say which model looks: model=NAME@VERSION, or dataset=NAME for the one deployed for it. "
            f"Registered are: {choices or 'none'}."
        )

    @contextmanager
    def _open_model(self, ref: str) -> Iterator[tuple[Detector, int]]:
        models, open_backend = self._workbench.models, self._workbench.open_backend
        with ExitStack() as stack:

            def opened(opening: OpenBackend, batch: int) -> Detector:
                return stack.enter_context(
                    open_annotator(
                        ref, models=models, open_backend=opening, certificates=self._workbench.certificates, batch=batch
                    )
                )

            # Opened as it comes first: a model that may not look is refused before it is measured.
            detector = opened(open_backend, 1)
            plan = self._workbench.plan_for(models.card(ref), models.folder(ref))
            if (plan.batch, plan.streams) != (1, detector.streams):
                stack.close()
                detector = opened(plan.opening(open_backend), plan.batch)
            yield detector, plan.batch

    def _stream(self, ref: str, settings: Settings) -> _Stream:
        if self._workbench.config.service_workers > 1:
            raise Conflict(
                "Tracks are kept in one process and this service has several. Set service_workers to 1, or "
                "ask without 'stream'."
            )
        key = (ref, settings.stream, settings.confidence)
        stream = self._streams.pop(key, None) or _Stream(settings.confidence)
        self._streams[key] = stream
        idle = [one for one, kept in self._streams.items() if not kept.lock.locked() and kept is not stream]
        for one in idle[: max(0, len(self._streams) - MOST_STREAMS)]:
            del self._streams[one]
        return stream


class Counted:
    """Middleware: counts every answer of predict, whoever gave it, by model and code."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != PATH or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        state, code = scope.setdefault("state", {}), 500

        async def counted(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, counted)
        finally:
            self._metrics.requests.labels(state.get("model", ""), code).inc()


class _Stream:
    """A camera's tracks, as one model sees them."""

    def __init__(self, confidence: float | None) -> None:
        self.lock = asyncio.Lock()
        self._confidence, self._tracker = confidence, None
        self._time: float | None = None

    def track(self, card: ModelCard, seen: list[Seen], now: float) -> tuple[list[Seen], list[np.ndarray | None]]:
        """What is sure enough to be told, and the track of each object, 0 for none yet.

        Images of one request count as taken at even times since the request before.
        """
        if card.task == "tags":
            return seen, [None] * len(seen)
        high = least_of(card, self._confidence)
        if self._tracker is None:
            self._tracker, self._time = Tracker(high), now - FIRST_GAP_S * len(seen)
        told, ids = [], []
        for time_s, one in zip(np.linspace(self._time, now, len(seen) + 1)[1:], seen, strict=True):
            if one.found is None:
                told.append(one)
                ids.append(None)
                continue
            tracks = self._tracker.update(one.found, float(time_s))
            # A track seen in this image carries the very box that was found.
            known = {
                (*xyxy, class_id): track
                for xyxy, class_id, track in zip(tracks.xyxy.tolist(), tracks.class_id.tolist(), tracks.id.tolist())
            }
            sure = np.flatnonzero(one.found.confidence >= high[one.found.class_id])
            told.append(replace(one, found=one.found[sure]))
            ids.append(
                np.array(
                    [
                        known.get((*xyxy, class_id), 0)
                        for xyxy, class_id in zip(told[-1].found.xyxy.tolist(), told[-1].found.class_id.tolist())
                    ],
                    np.int64,
                )
            )
        self._time = now
        return told, ids


def least_of(card: ModelCard, confidence: float | None) -> np.ndarray:
    """(C,) least confidence by class: the one asked for, or the card's."""
    if confidence is not None:
        return np.full(len(card.labels), confidence, np.float32)
    least = np.full(len(card.labels), card.decoder.get("confidence", DEFAULT_CONFIDENCE), np.float32)
    for label, value in card.decoder.get("confidence_by_label", {}).items():
        least[card.labels.class_id(label)] = value
    return least


async def _gone(request: Request) -> None:
    """Returns when the caller has gone. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _body(call: Call, sent: Sent, seen: list[Seen], ids: list[np.ndarray | None], began: float) -> bytes:
    """Predictions as JSON; by hand, since validating a thousand boxes takes longer than finding them."""
    card, report = call.card, call.report
    images = []
    for (name, _), one, tracks in zip(sent.images, seen, ids, strict=True):
        width, height = one.size or (None, None)
        images.append(
            {
                "name": name,
                "width": width,
                "height": height,
                "objects": [] if one.found is None else _objects(card, one.found, tracks, sent.settings.max_detections),
                "error": None if one.error is None else _sentence(one.error),
                **{f"{stage}_ms": _ms(seconds) for stage, seconds in one.seconds.items()},
            }
        )
    answer = {
        "model": card.ref,
        "task": card.task,
        **vars(report),
        "total_ms": _ms(time.monotonic() - began),
        "images": images,
    }
    return json.dumps(answer, allow_nan=False).encode()


def _objects(card: ModelCard, found: Detections, tracks: np.ndarray | None, most: int | None) -> list[dict[str, Any]]:
    objects = []
    for index in np.argsort(-found.confidence, kind="stable")[:most].tolist():
        polygon = None if found.polygons is None else found.polygons[index]
        objects.append(
            {
                "label": card.labels.labels[found.class_id[index]],
                "xyxy": None if card.task == "tags" else [round(float(value), DECIMALS) for value in found.xyxy[index]],
                "confidence": round(float(found.confidence[index]), 4),
                "track": int(tracks[index]) or None if tracks is not None else None,
                "polygon": None
                if polygon is None
                else [[round(float(value), DECIMALS) for value in point] for point in polygon],
            }
        )
    return objects


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, WorkbenchError) else "The service failed at this image; its log says how."


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 2)

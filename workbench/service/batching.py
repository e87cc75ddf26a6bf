"""Images of many callers onto few models: a bounded queue, fair between callers, gathered into batches."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from workbench.boxes import Detections
from workbench.errors import Unavailable, WorkbenchError
from workbench.inference.detector import Detector, Prepared
from workbench.model import ModelCard
from workbench.ports import BackendReport
from workbench.service.metrics import Metrics
from workbench.service.refusals import Busy

LOG = logging.getLogger(__name__)
# How much the newest batch counts in the measured time of an image: older ones fade within about ten batches.
NEWEST = 0.2
LONGEST_RETRY_S = 120
STAGES = ("decode", "wait", "infer")

# Gives the opened detector of a model reference, and how many images a run of it should take at most.
OpenModel = Callable[[str], AbstractContextManager[tuple[Detector, int]]]
# Gives the numbered image of a call as the detector takes it.
Prepare = Callable[[Detector, int], Prepared]


@dataclass(frozen=True)
class Seen:
    """What became of one image: `found`, or the `error`. size is (width, height), upright; seconds by stage."""

    size: tuple[int, int] | None
    found: Detections | None
    error: Exception | None
    seconds: dict[str, float]


@dataclass(eq=False)
class Call:
    """One caller's images for one model; `future` gives a list of Seen in their order, or raises what stopped them all.

    prepare       called in a thread; raises Invalid for an image that cannot be read
    confidence    least confidence; None: as the model's card says
    card, report  of the opened model, once there is a result
    error         what stopped them all
    """

    ref: str
    prepare: Prepare
    confidence: float | None
    seen: list[Seen | None]
    left: int
    future: Future[list[Seen]] = field(default_factory=Future)
    is_dropped: bool = False
    error: Exception | None = None
    card: ModelCard | None = None
    report: BackendReport | None = None
    lane: _Lane | None = None


@dataclass(eq=False)
class _Item:
    call: Call
    index: int
    since: float
    prepared: Prepared | None = None
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))


class _FairQueue:
    """Takes one image of each call in turn, so that a caller with one image does not wait behind another's hundred."""

    def __init__(self) -> None:
        self._calls: OrderedDict[Call, deque[_Item]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, item: _Item) -> None:
        self._calls.setdefault(item.call, deque()).append(item)
        self._count += 1

    def take(self, most: int) -> list[_Item]:
        """Up to `most` items that all ask for one confidence: that of the call whose turn it is."""
        taken: list[_Item] = []
        is_more = True
        while is_more and len(taken) < most:
            is_more = False
            for call in list(self._calls):
                if len(taken) < most and (not taken or call.confidence == taken[0].call.confidence):
                    taken.append(self._calls[call].popleft())
                    self._calls.move_to_end(call)
                    is_more = True
                    if not self._calls[call]:
                        del self._calls[call]
        self._count -= len(taken)
        return taken

    def remove(self, call: Call) -> int:
        gone = len(self._calls.pop(call, ()))
        self._count -= gone
        return gone


class _Lane:
    """One model: opened by a thread, run by as many as its backend serves at once."""

    def __init__(self, ref: str, lock: threading.RLock) -> None:
        self.ref = ref
        self.opened: AbstractContextManager | None = None
        self.detector: Detector | None = None
        self.threads: list[threading.Thread] = []
        self.calls = self.decoding = self.busy = self.running = 0
        self.streams = self.most = 1
        self.used_at = time.monotonic()
        self.unopened: list[_Item] = []
        self.ready, self.changed = _FairQueue(), threading.Condition(lock)
        self.is_closing = False


class Batcher:
    """Decodes, gathers and infers in threads of its own.

    open_model  its errors become those of the calls that wait for the model
    queue       images held at once, from being taken to being done; beyond that calls are refused as Busy
    models      kept open at once; the idle one that was not used for longest is closed for the next
    decoders    threads that decode images, each holding one decoded image
    gather_s    how long a batch waits for images that are being decoded for the same model
    """

    def __init__(
        self, open_model: OpenModel, metrics: Metrics, *, queue: int, models: int, decoders: int, gather_s: float
    ) -> None:
        self.queue = queue
        self._open_model, self._metrics, self._most_models, self._gather_s = open_model, metrics, models, gather_s
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)  # something to decode, something done
        self._opening = threading.Lock()
        self._to_decode, self._lanes = _FairQueue(), {}
        self._free, self._is_closed = queue, False
        self._image_s = {"decode": 0.0, "infer": 0.0}
        self._decoder_count, self._decoders = decoders, []

    def submit(self, ref: str, images: int, prepare: Prepare, confidence: float | None = None) -> Call:
        """Takes all images of a call or none: raises Busy when there is no room, Unavailable when closed."""
        with self._lock:
            if self._is_closed:
                raise Unavailable("The service is ending. Ask again when it is back.")
            if images > self._free:
                raise Busy(
                    f"{self.queue - self._free} of {self.queue} places for images are taken and this request "
                    f"needs {images}.",
                    self.retry_after_s(),
                    full="queue",
                )
            if not self._decoders:
                self._decoders = [
                    _started(f"decode-{number}", self._decode_images) for number in range(self._decoder_count)
                ]
            lane = self._lanes.get(ref)
            if lane is None:
                lane = self._lanes[ref] = _Lane(ref, self._lock)
                _started(f"open-{ref}", self._open, lane)
            call = Call(ref, prepare, confidence, [None] * images, images, lane=lane)
            call.future.set_running_or_notify_cancel()  # a waiter that gives up cannot mark it cancelled then
            lane.calls += 1
            lane.used_at = time.monotonic()
            self._take(images)
            for index in range(images):
                self._feed(lane, _Item(call, index, lane.used_at))
            return call

    def drop(self, call: Call) -> None:
        """Nobody waits for it any more: what has not begun never will. Nothing happens when all is done."""
        with self._lock:
            if call.is_dropped or not call.left:
                return
            call.is_dropped, lane = True, call.lane
            undecoded, unopened = self._to_decode.remove(call), len(lane.unopened)
            lane.unopened = [item for item in lane.unopened if item.call is not call]
            lane.decoding -= undecoded
            gone = undecoded + unopened - len(lane.unopened) + lane.ready.remove(call)
            if call.card is not None:
                self._metrics.images.labels(call.ref, "dropped").inc(gone)
            self._done(call, gone)

    def retry_after_s(self) -> int:
        """When the images held now will be done, at the rate measured: seconds, at least 1."""
        with self._lock:
            seconds = (self.queue - self._free) * sum(self._image_s.values())
        return min(LONGEST_RETRY_S, max(1, math.ceil(seconds)))

    def close(self, timeout_s: float = 30) -> None:
        """Takes no more, finishes what it holds, closes the models."""
        end = time.monotonic() + timeout_s
        with self._lock:
            self._is_closed = True
            self._changed.wait_for(lambda: self._free == self.queue, timeout_s)
            threads = [*self._decoders, *(thread for lane in self._lanes.values() for thread in lane.threads)]
            for lane in list(self._lanes.values()):
                self._close(lane)
            self._changed.notify_all()
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _open(self, lane: _Lane) -> None:
        with self._opening:  # one at a time: opening takes all cores
            try:
                opened = self._open_model(lane.ref)
                detector, batch = opened.__enter__()
            except Exception as error:
                if not isinstance(error, WorkbenchError):
                    LOG.error("Model %s cannot be opened.", lane.ref, exc_info=error)
                self._abandon(lane, error)
                return
        with self._lock:
            others = sorted((one for one in self._lanes.values() if one.detector), key=lambda one: one.used_at)
            idle, too_many = [one for one in others if not one.calls], len(others) + 1 - self._most_models
            if too_many <= len(idle):
                for one in idle[: max(0, too_many)]:
                    self._close(one)
                lane.opened, lane.detector, lane.streams = opened, detector, max(1, detector.streams)
                lane.most = batch if detector.batch_is_dynamic else 1
                items, lane.unopened, lane.running = lane.unopened, [], lane.streams
                for item in items:
                    self._feed(lane, item)
                lane.threads = [
                    _started(f"infer-{lane.ref}-{number}", self._infer_batches, lane) for number in range(lane.streams)
                ]
                return
        opened.__exit__(None, None, None)
        self._abandon(
            lane,
            Busy(
                f"All {self._most_models} models that may be open are in use.",
                self.retry_after_s(),
                full="models",
                code=503,
            ),
        )

    def _abandon(self, lane: _Lane, error: Exception) -> None:
        with self._lock:
            del self._lanes[lane.ref]
            for item in lane.unopened:
                item.call.error = error
                self._done(item.call, 1)

    def _close(self, lane: _Lane) -> None:
        lane.is_closing = True
        self._lanes.pop(lane.ref, None)
        lane.changed.notify_all()

    def _feed(self, lane: _Lane, item: _Item) -> None:
        if lane.detector is None:
            lane.unopened.append(item)
            return
        item.call.card, item.call.report = lane.detector.card, lane.detector.report
        lane.decoding += 1
        self._to_decode.put(item)
        self._changed.notify_all()

    def _decode_images(self) -> None:
        while True:
            with self._lock:
                self._changed.wait_for(lambda: len(self._to_decode) or (self._is_closed and self._free == self.queue))
                if not len(self._to_decode):
                    return
                (item,) = self._to_decode.take(1)
            started, error, lane = time.monotonic(), None, item.call.lane
            item.seconds["wait"] += started - item.since
            try:
                item.prepared = item.call.prepare(lane.detector, item.index)
            except Exception as failure:
                error = failure
            item.since = time.monotonic()
            item.seconds["decode"] = item.since - started
            with self._lock:
                lane.decoding -= 1
                self._measure("decode", (item.since - started) / len(self._decoders))
                if error is None and not item.call.is_dropped:
                    lane.ready.put(item)
                else:
                    self._finish(item, None, error)
                lane.changed.notify_all()

    def _infer_batches(self, lane: _Lane) -> None:
        while True:
            with self._lock:
                lane.changed.wait_for(lambda: len(lane.ready) or lane.is_closing)
                if not len(lane.ready):
                    lane.running -= 1
                    is_last = not lane.running
                    break
                if lane.decoding:
                    lane.changed.wait_for(lambda: not lane.decoding or len(lane.ready) >= lane.most, self._gather_s)
                # What is ready is shared among the streams that are free, so that none idles beside a full batch.
                items = lane.ready.take(min(lane.most, math.ceil(len(lane.ready) / (lane.streams - lane.busy))))
                if not items:
                    continue
                lane.busy += 1
            started = time.monotonic()
            results = self._run(lane.detector, items)
            seconds = time.monotonic() - started
            self._metrics.batch.labels(lane.ref).observe(len(items))
            with self._lock:
                lane.busy -= 1
                self._measure("infer", seconds / len(items) / lane.streams)
                for item, result in zip(items, results, strict=True):
                    item.seconds["wait"] += started - item.since
                    item.seconds["infer"] = seconds
                    is_found = isinstance(result, Detections)
                    self._finish(item, result if is_found else None, None if is_found else result)
        if is_last:
            lane.opened.__exit__(None, None, None)

    def _run(self, detector: Detector, items: list[_Item]) -> list[Detections | Exception]:
        confidence = items[0].call.confidence
        try:
            view = detector if confidence is None else detector.at(confidence)
            return view.detect_prepared([item.prepared for item in items])
        except Exception as error:
            if len(items) == 1:
                return [error]
        # One image may have brought the whole batch down (a NaN in its outputs); the others are other callers'.
        return [result for item in items for result in self._run(detector, [item])]

    def _finish(self, item: _Item, found: Detections | None, error: Exception | None) -> None:
        call = item.call
        if error is not None and not isinstance(error, WorkbenchError):
            LOG.error("Image %d for %s failed.", item.index, call.ref, exc_info=error)
        size = None if item.prepared is None else item.prepared.letterbox.image_size
        call.seen[item.index] = Seen(size, found, error, item.seconds)
        self._metrics.images.labels(
            call.ref, "dropped" if call.is_dropped else "ok" if error is None else "failed"
        ).inc()
        for stage, seconds in item.seconds.items():
            self._metrics.seconds.labels(call.ref, stage).observe(seconds)
        self._done(call, 1)

    def _done(self, call: Call, images: int) -> None:
        call.left -= images
        self._take(-images)
        if call.left:
            return
        call.lane.calls -= 1
        if call.error is not None:
            call.future.set_exception(call.error)
        else:
            call.future.set_result(call.seen)

    def _take(self, images: int) -> None:
        self._free -= images
        self._metrics.queue.set(self.queue - self._free)
        if self._free == self.queue:
            self._changed.notify_all()

    def _measure(self, stage: str, seconds: float) -> None:
        before = self._image_s[stage]
        self._image_s[stage] = seconds if not before else before + NEWEST * (seconds - before)


def _started(name: str, work: Callable[..., None], *given: object) -> threading.Thread:
    thread = threading.Thread(target=work, args=given, name=name, daemon=True)
    thread.start()
    return thread

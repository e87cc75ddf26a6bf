"""Many cameras onto one model: a thread and a slot of one frame per camera, and a fair choice among the slots."""

from __future__ import annotations

import heapq
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from workbench.errors import Invalid, WorkbenchError
from workbench.inference.cameras import Camera, check_cameras
from workbench.inference.video import TIMEOUT_S, Grabbed, Source, open_source

BACKOFF_S, MAX_BACKOFF_S = 1.0, 60.0
# Served frames whose latency is remembered, for all cameras together.
REMEMBERED = 2000
JOIN_S = 3.0
# A frame may be this share of a step early: clocks tremble, and seconds are rounded.
EARLY = 0.05
# A camera that sends, but no whole frame for so long, is shown as down.
SILENT_S = 2 * TIMEOUT_S


@dataclass(frozen=True)
class CameraStatus:
    """How a camera stands.

    state     "opening", "up", "down" (tried again by itself), "ended" (a file), "failed" (for good)
    error     why it is down or failed, without secrets
    arrived   frames that were due by the camera's rate; served: those taken by the model; dropped: those that a newer
              one replaced before the model came to them; corrupt: those that could not be decoded
    """

    name: str
    state: str
    error: str = ""
    arrived: int = 0
    served: int = 0
    dropped: int = 0
    corrupt: int = 0


@dataclass(frozen=True)
class Arrived:
    """A camera's newest frame, taken for the model; `Streams.done` gives the camera its next turn."""

    camera: Camera
    index: int
    time: float
    seconds: float
    image: np.ndarray
    arrived: float


class Streams:
    """Reads all cameras in threads of their own; a context manager.

    open_source  Camera -> Source; another one than video's own for tests and simulations
    clock        seconds that never go back

    Memory holds at most one frame per camera that waits and one per worker. Fair by stride scheduling (Waldspurger,
    1995): of the cameras that have a frame, the one that had the least for its rate is next; in overload each gets
    its share, and one that was away is owed nothing. Of one camera only one frame is under work at a time, so its
    frames stay in order.
    """

    def __init__(self, cameras: Sequence[Camera], open_source: Callable[[Camera], Source] = open_source,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.cameras = check_cameras(tuple(cameras))
        self._open, self._clock = open_source, clock
        self._slots = [_Slot(camera, index) for index, camera in enumerate(self.cameras)]
        self._ready: list[tuple[float, int]] = []
        self._changed = threading.Condition(threading.Lock())
        self._stop = threading.Event()
        self._pass = 0.0
        self._latencies: deque[float] = deque(maxlen=REMEMBERED)
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Streams:
        for slot in self._slots:
            thread = threading.Thread(target=self._follow, args=(slot,), name=f"camera {slot.camera.name}", daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        for slot in self._slots:
            slot.taken.set()
        # A thread that waits for a camera's network ends at its timeout; nobody waits for it here.
        until = time.monotonic() + JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    @property
    def is_over(self) -> bool:
        """True when every camera has ended or failed for good and nothing waits."""
        with self._changed:
            return all(slot.state in ("ended", "failed") and slot.waiting is None and not slot.is_busy
                       for slot in self._slots)

    def take(self, timeout_s: float = 0.5) -> Arrived | None:
        """The frame whose turn it is, decoded; None when there is none in time. Every one taken must be `done`."""
        with self._changed:
            if not self._ready:
                self._changed.wait(timeout_s)
            if not self._ready or self._stop.is_set():
                return None
            self._pass, index = heapq.heappop(self._ready)
            slot = self._slots[index]
            grabbed, image, arrived = slot.waiting
            slot.waiting, slot.is_busy = None, True
            slot.served_pass = self._pass + 1 / slot.camera.rate
        try:
            image = image if image is not None else grabbed.decode()
        except Exception:  # whatever a decoder of damaged bytes raises: the frame is counted, the camera goes on
            image = None
        if image is None:
            with self._changed:
                slot.corrupt += 1
            self._free(slot)
            return None
        with self._changed:
            slot.served += 1
        return Arrived(slot.camera, index, grabbed.time, grabbed.seconds, image, arrived)

    def done(self, frame: Arrived) -> float:
        """Gives the camera its next turn; returns the seconds from the frame's arrival to now."""
        latency = self._clock() - frame.arrived
        self._latencies.append(latency)
        self._free(self._slots[frame.index])
        return latency

    def latency_s(self, share: float = 0.95) -> float:
        """That quantile of the latency of the last REMEMBERED frames."""
        found = sorted(self._latencies.copy())
        return found[min(len(found) - 1, int(share * len(found)))] if found else 0.0

    def status(self) -> list[CameraStatus]:
        with self._changed:
            late = self._clock() - SILENT_S
            return [CameraStatus(slot.camera.name, *slot.stands(late), slot.arrived, slot.served, slot.dropped,
                                 slot.corrupt) for slot in self._slots]

    def _free(self, slot: _Slot) -> None:
        with self._changed:
            slot.is_busy = False
            if slot.waiting is not None:
                self._enter(slot)
        slot.taken.set()

    def _enter(self, slot: _Slot) -> None:
        # A camera that was away starts where the others are, instead of being owed its absence.
        heapq.heappush(self._ready, (max(slot.served_pass, self._pass), slot.index))
        self._changed.notify()

    def _follow(self, slot: _Slot) -> None:
        """A camera's thread: opens it, reads it, and again with growing pauses when it fails."""
        pause = BACKOFF_S
        while not self._stop.is_set():
            served_before = slot.arrived
            try:
                with self._open(slot.camera) as source:
                    self._read(slot, source)
                self._say(slot, "ended")
                return
            except Invalid as error:
                self._say(slot, "failed", str(error))
                return
            except WorkbenchError as error:
                self._say(slot, "down", str(error))
            except Exception as error:  # a defect of one camera's reader must not take its slot away in silence
                self._say(slot, "down", f"Camera {slot.camera.name}: unforeseen {type(error).__name__}.")
            if slot.arrived > served_before:
                pause = BACKOFF_S
            # Spread, so that 200 cameras behind one switch do not all come back in the same second.
            self._stop.wait(pause * random.uniform(0.5, 1.0))
            pause = min(MAX_BACKOFF_S, pause * 2)

    def _say(self, slot: _Slot, state: str, error: str = "") -> None:
        with self._changed:
            slot.state, slot.error = state, error
            self._changed.notify_all()

    def _read(self, slot: _Slot, source: Source) -> None:
        is_paced = not source.is_live and not slot.camera.full_speed
        step, due, began = 1 / slot.camera.rate, -float("inf"), self._clock()
        while not self._stop.is_set() and (grabbed := source.grab()) is not None:
            if is_paced and (early := began + grabbed.seconds - self._clock()) > 0:
                self._stop.wait(early)
            slot.heard = self._clock()
            if slot.state != "up":
                self._say(slot, "up")
            is_due = grabbed.seconds >= due - EARLY * step
            if not is_due and not (source.is_lazy and slot.waiting is not None):
                continue
            if is_due:
                # The grid of due times is kept, so that a camera of 25 fps and a rate of 10 gives 10, not 8.3.
                due = due + step if grabbed.seconds - due < 2 * step else grabbed.seconds + step
            if not source.is_live and slot.camera.full_speed:
                self._wait_until_taken(slot)
            image = None
            if not source.is_lazy and (image := grabbed.decode()) is None:
                with self._changed:
                    slot.arrived += is_due
                    slot.corrupt += 1
                continue
            self._put(slot, grabbed, image, is_due)
        if not source.is_live:
            self._wait_until_taken(slot)

    def _wait_until_taken(self, slot: _Slot) -> None:
        while not self._stop.is_set():
            with self._changed:
                if slot.waiting is None and not slot.is_busy:
                    return
                slot.taken.clear()
            slot.taken.wait(1.0)

    def _put(self, slot: _Slot, grabbed: Grabbed, image: np.ndarray | None, is_due: bool) -> None:
        with self._changed:
            is_new = slot.waiting is None
            if is_new and not is_due:
                return  # it was taken a moment ago
            slot.arrived += is_due
            # A fresher frame in place of one that only waited its turn is no loss; one that was due itself is.
            slot.dropped += is_due and not is_new
            slot.waiting = (grabbed, image, self._clock())
            if is_new and not slot.is_busy:
                self._enter(slot)


class _Slot:
    """What is known of one camera; guarded by the lock of Streams."""

    def __init__(self, camera: Camera, index: int) -> None:
        self.camera, self.index = camera, index
        self.state, self.error, self.heard = "opening", "", 0.0
        self.waiting: tuple[Grabbed, np.ndarray | None, float] | None = None
        self.is_busy = False
        self.taken = threading.Event()
        self.served_pass = 0.0
        self.arrived = self.served = self.dropped = self.corrupt = 0

    def stands(self, late: float) -> tuple[str, str]:
        """State and error; late: heard from before that, a live camera counts as down."""
        if self.state == "up" and self.heard < late and not self.camera.is_file:
            return "down", f"Camera {self.camera.name} at {self.camera.shown} sends no whole frame."
        return self.state, self.error

"""Watch: cameras onto one model; what the false-alarm filter lets through becomes frames of a data set."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from workbench.errors import Cancelled, Invalid, Unavailable, WorkbenchError
from workbench.inference.alarms import Event, Scene
from workbench.inference.cameras import Camera
from workbench.inference.detector import DEFAULT_CONFIDENCE, Detector
from workbench.inference.streams import Arrived, CameraStatus, Streams
from workbench.inference.video import Source, open_source
from workbench.model import ModelCard
from workbench.steps.spool import Spool

# A box below the model's confidence may keep a track alive down to this share of it. ByteTrack's 0.1 below its 0.5 would
# be 0.2, but cards' confidences are chosen on labelled data and lie lower.
LOW_SHARE = 0.4
BATCH, BATCH_S = 50, 300.0
RETRY_S, MAX_RETRY_S = 5.0, 300.0
# So many frames in a row that the model fails on mean that the model is broken, not the frames.
FAILURES = 20
POLL_S, UPLOADS = 1.0, 5

# Brings a folder of frames into a data set before it returns; raises Cancelled when the event is set first.
Deliver = Callable[[Path, threading.Event], None]


@dataclass(frozen=True)
class WatchReport:
    """What a watch did. skipped: reason -> frames of events that were not kept; refused: reason -> tracks that raised
    no event."""

    cameras: int
    served: int
    dropped: int
    corrupt: int
    events: int
    kept: int
    waiting: int
    failed: int = 0
    latency_ms_p95: float = 0.0
    skipped: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def sure_scores(card: ModelCard) -> np.ndarray:
    """(C,) the confidence from which the card counts a box of each label."""
    if card.task == "tags":
        raise Invalid(f"{card.ref} tags whole frames; watching needs a model that draws boxes.")
    by_label = card.decoder.get("confidence_by_label", {})
    least = card.decoder.get("confidence", DEFAULT_CONFIDENCE)
    return np.array([by_label.get(label, least) for label in card.labels.labels], float)


def low_thresholds(card: ModelCard) -> dict[str, Any]:
    """Thresholds of a Detector whose boxes are to be tracked: low scores too."""
    low = sure_scores(card) * LOW_SHARE
    return {"confidence": float(low.min()), "confidence_by_label": dict(zip(card.labels.labels, map(float, low)))}


def serve(streams: Streams, detector: Detector, scenes: Sequence[Scene],
          handle: Callable[[Arrived, list[Event]], None], *, stop: threading.Event,
          each_s: float = 1.0, say: Callable[[], None] = lambda: None) -> int:
    """Takes frames to the model, as many at once as its backend runs, until every camera has ended or `stop` is set.

    Returns on how many frames the model failed.

    detector  opened with low_thresholds; scenes: one per camera of `streams`, in their order
    handle    gets every served frame with its events, in a worker's thread
    say       called every each_s seconds, in the caller's thread

    Raises what a worker raised; a frame that the model cannot digest is counted, FAILURES in a row are its error.
    """
    lock, failures, raised, halt = threading.Lock(), [0, 0], [], threading.Event()

    def work() -> None:
        try:
            while not (stop.is_set() or halt.is_set()):
                frame = streams.take()
                if frame is None:
                    if streams.is_over:
                        return
                    continue
                try:
                    one(frame)
                finally:
                    streams.done(frame)
        except BaseException as error:
            raised.append(error)
            halt.set()

    def one(frame: Arrived) -> None:
        try:
            (found,) = detector.detect([frame.image])
        except WorkbenchError:
            with lock:
                failures[0] += 1
                failures[1] += 1
                if failures[1] >= FAILURES:
                    raise
            return
        failures[1] = 0
        handle(frame, scenes[frame.index].update(frame.image, found, frame.time, frame.seconds))

    threads = [threading.Thread(target=work, name=f"model {number}", daemon=True) for number in range(detector.streams)]
    for thread in threads:
        thread.start()
    try:
        last = time.monotonic()
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.05)
            if time.monotonic() - last >= each_s:
                last = time.monotonic()
                say()
    finally:
        halt.set()
        for thread in threads:
            thread.join()
    if raised:
        raise raised[0]
    return failures[0]


def watch(cameras: Sequence[Camera], detector: Detector, spool: Spool, deliver: Deliver, *, say: Callable[[str], None],
          stop: threading.Event, batch: int = BATCH, batch_s: float = BATCH_S,
          source: Callable[[Camera], Source] = open_source) -> WatchReport:
    """Watches until every camera has ended, `stop` is set or Ctrl-C; what waits then is delivered by the next watch.

    detector  opened with low_thresholds
    deliver   may be called again with the same folder, also after a kill: the frames are in the data set once
    say       gets a line of status every second
    batch     frames, and batch_s: seconds, after which frames that wait are delivered

    After the last frame of files what waits is delivered before this returns. Raises Invalid for a label that the
    model does not know, and what the model raises when it fails on every frame.
    """
    scenes = [Scene(camera, detector.card.labels, sure_scores(detector.card)) for camera in cameras]
    with Streams(cameras, source) as streams:
        status = _Status(streams, spool, say)

        def handle(frame: Arrived, events: list[Event]) -> None:
            if events:
                tracks = scenes[frame.index].tracks
                boxes = [(detector.card.labels.labels[class_id], tuple(map(float, xyxy)))
                         for class_id, xyxy in zip(tracks.class_id, tracks.xyxy)]
                spool.keep(frame.camera.name, events, frame.image, boxes)

        ended = threading.Event()
        courier = threading.Thread(target=_bring, args=(spool, deliver, ended, stop, say, batch, batch_s), daemon=True)
        courier.start()
        failed = 0
        try:
            failed = serve(streams, detector, scenes, handle, stop=stop, say=status)
        except KeyboardInterrupt:
            say("Ending.")
            stop.set()
        except BaseException:
            stop.set()
            raise
        finally:
            ended.set()
            _join(courier, stop)
        found = streams.status()
        return WatchReport(
            len(cameras), sum(one.served for one in found), sum(one.dropped for one in found),
            sum(one.corrupt for one in found), spool.events, spool.kept,
            spool.waiting() + sum(1 for folder in spool.batches() for _ in folder.iterdir()), failed,
            round(streams.latency_s() * 1000, 1), dict(spool.skipped),
            dict(sum((scene.refused for scene in scenes), Counter())),
            {one.name: one.error for one in found if one.error})


def upload_by(jobs: Any, dataset: str, person: str) -> Deliver:
    """Delivers by upload jobs, which the worker runs one after the other; `jobs` is a workbench.jobs.Jobs.

    A job's key is the batch's name, so that a repetition after a kill finds the job there is. A failed job is followed
    by another one, UPLOADS times in all.
    """
    attempts: Counter[str] = Counter()

    def deliver(folder: Path, stop: threading.Event) -> None:
        job_id = jobs.submit("upload", {"dataset": dataset, "source": str(folder)}, person=person,
                             key=f"watch:{folder.name}:{attempts[folder.name]}")
        while not (status := jobs.get(job_id)).is_over:
            if status.state == "queued" and not jobs.workers():
                raise Unavailable(f"Upload job {job_id} waits for a worker. Start `workbench up`.")
            if stop.wait(POLL_S):
                raise Cancelled("The watch has ended; the batch is taken up by the next one.")
        if status.state == "done":
            return
        attempts[folder.name] += 1
        ended = "failed" if status.state == "failed" else "was cancelled"
        says = f"Upload job {job_id} {ended}. {status.error}".strip()
        raise (Unavailable if status.state == "failed" and attempts[folder.name] < UPLOADS else Invalid)(says)

    return deliver


class _Status:
    """One line: what was served since the last one, and how the cameras stand."""

    def __init__(self, streams: Streams, spool: Spool, say: Callable[[str], None]) -> None:
        self._streams, self._spool, self._say = streams, spool, say
        self._served, self._at, self._states = 0, time.monotonic(), {}

    def __call__(self) -> None:
        found, now = self._streams.status(), time.monotonic()
        served = sum(one.served for one in found)
        states = Counter(one.state for one in found)
        rate, self._served, self._at = (served - self._served) / (now - self._at), served, now
        others = "".join(f", {states[state]} {state}" for state in ("opening", "down", "failed", "ended")
                         if states[state])
        self._say(f"{time.strftime('%H:%M:%S')}  {rate:6.1f} frames/s  cameras {states['up']}/{len(found)} up{others}  "
                  f"latency p95 {self._streams.latency_s() * 1000:.0f} ms  "
                  f"dropped {sum(one.dropped for one in found)}  "
                  f"corrupt {sum(one.corrupt for one in found)}  events {self._spool.events}  "
                  f"frames kept {self._spool.kept}")
        for one in found:
            self._tell(one)

    def _tell(self, one: CameraStatus) -> None:
        """A camera's fault is told when it begins, not every second."""
        if one.error != self._states.get(one.name, ""):
            self._states[one.name] = one.error
            if one.error:
                self._say(f"{one.state}: {one.error}")


def _join(courier: threading.Thread, stop: threading.Event) -> None:
    """Waits for the last batch; Ctrl-C leaves it for the next watch."""
    while courier.is_alive():
        try:
            courier.join(0.2)
        except KeyboardInterrupt:
            stop.set()


def _bring(spool: Spool, deliver: Deliver, ended: threading.Event, stop: threading.Event, say: Callable[[str], None],
           batch: int, batch_s: float) -> None:
    """Delivers batches until the watch has ended; a batch that cannot be delivered now is tried again, and by the next
    watch."""
    pause, next_try = RETRY_S, 0.0
    while True:
        is_last = ended.is_set()
        if stop.is_set():
            return
        if is_last or spool.waiting() >= batch or spool.oldest_s() >= batch_s:
            spool.cut()
        for folder in spool.batches() if is_last or time.monotonic() >= next_try else ():
            try:
                count = sum(1 for _ in folder.iterdir())
                deliver(folder, stop)
                spool.remove(folder)
                say(f"{count} frames went into the data set.")
                pause = RETRY_S
            except Cancelled:
                return
            except Invalid as error:
                say(f"{error} The frames lie in {spool.set_aside(folder)}.")
            except Exception as error:  # whatever the stores raise: the frames are kept and tried again
                is_told = isinstance(error, WorkbenchError)
                says = str(error) if is_told else f"Unforeseen {type(error).__name__}: {error}."
                say(f"{says} The frames wait in {folder} and are tried again.")
                next_try = time.monotonic() + pause
                pause = min(MAX_RETRY_S, 2 * pause)
                break
        if is_last:
            return
        ended.wait(1.0)

"""Spool: frames and events of cameras on their way into a data set, in a folder that survives a kill at any moment."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from workbench.boxes import iou
from workbench.errors import Conflict, Unavailable
from workbench.formats.images import JPEG_QUALITY
from workbench.inference.alarms import Event

# Frames are alike when hardly a cell of a thumbnail differs by more than noise and the same objects are in their places.
THUMBNAIL, CELL_DIFFERS, CELLS = (64, 36), 12, 0.01
SAME_IOU = 0.5
REMEMBERED = 20
# An event line has about 250 bytes: room for some 60,000, and as many before them.
EVENTS_BYTES = 16 * 2 ** 20
EVENTS, BEFORE = "events.jsonl", "events.before.jsonl"


class Spool:
    """One data set's spool; a context manager. One process at a time holds it.

    per_hour      frames of one camera that are kept at most in one hour of its own time
    most_waiting  frames that may wait here at most

    events.jsonl (and the one before it) lists every event with the frame that was kept of it; incoming/ collects
    frames, batch-*/ are on their way. `skipped` counts frames that were not kept: "hour", "alike", "full", "there already".
    Raises Conflict when another process holds the folder.
    """

    def __init__(self, folder: Path, *, per_hour: int = 60, most_waiting: int = 5000) -> None:
        self.folder, self._per_hour, self._most = Path(folder), per_hour, most_waiting
        self.skipped: Counter[str] = Counter()
        self.kept = self.events = 0
        self._lock = threading.Lock()
        self._hours: Counter[tuple[str, int]] = Counter()
        self._names: set[str] = set()
        self._told: set[tuple[Any, ...]] = set()
        self._last: dict[str, deque[tuple[np.ndarray, list[tuple[str, tuple[float, ...]]]]]] = {}

    def __enter__(self) -> Spool:
        for name in ("incoming", "writing"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._held = open(self.folder / "lock", "w")
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._held.close()
            raise Conflict(f"Another `workbench watch` fills {self.folder}. Stop it, or name another data "
                           "set.") from error
        for left in (self.folder / "writing").iterdir():
            left.unlink()
        self._remember()
        self._log = open(self.folder / EVENTS, "a", encoding="utf-8")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._log.close()
        self._held.close()

    def keep(self, camera: str, events: Sequence[Event], image: np.ndarray,
             boxes: list[tuple[str, tuple[float, ...]]]) -> str:
        """Keeps the frame of one moment's events and lists them; returns the frame's name, "" when it was not kept.

        image  (H, W, 3) uint8 RGB; boxes: (label, xyxy) of all that is tracked in it
        The frame is there whole before an event names it. Raises Unavailable when the disk is full.
        """
        with self._lock:
            name = self._save(camera, events[0], image, boxes)
            lines = []
            for event in events:
                key = (event.camera, event.time_ms, event.kind, event.zone, event.label, event.xyxy[:2])
                if key not in self._told:
                    self._told.add(key)
                    lines.append(json.dumps({**event.to_json(), "frame": name}) + "\n")
            try:
                if self._log.tell() > EVENTS_BYTES:
                    self._turn()
                self._log.write("".join(lines))
                self._log.flush()
            except OSError as error:
                raise Unavailable(f"Events cannot be written to {self.folder / EVENTS}: {error.strerror}. Free the "
                                  "disk.") from error
            self.events += len(lines)
            return name

    def waiting(self) -> int:
        """Frames that are in no batch yet."""
        return sum(1 for _ in (self.folder / "incoming").iterdir())

    def oldest_s(self) -> float:
        """Age of the oldest of them."""
        times = [path.stat().st_mtime for path in (self.folder / "incoming").iterdir()]
        return max(0.0, time.time() - min(times)) if times else 0.0

    def cut(self) -> Path | None:
        """Makes a batch of the frames that wait; None when there are none."""
        with self._lock:
            incoming = self.folder / "incoming"
            if not any(incoming.iterdir()):
                return None
            batch = self.folder / f"batch-{time.time_ns()}"
            os.replace(incoming, batch)
            incoming.mkdir()
            return batch

    def batches(self) -> list[Path]:
        """Batches on their way, oldest first."""
        return sorted(self.folder.glob("batch-*"))

    def remove(self, batch: Path) -> None:
        """Its frames are in the data set."""
        # Renamed first: a batch that is half deleted would be delivered again, in part.
        gone = self.folder / "writing" / batch.name
        os.replace(batch, gone)
        shutil.rmtree(gone)

    def set_aside(self, batch: Path) -> Path:
        """Nothing takes this batch; it is kept for a person to look at."""
        place = self.folder / "refused" / batch.name
        place.parent.mkdir(exist_ok=True)
        os.replace(batch, place)
        return place

    def _save(self, camera: str, event: Event, image: np.ndarray, boxes: list[tuple[str, tuple[float, ...]]]) -> str:
        name, hour = f"{camera}_{event.time_ms}.jpg", (camera, int(event.time // 3600))
        if name in self._names:
            self.skipped["there already"] += 1
            return name
        thumbnail = _thumbnail(image)
        last = self._last.setdefault(camera, deque(maxlen=REMEMBERED))
        if any(_are_alike(thumbnail, boxes, *other) for other in last):
            reason = "alike"
        elif self._hours[hour] >= self._per_hour:
            reason = "hour"
        elif self.waiting() + sum(1 for batch in self.batches() for _ in batch.iterdir()) >= self._most:
            reason = "full"
        else:
            _write_jpeg(self.folder / "writing" / name, image)
            os.replace(self.folder / "writing" / name, self.folder / "incoming" / name)
            self._names.add(name)
            self._hours[hour] += 1
            if len(self._hours) > 10_000:
                self._hours = Counter(dict(list(self._hours.items())[5_000:]))
            last.append((thumbnail, boxes))
            self.kept += 1
            return name
        self.skipped[reason] += 1
        return ""

    def _turn(self) -> None:
        """Starts a new list of events; what it and the one before it hold is remembered, older is not."""
        self._log.close()
        os.replace(self.folder / EVENTS, self.folder / BEFORE)
        self._told, self._names = set(), set()
        self._remember()
        self._log = open(self.folder / EVENTS, "a", encoding="utf-8")

    def _remember(self) -> None:
        for file in (self.folder / BEFORE, self.folder / EVENTS):
            data = file.read_bytes() if file.exists() else b""
            for line in data.splitlines():
                try:
                    told = json.loads(line)
                    key = (told["camera"], told["time_ms"], told["kind"], told["zone"], told["label"],
                           tuple(told["xyxy"][:2]))
                    name = told["frame"]
                except (ValueError, KeyError, TypeError):
                    continue  # the line that a kill cut short
                self._told.add(key)
                if name:
                    self._names.add(name)
            if data and not data.endswith(b"\n"):
                with file.open("ab") as torn:
                    torn.write(b"\n")
        # A kill between a frame and its event leaves a frame that no event names.
        folders = (self.folder / "incoming", *self.batches())
        self._names |= {path.name for folder in folders for path in folder.iterdir()}
        self._hours = Counter()
        for name in self._names:
            camera, _, time_ms = name.removesuffix(".jpg").rpartition("_")
            if time_ms.lstrip("-").isdigit():
                self._hours[(camera, int(time_ms) // 3_600_000)] += 1


def _thumbnail(image: np.ndarray) -> np.ndarray:
    import cv2
    grey = cv2.cvtColor(cv2.resize(image, THUMBNAIL, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
    return grey.astype(np.int16)


def _are_alike(one: np.ndarray, boxes: list[tuple[str, tuple[float, ...]]], other: np.ndarray,
               others: list[tuple[str, tuple[float, ...]]]) -> bool:
    if sorted(label for label, _ in boxes) != sorted(label for label, _ in others):
        return False
    if (np.abs(one - other) > CELL_DIFFERS).mean() > CELLS:
        return False
    overlap = iou(np.array([xyxy for _, xyxy in boxes]), np.array([xyxy for _, xyxy in others]))
    same = np.array([[label == theirs for theirs, _ in others] for label, _ in boxes], bool).reshape(overlap.shape)
    return bool(((overlap >= SAME_IOU) & same).any(axis=1).all())


def _write_jpeg(path: Path, image: np.ndarray) -> None:
    import cv2
    _, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    try:
        path.write_bytes(data.tobytes())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise Unavailable(f"A frame cannot be written to {path.parent}: {error.strerror}. Free the disk.") from error

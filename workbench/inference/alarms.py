"""The false-alarm filter of one camera: from tracks to the events that a person should know of."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from workbench.boxes import Detections
from workbench.errors import Invalid
from workbench.inference.cameras import Camera
from workbench.inference.motion import Motion
from workbench.inference.tracking import Tracker, Tracks
from workbench.inference.zones import Zone, depth
from workbench.taxonomy import Taxonomy

# A box moves when this share of it does; a walking person's limbs alone are a fifth of their box.
MOVING_SHARE = 0.08
# It moved in half of its frames, or, if it stood or hung there for long, in so many frames while it was away from where
# it began by half of its shorter side. What only has somebody pass in front of it does neither: it moves in few frames
# and stays where it is.
MOVING_OFTEN, MOVING_FRAMES, WALKED_FRAMES, WAY = 0.5, 2, 4, 0.5
# A track that is missed more often than seen is noise.
SEEN_OFTEN = 0.5
LEAST_HITS = 3
# Every so many frames what is known of ended tracks is forgotten.
TIDY = 50


@dataclass(frozen=True)
class Event:
    """Something a person should know of.

    kind        "object": a track passed the filter, once per track; "intrusion": it entered a zone, once per track
                and zone
    time        s since the epoch; of a file, since its beginning
    track       the track's number, counted up per camera from the start of the process
    xyxy        the box in pixels of the frame; size (width, height) of the frame
    zone        name of the intrusion zone
    """

    kind: str
    camera: str
    time: float
    track: int
    label: str
    xyxy: tuple[float, float, float, float]
    confidence: float
    size: tuple[int, int]
    zone: str = ""

    @property
    def time_ms(self) -> int:
        return round(self.time * 1000)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "camera": self.camera, "time_ms": self.time_ms, "track": self.track,
                "label": self.label, "xyxy": [round(value, 2) for value in self.xyxy],
                "confidence": round(self.confidence, 4), "zone": self.zone, "width": self.size[0],
                "height": self.size[1]}


@dataclass
class _Known:
    """What the filter remembers of a track."""

    origin: tuple[float, float]
    born: int
    frames: int = 0
    moving: int = 0
    walked: int = 0
    is_told: bool = False
    refused: str = ""
    inside: dict[str, float] = field(default_factory=dict)
    intruded: set[str] = field(default_factory=set)

    @property
    def is_walker(self) -> bool:
        return self.walked > 0 and self.moving >= MOVING_FRAMES

    @property
    def has_moved(self) -> bool:
        return self.walked >= WALKED_FRAMES or self.moving >= max(MOVING_FRAMES, MOVING_OFTEN * self.frames)


class Scene:
    """One camera's background, tracks and filter; frames come in order, from one thread at a time.

    high     score from which the model's boxes count as sure, one number or one per class; boxes below only keep
             tracks alive
    filters  False: every track raises an event as soon as it counts; for comparison

    `refused` counts why ended tracks raised no event: "still", "short", "size", "zone", "label".
    Raises Invalid for a label of the camera or of a zone that the model does not know.
    """

    def __init__(self, camera: Camera, labels: Taxonomy, high: float | np.ndarray, *, filters: bool = True) -> None:
        wanted = {*camera.labels, *(label for zone in camera.zones for label in zone.labels)}
        foreign = sorted(wanted - set(labels.labels))
        if foreign:
            raise Invalid(f"Camera {camera.name} watches for {', '.join(foreign)}, which the model does not know; it "
                          f"knows {', '.join(labels.labels[:20])}.")
        self.camera, self.labels, self.refused = camera, labels, Counter()
        self.tracks: Tracks | None = None
        self._tracker, self._motion, self._filters = Tracker(high), Motion(), filters
        self._known: dict[int, _Known] = {}
        self._frames, self._size = 0, (0, 0)
        self._heights = np.array(camera.rows).T if camera.rows else None
        self._of = {kind: [zone for zone in camera.zones if zone.kind == kind]
                    for kind in ("include", "ignore", "intrusion")}

    def update(self, image: np.ndarray, found: Detections, time: float, seconds: float) -> list[Event]:
        """The events of the camera's next frame.

        image    (H, W, 3) uint8 RGB; found: the model's boxes in it, from a low score on
        time     as the event shall tell it; seconds: of a clock that does not jump. Raises Invalid when one is NaN.
        """
        if not math.isfinite(time):
            raise Invalid(f"A frame's time must be a number of seconds, got {time}.")
        size = (image.shape[1], image.shape[0])
        self._motion.update(image, seconds)
        if self._motion.is_cut or size != self._size:
            self._tracker.forget()
        self._size = size
        self.tracks = tracks = self._tracker.update(found, seconds)
        self._frames += 1
        if self._frames % TIDY == 0:
            self._tidy()
        if not len(tracks):
            return []
        # One track is a handful of numbers, and a frame has a handful of tracks: plain numbers are faster than arrays.
        boxes = tracks.xyxy.tolist()
        known = self._follow(tracks.id.tolist(), boxes)
        inside = self._depths(boxes, size)
        events = []
        for at, one in enumerate(known):
            label = self.labels.labels[tracks.class_id[at]]
            if self._filters:
                lasted = seconds - tracks.since[at]
                one.refused = self._reason(one, boxes[at], lasted, int(tracks.hits[at]), label, inside, at)
            told = [] if one.refused or one.is_told else [("object", "")]
            told += [("intrusion", zone.name) for zone in self._of["intrusion"]
                     if self._intrudes(one, zone, float(inside[zone.name][at]), label, seconds)]
            for kind, zone in told:
                one.is_told = True
                events.append(Event(kind, self.camera.name, time, int(tracks.id[at]), label, tuple(boxes[at]),
                                    float(tracks.confidence[at]), size, zone))
        return events

    def _depths(self, boxes: list[list[float]], size: tuple[int, int]) -> dict[str, np.ndarray]:
        """Zone -> how deep inside it each box's foot point is."""
        if not self.camera.zones:
            return {}
        feet = np.array([((x1 + x2) / 2 / size[0], y2 / size[1]) for x1, _, x2, y2 in boxes])
        return {zone.name: depth(zone, feet) for zone in self.camera.zones}

    def _follow(self, numbers: list[int], boxes: list[list[float]]) -> list[_Known]:
        """What is known of each track, after this frame's motion."""
        known, away, walkers = [], [], []
        dx, dy = self._motion.shift_px
        for number, (x1, y1, x2, y2) in zip(numbers, boxes):
            # Where it is on the background: a shaking camera moves no object.
            x, y = (x1 + x2) / 2 - dx, (y1 + y2) / 2 - dy
            one = self._known.get(number)
            if one is None:
                one = self._known[number] = _Known((x, y), self._frames)
            known.append(one)
            away.append(math.hypot(x - one.origin[0], y - one.origin[1]) > WAY * min(x2 - x1, y2 - y1))
            if one.is_walker:
                walkers.append((x1, y1, x2, y2))
        shares = self._motion.share(boxes)
        if walkers and len(walkers) < len(known):
            # What moves inside the box of somebody who walks past is theirs.
            others = self._motion.share(boxes, walkers)
            shares = [mine if one.is_walker else other for one, mine, other in zip(known, shares, others)]
        for one, share, is_away in zip(known, shares, away):
            one.frames += 1
            one.moving += share >= MOVING_SHARE
            one.walked += share >= MOVING_SHARE and is_away
        return known

    def _reason(self, one: _Known, box: list[float], lasted: float, hits: int, label: str,
                inside: dict[str, np.ndarray], at: int) -> str:
        """Why the track raises no event now; "" when it does."""
        if self.camera.labels and label not in self.camera.labels:
            return "label"
        for kind in ("ignore", "include"):
            about = [inside[zone.name][at] >= 0 for zone in self._of[kind] if zone.counts(label)]
            if (any(about) if kind == "ignore" else about and not any(about)):
                return "zone"
        width, height = (box[2] - box[0]) / self._size[0], (box[3] - box[1]) / self._size[1]
        if not self.camera.size[0] <= width * height <= self.camera.size[1]:
            return "size"
        if self._heights is not None:
            row = min(max(box[3] / self._size[1], 0), 1)
            least, most = (np.interp(row, self._heights[0], heights) for heights in self._heights[1:])
            if not least <= height <= most:
                return "size"
        if not (self.camera.keep_still or one.has_moved):
            return "still"
        if lasted < self.camera.min_persistence_s or hits < LEAST_HITS or (
                one.frames < SEEN_OFTEN * (self._frames - one.born + 1)):
            return "short"
        return ""

    def _intrudes(self, one: _Known, zone: Zone, deep: float, label: str, seconds: float) -> bool:
        """Whether the track has just been inside for long enough. Its time inside counts from its first frame there,
        also while the filter still doubts it."""
        if not zone.counts(label) or zone.name in one.intruded:
            return False
        if deep < -zone.margin:
            one.inside.pop(zone.name, None)
        elif deep >= zone.margin:
            one.inside.setdefault(zone.name, seconds)
        since = one.inside.get(zone.name)
        if since is None or seconds - since < zone.dwell_s or (self._filters and one.refused):
            return False
        one.intruded.add(zone.name)
        return True

    def _tidy(self) -> None:
        alive = set(self._tracker.alive().tolist())
        for number in [number for number in self._known if number not in alive]:
            one = self._known.pop(number)
            if not one.is_told and one.refused:
                self.refused[one.refused] += 1

"""Tracking by association of every detection box, as ByteTrack does, with a Kalman filter that knows the time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from workbench.boxes import Detections, cxcywh_to_xyxy, iou
from workbench.errors import Invalid

# Least IoU of a match: with boxes of high score, of low score, and of a track seen once (Zhang et al., ByteTrack,
# ECCV 2022: 0.2 in section 4; 0.5 and 0.3 in yolox/tracker/byte_tracker.py).
HIGH_IOU, LOW_IOU, NEW_IOU = 0.2, 0.5, 0.3
# Deviations of DeepSORT's filter (Wojke et al., 2017; kalman_filter.py: 1/20 of the size for places, 1/160 a frame for
# velocities, doubled and tenfold at the start), turned from its frames at 30 a second into seconds.
FRAMES_A_SECOND = 30.0
PLACE, VELOCITY = 1 / 20, FRAMES_A_SECOND / 160
PLACE_DENSITY, VELOCITY_DENSITY = FRAMES_A_SECOND * PLACE ** 2, FRAMES_A_SECOND * VELOCITY ** 2
# Boxes are widened by this share a second without a look before IoU is taken, up to the most: at a few frames a second
# a walking person's boxes do not overlap (Yang et al., C-BIoU, WACV 2023: buffers of 0.3 and 0.5).
WIDEN_A_SECOND, MOST_WIDE = 1.0, 0.5
NEW, TRACKED, LOST = 0, 1, 2

TRACK = np.dtype([
    ("id", "i8"), ("class_id", "i4"), ("confidence", "f8"), ("state", "i1"), ("first", "f8"), ("last", "f8"),
    ("hits", "i4"), ("box", "f8", 4),
    # cx, cy, width, height: mean, velocity a second, and the covariance of each one's place and velocity.
    ("mean", "f8", 4), ("velocity", "f8", 4), ("pp", "f8", 4), ("pv", "f8", 4), ("vv", "f8", 4)])


@dataclass(frozen=True)
class Tracks:
    """Parallel arrays: the tracks seen in one frame.

    id          (n,) int64, counted up from 1, never used twice
    xyxy        (n, 4) float64, the detection's box in pixels
    class_id, confidence   of the detection
    since       (n,) s, time of its first frame; hits (n,) frames in which it was seen
    """

    id: np.ndarray
    xyxy: np.ndarray
    class_id: np.ndarray
    confidence: np.ndarray
    since: np.ndarray
    hits: np.ndarray

    def __len__(self) -> int:
        return len(self.id)


class Tracker:
    """One camera's tracks.

    high    score from which a box counts as seen for sure and may begin a track: one number, or one per class
            (byte_tracker.py wants 0.1 more of a beginning; here the card's confidence says what counts)
    lost_s  how long a track that is not seen may come back under its id; three of the camera's usual pauses between
            frames where those are longer
    tracks  records of TRACK to go on with, as `tracks` of another tracker gave them at `time`
    """

    def __init__(self, high: float | np.ndarray, *, lost_s: float = 2.0, tracks: np.ndarray | None = None,
                 time: float = 0.0) -> None:
        self._high, self._lost_s = np.asarray(high, float), lost_s
        self._tracks, self._next, self._time = np.zeros(0, TRACK), 1, None
        self._usual = 0.0
        if tracks is not None:
            self._tracks, self._next, self._time = tracks.copy(), int(tracks["id"].max(initial=0)) + 1, time

    @property
    def tracks(self) -> np.ndarray:
        """A copy of the records (TRACK) of all that is seen or may come back."""
        return self._tracks.copy()

    def alive(self) -> np.ndarray:
        """Ids of the tracks that are seen or may come back."""
        return self._tracks["id"]

    def forget(self) -> None:
        """Ends all tracks: the camera shows another scene."""
        self._tracks, self._time = self._tracks[:0], None

    def update(self, found: Detections, time: float) -> Tracks:
        """Takes a frame's detections, low scores included; `time` in seconds, any clock.

        A track counts from its second frame on; those of the first frame count at once. A time before the last one is
        taken as no time gone by. Raises Invalid for a time that is no number.
        """
        if not math.isfinite(time):
            raise Invalid(f"A frame's time must be a number of seconds, got {time}.")
        gap = 0.0 if self._time is None else max(0.0, time - self._time)
        back = 0.0 if self._time is None else min(0.0, time - self._time)
        is_first, self._time = self._time is None, time
        if back and len(self._tracks):
            # The clock was set back: what was seen a second ago stays seen a second ago.
            self._tracks["first"] += back
            self._tracks["last"] += back
        self._usual = self._usual * 0.9 + min(gap, 10 * self._usual) * 0.1 if self._usual else gap
        self._tracks = self._tracks[time - self._tracks["last"] <= max(self._lost_s, 3 * self._usual)]
        if not len(found) and not len(self._tracks):
            return _shown(self._tracks)
        self._predict(gap)
        high = found.confidence >= (self._high[found.class_id] if self._high.ndim else self._high)
        boxes = np.asarray(found.xyxy, float)
        wide = min(MOST_WIDE, gap * WIDEN_A_SECOND)
        state = self._tracks["state"].copy()
        seen = np.zeros(len(self._tracks), bool)
        taken = np.zeros(len(boxes), bool)
        matched: list[tuple[np.ndarray, np.ndarray]] = []
        if len(state) and len(boxes):
            predicted = _widen(cxcywh_to_xyxy(self._tracks["mean"]), wide)
            widened = _widen(boxes, wide)
        # Which tracks (the bare numbers are their states) may take which boxes, in this order.
        for states, wants_high, least in (((TRACKED, LOST), True, HIGH_IOU), ((TRACKED,), False, LOW_IOU),
                                          ((NEW,), True, NEW_IOU)):
            rows = np.array([at for at, one in enumerate(state.tolist()) if one in states and not seen[at]], int)
            columns = np.array([at for at, one in enumerate(high.tolist()) if one == wants_high and not taken[at]], int)
            if len(rows) and len(columns):
                same = self._tracks["class_id"][rows][:, None] == found.class_id[columns]
                one, other = _assign(predicted[rows], widened[columns], same, least)
                seen[rows[one]], taken[columns[other]] = True, True
                matched.append((rows[one], columns[other]))
        if matched:
            at, of = (np.concatenate(pair) for pair in zip(*matched))
            self._correct(at, boxes[of], found.confidence[of], time)
        tracks = self._tracks
        tracks["state"][~seen & (state == TRACKED)] = LOST
        # A lost object keeps its way but not its growth (byte_tracker.py sets the height's velocity to 0).
        tracks["velocity"][tracks["state"] == LOST, 2:] = 0
        tracks = tracks[seen | (state != NEW)]
        new = self._begin(np.flatnonzero(high & ~taken), boxes, found, time, is_first)
        self._tracks = np.concatenate([tracks, new]) if len(new) else tracks
        return _shown(self._tracks[self._tracks["state"] == TRACKED])

    def _predict(self, gap: float) -> None:
        """Constant velocity with white acceleration and, as in DeepSORT, white motion (Bar-Shalom et al., Estimation
        with Applications to Tracking and Navigation, 6.2). All matrices are diagonal in cx, cy, width, height, so the
        four run as filters of two numbers each."""
        tracks = self._tracks
        if not len(tracks) or not gap:
            return
        sides = np.maximum(tracks["mean"][:, [2, 3, 2, 3]], 1) ** 2
        drive = VELOCITY_DENSITY * sides
        tracks["mean"] += gap * tracks["velocity"]
        tracks["mean"][:, 2:] = np.maximum(tracks["mean"][:, 2:], 1)
        tracks["pp"] += (gap * (2 * tracks["pv"] + gap * tracks["vv"]) + drive * gap ** 3 / 3
                         + PLACE_DENSITY * sides * gap)
        tracks["pv"] += gap * tracks["vv"] + drive * gap ** 2 / 2
        tracks["vv"] += drive * gap

    def _correct(self, at: np.ndarray, boxes: np.ndarray, confidence: np.ndarray, time: float) -> None:
        """The Kalman filter's update with the boxes that tracks `at` were matched with."""
        part = self._tracks[at]
        noise = (PLACE * np.maximum(part["mean"][:, [2, 3, 2, 3]], 1)) ** 2
        miss, total = _cxcywh(boxes) - part["mean"], part["pp"] + noise
        gain, velocity_gain = part["pp"] / total, part["pv"] / total
        part["mean"] += gain * miss
        part["velocity"] += velocity_gain * miss
        part["vv"] -= velocity_gain * part["pv"]
        part["pv"] *= 1 - gain
        part["pp"] *= 1 - gain
        part["box"], part["confidence"], part["state"], part["last"] = boxes, confidence, TRACKED, time
        part["hits"] += 1
        self._tracks[at] = part

    def _begin(self, at: np.ndarray, boxes: np.ndarray, found: Detections, time: float, is_first: bool) -> np.ndarray:
        new = np.zeros(len(at), TRACK)
        if not len(at):
            return new
        new["id"] = np.arange(self._next, self._next + len(at))
        self._next += len(at)
        new["class_id"], new["confidence"], new["box"] = found.class_id[at], found.confidence[at], boxes[at]
        new["first"] = new["last"] = time
        new["hits"], new["state"] = 1, TRACKED if is_first else NEW
        new["mean"] = _cxcywh(boxes[at])
        sides = np.maximum(new["mean"][:, [2, 3, 2, 3]], 1)
        new["pp"], new["vv"] = (2 * PLACE * sides) ** 2, (10 * VELOCITY * sides) ** 2
        return new


def _shown(tracks: np.ndarray) -> Tracks:
    return Tracks(*(tracks[name] for name in ("id", "box", "class_id", "confidence", "first", "hits")))


def _assign(one: np.ndarray, other: np.ndarray, same: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of greatest total IoU (Kuhn, 1955) among those that may be one object: `same` (n, m), IoU >= least."""
    overlap = iou(one, other)
    overlap[~same | (overlap < least)] = 0
    rows, columns = linear_sum_assignment(overlap, maximize=True)
    fits = overlap[rows, columns] > 0
    return rows[fits], columns[fits]


def _cxcywh(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], axis=1)


def _widen(boxes: np.ndarray, share: float) -> np.ndarray:
    if not share:
        return boxes
    more = (boxes[:, 2:] - boxes[:, :2]) * share
    return np.concatenate([boxes[:, :2] - more, boxes[:, 2:] + more], axis=1)

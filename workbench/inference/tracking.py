"""Tracking by association of every detection box, as ByteTrack does, with a Kalman filter that knows the time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from workbench.boxes import Detections, iou
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

TRACK = np.dtype([("id", "i8"), ("class_id", "i4"), ("confidence", "f8"), ("state", "i1"), ("first", "f8"), ("last", "f8"),
                  ("hits", "i4"), ("box", "f8", 4)])
# The filter's numbers of a track, a row each for cx, cy, width, height: mean, velocity a second, and the covariance of
# place and velocity (place-place, place-velocity, velocity-velocity). All of DeepSORT's matrices are diagonal in the four,
# so they run as four filters of two numbers.
MEAN, SPEED, PP, PV, VV = range(5)
TO_CXCYWH = np.array([[0.5, 0, -1, 0], [0, 0.5, 0, -1], [0.5, 0, 1, 0], [0, 0.5, 0, 1]])


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
    kept    what `kept` of another tracker gave after a frame at time 0: goes on from there
    """

    def __init__(self, high: float | np.ndarray, *, lost_s: float = 2.0,
                 kept: tuple[np.ndarray, np.ndarray] | None = None) -> None:
        self._high, self._lost_s = np.asarray(high, float), lost_s
        self._tracks, self._filter = np.zeros(0, TRACK), np.zeros((0, 5, 4))
        self._next, self._time, self._usual = 1, None, 0.0
        if kept is not None:
            self._tracks, self._filter = kept[0].copy(), kept[1].copy()
            self._next, self._time = int(self._tracks["id"].max(initial=0)) + 1, 0.0

    def kept(self) -> tuple[np.ndarray, np.ndarray]:
        """Copies of all tracks that are seen or may come back: (n,) records of TRACK and (n, 5, 4) filters."""
        return self._tracks.copy(), self._filter.copy()

    def alive(self) -> np.ndarray:
        """Ids of the tracks that are seen or may come back."""
        return self._tracks["id"]

    def forget(self) -> None:
        """Ends all tracks: the camera shows another scene."""
        self._keep(slice(0))
        self._time = None

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
        if len(self._tracks):
            in_time = time - self._tracks["last"] <= max(self._lost_s, 3 * self._usual)
            if not in_time.all():
                self._keep(in_time)
        if not len(found) and not len(self._tracks):
            return _shown(self._tracks)
        boxes = found.xyxy.astype(float)
        measured = boxes @ TO_CXCYWH
        high = (found.confidence >= (self._high[found.class_id] if self._high.ndim else self._high)).tolist()
        state = self._tracks["state"].tolist()
        at, of = self._match(gap, measured, found, state, high)
        if at:
            self._correct(at, of, boxes, measured, found, time)
        if len(at) < len(state):
            self._lose(set(range(len(state))).difference(at), state)
        taken = set(of)
        self._begin([row for row, is_high in enumerate(high) if is_high and row not in taken], boxes, measured, found,
                    time, is_first)
        return _shown(self._tracks[self._tracks["state"] == TRACKED])

    def _keep(self, rows: np.ndarray | list[int] | slice) -> None:
        self._tracks, self._filter = self._tracks[rows], self._filter[rows]

    def _lose(self, rows: set[int], state: list[int]) -> None:
        """Marks the tracks at `rows` as lost; new ones among them end."""
        at = list(rows)
        self._tracks["state"][at] = LOST
        # A lost object keeps its way but not its growth (byte_tracker.py sets the height's velocity to 0).
        self._filter[at, SPEED, 2:] = 0
        if any(state[row] == NEW for row in rows):
            self._keep([row for row, one in enumerate(state) if one != NEW or row not in rows])

    def _match(self, gap: float, measured: np.ndarray, found: Detections, state: list[int],
               high: list[bool]) -> tuple[list[int], list[int]]:
        """Predicts all tracks and finds which of them is which box: (rows of tracks, rows of boxes)."""
        at: list[int] = []
        of: list[int] = []
        if state and gap:
            self._predict(gap)
        if not state or not high:
            return at, of
        wide = 0.5 + min(MOST_WIDE, gap * WIDEN_A_SECOND)
        # cxcywh -> xyxy of a box that is wider by that share on each side.
        to_xyxy = np.array([[1, 0, 1, 0], [0, 1, 0, 1], [-wide, 0, wide, 0], [0, -wide, 0, wide]])
        overlap = iou(self._filter[:, MEAN] @ to_xyxy, measured @ to_xyxy)
        overlap[self._tracks["class_id"][:, None] != found.class_id] = 0
        # Which tracks may take which boxes, in this order.
        for states, wants_high, least in (((TRACKED, LOST), True, HIGH_IOU), ((TRACKED,), False, LOW_IOU),
                                          ((NEW,), True, NEW_IOU)):
            seen, taken = set(at), set(of)
            rows = [row for row, one in enumerate(state) if one in states and row not in seen]
            columns = [column for column, is_high in enumerate(high) if is_high == wants_high and column not in taken]
            if rows and columns:
                one, other = _assign(overlap[np.ix_(rows, columns)], least)
                at += [rows[row] for row in one]
                of += [columns[column] for column in other]
        return at, of

    def _predict(self, gap: float) -> None:
        """Constant velocity with white acceleration and, as in DeepSORT, white motion (Bar-Shalom et al., Estimation
        with Applications to Tracking and Navigation, 6.2)."""
        step = np.array([[1, gap, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 2 * gap, gap * gap], [0, 0, 0, 1, gap],
                         [0, 0, 0, 0, 1]])
        more = np.array([VELOCITY_DENSITY * gap ** 3 / 3 + PLACE_DENSITY * gap, VELOCITY_DENSITY * gap ** 2 / 2,
                         VELOCITY_DENSITY * gap])
        noise = _squared_sides(self._filter)[:, None] * more[:, None]
        self._filter = step @ self._filter
        self._filter[:, PP:] += noise
        np.maximum(self._filter[:, MEAN, 2:], 1, out=self._filter[:, MEAN, 2:])

    def _correct(self, at: list[int], of: list[int], boxes: np.ndarray, measured: np.ndarray, found: Detections,
                 time: float) -> None:
        """The Kalman filter's update of tracks `at` with boxes `of`."""
        part = self._filter[at]
        miss = measured[of] - part[:, MEAN]
        gain = part[:, PP:VV] / (part[:, PP] + PLACE ** 2 * _squared_sides(part))[:, None]
        part[:, :PP] += gain * miss[:, None]
        part[:, VV] -= gain[:, 1] * part[:, PV]
        part[:, PP:VV] *= 1 - gain[:, :1]
        self._filter[at] = part
        tracks = self._tracks
        tracks["box"][at], tracks["confidence"][at] = boxes[of], found.confidence[of]
        tracks["state"][at], tracks["last"][at] = TRACKED, time
        tracks["hits"][at] += 1

    def _begin(self, at: list[int], boxes: np.ndarray, measured: np.ndarray, found: Detections, time: float,
               is_first: bool) -> None:
        if not at:
            return
        new, numbers = np.zeros(len(at), TRACK), np.zeros((len(at), 5, 4))
        new["id"] = np.arange(self._next, self._next + len(at))
        self._next += len(at)
        new["class_id"], new["confidence"], new["box"] = found.class_id[at], found.confidence[at], boxes[at]
        new["first"] = new["last"] = time
        new["hits"], new["state"] = 1, TRACKED if is_first else NEW
        numbers[:, MEAN] = measured[at]
        numbers[:, PP] = (2 * PLACE) ** 2 * _squared_sides(numbers)
        numbers[:, VV] = (10 * VELOCITY) ** 2 * _squared_sides(numbers)
        self._tracks, self._filter = np.concatenate([self._tracks, new]), np.concatenate([self._filter, numbers])


def _squared_sides(numbers: np.ndarray) -> np.ndarray:
    """(n, 4) width, height, width, height squared, of filters (n, 5, 4): deviations go by the size."""
    sides = np.maximum(numbers[:, MEAN, 2:], 1) ** 2
    return np.concatenate([sides, sides], axis=1)


def _shown(tracks: np.ndarray) -> Tracks:
    return Tracks(*(tracks[name] for name in ("id", "box", "class_id", "confidence", "first", "hits")))


def _assign(overlap: np.ndarray, least: float) -> tuple[list[int], list[int]]:
    """The pairs (rows, columns) of greatest total IoU (Kuhn, 1955) among those of `least` or more."""
    overlap = np.where(overlap >= least, overlap, 0)
    rows, columns = linear_sum_assignment(overlap, maximize=True)
    fits = overlap[rows, columns] > 0
    return rows[fits].tolist(), columns[fits].tolist()

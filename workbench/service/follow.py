"""CVAT's tracker calls: shapes or states in, the next shapes and states out, on the tracker of our streams.

A call knows one frame and what the call before answered, so a track's filter travels as the state. CVAT signs states
and gives them back unchanged, but anybody who reaches the gateway can send another: they are checked like every input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from workbench.annotation import DECIMALS
from workbench.boxes import Detections, clip, cxcywh_to_xyxy, iou
from workbench.errors import Invalid
from workbench.inference.tracking import LOST, MEAN, NEW, PP, TRACK, TRACKED, VV, Tracker
from workbench.model import ModelCard

MOST_SHAPES = 1000
# CVAT does not say how much time lies between two frames. Tasks are cut to a few frames a second as a rule, and where
# it is less the filter only trusts its velocity a little less than it might.
GAP_S = 0.2
# Least IoU of a drawn box with a detection that tells its label (Pascal VOC's overlap of one and the same thing).
SAME_IOU = 0.5
# A state holds these numbers of a track; an unknown label is -1.
NUMBERS = {"state": 1, "hits": 1, "last": 1, "box": 4, "filter": 20}
FOLLOWED = np.dtype([*TRACK.descr, ("filter", "f8", (5, 4))])
FARTHEST = 1e9
ANY, ENDED = -1, -1


@dataclass(frozen=True)
class Asked:
    """The things to follow. tracks: records of FOLLOWED, one for each; is_new: it was drawn in this very frame.

    is_bare  CVAT before typed shapes: points alone go in and out
    """

    tracks: np.ndarray
    is_new: np.ndarray
    is_bare: bool


def read(shapes: Any, states: Any, card: ModelCard) -> Asked:
    """What a tracker call asks for: `states` of the frame before, or `shapes` that a person has just drawn.

    Raises Invalid for anything else, naming its place.
    """
    shapes, states = shapes or [], states or []
    if not isinstance(shapes, list) or not isinstance(states, list):
        raise Invalid("A tracker call needs 'shapes' and 'states' as lists.")
    count = max(len(shapes), len(states))
    if not 1 <= count <= MOST_SHAPES:
        raise Invalid(f"A tracker call follows 1 to {MOST_SHAPES} shapes, got {count}.")
    tracks, is_new, is_bare = np.zeros(count, FOLLOWED), np.zeros(count, bool), False
    for at in range(count):
        state = states[at] if at < len(states) else None
        shape = shapes[at] if at < len(shapes) else None
        if state is not None:
            tracks[at] = _track(state, at, len(card.labels))
            is_bare |= bool(state.get("bare"))
        else:
            tracks[at]["box"], is_new[at] = _drawn(shape, at), True
            is_bare |= isinstance(shape, list)
    tracks["id"] = np.arange(1, count + 1)
    return Asked(tracks, is_new, is_bare)


def follow(asked: Asked, found: Detections, high: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    """The answer: {"shapes", "states"}, one of each for every thing asked for.

    found  what the model sees in the frame, low scores included
    high   (C,) score from which a box counts as seen for sure, by class
    size   (width, height) of the frame

    What was drawn in this frame stays as it was drawn. A thing that is not seen goes where its filter says for two
    seconds, then stays: CVAT's page has no answer for "gone".
    """
    tracks = asked.tracks.copy()
    new = np.flatnonzero(asked.is_new)
    if len(new):
        tracks[new] = _begun(tracks[new], found)
    old = np.flatnonzero(~asked.is_new & (tracks["state"] != ENDED))
    if len(old):
        tracks[old] = _moved(tracks[old], found, high)
    shapes, states = [], []
    for track, before in zip(tracks, asked.tracks, strict=True):
        if (clip(track["box"], *size)[0, 2:] - clip(track["box"], *size)[0, :2] < 1).any():
            track["state"], track["box"] = ENDED, before["box"]  # it has left the frame
        box = np.round(clip(track["box"], *size)[0], DECIMALS).tolist()
        shapes.append(box if asked.is_bare else {"type": "rectangle", "points": box})
        states.append(_state(track, asked.is_bare))
    return {"shapes": shapes, "states": states}


def _begun(tracks: np.ndarray, found: Detections) -> np.ndarray:
    """Tracks of drawn boxes; each has the label of the detection that covers it best."""
    overlap = iou(tracks["box"], found.xyxy)
    best = overlap.argmax(axis=1) if len(found) else np.zeros(len(tracks), int)
    is_known = overlap.max(axis=1, initial=0) >= SAME_IOU
    tracker = Tracker(0.0)
    # All boxes of a tracker's first frame are tracks at once, in their order.
    tracker.update(Detections(tracks["box"], np.zeros(len(tracks)), np.ones(len(tracks))), 0.0)
    begun = _joined(*tracker.kept())
    begun["id"] = tracks["id"]
    begun["class_id"] = np.where(is_known, found.class_id[best], ANY) if len(found) else ANY
    return begun


def _moved(tracks: np.ndarray, found: Detections, high: np.ndarray) -> np.ndarray:
    """The tracks one frame on; those that have ended keep their place."""
    class_id, least = found.class_id, high
    if (tracks["class_id"] == ANY).any():
        # Nobody knows what one of them is: all are followed among things of all labels.
        class_id, least = np.zeros_like(class_id), high.min()
    records = tracks[list(TRACK.names)].astype(TRACK)
    if least.ndim == 0:
        records["class_id"] = 0
    tracker = Tracker(least, kept=(records, tracks["filter"]))
    tracker.update(Detections(found.xyxy, class_id, found.confidence), GAP_S)
    after = {int(one["id"]): one for one in _joined(*tracker.kept())}
    moved = tracks.copy()
    for at, track in enumerate(tracks):
        now = after.get(int(track["id"]))
        if now is None:
            moved[at]["state"] = ENDED
            continue
        moved[at] = now
        moved[at]["class_id"], moved[at]["last"] = track["class_id"], now["last"] - GAP_S
        if now["state"] != TRACKED:
            moved[at]["box"] = cxcywh_to_xyxy(now["filter"][MEAN])[0]
    return moved


def _joined(records: np.ndarray, filters: np.ndarray) -> np.ndarray:
    joined = np.zeros(len(records), FOLLOWED)
    for name in TRACK.names:
        joined[name] = records[name]
    joined["filter"] = filters
    return joined


def _state(track: np.void, is_bare: bool) -> dict[str, Any]:
    return {
        "class": int(track["class_id"]),
        **{
            name: np.round(track[name], 4).ravel().tolist() if count > 1 else round(float(track[name]), 4)
            for name, count in NUMBERS.items()
        },
        **({"bare": True} if is_bare else {}),
    }


def _track(state: Any, at: int, classes: int) -> np.ndarray:
    track = np.zeros((), FOLLOWED)
    if (
        not isinstance(state, dict)
        or not isinstance(state.get("class"), int)
        or not ANY <= state["class"] < classes
        or state.get("state") not in (ENDED, NEW, TRACKED, LOST)
    ):
        raise _foreign(at)
    track["class_id"] = state["class"]
    for name, count in NUMBERS.items():
        values = state.get(name)
        numbers = _numbers(values if count > 1 else [values], count, at)
        track[name] = np.reshape(numbers, FOLLOWED[name].shape)
    if (
        track["hits"] < 0
        or track["last"] > 0
        or (track["filter"][MEAN, 2:] <= 0).any()
        or (track["filter"][[PP, VV]] < 0).any()
        or (track["box"][2:] <= track["box"][:2]).any()
    ):
        raise _foreign(at)
    return track


def _numbers(values: Any, count: int, at: int) -> list[float]:
    if (
        not isinstance(values, list)
        or len(values) != count
        or not all(isinstance(one, (int, float)) and math.isfinite(one) and abs(one) <= FARTHEST for one in values)
    ):
        raise _foreign(at)
    return values


def _drawn(shape: Any, at: int) -> Sequence[float]:
    points = shape.get("points") if isinstance(shape, dict) else shape
    if isinstance(shape, dict) and shape.get("type") != "rectangle":
        raise Invalid(f"Shape {at} is a {shape.get('type')!r}; this tracker follows rectangles.")
    if (
        not isinstance(points, list)
        or len(points) != 4
        or not all(isinstance(one, (int, float)) and math.isfinite(one) and abs(one) <= FARTHEST for one in points)
    ):
        raise Invalid(f"Shape {at} must have four finite numbers x1, y1, x2, y2, got {str(points)[:80]}.")
    x1, x2, y1, y2 = *sorted((points[0], points[2])), *sorted((points[1], points[3]))
    if x2 - x1 < 1 or y2 - y1 < 1:
        raise Invalid(f"Shape {at} is thinner than a pixel. Draw it larger.")
    return x1, y1, x2, y2


def _foreign(at: int) -> Invalid:
    return Invalid(f"Tracker state {at} is none of this function's. Begin the track anew in CVAT.")

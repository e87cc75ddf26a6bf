"""Zones: polygons of a camera's frame in which objects count, do not count, or raise an intrusion."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from workbench.errors import Invalid

KINDS = ("include", "ignore", "intrusion")
MAX_POINTS = 100


@dataclass(frozen=True)
class Zone:
    """A simple polygon in shares of the frame, so that it outlives a change of the camera's resolution.

    polygon  ((x, y), ...), each 0..1 from the top left corner
    kind     "include": objects count only inside such zones; "ignore": they do not count here; "intrusion": an event
             when one stays inside
    labels   labels the zone is about; none: all
    dwell_s  how long an object must be inside before an intrusion is told
    margin   how deep inside an object has entered, and how far outside it has left, in shares of the frame: a box
             that trembles on the border enters once

    Raises Invalid for fewer than three points, a point outside the frame, sides that cross, or no area.
    """

    name: str
    polygon: tuple[tuple[float, float], ...]
    kind: str = "intrusion"
    labels: tuple[str, ...] = ()
    dwell_s: float = 0.0
    margin: float = 0.005

    def __post_init__(self) -> None:
        where = f"Zone {self.name!r}"
        if not isinstance(self.name, str) or not self.name or len(self.name) > 64:
            raise Invalid(f"A zone needs a name of 1..64 characters, got {self.name!r}.")
        if self.kind not in KINDS:
            raise Invalid(f"{where}: kind {self.kind!r} must be one of {', '.join(KINDS)}.")
        try:
            points = np.array(self.polygon, float)
        except (TypeError, ValueError):
            points = np.zeros(0)
        if points.ndim != 2 or points.shape[1:] != (2,) or not 3 <= len(points) <= MAX_POINTS:
            raise Invalid(f"{where}: a polygon is 3..{MAX_POINTS} points [x, y], got {self.polygon!r}.")
        if not (np.isfinite(points).all() and points.min() >= 0 and points.max() <= 1):
            raise Invalid(f"{where}: points are shares of the frame, 0..1 from its top left corner; got "
                          f"{self.polygon!r}.")
        if not all(isinstance(value, (int, float)) and math.isfinite(value) and value >= 0
                   for value in (self.dwell_s, self.margin)) or self.margin > 0.2:
            raise Invalid(f"{where}: dwell_s {self.dwell_s!r} must be 0 or more seconds, margin {self.margin!r} "
                          "0..0.2.")
        object.__setattr__(self, "polygon", tuple((float(x), float(y)) for x, y in points))
        object.__setattr__(self, "labels", tuple(self.labels))
        if _crosses(points):
            raise Invalid(f"{where}: its sides cross; list the corners in their order around the zone.")
        if _area(points) < 1e-5:
            raise Invalid(f"{where} has no area: {self.polygon!r}.")

    def counts(self, label: str) -> bool:
        return not self.labels or label in self.labels


def depth(zone: Zone, points: np.ndarray) -> np.ndarray:
    """How deep (n, 2) points (shares of the frame) lie inside: distance to the border, negative outside.

    Inside by the even-odd rule (Shimrat, Algorithm 112, 1962).
    """
    points = np.asarray(points, float).reshape(-1, 2)
    start = np.array(zone.polygon)
    along = np.roll(start, -1, axis=0) - start
    to = points[:, None, :] - start
    share = np.clip((to * along).sum(axis=2) / (along ** 2).sum(axis=1).clip(1e-12), 0, 1)
    distance = np.sqrt(((to - share[:, :, None] * along) ** 2).sum(axis=2)).min(axis=1)
    spans = (to[:, :, 1] < 0) != (to[:, :, 1] < along[:, 1])
    rise = np.where(along[:, 1] == 0, 1, along[:, 1])
    left = spans & (to[:, :, 0] < to[:, :, 1] / rise * along[:, 0])
    return np.where(left.sum(axis=1) % 2 == 1, distance, -distance)


def _area(points: np.ndarray) -> float:
    """The shoelace formula."""
    after = np.roll(points, -1, axis=0)
    return abs(float((points[:, 0] * after[:, 1] - points[:, 1] * after[:, 0]).sum())) / 2


def _crosses(points: np.ndarray) -> bool:
    """Whether two sides that are not neighbours cross."""
    def turn(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> float:
        return float((b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]))

    count = len(points)
    for i in range(count):
        a, b = points[i], points[(i + 1) % count]
        for j in range(i + 2, count - (i == 0)):
            c, d = points[j], points[(j + 1) % count]
            if turn(a, b, c) * turn(a, b, d) < 0 and turn(c, d, a) * turn(c, d, b) < 0:
                return True
    return False

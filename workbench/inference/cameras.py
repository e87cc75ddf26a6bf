"""Cameras: what a TOML file says about each; addresses may hold secrets and are shown without them."""

from __future__ import annotations

import math
import re
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from workbench.errors import Invalid, NotFound
from workbench.inference.zones import Zone

# The name is part of file names.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
SCHEMES = ("rtsp", "rtsps", "http", "https")
MAX_CAMERAS = 1000
MAX_RATE = 120.0


@dataclass(frozen=True)
class Camera:
    """One camera and what is plausible in its scene.

    name               unique; part of the names of frames and events
    url                rtsp(s):// address, http(s):// address of an MJPEG stream, or the path of a video file
    rate               frames a second that go through the model; others are not even decoded where that can be helped
    labels             labels that may raise an event; none: all of the model's
    zones              see workbench.inference.zones
    size               least and most share of the frame's area a box may have
    rows               ((row, least, most), ...): least and most height of a box whose foot is at that row, all in
                       shares of the frame's height; between rows interpolated; none: any height
    min_persistence_s  how long a track must have lasted before it may raise an event
    keep_still         also tell of objects that never moved
    full_speed         read a file as fast as the model goes, every due frame, instead of at its own pace
    """

    name: str
    url: str = field(repr=False)
    rate: float = 5.0
    labels: tuple[str, ...] = ()
    zones: tuple[Zone, ...] = ()
    size: tuple[float, float] = (0.0, 1.0)
    rows: tuple[tuple[float, float, float], ...] = ()
    min_persistence_s: float = 1.0
    keep_still: bool = False
    full_speed: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            raise Invalid(f"Camera name {self.name!r} must be 1..63 letters, digits, '.', '-' or '_'.")
        where = f"Camera {self.name}"
        if not isinstance(self.url, str) or not self.url.strip():
            raise Invalid(f"{where} needs a url: an rtsp:// or http:// address or the path of a video file.")
        parts = address(self.url)
        if parts is None:
            scheme = self.url.partition(":")[0][:20]
            raise Invalid(f"{where}: {scheme!r} addresses are not read; use {', '.join(SCHEMES)} or the path of a "
                          "file.")
        if parts.scheme and not parts.hostname:
            raise Invalid(f"{where}: its {parts.scheme} address names no host.")
        for name, least, most in (("rate", 0.01, MAX_RATE), ("min_persistence_s", 0, 3600)):
            if not _is_number(getattr(self, name), least, most):
                raise Invalid(f"{where}: {name} {getattr(self, name)!r} must be a number in {least}..{most}.")
        if len(self.size) != 2 or not all(_is_number(share, 0, 1) for share in self.size) or (
                self.size[0] >= self.size[1]):
            raise Invalid(f"{where}: size {self.size!r} must be [least, most] shares of the frame's area, 0..1.")
        for row in self.rows:
            if len(row) != 3 or not all(_is_number(share, 0, 1) for share in row) or row[1] >= row[2]:
                raise Invalid(f"{where}: rows are [row, least height, most height] in shares of the frame, got "
                              f"{row!r}.")
        object.__setattr__(self, "rows", tuple(sorted(tuple(map(float, row)) for row in self.rows)))
        object.__setattr__(self, "labels", tuple(self.labels))
        if len({zone.name for zone in self.zones}) != len(self.zones):
            raise Invalid(f"{where}: two zones have the same name; give each its own.")
        if self.full_speed and not self.is_file:
            raise Invalid(f"{where}: only a file can be read at full speed, a camera has its own.")

    @property
    def is_file(self) -> bool:
        return not address(self.url).scheme

    @property
    def shown(self) -> str:
        """The address without user, password, path and query: any of them may be a secret. Of a file, its path."""
        return show(self.url)


def address(url: str) -> SplitResult | None:
    """The parts of an address; scheme "" for a file's path; None for a scheme or form that is not read."""
    scheme = re.match(r"\s*([A-Za-z][A-Za-z0-9+.-]*):", url)
    if scheme is None or (len(scheme[1]) == 1 and url[2:3] in "\\/"):
        return SplitResult("", "", url, "", "")
    if scheme[1].lower() not in SCHEMES or not url[scheme.end():].startswith("//"):
        return None
    try:
        parts = urlsplit(url.strip())
        parts.port  # raises ValueError when it is no number
    except ValueError:
        return None
    return parts


def show(url: str) -> str:
    parts = address(url)
    if parts is None:
        return "an address that is not read"
    if not parts.scheme:
        return url
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{parts.scheme}://{host}" + (f":{parts.port}" if parts.port else "")


def read_cameras(file: Path) -> tuple[Camera, ...]:
    """The [[camera]] tables of a TOML file; relative paths of video files count from its folder.

    Raises NotFound, or Invalid naming the camera and the setting.
    """
    file = Path(file)
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise NotFound(f"{file} is not there. docs/streams.md shows how a file of cameras looks.") from error
    except UnicodeDecodeError as error:
        raise Invalid(f"{file} is not UTF-8 text. docs/streams.md shows how a file of cameras looks.") from error
    except tomllib.TOMLDecodeError as error:
        # The text of the error tells line and column only, not what stands there.
        raise Invalid(f"{file} is not TOML: {error}. Mend the file.") from error
    tables = document.pop("camera", [])
    if document:
        raise Invalid(f"{file} sets {', '.join(sorted(document))}; only [[camera]] tables are known.")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise Invalid(f"{file} has no [[camera]] table. docs/streams.md shows one.")
    return check_cameras([_camera(table, index, file) for index, table in enumerate(tables, 1)], str(file))


def check_cameras(cameras: list[Camera] | tuple[Camera, ...], where: str = "The list") -> tuple[Camera, ...]:
    """Raises Invalid for no camera, more than MAX_CAMERAS, or a name that two have."""
    if not cameras:
        raise Invalid(f"{where} has no camera; name at least one.")
    if len(cameras) > MAX_CAMERAS:
        raise Invalid(f"{where} has {len(cameras)} cameras; one process serves up to {MAX_CAMERAS}.")
    # Case is ignored because the names become file names, also on disks that ignore it.
    names = [camera.name.lower() for camera in cameras]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise Invalid(f"{where} has more than one camera named {', '.join(twice)}; give each its own name.")
    return tuple(cameras)


def _camera(table: dict[str, Any], index: int, file: Path) -> Camera:
    table = dict(table)
    where = f"{file}, camera {table.get('name', index)}"
    table["zones"] = tuple(_zone(zone, where) for zone in _list(table.pop("zone", []), "zone", where))
    known = {one.name for one in fields(Camera)} - {"zones"}
    foreign = sorted(set(table) - known - {"zones"})
    if foreign:
        raise Invalid(f"{where} sets {', '.join(foreign)}; known are {', '.join(sorted(known))} and [[camera.zone]].")
    for name in ("labels", "size", "rows"):
        if name in table:
            table[name] = tuple(tuple(one) if isinstance(one, list) else one for one in _list(table[name], name, where))
    for name in ("keep_still", "full_speed"):
        if not isinstance(table.get(name, False), bool):
            raise Invalid(f"{where}: {name} must be true or false, got {table[name]!r}.")
    if not all(isinstance(label, str) for label in table.get("labels", ())):
        raise Invalid(f"{where}: labels must be a list of names, got {table['labels']!r}.")
    url = table.get("url")
    if isinstance(url, str) and url and not re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", url):
        table["url"] = str((file.parent / Path(url).expanduser()).resolve())
    try:
        return Camera(**{"name": None, "url": None, **table})
    except (Invalid, TypeError) as error:
        # A TypeError's own text could show a value, and the url is one.
        says = str(error) if isinstance(error, Invalid) else "a setting is of the wrong type."
        raise Invalid(f"{file}: {says}" if isinstance(error, Invalid) else f"{where}: {says}") from None


def _zone(table: Any, where: str) -> Zone:
    if not isinstance(table, dict) or not {"name", "polygon"} <= set(table):
        raise Invalid(f"{where}: a [[camera.zone]] needs a name and a polygon.")
    foreign = sorted(set(table) - {one.name for one in fields(Zone)})
    if foreign:
        raise Invalid(f"{where}, zone {table['name']!r} sets {', '.join(foreign)}, which are unknown.")
    try:
        return Zone(**{**table, "labels": tuple(table.get("labels", ()))})
    except Invalid as error:
        raise Invalid(f"{where}: {error}") from error
    except TypeError as error:
        raise Invalid(f"{where}, zone {table['name']!r}: a setting is of the wrong type ({error}).") from error


def _list(value: Any, name: str, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise Invalid(f"{where}: {name} must be a list, got {value!r}.")
    return value


def _is_number(value: Any, least: float, most: float) -> bool:
    return (isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            and least <= value <= most)

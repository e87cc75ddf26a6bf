"""Sources of a camera's frames: video files and RTSP through FFmpeg, MJPEG over HTTP through a bounded reader."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

import numpy as np

from workbench.errors import Invalid, Unavailable
from workbench.inference.cameras import Camera, address

# A camera that says nothing for so long is taken as gone.
TIMEOUT_S = 10.0
# An 8K JPEG of best quality has about 20 MB; more is no frame.
MAX_JPEG = 32 * 2 ** 20
MAX_HEADER = 16 * 2 ** 10
MAX_PIXELS = 100_000_000
READ = 64 * 2 ** 10
DEFAULT_FPS = 25.0


@dataclass(frozen=True)
class Grabbed:
    """A frame that has arrived but is not decoded.

    time     s since the epoch; of a file, since its beginning
    seconds  s of a clock that never jumps: differences between frames of one camera are true
    decode   gives (H, W, 3) uint8 RGB, or None when the frame is damaged
    """

    time: float
    seconds: float
    decode: Callable[[], np.ndarray | None]


class Source(Protocol):
    """Where a camera's frames come from; a context manager. Opening and grabbing may block up to TIMEOUT_S.

    is_live       frames come at the camera's own pace, whether anybody takes them or not
    is_lazy       `decode` may be called later, in any thread; else only before the next `grab`, in the same thread
    grab()        the next frame; None at the end. Raises Unavailable when the camera is gone for now, Invalid for good
    """

    is_live: bool
    is_lazy: bool

    def __enter__(self) -> Source: ...
    def __exit__(self, *exc_info: object) -> None: ...
    def grab(self) -> Grabbed | None: ...


def open_source(camera: Camera) -> Source:
    """Raises Unavailable when the camera does not answer, Invalid when the file is not there or is no video.

    No error shows more of an address than its host.
    """
    parts = address(camera.url)
    if parts.scheme in ("http", "https"):
        return Mjpeg(camera)
    return Video(camera)


class Video:
    """A video file or an RTSP camera, decoded by the FFmpeg inside OpenCV.

    FFmpeg has to decode every frame, for they lean on each other; only those that are used become RGB.
    """

    is_lazy = False

    def __init__(self, camera: Camera) -> None:
        import cv2
        self._cv2, self._camera = cv2, camera
        self.is_live = not camera.is_file
        if camera.is_file and not Path(camera.url).is_file():
            raise Invalid(f"Camera {camera.name}: {camera.url} is not there or is no file.")
        limit = int(TIMEOUT_S * 1000)
        # Named, because OpenCV would otherwise try readers that print the address, and passwords with it, on stderr.
        self._video = cv2.VideoCapture(camera.url, cv2.CAP_FFMPEG, [
            cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, limit, cv2.CAP_PROP_READ_TIMEOUT_MSEC, limit, cv2.CAP_PROP_N_THREADS, 1])
        if not self._video.isOpened():
            self._video.release()
            if camera.is_file:
                raise Invalid(f"Camera {camera.name}: {camera.url} is no video that FFmpeg reads.")
            raise Unavailable(f"Camera {camera.name} at {camera.shown} does not answer or gives no video; "
                              "check address, user and password.")
        fps = self._video.get(cv2.CAP_PROP_FPS)
        self._step = 1 / (fps if 0.1 <= fps <= 1000 else DEFAULT_FPS)
        self._last = -self._step

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._video.release()

    def grab(self) -> Grabbed | None:
        if not self._video.grab():
            if self.is_live:
                raise Unavailable(f"Camera {self._camera.name} at {self._camera.shown} stopped sending.")
            if self._last < 0:
                raise Invalid(f"Camera {self._camera.name}: {self._camera.url} is no video, or has no whole frame.")
            return None
        if self.is_live:
            return Grabbed(time.time(), time.monotonic(), self._decode)
        self._last = _next_time(self._video.get(self._cv2.CAP_PROP_POS_MSEC) / 1000, self._last, self._step)
        return Grabbed(self._last, self._last, self._decode)

    def _decode(self) -> np.ndarray | None:
        try:
            is_whole, pixels = self._video.retrieve()
            return self._cv2.cvtColor(pixels, self._cv2.COLOR_BGR2RGB) if is_whole and pixels is not None else None
        except self._cv2.error:
            return None


class Mjpeg:
    """JPEGs one after the other in an HTTP answer (multipart/x-mixed-replace)."""

    is_live = True
    is_lazy = True

    def __init__(self, camera: Camera, timeout_s: float = TIMEOUT_S) -> None:
        import requests
        from requests.auth import HTTPBasicAuth, HTTPDigestAuth
        self._camera, self._errors = camera, (requests.RequestException, OSError)
        parts = address(camera.url)
        # The request goes without user and password, so no error of the library can hold them.
        url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        self._session = requests.Session()
        self._session.trust_env = False
        user, password = unquote(parts.username or ""), unquote(parts.password or "")
        if user or password:
            self._session.auth = HTTPBasicAuth(user, password)
        try:
            self._answer = self._get(url, timeout_s)
            if self._answer.status_code == 401 and "digest" in self._answer.headers.get("WWW-Authenticate", "").lower():
                self._answer.close()
                self._session.auth = HTTPDigestAuth(user, password)
                self._answer = self._get(url, timeout_s)
            boundary = _boundary(self._answer.headers.get("Content-Type", ""))
            if self._answer.status_code != 200 or boundary is None:
                kind = self._answer.headers.get("Content-Type", "nothing").partition(";")[0][:60]
                raise Unavailable(f"Camera {camera.name} at {camera.shown} answers {self._answer.status_code} with "
                                  f"{kind}, not a stream of JPEGs (multipart/x-mixed-replace); check path and "
                                  "password.")
        except BaseException as error:
            self.__exit__()
            if isinstance(error, self._errors):
                raise self._gone(error) from None  # the library's text holds the address
            raise
        self._parts = jpegs(lambda: self._answer.raw.read1(READ), boundary)

    def __enter__(self) -> Mjpeg:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._session.close()
        if getattr(self, "_answer", None) is not None:
            self._answer.close()

    def grab(self) -> Grabbed | None:
        from urllib3.exceptions import HTTPError
        try:
            data = next(self._parts, None)
        except (*self._errors, HTTPError, ValueError, AttributeError) as error:
            # ValueError and AttributeError: the answer was closed while it was read.
            raise self._gone(error) from None
        if data is None:
            raise Unavailable(f"Camera {self._camera.name} at {self._camera.shown} stopped sending.")
        return Grabbed(time.time(), time.monotonic(), lambda: decode_jpeg(data))

    def _get(self, url: str, timeout_s: float) -> Any:
        # A redirect would send user and password to another host.
        return self._session.get(url, stream=True, timeout=timeout_s, allow_redirects=False,
                                 headers={"Accept-Encoding": "identity"})

    def _gone(self, error: BaseException) -> Unavailable:
        return Unavailable(f"Camera {self._camera.name} at {self._camera.shown} does not answer or stopped sending "
                           f"({type(error).__name__}).")


def jpegs(read: Callable[[], bytes], boundary: bytes, most: int = MAX_JPEG) -> Iterator[bytes]:
    """The bodies of a multipart stream (RFC 2046, 5.1), each as soon as it is whole.

    read      gives some bytes, b"" at the end
    most      bytes of one body at most

    With or without Content-Length. Raises Unavailable for a header or body beyond its limit: at most about `most`
    bytes are held.
    """
    buffer = bytearray()
    delimiter = b"--" + boundary

    def fill() -> bool:
        more = read()
        buffer.extend(more)
        return bool(more)

    while True:
        while (start := buffer.find(delimiter)) < 0:
            # What comes before a boundary is nobody's; the tail may hold its beginning.
            del buffer[:max(0, len(buffer) - len(delimiter))]
            if not fill():
                return
        del buffer[:start + len(delimiter)]
        while (end := buffer.find(b"\r\n\r\n")) < 0:
            if buffer[:2] == b"--":
                return
            if len(buffer) > MAX_HEADER:
                raise Unavailable(f"A camera's stream has a part header of more than {MAX_HEADER} bytes; it is no "
                                  "MJPEG.")
            if not fill():
                return
        length = _content_length(bytes(buffer[:end]))
        del buffer[:end + 4]
        if length is not None and length > most:
            raise Unavailable(f"A camera's stream announces a frame of {length} bytes; at most {most} are read.")
        searched = 0
        while True:
            if length is not None:
                size = length if len(buffer) >= length else -1
            else:
                size = buffer.find(b"\r\n" + delimiter, searched)
                searched = max(0, len(buffer) - len(delimiter) - 2)
            if size >= 0:
                break
            if len(buffer) > most:
                raise Unavailable(f"A camera's stream has a frame of more than {most} bytes without an end.")
            if not fill():
                return
        body = bytes(buffer[:size])
        del buffer[:size]
        yield body


def decode_jpeg(data: bytes) -> np.ndarray | None:
    """(H, W, 3) uint8 RGB, or None when the bytes are no whole image of a sensible size."""
    import cv2

    from workbench.inference.pixels import decode_rgb
    size = jpeg_size(data)
    if size is None or not 0 < size[0] * size[1] <= MAX_PIXELS:
        return None
    try:
        return decode_rgb(data)
    except cv2.error:
        return None


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) from a JPEG's frame header, before anything is decoded; None without one."""
    from workbench.inference.pixels import image_size
    if data[:2] != b"\xff\xd8" or b"\xff\xd9" not in data[-1024:]:
        return None  # the end marker is missing: cut short
    return image_size(data)


def _next_time(told: float, last: float, step: float) -> float:
    """A file's time stamp where it can be true; else one step after the last frame."""
    if math.isfinite(told) and last < told <= last + 60 and (told > 0 or last < 0):
        return told
    return max(0.0, last + step)


def _boundary(content_type: str) -> bytes | None:
    kind, _, rest = content_type.partition(";")
    if not kind.strip().lower().startswith("multipart/"):
        return None
    for setting in rest.split(";"):
        name, _, value = setting.strip().partition("=")
        if name.lower() == "boundary" and value.strip('" '):
            # Some cameras write the two dashes into the boundary's name already.
            return value.strip('" ').removeprefix("--").encode("latin-1", "replace")
    return None


def _content_length(header: bytes) -> int | None:
    for line in header.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            value = value.strip()
            return int(value) if value.isdigit() and len(value) < 16 else None
    return None

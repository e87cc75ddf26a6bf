"""CVAT's AI tools, as its people see them: which functions it lists, and one call on one frame.

CVAT passes a function's failure on as its own: the words of its answer say what happened between it and the function,
so they are kept here, unlike those of its other failures.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import islice
from typing import Any
from urllib.parse import quote, urlsplit

import requests

from workbench.adapters.cvat.connection import JSON, Connection, _said
from workbench.errors import Invalid, Unavailable

LISTED = 100
CALL_S = (5.0, 130.0)  # a function may take 120 s
ABOUT_S = 5
LOOKED_AT = re.compile(r"host='([^']+)', port=(\d+)|https?://([^:/'\" ]+):(\d+)/api/function")


class ToolFailed(Unavailable):
    """CVAT's answer when a function, or the whole list of them, failed. status: its HTTP status.

    looked_at  "host:port" where CVAT looks for its functions, "" when it does not say
    """

    def __init__(self, sentence: str, status: int, looked_at: str) -> None:
        super().__init__(sentence)
        self.status, self.looked_at = status, looked_at


@dataclass(frozen=True)
class Tool:
    """A function as CVAT lists it."""

    id: str
    kind: str
    name: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class CvatTask:
    """frames: how many pictures it has; project: 0 for none."""

    id: int
    name: str
    frames: int
    project: int


def about(address: str) -> str:
    """The version a CVAT server says it has. Raises Invalid for no web address, Unavailable when no CVAT answers.

    Private and loopback addresses are fine: that is where a team's CVAT stands. No token is sent and no redirect is
    followed, so the address learns nothing.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Invalid(f"{address!r} is not a web address. Write it like http://cvat.example:8080.")
    where = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    try:
        answer = requests.get(
            f"{where}{parts.path.rstrip('/')}/api/server/about",
            timeout=ABOUT_S,
            allow_redirects=False,
            headers={"Accept": JSON},
        )
    except (requests.RequestException, ValueError) as error:
        raise Unavailable(
            f"Nothing answers at {where} ({type(error).__name__}). Check that CVAT is started and that this "
            "machine reaches it."
        ) from error
    try:
        return str(answer.json()["version"])[:40]
    except (ValueError, KeyError, TypeError) as error:
        raise Unavailable(
            f"{where} answers with status {answer.status_code}, but not as CVAT does. Give the address of "
            "its first page, without a path."
        ) from error


class AiTools:
    """`connection` should wait as long as a function may take (CALL_S)."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def version(self) -> str:
        return self._connection.version

    def functions(self) -> list[Tool]:
        """Raises ToolFailed when CVAT does not get the list."""
        return [
            Tool(
                str(one["id"]),
                str(one["kind"]),
                str(one.get("name") or one["id"]),
                tuple(label["name"] for label in one.get("labels_v2") or ()),
            )
            for one in self._ask("GET", "/api/lambda/functions")
        ]

    def call(self, function: str, task: int, frame: int) -> dict[str, Any]:
        """What CVAT would draw on a frame, in its own form ({"shapes", "tags"}); nothing is stored."""
        return self._ask("POST", f"/api/lambda/functions/{quote(function, safe='')}", {"task": task, "frame": frame})

    def tasks(self) -> list[CvatTask]:
        """Those with pictures, newest first."""
        found = self._connection.pages("/api/tasks", sort="-id")
        return [
            CvatTask(one["id"], one["name"], one["size"], one.get("project_id") or 0)
            for one in islice(found, LISTED)
            if one.get("size")
        ]

    def projects(self) -> dict[int, str]:
        """Number -> name, newest first."""
        return {one["id"]: one["name"] for one in islice(self._connection.pages("/api/projects", sort="-id"), LISTED)}

    def labels(self, *, project: int = 0, task: int = 0) -> dict[int, str]:
        """Number -> name, of a project or a task."""
        found = self._connection.pages("/api/labels", project_id=project or None, task_id=task or None)
        return {one["id"]: one["name"] for one in found if not one.get("has_parent")}

    def picture(self, task: int, frame: int) -> bytes:
        """The frame as CVAT's page shows it."""
        _ = self._connection.version
        answer = self._connection._send(
            "GET",
            f"/api/tasks/{task}/data",
            None,
            {"type": "frame", "number": frame, "quality": "compressed"},
            {"Accept": "*/*"},
            None,
        )
        if answer.status != 200:
            self._connection._read(answer, "GET", f"/api/tasks/{task}/data")
        return answer.data

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        _ = self._connection.version
        answer = self._connection._send(method, path, body, None, None, None)
        said = _said(answer)
        if answer.status >= 500 or answer.status in (400, 403, 404, 408, 413, 422) and "for url: http" in said:
            found = LOOKED_AT.search(said)
            looked_at = "" if not found else f"{found[1] or found[3]}:{found[2] or found[4]}"
            if looked_at and "retries exceeded" in said:
                said = f"it does not reach its functions at {looked_at}."
            raise ToolFailed(f"CVAT answers {answer.status}: {said or 'without a reason.'}", answer.status, looked_at)
        return self._connection._read(answer, method, path)

"""A real Nuclio's HTTP API, as its documentation gives it, with what goes wrong there."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from workbench.adapters.nuclio import Nuclio
from workbench.errors import Cancelled, Invalid, Unavailable

FUNCTION = {"metadata": {"name": "student-1-abc", "namespace": "nuclio"}, "spec": {"runtime": "python:3.11"}}


class Dashboard(ThreadingHTTPServer):
    """states: what a function's status is, look after look; the last one stays."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.functions: dict[str, Any] = {}
        self.projects: dict[str, Any] = {}
        self.asked: list[tuple[str, str]] = []
        self.states: list[dict[str, Any]] = [
            {"state": "waitingForResourceConfiguration"},
            {"state": "building"},
            {"state": "ready"},
        ]
        self.failure: tuple[int, bytes] | None = None


class Answers(BaseHTTPRequestHandler):
    server: Dashboard

    def do_GET(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body, name = json.loads(asked) if asked else {}, self.path.rpartition("/")[2]
        self.server.asked.append((self.command, self.path))
        assert self.headers["x-nuclio-function-namespace"] == "nuclio"
        if self.server.failure:
            return self._say(*self.server.failure)
        held = self.server.projects if "/projects" in self.path else self.server.functions
        if self.command in ("POST", "PUT"):
            held[body["metadata"]["name"]] = body
            return self._say(201 if held is self.server.projects else 202, b"")
        if self.command == "DELETE":
            return self._say(204 if held.pop(body["metadata"]["name"], None) else 404, b"")
        if name not in held:
            return self._say(404, b'{"error": "not found"}')
        states = self.server.states
        status = states.pop(0) if len(states) > 1 else states[0]
        self._say(200, json.dumps({**held[name], "status": status}).encode())

    do_POST = do_PUT = do_DELETE = do_GET

    def _say(self, code: int, body: bytes) -> None:
        self.send_response(code)
        if code == 302:
            self.send_header("Location", "http://127.0.0.1:1/")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return None


@pytest.fixture()
def dashboard() -> Iterator[Dashboard]:
    server = Dashboard()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def nuclio(dashboard: Dashboard) -> Nuclio:
    return Nuclio(f"http://127.0.0.1:{dashboard.server_port}/", pause=lambda seconds: None)


def test_a_function_is_made_in_cvat_s_project_and_waited_for(dashboard: Dashboard) -> None:
    nuclio(dashboard).deploy(FUNCTION)
    assert dashboard.functions == {"student-1-abc": FUNCTION} and list(dashboard.projects) == ["cvat"]
    assert [one for one in dashboard.asked if one[0] != "GET"] == [
        ("POST", "/api/projects"),
        ("POST", "/api/functions"),
    ]


def test_deploying_again_replaces_and_deleting_twice_is_fine(dashboard: Dashboard) -> None:
    one = nuclio(dashboard)
    one.deploy(FUNCTION)
    dashboard.asked.clear()
    one.deploy({**FUNCTION, "spec": {"runtime": "python:3.12"}})
    assert [each for each in dashboard.asked if each[0] != "GET"] == [("PUT", "/api/functions/student-1-abc")]
    assert dashboard.functions["student-1-abc"]["spec"] == {"runtime": "python:3.12"}
    one.delete("student-1-abc")
    one.delete("student-1-abc")
    assert dashboard.functions == {}


def test_a_function_that_cannot_be_built_says_what_nuclio_says(dashboard: Dashboard) -> None:
    dashboard.states = [{"state": "building"}, {"state": "error", "message": "no space left on device"}]
    with pytest.raises(Invalid, match="no space left on device"):
        nuclio(dashboard).deploy(FUNCTION)


def test_waiting_can_be_cancelled(dashboard: Dashboard) -> None:
    dashboard.states = [{"state": "building"}]

    def cancelled() -> None:
        raise Cancelled("A person has cancelled it.")

    with pytest.raises(Cancelled):
        nuclio(dashboard).deploy(FUNCTION, cancelled)


@pytest.mark.parametrize(
    ("failure", "kind", "said"),
    [
        ((500, b"boom"), Unavailable, "answers 500 .*boom"),
        ((403, b""), Invalid, "answers 403"),
        ((302, b""), Invalid, "answers 302"),
        ((200, b"<html>"), Invalid, "no Nuclio dashboard"),
    ],
)
def test_other_answers_are_a_sentence(dashboard: Dashboard, failure: tuple[int, bytes], kind: type, said: str) -> None:
    dashboard.failure = failure
    with pytest.raises(kind, match=said):
        nuclio(dashboard).deploy(FUNCTION)


def test_an_address_where_nothing_is_and_one_that_is_none(dashboard: Dashboard) -> None:
    with pytest.raises(Unavailable, match="nuclio_url"):
        Nuclio("http://127.0.0.1:9").deploy(FUNCTION)
    for address in ("", "nuclio:8070", "ftp://x"):
        with pytest.raises(Invalid, match="no web address"):
            Nuclio(address)

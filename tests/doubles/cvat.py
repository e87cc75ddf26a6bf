"""A CVAT server's double: real HTTP on a loopback port, the calls the workbench makes, faults and costs on demand."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from doubles import cvat_lambda
from doubles.cvat_state import CvatState, Refusal, missing, now

JSON = "application/vnd.cvat+json"
# Login tokens are 40 hex digits and sent as Token, the others are personal access tokens and sent as Bearer.
LOGIN, READ_WRITE, READ_ONLY, EXPIRED = "a" * 40, "rw.secret", "ro.secret", "old.secret"
HTML = "<!doctype html>\n<html lang=\"en\">\n<head>\n  <title>Server Error (500)</title>\n</head>\n<body></body>\n</html>\n"


@dataclass
class Fault:
    """What goes wrong, for the next `times` requests of `method` whose path (with query) matches.

    kind  a status (500, 429, 413, ...), "html" (200 with a page), "silence" (no answer, not carried out), "lost" (carried
          out, then no answer), "half" (carried out, half of the answer), "drop" (carried out, fewer drawings kept)
    """

    method: str
    path: str
    kind: int | str
    times: int = 1


@dataclass
class CvatDouble:
    """state: what it holds; journal: (method, path with query, status) of every request; cost_s: seconds a call takes."""

    state: CvatState = field(default_factory=CvatState)
    faults: list[Fault] = field(default_factory=list)
    journal: list[tuple[str, str, int]] = field(default_factory=list)
    cost_s: Callable[[str, str, int], float] = lambda method, path, size: 0.0
    before: Callable[[str, str], None] = lambda method, path: None  # called with each request before it is carried out
    url: str = ""
    lock: threading.RLock = field(default_factory=threading.RLock)

    def fail(self, method: str, path: str, kind: int | str, times: int = 1) -> None:
        self.faults.append(Fault(method, path, kind, times))

    def fault_for(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None

    def calls(self, method: str, path: str) -> list[tuple[str, str, int]]:
        return [one for one in self.journal if one[0] == method and re.search(path, one[1])]


@contextmanager
def cvat(version: str = "2.73.0") -> Iterator[CvatDouble]:
    """Serves a fresh double and ends it."""
    double = CvatDouble(CvatState(version))
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"double": double}))
    server.daemon_threads = True
    double.url = double.state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield double
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is what tests are about; anything else is the double's own fault and is shown."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


@dataclass
class Asked:
    method: str
    path: str
    query: dict[str, str]
    headers: Any
    body: Any
    files: dict[str, bytes]


class _Handler(BaseHTTPRequestHandler):
    double: CvatDouble
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: Any) -> None:
        """The journal is the log."""

    def do_GET(self) -> None:
        double, parts = self.double, urlsplit(self.path)
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        double.before(self.command, self.path)
        fault = double.fault_for(self.command, self.path)
        if fault and fault.kind == "silence":
            return self._hang_up(0)
        if fault and isinstance(fault.kind, int):
            headers = {"Retry-After": "0"} if fault.kind == 429 else {}
            body = {"detail": "Request was throttled. Expected available in 0 seconds."} if fault.kind == 429 else HTML
            return self._answer(fault.kind, body, headers)
        if fault and fault.kind == "html":
            return self._answer(200, "<!doctype html><html><body>Please sign in</body></html>", {})
        due = time.monotonic() + double.cost_s(self.command, self.path, len(data))
        with double.lock:
            try:
                asked = Asked(self.command, parts.path, dict(parse_qsl(parts.query, keep_blank_values=True)), self.headers,
                              *_body(self.headers, data))
                status, body, headers = _answer(double.state, asked)
            except Refusal as refusal:
                status, body, headers = refusal.status, refusal.body, refusal.headers
        time.sleep(max(0.0, due - time.monotonic()))  # its own work is part of what the call takes
        if fault and fault.kind == "drop":
            body = {**body, "shapes": body["shapes"][:-1]}
        self._answer(status, body, headers, is_lost=bool(fault) and fault.kind == "lost",
                     is_half=bool(fault) and fault.kind == "half")

    do_POST = do_PATCH = do_PUT = do_DELETE = do_GET

    def _answer(self, status: int, body: Any, headers: dict[str, str], is_lost: bool = False, is_half: bool = False) -> None:
        self.double.journal.append((self.command, self.path, status))
        if is_lost:
            return self._hang_up(status)
        kind = headers.get("Content-Type", JSON)
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        if isinstance(body, str) and (body.startswith("<") or status == 404):  # CVAT's pages and some plain texts
            kind, data = "text/html; charset=utf-8", body.encode()
        self.send_response(status)
        for name, value in {**headers, **({"Content-Type": kind} if data else {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        for cookie in ("sessionid", "csrftoken") if self.path == "/api/auth/login" and status == 200 else ():
            self.send_header("Set-Cookie", f"{cookie}=c00c1e; Path=/")
        self.end_headers()
        self.wfile.write(data[:len(data) // 2] if is_half else data)
        if is_half:
            self.close_connection = True

    def _hang_up(self, status: int) -> None:
        if not status:
            self.double.journal.append((self.command, self.path, 0))
        self.close_connection = True


def _body(headers: Any, data: bytes) -> tuple[Any, dict[str, bytes]]:
    """(JSON or form fields, files)"""
    kind = headers.get("Content-Type", "")
    if kind.startswith("multipart/"):
        whole = BytesParser(policy=HTTP).parsebytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + data)
        files, fields = {}, {}
        for part in whole.iter_parts():
            if part.get_filename() is None:
                fields[part.get_param("name", header="content-disposition")] = part.get_payload(decode=True).decode()
            else:
                files[part.get_filename()] = part.get_payload(decode=True)
        return fields, files
    if not data:
        return None, {}
    if "json" not in kind:
        raise Refusal(415, {"detail": f'Unsupported media type "{kind}" in request.'})

    def refuse(name: str) -> float:
        raise Refusal(400, {"detail": f"JSON parse error - Out of range float values are not JSON compliant: {name!r}"})

    return json.loads(data, parse_constant=refuse), {}


def _who(asked: Asked) -> str:
    """The token's rights: "" for nobody, "rw" or "ro"."""
    kind, _, token = asked.headers.get("Authorization", "").partition(" ")
    if not kind:
        if "sessionid" not in asked.headers.get("Cookie", ""):
            return ""
        if asked.method != "GET" and "X-Csrftoken" not in asked.headers:
            raise Refusal(403, {"detail": "CSRF Failed: CSRF token missing."})
        return "rw"
    rights = {("Token", LOGIN): "rw", ("Bearer", READ_WRITE): "rw", ("Bearer", READ_ONLY): "ro"}.get((kind, token))
    if rights is None:
        raise Refusal(401, {"detail": "Invalid token."}, {"WWW-Authenticate": "Token"})
    return rights


def _answer(state: CvatState, asked: Asked) -> tuple[int, Any, dict[str, str]]:
    rights, path = _who(asked), asked.path.removeprefix("/api/")
    if path == "server/about":
        return 200, {"name": "Computer Vision Annotation Tool", "description": "CVAT", "version": state.version,
                     "logo_url": f"{state.url}/static/logo.svg", "subtitle": "Open Data Annotation Platform"}, {}
    if path == "auth/login":
        if asked.body.get("password") != "secret":
            raise Refusal(400, {"non_field_errors": ["Unable to log in with provided credentials."]})
        return 200, {"key": LOGIN}, {}
    if not rights:
        raise Refusal(401, {"detail": "Authentication credentials were not provided."}, {"WWW-Authenticate": "Token"})
    if asked.headers.get("Accept") == "application/json":
        raise Refusal(406, {"detail": "Could not satisfy the request Accept header."})
    if path == "auth/logout":
        return 200, {"detail": "Successfully logged out."}, {}
    if path == "auth/access_tokens/self":
        return 200, {"id": 1, "name": "ci", "created_date": now(), "updated_date": now(), "expiry_date": None,
                     "last_used_date": now(), "read_only": rights == "ro", "owner": state.user(1)}, {}
    if rights == "ro" and asked.method != "GET":
        raise Refusal(403, {"detail": "You do not have permission to perform this action."})
    for method, pattern, handler in ROUTES:
        found = re.fullmatch(pattern, path)
        if found and method == asked.method:
            numbers = [int(part) if part.isdigit() else unquote(part) for part in found.groups()]
            status, body = handler(state, asked, *numbers)
            return status, body, {"Content-Type": body[1]} if isinstance(body, tuple) else {}
    raise Refusal(404, "\n<!doctype html>\n<html lang=\"en\">\n<head>\n  <title>Not Found</title>\n</head></html>\n")


def _page(asked: Asked, url: str, answers: list[Any]) -> tuple[int, Any]:
    """Newest first, as CVAT lists all but labels."""
    page, size = int(asked.query.get("page", 1)), int(asked.query.get("page_size", 10))
    if page > 1 and (page - 1) * size >= len(answers):
        raise Refusal(404, {"detail": "Invalid page."})
    more = f"{url}{asked.path}?page={page + 1}&page_size={size}" if page * size < len(answers) else None
    less = f"{url}{asked.path}?page={page - 1}&page_size={size}" if page > 1 else None
    return 200, {"count": len(answers), "next": more, "previous": less, "results": answers[(page - 1) * size:page * size]}


def _list(items: str, one: str, *filters: str) -> Callable[..., tuple[int, Any]]:
    """A list with those filters; CVAT ignores the ones it does not know (k_delete_page_404 9)."""
    def answer(state: CvatState, asked: Asked) -> tuple[int, Any]:
        found = [getattr(state, one)(key) for key in sorted(getattr(state, items), reverse=True)]
        for name in filters:
            if name in asked.query:
                found = [each for each in found if str(each.get(name)) == asked.query[name]]
        if asked.query.get("sort") == "-updated_date":
            found.sort(key=lambda each: each["updated_date"], reverse=True)
        return _page(asked, state.url, found)
    return answer


def _labels(state: CvatState, asked: Asked) -> tuple[int, Any]:
    project = asked.query.get("project_id")
    if "task_id" in asked.query:
        project = state.task(int(asked.query["task_id"]))["project_id"]
    if "job_id" in asked.query:
        project = state.job(int(asked.query["job_id"]))["project_id"]
    found = [label for _, label in sorted(state.labels.items()) if project is None or str(label["project_id"]) == str(project)]
    return _page(asked, state.url, found)


def _post_data(state: CvatState, asked: Asked, task: int) -> tuple[int, Any]:
    state.task(task)
    if "Upload-Start" in asked.headers:
        return 202, None
    if "Upload-Multiple" in asked.headers:
        state.receive(task, asked.files)
        return 200, None
    if "Upload-Finish" not in asked.headers:  # all at once: c_task_data 64
        state.receive(task, asked.files)
    return 202, state.finish_upload(task, asked.body or {})


def _get_data(state: CvatState, asked: Asked, task: int) -> tuple[int, Any]:
    return 200, state.data(task, asked.query)[0]


def _jobs_of(state: CvatState, task: int) -> list[int]:
    if not state.task(task).get("size"):
        raise Refusal(400, "<p>Exporting annotations from a task without data is not allowed</p>")
    return [key for key, job in state.jobs.items() if job["task_id"] == task and job["type"] == "annotation"]


def _of_job(state: CvatState, job: int) -> list[int]:
    state.job(job)
    return [job]


def _annotated(of: Callable[[CvatState, int], list[int]]) -> list[tuple[str, Callable[..., tuple[int, Any]]]]:
    is_job = of is _of_job
    return [("GET", lambda state, asked, key: (200, state.annotations(of(state, key)))),
            ("PUT", lambda state, asked, key: (200, state.replace(of(state, key), asked.body or {}, is_job))),
            ("PATCH", lambda state, asked, key: (200, state.write(of(state, key), asked.body or {},
                                                                  asked.query.get("action", ""), is_job))),
            ("DELETE", lambda state, asked, key: (204, state.replace(of(state, key), {}) and None))]


def _issues(state: CvatState, asked: Asked) -> tuple[int, Any]:
    found = [state.issue(key) for key in sorted(state.issues, reverse=True)]
    if "task_id" in asked.query:
        found = [one for one in found if str(state.jobs[one["job"]]["task_id"]) == asked.query["task_id"]]
    if "job_id" in asked.query:
        found = [one for one in found if str(one["job"]) == asked.query["job_id"]]
    return _page(asked, state.url, found)


def _comments(state: CvatState, asked: Asked) -> tuple[int, Any]:
    return _page(asked, state.url, [one for one in reversed(state.comments.values())
                                    if str(one["issue"]) == asked.query.get("issue_id", str(one["issue"]))])


def _change_issue(state: CvatState, asked: Asked, issue: int) -> tuple[int, Any]:
    state.issue(issue)
    state.issues[issue].update({name: asked.body[name] for name in ("resolved", "position") if name in asked.body})
    return 200, state.issue(issue)


def _users(state: CvatState, asked: Asked) -> tuple[int, Any]:
    return _page(asked, state.url, [_user(state, key) for key, name in state.users.items()
                                    if asked.query.get("search", "") in name])


def _user(state: CvatState, key: int) -> dict[str, Any]:
    return {**state.user(key), "email": f"{state.users[key]}@example.com", "groups": ["user"], "is_staff": key == 1,
            "is_superuser": key == 1, "is_active": True, "last_login": now(), "date_joined": now(),
            "has_analytics_access": key == 1}


def _requests(state: CvatState, asked: Asked) -> tuple[int, Any]:
    found = [{name: value for name, value in one.items() if name != "polls"} for one in state.requests.values()
             if str(one["operation"]["task_id"]) == asked.query.get("task_id", str(one["operation"]["task_id"]))]
    return _page(asked, state.url, found)


def _reports(state: CvatState, asked: Asked) -> tuple[int, Any]:
    found = [one for one in reversed(state.reports.values())
             if str(one["task_id"]) == asked.query.get("task_id", str(one["task_id"]))]
    return _page(asked, state.url, found)


def _report(state: CvatState, asked: Asked, key: int) -> tuple[int, Any]:
    if key not in state.reports:
        raise missing("QualityReport")
    return 200, state.reports[key]


def _delete_job(state: CvatState, asked: Asked, job: int) -> tuple[int, Any]:
    if state.job(job)["type"] != "ground_truth":
        raise Refusal(400, ["Only ground truth jobs can be removed"])
    del state.jobs[job]
    return 204, None


def _job_meta(state: CvatState, asked: Asked, job: int) -> tuple[int, Any]:
    own = state.jobs.get(job) or state.job(job)
    included = own["frames"] if own["type"] == "ground_truth" else None
    return 200, state.meta(own["task_id"], own["start_frame"], own["stop_frame"], included)


ROUTES: tuple[tuple[str, str, Callable[..., tuple[int, Any]]], ...] = (
    ("GET", r"users/self", lambda state, asked: (200, _user(state, 1))),
    ("GET", r"users", _users),
    ("GET", r"projects", _list("projects", "project", "name")),
    ("POST", r"projects", lambda state, asked: (201, state.make_project(asked.body or {}))),
    ("GET", r"projects/(\d+)", lambda state, asked, key: (200, state.project(key))),
    ("PATCH", r"projects/(\d+)", lambda state, asked, key: (200, state.change_project(key, asked.body))),
    ("DELETE", r"projects/(\d+)", lambda state, asked, key: (204, state.delete_project(key))),
    ("GET", r"labels", _labels),
    ("GET", r"lambda/functions", cvat_lambda.functions),
    ("POST", r"lambda/functions/([\w.-]+)", cvat_lambda.call),
    ("GET", r"labels/(\d+)", lambda state, asked, key: (200, state.labels[key])),
    ("PATCH", r"labels/(\d+)", lambda state, asked, key: (200, state.change_label(key, asked.body))),
    ("GET", r"tasks", _list("tasks", "task", "name", "project_id")),
    ("POST", r"tasks", lambda state, asked: (201, state.make_task(asked.body or {}))),
    ("GET", r"tasks/(\d+)", lambda state, asked, key: (200, state.task(key))),
    ("DELETE", r"tasks/(\d+)", lambda state, asked, key: (204, state.delete_task(key))),
    ("POST", r"tasks/(\d+)/data/?", _post_data),
    ("GET", r"tasks/(\d+)/data/?", _get_data),
    ("GET", r"tasks/(\d+)/data/meta", lambda state, asked, key: (200, state.meta(key))),
    ("GET", r"jobs", _list("jobs", "job", "task_id", "project_id", "state", "stage", "type")),
    ("POST", r"jobs", lambda state, asked: (201, state.make_ground_truth(asked.body or {}))),
    ("GET", r"jobs/(\d+)", lambda state, asked, key: (200, state.job(key))),
    ("PATCH", r"jobs/(\d+)", lambda state, asked, key: (200, state.change_job(key, asked.body))),
    ("DELETE", r"jobs/(\d+)", _delete_job),
    ("GET", r"jobs/(\d+)/data/meta", _job_meta),
    *((method, r"tasks/(\d+)/annotations/?", handler) for method, handler in _annotated(_jobs_of)),
    *((method, r"jobs/(\d+)/annotations/?", handler) for method, handler in _annotated(_of_job)),
    ("GET", r"requests", _requests),
    ("GET", r"requests/(.+)", lambda state, asked, rq_id: (200, state.request(str(rq_id)))),
    ("GET", r"tasks/(\d+)/validation_layout", lambda state, asked, key: (200, state.layout(key))),
    ("PATCH", r"tasks/(\d+)/data/meta", lambda state, asked, key: (200, state.hide(key, asked.body))),
    ("GET", r"webhooks", _list("webhooks", "webhook", "project_id")),
    ("POST", r"webhooks", lambda state, asked: (201, state.make_webhook(asked.body or {}))),
    ("GET", r"webhooks/(\d+)", lambda state, asked, key: (200, state.webhook(key))),
    ("PATCH", r"webhooks/(\d+)", lambda state, asked, key: (200, state.change_webhook(key, asked.body or {}))),
    ("DELETE", r"webhooks/(\d+)", lambda state, asked, key: (204, state.delete_webhook(key))),
    ("GET", r"webhooks/(\d+)/deliveries", lambda state, asked, key: _page(asked, state.url, state.deliveries_of(key))),
    ("POST", r"webhooks/(\d+)/ping", lambda state, asked, key: (200, state.ping(key))),
    ("GET", r"issues", _issues),
    ("POST", r"issues", lambda state, asked: (201, state.make_issue(asked.body or {}))),
    ("GET", r"issues/(\d+)", lambda state, asked, key: (200, state.issue(key))),
    ("PATCH", r"issues/(\d+)", _change_issue),
    ("GET", r"comments", _comments),
    ("GET", r"quality/reports", _reports),
    ("POST", r"quality/reports", lambda state, asked: (202, state.measure(asked.body or {}))),
    ("GET", r"quality/reports/(\d+)", _report),
)

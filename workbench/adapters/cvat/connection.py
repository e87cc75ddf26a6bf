"""The connection to a CVAT server: who we are, which version answers, and every failure as a sentence.

cvat-sdk carries the requests. Its generated models are not used: they refuse the answers of servers older or newer
than the SDK, so bodies are read as the JSON they are.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import quote, urlsplit

from workbench.errors import Conflict, Invalid, NotFound, Unavailable, WorkbenchError

# The versions whose traffic or change log this adapter was written against; 2.73.0 is the recorded one.
OLDEST, NEWEST = (2, 40), (2, 89)
TIMEOUT_S = (5.0, 60.0)  # to connect, to answer
ATTEMPTS = 4
PATIENCE_S = 60.0  # the longest a Retry-After is waited for
PAGE = 500
JSON = "application/vnd.cvat+json"  # `application/json` alone is answered with 406
LOGIN_TOKEN = re.compile(r"[0-9a-f]{40}")
NOT_HANDLED = (429,)  # the request was turned away at the door: safe to send again, whatever it was
PASSING = (408, 500, 502, 503, 504)


class NotAnswered(Unavailable):
    """A request whose outcome is not known: it may have been carried out."""


class Refused(Invalid):
    """CVAT's 400, in its words."""


class Gone(NotFound):
    """CVAT's 404: what was asked for is not there any more."""


class Connection:
    """url: CVAT's first page. token: a login token (40 hex digits) or a personal access token.

    Nothing connects before the first call. `pause` waits between two attempts.
    """

    def __init__(self, url: str, token: str, timeout_s: tuple[float, float] = TIMEOUT_S,
                 pause: Callable[[float], None] = time.sleep) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            # The address may hold a password, so it is not repeated.
            raise Invalid("The address of CVAT is no web address. Mend the setting 'cvat_url': it reads "
                          "http://cvat.example:8080.")
        self.url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
        self._token, self._timeout_s, self._pause = token.strip(), timeout_s, pause
        self._client: Any = None
        self._version = ""

    @property
    def version(self) -> str:
        """The server's version. Raises Invalid for one this adapter does not know, and when it is no CVAT."""
        if not self._version:
            self._version = self._read_version()
        return self._version

    def get(self, path: str, **query: Any) -> Any:
        return self.call("GET", path, query=query)

    def pages(self, path: str, **query: Any) -> Iterator[dict[str, Any]]:
        """All results of a list, page by page."""
        page = 1
        while True:
            answer = self.call("GET", path, query={**query, "page": page, "page_size": PAGE})
            if not isinstance(answer, dict) or "results" not in answer:
                raise self._not_cvat(200)
            yield from answer["results"]
            if not answer.get("next"):
                return
            page += 1

    def delete(self, path: str) -> None:
        """Ends with it gone, whoever deleted it: of two attempts the second finds nothing."""
        with suppress(Gone):
            self.call("DELETE", path)

    def call(self, method: str, path: str, body: Any = None, query: dict[str, Any] | None = None,
             is_repeatable: bool | None = None, headers: dict[str, str] | None = None,
             files: dict[str, Any] | None = None) -> Any:
        """One request; the JSON it answers, None for an empty answer.

        is_repeatable  sending it twice does what sending it once does; default: all but POST and PATCH

        A repeatable request is tried ATTEMPTS times. Raises Unavailable when the server does not answer (NotAnswered
        when an unrepeatable request may have been carried out), Refused for a 400, Gone for a 404, Invalid for a wrong
        token, missing rights, a body that is not JSON and a server that is not a CVAT of a known version.
        """
        if not self._version and path != "/api/server/about":
            _ = self.version  # says so before anything is asked of a server nobody knows
        if is_repeatable is None:
            is_repeatable = method not in ("POST", "PATCH")
        if body is not None:
            try:
                json.dumps(body, allow_nan=False)
            except ValueError as error:
                raise Invalid(f"What is to be sent to CVAT is not JSON ({error}). Remove values that are no finite "
                              "numbers.") from error
        for attempt in range(ATTEMPTS):
            is_last = attempt == ATTEMPTS - 1
            try:
                answer = self._send(method, path, body, query, headers, files)
                is_again = answer.status in NOT_HANDLED or (is_repeatable and answer.status in PASSING)
                if is_last or not is_again:
                    return self._read(answer, method, path)
                self._pause(_wait_s(answer, attempt))
            except NotAnswered:
                if is_last or not is_repeatable:
                    raise
                self._pause(0.5 * 2 ** attempt)
            except Unavailable as error:
                if not is_repeatable and not _never_sent(error):
                    raise NotAnswered(str(error)) from error
                if is_last:
                    raise
                self._pause(0.5 * 2 ** attempt)
        raise AssertionError("the last attempt returns or raises")

    def wait(self, rq_id: str, check: Callable[[], None] = lambda: None, limit_s: float = 3600) -> dict[str, Any]:
        """Polls a background request until it is over; its final record ("status" is "finished" or "failed").

        CVAT forgets finished requests after minutes: one it does not know raises Gone.
        """
        start, pause_s = time.monotonic(), 0.05
        while time.monotonic() - start < limit_s:
            check()
            found = self.get(f"/api/requests/{quote(rq_id, safe='')}")
            if str(found.get("status")).lower() in ("finished", "failed"):
                return found
            self._pause(pause_s)
            pause_s = min(pause_s * 1.5, 2.0)
        raise Unavailable(f"CVAT at {self.url} has not finished request {rq_id} within {limit_s:.0f} s. See whether "
                          "its workers run (docker compose ps), then try again.")

    def _send(self, method: str, path: str, body: Any, query: dict[str, Any] | None, headers: dict[str, str] | None,
              files: dict[str, Any] | None) -> Any:
        import urllib3
        from cvat_sdk.api_client.exceptions import OpenApiException
        client = self._open()
        sent = {"Accept": JSON, **client.get_common_headers(), **self._credentials(), **(headers or {})}
        if files is not None:
            sent["Content-Type"] = "multipart/form-data"
        asked = [(name, value) for name, value in (query or {}).items() if value is not None]
        try:
            return client.rest_client.request(method, self.url + path, query_params=asked, headers=sent, body=body,
                                              post_params=files, _request_timeout=self._timeout_s, _check_status=False)
        except (urllib3.exceptions.HTTPError, OpenApiException, OSError) as error:
            reason = getattr(error, "reason", None) or error
            raise Unavailable(f"CVAT at {self.url} does not answer ({type(reason).__name__}). Check that it runs and "
                              "that this machine reaches it (setting 'cvat_url').") from error

    def _open(self) -> Any:
        if self._client is None:
            from cvat_sdk.api_client import ApiClient, Configuration
            from urllib3 import Retry
            configuration = Configuration(host=self.url)
            # Repeating is decided in `call`, which knows what may be sent twice; a followed redirect would turn a POST
            # into a GET and may carry the token elsewhere.
            configuration.retries = Retry(total=0, redirect=0, raise_on_redirect=False, raise_on_status=False)
            self._client = ApiClient(configuration)
        return self._client

    def _credentials(self) -> dict[str, str]:
        if not self._token:
            raise Invalid("CVAT needs a token. Make one in CVAT (Profile, Security, Access tokens: read and write) and "
                          "write it into the setting 'cvat_token'.")
        # A personal access token is only taken as Bearer, a login token only as Token (recorded: a_auth 39 to 45).
        kind = "Token" if LOGIN_TOKEN.fullmatch(self._token) else "Bearer"
        return {"Authorization": f"{kind} {self._token}"}

    def _read_version(self) -> str:
        about = self.get("/api/server/about")
        version = str(about.get("version", "")) if isinstance(about, dict) else ""
        found = re.match(r"(\d+)\.(\d+)", version)
        if not found:
            raise self._not_cvat(200)
        if not OLDEST <= (int(found[1]), int(found[2])) <= NEWEST:
            raise Invalid(f"CVAT at {self.url} is version {version}; this workbench knows {OLDEST[0]}.{OLDEST[1]} to "
                          f"{NEWEST[0]}.{NEWEST[1]} and does not guess. Use such a CVAT, or a newer workbench.")
        return version

    def _read(self, answer: Any, method: str, path: str) -> Any:
        if not 200 <= answer.status < 300:
            raise self._failure(answer, method, path)
        if not answer.data:
            return None
        kind = answer.headers.get("Content-Type", "")
        if "json" not in kind:
            raise self._not_cvat(answer.status, kind)
        try:
            return json.loads(answer.data)
        except ValueError as error:
            raise NotAnswered(f"CVAT at {self.url} broke off in the middle of an answer ({method} {path}). Try "
                              "again.") from error

    def _failure(self, answer: Any, method: str, path: str) -> WorkbenchError:
        said, status, where = _said(answer), answer.status, f"CVAT at {self.url}"
        if status == 401:
            return Invalid(f"{where} does not take the token: it is wrong, expired or revoked. Make a new one in CVAT "
                           "(Profile, Security, Access tokens) and write it into the setting 'cvat_token'.")
        if status == 403:
            return Invalid(self._not_allowed(method, said))
        if status == 404:
            if "json" not in answer.headers.get("Content-Type", "") and path == "/api/server/about":
                return self._not_cvat(status)
            return Gone(f"{where} has no {path.removeprefix('/api/')} (any more): {said or 'not found'}")
        if status == 409:
            return Conflict(f"{where} is busy with the same already ({said}). Wait until it is done, then try again.")
        if status == 413:
            return Invalid(f"{where} refuses a request of this size (413). Raise client_max_body_size of the proxy in "
                           "front of it, or send fewer or smaller pictures at once.")
        if status == 429:
            return Unavailable(f"{where} asks to be called less often (429). Wait a minute, then try again.")
        if 300 <= status < 400:
            return Invalid(f"{where} sends on to {answer.headers.get('Location', 'another address')}. Write the "
                           "address that CVAT really has into the setting 'cvat_url'.")
        if status >= 500:
            hint = (" A drawing with a coordinate that is no number, as a faulty function stores it, also does this: "
                    "delete the annotations of that job in CVAT.") if method == "GET" and "annotations" in path else ""
            kind = Unavailable if method == "GET" else NotAnswered
            return kind(f"{where} failed ({status}, {method} {path}). Look into its log, then try again.{hint}")
        return Refused(f"{where} refuses {method} {path} ({status}): {said}")

    def _not_allowed(self, method: str, said: str) -> str:
        """403, told apart: a token that may only read, or a person who may not."""
        if method != "GET" and not LOGIN_TOKEN.fullmatch(self._token):
            answer = self._send("GET", "/api/auth/access_tokens/self", None, None, None, None)
            if answer.status == 200 and json.loads(answer.data).get("read_only"):
                return (f"The token for CVAT at {self.url} may only read. Make one with read and write access "
                        "(Profile, Security, Access tokens) and write it into the setting 'cvat_token'.")
        return (f"CVAT at {self.url} does not allow this to the token's owner ({said}). Use the token of somebody who "
                "owns the project, or let an administrator give them the right.")

    def _not_cvat(self, status: int, kind: str = "") -> Invalid:
        what = "a web page" if "html" in kind or not kind else kind
        return Invalid(f"{self.url} answers, but not as CVAT's API does (status {status}, {what}). Write the address "
                       "of CVAT's first page into the setting 'cvat_url'; a proxy with its own sign-in must let /api "
                       "through.")


def _said(answer: Any) -> str:
    """What CVAT gave as the reason, in one line; its HTML error pages say nothing."""
    if "json" not in answer.headers.get("Content-Type", ""):
        text = answer.data.decode("utf-8", "replace") if answer.data else ""
        return "" if "<" in text else text[:300]
    try:
        found = json.loads(answer.data)
    except ValueError:
        return ""
    if isinstance(found, dict) and set(found) == {"detail"}:
        found = found["detail"]
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    return (found if isinstance(found, str) else json.dumps(found, ensure_ascii=False))[:300]


def _wait_s(answer: Any, attempt: int) -> float:
    asked = answer.headers.get("Retry-After", "")
    return min(float(asked), PATIENCE_S) if asked.isdigit() else 0.5 * 2 ** attempt


def _never_sent(error: Unavailable) -> bool:
    """Whether the connection was refused, so that the server cannot have seen the request."""
    from urllib3.exceptions import ConnectTimeoutError, NewConnectionError
    cause = error.__cause__
    return isinstance(getattr(cause, "reason", cause), (NewConnectionError, ConnectTimeoutError))

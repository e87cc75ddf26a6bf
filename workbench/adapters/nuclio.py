"""A Nuclio server over its dashboard's HTTP API (docs.nuclio.io, reference/api)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, urlsplit

import requests

from workbench.errors import Invalid, NotFound, Unavailable

PROJECT, NAMESPACE = "cvat", "nuclio"
TIMEOUT_S = (5, 70)  # creating answers within its own minute
BUILD_S = 900
POLL_S = 2.0


class Nuclio:
    """url: the dashboard's address. Functions go to the project and namespace in which CVAT looks (cvat, nuclio)."""

    def __init__(self, url: str, pause: Callable[[float], None] = time.sleep) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Invalid(
                "The address of Nuclio is no web address. Mend the setting 'nuclio_url': it reads "
                "http://nuclio.example:8070."
            )
        self.url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
        self._pause = pause

    def deploy(self, function: dict[str, Any], check: Callable[[], None] = lambda: None) -> None:
        """Makes the function, or replaces the one of that name, and returns when Nuclio says it is ready.

        check  raises to stop waiting. Raises Invalid with Nuclio's words when it cannot be built.
        """
        name = function["metadata"]["name"]
        if self._ask("GET", f"/api/projects/{PROJECT}", may_lack=True) is None:
            self._ask(
                "POST",
                "/api/projects",
                {"metadata": {"name": PROJECT, "namespace": NAMESPACE}, "spec": {"description": "CVAT"}},
            )
        if self._ask("GET", f"/api/functions/{name}", may_lack=True) is None:
            self._ask("POST", "/api/functions", function)
        else:
            self._ask("PUT", f"/api/functions/{name}", function)
        end = time.monotonic() + BUILD_S
        while time.monotonic() < end:
            check()
            status = (self._ask("GET", f"/api/functions/{name}") or {}).get("status") or {}
            if status.get("state") == "ready":
                return
            if status.get("state") in ("error", "unhealthy"):
                raise Invalid(
                    f"Nuclio could not make {name}: {str(status.get('message') or 'it does not say why')[:300]} "
                    f"Its log is on {self.url}."
                )
            self._pause(POLL_S)
        raise Unavailable(f"Nuclio has not made {name} within {BUILD_S // 60} minutes. See its state on {self.url}.")

    def delete(self, name: str) -> None:
        """Ends with it gone."""
        self._ask("DELETE", "/api/functions", {"metadata": {"name": name, "namespace": NAMESPACE}}, may_lack=True)

    def _ask(self, method: str, path: str, body: Any = None, may_lack: bool = False) -> Any:
        headers = {
            "x-nuclio-project-name": PROJECT,
            "x-nuclio-function-namespace": NAMESPACE,
            "x-nuclio-project-namespace": NAMESPACE,
        }
        try:
            answer = requests.request(
                method, self.url + quote(path), json=body, headers=headers, timeout=TIMEOUT_S, allow_redirects=False
            )
        except requests.RequestException as error:
            raise Unavailable(
                f"Nuclio at {self.url} does not answer ({type(error).__name__}). Check that its dashboard "
                "runs, and the setting 'nuclio_url'."
            ) from error
        if answer.status_code == 404 and may_lack:
            return None
        if answer.status_code == 404:
            raise NotFound(f"Nuclio at {self.url} has no {path} (any more).")
        if not 200 <= answer.status_code < 300:
            said = answer.text[:300].strip()
            kind = Unavailable if answer.status_code >= 500 else Invalid
            raise kind(
                f"Nuclio at {self.url} answers {answer.status_code} to {method} {path}: "
                f"{said or 'without a reason'}. See its dashboard, then try again."
            )
        try:
            return answer.json() if answer.content else {}
        except ValueError as error:
            raise Invalid(
                f"What answers at {self.url} is no Nuclio dashboard. Mend the setting 'nuclio_url'."
            ) from error

"""What CVAT does with its serverless functions, for the double: it asks a Nuclio dashboard and passes failures on.

The answers are those recorded in g_lambda; an unreachable dashboard as a real CVAT 2.73 says it.
"""

from __future__ import annotations

import base64
import http.client
import json
from typing import Any

from doubles.cvat_state import CvatState, Refusal

HEADERS = {
    "x-nuclio-project-name": "cvat",
    "x-nuclio-function-namespace": "nuclio",
    "x-nuclio-invoke-via": "domain-name",
    "X-Nuclio-Invoke-Timeout": "120s",
}


def functions(state: CvatState, asked: Any) -> tuple[int, Any]:
    return 200, [_listed(one) for one in _ask(state, "GET", "/api/functions").values()]


def call(state: CvatState, asked: Any, name: str) -> tuple[int, Any]:
    """An online call: labels are mapped by equal names, what the function answers is not stored."""
    function = _listed(_ask(state, "GET", f"/api/functions/{name}"))
    task, frame = state.task(asked.body["task"]), asked.body["frame"]
    image = base64.b64encode(state.pixels[task["id"]][frame]).decode()
    found = _ask(
        state,
        "POST",
        "/api/function_invocations",
        {"image": image},
        {"x-nuclio-function-name": name, "x-nuclio-path": "/"},
    )
    labels = {one["name"]: key for key, one in state.labels.items() if one["project_id"] == task["project_id"]}
    known = {label["name"] for label in function["labels_v2"]} & labels.keys()
    shapes = [
        {
            "type": one["type"],
            "points": one["points"],
            "label_id": labels[one["label"]],
            "frame": frame,
            "score": 1,
            "source": "auto",
            "attributes": [],
        }
        for one in found
        if one["label"] in known and one["type"] != "tag"
    ]
    tags = [
        {"label_id": labels[one["label"]], "frame": frame, "source": "auto", "attributes": []}
        for one in found
        if one["label"] in known and one["type"] == "tag"
    ]
    return 200, {"version": 0, "tags": tags, "shapes": shapes, "tracks": [], "intervals": []}


def _listed(function: dict[str, Any]) -> dict[str, Any]:
    """A missing key is a KeyError, and that is a page with status 500 (g_lambda 225)."""
    try:
        said = function["metadata"]["annotations"]
        labels = [
            {
                "name": one["name"],
                "type": one.get("type", "any"),
                "attributes": [
                    {key: each[key] for key in ("name", "input_type", "values")} for each in one.get("attributes", [])
                ],
            }
            for one in json.loads(said.get("spec") or "[]")
        ]
        function["status"].get("httpPort")
        return {
            "id": function["metadata"]["name"],
            "kind": said["type"],
            "labels_v2": labels,
            "description": function["spec"]["description"],
            "name": said.get("name"),
            "version": int(said["version"]),
        }
    except KeyError as error:
        raise Refusal(
            500, '\n<!doctype html>\n<html lang="en">\n<head>\n  <title>Server Error (500)</title>\n</head></html>'
        ) from error


def _ask(state: CvatState, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
    host, _, port = getattr(state, "nuclio", "nuclio:8070").partition(":")
    url = f"http://{host}:{port}{path}"
    line = http.client.HTTPConnection(host, int(port), timeout=60)
    try:
        line.request(
            method,
            path,
            json.dumps(body) if body is not None else None,
            {**HEADERS, "Content-Type": "application/json", **(headers or {})},
        )
        answer = line.getresponse()
        data = answer.read()
    except OSError as error:
        raise Refusal(
            503,
            f"HTTPConnectionPool(host='{host}', port={port}): Max retries exceeded with url: {path} (Caused by "
            f'NewConnectionError("{error}"))',
        ) from error
    finally:
        line.close()
    if answer.status >= 400:
        kind = "Client" if answer.status < 500 else "Server"
        raise Refusal(answer.status, f"{answer.status} {kind} Error: {answer.reason} for url: {url}")
    return json.loads(data)

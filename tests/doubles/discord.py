"""Discord's webhooks as a real HTTP server: requests and answers are held to Discord's OpenAPI file where it is there, and
to the limits that its documentation states beside it.

A test says what happens next with `then(...)`; with nothing said a message is kept.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email import message_from_bytes, policy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

ID, TOKEN = "1234567890", "s3cret-Webhook_Token"
PATH = "/webhooks/{webhook_id}/{webhook_token}"
ZERO_WIDTH = "\u200b"


@dataclass
class Answer:
    """status, JSON body (None: as Discord would), headers, and how long it lets the caller wait."""

    status: int
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    after_s: float = 0.0


class DiscordDouble:
    """contract: Discord's OpenAPI file, None where it is not there. kept: the messages; posts: all requests that came;
    refused: why a request was answered 400."""

    def __init__(self, contract: Path | None) -> None:
        self.spec = json.loads(contract.read_text()) if contract else None
        self.kept: list[dict[str, Any]] = []
        self.files: list[dict[str, bytes]] = []
        self.queries: list[dict[str, str]] = []
        self.refused: list[str] = []
        self.posts = 0
        self._next: list[Answer] = []
        self.url = ""

    def then(self, *answers: Answer) -> None:
        self._next += answers

    def limit(self, retry_after: object, is_global: bool = False, **headers: str) -> Answer:
        return Answer(429, {"message": "You are being rate limited.", "code": 0, "retry_after": retry_after,
                            "global": is_global}, headers)

    def answer(self, path: str, content_type: str, body: bytes) -> Answer:
        self.posts += 1
        parts = urlsplit(path)
        self.queries.append(dict(parse_qsl(parts.query)))
        if self._next:
            return self._next.pop(0)
        if parts.path not in (f"/api/webhooks/{ID}/{TOKEN}", f"/api/v10/webhooks/{ID}/{TOKEN}"):
            return Answer(404, {"message": "Unknown Webhook", "code": 10015})
        try:
            message, files = read(content_type, body)
            self.check(content_type.partition(";")[0], message, files, self.queries[-1])
        except ValueError as error:
            self.refused.append(str(error))
            return Answer(400, {"message": "Invalid Form Body", "code": 50035})
        self.kept.append(message)
        self.files.append(files)
        return Answer(200, kept_message(message)) if self.queries[-1].get("wait") == "true" else Answer(204)

    def check(self, content_type: str, message: dict[str, Any], files: dict[str, bytes], query: dict[str, str]) -> None:
        """Raises ValueError for what Discord refuses, and for what it would silently ignore."""
        if self.spec:
            post = self.spec["paths"][PATH]["post"]
            known = {one["name"] for one in post["parameters"] if one["in"] == "query"}
            _need(set(query) <= known, f"query {query}")
            _need(content_type in post["requestBody"]["content"], f"content type {content_type}")
            self.valid(post["requestBody"]["content"][content_type]["schema"], message)
            schemas = self.spec["components"]["schemas"]
            _known(message, schemas["IncomingWebhookRequestPartial"])
            for embed in message.get("embeds") or ():
                _known(embed, schemas["RichEmbed"])
                for one in embed.get("fields") or ():
                    _known(one, schemas["RichEmbedField"])
        _need(bool(message.get("content") or message.get("embeds") or files), "an empty message")
        total = 0
        for embed in message.get("embeds") or ():
            texts = [(embed.get("title", ""), 256), (embed.get("description", ""), 4096)]
            for one in embed.get("fields", ()):
                _need(all(one[key].replace(ZERO_WIDTH, "").strip() for key in ("name", "value")), "an empty field")
                texts += [(one["name"], 256), (one["value"], 1024)]
            _need(len(embed.get("fields", ())) <= 25, "more than 25 fields")
            _need(all(_units(text) <= limit for text, limit in texts), "a text longer than its limit")
            total += sum(_units(text) for text, _ in texts)
            for address in (embed.get("url", ""), embed.get("thumbnail", {}).get("url", "")):
                if address.startswith("attachment://"):
                    _need(address.removeprefix("attachment://") in files, f"{address} is not attached")
                elif address:
                    _need(address.startswith(("http://", "https://")) and "." in (urlsplit(address).hostname or ""),
                          "Not a well formed URL.")
        _need(total <= 6000, f"embeds of {total} characters")
        _need(_units(message.get("content") or "") <= 2000, "content longer than 2000")
        _need(sum(map(len, files.values())) <= 10 * 1024**2, "files larger than 10 MiB")

    def valid(self, schema: dict[str, Any], value: Any) -> None:
        from jsonschema import Draft202012Validator  # the dialect of OpenAPI 3.1
        validator = Draft202012Validator({**schema, "components": self.spec["components"]})
        found = next(iter(validator.iter_errors(value)), None)
        _need(found is None, f"not as the OpenAPI file says: {found and found.message[:300]}")

    def check_answer(self, answer: Answer) -> None:
        """What the double says is held to the file too, so that it cannot drift from Discord. 5xx is in no contract."""
        if self.spec is None or answer.body is None or answer.status >= 500:
            return
        responses = self.spec["paths"][PATH]["post"]["responses"]
        found = responses.get(str(answer.status)) or responses[f"{answer.status // 100}XX"]
        if "$ref" in found:
            found = self.spec["components"]["responses"][found["$ref"].rpartition("/")[2]]
        self.valid(found["content"]["application/json"]["schema"], answer.body)


@contextmanager
def discord(contract: Path | None) -> Iterator[DiscordDouble]:
    """A running double. An answer of its own that breaks the contract fails the test at the end."""
    double, broken = DiscordDouble(contract), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            answer = double.answer(self.path, self.headers["Content-Type"], body)
            try:
                double.check_answer(answer)
            except ValueError as error:
                broken.append(f"{answer.status}: {error}")
            time.sleep(answer.after_s)
            said = answer.body if isinstance(answer.body, bytes) else b"" if answer.body is None else json.dumps(
                answer.body).encode()
            try:
                self.send_response(answer.status)
                for name, value in {"Content-Type": "application/json", **answer.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)
            except OSError:  # the caller did not wait for a slow answer
                self.close_connection = True

        def log_message(self, *args: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    double.url = f"http://127.0.0.1:{server.server_port}/api/webhooks/{ID}/{TOKEN}"
    try:
        yield double
    finally:
        server.shutdown()
        server.server_close()
    assert broken == [], broken


def read(content_type: str, body: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(message, {file name: bytes}) of a JSON or multipart body. Raises ValueError."""
    if not content_type.startswith("multipart/form-data"):
        return json.loads(body), {}
    form = message_from_bytes(b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + body, policy=policy.HTTP)
    message, files, names = None, {}, {}
    for part in form.iter_parts():
        name = part.get_param("name", header="content-disposition")
        data = part.get_payload(decode=True)
        if name == "payload_json":
            message = json.loads(data)
        elif name and name.startswith("files["):
            names[name[6:-1]] = part.get_filename()
            files[part.get_filename()] = data
    _need(message is not None, "no payload_json")
    for one in message.get("attachments") or ():
        _need(names.get(one["id"]) == one["filename"], f"attachment {one} has no file")
    return message, files


def kept_message(message: dict[str, Any]) -> dict[str, Any]:
    """As much of a message as Discord's file requires of an answer."""
    author = {"id": ID, "username": "Captain Hook", "avatar": None, "discriminator": "0000", "public_flags": 0,
              "flags": 0, "global_name": None, "primary_guild": None, "bot": True}
    return {"id": "1", "type": 0, "content": message.get("content") or "", "mentions": [], "mention_roles": [],
            "attachments": [], "embeds": [], "timestamp": "2026-01-01T00:00:00+00:00", "edited_timestamp": None,
            "flags": 0, "components": [], "channel_id": "2", "author": author, "pinned": False,
            "mention_everyone": False, "tts": False, "webhook_id": ID}


def _known(value: dict[str, Any], schema: dict[str, Any]) -> None:
    foreign = set(value) - set(schema["properties"])
    _need(not foreign, f"{foreign} is in no schema")


def _need(is_so: bool, why: str) -> None:
    if not is_so:
        raise ValueError(why)


def _units(text: str) -> int:
    return len(text.encode("utf-16-le")) // 2

"""A Discord channel through its webhook (discord.com/developers/docs: resources/webhook, topics/rate-limits)."""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any
from urllib.parse import parse_qs, urlsplit

import requests

from workbench.errors import Invalid, NotFound, Unavailable
from workbench.notifications import Message

HOSTS = ("discord.com", "discordapp.com", "canary.discord.com", "ptb.discord.com")
PATH = re.compile(r"/api(?:/v\d{1,2})?/webhooks/(\d{1,20})/([A-Za-z0-9_-]{1,200})/?")
TIMEOUT_S = (5, 15)
PATIENCE_S = 60.0   # waiting for one message, all attempts together
ATTEMPTS = 4
# Limits of an embed (resources/message, "Embed Limits"); counted in UTF-16 units, never fewer than characters.
TITLE, DESCRIPTION, FIELDS, NAME, VALUE, TOTAL = 256, 4096, 25, 256, 1024, 6000
URL = 2048
IMAGE_BYTES = 8 * 1024**2  # the limit of an attachment has been 8 MiB and more; a plot has a few KiB
COLOURS = {"info": 0x4285F4, "success": 0x34A853, "warning": 0xFBBC04, "failure": 0xEA4335}
_NEXT = "Make a new one in Discord (channel, Integrations, Webhooks) and set discord_webhook."
# Discord shows any of these behind a backslash as itself. The colon ends bare links, emoji and timestamps too.
_MARKUP = frozenset("\\*_~`|<>[]()#:-+=!")


class Discord:
    """Sends messages to one webhook. The webhook's address is a secret: it is in no error and no log line.

    webhook  https://discord.com/api/webhooks/<id>/<token>, with `?thread_id=` for a thread; plain http, and another
             host, for loopback only
    pause, clock  how time passes
    """

    name = "Discord"

    def __init__(self, webhook: str, *, pause: Callable[[float], None] = time.sleep,
                 clock: Callable[[], float] = time.monotonic, timeout_s: tuple[float, float] = TIMEOUT_S) -> None:
        self._url, self._params = _checked(webhook)
        self._pause, self._clock, self._timeout_s = pause, clock, timeout_s
        self._not_before = -math.inf
        self._is_gone = False
        self._session = requests.Session()
        self._session.auth = lambda request: request  # else requests looks into ~/.netrc
        logging.getLogger("urllib3.connectionpool").addFilter(_hide)

    def __repr__(self) -> str:
        return "Discord(webhook hidden)"

    def send(self, message: Message) -> None:
        """Sends and waits until Discord has kept the message; waits for its rate limits, PATIENCE_S at most.

        Raises NotFound for a webhook that was deleted, and from then on without asking; Invalid when Discord refuses
        the message; Unavailable when it does not answer or asks for a longer pause.
        """
        if self._is_gone:
            raise NotFound(f"The Discord webhook was deleted or its token is wrong. {_NEXT}")
        end = self._clock() + PATIENCE_S
        reason = ""
        for attempt in range(ATTEMPTS):
            self._wait(end, reason)
            try:
                answer = self._session.post(self._url, params={"wait": "true", **self._params}, **_request(message),
                                            timeout=self._timeout_s, allow_redirects=False)
            # `from None`: the text of these errors holds the webhook's address, and a traceback would show it.
            except requests.ReadTimeout:
                # Not sent again: it has probably arrived.
                raise Unavailable(f"Discord did not answer within {self._timeout_s[1]:g} s; the message may have "
                                  "arrived all the same.") from None
            except requests.RequestException as error:
                reason = (f"Discord cannot be reached ({type(error).__name__}). Look at this machine's way to the "
                          "internet.")
                self._not_before = self._clock() + 2.0**attempt
                continue
            status = answer.status_code
            if status < 300:
                if answer.headers.get("X-RateLimit-Remaining") == "0":
                    self._not_before = self._clock() + _seconds(answer.headers.get("X-RateLimit-Reset-After"), 0.0)
                return
            if status == 429:
                reason = "Discord asks to send less."
                self._not_before = self._clock() + _retry_after(answer)
            elif status >= 500:
                reason = f"Discord answers {status}. It is Discord's fault; a later message may get through."
                self._not_before = self._clock() + 2.0**attempt
            elif status in (401, 403, 404):
                self._is_gone = True
                raise NotFound(f"The Discord webhook was deleted or its token is wrong ({status}). {_NEXT}")
            else:
                raise Invalid(f"Discord refuses the message ({status}, code {_code(answer)}). Report it with the job's "
                              "id.")
        raise Unavailable(f"{reason} Gave up after {ATTEMPTS} attempts.")

    def _wait(self, end: float, reason: str) -> None:
        rest = self._not_before - self._clock()
        if rest <= 0:
            return
        if self._clock() + rest > end:
            raise Unavailable(f"{reason or 'Discord asked to send less.'} The next message may be sent in {rest:.0f} "
                              f"s, longer than one waits ({PATIENCE_S:.0f} s).")
        self._pause(rest)


def payload(message: Message) -> dict[str, Any]:
    """The JSON of a message: one embed within Discord's limits that mentions nobody, whatever its texts say."""
    left = TOTAL

    def take(text: str, limit: int) -> str:
        nonlocal left
        taken = neutral(text, min(limit, left)) or "–"
        left -= _length(taken)
        return taken

    embed: dict[str, Any] = {"title": take(message.title, TITLE), "color": COLOURS[message.mood]}
    lines = message.lines
    if message.link and _is_public(message.link):
        embed["url"] = message.link
    elif message.link:
        lines = (*lines[:FIELDS - 1], ("Run", message.link))
    fields = []
    for name, value in lines[:FIELDS]:
        if left < 100:
            break
        fields.append({"name": take(name, min(NAME, left - 50)), "value": take(value, VALUE),
                       "inline": len(value) <= 40})
    if fields:
        embed["fields"] = fields
    if message.text.strip() and left > 1:
        embed["description"] = take(message.text, DESCRIPTION)
    made: dict[str, Any] = {"embeds": [embed], "allowed_mentions": {"parse": []}}
    if message.image and len(message.image) <= IMAGE_BYTES:
        embed["thumbnail"] = {"url": "attachment://plot.png"}
        made["attachments"] = [{"id": "0", "filename": "plot.png"}]
    return made


def neutral(text: str, limit: int) -> str:
    """The text as Discord shows it literally: no markdown, link, mention, emoji; at most `limit` UTF-16 units, cut with
    "…", never within an escape."""
    made, length = [], 0
    text = text.strip()
    # "cells@1.0.0" stays what it is, to be copied; "<@1" would be a mention.
    pieces = [f"\\{char}" if char in _MARKUP else "@\u200b" if char == "@" and not (
        text[at + 1:at + 2].isdigit() and text[at - 1:at] != "<") else char for at, char in enumerate(text)]
    if sum(map(_length, pieces)) <= limit:
        return "".join(pieces)
    for piece in pieces:
        if length + _length(piece) > limit - 1:
            break
        made.append(piece)
        length += _length(piece)
    return "".join(made) + ("…" if limit > 0 else "")


def _request(message: Message) -> dict[str, Any]:
    made = payload(message)
    if "attachments" not in made:
        return {"json": made}
    return {"files": {"payload_json": (None, json.dumps(made), "application/json"),
                      "files[0]": ("plot.png", message.image, "image/png")}}


def _checked(webhook: str) -> tuple[str, dict[str, str]]:
    """(address, parameters); no text of an error repeats what was given."""
    try:
        parts = urlsplit(webhook.strip())
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise Invalid("The setting discord_webhook is no web address. " + _NEXT) from None
    is_ours = parts.scheme == "https" and host in HOSTS and port in (None, 443)
    is_loopback = parts.scheme in ("http", "https") and _is_loopback(host)
    if not (is_ours or is_loopback) or "@" in parts.netloc or not PATH.fullmatch(parts.path):
        raise Invalid("The setting discord_webhook must read https://discord.com/api/webhooks/<id>/<token>. " + _NEXT)
    thread = parse_qs(parts.query).get("thread_id", [""])[0]
    if thread and not re.fullmatch(r"[0-9]{1,20}", thread):
        raise Invalid("The thread_id in the setting discord_webhook must be a number. Discord shows it in developer "
                      "mode.")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}", {"thread_id": thread} if thread else {}


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_public(link: str) -> bool:
    """Discord refuses a whole message for an embed's address that nobody else could follow (http://localhost)."""
    host = urlsplit(link).hostname or ""
    return len(link) <= URL and "." in host and not _is_loopback(host)


def _retry_after(answer: requests.Response) -> float:
    try:
        told = answer.json().get("retry_after")
    except (ValueError, AttributeError):  # a page by what stands before Discord
        told = None
    return max(_seconds(told, 0.0), _seconds(answer.headers.get("Retry-After"), 0.0)) or 5.0


def _seconds(value: object, otherwise: float) -> float:
    try:
        seconds = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return otherwise
    return seconds if 0 <= seconds < math.inf else otherwise


def _code(answer: requests.Response) -> object:
    """Discord's own number of an error (topics/opcodes-and-status-codes); its words may repeat the message's."""
    try:
        code = answer.json().get("code")
    except (ValueError, AttributeError):
        code = None
    return code if isinstance(code, int) else "unknown"


def _length(text: str) -> int:
    return len(text) + sum(char > "\uffff" for char in text)


def _hide(record: logging.LogRecord) -> bool:
    """urllib3 logs the path of every request, at DEBUG; a webhook's path is its password."""
    if "/webhooks/" in record.getMessage():
        record.msg, record.args = "a request to a Discord webhook", ()
    return True

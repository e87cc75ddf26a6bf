"""Messages about jobs: what they say, with the secrets taken out, and the queue that sends them beside the work.

A message is plain text; what is markup somewhere (mentions, markdown) is made harmless by the channel that knows it.
"""

from __future__ import annotations

import json
import logging
import math
import re
import threading
import unicodedata
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Protocol
from urllib.parse import urlsplit

from workbench.errors import Invalid, WorkbenchError

MOODS = ("info", "success", "warning", "failure")
METRIC = "map_50_95"
VALUE = 300        # characters of one fact; a commit hash has 40, an address rarely more than 200
TEXT = 1500        # characters of an error; it ends with the training's last words
ROOM = 64          # messages that may wait; a job makes two
CLOSE_S = 3.0      # the supervisor gives a worker 10 s in all
PLOT = (320, 200)  # width, height; Discord shows a thumbnail in 80 x 80 and the whole on a click

# Up to the last "@" where a colon is before it: passwords hold "/" and "@" when people are careless. All repeats are
# bounded, so that no text makes these slow.
_USERINFO = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,20}://)(?:[^\s@/:]{0,200}:\S{0,500}|[^\s/?#]{0,500})@")
_QUERY_SECRET = re.compile(r"([?&;](?:[\w-]{0,40}(?:token|secret|password|passwd|pwd|key|auth|signature|credential)"
                           r"[\w-]{0,40}|sig|pass)=)[^\s&;#]+", re.IGNORECASE)
_WEBHOOK = re.compile(r"(/webhooks/\d+/)[\w-]+", re.IGNORECASE)
# Shapes that GitHub, GitLab, Slack, AWS and OpenAI-like services give their tokens.
_TOKEN = re.compile(r"\b(?:gh[pousr]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|xox[a-z]-[\w-]{10,}|AKIA[0-9A-Z]{16}|"
                    r"sk-[\w-]{20,}|hf_\w{20,}|AIza[\w-]{30,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,})")
# NAME=VALUE or "name": "value", as environments and settings are printed. A name ends in the word, so that a tokenizer's
# is told; a value has a letter, so that a count of tokens is.
_NAMED_SECRET = re.compile(r"((?<![A-Za-z0-9])[\w-]{0,40}(?:token|secret|password|passwd|pwd|api_?key|access_?key|"
                           r"secret_?key|private_?key|credentials?)[\"']?[ ]{0,3}[=:][ ]{0,3}[\"']?)"
                           r"(?=[^\s\"',;&]{0,60}[A-Za-z])[^\s\"',;&]{8,}", re.IGNORECASE)
_PRIVATE_KEY = re.compile(r"(-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY-----)[A-Za-z0-9+/=\s]{1,8000}")
_BEARER = re.compile(r"(\b(?:Bearer|Basic)\s+)[\w.~+/=-]{8,}", re.IGNORECASE)

logger = logging.getLogger("workbench.notifications")


@dataclass(frozen=True)
class Message:
    """What is told. Secrets and invisible characters are taken out of every text when it is made.

    title  one line
    text   a few sentences, "" for none
    lines  (name, value) pairs, in the order in which they are shown
    link   http or https address of the run, "" for none
    image  a PNG, b"" for none
    mood   one of MOODS
    """

    title: str
    text: str = ""
    lines: tuple[tuple[str, str], ...] = ()
    link: str = ""
    image: bytes = b""
    mood: str = "info"

    def __post_init__(self) -> None:
        if self.mood not in MOODS:
            raise Invalid(f"A message's mood is one of {', '.join(MOODS)}, got {self.mood!r}.")
        if self.link and (urlsplit(self.link).scheme not in ("http", "https") or re.search(r"[\s<>\"]", self.link)):
            raise Invalid("A message's link must be an http or https address.")
        object.__setattr__(self, "title", without_secrets(self.title).replace("\n", " "))
        object.__setattr__(self, "text", without_secrets(self.text))
        object.__setattr__(self, "lines", tuple(
            (without_secrets(name), without_secrets(value)) for name, value in self.lines))
        object.__setattr__(self, "link", without_secrets(self.link))


class Channel(Protocol):
    """Somewhere people read messages. `name` is for people and holds no secret."""

    name: str

    def send(self, message: Message) -> None:
        """Sends once. Raises Invalid or NotFound when a setting is wrong, Unavailable when a later message may get
        through; no text of an error holds the channel's address. May wait, but for a bounded time."""
        ...


@dataclass(frozen=True)
class Found:
    """What a run's records tell besides the job's own arguments and result.

    link           address of the run
    before         the champion's metric, and `before_of` what it was measured with and on
    curve          the metric after each epoch
    """

    link: str = ""
    before: float | None = None
    before_of: str = ""
    curve: tuple[float, ...] = ()


def without_secrets(text: str) -> str:
    """The text without credentials in addresses, secrets in queries, tokens of known shapes, and characters that are
    not seen (control, format, half of a pair), line breaks excepted."""
    text = "".join(char for char in str(text).replace("\t", " ").replace("\r\n", "\n")
                   if char == "\n" or unicodedata.category(char) not in ("Cc", "Cf", "Cs"))
    return blotted(text)


def blotted(text: str) -> str:
    """The text without credentials in addresses, secrets in queries and tokens of known shapes, else as it was."""
    text = _USERINFO.sub(r"\1", text)
    text = _QUERY_SECRET.sub(r"\1***", text)
    text = _WEBHOOK.sub(r"\1***", text)
    text = _BEARER.sub(r"\1***", text)
    text = _NAMED_SECRET.sub(r"\1***", text)
    text = _PRIVATE_KEY.sub(r"\1***", text)
    return _TOKEN.sub("***", text)


def git_address(uri: str) -> str:
    """A git URI to show: without user, password, query and fragment. `git@host:path` becomes `host:path`."""
    uri = without_secrets(uri).split("?")[0].split("#")[0].strip()
    return uri if "://" in uri else uri.rpartition("@")[2]


def of_start(kind: str, args: dict[str, Any], job_id: str) -> Message:
    """The message that a job begins."""
    return Message(f"{_titled(kind)} started: {_experiment(args, {})}", lines=_facts(args, {}, job_id))


def of_failure(kind: str, args: dict[str, Any], job_id: str, error: str, found: Found = Found(), *,
               is_cancelled: bool = False) -> Message:
    """The message that a job failed or was cancelled. error: one sentence with the next step."""
    ended, mood = ("cancelled", "warning") if is_cancelled else ("failed", "failure")
    return Message(f"{_titled(kind)} {ended}: {_experiment(args, {})}", _cut(error, TEXT), _facts(args, {}, job_id),
                   found.link, _plot(found.curve, None, None), mood)


def of_end(kind: str, args: dict[str, Any], job_id: str, result: dict[str, Any], found: Found = Found()) -> Message:
    """The message that a job is done: what it made, the metric before and after, and why a model leads or does not."""
    metric = metric_of(args, result)
    challenger, champion = _part(result, "challenger"), _part(result, "champion")
    if kind == "retrain":
        measured = _part(result, "metrics")
        before, before_of = _number(found.before), found.before_of
        after, after_of = _number(measured.get(metric)), " ".join(filter(None, (
            _text(result.get("model")), "on " + _text(measured["on"]) if measured.get("on") else "")))
        if after is None and found.curve:  # a metric of the recipe's own, which no card holds
            after, after_of = _number(found.curve[-1]), f"{after_of}, last epoch"
        title, mood = "Retraining finished", "success"
    elif kind == "sweep":
        before, before_of, after = _number(found.before), found.before_of, _number(result.get("value"))
        after_of = f"{_text(result.get('model'))}, as its recipe measured it"
        title, mood = "Sweep finished", "success"
    else:
        on = f" on {_text(result['version'])}/{_text(result.get('split') or 'test')}" if result.get("version") else ""
        before, before_of = _number(champion.get(metric)), _text(champion.get("model")) + on
        after, after_of = _number(challenger.get(metric)), _text(challenger.get("model")) + on
        is_promoted = result.get("promoted") is True
        title = "Rolled back" if kind == "rollback" else f"{_titled(kind)} done" if "promoted" not in result else (
            "New champion" if is_promoted else "The champion stays" if champion else "Not promoted")
        mood = "success" if is_promoted else "info"
        if kind == "drift":
            title, mood = "Drift alarm", "warning"
    measures = tuple((f"{metric} {when}", f"{value:.4f} ({of})" if value is not None else "none")
                     for when, value, of in (("before", before, before_of), ("after", after, after_of)))
    is_measured = before is not None or after is not None or kind == "retrain"
    return Message(f"{title}: {_experiment(args, result)}", _cut(_text(result.get("reason")), TEXT),
                   (*(measures if is_measured else ()), *_best_trial(result), *_facts(args, result, job_id)),
                   found.link, _plot(found.curve, before, after), mood)


class Outbox:
    """Sends messages to all channels from a thread of its own: `post` returns at once and never raises.

    At most `room` messages wait; when one more comes the oldest is dropped, which is counted in `dropped` and logged:
    how a job ended matters more than that it began. With no channels nothing is made and no thread started.
    """

    def __init__(self, channels: Sequence[Channel], room: int = ROOM) -> None:
        self.channels, self.dropped = tuple(channels), 0
        self._waiting: deque[tuple[Callable[[], Message | None], Callable[[str], None]]] = deque()
        self._room, self._is_closing, self._is_sending = room, False, False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def post(self, compose: Callable[[], Message | None], report: Callable[[str], None] = logger.warning) -> None:
        """Queues a message.

        compose  makes it, in the sending thread, so it may look things up; None: there is nothing to tell
        report   gets one line for each channel that did not take it
        """
        if not self.channels:
            return
        with self._changed:
            if self._is_closing:
                logger.warning("a message came after the outbox was closed and is not sent")
                return
            if len(self._waiting) >= self._room:
                self._waiting.popleft()
                self.dropped += 1
                logger.warning("%d messages waited to be sent: the oldest is dropped, %d so far. Look for a channel "
                               "that does not answer: `workbench notify --test`.", self._room, self.dropped)
            self._waiting.append((compose, report))
            self._changed.notify()
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="notifications", daemon=True)
                try:
                    thread.start()
                    self._thread = thread
                except RuntimeError as error:  # no more threads: the next message tries again
                    logger.warning("no message can be sent now: %s", error)

    def close(self, timeout_s: float = CLOSE_S) -> int:
        """Waits until all is sent, at most `timeout_s`; returns, and logs, how many messages were left unsent."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout_s)
        left = len(self._waiting) + self._is_sending
        if left:
            logger.warning("%d messages were not sent before the end", left)
        return left

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._is_closing:
                    self._changed.wait()
                if not self._waiting:
                    return
                compose, report = self._waiting.popleft()
                self._is_sending = True
            try:
                self._send(compose, report)
            finally:
                self._is_sending = False

    def _send(self, compose: Callable[[], Message | None], report: Callable[[str], None]) -> None:
        try:
            message = compose()
        except Exception as error:  # a fault of ours must not end the thread and with it all later messages
            _say(report, f"A message could not be made: {type(error).__name__}: {without_secrets(str(error))}")
            return
        for channel in self.channels if message is not None else ():
            try:
                channel.send(message)
            except WorkbenchError as error:
                _say(report, f"{channel.name} did not get the message {message.title!r}: {error}")
            except Exception as error:  # its text may hold the channel's address, so it is not shown
                _say(report, f"{channel.name} did not get the message {message.title!r}: {type(error).__name__}. Try "
                             "it with `workbench notify --test`.")


def _say(report: Callable[[str], None], line: str) -> None:
    try:
        report(line)
    except Exception as error:
        logger.warning("%s (and the job's log cannot be written: %s)", line, type(error).__name__)


def _titled(kind: str) -> str:
    return {"retrain": "Retraining", "promote": "Promotion", "rollback": "Rollback", "drift": "Look for drift"}.get(kind, kind.capitalize())


def _experiment(args: dict[str, Any], result: dict[str, Any]) -> str:
    ref = _text(result.get("version") or args.get("version"))
    named = args.get("experiment") or args.get("experiment_name") or result.get("dataset") or args.get("dataset")
    return _text(named) or ref.partition("@")[0]


def _facts(args: dict[str, Any], result: dict[str, Any], job_id: str) -> tuple[tuple[str, str], ...]:
    def first(*names: str) -> str:
        return next((_text(where[name]) for name in names for where in (result, args) if where.get(name)), "")

    repository, version = git_address(first("dataset_repo")), first("version", "dataset_version")
    facts = (("Experiment", _experiment(args, result)), ("Git", git_address(first("repository", "git_uri"))),
             ("MLproject", first("location", "MLproject_location")), ("Recipe", first("recipe")),
             ("Commit", first("commit", "commit_hash")),
             ("Searched for", _cut(", ".join(map(str, _part(args, "space"))), VALUE)), ("Trials", first("trials")),
             ("Data set version", " ".join(filter(None, (version, f"({repository})" if repository else "")))),
             ("Base model", first("base_model")), ("Model", first("model", "candidate")), ("By", first("person")),
             ("Job", job_id))
    return tuple((name, value) for name, value in facts if value)


def metric_of(args: dict[str, Any], result: dict[str, Any]) -> str:
    """Name of the metric that a job was judged by."""
    named = (where.get(name) for name in ("primary", "primary_metric", "metric") for where in (result, args))
    return next((_text(name) for name in named if name), METRIC)


def _best_trial(result: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Of a sweep: which trial won, how the others ended, and what it was given."""
    if _number(result.get("best")) is None:
        return ()
    ended = ", ".join(f"{_text(count)} {state}" for state, count in _part(result, "counts").items() if count)
    given = ", ".join(f"{name} = {_text(value)}" for name, value in _part(result, "params").items())
    return ("Best trial", f"trial {_text(result['best'])} ({ended})"), ("Its parameters", _cut(given, VALUE))


def _part(result: dict[str, Any], name: str) -> dict[str, Any]:
    return result[name] if isinstance(result.get(name), dict) else {}


def _number(value: object) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def _text(value: object) -> str:
    if value is None:
        return ""
    return _cut(value if isinstance(value, str) else json.dumps(value, default=str), VALUE)


def _cut(text: str, length: int) -> str:
    """Secrets go before the cut: half a token has no shape any more. What is long loses its middle."""
    text = without_secrets(text)
    return text if len(text) <= length else f"{text[:length // 2]} … {text[-length // 2:]}"


def _plot(curve: Sequence[float], before: float | None, after: float | None) -> bytes:
    """A PNG of the metric per epoch with the champion's as a grey line; two bars where there is no curve; else b""."""
    from PIL import Image, ImageDraw
    curve = [value for value in curve if math.isfinite(value)]
    if len(curve) < 2 and (before is None or after is None):
        return b""
    (width, height), edge, blue, grey = PLOT, 24, (66, 133, 244), (150, 150, 150)
    values = [*curve, *(value for value in (before, after) if value is not None)]
    low, high = min(0.0, *values), max(values)
    scale = (height - 2 * edge) / ((high - low) or 1.0)

    def y(value: float) -> float:
        return height - edge - (value - low) * scale

    image = Image.new("RGB", PLOT, "white")
    draw = ImageDraw.Draw(image)
    if len(curve) >= 2:
        step = (width - 2 * edge) / (len(curve) - 1)
        draw.line([(edge + at * step, y(value)) for at, value in enumerate(curve)], fill=blue, width=3)
        if before is not None:
            draw.line([(edge, y(before)), (width - edge, y(before))], fill=grey, width=2)
    else:
        for at, value, colour in ((1, before, grey), (2, after, blue)):
            middle = at * width / 3
            top, bottom = sorted((y(value), y(0.0)))
            draw.rectangle([middle - 35, top, middle + 35, bottom], fill=colour)
            draw.text((middle - 18, max(2.0, top - 16)), f"{value:.4f}", fill="black")
    draw.line([(edge, edge), (edge, height - edge), (width - edge, height - edge)], fill="black", width=1)
    draw.text((2, 4), f"{high:.3f}", fill="black")
    written = BytesIO()
    image.save(written, "PNG")
    return written.getvalue()

"""Messages about jobs: what they say, what they never say, and that sending them harms no job."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from doubles.discord import TOKEN, discord
from PIL import Image

from workbench.adapters.apprise import Apprise, addresses, neutral
from workbench.config import Config
from workbench.errors import Cancelled, Invalid, NotFound, Unavailable
from workbench.notifications import Found, Message, Outbox, git_address, of_end, of_failure, of_start, without_secrets
from workbench.ports import Quiet
from workbench.records import Records
from workbench.steps.announce import announced
from workbench.wiring import Workbench

SECRET = "hunter2SECRET"
ARGS = {"version": "cells@1.0.0", "experiment": "night run", "repository": f"https://bot:{SECRET}@git.example/a/b.git",
        "commit": "c" * 40, "location": "models/x", "base_model": "cells-detector@1", "person": "ann"}
DONE = {"run_id": "r1", "model": "cells-detector@2", "commit": "c" * 40, "version": "cells@1.0.0", "recipe": "x",
        "seconds": 3.0, "metrics": {"map_50_95": 0.5, "on": "cells@1.0.0/val"}}

SWEEP = {"version": "cells@1.0.0", "space": {"lr": {"low": 0.01, "high": 0.1}, "freeze": [0, 2]}, "metric": "map_50",
         "trials": 20, "recipe": "small", "person": "ann"}
SWEPT = {"run_id": "s1", "model": "cells-detector@3", "version": "cells@1.0.0", "recipe": "small", "commit": "c" * 40,
         "metric": "map_50", "best": 7, "value": 0.625, "params": {"lr": 0.1, "freeze": 0, "schedule": "cosine"},
         "counts": {"complete": 12, "failed": 0, "pruned": 5, "stopped": 0}, "trials": 17, "seconds": 9.0}


class Kept:
    """A channel that keeps its messages; `fails` are raised first, one per message; `gate` holds it up."""

    name = "kept"

    def __init__(self, *fails: Exception, gate: threading.Event | None = None) -> None:
        self.messages: list[Message] = []
        self._fails, self._gate = list(fails), gate

    def send(self, message: Message) -> None:
        if self._gate is not None:
            self._gate.wait(20)
        if self._fails:
            raise self._fails.pop(0)
        self.messages.append(message)


def all_text(message: Message) -> str:
    lines = (f"{name}: {value}" for name, value in message.lines)
    return "\n".join([message.title, message.text, message.link, *lines])


def until(is_so: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


# What is said

def test_a_finished_training_tells_everything_somebody_wants_to_know() -> None:
    found = Found("https://ml.example/#/1", 0.4, "champion cells-detector@1 on cells@0.9.0/val", (0.1, 0.3, 0.5))
    message = of_end("retrain", ARGS, "j1", DONE, found)
    assert message.title == "Retraining finished: night run" and message.mood == "success"
    lines = dict(message.lines)
    assert lines["map_50_95 before"] == "0.4000 (champion cells-detector@1 on cells@0.9.0/val)"
    assert lines["map_50_95 after"] == "0.5000 (cells-detector@2 on cells@1.0.0/val)"
    assert lines["Git"] == "https://git.example/a/b.git" and lines["Commit"] == "c" * 40
    assert lines["Data set version"] == "cells@1.0.0" and lines["Experiment"] == "night run"
    assert (lines["Base model"], lines["Model"], lines["By"], lines["Job"]) == (
        "cells-detector@1", "cells-detector@2", "ann", "j1")
    assert message.link == "https://ml.example/#/1"
    picture = Image.open(BytesIO(message.image))
    assert (picture.format, picture.size) == ("PNG", (320, 200)) and len(message.image) < 20_000
    assert len(picture.getcolors(1 << 16)) >= 4  # white, axes, curve, the champion's line


def test_start_failure_and_cancellation_are_told_apart() -> None:
    assert of_start("retrain", ARGS, "j1").title == "Retraining started: night run"
    failed = of_failure("retrain", ARGS, "j1", "The training failed: " + "x" * 9000 + " CUDA out of memory")
    assert (failed.title, failed.mood) == ("Retraining failed: night run", "failure")
    assert failed.text.startswith("The training failed") and failed.text.endswith("CUDA out of memory")
    assert len(failed.text) < 1600
    assert of_failure("retrain", ARGS, "j1", "", is_cancelled=True).title == "Retraining cancelled: night run"


def test_a_metric_of_the_recipe_s_own_is_its_last_epoch_s() -> None:
    message = of_end("retrain", {**ARGS, "primary": "accuracy"}, "j", DONE, Found(curve=(0.2, 0.9)))
    assert dict(message.lines)["accuracy after"] == "0.9000 (cells-detector@2 on cells@1.0.0/val, last epoch)"
    assert dict(message.lines)["accuracy before"] == "none"


def test_a_sweep_tells_the_best_trial_with_its_value_and_parameters_and_how_the_others_ended() -> None:
    start = of_start("sweep", SWEEP, "j1")
    end = of_end("sweep", SWEEP, "j1", SWEPT, Found("https://ml.example/#/1", 0.4, "x@1"))
    assert (start.title, end.title, end.mood) == ("Sweep started: cells", "Sweep finished: cells", "success")
    assert (dict(start.lines)["Searched for"], dict(start.lines)["Trials"]) == ("lr, freeze", "20")
    assert dict(start.lines)["Recipe"] == "small" and "Best trial" not in dict(start.lines)
    lines = dict(end.lines)
    assert lines["Best trial"] == "trial 7 (12 complete, 5 pruned)"
    assert lines["Its parameters"] == "lr = 0.1, freeze = 0, schedule = cosine"
    assert lines["map_50 after"] == "0.6250 (cells-detector@3, as its recipe measured it)"
    assert lines["map_50 before"] == "0.4000 (x@1)" and lines["Trials"] == "17" and lines["Commit"] == "c" * 40
    assert end.link == "https://ml.example/#/1" and end.image.startswith(b"\x89PNG")
    failed = of_failure("sweep", SWEEP, "j1", "All 2 trials failed.")
    assert (failed.title, failed.text, failed.mood) == ("Sweep failed: cells", "All 2 trials failed.", "failure")
    secret = of_start("sweep", {**SWEEP, "space": {f"https://u:{SECRET}@h": [1]}}, "j1")
    assert SECRET not in all_text(secret)


@pytest.mark.parametrize(("promoted", "champion", "title", "mood"), [
    (True, {"model": "cells-detector@1", "map_50": 0.7}, "New champion: cells", "success"),
    (False, {"model": "cells-detector@1", "map_50": 0.7}, "The champion stays: cells", "info"),
    (False, None, "Not promoted: cells", "info")])
def test_a_decision_tells_both_scores_and_why(promoted: bool, champion: dict[str, Any] | None, title: str,
                                              mood: str) -> None:
    message = of_end("promote", {"dataset": "cells", "candidate": "cells-detector@2", "version": "cells@1.0.0"}, "j", {
        "dataset": "cells", "version": "cells@1.0.0", "split": "test", "promoted": promoted, "reason": "Because.",
        "primary": "map_50", "challenger": {"model": "cells-detector@2", "map_50": 0.8}, "champion": champion})
    assert (message.title, message.mood, message.text) == (title, mood, "Because.")
    lines = dict(message.lines)
    assert lines["map_50 after"] == "0.8000 (cells-detector@2 on cells@1.0.0/test)"
    assert lines["map_50 before"] == ("0.7000 (cells-detector@1 on cells@1.0.0/test)" if champion else "none")
    assert bool(message.image) == bool(champion)


def test_a_rollback_is_told() -> None:
    message = of_end("rollback", {"dataset": "cells"}, "j", {
        "dataset": "cells", "reason": "Back.", "challenger": {"model": "cells-detector@1", "map_50_95": 0.4},
        "champion": {"model": "cells-detector@2"}, "promoted": True, "rollback": True})
    assert message.title == "Rolled back: cells" and message.text == "Back."


@pytest.mark.parametrize("result", [
    {}, {"metrics": None, "model": 5}, {"metrics": {"map_50_95": float("nan")}}, {"metrics": {"map_50_95": "0.5"}},
    {"challenger": "x", "champion": [], "promoted": "yes", "reason": {"a": 1}}, {"metrics": {"map_50_95": True}},
    {"best": 1, "value": float("nan"), "params": [], "counts": "x", "metric": 3}, {"best": "0", "value": "0.5"}])
@pytest.mark.parametrize("kind", ["retrain", "sweep", "promote", "rollback"])
def test_a_strange_result_still_makes_a_message(kind: str, result: dict[str, Any]) -> None:
    strange = {"space": [1], "version": ["x"], "experiment": {"a": "b"}, "repository": 7, "commit": "\ud800",
               "person": "a\x00b\u202e"}
    message = of_end(kind, strange, "j", result, Found(before=float("nan"), curve=(float("nan"), float("inf"), 1.0)))
    json.dumps(message.lines).encode()
    all_text(message).encode()  # half of a surrogate pair could not be
    assert "0.5000" not in all_text(message) and "nan" not in all_text(message)


# What is never said

@pytest.mark.parametrize(("uri", "shown"), [
    (f"https://{SECRET}@github.com/a/b.git", "https://github.com/a/b.git"),
    (f"https://user:{SECRET}@github.com/a/b.git", "https://github.com/a/b.git"),
    (f"https://user:p@{SECRET}@github.com/a/b.git", "https://github.com/a/b.git"),
    (f"https://user:pa/{SECRET}@github.com/a/b.git", "https://github.com/a/b.git"),
    (f"https://github.com/a/b.git?access_token={SECRET}#{SECRET}", "https://github.com/a/b.git"),
    (f"ssh://git:{SECRET}@host:22/a", "ssh://host:22/a"), (f"{SECRET}@host:a/b", "host:a/b"),
    ("https://github.com/a/b@c.git", "https://github.com/a/b@c.git"), ("/srv/git/a", "/srv/git/a"), ("", "")])
def test_a_git_address_is_shown_without_credentials(uri: str, shown: str) -> None:
    assert git_address(uri) == shown


@pytest.mark.parametrize("text", [
    f"fatal: https://me:{SECRET}@host/x not found", f"GET http://host/x?token={SECRET}&b=1",
    f"a?x=1&api_key={SECRET} b",
    f"https://discord.com/api/webhooks/12/{SECRET}", f"Authorization: Bearer {SECRET}", "ghp_" + SECRET * 3,
    f"postgresql://u:{SECRET}@db/x", f"http://h/?\u200bpassword={SECRET}", f"http://h/?X-Amz-Signature={SECRET}"])
def test_secrets_in_any_text_of_a_message_are_taken_out(text: str) -> None:
    assert SECRET in text
    assert SECRET not in all_text(Message(text, text, ((text, text),)))
    assert SECRET not in all_text(of_failure("retrain", {**ARGS, "recipe": text}, "j", "x" * 800 + text + "y" * 800))


def test_invisible_characters_are_taken_out() -> None:
    assert without_secrets("a\u202eb\x1b[31m\u200b@\ud800c\td\r\ne") == "ab[31m@c d\ne"


@pytest.mark.parametrize("text", ["http://" + "a:" * 50_000, "a://" * 30_000, "?" + "token" * 20_000, "@" * 100_000])
def test_no_text_makes_taking_secrets_out_slow(text: str) -> None:
    began = time.process_time()
    without_secrets(text)
    assert time.process_time() - began < 20  # quadratic time would be minutes


@pytest.mark.parametrize("link", ["javascript:alert(1)", "file:///etc/passwd", "run 5", "http://a b", "http://a\n"])
def test_a_link_that_is_no_web_address_is_refused(link: str) -> None:
    with pytest.raises(Invalid):
        Message("T", link=link)


def test_settings_with_secrets_are_not_shown() -> None:
    config = Config(home=Path("/x"), discord_webhook=SECRET, notify_urls=SECRET)
    assert SECRET not in repr(config)


# Sending

def test_posting_returns_at_once_and_the_oldest_message_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    gate = threading.Event()
    channel = Kept(gate=gate)
    outbox = Outbox([channel], room=2)
    outbox.post(lambda: Message("0"))
    until(lambda: outbox._is_sending)
    for number in range(1, 6):
        outbox.post(lambda number=number: Message(str(number)))
    assert outbox.dropped == 3 and "the oldest is dropped, 3 so far" in caplog.text
    gate.set()
    assert outbox.close(20) == 0
    assert [message.title for message in channel.messages] == ["0", "4", "5"]


def test_closing_waits_for_a_bounded_time(caplog: pytest.LogCaptureFixture) -> None:
    gate = threading.Event()
    outbox = Outbox([Kept(gate=gate)])
    for _ in range(2):
        outbox.post(lambda: Message("T"))
    until(lambda: outbox._is_sending)
    began = time.monotonic()
    assert outbox.close(0.2) == 2 and time.monotonic() - began < 10
    assert "2 messages were not sent" in caplog.text
    gate.set()


def test_a_channel_that_fails_is_one_line_and_the_others_get_the_message() -> None:
    lines: list[str] = []
    bad, good = Kept(Unavailable("It is away. Wait."), ValueError(SECRET)), Kept()
    outbox = Outbox([bad, good])
    for _ in range(3):
        outbox.post(lambda: Message("T"), lines.append)
    outbox.post(lambda: 1 / 0, lines.append)
    outbox.close(20)
    assert len(good.messages) == 3 and len(bad.messages) == 1 and len(lines) == 3
    assert lines[0] == "kept did not get the message 'T': It is away. Wait."
    assert "ValueError" in lines[1] and "workbench notify --test" in lines[1] and SECRET not in lines[1]
    assert "ZeroDivisionError" in lines[2]


def test_a_log_that_cannot_be_written_does_not_end_the_sending(caplog: pytest.LogCaptureFixture) -> None:
    channel = Kept(Unavailable("It is away."))
    outbox = Outbox([channel])
    outbox.post(lambda: Message("one"), lambda line: 1 / 0)
    outbox.post(lambda: Message("two"))
    outbox.close(20)
    assert [one.title for one in channel.messages] == ["two"] and "It is away." in caplog.text


def test_without_channels_there_is_no_thread_and_jobs_run_as_they_are() -> None:
    outbox = Outbox([])
    outbox.post(lambda: Message("T"))
    steps = {"retrain": lambda args, job: {}}
    assert outbox._thread is None and outbox.close() == 0
    assert announced(steps, outbox=outbox, records=Records, tracker=list, models=list) is steps


# Around jobs

class Around:
    """Steps that are announced, with a real ledger, and a tracker and a model store that know one run."""

    def __init__(self, folder: Path, step: Callable[..., dict[str, Any]], kind: str = "retrain") -> None:
        self.channel, self.kind, self.records = Kept(), kind, Records(f"sqlite:///{folder / 'r.sqlite'}")
        self.outbox = Outbox([self.channel])
        self.tracker: Any = SimpleNamespace(
            url="http://127.0.0.1:8650", run_url=lambda run_id: f"http://127.0.0.1:8650/#/experiments/1/runs/{run_id}",
            history=lambda run_id, metric: [(1, 0.2), (2, 0.5)] if metric == "map_50_95" and run_id != "s1" else [],
            by_alias=lambda name, alias: SimpleNamespace(version="1")
            if (name, alias) == ("cells-detector", "champion") else None,
            run=lambda run_id: {"tags": {"best_run": "r7"} if run_id == "s1" else {}},
            runs=lambda experiment, limit: [{"run_id": "other", "tags": {}}, {"run_id": "r9", "tags": {"job": "j1"}}]
            if experiment in ("night run", "cells sweeps") else [])
        self.models: Any = SimpleNamespace(card=lambda ref: SimpleNamespace(
            ref=ref, run_id="r1", metrics={"map_50_95": 0.4, "on": "cells@0.9.0/val"}))
        self.steps = announced({kind: step, "upload": step}, outbox=self.outbox, records=lambda: self.records,
                               tracker=lambda: self.tracker, models=lambda: self.models,
                               public_url="https://ml.example/mlflow/")

    def run(self, args: dict[str, Any] = ARGS, job_id: str = "j1", kind: str = "") -> dict[str, Any]:
        return self.steps[kind or self.kind](args, Quiet(id=job_id))

    def said(self) -> list[Message]:
        assert self.outbox.close(20) == 0
        return self.channel.messages


def raising(error: BaseException) -> Callable[..., dict[str, Any]]:
    def step(args: dict[str, Any], job: Any) -> dict[str, Any]:
        raise error
    return step


def test_a_training_is_told_at_start_and_end_with_its_run(tmp_path: Path) -> None:
    around = Around(tmp_path, lambda args, job: DONE)
    assert around.run() == DONE
    start, end = around.said()
    assert start.title == "Retraining started: night run" and end.title == "Retraining finished: night run"
    assert end.link == "https://ml.example/mlflow/#/experiments/1/runs/r1" and end.image.startswith(b"\x89PNG")
    assert dict(end.lines)["map_50_95 before"] == "0.4000 (champion cells-detector@1 on cells@0.9.0/val)"
    assert SECRET not in all_text(start) + all_text(end)


def test_a_sweep_is_told_with_its_own_run_and_the_curve_of_its_best_trial(tmp_path: Path) -> None:
    swept = {**SWEPT, "metric": "map_50_95"}
    around = Around(tmp_path, lambda args, job: swept, "sweep")
    assert around.run({**SWEEP, "metric": None}) == swept
    start, end = around.said()
    assert start.title == "Sweep started: cells" and end.title == "Sweep finished: cells"
    assert end.link.endswith("/runs/s1")
    assert dict(end.lines)["map_50_95 before"] == "0.4000 (champion cells-detector@1 on cells@0.9.0/val)"
    assert len(Image.open(BytesIO(end.image)).getcolors(1 << 16)) >= 4  # axes, the curve of run r7, the champion's line


def test_a_sweep_that_fails_is_told_with_its_run_and_one_that_nobody_hears_of_ends_as_it_would(tmp_path: Path) -> None:
    around = Around(tmp_path, raising(Invalid("All 2 trials failed.")), "sweep")
    around.channel._fails = [Unavailable("Discord is away.")]  # the start is not heard
    with pytest.raises(Invalid, match="All 2 trials failed"):
        around.run(SWEEP)
    (end,) = around.said()
    assert (end.title, end.text) == ("Sweep failed: cells", "All 2 trials failed.") and end.link.endswith("/runs/r9")


def test_a_job_that_is_repeated_after_a_crash_is_told_once(tmp_path: Path) -> None:
    dead = Around(tmp_path, raising(KeyboardInterrupt()))  # a worker that ends: the job goes on elsewhere
    with pytest.raises(KeyboardInterrupt):
        dead.run()
    assert [one.title for one in dead.said()] == ["Retraining started: night run"]
    for attempt in range(2):  # the second: killed between the step's end and the job's
        again = Around(tmp_path, lambda args, job: DONE)
        again.run()
        titles = [one.title for one in again.said()]
        assert titles == (["Retraining finished: night run"] if attempt == 0 else [])
    other = Around(tmp_path, lambda args, job: DONE)
    other.run(job_id="j2")
    assert len(other.said()) == 2


@pytest.mark.parametrize(("error", "title", "text"), [
    (Invalid(f"No. See https://u:{SECRET}@h/."), "Retraining failed: night run", "No. See https://h/."),
    (RuntimeError("odd"), "Retraining failed: night run", "RuntimeError: odd"),
    (SystemExit(3), "Retraining failed: night run", "SystemExit: 3"),
    (Cancelled("Job j1 was cancelled."), "Retraining cancelled: night run", "Job j1 was cancelled.")])
def test_a_failure_is_told_with_its_run_and_raised_as_it_was(tmp_path: Path, error: BaseException, title: str,
                                                             text: str) -> None:
    around = Around(tmp_path, raising(error))
    with pytest.raises(type(error)) as raised:
        around.run()
    assert raised.value is error
    end = around.said()[-1]
    assert (end.title, end.text) == (title, text)
    assert end.link.endswith("/runs/r9")  # the run that carries the job's id


def test_of_a_promotion_only_the_decision_is_told_and_of_an_upload_nothing(tmp_path: Path) -> None:
    decision = {"promoted": True, "challenger": {"model": "cells-detector@2"}}
    around = Around(tmp_path, lambda args, job: decision, "promote")
    around.run({"dataset": "cells", "candidate": "cells-detector@2", "version": "cells@1.0.0"})
    around.run({"dataset": "cells"}, kind="upload")
    (only,) = around.said()
    assert only.title == "New champion: cells" and only.link.endswith("/runs/r1")


def test_parts_that_do_not_answer_make_the_message_poorer_and_harm_no_job(tmp_path: Path) -> None:
    around = Around(tmp_path, lambda args, job: DONE)

    def away(*given: object) -> Any:
        raise Unavailable("MLflow does not answer.")

    around.tracker = SimpleNamespace(url="", run_url=away, history=away, by_alias=away, runs=away)
    around.models = SimpleNamespace(card=lambda ref: {}["gone"])
    around.records = SimpleNamespace(add=away)  # type: ignore[assignment]
    assert around.run() == DONE
    start, end = around.said()
    assert end.link == "" and dict(end.lines)["map_50_95 after"].startswith("0.5000")


def test_a_worker_s_kinds_tell_discord(tmp_path: Path) -> None:
    with discord(None) as double:
        workbench = Workbench(Config(home=tmp_path, discord_webhook=double.url, mlflow_url="http://127.0.0.1:1"))
        with pytest.raises(NotFound):
            workbench.job_kinds()["deploy"]({"dataset": "cells", "model": "no@1"}, Quiet(id="a"))
        with pytest.raises(Invalid):
            workbench.job_kinds()["promote"]({"dataset": "cells"}, Quiet(id="b"))
        assert workbench.outbox.close(20) == 0
    assert [kept["embeds"][0]["title"] for kept in double.kept] == ["Promotion failed\\: cells"]
    assert [entry.subject for entry in workbench.records.entries("notifications")] == ["promote end"]


def test_a_worker_that_is_asked_to_end_sends_what_it_has_to_tell(tmp_path: Path) -> None:
    with discord(None) as double:
        (tmp_path / "settings.toml").write_text(f'discord_webhook = "{double.url}"\n')
        jobs = Workbench(Config(home=tmp_path)).jobs
        double.then(double.limit(1.5))  # so that the message still waits when the worker ends
        job_id = jobs.submit("promote", {"dataset": "cells", "candidate": "no@1", "version": "wrong@1.0.0"},
                             person="ann")
        with (tmp_path / "worker.log").open("wb") as log:
            worker = subprocess.Popen([sys.executable, "-m", "workbench.cli", "--home", str(tmp_path), "worker"],
                                      stdout=log, stderr=log)
        try:
            assert jobs.wait(job_id, 120).state == "failed"
            worker.terminate()
            assert worker.wait(60) == 0
        finally:
            worker.kill()
            worker.wait()
        posts = double.posts
    (kept,) = double.kept
    assert kept["embeds"][0]["title"] == "Promotion failed\\: cells" and posts == 2
    assert TOKEN not in (tmp_path / "worker.log").read_text()


def test_a_wrong_setting_is_a_warning_and_stops_no_worker(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for wrong in ({"discord_webhook": f"https://evil.example/{SECRET}"}, {"notify_urls": f"nothing://{SECRET}"},
                  {"notify_urls": SECRET}):
        workbench = Workbench(replace(Config(home=tmp_path), **wrong))
        assert "retrain" in workbench.job_kinds() and workbench.outbox.channels == ()
        with pytest.raises(Invalid) as refused:
            workbench.channels()
        assert SECRET not in str(refused.value)
    assert caplog.text.count("Until then no messages are sent") == 3 and SECRET not in caplog.text


def test_the_command_sends_a_test_message(tmp_path: Path) -> None:
    with discord(None) as double:
        (tmp_path / "settings.toml").write_text(f'discord_webhook = "{double.url}"\n')

        def notify(*more: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run([sys.executable, "-m", "workbench.cli", "--home", str(tmp_path), "notify", *more],
                                  capture_output=True, text=True, timeout=120)

        assert notify().stdout == "Discord: set\n" and double.kept == []
        assert notify("--test").stdout == "Discord: the message is sent\n" and len(double.kept) == 1
        (tmp_path / "settings.toml").write_text(f'discord_webhook = "{double.url}x"\n')
        gone = notify("--test")
        assert gone.returncode == 1 and "was deleted or its token is wrong" in gone.stderr and TOKEN not in gone.stderr
        (tmp_path / "settings.toml").write_text("")
        assert "No channel is set" in notify().stderr


# Other channels

@pytest.fixture
def receiver() -> Iterator[Any]:
    """What apprise's json:// service posts to."""
    got: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200 if self.path == "/ok" else 500)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield SimpleNamespace(got=got, at=f"127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()


def test_apprise_gets_title_text_lines_link_and_plot(receiver: Any) -> None:
    Apprise(f"json://user:{SECRET}@{receiver.at}/ok").send(Message(
        "Title", "Text", (("Commit", "abc"),), "https://ml.example/#/1", of_end(
            "retrain", ARGS, "j", DONE, Found(curve=(0.1, 0.2))).image, "failure"))
    (got,) = receiver.got
    assert got["message"] == "Text\nCommit: abc\nhttps://ml.example/#/1"
    assert (got["title"], got["type"]) == ("Title", "failure")
    assert got["attachments"][0]["mimetype"] == "image/png"


def test_apprise_that_fails_is_unavailable_and_its_address_is_nowhere(receiver: Any,
                                                                    caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for place in (f"{receiver.at}/bad", "127.0.0.1:1/ok"):
        channel = Apprise(f"json://user:{SECRET}@{place}", 2)
        with pytest.raises(Unavailable, match=r"notify_urls 2 \(json\) did not take"):
            channel.send(Message("T", "x"))
        assert SECRET not in repr(channel)
    assert SECRET not in caplog.text


@pytest.mark.parametrize("wrong", ["", "nothing", f"nothing://{SECRET}", "json://", f"discord://{SECRET}"])
def test_an_address_that_apprise_does_not_know_is_refused(wrong: str) -> None:
    with pytest.raises(Invalid, match="notify_urls") as refused:
        Apprise(wrong)
    assert SECRET not in str(refused.value)


def test_several_addresses_are_told_apart_though_they_hold_commas() -> None:
    assert addresses(" json://a/x, mailto://b?to=a,b\n ntfy://c, ") == ["json://a/x", "mailto://b?to=a,b", "ntfy://c"]
    assert addresses("") == []


def test_mentions_and_masked_links_are_parted_for_every_service() -> None:
    shown = neutral("@everyone <!channel> <@U1> [a](http://b) cells@1.0.0")
    assert "@everyone" not in shown and "<!" not in shown and "<@" not in shown and "](" not in shown
    assert "cells@1.0.0" in shown

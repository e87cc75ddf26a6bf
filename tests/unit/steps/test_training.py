"""A training process: found again, followed, never doubled, ended with all its children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from workbench.errors import Cancelled, Conflict
from workbench.ports import Quiet
from workbench.steps.training import MARK, Training, stop_trainings

PYTHON = [sys.executable, "-c"]
SLEEP = [*PYTHON, "import time; print('began', flush=True); time.sleep(600)"]


class CancelledAfter(Quiet):
    """A job that somebody cancels after so many questions."""

    questions = 3

    def check(self) -> None:
        self.questions -= 1
        if self.questions < 0:
            raise Cancelled("Cancelled by a person.")


@pytest.fixture
def training(tmp_path: Path):
    training = Training(tmp_path / "trainings" / "job 1", grace_s=1)
    training.folder.mkdir(parents=True)
    yield training
    training.stop()


def wait_for(claim, timeout_s: float = 60) -> None:
    until = time.monotonic() + timeout_s
    while not claim():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def test_the_exit_code_and_the_log_are_kept(training: Training, tmp_path: Path) -> None:
    assert training.exit_code() is None
    training.start([*PYTHON, "import sys; print('one'); print('two', file=sys.stderr); sys.exit(7)"], {}, tmp_path)
    training.follow(Quiet())
    assert training.exit_code() == 7
    assert training.last_lines() == "two\none" or training.last_lines() == "one\ntwo"
    assert training.processes() == []


def test_epochs_are_told_as_they_come_and_half_a_line_is_not(training: Training, tmp_path: Path) -> None:
    seen = []

    class Watched(Quiet):
        def progress(self, done: int, total: int, note: str = "") -> None:
            seen.append((done, total, note))

    script = ("import time\nfile = open('output/history.jsonl', 'w')\n"
              "for text in ('{\"epoch\": 1, \"epochs\": 2, \"map_50\": 0.25}\\n', '{\"epoch\": 2, \"epo', 'chs\": 2}\\n', 'no json\\n', '[1]\\n'):\n"
              "    file.write(text); file.flush(); time.sleep(1.2)\n")
    training.start([*PYTHON, script], {}, training.folder)
    training.follow(Watched())
    assert seen == [(1, 2, "mAP50 0.250"), (2, 2, "")]
    assert training.exit_code() == 0


def test_a_trainer_gets_no_secret_of_ours(training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_CVAT_TOKEN", "s3cret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret")
    training.start(["env"], {"GIVEN": "yes"}, tmp_path)
    training.follow(Quiet())
    text = training.log.read_text()
    assert "s3cret" not in text and "GIVEN=yes" in text and f"{MARK}={training.folder}" in text and "PATH=" in text


def test_credentials_in_addresses_do_not_show_in_the_end_of_the_log(training: Training) -> None:
    training.log.write_text("x\n" * 30 + "GET http://ann:s3cret@mlflow.example/api failed\n")
    assert training.last_lines().endswith("GET http://mlflow.example/api failed")
    assert len(training.last_lines().splitlines()) == 12


def test_what_a_terminal_would_obey_is_not_shown_and_a_line_is_not_endless(training: Training) -> None:
    training.log.write_text("\x1b[2J\x1b[31mred\x1b[0m\x1b]0;a title\x07 \u202ertl \x08\x00bell\x07 tab\there ü\n10 %\r20 %\n" + "x" * 15_000)
    red, ten, twenty, long = training.last_lines().splitlines()
    assert (red, ten, twenty) == ("red rtl bell tab\there ü", "10 %", "20 %") and long == "x" * 1000 + "..."


@pytest.mark.parametrize(("line", "shown"), [
    ("AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG/bPx", "AWS_SECRET_ACCESS_KEY=***"),
    ("password: hunter22hunter", "password: ***"),
    ("{'DB_PASSWORD': 'abcdefgh12', 'a': 1}", "{'DB_PASSWORD': '***', 'a': 1}"),
    ('{"api_key": "abcdefgh12"}', '{"api_key": "***"}'),
    ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abcdefghijklmnop end", "*** end"),
    (f"hf_{'A' * 34}", "***"),
    ("-----BEGIN RSA PRIVATE KEY-----\nMIIE+/=\nabc\n-----END RSA PRIVATE KEY-----",
     "-----BEGIN RSA PRIVATE KEY-----***-----END RSA PRIVATE KEY-----"),
    ("tokens: 512000000 tokenizer: bert-base-uncased monkey: banana-split", None),
    ("token accuracy: 0.91234567 token=123456789 secret: none", None),
])
def test_secrets_under_their_names_and_in_known_shapes_do_not_show(training: Training, line: str, shown: str | None) -> None:
    training.log.write_text(line + "\n")
    assert training.last_lines() == (shown or line)


def test_cancelling_ends_every_child_also_those_that_ignore_it_or_hide(training: Training, tmp_path: Path) -> None:
    script = ("import signal, subprocess, sys, time\n"
              "deaf = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)'\n"
              "for extra in ({}, {'start_new_session': True}, {'env': {}}):\n"
              "    print(subprocess.Popen([sys.executable, '-c', deaf], **extra).pid, flush=True)\n"
              "time.sleep(600)\n")
    training.start([*PYTHON, script], {}, tmp_path)
    wait_for(lambda: len(training.log.read_text().split()) == 3)
    children = [psutil.Process(int(pid)) for pid in training.log.read_text().split()]
    bystander = subprocess.Popen(["sleep", "600"])
    try:
        assert len(training.processes()) == 5  # the shell, the script and its three children
        with pytest.raises(Cancelled):
            training.follow(CancelledAfter())
        assert training.processes() == []
        assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
    assert training.exit_code() is None  # it was stopped, it did not end


WORKER = """
import sys
from pathlib import Path
from workbench.ports import Quiet
from workbench.steps.training import Training
training = Training(Path(sys.argv[1]))
with training.held():
    script = "import pathlib, time; print('began', flush=True)\\nwhile not pathlib.Path('go').exists(): time.sleep(0.05)\\nprint('ended')"
    training.start([sys.executable, "-c", script], {}, training.folder)
    training.follow(Quiet())
"""


def test_a_worker_killed_with_9_leaves_a_trainer_that_the_next_one_follows_to_its_end(training: Training) -> None:
    worker = subprocess.Popen([sys.executable, "-c", WORKER, training.folder])
    wait_for(lambda: training.log.exists() and "began" in training.log.read_text())
    with pytest.raises(Conflict, match="Another worker is at the training"), training.held():
        pass
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    with training.held():
        orphans = training.processes()
        assert len(orphans) == 2
        again = Training(training.folder)
        (training.folder / "go").touch()
        again.follow(Quiet())
    assert again.exit_code() == 0 and training.log.read_text() == "began\nended\n"
    assert training.processes() == []


def test_a_trainer_killed_from_outside_has_not_ended(training: Training, tmp_path: Path) -> None:
    training.start(SLEEP, {}, tmp_path)
    wait_for(lambda: training.log.exists() and "began" in training.log.read_text())
    for process in training.processes():
        os.kill(process.pid, signal.SIGKILL)
    training.follow(Quiet())
    assert training.exit_code() is None and training.processes() == []


def test_a_recipe_s_leftover_processes_end_with_it(training: Training, tmp_path: Path) -> None:
    training.start([*PYTHON, "import subprocess; subprocess.Popen(['sleep', '600'])"], {}, tmp_path)
    training.follow(Quiet())
    assert training.exit_code() == 0 and training.processes() == []


def test_shutting_down_ends_all_trainings_of_a_home_and_they_may_go_on_later(training: Training, tmp_path: Path) -> None:
    training.write("request.json", {})
    training.start(SLEEP, {}, tmp_path)
    wait_for(lambda: training.log.exists() and "began" in training.log.read_text())
    assert stop_trainings(tmp_path) == 1
    assert training.processes() == [] and training.exit_code() is None
    assert stop_trainings(tmp_path) == 0

"""Limits of a training: whoever passes one is ended with all it started, wherever that hid, also while no worker lives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from workbench.config import Config
from workbench.errors import Cancelled, Invalid
from workbench.ports import Quiet
from workbench.steps import keeper
from workbench.steps.limits import Limits, limits_of
from workbench.steps.limits import told as sentence
from workbench.steps.training import Training

PYTHON = [sys.executable, "-c"]
# Forks twice, opens a session of its own and clears its environment: nothing names its origin any more.
HIDE = """
import os, sys, time
def hide(what):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execve(sys.executable, [sys.executable, "-c", what], {})
        os._exit(0)
    os.wait()
hide("import os, time; open('hidden.txt', 'w').write(str(os.getpid())); time.sleep(600)")
while not os.path.exists("hidden.txt") or not open("hidden.txt").read(): time.sleep(0.02)
"""


@pytest.fixture
def training(tmp_path: Path):
    training = Training(tmp_path / "trainings" / "job 1", grace_s=0.5, secrets=("hunter2-hunter2", "p@ss/word"))
    training.folder.mkdir(parents=True)
    yield training
    training.stop()


def run(training: Training, script: str, limits: Limits = Limits(), job: Quiet | None = None) -> dict | None:
    """Runs it in its folder; returns the limit it passed."""
    training.start([*PYTHON, script], {}, training.folder, limits)
    training.follow(job or Quiet())
    assert training.processes() == [] and not training.scratch.exists()
    return training.passed_limit()


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def hidden(training: Training) -> int:
    return int((training.folder / "hidden.txt").read_text())


@pytest.mark.parametrize(("script", "limits", "says"), [
    ("import time; time.sleep(600)", Limits(wall_s=1), r"ran for [12] s, its limit is 1 \(setting retrain_wall_s or limit wall_s"),
    # Children that nobody waits for count too.
    ("import os, signal\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\nfor _ in range(200):\n    if os.fork() == 0:\n"
     "        for _ in range(2_000_000): pass\n        os._exit(0)\n    for _ in range(2_000_000): pass", Limits(cpu_s=1), "used [12] s of processor time, its limit is 1"),
    ("import time; held = [bytearray(8 * 2**20) for _ in range(25)]; time.sleep(600)", Limits(memory_mb=100),
     r"held \d\d\d MiB of memory in 1 processes, its limit is 100 \(setting retrain_memory_percent or limit memory_mb"),
    ("import os, time\nfor _ in range(60):\n    if os.fork() == 0:\n        os.setsid(); time.sleep(600)\n    time.sleep(0.02)\n"
     "time.sleep(600)", Limits(processes=12), r"had \d+ processes at once, its limit is 12"),
    ("import time\nfile = open('output/big', 'wb')\nwhile True: file.write(b'x' * 2**20); file.flush(); time.sleep(0.01)",
     Limits(disk_mb=20), r"wrote \d+ MiB to the disk, its limit is 20"),
    # What goes to the folder for temporary files is its own too.
    ("import tempfile, time\nwhile True:\n    tempfile.NamedTemporaryFile(delete=False).write(b'x' * 2**20)\n    time.sleep(0.01)",
     Limits(disk_mb=20), r"wrote \d+ MiB to the disk, its limit is 20"),
    ("while True: print('x' * 1000)", Limits(log_mb=1), r"printed \d+ MiB, its limit is 1 \(setting retrain_log_mb"),
    ("import time; time.sleep(600)", Limits(free_disk_mb=2**39), r"with only \d+ MiB left, its limit is at least \d+ \(setting "
     r"retrain_free_disk_mb\)"),
])
def test_a_training_that_passes_a_limit_is_ended_and_told_which(training: Training, script: str, limits: Limits, says: str) -> None:
    import re
    passed = run(training, script, limits)
    assert passed is not None and re.search(says, sentence(passed)) and "all its processes were ended" in sentence(passed)
    assert training.exit_code() == keeper.KILLED


def test_a_file_cannot_grow_beyond_the_limit_between_two_looks(training: Training) -> None:
    script = ("try:\n    with open('output/big', 'wb') as file:\n        for _ in range(400): file.write(b'x' * 2**20)\n"
              "except OSError as error: print(error)\n")
    passed = run(training, script, Limits(disk_mb=30))
    assert passed["limit"] == "disk_mb" and (training.output / "big").stat().st_size <= 30 * 2**20


def test_below_its_limits_a_training_ends_as_it_likes_and_what_it_used_is_kept(training: Training) -> None:
    limits = Limits(wall_s=100, cpu_s=100, memory_mb=400, processes=20, disk_mb=100, log_mb=2)
    # Pages that processes share count once: four times 150 MiB is beyond the limit otherwise.
    script = ("import os, time\nheld = bytearray(150 * 2**20)\nfor page in range(0, len(held), 4096): held[page] = 1\n"
              "children = []\nfor _ in range(3):\n    pid = os.fork()\n    if pid == 0:\n        time.sleep(2); os._exit(0)\n"
              "    children.append(pid)\nfor pid in children: os.waitpid(pid, 0)\nprint('well'); raise SystemExit(3)\n")
    assert run(training, script, limits) is None
    assert training.exit_code() == 3 and training.last_lines() == "well"
    used = training.read("usage.json")
    assert used["processes"] == 4 and 150 <= used["memory_mb"] < 400 and 0 < used["cpu_s"] < 100 and 2 <= used["wall_s"] < 100


@pytest.mark.parametrize("how", ["finish", "fail", "limit", "cancel", "kill"])
def test_a_process_that_hides_is_gone_however_the_training_ends(training: Training, how: str) -> None:
    script = HIDE + {"finish": "", "fail": "raise SystemExit(4)"}.get(how, "time.sleep(600)")

    class Cancels(Quiet):
        def check(self) -> None:
            if (training.folder / "hidden.txt").exists() and how == "cancel":
                raise Cancelled("Cancelled by ann.")
            if (training.folder / "hidden.txt").exists() and how == "kill":
                # The keeper is left: it takes the orphan in when its parents die.
                psutil.Process(training.processes()[0].pid).children()[0].kill()

    if how == "cancel":
        with pytest.raises(Cancelled):
            run(training, script, job=Cancels())
    else:
        run(training, script, Limits(wall_s=3 if how == "limit" else 0), Cancels())
    assert is_gone(hidden(training))
    assert training.exit_code() == {"finish": 0, "fail": 4, "limit": 137, "cancel": None, "kill": 137}[how]


def test_a_training_that_kills_its_keeper_is_ended(training: Training) -> None:
    script = ("import os, signal, subprocess, sys, time\nchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
              "open('pids.txt', 'w').write(f'{os.getpid()} {child.pid}')\nos.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(600)\n")
    run(training, script)
    assert training.exit_code() is None
    assert all(is_gone(int(pid)) for pid in (training.folder / "pids.txt").read_text().split())


def test_a_script_that_signals_its_whole_group_does_not_reach_the_keeper(training: Training) -> None:
    run(training, "import os, signal; print('here', flush=True); os.killpg(0, signal.SIGTERM)")
    assert training.exit_code() == 128 + signal.SIGTERM and training.last_lines() == "here"


WORKER = """
import sys
from pathlib import Path
from workbench.ports import Quiet
from workbench.steps.limits import Limits
from workbench.steps.training import Training
training = Training(Path(sys.argv[1]))
training.start([sys.executable, "-c", sys.argv[2]], {}, training.folder, Limits(wall_s=int(sys.argv[3])))
print("started", flush=True)
training.follow(Quiet())
"""


@pytest.mark.parametrize("wall_s", [2, 0])
def test_limits_hold_while_no_worker_lives_and_the_next_worker_loses_sight_of_nobody(training: Training, wall_s: int) -> None:
    worker = subprocess.Popen([sys.executable, "-c", WORKER, training.folder, HIDE + "time.sleep(600)", str(wall_s)],
                              stdout=subprocess.PIPE)
    try:
        worker.stdout.readline()
        until = time.monotonic() + 60
        while not (training.folder / "hidden.txt").exists() or not (training.folder / "hidden.txt").read_text():
            assert time.monotonic() < until
            time.sleep(0.05)
    finally:
        worker.kill()
        worker.wait()
    if wall_s:
        while training.exit_code() is None:
            assert time.monotonic() < until + 60
            time.sleep(0.1)
        assert training.passed_limit()["limit"] == "wall_s"
    else:
        assert not is_gone(hidden(training))
        Training(training.folder, grace_s=0.2).stop()
    assert is_gone(hidden(training)) and training.processes() == []


def test_a_bystander_and_another_training_are_left_alone(training: Training, tmp_path: Path) -> None:
    other = Training(tmp_path / "trainings" / "job 2", grace_s=0)
    other.folder.mkdir()
    other.start([*PYTHON, "import time; time.sleep(600)"], {}, other.folder)
    bystander = subprocess.Popen(["sleep", "600"])
    try:
        assert run(training, HIDE + "time.sleep(600)", Limits(wall_s=1))["limit"] == "wall_s"
        assert bystander.poll() is None and len(other.processes()) == 2
    finally:
        bystander.kill()
        bystander.wait()
        other.stop()
    assert other.processes() == []


def test_a_fork_bomb_is_overtaken(training: Training) -> None:
    # Every child forks on as fast as it can. Each fork takes a byte out of the pipe, so they are 300 at most, should
    # the limit fail: a bomb without that bound takes the machine down with it.
    bomb = ("import os, time\nout, into = os.pipe()\nos.write(into, b'.' * 300)\nos.close(into)\n"
            "while os.read(out, 1):\n    if os.fork() == 0 and os.fork() == 0: os.setsid()\ntime.sleep(600)")
    assert run(training, bomb, Limits(processes=20))["limit"] == "processes"


def test_an_older_process_is_never_taken_for_one_of_a_training_whatever_it_claims(training: Training) -> None:
    older = subprocess.Popen(["sleep", "600"], env={keeper.MARK: str(training.folder)}, start_new_session=True)
    try:
        time.sleep(0.1)  # ticks are hundredths of a second
        run(training, "print('well')")
        assert older.poll() is None
        named = keeper.living()[older.pid]
        # A parent that began after its child is another process with the parent's old id.
        recycled = keeper.Process(named.parent, 1, 1, 1, named.started + 1, 0, 0)
        assert keeper.family({**keeper.living(), recycled.pid: recycled}, [recycled], 0) == [recycled]
        # Nor is one whose parent is not there any more when it is looked at again.
        gone = subprocess.Popen(["true"])
        gone.wait()
        ghost = keeper.Process(gone.pid, 1, 1, 1, named.started, 0, 0)
        orphan = keeper.Process(older.pid, ghost.pid, 1, 1, named.started, 0, 0)
        assert keeper.family({ghost.pid: ghost, orphan.pid: orphan}, [ghost], 0) == [ghost]
    finally:
        older.kill()
        older.wait()


def test_secrets_are_blotted_in_what_is_shown_and_in_what_is_kept(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORKBENCH_SERVICE_TOKEN", "GITHUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "WORKBENCH_DISCORD_WEBHOOK"):
        monkeypatch.setenv(name, "hunter2-hunter2")
    lines = ["token hunter2-hunter2 end", "quoted p%40ss%2Fword", "https://ann:pw123@host/x", f"ghp_{'a1' * 18}",
             "https://discord.example/api/webhooks/123/abcDEF-ghi", "Authorization: Bearer abcdef123456", "tabs\tand \r bars stay"]
    seen = []

    class Looks(Quiet):
        def check(self) -> None:
            seen.append(training.last_lines())

    run(training, f"import os, time\nprint(dict(os.environ))\nprint({chr(10).join(lines)!r}, flush=True)\ntime.sleep(1.5)", job=Looks())
    kept = training.log.read_bytes().decode()
    for text in (kept, "\n".join(seen), training.last_lines(100)):
        for secret in ("hunter2", "p%40ss", "pw123", "ghp_a", "abcDEF", "abcdef123456"):
            assert secret not in text
    assert "token *** end" in kept and "tabs\tand \r bars stay" in kept and any("token ***" in text for text in seen)


def test_a_log_without_line_breaks_is_kept_as_it_was_but_for_its_secrets(training: Training) -> None:
    run(training, "print('ab' * 40_000 + ' token hunter2-hunter2 ' + 'ü' * 40_000, end='')")
    # Pieces of one line meet anywhere; only what lies across two of them is not recognised.
    assert training.log.read_text() == "ab" * 40_000 + " token *** " + "ü" * 40_000


def test_the_log_is_not_read_through_a_link_and_no_pipe_holds_a_reader_up(training: Training, tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text("service_token = 'x'")
    training.log.symlink_to(tmp_path / "settings.toml")
    assert training.last_lines() == ""
    assert run(training, "print('mine')") is None
    assert training.last_lines() == "mine" and (tmp_path / "settings.toml").read_text() == "service_token = 'x'"
    training.output.mkdir(exist_ok=True)
    os.mkfifo(training.output / "history.jsonl")
    assert training.history() == []


@pytest.mark.parametrize("epoch", ["NaN", "1e300", "-1", "Infinity", "true", '"1"', "[1]"])
def test_an_epoch_that_is_no_number_of_one_is_left_out(training: Training, epoch: str) -> None:
    script = (f"open('output/history.jsonl', 'w').write('{{\"epoch\": {epoch}}}\\n{{\"epoch\": 1, \"epochs\": 1e99, \"map_50\": NaN}}\\n' "
              "+ '[' * 100_000 + '\\n')")
    job = Quiet()
    assert run(training, script, job=job) is None
    assert [row["epoch"] for row in training.history()] == [1] and (job.done, job.total) == (1, 1)


def test_limits_are_tightened_never_loosened_and_checked(tmp_path: Path) -> None:
    most = Limits(wall_s=100, memory_mb=0, processes=10)
    assert most.tightened({"wall_s": 50, "memory_mb": 7, "processes": 99}) == Limits(wall_s=50, memory_mb=7, processes=10)
    assert most.tightened({"wall_s": 0}) == most.tightened(None) == most
    for wrong in ({"wall": 1}, {"free_disk_mb": 1}, {"wall_s": -1}, {"wall_s": 1.5}, {"wall_s": True}, {"wall_s": "9"}):
        with pytest.raises(Invalid, match="(?i)limit"):
            most.tightened(wrong)
    config = Config(home=tmp_path, retrain_wall_s=60, retrain_memory_percent=50)
    found = limits_of(config)
    assert found.wall_s == 60 and 0 < found.memory_mb <= psutil.virtual_memory().total // 2**21
    for wrong in (Config(home=tmp_path, retrain_memory_percent=101), Config(home=tmp_path, retrain_log_mb=-1)):
        with pytest.raises(Invalid):
            limits_of(wrong)


def test_the_workbench_s_secrets_are_known_from_its_settings(tmp_path: Path) -> None:
    config = Config(home=tmp_path, service_token="t0ken-t0ken", cvat_token="cv4t-cv4t", discord_webhook="https://d.example/api/webhooks/1/x",
                    notify_urls="tgram://one, slack://two", database_url="postgresql://ann:geheim@db/x")
    assert set(config.secrets) == {"t0ken-t0ken", "cv4t-cv4t", "https://d.example/api/webhooks/1/x", "tgram://one", "slack://two", "geheim"}
    assert Config(home=tmp_path).secrets == () and json.dumps(repr(config)).find("t0ken") == -1

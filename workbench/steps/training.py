"""Training: one training process in a folder of its own, which may outlive the worker that started it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from workbench.errors import Cancelled, Conflict
from workbench.ports import Job

POLL_S = 0.5
# A trainer may be writing its checkpoint when it is asked to end; then it is killed.
GRACE_S = 10
# Every process of a training carries its folder in its environment: found again after the worker died, wherever the
# process forked to, and never mistaken for a later process with the same id.
MARK = "WORKBENCH_TRAINING"
# All that a trainer gets of our own environment; tokens and passwords are not among it.
_PASSED_ON = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH",
              "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "SSL_CERT_FILE",
              "REQUESTS_CA_BUNDLE")
# Keeps the exit code for whoever asks, also when the worker that started it is gone. $0 is the file, $@ the command.
_KEEP_EXIT_CODE = '"$@"; code=$?; echo $code > "$0.half" && mv "$0.half" "$0"'


class Training:
    """A folder with data/ and code/ (made again when needed), output/ (the recipe's), log.txt, exit (the exit code)."""

    def __init__(self, folder: Path, grace_s: float = GRACE_S) -> None:
        self.folder = folder.resolve()
        self.output = self.folder / "output"
        self.log = self.folder / "log.txt"
        self._exit = self.folder / "exit"
        self._grace_s = grace_s
        self._child: subprocess.Popen | None = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else works on this training meanwhile, on this machine. Raises Conflict when somebody does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Conflict(f"Another worker is at the training in {self.folder}; watch it on the jobs "
                               "page.") from error
            yield

    def read(self, name: str) -> Any:
        """A JSON file of the folder, or None."""
        file = self.folder / name
        return json.loads(file.read_text()) if file.exists() else None

    def write(self, name: str, record: Any) -> None:
        file = self.folder / name
        half = file.with_name(name + ".half")
        half.write_text(json.dumps(record, indent=1))
        half.replace(file)

    def exit_code(self) -> int | None:
        """Of the training that came to its end; None while it runs and when it was killed."""
        try:
            return int(self._exit.read_text())
        except FileNotFoundError:
            return None

    def ended_at(self) -> float:
        """Seconds since the epoch."""
        return self._exit.stat().st_mtime

    def forget_end(self) -> None:
        """The next attempt trains again, from the recipe's last checkpoint."""
        self._exit.unlink(missing_ok=True)

    def processes(self) -> list[psutil.Process]:
        """All living processes of this training, oldest first, whoever started them."""
        found, others, sessions = [], [], set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                session = os.getsid(process.pid)
                if process.environ().get(MARK) == str(self.folder):
                    found.append(process)
                    sessions.add(session)
                else:
                    others.append((session, process))
        # A child that was started with an empty environment is still of the session that we opened.
        found += [process for session, process in others if session in sessions]
        return sorted(found, key=lambda process: process.create_time())

    def start(self, command: list[str], environment: dict[str, str], cwd: Path) -> None:
        """Starts the command in a session of its own; stdout and stderr go to log.txt."""
        self.output.mkdir(parents=True, exist_ok=True)
        own = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        with open(self.log, "ab") as log:
            self._child = subprocess.Popen(
                ["/bin/sh", "-c", _KEEP_EXIT_CODE, str(self._exit), *command], cwd=cwd, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                env={**own, **environment, MARK: str(self.folder)})

    def follow(self, job: Job) -> None:
        """Tells the job every epoch until no process of the training is left. Raises Cancelled, with all of them
        gone."""
        told, watched = None, []
        try:
            while True:
                has_ended = self.exit_code() is not None
                for row in self.history()[-1:]:
                    if row != told:
                        told = row
                        job.progress(int(row["epoch"]), int(row.get("epochs") or row["epoch"]), _note(row))
                if has_ended:
                    break
                if self._child is None or self._child.poll() is not None:
                    watched = [process for process in watched if _lives(process)] or self.processes()
                    if not watched and self.exit_code() is None:
                        break
                job.check()
                time.sleep(POLL_S)
        except (Cancelled, KeyboardInterrupt):
            self.stop()
            raise
        # What a recipe left running behind itself, and what is left when the shell alone was killed.
        self.stop()

    def stop(self) -> None:
        """Ends every process of the training: asks, waits a moment, kills; returns when none is left."""
        asked = set()
        until = time.monotonic() + self._grace_s
        while left := self.processes():
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                    # The shell that writes the exit code goes first and at once: a stopped training has not ended.
                    if time.monotonic() > until or process.pid == os.getsid(process.pid):
                        process.kill()
                    elif process.pid not in asked:
                        process.terminate()
                        asked.add(process.pid)
            if self._child is not None:
                self._child.poll()
            time.sleep(0.05)
        if self._child is not None:
            self._child.wait()

    def history(self) -> list[dict[str, Any]]:
        """One record an epoch, from output/history.jsonl; a line that is not whole yet is left out."""
        file = self.output / "history.jsonl"
        rows = []
        for line in file.read_text(errors="replace").splitlines() if file.exists() else []:
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("epoch"), (int, float)):
                    rows.append(row)
        return rows

    def last_lines(self, count: int = 12) -> str:
        """The end of the log, with credentials in addresses blotted out."""
        if not self.log.exists():
            return ""
        with open(self.log, "rb") as log:
            log.seek(max(0, self.log.stat().st_size - 20_000))
            lines = log.read().decode(errors="replace").splitlines()
        text = "\n".join(line for line in lines if line.strip() and "INFO mlflow" not in line)
        return "\n".join(re.sub(r"://[^/@\s]+@", "://***@", text).splitlines()[-count:])


def stop_trainings(home: Path) -> int:
    """Ends all training processes below a home folder, for when the whole workbench is shut down; they go on from their
    last checkpoint when their jobs are taken up again. Returns how many trainings were running."""
    running = 0
    for folder in sorted((home / "trainings").glob("*/request.json")):
        training = Training(folder.parent)
        if training.exit_code() is None and training.processes():
            training.stop()
            running += 1
    return running


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _note(row: dict[str, Any]) -> str:
    value = row.get("map_50")
    return f"mAP50 {value:.3f}" if isinstance(value, (int, float)) else ""

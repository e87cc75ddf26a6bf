"""Training: one training process in a folder of its own, which may outlive the worker that started it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

import psutil

from workbench.errors import Conflict, Invalid, Unavailable
from workbench.notifications import blotted
from workbench.ports import Job
from workbench.steps import keeper
from workbench.steps.keeper import KEEPER, MARK, MIB
from workbench.steps.limits import Limits, told

POLL_S = 0.5
# A trainer may be writing its checkpoint when it is asked to end; then it is killed.
GRACE_S = 10
# A process that was seen without our mark at this age got no other environment since it was started.
SETTLED_S = 5
# What a training leaves is a stranger's: nothing is read beyond these.
HISTORY_MB, JSON_MB = 64, 16
# An epoch further than this is a mistake, and no database has a column for it.
MOST_EPOCHS = 10**9
SHOWN_BYTES = 20_000
SHOWN_LINE = 1000
# Colours, cursor moves, window titles (ECMA-48, control sequences and strings).
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]{0,20}[ -/]{0,5}[@-~]|\][^\x07\x1b]{0,200}(?:\x07|\x1b\\)|[@-Z\\-_])")
# Of what a failed or cancelled training leaves in output/, files beyond this go.
KEPT_MB = 8
# All that a trainer gets of our own environment; tokens and passwords are not among it.
_PASSED_ON = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH",
              "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "SSL_CERT_FILE",
              "REQUESTS_CA_BUNDLE")


class Training:
    """A folder with data/ and code/ (made again when needed), output/ (the recipe's), log.txt, exit (the exit code),
    limit.json (the limit it was ended by) and usage.json (what it used).

    secrets  what is blotted out of its log
    """

    def __init__(self, folder: Path, grace_s: float = GRACE_S, secrets: Iterable[str] = ()) -> None:
        self.folder = folder.resolve()
        self.output = self.folder / "output"
        self.log = self.folder / "log.txt"
        # A short path, beside no other: sockets of data loaders lie in it, and their paths are at most 108 bytes long.
        self.scratch = Path(tempfile.gettempdir()) / f"wb-{os.getuid()}-{sha256(bytes(self.folder)).hexdigest()[:12]}"
        self._exit = self.folder / "exit"
        self._grace_s = grace_s
        self.secrets = tuple(secrets)
        self._child: subprocess.Popen | None = None
        self._known: dict[tuple[int, int], bool] = {}
        self._since: int | None = None
        self._blotted_at: tuple[int, int] | None = None

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
        """A JSON file of the folder, or None. Raises Invalid for one that is none of ours: trainings can write there."""
        file = self.folder / name
        try:
            record = json.loads(file.read_bytes()) if file.exists() else {}
        except (OSError, ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise Invalid(f"{file} was written by something else than the workbench. Train again as another job, with "
                          "a recipe that writes into its output folder only.")
        return record or None

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
        except ValueError:
            return 1  # not written by the keeper

    def passed_limit(self) -> dict[str, Any] | None:
        """What the keeper wrote when it ended the training: {"limit", "value", "used", ...}. Raises Invalid as `read`."""
        passed = self.read("limit.json")
        if passed is None:
            return None
        try:
            told(passed)
        except (KeyError, ValueError, TypeError) as error:
            raise Invalid(f"{self.folder / 'limit.json'} was written by something else than the workbench.") from error
        return passed

    def ended_at(self) -> float:
        """Seconds since the epoch."""
        return self._exit.stat().st_mtime

    def forget_end(self) -> None:
        """The next attempt trains again, from the recipe's last checkpoint."""
        for name in ("exit", "limit.json", "usage.json"):
            (self.folder / name).unlink(missing_ok=True)

    def processes(self) -> list[psutil.Process]:
        """All living processes of this training, oldest first, whoever started them."""
        found = []
        for one in self._find():
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(one.pid))
        return found

    def _find(self) -> list[keeper.Process]:
        """Who carries our mark, with descendants and their sessions, and whoever was once found so."""
        since = self._since if self._since is not None else _number(self.folder / "since")
        processes = {pid: one for pid, one in keeper.living().items() if one.started >= since and pid != os.getpid()}
        settled = keeper.ticks_now() - SETTLED_S / keeper.TICK_S
        known, marked = {}, []
        for pid, process in processes.items():
            is_ours = self._known.get((pid, process.started))
            if is_ours is None:
                is_ours = _environment(pid).get(MARK) == str(self.folder)
                # Another process may have got that id while we looked; and between fork and exec a process still has
                # its parent's environment.
                if process.now() is None or not is_ours and process.started > settled:
                    continue
            known[pid, process.started] = is_ours
            if is_ours:
                marked.append(process)
        family = {one.pid: one for one in keeper.family(processes, marked, since)}
        # A child that was started with an empty environment and whose parents are gone: all sessions here are ours.
        witness = {one.session: one for one in family.values()}
        family |= {pid: one for pid, one in processes.items() if pid not in family and one.session in witness
                   and _share_session(one, witness[one.session])}
        found = keeper.family(processes, family.values(), since)
        self._known = known | {(one.pid, one.started): True for one in found}
        return found

    def start(self, command: list[str], environment: dict[str, str], cwd: Path, limits: Limits = Limits()) -> None:
        """Starts the command in a session of its own, under a keeper that holds it to the limits; stdout and stderr go
        to log.txt. Raises Unavailable where trainings cannot be kept."""
        if not sys.platform.startswith("linux"):
            raise Unavailable(f"Trainings run on Linux only, this is {sys.platform}: their processes are found in /proc.")
        # A stranger's code may have left a link here.
        for path in (self.output, self.log):
            if path.is_symlink():
                path.unlink()
        self.forget_end()
        self.output.mkdir(parents=True, exist_ok=True)
        self._clear_scratch()
        try:
            self.scratch.mkdir(mode=0o700)
        except OSError as error:
            raise Unavailable(f"The folder for temporary files {self.scratch} cannot be made ({error.strerror}); remove "
                              "what stands there, or free some space.") from error
        own = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        # Nothing older is ever taken for a process of this training.
        self._since = keeper.ticks_now()
        (self.folder / "since").write_text(str(self._since))
        with open(self.log, "ab") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-I", "-S", keeper.__file__, str(self.folder), str(self.scratch),
                 json.dumps(limits.to_json()), *command],
                cwd=cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                # Hashes of strings decide orders in which some recipes walk: the same ones in each run.
                env={**own, "PYTHONHASHSEED": "0", "TMPDIR": str(self.scratch), **environment,
                     MARK: str(self.folder), KEEPER: "1"})

    def follow(self, job: Job) -> None:
        """Tells the job every epoch until no process of the training is left. Raises Cancelled, with all of them
        gone."""
        told, keepers = None, []
        try:
            while True:
                has_ended = self.exit_code() is not None
                for row in self.history()[-1:]:
                    if row != told:
                        told = row
                        job.progress(int(row["epoch"]), _epochs(row), _note(row))
                if has_ended:
                    break
                if self._child is None or self._child.poll() is not None:
                    keepers = [one for one in keepers if one.now() is not None] or self._keepers()
                    # Without its keeper nothing holds a training to its limits.
                    if not keepers and self.exit_code() is None:
                        break
                job.check()
                self._wait(POLL_S)
        except (Exception, KeyboardInterrupt):  # not every BaseException: the next worker goes on from one that ends
            self.stop()
            raise
        # What is left when the keeper was killed.
        self.stop()

    def _wait(self, seconds: float) -> None:
        """So long, or until the keeper that this worker started is over, which it is once it wrote the exit code."""
        if self._child is None or self._child.returncode is not None:
            time.sleep(seconds)
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(seconds)

    def stop(self) -> None:
        """Ends every process of the training: asks, waits a moment, kills; returns when none is left."""
        # A keeper that wrote the exit code has ended all others, so that one look is enough where nobody is left.
        if self.exit_code() is None or self._find():
            # A keeper that is stopped still inherits orphans, and takes no end of its command for the training's.
            keepers = self._keepers()
            for one in keepers:
                keeper.send(one, signal.SIGSTOP)
            spared = {(one.pid, one.started) for one in keepers}
            keeper.end_all(lambda: [one for one in self._find() if (one.pid, one.started) not in spared], self._grace_s)
            for one in keepers:
                keeper.send(one, signal.SIGKILL)
            keeper.end_all(self._find, 0)
        if self._child is not None:
            self._child.wait()
        self._blot_log()
        self._clear_scratch()

    def _keepers(self) -> list[keeper.Process]:
        return [one for one in self._find() if KEEPER in _environment(one.pid)]

    def _clear_scratch(self) -> None:
        if self.scratch.is_symlink():
            self.scratch.unlink()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def open_output(self, name: str, most_mb: int) -> BinaryIO:
        """A file of output/ for reading: a plain one in a plain folder, no link, of at most so many MiB.

        Raises FileNotFoundError when nothing stands there, Invalid for anything else than such a file.
        """
        where = self.output / name
        try:
            folder = os.open(self.output, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                # Not to wait for whoever would write into a pipe.
                file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
            finally:
                os.close(folder)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise Invalid(f"{where} is a link or no plain file ({error.strerror}); a recipe writes plain files into its "
                          "output folder and leaves the folder where it is.") from error
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or found.st_size > most_mb * MIB:
            os.close(file)
            raise Invalid(f"{where} has {found.st_size / MIB:.0f} MiB, at most {most_mb} are taken." if
                          stat.S_ISREG(found.st_mode) else f"{where} is no plain file; write one.")
        return os.fdopen(file, "rb")

    def history(self) -> list[dict[str, Any]]:
        """One record an epoch, from output/history.jsonl; a line that is not whole yet is left out, and a file that
        `open_output` would refuse is as good as none."""
        try:
            with self.open_output("history.jsonl", HISTORY_MB) as file:
                text = file.read().decode(errors="replace")
        except (FileNotFoundError, Invalid):
            return []
        rows = []
        for line in text.splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict) and _is_epoch(row.get("epoch")):
                    rows.append(row)
        return rows

    def last_lines(self, count: int = 12) -> str:
        """The end of the log, without secrets."""
        try:
            with open(os.open(self.log, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as log:
                start = log.seek(max(0, log.seek(0, os.SEEK_END) - SHOWN_BYTES))
                text = log.read().decode(errors="replace")
        except OSError:
            return ""
        if start:  # half a line may begin with half a secret
            text = text.partition("\n")[2] or text[1000:]
        # A terminal or a page that shows it must not obey it.
        text = "".join(char for char in _ESCAPES.sub("", text)
                       if char in "\n\r\t" or unicodedata.category(char) not in ("Cc", "Cf", "Cs"))
        text = "\n".join(line for line in text.splitlines() if line.strip() and "INFO mlflow" not in line)
        return "\n".join(line if len(line) <= SHOWN_LINE else f"{line[:SHOWN_LINE]}..."
                         for line in self._blotted(text).splitlines()[-count:])

    def _blotted(self, text: str) -> str:
        for secret in self.secrets:
            for form in {secret, quote(secret, safe=""), json.dumps(secret)[1:-1]}:
                text = text.replace(form, "***")
        return blotted(text)

    def _blot_log(self) -> None:
        """Takes secrets out of the log that is kept, once nobody writes it any more."""
        half = self.folder / "log.half"
        if self._blotted_at is not None and self._blotted_at == self._log_state():
            return
        try:
            source = open(os.open(self.log, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), errors="replace", newline="\n")
        except OSError:
            return
        with source, open(half, "w", newline="\n") as target:
            # Whole lines, but of an endless one a piece only: no other thread runs while one piece is looked through.
            while piece := source.read(SHOWN_BYTES):
                target.write(self._blotted(piece + source.readline(SHOWN_BYTES)))
        half.replace(self.log)
        self._blotted_at = self._log_state()

    def _log_state(self) -> tuple[int, int] | None:
        try:
            found = os.lstat(self.log)
        except OSError:
            return None
        return found.st_size, found.st_mtime_ns

    def clear(self, names: Iterable[str], *, keep_output: bool = True) -> None:
        """Removes files and folders that can be made again, and of what a training that failed wrote all but small files."""
        for name in names:
            path = self.folder / name
            path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path, ignore_errors=True)
        if keep_output:
            return
        if self.output.is_symlink():
            self.output.unlink()
        for folder, _, files in os.walk(self.output):
            for file in (Path(folder) / name for name in files):
                with contextlib.suppress(OSError):  # of a folder that the recipe has closed even to us
                    if file.is_symlink() or file.stat().st_size > KEPT_MB * MIB:
                        file.unlink()


def stop_trainings(home: Path, of_job: Callable[[str], bool] = lambda job_id: True) -> int:
    """Ends all training processes below a home folder that are of such a job; they go on from their last checkpoint when
    their jobs are taken up again. Returns how many trainings were running."""
    running = 0
    # environments.locked builds in folders of this kind too.
    for job_id, folder in [
            *((file.parent.name, file.parent) for file in sorted((home / "trainings").glob("*/request.json"))),
            *((code.parents[2].name, code.parent) for code in sorted((home / "sweeps").glob("*/trials/*/code"))),
            *((folder.name, folder) for folder in (home / "environments").glob("*.build"))]:
        training = Training(folder)
        if of_job(job_id) and training.exit_code() is None and training.processes():
            training.stop()
            running += 1
    return running


def _share_session(one: keeper.Process, ours: keeper.Process) -> bool:
    """Whether both are in the same session now; `ours` lives before and after, so that its id is nobody else's."""
    before, now, after = ours.now(), one.now(), ours.now()
    return None not in (before, now, after) and before.session == now.session == after.session


def _number(file: Path) -> int:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return 0


def _environment(pid: int) -> dict[str, str]:
    """What a process was started with; {} for one of another user."""
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(one.split("=", 1) for one in text.split("\0") if "=" in one)


def _is_epoch(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= MOST_EPOCHS


def _epochs(row: dict[str, Any]) -> int:
    return int(row["epochs"] if _is_epoch(row.get("epochs")) else row["epoch"])


def _note(row: dict[str, Any]) -> str:
    value = row.get("map_50")
    return f"mAP50 {value:.3f}" if isinstance(value, (int, float)) and -1e9 < value < 1e9 else ""

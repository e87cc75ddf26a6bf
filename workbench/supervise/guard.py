"""The guard: a process beside the supervisor that ends its parts when it is gone, however that came."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

STOP_S = 10  # between SIGTERM and SIGKILL; mongod's clean shutdown takes about a second


def guard(home: Path) -> None:
    """Reads which process groups the supervisor has; when it is gone, ends those that are left."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    groups: set[int] = set()
    for line in sys.stdin:
        groups = groups | {int(line[1:])} if line[0] == "+" else groups - {int(line[1:])}
    for group in groups:
        signal_group(group, signal.SIGTERM)
    end = time.monotonic() + STOP_S
    while any(signal_group(group, 0) for group in groups) and time.monotonic() < end:
        time.sleep(0.1)
    for group in groups:
        signal_group(group, signal.SIGKILL)
    if groups:
        stop_trainings(home)


def signal_group(group: int, number: int) -> bool:
    """False when the group is gone."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def stop_trainings(home: Path) -> None:
    """A training has a session of its own and outlives a worker that died; it does not outlive the workbench."""
    from workbench.steps import training
    training.stop_trainings(home)


if __name__ == "__main__":
    guard(Path(sys.argv[1]))

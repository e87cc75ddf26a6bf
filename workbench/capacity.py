"""Capacity: how many trainings this machine holds side by side, by its cores, memory and GPUs."""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

GIB = 2**30
# What a training is taken to need before one was measured: torch with a small detector is 0.7 to 1.5 GiB.
NEED_BYTES = int(1.5 * GIB)
# A training that is over before anybody looked still had a Python with its libraries.
LEAST_BYTES = GIB // 4
# Some memory stays for the page cache and for whoever else works on the machine.
SHARE = 0.85
CGROUP = Path("/sys/fs/cgroup")
_DEVICE = re.compile(r"^(\s*)(?:GPU|MIG).*\(UUID: ((?:GPU|MIG)-[^)]+)\)", re.MULTILINE)


@dataclass(frozen=True)
class Slots:
    """How many trainings run at once, each with so many threads and one of the GPUs (() without); why: a sentence."""

    trials: int
    threads: int
    gpus: tuple[str, ...] = ()
    why: str = ""


def slots(most: int, *, cores: int, memory: int, need: int, gpus: tuple[str, ...] = ()) -> Slots:
    """As many trainings as fit, at least one: one a GPU, or one a core where there is no GPU, and `need` bytes each.

    A training on one thread wastes nothing on waiting for others, so cores are first shared among trainings.

    most    more are not wanted
    memory  bytes that may be used
    need    bytes of one training
    """
    by_place, by_memory = len(gpus) or cores, int(memory * SHARE // max(1, need))
    trials = max(1, min(most, by_place, by_memory))
    threads = max(1, cores // trials)
    limits = [f"{len(gpus)} GPUs, one a trial" if gpus else f"{cores} cores",
              f"{memory / GIB:.1f} GiB free memory of which a trial needs {need / GIB:.1f}", f"{most} wanted at once"]
    return Slots(trials, threads, gpus, f"{trials} {'trial' if trials == 1 else 'trials'} at once with {threads} "
                 f"{'thread' if threads == 1 else 'threads'} each: {', '.join(limits)}.")


def count_cores(limit: int = 0, cgroup: Path = CGROUP) -> int:
    """Cores this process may use: affinity, the container's share of time, and `limit` (0: none)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = (_words(cgroup / "cpu.max") + ["", ""])[:2]
    if quota.isdigit() and period.isdigit() and int(period):
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, min(cores, limit) if limit > 0 else cores)


def free_memory(cgroup: Path = CGROUP) -> int:
    """Bytes that can be used without swapping, on the machine and within the container's limit."""
    free = psutil.virtual_memory().available
    limit, used = _words(cgroup / "memory.max"), _words(cgroup / "memory.current")
    if limit and used and limit[0].isdigit():
        told = dict(zip(stat[::2], stat[1::2])) if (stat := _words(cgroup / "memory.stat")) else {}
        # Files that were read once are counted as used and given up at once when memory is asked for.
        free = min(free, int(limit[0]) - int(used[0]) + int(told.get("inactive_file", 0)))
    return max(0, free)


def visible_gpus() -> tuple[str, ...]:
    """What CUDA_VISIBLE_DEVICES takes for each GPU, or each part of a divided one (MIG); those that it names already
    when it is set. () without NVIDIA's driver."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        named = [one.strip() for one in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
        # CUDA takes what stands before the first entry that is none.
        return tuple(named[:next((at for at, one in enumerate(named) if one in ("", "-1")), len(named))])
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return read_gpus(listed)


def read_gpus(listed: str) -> tuple[str, ...]:
    """The UUIDs in what `nvidia-smi -L` prints; of a GPU that is divided, those of its parts."""
    found: list[str] = []
    for indent, uuid in _DEVICE.findall(listed):
        if indent and found and found[-1].startswith("GPU-"):
            found.pop()
        found.append(uuid)
    return tuple(found)


def processors() -> list[str]:
    """The names of this machine's CPU and of NVIDIA's GPUs, in that order."""
    cpu = _named(Path("/proc/cpuinfo"), "model name") or [platform.processor()]
    return [cpu[0], *(name for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
                      for name in _named(file, "Model:"))]


def _named(file: Path, key: str) -> list[str]:
    """What stands behind the colon in lines that begin with `key`."""
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(key)]


def memory_of(processes: list[psutil.Process]) -> int:
    """Bytes that processes hold together, pages they share counted once where the system tells."""
    total = 0
    for process in processes:
        try:
            held = process.memory_full_info()
        except psutil.Error:
            continue
        total += getattr(held, "pss", held.rss)
    return total


def _words(file: Path) -> list[str]:
    return file.read_text().split() if file.is_file() else []

"""Limits: what one start of a training may use, and what is told of one that wanted more."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from workbench.config import Config
from workbench.errors import Invalid

CGROUP_MEMORY = Path("/sys/fs/cgroup/memory.max")
MIB = 2**20
# limit -> (what was used, what to change besides the limit)
TOLD = {
    "wall_s": ("ran for {used:.0f} s", "Train fewer epochs or on fewer frames"),
    "cpu_s": ("used {used:.0f} s of processor time", "Train fewer epochs or on fewer frames"),
    "memory_mb": ("held {used:.0f} MiB of memory in {processes:.0f} processes",
                  "Use smaller batches or fewer processes that load data"),
    "processes": ("had {used:.0f} processes at once", "Look for a loop that starts processes in the recipe"),
    "disk_mb": ("wrote {used:.0f} MiB to the disk", "Keep fewer checkpoints"),
    "log_mb": ("printed {used:.0f} MiB", "Print less"),
    "free_disk_mb": ("ran on a disk with only {used:.0f} MiB left", "Free some space"),
}


@dataclass(frozen=True)
class Limits:
    """0 sets none. All processes of a training count together, whatever they forked to.

    wall_s        seconds from its start
    cpu_s         seconds of processor time
    memory_mb     MiB of memory, pages that processes share counted once
    processes     at once
    disk_mb       MiB written below its folder and its folder for temporary files; no single file grows beyond either
    log_mb        MiB of what it prints
    free_disk_mb  MiB that stay free on the disk it writes to, whoever fills it
    """

    wall_s: int = 0
    cpu_s: int = 0
    memory_mb: int = 0
    processes: int = 0
    disk_mb: int = 0
    log_mb: int = 0
    free_disk_mb: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**40:
                raise Invalid(f"Limit {name} must be a whole number from 0 (none) up, got {value!r}.")

    def tightened(self, asked: dict[str, int] | None) -> Limits:
        """These, with those that are asked for where they are lower. Raises Invalid."""
        can = [name for name in asdict(self) if name != "free_disk_mb"]
        foreign = sorted(set(asked or {}) - set(can))
        if foreign:
            raise Invalid(f"There is no limit {', '.join(foreign)} to ask for; there are {', '.join(can)}.")
        wanted = asdict(Limits(**(asked or {})))
        return replace(self, **{name: min(wanted[name], value) if value else wanted[name]
                                for name, value in asdict(self).items() if wanted[name]})

    def to_json(self) -> dict[str, int]:
        return asdict(self)


def limits_of(config: Config) -> Limits:
    """What the settings allow. Raises Invalid."""
    if not 0 <= config.retrain_memory_percent <= 100:
        raise Invalid(f"Setting retrain_memory_percent must be 0 to 100, is {config.retrain_memory_percent}.")
    return Limits(
        wall_s=config.retrain_wall_s, cpu_s=config.retrain_cpu_s, processes=config.retrain_processes,
        memory_mb=_memory() * config.retrain_memory_percent // 100 // MIB,
        disk_mb=config.retrain_disk_mb, log_mb=config.retrain_log_mb, free_disk_mb=config.retrain_free_disk_mb)


def told(passed: dict[str, Any]) -> str:
    """One sentence about a limit that was passed, as keeper.Watch tells it."""
    name = passed["limit"]
    used, change = TOLD[name]
    setting = "retrain_memory_percent" if name == "memory_mb" else f"retrain_{name}"
    also = "" if name == "free_disk_mb" else f" or limit {name} of the request"
    least = "at least " if name == "free_disk_mb" else ""
    return (f"The training {used.format(**passed)}, its limit is {least}{passed['value']} (setting {setting}{also}), so "
            f"all its processes were ended. {change}, or change the limit.")


def _memory() -> int:
    """Bytes of this machine, or of the container this runs in."""
    whole = psutil.virtual_memory().total
    try:
        allowed = CGROUP_MEMORY.read_text().strip()
    except OSError:
        return whole
    return min(whole, int(allowed)) if allowed.isdigit() else whole

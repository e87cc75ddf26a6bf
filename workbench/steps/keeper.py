"""Keeper: the parent of a training's processes; ends them all when they pass a limit, and keeps the exit code.

It is a program of its own, so that limits hold while no worker lives, and stands alone (standard library only), so that
it starts in a few hundredths of a second. The kernel hands it every orphan below it (PR_SET_CHILD_SUBREAPER,
prctl(2)): a process that forks twice, opens a session of its own and clears its environment is still its descendant.
Linux only: it reads /proc.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
# Every process of a training carries its folder in its environment: found again after the worker died.
MARK = "WORKBENCH_TRAINING"
# Only the keeper itself carries this one.
KEEPER = "WORKBENCH_KEEPER"
MIB = 2**20
LOOK_S = 0.25
# Looking costs at most 1/LOOK_SHARE of a core, however many processes and files there are.
LOOK_SHARE, WALK_SHARE = 50, 50
# What a recipe left running behind itself is asked to end, and killed after so long.
LEFTOVER_S = 2.0
# Of the exit code of a command that a limit ended: what a shell says of SIGKILL.
KILLED = 128 + signal.SIGKILL
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Process:
    """A living process as /proc/PID/stat has it. started: ticks since the machine's start; cpu_s: its own and that of
    children it waited for; rss: bytes."""

    pid: int
    parent: int
    group: int
    session: int
    started: int
    cpu_s: float
    rss: int

    def now(self) -> Process | None:
        """The same process as it is now; None when it is over. Another one with its id is not the same."""
        found = read(self.pid)
        return found if found is not None and found.started == self.started else None


def living() -> dict[int, Process]:
    """All processes of this machine that are not zombies, by their id."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (process := read(int(name))) is not None:
            found[process.pid] = process
    return found


def ticks_now() -> int:
    """The time in the unit of Process.started."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) / TICK_S)


def family(processes: dict[int, Process], roots: Iterable[Process], since: int) -> list[Process]:
    """The roots and their descendants that were started since then, oldest first.

    `processes` was read one after the other, and an id may have gone to another process meanwhile, so a child counts
    when it still names its parent between two looks at that parent; what is older than `since` never does.
    """
    children: dict[int, list[Process]] = {}
    for process in processes.values():
        children.setdefault(process.parent, []).append(process)
    found: dict[int, Process] = {}
    left = [one for one in roots if one.started >= since]
    while left:
        process = left.pop()
        if process.pid in found or process.pid in (1, os.getpid()) and process not in roots:
            continue
        found[process.pid] = process
        for child in children.get(process.pid, []):
            if child.started >= max(since, process.started) and process.now() is not None:
                again = child.now()
                if again is not None and again.parent == process.pid and process.now() is not None:
                    left.append(again)
    return sorted(found.values(), key=lambda process: process.started)


def descendants() -> list[Process]:
    """All below this process."""
    own = read(os.getpid())
    return [one for one in family(living(), [own], own.started) if one.pid != own.pid]


def end_all(find: Callable[[], Iterable[Process]], grace_s: float) -> None:
    """Ends what `find` finds until it finds nothing: asks, waits `grace_s`, then kills, whole process groups at once.

    Processes of other users, which may not be killed, are left.
    """
    until = time.monotonic() + grace_s
    asked: set[tuple[int, int]] = set()
    foreign: set[tuple[int, int]] = set()
    while left := [one for one in find() if (one.pid, one.started) not in foreign]:
        is_patient = time.monotonic() < until
        for one in left:
            key = (one.pid, one.started)
            if is_patient and key in asked:
                continue
            asked.add(key)
            if not (send(one, signal.SIGTERM) if is_patient else _kill_group(one)):
                foreign.add(key)
        time.sleep(0.02 if is_patient else 0.001)


def _kill_group(process: Process) -> bool:
    """Kills it with its group in one call, so that a group that forks without end has no time to. False when it may not
    be killed."""
    # Stopped it cannot go away, and so nobody else gets the group's id meanwhile.
    if not send(process, signal.SIGSTOP):
        return False
    now = process.now()
    if now is not None and now.group not in (0, 1, os.getpgrp()):
        try:
            os.killpg(now.group, signal.SIGKILL)
        except OSError:
            pass  # of two users: each is killed by itself
    return send(process, signal.SIGKILL)


def send(process: Process, number: int) -> bool:
    """Signals exactly this process, never a later one with its id. False when it may not be."""
    try:
        handle = os.pidfd_open(process.pid)
    except OSError:
        return True
    try:
        if process.now() is not None:
            signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    finally:
        os.close(handle)
    return True


def read(pid: int) -> Process | None:
    """The process with that id; None for none and for a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except OSError:
        return None
    fields = text[text.rindex(b")") + 2:].split()  # proc(5); the name before may hold blanks and brackets
    if fields[0] in (b"Z", b"X"):
        return None
    return Process(pid, int(fields[1]), int(fields[2]), int(fields[3]), int(fields[19]),
                   sum(map(int, fields[11:15])) * TICK_S, int(fields[21]) * PAGE)


class Watch:
    """What a training uses, against its limits. `limits`: limits.Limits as JSON values, 0 or absent for none."""

    def __init__(self, folder: Path, scratch: Path, limits: dict[str, int]) -> None:
        self._folder, self._scratch = folder, scratch
        self._limits = {name: value for name, value in limits.items() if value}
        self.used: dict[str, float] = {"wall_s": 0, "cpu_s": 0, "memory_mb": 0, "processes": 0, "disk_mb": 0, "log_mb": 0}
        self._started = time.monotonic()
        self._cpu_s = 0.0
        self._next_walk = 0.0
        # What we laid out for the training is not its doing.
        self._laid_out = sum(disk_bytes(folder / name) for name in ("data", "code") if not (folder / name).is_symlink())

    def passed(self) -> dict[str, float | str] | None:
        """The first limit that is passed now: {"limit", "value", "used", ...}; None while all is well."""
        members = descendants()
        cpu_s = sum(one.cpu_s for one in members)
        # A child whose parent never waits takes its seconds with it: only what is added counts.
        self.used["cpu_s"] += max(0.0, cpu_s - self._cpu_s)
        self._cpu_s = cpu_s
        self.used["wall_s"] = time.monotonic() - self._started
        self._most("processes", len(members))
        held = sum(one.rss for one in members) / MIB
        if held > self._limits.get("memory_mb", 0) > 0:
            held = sum(map(_share_of_memory, members)) / MIB
        self._most("memory_mb", held)
        return self._first(held, len(members)) or self.passed_on_disk()

    def passed_on_disk(self, is_over: bool = False) -> dict[str, float | str] | None:
        """The part of `passed` that concerns files; `is_over`: nothing runs any more, so all is looked at once."""
        self.used["wall_s"] = time.monotonic() - self._started
        if is_over:
            spent = resource.getrusage(resource.RUSAGE_CHILDREN)
            self._most("cpu_s", spent.ru_utime + spent.ru_stime)
        log = _size(self._folder / "log.txt") / MIB
        self._most("log_mb", log)
        if log > self._limits.get("log_mb", 0) > 0:
            return {"limit": "log_mb", "value": self._limits["log_mb"], "used": log}
        floor = self._limits.get("free_disk_mb", 0)
        left = os.statvfs(self._folder)
        free = left.f_bavail * left.f_frsize / MIB
        if free < floor and not is_over:
            return {"limit": "free_disk_mb", "value": floor, "used": free}
        if is_over or time.monotonic() >= self._next_walk:
            began = time.monotonic()
            disk = (disk_bytes(self._folder) + disk_bytes(self._scratch) - self._laid_out) / MIB
            self._next_walk = time.monotonic() + max(1.0, WALK_SHARE * (time.monotonic() - began))
            self._most("disk_mb", disk)
            # A file that reached RLIMIT_FSIZE cannot grow beyond.
            if disk >= self._limits.get("disk_mb", 0) > 0:
                return {"limit": "disk_mb", "value": self._limits["disk_mb"], "used": disk}
        return None

    def _first(self, held: float, count: int) -> dict[str, float | str] | None:
        now = {"processes": count, "memory_mb": held, "cpu_s": self.used["cpu_s"], "wall_s": self.used["wall_s"]}
        for name, used in now.items():
            if used > self._limits.get(name, 0) > 0:
                return {"limit": name, "value": self._limits[name], "used": used, "processes": count}
        return None

    def _most(self, name: str, value: float) -> None:
        self.used[name] = max(self.used[name], value)


def disk_bytes(folder: Path) -> int:
    """Bytes that the files below a folder take, a file with several names once, what links lead to not at all."""
    total, seen, left = 0, set(), [str(folder)]
    while left:
        try:
            with os.scandir(left.pop()) as entries:
                for entry in entries:
                    found = entry.stat(follow_symlinks=False)
                    if stat.S_ISDIR(found.st_mode):
                        left.append(entry.path)
                    elif found.st_nlink == 1 or (found.st_dev, found.st_ino) not in seen:
                        seen.add((found.st_dev, found.st_ino))
                        total += found.st_blocks * 512  # stat(2): of 512 bytes, whatever the file system's block
        except OSError:
            continue  # gone meanwhile, or closed to us; its neighbours count on
    return total


def _share_of_memory(process: Process) -> int:
    """Bytes of its memory, pages it shares with others divided among them (PSS, proc(5))."""
    try:
        with open(f"/proc/{process.pid}/smaps_rollup") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return process.rss


def _size(file: Path) -> int:
    try:
        return os.lstat(file).st_size
    except OSError:
        return 0


def _write(file: Path, text: str) -> None:
    half = file.with_name(file.name + ".half")
    half.write_text(text)
    half.replace(file)


def keep(folder: Path, scratch: Path, limits: dict[str, int], command: list[str]) -> int:
    """Runs the command to its end or to a limit; returns its exit code, as a shell would tell it."""
    watch = Watch(folder, scratch, limits)
    disk, processes = limits.get("disk_mb", 0) * MIB, limits.get("processes", 0)
    niceness = os.getpriority(os.PRIO_PROCESS, 0)
    most = _tasks() + max(1024, 16 * processes)
    try:
        # Among a thousand processes that fork, an equal share would not let the keeper end them. For root only, whom
        # RLIMIT_NPROC does not bind.
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except OSError:
        pass

    def bound() -> None:
        os.setpriority(os.PRIO_PROCESS, 0, niceness)  # SCHED_RESET_ON_FORK made it 0
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if processes:
            # Of this user in all, threads too: far above what is there, a floor under whoever forks without end.
            lowered = min([most, *(one for one in resource.getrlimit(resource.RLIMIT_NPROC) if one >= 0)])
            resource.setrlimit(resource.RLIMIT_NPROC, (lowered, lowered))
        if disk:
            resource.setrlimit(resource.RLIMIT_FSIZE, (disk, disk))
        # When the machine runs out of memory, this training goes and not what else runs there.
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("500")

    try:
        # A group of its own: a script that signals its whole group does not reach the keeper.
        child = subprocess.Popen(command, process_group=0, preexec_fn=bound)
    except OSError as error:
        print(f"{command[0]} cannot be started: {error}", file=sys.stderr)
        return 127
    code, passed = None, None
    while code is None and passed is None:
        began = time.monotonic()
        passed = watch.passed()
        until, tasks = time.monotonic() + max(LOOK_S, LOOK_SHARE * (time.monotonic() - began)), _tasks()
        # Whoever forks without end is not waited for: the machine's count of processes and threads is quickly read.
        while (code := _reap(child.pid)) is None and passed is None and time.monotonic() < until and (
                not processes or _tasks() - tasks < max(8, processes // 2)):
            time.sleep(0.02)
    if code is not None:
        passed = passed or watch.passed_on_disk(is_over=True)
    if passed is not None:
        _write(folder / "limit.json", json.dumps(passed))

    def left() -> list[Process]:
        _reap(child.pid)
        return descendants()

    end_all(left, LEFTOVER_S if passed is None else 0)
    if passed is not None and passed["limit"] == "log_mb":
        os.truncate(folder / "log.txt", int(passed["value"]) * MIB)
    _write(folder / "usage.json", json.dumps({name: round(value, 3) for name, value in watch.used.items()}))
    return code if passed is None else KILLED


def _tasks() -> int:
    """Processes and threads of the whole machine."""
    with open("/proc/loadavg") as file:
        return int(file.read().split()[3].partition("/")[2])


def _reap(child: int) -> int | None:
    """Takes in whatever ended; the exit code of `child` when it was among them."""
    code = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code
        if pid == 0:
            return code
        if pid == child:
            ended = os.waitstatus_to_exitcode(status)
            code = ended if ended >= 0 else 128 - ended


def main(arguments: list[str]) -> None:
    """arguments: the training's folder, its scratch folder, limits as JSON, then the command."""
    os.environ.pop(KEEPER, None)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # Handled, not ignored: that would be inherited. Who wants a training to end kills the keeper last.
        signal.signal(number, lambda *_: None)
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        print(f"prctl failed: {os.strerror(ctypes.get_errno())}; orphans may be lost sight of", file=sys.stderr)
    folder = Path(arguments[0])
    code = keep(folder, Path(arguments[1]), json.loads(arguments[2]), arguments[3:])
    _write(folder / "exit", str(code))


if __name__ == "__main__":
    main(sys.argv[1:])

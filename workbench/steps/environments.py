"""Environments: the Python that a recipe runs in: the workbench's own, or one built from the recipe's lock."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import yaml

from workbench.errors import Invalid, Unavailable
from workbench.ports import Job
from workbench.recipe import Recipe, git
from workbench.steps.limits import Limits
from workbench.steps.training import Training

CURRENT, LOCKED = "current", "locked"
# Requirements of a recipe, the first that is there.
LOCKS = ("requirements.lock", "requirements.txt")
# A torch with CUDA is 5 GB to download.
BUILD = Limits(wall_s=3600, processes=256, log_mb=64, free_disk_mb=1024)
UV_S = 120
# What tells an installer where packages come from, and certificates and proxies; no other variable of ours.
_PASSED_ON = ("UV_DEFAULT_INDEX", "UV_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_OFFLINE",
              "UV_CACHE_DIR", "UV_CONFIG_FILE", "UV_NATIVE_TLS", "UV_HTTP_TIMEOUT", "UV_HTTP_RETRIES", "UV_INDEX_STRATEGY",
              "XDG_CONFIG_HOME", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "no_proxy", "NO_PROXY")
_VERSION = re.compile(r"\d+(\.\d+){0,2}")
_ADDRESS = re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]{0,20}://\S+")
# Lines of a requirements file that lead to files of the repository or of this machine (pip's file format).
_LOCAL = re.compile(r"^\s*(-r|-c|--requirement|--constraint|-f|--find-links|[./])|://(?=/)|@\s*[./]", re.MULTILINE)
_INCLUDE = re.compile(r"^\s*(?:-r|--requirement)[ =]?\s*(\S+)", re.MULTILINE)
_EDITABLE = re.compile(r"^\s*(-e\b|--editable)", re.MULTILINE)


@dataclass(frozen=True)
class Environment:
    """python: the interpreter; digest: of all that it was built from; packages: as `uv pip freeze` lists them."""

    choice: str
    python: Path
    digest: str
    packages: str
    version: str


@dataclass(frozen=True)
class Lock:
    """What a recipe wants, as it stands in its commit.

    python        version, "" for the workbench's own
    requirements  a requirements file's text, read in the recipe's folder; `build` is installed before it
    included      the text of files that it includes
    tree          of the recipe's folder, when the requirements lead to files in it
    """

    python: str
    requirements: str
    build: str = ""
    included: str = ""
    tree: str = ""

    @property
    def has_hashes(self) -> bool:
        return "--hash=" in self.requirements + self.included


def check_choice(choice: str) -> str:
    """Raises Invalid."""
    if choice not in (CURRENT, LOCKED):
        raise Invalid(f"An environment is {CURRENT} (the workbench's own) or {LOCKED} (built from the recipe's lock), "
                      f"not {choice!r}.")
    return choice


def current() -> Environment:
    """The workbench's own."""
    packages = "".join(sorted({f"{one.name}=={one.version}\n" for one in distributions() if one.name}, key=str.lower))
    version = platform.python_version()
    return Environment(CURRENT, Path(sys.executable), _digest([version, platform.machine(), packages]), packages, version)


def read_lock(project: Path, recipe: Recipe) -> Lock:
    """The lock of a recipe: `python_env` of its MLproject (python, build_dependencies, dependencies, as MLflow reads
    them), and requirements.lock or requirements.txt beside it, which go before python_env's dependencies.

    Raises Invalid when there is none, or it cannot be installed apart from the repository.
    """
    place = recipe.folder.removeprefix(".").strip("/")

    def text(name: str) -> str | None:
        path = "/".join(part for part in (place, name) if part)
        entry = git(project, "ls-tree", recipe.commit, "--", path)
        return git(project, "cat-file", "blob", f"{recipe.commit}:{path}") if entry.startswith("100") else None

    where = f"{recipe.folder} at {recipe.commit[:12]}"
    written = _yaml(text("MLproject") or "", f"MLproject in {where}")
    named, python, build, dependencies = written.get("python_env"), "", [], None
    if named is not None:
        if not isinstance(named, str) or named.startswith("/") or ".." in Path(named).parts:
            raise Invalid(f"python_env of {where} must be a file beside the MLproject, is {named!r}.")
        found = text(named.removeprefix("./"))
        if found is None:
            raise Invalid(f"MLproject in {where} names {named}, which is not in that commit.")
        listed = _yaml(found, f"{named} in {where}")
        python, build = str(listed.get("python") or ""), listed.get("build_dependencies") or []
        dependencies = listed.get("dependencies")
    if python and not _VERSION.fullmatch(python):
        raise Invalid(f"{named} of {where}: python must be a version in quotes such as \"3.11\", is {python!r}.")
    for one in [*build, *(dependencies or [])] if isinstance(build, list) and isinstance(dependencies or [], list) else [0]:
        if not isinstance(one, str) or "\n" in one:
            raise Invalid(f"{named} of {where}: dependencies and build_dependencies must be lists of requirements.")
    file = next((name for name in LOCKS if text(name) is not None), None)
    if file is None and dependencies is None:
        raise Invalid(f"{where} has no lock: commit a requirements.lock (`uv pip compile --generate-hashes`) or "
                      f"requirements.txt beside the MLproject, or a python_env in it; or ask for the environment {CURRENT}.")
    requirements = text(file) if file else "\n".join(dependencies) + "\n"
    # MLflow's lists usually hold one line, "-r requirements.txt".
    included = "\n".join(text(name.removeprefix("./")) or "" for name in _INCLUDE.findall(requirements))
    whole = "\n".join([requirements, included, *build])
    if _EDITABLE.search(whole):
        raise Invalid(f"The lock of {where} has an editable requirement (-e), whose files are gone after the training. "
                      "Name it without -e.")
    tree = git(project, "rev-parse", f"{recipe.commit}:{place}").strip() if _LOCAL.search(whole) else ""
    return Lock(python, requirements, "".join(f"{one}\n" for one in build), included, tree)


def locked(lock: Lock, folder: Path, home: Path, job: Job, secrets: tuple[str, ...] = ()) -> Environment:
    """The environment of a lock below `home`, built there when it is not yet; whoever wants the same waits for it.

    folder  the recipe's, checked out: requirements may name files in it

    Raises Invalid when it cannot be built, Cancelled, Unavailable without uv.
    """
    python, version = _interpreter(lock.python)
    digest = _digest([version, platform.machine(), lock.requirements, lock.build, lock.included, lock.tree])
    final = home / digest
    home.mkdir(parents=True, exist_ok=True)
    with _alone(home / f"{digest}.lock", job):
        if not _is_whole(final):
            _build(lock, python, folder, final, job, secrets)
        packages = (final / "packages.txt").read_text()
    return Environment(LOCKED, final / "bin" / "python", digest, packages, version)


def _build(lock: Lock, python: str, folder: Path, final: Path, job: Job, secrets: tuple[str, ...]) -> None:
    job.log(f"Building the recipe's environment {final.name}.")
    half = final.with_name(f"{final.name}.half")
    work = Training(final.with_name(f"{final.name}.build"), secrets=secrets)
    work.stop()  # what a killed worker's build left running
    for one in (half, final, work.folder):
        shutil.rmtree(one, ignore_errors=True)
    work.folder.mkdir(parents=True)
    # Copies: a training that writes into its environment would change uv's cache, and so every other one.
    install = [_uv(), "pip", "install", "--quiet", "--link-mode", "copy", "--python", str(half / "bin" / "python")]
    hashes = ["--require-hashes"] if lock.has_hashes else []
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    try:
        for command in ([_uv(), "venv", "--quiet", "--no-project", "--relocatable", "--python", python, str(half)],
                        *([[*install, "-r", _written(folder, "build", lock.build)]] if lock.build else []),
                        [*install, *hashes, "-r", _written(folder, "requirements", lock.requirements)]):
            work.start(command, {**environment, "NO_COLOR": "1", "UV_PYTHON_DOWNLOADS": "never"}, folder, BUILD)
            work.follow(job)
            if work.exit_code() != 0:
                said = _ADDRESS.sub("(address)", work.last_lines())
                raise Invalid(f"The recipe's environment could not be built: {command[1]} ended with exit code "
                              f"{work.exit_code()}. Mend its lock, or look whether this machine reaches the packages. "
                              f"The installer's last words:\n{said}")
        (half / "packages.txt").write_text(_freeze(half / "bin" / "python"))
        (half / "files.json").write_text(json.dumps({"digest": _digest(_listing(half))}))
        half.rename(final)
    finally:
        work.stop()
        for one in (half, work.folder):
            shutil.rmtree(one, ignore_errors=True)


def _written(folder: Path, name: str, text: str) -> str:
    """A requirements file in the recipe's folder: paths in one are meant from where it lies."""
    file = folder / f".workbench-{name}.txt"
    file.unlink(missing_ok=True)
    file.write_text(text)
    return str(file)


def _is_whole(folder: Path) -> bool:
    """Whether it is there and nobody has changed its files since it was built."""
    try:
        return json.loads((folder / "files.json").read_text())["digest"] == _digest(_listing(folder))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _listing(folder: Path) -> Iterator[str]:
    """Name, size and time of each file, compiled ones aside: they come and go."""
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(files):
            if name not in ("files.json", "packages.txt"):
                found = os.lstat(os.path.join(path, name))
                yield f"{os.path.relpath(path, folder)}/{name} {found.st_size} {found.st_mtime_ns}"


@contextmanager
def _alone(file: Path, job: Job) -> Iterator[None]:
    with open(file, "w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                job.check()
                time.sleep(0.2)
        yield


def _interpreter(wanted: str) -> tuple[str, str]:
    """(path, full version) of a Python of this machine; the workbench's own for "". Raises Invalid."""
    if not wanted:
        return sys.executable, platform.python_version()
    done = _run([_uv(), "python", "find", "--no-project", "--system", "--no-python-downloads", wanted])
    found = done.stdout.strip()
    if done.returncode or not found:
        raise Invalid(f"The recipe wants Python {wanted}, which is not on this machine. Install it (`uv python install "
                      f"{wanted}`), or change `python` in its python_env.")
    told = _run([found, "-I", "-c", "import platform; print(platform.python_version())"])
    return found, told.stdout.strip()


def _freeze(python: Path) -> str:
    done = _run([_uv(), "pip", "freeze", "--python", str(python)])
    if done.returncode:
        raise Unavailable(f"The packages of {python} cannot be listed: {_ADDRESS.sub('(address)', done.stderr)[-400:]}")
    return _ADDRESS.sub("(address)", done.stdout)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "UV_CACHE_DIR") if name in os.environ}
    try:
        return subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              timeout=UV_S)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{Path(command[0]).name} did not end within {UV_S} s; try again.") from error


def _uv() -> str:
    try:
        from uv import find_uv_bin
        return find_uv_bin()
    except (ImportError, FileNotFoundError) as error:
        raise Unavailable("The package uv is not installed; it builds environments. `pip install uv`.") from error


def _yaml(text: str, where: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise Invalid(f"{where} is not YAML: {str(error)[:300]}. Mend and commit it.") from error
    if not isinstance(found, dict):
        raise Invalid(f"{where} must be a mapping. Mend and commit it.")
    return found


def _digest(parts: Any) -> str:
    whole = sha256()
    for part in parts:
        whole.update(part.encode() + b"\0")
    return whole.hexdigest()[:32]

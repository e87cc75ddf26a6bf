"""Doctor: one look at each part, one sentence about each, with what to do where something is wrong."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from workbench.config import Config
from workbench.errors import Unavailable, WorkbenchError
from workbench.supervise import lock, parts
from workbench.wiring import PROJECT, Workbench

PACKAGES = ("streamlit", "fiftyone", "mlflow", "dbos", "torch", "torchvision", "openvino", "onnxruntime", "onnx", "fastapi",
            "uvicorn", "faster-coco-eval", "opencv-python-headless", "numpy", "pillow")
# A first training, its data and its models take about this much; a full disk damages databases.
FREE_BYTES = 2 * 1024**3
MARKS = ("ok", "note", "WRONG")


@dataclass(frozen=True)
class Check:
    """mark: "ok", "note" (works without, but a person should know) or "WRONG" (something needed is broken)."""

    name: str
    mark: str
    says: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine(config: Config) -> list[Check]:
    """All checks, in the order in which a person would mend things. Changes nothing but the home folder's existence."""
    found: list[Check] = []
    for look in (_python, _packages, _git, _home, _mongod, _processor, _recipes):
        found += list(_safely(look, config))
    is_up, is_home = _is_up(config), found and all(one.mark != "WRONG" for one in found if one.name == "home")
    if not is_home:
        return found
    workbench = Workbench(config)
    found.append(Check("up", "ok" if is_up else "note", f"`workbench up` runs on {config.home}." if is_up else
                       f"Nothing runs on {config.home}; `workbench up` starts it."))
    for part in parts.ALL:
        found.append(_part(config, part, is_up))
    for look in (_models, _datasets):
        found += list(_safely(look, workbench))
    found.append(Check("cvat", "ok", f"CVAT is set to {config.cvat_url.partition('@')[2] or config.cvat_url}.")
                 if config.cvat_url else
                 Check("cvat", "note", "No CVAT is connected, labels are edited in FiftyOne; set cvat_url and cvat_token "
                       f"in {config.home / 'settings.toml'} to use one."))
    return found


def is_fit(found: list[Check]) -> bool:
    return all(check.mark != "WRONG" for check in found)


def _safely(look: Callable[[Any], Iterator[Check]], subject: Any) -> Iterator[Check]:
    """A check that cannot even be made is a finding, not the end of the others."""
    name = look.__name__.strip("_")
    try:
        yield from look(subject)
    except WorkbenchError as error:
        yield Check(name, "WRONG", str(error))
    except Exception as error:
        yield Check(name, "WRONG", f"It cannot be checked: {type(error).__name__}: {error}.")


def _python(config: Config) -> Iterator[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield (Check("python", "ok", f"Python {version}.") if sys.version_info >= (3, 11) else
           Check("python", "WRONG", f"Python {version} is too old; install 3.11 or newer and make the environment again."))


def _packages(config: Config) -> Iterator[Check]:
    versions, missing = [], []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        yield Check("packages", "WRONG", f"Missing: {', '.join(missing)}. Run `make .venv/.installed`, or `pip install -c "
                    f"constraints.txt -e .` in {PROJECT}.")
    else:
        yield Check("packages", "ok", ", ".join(versions) + ".")


def _git(config: Config) -> Iterator[Check]:
    if shutil.which("git") is None:
        yield Check("git", "WRONG", "git is not installed, so no version can be published: `apt-get install git`.")
        return
    said = subprocess.run(["git", "--version"], capture_output=True, text=True, timeout=20)
    yield Check("git", "ok", said.stdout.strip() + ".")


def _home(config: Config) -> Iterator[Check]:
    try:
        config.home.mkdir(parents=True, exist_ok=True)
        probe = config.home / f".doctor-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        yield Check("home", "WRONG", f"{config.home} cannot be written ({error.strerror}); give it to this user, or choose "
                    "another with --home or WORKBENCH_HOME.")
        return
    free = shutil.disk_usage(config.home).free
    said = f"{config.home} can be written, {free / 1024**3:.1f} GiB are free"
    yield (Check("home", "ok", said + ".") if free >= FREE_BYTES else
           Check("home", "WRONG", f"{said}, less than the {FREE_BYTES // 1024**3} a training needs: make room."))


def _mongod(config: Config) -> Iterator[Check]:
    if config.mongo_url:
        yield Check("mongod", "ok", "An outside MongoDB is set (mongo_url).")
        return
    binary = parts.mongod_binary()
    said = subprocess.run([str(binary), "--version"], capture_output=True, text=True, timeout=60)
    if said.returncode != 0:
        reason = (said.stderr.strip().splitlines() or ["no reason given"])[-1]
        yield Check("mongod", "WRONG", f"{binary} does not start ({reason}); `apt-get install libcurl4 libssl3` brings the "
                    "libraries it needs.")
        return
    yield Check("mongod", "ok", f"{said.stdout.splitlines()[0].strip()}, {binary}.")


def _processor(config: Config) -> Iterator[Check]:
    cores = os.cpu_count() or 1
    if Path("/proc/driver/nvidia").exists():
        yield Check("processor", "note", f"{cores} cores, and an NVIDIA GPU that this version does not use yet.")
    else:
        yield Check("processor", "ok", f"{cores} cores and no GPU: models run on the CPU ({config.backend}, "
                    f"{config.worker_threads} threads).")


def _recipes(config: Config) -> Iterator[Check]:
    recipes = sorted(file.parent.name for file in (PROJECT / "models").glob("*/MLproject"))
    if not recipes:
        yield Check("recipes", "WRONG", f"{PROJECT / 'models'} holds no recipe, so nothing can be trained; run the workbench "
                    "from a git checkout of the project.")
    elif not (PROJECT / ".git").exists():
        yield Check("recipes", "WRONG", f"{PROJECT} is no git checkout, and a training runs from an exact commit: clone the "
                    "project with git.")
    else:
        yield Check("recipes", "ok", f"{', '.join(recipes)} in {PROJECT / 'models'}.")


def _is_up(config: Config) -> bool:
    """Whether somebody holds the lock of `workbench up`."""
    file = config.home / "up.lock"
    if not file.exists():
        return False
    try:
        lock(config.home).close()
    except WorkbenchError:
        return True
    return False


def _part(config: Config, part: parts.Part, is_up: bool) -> Check:
    outside = getattr(config, part.outside) if part.outside else ""
    try:
        parts.look(config, part)
    except Unavailable as error:
        if outside:
            return Check(part.name, "WRONG", f"{error} It is set by {part.outside}: correct the setting or start that server.")
        if is_up:
            return Check(part.name, "WRONG", f"{error} Its log is {config.home / 'logs' / (part.name + '.log')}.")
        try:
            parts.check_port(config, part)
        except WorkbenchError as taken:
            return Check(part.name, "WRONG", str(taken))
        return Check(part.name, "note", f"It does not run ({part.what}); `workbench up` starts it.")
    if part.port and not outside and not is_up:
        return Check(part.name, "note", f"Something answers on port {getattr(config, part.port)}, but nothing runs on "
                     f"{config.home}: it may be another workbench. Set {part.port} to a free port to run both.")
    return Check(part.name, "ok", f"It answers: {part.what}.")


def _models(workbench: Workbench) -> Iterator[Check]:
    refs = workbench.models.refs()
    for ref in refs:
        workbench.models.folder(ref)  # verifies every file's sha256
    yield (Check("models", "ok", f"{len(refs)} registered, all files as their cards say.") if refs else
           Check("models", "note", "No detector is registered; `workbench demo` trains one, `workbench models add` adds one."))


def _datasets(workbench: Workbench) -> Iterator[Check]:
    names = workbench.datasets.names()
    versions = sum(len(workbench.datasets.versions(name)) for name in names)
    yield Check("datasets", "ok" if names else "note", f"{len(names)} data sets, {versions} versions." if names else
                "No data set yet; upload one on the page, with `workbench upload`, or run `workbench demo`.")

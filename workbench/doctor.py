"""Doctor: one look at each part, one sentence about each, with what to do where something is wrong."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

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
    found += _safely(_cvat, config)
    return found


def examine_cvat(workbench: Workbench) -> list[Check]:
    """What stands between a deployed model and CVAT's AI tools, in the order in which a person would mend it."""
    config = workbench.config
    if not config.cvat_url or not config.cvat_token:
        missing = " and ".join(name for name in ("cvat_url", "cvat_token") if not getattr(config, name))
        return [Check("settings", "WRONG", f"{missing} not set: write it into {config.home / 'settings.toml'}; the token "
                      "is made in CVAT under Profile, Security, Access tokens (read and write).")]
    found: list[Check] = []
    for look in (_cvat_answers, _gateway, _functions, _turned_away, _cvat_lists):
        found += list(_safely(look, workbench))
        if found and found[-1].name in ("cvat", "gateway") and found[-1].mark == "WRONG":
            break
    return found


def cvat_settings(config: Config) -> dict[str, str]:
    """What cvat_server and cvat_worker_annotation need in their environment."""
    seen = urlsplit(config.gateway_url or config.gateway)
    return {"CVAT_SERVERLESS": "1", "CVAT_NUCLIO_HOST": seen.hostname or "", "CVAT_NUCLIO_PORT": str(
        seen.port or (443 if seen.scheme == "https" else 80)), "CVAT_NUCLIO_INVOKE_METHOD": "dashboard"}


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
        yield Check("processor", "note", f"{cores} cores and an NVIDIA GPU; models run on {config.backend}. The backend "
                    "tensorrt uses the GPU (docs/gpu.md).")
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


def _cvat(config: Config) -> Iterator[Check]:
    if not config.cvat_url:
        yield Check("cvat", "note", "No CVAT is connected, labels are edited in FiftyOne; set cvat_url and cvat_token "
                    f"in {config.home / 'settings.toml'} to use one.")
        return
    version = Workbench(config).cvat_tools.version()
    yield Check("cvat", "ok", f"CVAT {version} answers; `workbench doctor cvat` looks at its AI tools.")


def _cvat_answers(workbench: Workbench) -> Iterator[Check]:
    try:
        tools = workbench.cvat_tools
        version = tools.version()
        tools.projects()  # the version is told to anybody, this is not
    except WorkbenchError as error:
        yield Check("cvat", "WRONG", str(error))
        return
    yield Check("cvat", "ok", f"CVAT {version} answers and takes the token.")


def _gateway(workbench: Workbench) -> Iterator[Check]:
    config = workbench.config
    try:
        with urllib.request.urlopen(f"{config.gateway}/api/functions", timeout=10) as answer:
            json.load(answer)
    except urllib.error.HTTPError as error:
        yield Check("gateway", "note" if error.code == 403 else "WRONG",
                    f"{config.gateway} answers {error.code}: {error.reason}")
        return
    except (OSError, ValueError) as error:
        yield Check("gateway", "WRONG", f"The gateway does not answer at {config.gateway} ({error}). `workbench up` starts "
                    f"it with the HTTP service; its log is {config.home / 'logs' / 'service.log'}.")
        return
    yield Check("gateway", "ok", f"The gateway answers at {config.gateway}.")


def _functions(workbench: Workbench) -> Iterator[Check]:
    from workbench.steps.cvat_gateway import served
    deployed = served(models=workbench.models, records=workbench.records, certificates=workbench.certificates)
    if not deployed:
        yield Check("functions", "note", "No model is deployed to CVAT yet: the CVAT page does it.")
    for one in deployed:
        yield Check("functions", "WRONG" if one.why_not else "ok", one.why_not or
                    f"{one.function.model} is deployed as {one.function.kind} {one.function.name}.")


def _turned_away(workbench: Workbench) -> Iterator[Check]:
    from workbench.service.nuclio import networks, refused_callers
    allowed = networks(workbench.config)
    for address, at in refused_callers(workbench.config).items():
        if not any(ip_address(address) in network for network in allowed):
            yield Check("callers", "note", f"{address} called the gateway and was turned away ({at[:16]}). If that is "
                        f"CVAT, add it to the setting gateway_allow, now {workbench.config.gateway_allow!r}.")


def _cvat_lists(workbench: Workbench) -> Iterator[Check]:
    from workbench.steps.cvat_gateway import served
    wanted = cvat_settings(workbench.config)
    address = f"{wanted['CVAT_NUCLIO_HOST']}:{wanted['CVAT_NUCLIO_PORT']}"
    step = ("Set " + ", ".join(f"{name}={value}" for name, value in wanted.items())
            + " on cvat_server and on cvat_worker_annotation, then start both again.")
    try:
        listed = {one.id for one in workbench.cvat_tools.functions()}
    except Unavailable as error:
        looked_at = getattr(error, "looked_at", "")  # where CVAT itself says that it looks
        if looked_at == address and getattr(error, "status", 0) not in (503, 504):
            step = "That is the gateway's own answer."
        elif looked_at == address:
            step = (f"CVAT looks at {address}, as it should, and gets no list. If CVAT runs in containers, 127.0.0.1 "
                    "there is the container itself: set gateway_port, gateway_host (an address of this machine that "
                    "containers reach), gateway_allow (CVAT's network) and gateway_url, then start `workbench up` and "
                    "CVAT again.")
        elif looked_at:
            step = f"CVAT looks for its functions at {looked_at}, the gateway is at {address}. {step}"
        yield Check("AI tools", "WRONG", f"{error} {step}")
        return
    mine = {one.function.name for one in served(models=workbench.models, records=workbench.records,
                                                certificates=workbench.certificates) if not one.why_not}
    missing = sorted(mine - listed)
    if missing:
        yield Check("AI tools", "WRONG", f"CVAT lists {len(listed)} functions, but not {', '.join(missing)}: it asks "
                    f"another server than this gateway. {step}")
    elif mine:
        yield Check("AI tools", "ok", f"CVAT lists all {len(mine)} functions that are deployed.")
    else:
        yield Check("AI tools", "ok", f"CVAT asks for functions and gets {len(listed)}.")


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

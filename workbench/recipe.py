"""Recipe: how a detector is trained, an MLproject in `models/<name>/` at one exact git commit."""

from __future__ import annotations

import fcntl
import math
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from string import Formatter
from typing import Any

import yaml

from workbench.errors import Invalid, NotFound, Unavailable

GIT_TIMEOUT_S = 600  # generous: a first clone of a large project over a busy disk
RECIPE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
# What a text value may be made of: nothing that a shell, a path or str.format gives a meaning to.
_TEXT = re.compile(r"[A-Za-z0-9_.,:+][A-Za-z0-9_.,:+@-]{0,199}")
# Hooks, file-system monitors and the ext transport start programs that a repository names; none is needed here.
NO_PROGRAMS = ("git", "-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", "-c", "protocol.ext.allow=never",
               "-c", "gc.auto=0", "-c", "advice.detachedHead=false")


@dataclass(frozen=True)
class Recipe:
    """An MLproject as it stands in one commit.

    commit       full SHA
    parameters   name -> (type as MLproject writes it, default or None where a value must be given), of entry point main
    uncommitted  files of the recipe in the project folder that differ from the commit; they do not take part
    place        its folder in a repository that is not the project's, "." for the top
    command      of entry point main, with {parameter} where their values go
    """

    name: str
    commit: str
    parameters: dict[str, tuple[str, Any]]
    uncommitted: tuple[str, ...] = ()
    place: str = ""
    command: str = ""

    @property
    def folder(self) -> str:
        return self.place or f"models/{self.name}"

    def arguments(self, params: dict[str, Any], ours: dict[str, str]) -> dict[str, str]:
        """What the entry point gets: a person's `params`, checked, and `ours`, the folders that the workbench chooses.

        Raises Invalid for a parameter that MLproject does not declare, that is ours to give, that is not a plain
        number or word, or that is missing.
        """
        unknown = sorted(set(params) - set(self.parameters))
        if unknown:
            raise Invalid(f"Recipe {self.name} has no parameter {', '.join(unknown)}; it has "
                          f"{', '.join(sorted(set(self.parameters) - set(ours)))}.")
        reserved = sorted(set(params) & set(ours))
        if reserved:
            raise Invalid(f"Parameter {', '.join(reserved)} of recipe {self.name} is given by the workbench; leave it "
                          "out.")
        undeclared = sorted(set(ours) - set(self.parameters))
        if undeclared:
            raise Invalid(f"Recipe {self.name} does not declare {', '.join(undeclared)} in {self.folder}/MLproject, "
                          "which this training needs. See docs/adopting.md.")
        self.check_command()
        values = {name: plain(self.name, name, self.parameters[name][0], value) for name, value in params.items()}
        # MLflow takes no path for a parameter of type uri.
        values |= {name: Path(value).as_uri() if self.parameters[name][0] == "uri" and value.startswith("/") else value
                   for name, value in ours.items()}
        missing = sorted(name for name, (_, default) in self.parameters.items()
                         if default is None and name not in values)
        if missing:
            raise Invalid(f"Recipe {self.name} needs a value for {', '.join(missing)}.")
        return values


    def command_line(self, arguments: dict[str, str]) -> str:
        """The shell command that `mlflow run` would run for these arguments (mlflow.projects, EntryPoint.compute_command),
        whose import alone takes seconds of a core. Raises Invalid when the command names what is no parameter."""
        self.check_command()
        values = {name: shlex.quote(str(arguments.get(name, default))) for name, (_, default) in self.parameters.items()}
        return self.command.format(**values)

    def check_command(self) -> None:
        """Raises Invalid when the command has anything in braces that is no name of a parameter: MLflow would end with
        a traceback, and a width ({epochs:>999999999}) would fill the memory."""
        try:
            fields = [(name, form or convert) for _, name, form, convert in Formatter().parse(self.command)
                      if name is not None]
        except ValueError as error:
            fields = [(str(error), "")]
        wrong = [name for name, form in fields if form or name not in self.parameters]
        if wrong:
            raise Invalid(f"The command of {self.folder}/MLproject cannot be filled in: {wrong[0][:100]!r}. Declare "
                          "what stands in braces as a parameter, by its name alone, and write braces of the shell twice.")


def recipes(project: Path) -> list[str]:
    """Names of the recipes in the project's HEAD commit, sorted. Raises Invalid when `project` is no git checkout."""
    listed = git(project, "ls-tree", "-r", "--name-only", head(project), "--", "models/").splitlines()
    return sorted(parts[1] for parts in (line.split("/") for line in listed) if parts[2:] == ["MLproject"])


def read_recipe(project: Path, name: str, commit: str | None = None, place: str = "") -> Recipe:
    """The recipe as it stands in `commit` (full SHA), or in HEAD; in models/<name>, or in the folder `place`.

    Raises Invalid when the name is not one, the project is no git checkout or MLproject cannot be read, NotFound when
    the commit has no such recipe.
    """
    if not place and not RECIPE_NAME.fullmatch(name):
        raise Invalid(f"Recipe name {name!r} must be lower-case letters, digits, - or _, at most 63 of them.")
    commit = commit or head(project)
    file = f"{place or f'models/{name}'}/MLproject".removeprefix("./")
    if not git(project, "ls-tree", "--name-only", commit, "--", file).strip():
        raise NotFound(f"Commit {commit[:12]} of {project} has no {file}. Commit the recipe first; there are "
                       f"{', '.join(recipes(project)) or 'none'}.")
    try:
        written = yaml.safe_load(git(project, "cat-file", "blob", f"{commit}:{file}"))
        main = written["entry_points"]["main"]
        parameters = {str(key): _declared(value) for key, value in (main.get("parameters") or {}).items()}
        if not isinstance(main["command"], str):
            raise TypeError("command is no text")
    # yaml raises ValueError for a date that is none, RecursionError for brackets without end.
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise Invalid(f"{file} at {commit[:12]} has no entry point main with a command: {repr(error)[:200]}. Mend and "
                      "commit it.") from error
    if "docker_env" in written:
        raise Invalid(f"{file} at {commit[:12]} asks for docker_env; recipes run in the workbench's own environment. "
                      "Take it out and commit.")
    is_bare = git(project, "rev-parse", "--is-bare-repository").strip() == "true"
    changed = "" if is_bare else git(project, "status", "--porcelain", "-z", "--no-renames", "--untracked-files=all",
                                     "--", f"models/{name}")
    return Recipe(name, commit, parameters, tuple(entry[3:] for entry in changed.split("\0") if entry), place,
                  main["command"])


def head(project: Path) -> str:
    """The full SHA of the project's HEAD. Raises Invalid when the folder is not the top of a git repository."""
    advice = "Recipes run from an exact commit: clone the project with git, or run `git init` and commit in it."
    if not project.is_dir() or not (project / ".git").exists() and not (project / "HEAD").exists():
        raise Invalid(f"{project} is not a git checkout. {advice}")
    try:
        return git(project, "rev-parse", "--verify", "HEAD^{commit}").strip()
    except Invalid as error:
        raise Invalid(f"{project} has no commit that can be read ({error}). {advice}") from error


def check_out(project: Path, commit: str, mirrors: Path, folder: Path) -> None:
    """Makes `folder` a fresh checkout of the commit, from a private mirror of the project kept below `mirrors`.

    The project itself is only read: MLflow, hooks and the recipe never see it. Whatever lay in `folder` is replaced.
    A `project` that is such a mirror itself (repository.fetch) is used as it is.
    """
    mirror = _mirror(project, mirrors)
    mirrors.mkdir(parents=True, exist_ok=True)
    with open(mirrors / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if mirror != project and not mirror.exists():
            half = mirror.with_suffix(".half")
            shutil.rmtree(half, ignore_errors=True)
            git(mirrors, "clone", "--quiet", "--mirror", "--no-hardlinks", str(project.resolve()), str(half))
            half.rename(mirror)
        if mirror != project and not _has(mirror, commit):
            # HEAD is asked for by itself: it may be detached, then no branch or tag leads to it. Nothing is pruned, so
            # that the commit of an interrupted training stays.
            git(mirror, "fetch", "--quiet", "--no-prune", "--update-shallow", "origin", "+refs/*:refs/*",
                "+HEAD:refs/workbench/head")
        shutil.rmtree(folder, ignore_errors=True)
        git(mirror, "worktree", "prune")
        git(mirror, "worktree", "add", "--quiet", "--detach", "--force", str(folder), commit)


def discard(project: Path, mirrors: Path, folder: Path) -> None:
    """Removes a checkout made by `check_out`."""
    mirror = _mirror(project, mirrors)
    shutil.rmtree(folder, ignore_errors=True)
    if mirror.exists():
        with open(mirrors / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            git(mirror, "worktree", "prune")


def _has(mirror: Path, commit: str) -> bool:
    try:
        git(mirror, "cat-file", "-e", f"{commit}^{{commit}}")
    except Invalid:
        return False
    return True


def _mirror(project: Path, mirrors: Path) -> Path:
    if project.parent == mirrors:
        return project
    return mirrors / f"{sha256(str(project.resolve()).encode()).hexdigest()[:16]}.git"


def git(folder: Path, *arguments: str) -> str:
    """Runs git in a folder without hooks and without a person to ask; returns what it printed. Raises Invalid."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment |= {"LC_ALL": "C.UTF-8", "GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0",
                    # A repository's own .lfsconfig names the server that large files would be asked from.
                    "GIT_LFS_SKIP_SMUDGE": "1"}
    try:
        done = subprocess.run([*NO_PROGRAMS, "-C", str(folder), *arguments], env=environment, stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, errors="surrogateescape", timeout=GIT_TIMEOUT_S)
    except FileNotFoundError as error:
        raise Unavailable("git is not installed; install it (Debian, Ubuntu: apt-get install git).") from error
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"git {arguments[0]} in {folder} did not end within {GIT_TIMEOUT_S} s; try again.") from error
    if done.returncode:
        raise Invalid(f"git {arguments[0]} in {folder} failed: {done.stderr.strip()[-600:]}")
    return done.stdout


def _declared(value: Any) -> tuple[str, Any]:
    return (value, None) if isinstance(value, str) else (value.get("type", "string"), value.get("default"))


def plain(recipe: str, name: str, kind: str, value: Any) -> str:
    """The value as text, when it is a plain number or word; MLflow puts it into a shell command.

    Its quoting does not help where the command's author wrote quotes around a parameter. Raises Invalid.
    """
    if isinstance(value, bool):
        value = int(value)
    if kind in ("float", "int") or isinstance(value, (int, float)):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise Invalid(f"Parameter {name} of recipe {recipe} must be a number, got {_shown(value)}.")
        return str(int(number)) if number == int(number) and abs(number) < 1e15 else repr(number)
    if not isinstance(value, str) or not _TEXT.fullmatch(value):
        raise Invalid(f"Parameter {name} of recipe {recipe} must be a plain word (letters, digits, . , : + - _ @), got "
                      f"{_shown(value)}.")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."

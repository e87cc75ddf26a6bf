"""Environments built from a recipe's lock: real uv, no network; whole or not at all, once for all, and told when not."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
from parts_training import commit

from workbench.errors import Cancelled, Invalid
from workbench.ports import Quiet
from workbench.recipe import git, read_recipe
from workbench.steps import environments
from workbench.steps.environments import CURRENT, Lock, current, locked, read_lock

MLPROJECT = "name: own\n{}entry_points:\n  main:\n    parameters: {{data: string, output: string}}\n    command: python train.py\n"


def wheel(folder: Path, name: str = "tinyloss", version: str = "1.2", says: str = "half") -> Path:
    """A wheel of one module, as PEP 427 has it."""
    folder.mkdir(parents=True, exist_ok=True)
    file, info = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{name}.py", f"SAYS = {says!r}\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "".join(f"{one},,\n" for one in archive.namelist()))
    return file


@pytest.fixture
def project(tmp_path: Path) -> Path:
    project = tmp_path / "a project"
    (project / "models/own").mkdir(parents=True)
    (project / "models/own/MLproject").write_text(MLPROJECT.format(""))
    (project / "models/own/train.py").write_text("print('trained')\n")
    subprocess.run(["git", "init", "-q", "-b", "main", project], check=True)
    return project


def lock_of(project: Path, files: dict[str, str], python_env: str = "") -> Lock:
    for name, text in files.items():
        (project / "models/own" / name).write_text(text)
    (project / "models/own/MLproject").write_text(MLPROJECT.format(f"python_env: {python_env}\n" if python_env else ""))
    commit(project)
    return read_lock(project, read_recipe(project, "own"))


def build(lock: Lock, tmp_path: Path, job: Quiet | None = None, folder: Path | None = None) -> environments.Environment:
    folder = folder or tmp_path / "code"
    folder.mkdir(exist_ok=True)
    return locked(lock, folder, tmp_path / "environments", job or Quiet())


def test_a_lock_is_read_from_the_commit_in_the_forms_mlflow_and_pip_have(project: Path) -> None:
    env = "python: '3.11'\nbuild_dependencies: [wheel==0.45.1]\ndependencies:\n- -r requirements.txt\n- extra==1\n"
    plain = lock_of(project, {"requirements.txt": "torch==2.15.0\n"})
    assert plain == Lock("", "torch==2.15.0\n")
    with_env = lock_of(project, {"python_env.yaml": "python: '3.11'\nbuild_dependencies: [wheel==0.45.1]\ndependencies: [x==1]\n"},
                       "python_env.yaml")
    assert with_env == Lock("3.11", "torch==2.15.0\n", "wheel==0.45.1\n")
    locked_too = lock_of(project, {"requirements.lock": "torch==2.15.0 --hash=sha256:00\n"}, "python_env.yaml")
    assert locked_too.requirements.startswith("torch==2.15.0 --hash") and locked_too.has_hashes
    for name in ("requirements.lock", "requirements.txt"):
        (project / "models/own" / name).unlink()
    (project / "models/own/more").mkdir()
    (project / "models/own/more/base.txt").write_text("six==1.17.0 --hash=sha256:11\n")
    listed = lock_of(project, {"python_env.yaml": env.replace("requirements.txt", "more/base.txt")}, "python_env.yaml")
    assert listed.requirements == "-r more/base.txt\nextra==1\n" and listed.included == "six==1.17.0 --hash=sha256:11\n"
    assert listed.has_hashes and listed.tree == git(project, "rev-parse", "HEAD:models/own").strip()
    # What lies in the folder and not in the commit does not count.
    (project / "models/own/python_env.yaml").write_text("not yaml: [")
    assert read_lock(project, read_recipe(project, "own")) == listed


@pytest.mark.parametrize(("files", "python_env", "told"), [
    ({}, "", "has no lock: commit a requirements.lock"),
    ({}, "python_env.yaml", "names python_env.yaml, which is not in that commit"),
    ({}, "../../etc/passwd", "must be a file beside the MLproject"),
    ({"python_env.yaml": "- 1\n"}, "python_env.yaml", "must be a mapping"),
    ({"python_env.yaml": "[" * 5000}, "python_env.yaml", "is not YAML"),
    ({"python_env.yaml": "python: '3.11; touch x'\ndependencies: []\n"}, "python_env.yaml", "must be a version in quotes"),
    ({"python_env.yaml": "dependencies: [{a: b}]\n"}, "python_env.yaml", "must be lists of requirements"),
    ({"python_env.yaml": "dependencies: torch\n"}, "python_env.yaml", "must be lists of requirements"),
    ({"requirements.txt": "-e .\n"}, "", r"editable requirement \(-e\)"),
])
def test_a_lock_that_cannot_be_used_says_why(project: Path, files: dict[str, str], python_env: str, told: str) -> None:
    with pytest.raises(Invalid, match=told):
        lock_of(project, files, python_env)


def test_an_environment_is_built_once_from_hashes_and_used_again_until_somebody_changes_it(tmp_path: Path) -> None:
    file = wheel(tmp_path / "wheels")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    lock = Lock("", f"--no-index\n--find-links {file.parent.as_uri()}\ntinyloss==1.2 --hash=sha256:{digest}\n")
    made = build(lock, tmp_path)
    assert made.packages == "tinyloss==1.2\n" and made.python.is_relative_to(tmp_path / "environments" / made.digest)
    script = "import sys, tinyloss; print(tinyloss.SAYS, sys.prefix)"
    assert subprocess.run([made.python, "-c", script], capture_output=True, text=True, check=True).stdout.split() == [
        "half", str(made.python.parent.parent)]
    missing = subprocess.run([made.python, "-c", "import numpy"], capture_output=True, text=True)
    assert missing.returncode == 1 and "No module named 'numpy'" in missing.stderr  # nothing of the workbench's own
    assert sorted(one.name for one in (tmp_path / "environments").iterdir()) == [made.digest, f"{made.digest}.lock"]

    file.unlink()  # what is built needs nothing any more
    again = Quiet()
    assert build(lock, tmp_path, again) == made and again.lines == []
    wheel(tmp_path / "wheels")
    (installed,) = (tmp_path / "environments").rglob("tinyloss.py")
    installed.write_text("SAYS = 'tampered'\n")
    assert build(lock, tmp_path, again) == made and len(again.lines) == 1
    assert "tampered" not in installed.read_text()


def test_a_file_of_the_recipe_s_folder_can_be_required_and_another_one_is_another_environment(project: Path, tmp_path: Path) -> None:
    own = project / "models/own"
    wheel(own / "wheels")
    first = lock_of(project, {"requirements.txt": "./wheels/tinyloss-1.2-py3-none-any.whl\n"})
    made = build(first, tmp_path, folder=own)
    wheel(own / "wheels", says="whole")
    second = lock_of(project, {})
    other = build(second, tmp_path, folder=own)
    assert made.digest != other.digest
    said = [subprocess.run([one.python, "-c", "import tinyloss; print(tinyloss.SAYS)"], capture_output=True, text=True).stdout.strip()
            for one in (made, other)]
    assert said == ["half", "whole"]


@pytest.mark.parametrize("is_locked", [True, False])
def test_a_build_that_fails_ends_with_the_installer_s_words_and_without_addresses(
        tmp_path: Path, is_locked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    file = wheel(tmp_path / "wheels")
    index = "--extra-index-url http://ann:s3cret@127.0.0.1:9/simple\n"
    wanted = f"tinyloss==1.2 --hash=sha256:{'0' * 64}\n" if is_locked else "tinyloss==9\n"
    with pytest.raises(Invalid, match="(?s)could not be built: pip ended with exit code.*(tinyloss|fetch)") as failed:
        build(Lock("", ("--no-index\n" if is_locked else index) + f"--find-links {file.parent.as_uri()}\n" + wanted), tmp_path)
    assert "s3cret" not in str(failed.value) and "127.0.0.1" not in str(failed.value) and "file:" not in str(failed.value)
    assert [one.suffix for one in (tmp_path / "environments").iterdir()] == [".lock"]


def test_a_python_that_is_not_here_is_named(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="wants Python 2.7, which is not on this machine"):
        build(Lock("2.7", "six==1.17.0\n"), tmp_path)


def test_two_that_want_the_same_environment_build_it_once_and_one_that_waits_can_be_cancelled(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = wheel(tmp_path / "wheels")
    lock = Lock("", f"--no-index\n--find-links {file.parent.as_uri()}\ntinyloss==1.2\n")
    inside, go, jobs = threading.Event(), threading.Event(), [Quiet("one"), Quiet("two")]
    really = environments._build

    def slow(*arguments):
        inside.set()
        assert go.wait(60)
        return really(*arguments)

    monkeypatch.setattr(environments, "_build", slow)
    threads = [threading.Thread(target=build, args=(lock, tmp_path, job)) for job in jobs]
    threads[0].start()
    assert inside.wait(60)
    threads[1].start()

    class Gone(Quiet):
        def check(self) -> None:
            raise Cancelled("Cancelled by ann.")

    with pytest.raises(Cancelled):
        build(lock, tmp_path, Gone())
    go.set()
    for thread in threads:
        thread.join(120)
    assert [len(job.lines) for job in jobs] == [1, 0]


def test_a_build_that_a_kill_left_half_done_is_ended_and_done_again(tmp_path: Path) -> None:
    file = wheel(tmp_path / "wheels")
    lock = Lock("", f"--no-index\n--find-links {file.parent.as_uri()}\ntinyloss==1.2\n")
    script = ("import os, sys\nfrom pathlib import Path\nfrom workbench.ports import Quiet\n"
              "from workbench.steps.environments import Lock, locked\nfrom workbench.steps.training import Training\n"
              "class Dies(Quiet):\n    def check(self): os.kill(os.getpid(), 9)\n"
              "locked(Lock('', sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), Dies())\n")
    (tmp_path / "code").mkdir()
    died = subprocess.run([sys.executable, "-c", script, lock.requirements, tmp_path / "code", tmp_path / "environments"],
                          capture_output=True)
    assert died.returncode == -9
    assert [one for one in (tmp_path / "environments").iterdir() if one.suffix == ".build"]
    made = build(lock, tmp_path)
    assert made.packages == "tinyloss==1.2\n"
    assert sorted(one.name for one in (tmp_path / "environments").iterdir()) == [made.digest, f"{made.digest}.lock"]


def test_the_workbench_s_own_environment_is_what_is_installed() -> None:
    own = current()
    assert own.choice == CURRENT and own.python == Path(sys.executable) and own.digest == current().digest
    assert any(line.startswith("pytest==") for line in own.packages.splitlines())
    assert os.access(own.python, os.X_OK)

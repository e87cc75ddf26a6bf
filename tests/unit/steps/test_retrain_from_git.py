"""Retraining from another git repository: at one commit, from a private mirror, and what is refused."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
from parts_training import RECIPES, Bench, commit

from workbench import repository
from workbench.errors import Cancelled, Conflict, Invalid, NotFound, Unavailable
from workbench.ports import Quiet
from workbench.recipe import git
from workbench.repository import fetch, permitted, read_address


def run(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "protocol.file.allow=always"]
    subprocess.run(["git", "-C", folder, *who, *arguments], check=True, capture_output=True)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """Another repository: the recipe in trainings/tiny and again at the top."""
    folder = tmp_path / "listed" / "their recipes"
    shutil.copytree(RECIPES / "tiny", folder / "trainings" / "tiny")
    shutil.copytree(RECIPES / "tiny", folder, dirs_exist_ok=True)
    subprocess.run(["git", "init", "-q", "-b", "main", folder], check=True)
    commit(folder)
    return folder


def sha(folder: Path) -> str:
    return git(folder, "rev-parse", "HEAD").strip()


def asked(outside: Path, **changed: Any) -> dict[str, Any]:
    return {"repository": str(outside), "commit": sha(outside), "location": "trainings/tiny",
            "repositories": str(outside.parent), **changed}


def test_the_commit_asked_for_trains_although_its_branch_moved_and_nothing_else_is_touched(bench: Bench, outside: Path) -> None:
    version, wanted = bench.publish(), asked(outside, location=".")
    for hook in ("post-checkout", "reference-transaction"):
        (outside / ".git/hooks").mkdir(exist_ok=True)
        (outside / ".git/hooks" / hook).write_text(f"#!/bin/sh\ntouch {bench.folder}/hooked\n")
        (outside / ".git/hooks" / hook).chmod(0o755)
    (outside / "train.py").write_text("raise SystemExit('another commit')")
    run(outside, "add", "-A")
    run(outside, "-c", "core.hooksPath=/dev/null", "commit", "-qm", "moved")
    before = {str(path): path.stat().st_mtime_ns for path in outside.rglob("*") if path.is_file()}
    experiment = f"nightly {bench.dataset}"
    trained = bench.retrain(version, experiment=experiment, register_as=f"{bench.dataset}-nightly", primary="map_50", **wanted)
    assert (trained.commit, trained.model, trained.recipe) == (wanted["commit"], f"{bench.dataset}-nightly@1", "their recipes")
    (found,) = bench.parts["tracker"].runs(experiment)
    assert found["status"] == "FINISHED" and found["tags"] | {
        "git_uri": str(outside), "location": ".", "commit": wanted["commit"], "dataset": version, "primary_metric": "map_50",
        "lower_is_better": "false"} == found["tags"]
    assert (bench.training().output / "starts.txt").read_text().split()[1] == wanted["commit"]
    assert {str(path): path.stat().st_mtime_ns for path in outside.rglob("*") if path.is_file()} == before
    assert not (bench.folder / "hooked").exists() and not (bench.training().folder / "code").exists()
    # What is mirrored is trained again without asking anybody.
    shutil.rmtree(outside)
    again = bench.retrain(version, Quiet(id="again"), params={"shift": 1}, **{**wanted, "repositories": str(outside.parent)})
    assert again.commit == wanted["commit"] and again.model == f"{bench.dataset}-detector@1"
    with pytest.raises(Conflict, match="is already a training of"):
        bench.retrain(version, primary="map_50", **wanted)


@pytest.mark.parametrize(("changed", "error", "told"), [
    ({"repositories": ""}, Invalid, "setting retrain_repositories"),
    ({"repository": "ext::sh -c 'touch tricked'"}, Invalid, "other transports"),
    ({"repository": "--upload-pack=touch tricked"}, Invalid, "other transports"),
    ({"repository": "file:///etc"}, Invalid, "setting retrain_repositories"),
    ({"commit": "-h"}, Invalid, "full commit hash"),
    ({"commit": "main"}, Invalid, "full commit hash"),
    ({"commit": None}, Invalid, "go together"),
    ({"repository": None}, Invalid, "go together"),
    ({"commit": "0" * 40}, Invalid, "has no commit 0000.*Push it"),
    ({"location": "../listed"}, Invalid, "inside the repository"),
    ({"location": "trainings"}, NotFound, "has no file trainings/MLproject"),
    ({"params": {"optimizer": "sgd"}}, Invalid, "has no parameter optimizer"),
    ({"params": {"mood": "good; touch {folder}/tricked"}}, Invalid, "must be a plain word"),
    ({"params": {"mood": "$(touch tricked)"}}, Invalid, "must be a plain word"),
    ({"register_as": "Not A Name"}, Invalid, "model_name must"),
    ({"experiment": "--x"}, Invalid, "experiment_name must"),
])
def test_what_cannot_be_trained_from_is_refused_before_anything_starts(
        bench: Bench, outside: Path, changed: dict[str, Any], error: type, told: str) -> None:
    version = bench.publish()
    with pytest.raises(error, match=told):
        bench.retrain(version, **asked(outside, **changed))
    assert bench.parts["tracker"].runs(bench.dataset) == [] and not bench.training().log.exists()
    assert list(bench.folder.rglob("tricked")) == [] and list(bench.home.rglob("*.half")) == []


@pytest.mark.parametrize(("text", "address"), [
    ("https://[::1]/acme/x.git", "https://[::1]/acme/x.git"),
    ("ssh://git@[2001:DB8::1]:2222/acme/x", "ssh://git@[2001:db8::1]:2222/acme/x"),
])
def test_a_host_may_be_an_ipv6_address_and_is_listed_as_one(text: str, address: str, tmp_path: Path) -> None:
    assert read_address(text).address == address
    listed = address.removesuffix("/x").removesuffix("/x.git")
    assert permitted(text, f"https://host, {listed}", tmp_path).address == address
    with pytest.raises(Invalid, match="setting retrain_repositories"):
        permitted(text, listed.replace("::1", "::2"), tmp_path)


def test_a_tree_or_a_tag_object_is_no_commit(bench: Bench, outside: Path) -> None:
    version = bench.publish()
    run(outside, "tag", "-am", "one", "v1")
    for name in ("HEAD^{tree}", "v1"):
        with pytest.raises(Invalid, match="has no commit"):
            bench.retrain(version, **asked(outside, commit=git(outside, "rev-parse", name).strip()))


def test_a_commit_that_only_a_pull_request_has_is_not_there(bench: Bench, outside: Path) -> None:
    version = bench.publish()
    run(outside, "commit", "--allow-empty", "-qm", "by a stranger")
    stranger = sha(outside)
    run(outside, "update-ref", "refs/pull/1/head", stranger)
    run(outside, "reset", "-q", "--hard", "HEAD~1")
    with pytest.raises(Invalid, match="on a branch or tag"):
        bench.retrain(version, **asked(outside, commit=stranger))
    run(outside, "tag", "merged", stranger)  # and the mirror of before is brought up to date
    assert bench.retrain(version, **asked(outside, commit=stranger)).commit == stranger


def test_submodules_links_instead_of_an_mlproject_and_docker_are_refused(bench: Bench, outside: Path, tmp_path: Path) -> None:
    version = bench.publish()
    (outside / "trainings/linked").mkdir()
    (outside / "trainings/linked/MLproject").symlink_to("/etc/passwd")
    shutil.copytree(outside / "trainings/tiny", outside / "trainings/docker")
    with open(outside / "trainings/docker/MLproject", "a") as file:
        file.write("\ndocker_env: {image: evil}\n")
    commit(outside)
    with pytest.raises(NotFound, match="has no file trainings/linked/MLproject"):
        bench.retrain(version, **asked(outside, location="trainings/linked"))
    with pytest.raises(Invalid, match="asks for docker_env"):
        bench.retrain(version, **asked(outside, location="trainings/docker"))
    run(outside, "submodule", "add", "-q", str(bench.project), "vendored")
    commit(outside)
    with pytest.raises(Invalid, match=r"has submodules \(vendored\), which are not fetched"):
        bench.retrain(version, **asked(outside))


def test_a_primary_metric_that_the_training_does_not_write_is_a_failed_run_without_a_model(bench: Bench, outside: Path) -> None:
    version = bench.publish()
    with pytest.raises(Invalid, match="has no number map_75, the primary metric asked for; it has map_50"):
        bench.retrain(version, primary="map_75", **asked(outside))
    assert bench.run()["status"] == "FAILED" and bench.parts["models"].refs() == []


def test_a_script_that_forks_and_never_ends_is_gone_with_its_children_when_cancelled(bench: Bench, outside: Path) -> None:
    version, training = bench.publish(), bench.training()

    class CancelledAtTheFirstEpoch(Quiet):
        def check(self) -> None:
            if training.history():
                raise Cancelled("Cancelled by ann.")

    with pytest.raises(Cancelled):
        bench.retrain(version, CancelledAtTheFirstEpoch(id=f"job-{bench.dataset}"),
                      params={"mood": "fork", "epochs": 500, "pause_s": 1}, **asked(outside))
    pids = [int(line) for line in (training.output / "children.txt").read_text().split()]
    assert len(pids) == 3 and training.processes() == [] and bench.run()["status"] == "KILLED"
    for pid in pids:
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_fetch_ends_with_its_processes_when_it_takes_too_long_or_is_cancelled(
        tmp_path: Path, outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "bin"
    slow.mkdir()
    (slow / "git").write_text(f"#!/bin/sh\ncase \"$*\" in *\" --no-recurse-submodules \"*) echo $$ > {tmp_path}/pid; sleep 600 &"
                              f" echo $! > {tmp_path}/child; wait;; esac\nexec {shutil.which('git')} \"$@\"\n")
    (slow / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow}:/usr/bin:/bin")

    def cancel() -> None:
        if (tmp_path / "child").exists():
            raise Cancelled("Cancelled by ann.")

    def never() -> None: ...

    for check, limit, error in ((cancel, 300, Cancelled), (never, 1, Unavailable)):
        monkeypatch.setattr(repository, "FETCH_S", limit)
        with pytest.raises(error):
            fetch(read_address(str(outside)), "0" * 40, ".", tmp_path / "mirrors", check)
        for name in ("pid", "child"):
            pid = int((tmp_path / name).read_text())
            assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        assert list((tmp_path / "mirrors").glob("*.git")) + list((tmp_path / "mirrors").glob("*.half")) == []


def test_the_worker_s_git_settings_do_not_lead_to_another_transport(
        tmp_path: Path, outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".gitconfig").write_text(f'[url "{outside}"]\n\tinsteadOf = https://host.invalid/x\n')
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(Invalid, match="transport 'file' not allowed"):
        fetch(read_address("https://host.invalid/x"), sha(outside), ".", tmp_path / "mirrors", lambda: None)

"""Recipes: what runs is a commit, parameters are plain, the project is only read."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from workbench.errors import Invalid, NotFound
from workbench.recipe import check_out, discard, git, read_recipe, recipes

DOUBLES = Path(__file__).resolve().parents[1] / "doubles"


def commit(project: Path, message: str = "change") -> str:
    who = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", project, "add", "-A"], check=True)
    subprocess.run(["git", "-C", project, *who, "commit", "-qm", message], check=True)
    return git(project, "rev-parse", "HEAD").strip()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    project = tmp_path / "a project"
    shutil.copytree(DOUBLES / "recipes" / "tiny", project / "models" / "tiny")
    subprocess.run(["git", "init", "-q", "-b", "main", project], check=True)
    commit(project, "first")
    return project


def test_a_recipe_is_what_the_commit_says_and_not_what_lies_in_the_folder(project: Path, tmp_path: Path) -> None:
    first = git(project, "rev-parse", "HEAD").strip()
    (project / "models/tiny/train.py").write_text("raise SystemExit('uncommitted')")
    (project / "models/tiny/new file.py").write_text("")
    (project / "models/tiny/MLproject").write_text("not yaml: [")
    recipe = read_recipe(project, "tiny")
    assert recipe.commit == first and recipe.parameters["epochs"] == ("float", 2)
    assert sorted(recipe.uncommitted) == ["models/tiny/MLproject", "models/tiny/new file.py", "models/tiny/train.py"]
    check_out(project, recipe.commit, tmp_path / "mirrors", tmp_path / "code")
    assert (tmp_path / "code/models/tiny/train.py").read_bytes() == (DOUBLES / "recipes/tiny/train.py").read_bytes()
    assert not (tmp_path / "code/models/tiny/new file.py").exists()


def test_a_commit_that_was_fetched_is_checked_out_again_without_the_project(project: Path, tmp_path: Path) -> None:
    first = git(project, "rev-parse", "HEAD").strip()
    check_out(project, first, tmp_path / "mirrors", tmp_path / "code")
    project.rename(tmp_path / "away")
    check_out(project, first, tmp_path / "mirrors", tmp_path / "code 1")
    assert (tmp_path / "code 1/models/tiny/train.py").read_bytes() == (DOUBLES / "recipes/tiny/train.py").read_bytes()
    with pytest.raises(Invalid, match="git fetch"):  # another commit would have to be asked for
        check_out(project, "0" * 40, tmp_path / "mirrors", tmp_path / "code 2")


def test_an_earlier_commit_can_be_checked_out_after_the_project_moved_on_and_forgot_it(project: Path, tmp_path: Path) -> None:
    first = git(project, "rev-parse", "HEAD").strip()
    check_out(project, first, tmp_path / "mirrors", tmp_path / "code")
    (project / "models/tiny/train.py").write_text("second")
    subprocess.run(["git", "-C", project, "checkout", "-q", "--orphan", "other"], check=True)
    second = commit(project)
    subprocess.run(["git", "-C", project, "branch", "-qD", "main"], check=True)
    subprocess.run(["git", "-C", project, "checkout", "-q", "--detach"], check=True)
    subprocess.run(["git", "-C", project, "branch", "-qD", "other"], check=True)
    check_out(project, second, tmp_path / "mirrors", tmp_path / "code")
    assert (tmp_path / "code/models/tiny/train.py").read_text() == "second"
    check_out(project, first, tmp_path / "mirrors", tmp_path / "code 1")
    assert (tmp_path / "code 1/models/tiny/train.py").read_bytes() == (DOUBLES / "recipes/tiny/train.py").read_bytes()
    discard(project, tmp_path / "mirrors", tmp_path / "code")
    assert not (tmp_path / "code").exists() and (tmp_path / "code 1").exists()


def test_a_shallow_project_works(project: Path, tmp_path: Path) -> None:
    (project / "note").write_text("")
    commit(project, "second")
    shallow = tmp_path / "shallow"
    subprocess.run(["git", "clone", "-q", "--depth", "1", project.as_uri(), shallow], check=True)
    check_out(shallow, read_recipe(shallow, "tiny").commit, tmp_path / "mirrors", tmp_path / "code")
    check_out(shallow, read_recipe(shallow, "tiny").commit, tmp_path / "mirrors", tmp_path / "code")
    assert (tmp_path / "code/models/tiny/MLproject").exists()


def test_the_project_is_only_read_and_its_hooks_do_not_run(project: Path, tmp_path: Path) -> None:
    for hook in ("post-checkout", "reference-transaction"):
        (project / ".git/hooks").mkdir(exist_ok=True)
        (project / ".git/hooks" / hook).write_text(f"#!/bin/sh\ntouch {tmp_path}/hooked\n")
        (project / ".git/hooks" / hook).chmod(0o755)
    before = {str(path): path.stat().st_mtime_ns for path in project.rglob("*") if path.is_file()}
    check_out(project, read_recipe(project, "tiny").commit, tmp_path / "mirrors", tmp_path / "code")
    assert {str(path): path.stat().st_mtime_ns for path in project.rglob("*") if path.is_file()} == before
    assert git(project, "symbolic-ref", "HEAD").strip() == "refs/heads/main"
    assert not (tmp_path / "hooked").exists()


def test_recipes_lists_what_is_committed(project: Path) -> None:
    (project / "models/draft").mkdir()
    (project / "models/draft/MLproject").write_text("name: draft")
    assert recipes(project) == ["tiny"]
    with pytest.raises(NotFound, match="has no models/draft/MLproject. Commit the recipe first; there are tiny"):
        read_recipe(project, "draft")


def test_a_folder_without_git_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="is not a git checkout.*clone the project with git"):
        read_recipe(tmp_path, "tiny")
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    with pytest.raises(Invalid, match="has no commit that can be read"):
        read_recipe(tmp_path, "tiny")


@pytest.mark.parametrize("name", ["../tiny", "tiny/..", "", "Tiny", "tiny;ls", "-x", "a" * 64, "tiny\n"])
def test_a_recipe_name_is_a_plain_word(project: Path, name: str) -> None:
    with pytest.raises(Invalid, match="Recipe name"):
        read_recipe(project, name)


@pytest.mark.parametrize("text", ["name: x", "entry_points: {main: {command: 7}}", "entry_points: [", "- 1", "",
                                  "when: 2026-99-99", "a: " + "[" * 20_000])
def test_an_mlproject_without_a_main_command_is_refused(project: Path, text: str) -> None:
    (project / "models/tiny/MLproject").write_text(text)
    commit(project)
    with pytest.raises(Invalid, match="has no entry point main with a command"):
        read_recipe(project, "tiny")


OURS = {"data": "/a b/data", "output": "/a b/out"}


@pytest.mark.parametrize("more", ["{nothere}", "{0}", "{}", "{epochs:>99999999999}", "{epochs!r}", "{epochs.real}", "{data[x]}",
                                  "${HOME}", "{", "}", "{epochs"])
def test_braces_that_name_no_parameter_are_refused_before_anything_starts(project: Path, more: str) -> None:
    recipe = read_recipe(project, "tiny")
    broken = replace(recipe, command=f"{recipe.command} {more}")
    for call in (lambda: broken.arguments({}, OURS), lambda: broken.command_line(OURS)):
        with pytest.raises(Invalid, match="command of models/tiny/MLproject cannot be filled in") as told:
            call()
        assert len(str(told.value)) < 500


def test_a_folder_for_a_parameter_of_type_uri_is_given_as_one(project: Path) -> None:
    recipe = read_recipe(project, "tiny")
    recipe = replace(recipe, parameters={**recipe.parameters, "data": ("uri", None), "output": ("path", None)},
                     command="echo {data} {{x}} {output}")
    given = recipe.arguments({}, OURS)
    assert given == {"data": "file:///a%20b/data", "output": "/a b/out"}
    assert recipe.command_line(given) == "echo file:///a%20b/data {x} '/a b/out'"


def test_numbers_and_words_pass_and_ours_are_added(project: Path) -> None:
    recipe = read_recipe(project, "tiny")
    given = recipe.arguments({"epochs": 3, "shift": "-1.5", "mood": "good", "pause_s": True}, OURS)
    assert given == {"epochs": "3", "shift": "-1.5", "mood": "good", "pause_s": "1", **OURS}
    assert recipe.arguments({"shift": 1e-4, "epochs": 20.0}, OURS)["shift"] == "0.0001"
    assert recipe.arguments({"epochs": 20.0}, OURS)["epochs"] == "20"


@pytest.mark.parametrize("value", ["good; touch /tmp/x", "$(id)", "`id`", "a b", "a\nb", "{data}", "--output", "-x", "/etc/passwd", "../x",
                                   "'", '"', "", "a" * 201, None, ["good"], {"a": 1}, "good\x00"])
def test_a_text_that_is_no_plain_word_is_refused(project: Path, value: object) -> None:
    with pytest.raises(Invalid, match="Parameter mood of recipe tiny must be a plain word"):
        read_recipe(project, "tiny").arguments({"mood": value}, OURS)


@pytest.mark.parametrize("value", ["1; ls", "nan", "inf", float("nan"), "", None, [1], "0x10", "1 2",
                                   10**400, "x" * 10**6])
def test_a_number_that_is_none_is_refused(project: Path, value: object) -> None:
    with pytest.raises(Invalid, match="Parameter epochs of recipe tiny must be a number") as told:
        read_recipe(project, "tiny").arguments({"epochs": value}, OURS)
    assert len(str(told.value)) < 300


def test_unknown_reserved_and_missing_parameters_are_refused(project: Path) -> None:
    recipe = read_recipe(project, "tiny")
    with pytest.raises(Invalid, match="has no parameter optimizer; it has base_weights, epochs, mood"):
        recipe.arguments({"optimizer": "sgd"}, OURS)
    with pytest.raises(Invalid, match="Parameter output of recipe tiny is given by the workbench"):
        recipe.arguments({"output": "elsewhere"}, OURS)
    with pytest.raises(Invalid, match="needs a value for output"):
        recipe.arguments({}, {"data": "/d"})
    with pytest.raises(Invalid, match="does not declare teacher"):
        recipe.arguments({}, {**OURS, "teacher": "x"})

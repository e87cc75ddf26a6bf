"""What README promises exists: its commands run, its files are there, its pages are pages."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
README = (PROJECT / "README.md").read_text()
FENCED = re.findall(r"```(?:sh|bash|console)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = sorted({line.removeprefix("$ ").split("  #")[0].strip() for block in FENCED for line in block.splitlines()
                   if line.removeprefix("$ ").startswith(("make", "workbench", "python bench/", ".venv/bin/"))}
                  | set(re.findall(r"`((?:make|workbench) [^`]+)`", README)))


def test_readme_names_its_two_commands_on_the_first_screen() -> None:
    first_screen = "\n".join(README.splitlines()[:40])
    assert "make demo" in first_screen and "make test" in first_screen


@pytest.mark.parametrize("command", [one for one in COMMANDS if one.startswith("make")])
def test_a_make_command_of_readme_is_a_target(command: str) -> None:
    words = [word for word in shlex.split(command)[1:]]
    assert subprocess.run(["make", "-n", *words], cwd=PROJECT, capture_output=True).returncode == 0


@pytest.mark.parametrize("command", [one for one in COMMANDS if "workbench " in one.split("make")[0]])
def test_a_workbench_command_of_readme_exists_with_its_options(command: str) -> None:
    words = shlex.split(command.removeprefix(".venv/bin/"))
    subcommands = [word for word in words[1:] if re.fullmatch(r"[a-z]+", word)][:2]
    for depth in (2, 1):
        shown = subprocess.run([sys.executable, "-m", "workbench.cli", *subcommands[:depth], "--help"], cwd=PROJECT,
                               capture_output=True, text=True)
        if shown.returncode == 0:
            break
    assert shown.returncode == 0, shown.stderr
    for option in [word.split("=")[0] for word in words if word.startswith("--")]:
        assert option in shown.stdout, f"{command}: {option} is not an option"


@pytest.mark.parametrize("script", sorted(set(re.findall(r"bench/\w+\.py", README))))
def test_a_figure_s_script_exists_and_explains_itself(script: str) -> None:
    shown = subprocess.run([sys.executable, script, "--help"], cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0 and "usage" in shown.stdout.lower()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_a_link_of_readme_leads_somewhere(target: str) -> None:
    assert (PROJECT / target).exists()


def test_every_page_is_named_in_readme() -> None:
    for page in (PROJECT / "pages").glob("*.py"):
        assert re.search(rf"\b{page.stem}\b", README), f"README does not name the page {page.stem}"

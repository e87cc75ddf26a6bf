"""docs/adopting.md keeps its word: its blocks are run or compared, its tables hold what the code has."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from parts_shapes import write_masks
from pydantic import ValidationError

from workbench.annotation import Annotation
from workbench.cli import cli
from workbench.config import Config
from workbench.dataset import Frame, LabeledFrame, Manifest
from workbench.evaluation.primary import PRIMARY
from workbench.formats.checkout import coco_document
from workbench.inference.families import FAMILIES
from workbench.model import InputSpec, ModelCard
from workbench.service.retrain import RetrainRequest
from workbench.steps.environments import LOCKS
from workbench.steps.limits import Limits
from workbench.steps.trained import MODEL_FILES, RESULTS
from workbench.taxonomy import Taxonomy
from workbench.wiring import Workbench

PROJECT = Path(__file__).resolve().parent.parent
TEXT = (PROJECT / "docs/adopting.md").read_text()
EXAMPLES = PROJECT / "examples"


def section(title: str) -> str:
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)[1]


def blocks(kind: str, text: str = TEXT) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


def cells(text: str) -> list[list[str]]:
    """The rows of all tables, split at the bars that are not within back quotes."""
    rows = [re.split(r"\|(?=(?:[^`]*`[^`]*`)*[^`]*$)", line.strip().strip("|")) for line in text.splitlines()
            if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows]


def words(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def test_the_diff_leads_from_a_script_that_trains_to_the_example(tmp_path: Path) -> None:
    (diff,) = blocks("diff")
    shutil.copy(EXAMPLES / "own_script/train.py", tmp_path)
    subprocess.run(["git", "apply", "-R", "-p0"], input=diff, cwd=tmp_path, text=True, check=True)
    before, after = ((folder / "train.py").read_text().splitlines() for folder in (tmp_path, EXAMPLES / "own_script"))
    assert len(after) - len(before) <= 12, "a dozen lines"
    data = write_masks(tmp_path / "data", {"train": 4})
    subprocess.run([sys.executable, tmp_path / "train.py", "--annotations", data / "train.json", "--frames",
                    data / "frames", "--epochs", "1"], cwd=tmp_path, check=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (tmp_path / "detector.pt").is_file()


def test_the_mlproject_is_the_example_s() -> None:
    assert blocks("yaml") == [(EXAMPLES / "own_script/MLproject").read_text()]


def test_every_example_is_listed_and_is_a_recipe_of_one_file_that_stands_alone() -> None:
    folders = sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir())
    assert sorted(re.findall(r"^\| \[(\w+)\]\(\.\./examples/\1\) \|", TEXT, re.MULTILINE)) == folders
    for folder in folders:
        main = yaml.safe_load((EXAMPLES / folder / "MLproject").read_text())["entry_points"]["main"]
        assert main["parameters"]["data"] == main["parameters"]["output"] == "string"
        assert (EXAMPLES / folder / "README.md").is_file()
        for node in ast.walk(ast.parse((EXAMPLES / folder / "train.py").read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [
                node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"workbench", "app", "pages", "models", "training"}


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", TEXT):
        file, _, anchor = target.partition("#")
        assert not file or (PROJECT / "docs" / file).exists(), target
        titles = {title.lower().replace(" ", "-") for title in re.findall(r"^## (.+)$", TEXT, re.MULTILINE)}
        assert not anchor or anchor in titles, target


def test_decoders_are_all_there_with_what_they_draw() -> None:
    rows = {words(name)[0]: draws for name, draws, _ in cells(section("Decoders"))[1:]}
    assert rows == {name: family.task for name, family in FAMILIES.items()}


def test_the_card_is_one_and_each_of_its_fields_is_explained() -> None:
    card = ModelCard.from_json(json.loads(blocks("json", section("The card"))[0]))
    explained = {word for row in cells(section("The card"))[1:] for word in words(row[0])}
    inputs = {f"input.{field.name}" for field in fields(InputSpec)} - {"input.size"} | {"input.width", "input.height"}
    written = set(card.to_json()) | {"sample", "quantization"}
    assert (written - {"input", "decoder"}) | inputs <= explained
    assert {word.split(".")[0] for word in explained} <= written


def test_the_folder_of_data_is_as_described() -> None:
    pixels = np.zeros((8, 8), np.uint8)
    mask = {"size": [8, 8], "counts": [8, 8, 48]}
    drawn = (Annotation("cell", xyxy=(1, 1, 4, 4), attributes={"dim": True}), Annotation("cell"),
             Annotation("cell", polygon=((1, 1), (5, 1), (5, 5))), Annotation("cell", mask=mask))
    frame = LabeledFrame(Frame("a.png", *pixels.shape, "0" * 32), drawn, "train")
    document = coco_document(Taxonomy(("cell",)), [frame], first_category=0)
    for name, told in cells(section("What goes in")):
        if words(name) and words(name)[0] in document:
            told = words(told)
            has = {key for one in document[words(name)[0]] for key in one} - {"supercategory"}
            assert has <= set(told), f"{name} has {has}, the page tells {told}"
    shown = {words(name)[0] for name, *_ in cells(section("What goes in")) if words(name)}
    assert {"categories", "images", "annotations", "dataset.json", "train.json"} <= shown
    assert document["images"][0]["tags"] == [0] and document["categories"][0]["id"] == 0


def test_outputs_metrics_limits_and_locks_are_all_named() -> None:
    out = words(section("What must come out"))
    assert {*RESULTS, *MODEL_FILES, *PRIMARY, "history.jsonl"} <= set(out)
    rows = [row for row in cells(section("Limits and environment"))[1:]]
    assert {words(row[0])[0] for row in rows} == {field.name for field in fields(Limits)}
    settings = {field.name for field in fields(Config)}
    assert {words(row[1])[0] for row in rows} <= settings
    assert set(LOCKS) <= set(words(section("Limits and environment")))


def test_commands_exist_with_their_options() -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("workbench ")]
    assert len(lines) >= 3
    for line in lines + [word for word in words(TEXT) if word.startswith("workbench ")]:
        command = cli
        for word in shlex.split(line)[1:]:
            if hasattr(command, "commands"):
                command = command.commands[word]
            elif word.startswith("--"):
                assert word in {name for option in command.params for name in option.opts}, line


def test_the_request_is_one_that_the_service_takes() -> None:
    body = json.loads(blocks("json", section("Start it"))[0])
    asked = RetrainRequest(**body)
    assert Limits(**asked.limits).wall_s == 3600
    with pytest.raises(ValidationError):
        RetrainRequest(**body | {"comit_hash": "0"})


def said() -> list[str]:
    """Every string of the workbench's code, with … where a value is filled in."""
    found = []
    for file in sorted((PROJECT / "workbench").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(one.value if isinstance(one, ast.Constant) else "…" for one in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_each_refusal_is_said_somewhere() -> None:
    sentences, rows = said(), cells(section("Refusals"))[1:]
    assert len(rows) > 10
    for row in rows:
        # A value of the page's may stand for several of the code's.
        pattern = re.compile(".*".join(re.escape(part.strip()) for part in words(row[0])[0].split("…")), re.DOTALL)
        assert any(pattern.search(sentence) for sentence in sentences), f"nothing says {row[0]}"
        assert row[1], "a refusal without a remedy"


def test_what_is_tried_by_hand_works_as_written(tmp_path: Path) -> None:
    """The blocks of that section, one after the other, on a version that is really there."""
    home = tmp_path / "home"
    workbench = Workbench(Config(home=home))
    frames = []
    for number in range(8):
        pixels = np.full((60, 90, 3), (40, 40, 200 - 130 * (number % 2)), np.uint8)
        made = workbench.blobs.put(cv2.imencode(".png", pixels)[1].tobytes())
        frame = Frame(f"line 1/{number}.png", 90, 60, made.md5, sha256=made.sha256, size_bytes=made.size_bytes)
        tag = Annotation(("bright", "dark")[number % 2], source="human:ann")
        frames.append(LabeledFrame(frame, (tag,), "val" if number > 5 else "train", "ann"))
    manifest = Manifest(Taxonomy(("bright", "dark")), tuple(frames))
    ref = workbench.datasets.publish("cells", manifest, "test", "ann <ann@example.org>").ref

    (tmp_path / "bin").mkdir()
    for name, command in (("python", ""), ("workbench", " -m workbench.cli")):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{command} "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    shutil.copy(EXAMPLES / "scikit_learn/train.py", tmp_path)
    environment = {**os.environ, "WORKBENCH_HOME": str(home), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
                   "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    ran = re.findall(r"```(python|sh)\n(.*?)```", section("Try it by hand"), re.DOTALL)
    assert [kind for kind, _ in ran] == ["sh", "sh", "python", "sh"]
    for kind, text in ran:
        command = ["python", "-c"] if kind == "python" else ["sh", "-ec"]
        done = subprocess.run([*command, text.replace("cells@1.0.0", ref)], cwd=tmp_path, env=environment,
                              capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, f"{text}\n{done.stderr}"
    assert "by-hand@1 is registered" in done.stdout
    assert Workbench(Config(home=home)).models.refs() == ["by-hand@1"]

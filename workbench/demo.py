"""The whole loop, once, with nobody at the screen: what `make demo` runs.

A part of a labelled data set starts as version 0.1.0, the rest arrives unlabelled. The first student annotates the
rest, the truth stands in for the reviewer, and the boxes a person would have had to touch are counted.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.config import Config
from workbench.dataset import assign_splits, check_dataset_name
from workbench.errors import Invalid, WorkbenchError
from workbench.supervise import Supervisor
from workbench.wiring import Workbench

START_FRAMES = 60  # what a person labels by hand before the first training
VAL_SHARE = 0.25  # of the start: enough boxes to choose a confidence threshold by
RECIPE = "efficientnet_lite0_fcos"
TRAINING_S = {"quickstart": (150, 170), "own": (600, 1500)}  # first and second training
# On cells 512 px find the platelets that 384 px miss, and frozen first stages cost nothing (the recipe's README).
PARAMS: dict[str, dict[str, str]] = {"quickstart": {}, "own": {"long_side": "512", "freeze": "2"}}
STEP_TIMEOUT_S = 3 * 3600
TABLE = "table.json"  # in the demo's folder once it has ended


@dataclass(frozen=True)
class Staged:
    """Two folders to upload and the truth of the second: start/ labelled with a test split, rest/ pictures only."""

    start: Path
    rest: Path
    truth: Path
    start_frames: int
    rest_frames: int


def run(config: Config, data: Path | None = None, serve: bool = True, as_json: bool = False, dataset: str | None = None,
        start_frames: int = START_FRAMES, training_s: tuple[int, int] | None = None,
        params: dict[str, str] | None = None, seed: int = 0, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs the loop, prints the table and, unless told not to, serves until Ctrl-C.

    data        a labelled COCO, YOLO or VOC folder; None makes the quick-start data set
    training_s  the time budgets of the first and the second training in seconds
    params      further parameters of the recipe
    Returns the table: the keys the README names, and "steps".
    Raises WorkbenchError with the step's sentence when one fails.
    """
    began = time.monotonic()
    kind = "quickstart" if data is None else "own"
    budgets, params = training_s or TRAINING_S[kind], {**PARAMS[kind], **(params or {})}
    request = {"data": None if data is None else str(Path(data).resolve()), "start_frames": start_frames,
               "training_s": list(budgets), "params": params, "seed": seed}
    workbench = Workbench(config)
    folder = _folder(workbench, check_dataset_name(dataset or ("digits" if data is None else _name_of(data))), request)
    loop = Loop(workbench, folder.name, params)
    parts = {} if serve else {"parts": ("mongod", "mlflow", "worker")}
    say(f"The loop on {'real handwritten digits on real photographs' if data is None else data}, in {config.home}")
    with Supervisor(config, on_line=lambda line: None, **parts) as supervisor:
        supervisor.wait_ready(("mongod", "mlflow", "worker"))
        staged = _stage(folder, data, start_frames, seed)
        table = loop.turn(staged, budgets)
        table["seconds"] = round(time.monotonic() - began, 1)
        (folder / TABLE).write_text(json.dumps(table))
        _print_table(table, say)
        if serve:
            supervisor.wait_ready()
            say(f"\nThe workbench is open at {config.ui}  (Ctrl-C ends it)")
        if as_json:
            say(json.dumps(table))
            sys.stdout.flush()
        if serve:
            supervisor.run()
    return table


class Loop:
    """One turn of the loop as jobs, the way the pages submit them."""

    def __init__(self, workbench: Workbench, dataset: str, params: dict[str, str]) -> None:
        self._workbench, self._dataset, self._params = workbench, dataset, params
        self._rows: list[dict[str, Any]] = []

    def turn(self, staged: Staged, training_s: tuple[int, int]) -> dict[str, Any]:
        name = self._dataset
        first = self._do("upload", "labelled start", {"source": str(staged.start)})["version"]
        student = self._train(first, training_s[0], None)
        before = self._promote(student, first)
        self._do("upload", "new frames", {"source": str(staged.rest), "split": "train"})
        annotated = self._do("annotate", student, {"model": student})
        effort = self._do("correct", "the truth reviews", {"truth": str(staged.truth)})
        second = self._do("version", "reviewed labels", {"message": "Labels reviewed after the first student"})["version"]
        better = self._train(second, training_s[1], student)
        after = self._promote(better, second)
        champion = better if after["promoted"] else student
        return {
            "dataset": name, "champion": champion,
            "map_before": before["challenger"]["map_50_95"], "map50_before": before["challenger"]["map_50"],
            "map_after": after["challenger"]["map_50_95"], "map50_after": after["challenger"]["map_50"],
            "promoted": after["promoted"],
            "boxes_total": effort["boxes_total"], "boxes_touched": effort["touched"],
            "frames": staged.start_frames + staged.rest_frames, "boxes_proposed": annotated["boxes"],
            "steps": self._rows,
        }

    def _train(self, version: str, seconds: int, base_model: str | None) -> str:
        params = {"time_limit_s": seconds, "epochs": 300, "seed": 0, "threads": self._workbench.config.worker_threads,
                  **self._params}
        trained = self._do("retrain", version, {"version": version, "recipe": RECIPE, "params": params,
                                                "base_model": base_model})
        return trained["model"]

    def _promote(self, candidate: str, version: str) -> dict[str, Any]:
        decision = self._do("promote", candidate, {"candidate": candidate, "version": version})
        if decision["promoted"]:
            self._do("deploy", candidate, {"model": candidate})
        return decision

    def _do(self, kind: str, what: str, args: dict[str, Any]) -> dict[str, Any]:
        jobs, began = self._workbench.jobs, time.monotonic()
        # The same demo started again goes on where it was: a job that ended well is not done again, a failed one is.
        for attempt in itertools.count():
            key = f"demo:{self._dataset}:{len(self._rows)}:{kind}:{attempt}"
            job_id = jobs.submit(kind, {"dataset": self._dataset, **args}, person="demo", key=key)
            if jobs.get(job_id).state not in ("failed", "cancelled"):
                break
        bar = _Bar(f"{kind} {what}")
        while (status := jobs.get(job_id)).state in ("queued", "running"):
            bar.show(status.done, status.total, status.note)
            if time.monotonic() - began > STEP_TIMEOUT_S:
                raise WorkbenchError(f"{kind} {what} did not end within {STEP_TIMEOUT_S} s; see its log on the jobs page.")
            time.sleep(0.3)
        seconds = round(time.monotonic() - began, 1)
        if status.state != "done":
            bar.end("failed")
            raise WorkbenchError(f"The demo's step {kind} ({what}) {status.state}: {status.error}")
        row = {"step": kind, "what": what, "seconds": seconds, **_numbers(status.result or {})}
        bar.end(_told(row))
        self._rows.append(row)
        return status.result or {}


def _numbers(result: dict[str, Any]) -> dict[str, Any]:
    """The few figures of a step's result that stand in the table."""
    known = ("frames", "added", "boxes", "boxes_total", "touched", "version", "model", "map_50_95", "map_50", "promoted")
    row = {key: result[key] for key in known if isinstance(result.get(key), (int, float, str, bool))}
    if isinstance(result.get("challenger"), dict):
        row |= {key: result["challenger"][key] for key in ("map_50_95", "map_50") if key in result["challenger"]}
    return row


def _told(row: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}"
                     for key, value in row.items() if key not in ("step", "what", "seconds"))


class _Bar:
    """A progress bar on a terminal; elsewhere only its last line, so that a log stays readable."""

    def __init__(self, title: str) -> None:
        self._title, self._is_terminal, self._began = title, sys.stderr.isatty(), time.monotonic()

    def show(self, done: int, total: int, note: str) -> None:
        if self._is_terminal:
            width = 24
            full = round(width * done / total) if total else 0
            text = f"{self._title:32.32} [{'#' * full}{'.' * (width - full)}] {done}/{total or '?'} {note}"
            columns = shutil.get_terminal_size().columns - 1
            sys.stderr.write("\r" + text[:columns].ljust(columns))
            sys.stderr.flush()

    def end(self, told: str) -> None:
        if self._is_terminal:
            sys.stderr.write("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r")
        print(f"  {self._title:32.32} {time.monotonic() - self._began:7.1f} s  {told}", file=sys.stderr, flush=True)


def _print_table(table: dict[str, Any], say: Callable[[str], None]) -> None:
    say(f"\n{'step':10} {'what':22} {'frames':>7} {'boxes':>7} {'mAP':>6} {'mAP50':>6} {'seconds':>8}")
    for row in table["steps"]:
        frames = row.get("frames", row.get("added", ""))
        boxes = row.get("boxes", row.get("boxes_total", ""))
        score, score50 = (f"{row[key]:.3f}" if key in row else "" for key in ("map_50_95", "map_50"))
        said = {True: "champion", False: "not promoted"}.get(row.get("promoted"), "")
        say(f"{row['step']:10} {row['what']:22.22} {frames!s:>7} {boxes!s:>7} {score:>6} {score50:>6} {row['seconds']:8.1f}  {said}")
    touched, total = table["boxes_touched"], table["boxes_total"]
    say(f"\nmAP@[.5:.95] {table['map_before']:.3f} -> {table['map_after']:.3f}, mAP50 {table['map50_before']:.3f} -> "
        f"{table['map50_after']:.3f} on the untouched test list; champion: {table['champion']}")
    say(f"A person would have touched {touched} boxes instead of drawing {total} ({touched / max(total, 1):.0%}). "
        f"{table['seconds']:.0f} s in all.")


def _name_of(data: Path) -> str:
    name = "".join(letter if letter.isalnum() else "-" for letter in data.resolve().name.lower()).strip("-")
    return name[:54] or "frames"  # its models are called <name>-detector, of at most 63 letters


def _folder(workbench: Workbench, name: str, request: dict[str, Any]) -> Path:
    """Where this demo keeps its files: that of the same demo, if it was broken off, else a new one. It is named as the
    data set, which is a new one too: what people have under a name stays theirs."""
    for number in itertools.count(1):
        folder = workbench.config.home / "demo" / (name if number == 1 else f"{name}-{number}")
        file = folder / "request.json"
        if file.exists() and not (folder / TABLE).exists() and json.loads(file.read_text()) == request:
            return folder
        if not folder.exists() and folder.name not in workbench.datasets.names():
            folder.mkdir(parents=True)
            file.write_text(json.dumps(request))
            return folder
    raise AssertionError("unreachable")


def _stage(folder: Path, data: Path | None, start_frames: int, seed: int) -> Staged:
    """Splits a labelled data set into what is labelled at the start, what comes unlabelled, and the latter's truth."""
    from workbench import quickstart
    from workbench.formats import read_labeled_folder, write_coco_folder

    if data is None:
        data = folder / "quickstart"
        quickstart.generate(data, seed=seed)
    taxonomy, frames = read_labeled_folder(Path(data))
    frames = assign_splits(one for one in frames if one.annotations is not None)
    order = sorted(frames, key=lambda one: hashlib.sha256(f"{seed} {one.frame.blob}".encode()).digest())
    test, pool = [one for one in order if one.split == "test"], [one for one in order if one.split != "test"]
    if not test or len(pool) <= start_frames:
        raise Invalid(f"{data} has {len(test)} labelled test pictures and {len(pool)} others; the demo needs a test list and "
                      f"more than {start_frames} others. Give it a larger labelled COCO, YOLO or VOC folder.")
    start, rest = pool[:start_frames], pool[start_frames:]
    val = int(start_frames * VAL_SHARE)
    staged = Staged(folder / "start", folder / "rest", folder / "truth", len(start) + len(test), len(rest))
    write_coco_folder(staged.start, taxonomy, {"val": start[:val], "train": start[val:], "test": test}, Path(data))
    write_coco_folder(staged.truth, taxonomy, {"train": rest}, Path(data))
    shutil.rmtree(staged.rest, ignore_errors=True)
    shutil.copytree(staged.truth / "images" / "train", staged.rest)
    return staged

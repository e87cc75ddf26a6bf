"""Kills the worker with SIGKILL at random moments of the annotate and version steps and compares with an undisturbed run.

Real parts: worker processes, mongod with FiftyOne's documents, git repositories, SQLite. The same frames are annotated and
published twice under the same job keys, once by a worker that is left alone, once by workers that are killed and started
again. Working copies, versions, ledgers and repositories must be the same to the last digit.

Prints one JSON line, last: kills; identical (are all rounds the same); lost and doubled (boxes, runs, ledger entries, jobs
and commits that are missing or there twice); by_moment (what the killed worker was doing).
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from socket import socket
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from workbench import quickstart
from workbench.config import Config
from workbench.inference.graph import file_record
from workbench.model import InputSpec, ModelCard
from workbench.ports import Quiet
from workbench.steps.upload import upload
from workbench.supervise import Supervisor, parts
from workbench.taxonomy import Taxonomy
from workbench.wiring import Workbench

ROUND_S = 300     # a round that takes longer than this is stuck
A_STEP = 4        # kills a step and round, so that both steps get their share
BEYOND = 1.2      # kills fall between the start of a step and this many times what it takes undisturbed
STARTING = 0.1   # share of kills that fall into the start of the worker, before it has a job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--frames", type=int, default=60, help="frames a round")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="workbench-kill-") as folder:
        figures = run(Path(folder), options.kills, options.frames, options.seed)
    print(json.dumps(figures))
    sys.exit(0 if figures["identical"] and not figures["lost"] and not figures["doubled"] else 1)


def run(folder: Path, kills: int, frames: int, seed: int) -> dict[str, Any]:
    began, chance = time.monotonic(), random.Random(seed)
    base = Config(home=folder / "mongo", mongo_port=free_port(), threads=1)
    pictures = quickstart.generate(folder / "pictures", seed=seed, train=frames + 1, val=0, test=1, unlabeled=frames,
                                   size=(192, 144))
    with Supervisor(base, parts=("mongod",), on_line=say) as supervisor, ExitStack() as stack:
        supervisor.wait_ready()
        left_alone = Workbench(replace(base, home=folder / "left-alone", mongo_url=base.mongo))
        disturbed = Workbench(replace(base, home=folder / "disturbed", mongo_url=base.mongo))
        for workbench in (left_alone, disturbed):
            _add_detector(workbench, folder / "model")
        moments: Counter[str] = Counter()
        takes: dict[str, float] = {}
        lost = doubled = rounds = 0
        identical = True
        calm = stack.enter_context(worker(left_alone))
        while moments.total() < kills:
            dataset = f"round{rounds}"
            _upload(left_alone, dataset, pictures)
            for kind, seconds in _finish(left_alone, _submit(left_alone, dataset)).items():
                # The first round's worker is as cold as those that are killed.
                takes[kind] = max(seconds, takes.get(kind, 0.0))
            expected = _state(left_alone, dataset)
            # Idle, it would still take time from the workers that are killed.
            calm.send_signal(signal.SIGSTOP)
            # Both write to one database, under one name: the same job ids, so the same ids of boxes.
            left_alone.server.delete_task(dataset)
            _upload(disturbed, dataset, pictures)
            ids = _submit(disturbed, dataset)
            _disturb(disturbed, ids, kills - moments.total(), moments, chance, takes)
            with worker(disturbed):
                _finish(disturbed, ids)
            calm.send_signal(signal.SIGCONT)
            found = _state(disturbed, dataset)
            disturbed.server.delete_task(dataset)
            missing, extra = expected["counted"] - found["counted"], found["counted"] - expected["counted"]
            lost, doubled, rounds = lost + missing.total(), doubled + extra.total(), rounds + 1
            identical = identical and found == expected
            say(f"round {rounds} ({', '.join(f'{kind} {seconds:.1f} s' for kind, seconds in takes.items())} undisturbed): "
                 f"{moments.total()} kills, {'identical' if found == expected else 'DIFFERENT'}, "
                 f"{time.monotonic() - began:.0f} s")
            for name in expected:
                if found[name] != expected[name] and name != "counted":
                    say(f"  {name}: expected {str(expected[name])[:500]}, found {str(found[name])[:500]}")
        boxes = sum(1 for what in expected["counted"].elements() if what.startswith("box "))
    return {"kills": moments.total(), "identical": identical, "lost": lost, "doubled": doubled, "rounds": rounds,
            "boxes_a_round": boxes, "by_moment": dict(sorted(moments.items())), "seconds": round(time.monotonic() - began, 1)}


def _submit(workbench: Workbench, dataset: str) -> list[str]:
    jobs = workbench.jobs
    return [jobs.submit("annotate", {"dataset": dataset, "model": "cells@1", "batch": 4}, person="bench", key=dataset),
            jobs.submit("version", {"dataset": dataset, "include": "annotated", "message": "drawn by the machine"},
                        person="bench", key=dataset)]


def _disturb(workbench: Workbench, ids: list[str], most: int, moments: Counter[str], chance: random.Random,
             takes: dict[str, float]) -> None:
    """Starts workers and kills each at a random moment of a step, one step after the other, at most `most` of them.
    takes: kind -> seconds it takes undisturbed."""
    for target in [job_id for job_id in ids for _ in range(A_STEP)][:most]:
        status = workbench.jobs.get(target)
        if status.is_over:
            continue
        with worker(workbench, kill=True) as process:
            if chance.random() < STARTING:
                time.sleep(chance.random() * 2)
            else:
                _wait_for(workbench, target, process)
                time.sleep(chance.random() * BEYOND * takes[status.kind])
            doing = _doing(workbench, ids, process.pid)
            process.send_signal(signal.SIGKILL)
            process.wait()
        moments[doing or "between jobs"] += 1


def _wait_for(workbench: Workbench, job_id: str, process: subprocess.Popen[bytes]) -> None:
    """Until that worker is at the job, or the job is over."""
    until = time.monotonic() + ROUND_S
    while not _doing(workbench, [job_id], process.pid) and not workbench.jobs.get(job_id).is_over:
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"The worker took no job; its log is {workbench.config.home / 'worker.log'}")
        time.sleep(0.03)


def _doing(workbench: Workbench, ids: list[str], pid: int) -> str:
    mine = [worker.id for worker in workbench.jobs.workers() if worker.pid == pid]
    running = [status.kind for status in map(workbench.jobs.get, ids) if status.state == "running" and status.worker in mine]
    return running[0] if running else ""


def _finish(workbench: Workbench, ids: list[str]) -> dict[str, float]:
    """Waits for all of them; returns the seconds that each kind took."""
    takes = {}
    for job_id in ids:
        status = workbench.jobs.wait(job_id, ROUND_S)
        if status.state != "done":
            raise RuntimeError(f"{status.kind} {status.state}: {status.error} {workbench.jobs.log_lines(job_id)[-3:]}")
        takes[status.kind] = (datetime.fromisoformat(status.finished_at)
                              - datetime.fromisoformat(status.started_at)).total_seconds()
    return takes


@contextmanager
def worker(workbench: Workbench, kill: bool = False) -> Iterator[subprocess.Popen[bytes]]:
    config = workbench.config
    with (config.home / "worker.log").open("ab") as log:
        process = subprocess.Popen(parts.part("worker").argv(config), env=parts.environment(config), cwd=config.home,
                                   stdout=log, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        process.wait(60)


def _upload(workbench: Workbench, dataset: str, pictures: Path) -> None:
    upload(dataset, pictures, store=workbench.datasets, server=workbench.server, blobs=workbench.blobs, job=Quiet(),
           person="bench")


def _state(workbench: Workbench, dataset: str) -> dict[str, Any]:
    """All that must be the same; `counted` holds each single thing as often as it is there."""
    server, store = workbench.server, workbench.datasets
    working = server.read(dataset, server.frame_names(dataset))
    counted: Counter[str] = Counter()
    for name, one in working.items():
        counted.update(f"box {name} {annotation.id}" for annotation in one.annotations or ())
        counted.update(f"run {name} {run.run_id}" for run in one.runs)
    versions = store.versions(dataset)
    for one in versions:
        counted.update(f"published {one.ref} {labeled.frame.name} {annotation.id}"
                       for labeled in store.manifest(one.ref).frames for annotation in labeled.annotations or ())
    repository = store.checkout_url(dataset)
    commits = subprocess.run(["git", "-C", repository, "rev-list", "--all", "--count"], capture_output=True, text=True, check=True)
    tags = subprocess.run(["git", "-C", repository, "tag"], capture_output=True, text=True, check=True)
    subprocess.run(["git", "-C", repository, "fsck", "--strict"], capture_output=True, check=True)
    counted["commit"] = int(commits.stdout)
    counted.update(f"tag {tag}" for tag in tags.stdout.split())
    ledger = workbench.records.entries("machine_runs", dataset)
    counted.update(f"ledger {entry.subject} {sorted(entry.facts)}" for entry in ledger)
    jobs = [status for status in workbench.jobs.list(1000) if status.args["dataset"] == dataset]
    counted.update(f"job {status.id} {status.state}" for status in jobs)
    return {
        "counted": counted,
        "working": {name: [[a.to_json() for a in one.annotations or ()], [run.to_json() for run in one.runs], one.status,
                           one.split, one.annotations is None] for name, one in sorted(working.items())},
        "versions": [(one.ref, one.digest, one.frames, one.labeled, one.boxes) for one in versions],
        "results": {status.kind: {key: value for key, value in (status.result or {}).items()
                                  if key in ("frames", "boxes", "by_label", "failed", "version", "labeled", "digest")}
                    for status in jobs},
        "failed": {status.kind: workbench.jobs.failed_items(status.id) for status in jobs},
    }


def _add_detector(workbench: Workbench, folder: Path) -> None:
    """Registers cells@1: a graph of one convolution over 4 x 4 cells; its boxes depend on the pixels, nothing else."""
    folder.mkdir(exist_ok=True)
    chance, labels, side, cell = np.random.default_rng(0), quickstart.LABELS, 64, 16
    cells = (side // cell) ** 2
    mix = chance.normal(0, 0.05, (len(labels), 3, 1, 1))
    # Colours count, brightness does not: a grey cell scores 0.5 for every label.
    constants = {"mix": (mix - mix.mean(axis=1, keepdims=True)).astype(np.float32),
                 "flat": np.array([0, len(labels), cells], np.int64), "zero": np.float32(0),
                 "sides": np.full((1, 1, 4), 0.75, np.float32), "sure": np.full((1, 1, 1), 20, np.float32)}
    nodes = [helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT),
             helper.make_node("Transpose", ["x"], ["chw"], perm=[0, 3, 1, 2]),
             helper.make_node("AveragePool", ["chw"], ["pooled"], kernel_shape=[cell, cell], strides=[cell, cell]),
             helper.make_node("Conv", ["pooled", "mix"], ["maps"]),
             helper.make_node("Reshape", ["maps", "flat"], ["flattened"]),
             helper.make_node("Transpose", ["flattened"], ["cls_logits"], perm=[0, 2, 1]),
             helper.make_node("ReduceMax", ["cls_logits"], ["largest"], axes=[2], keepdims=1),
             helper.make_node("Mul", ["largest", "zero"], ["nought"]),
             helper.make_node("Add", ["nought", "sides"], ["bbox_regression"]),
             helper.make_node("Add", ["nought", "sure"], ["bbox_ctrness"])]
    graph = helper.make_graph(
        nodes, "cells", [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", side, side, 3])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
         for name in ("cls_logits", "bbox_regression", "bbox_ctrness")],
        [numpy_helper.from_array(value, name) for name, value in constants.items()])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(folder / "model.onnx"))
    card = ModelCard("cells", "1", InputSpec(size=(side, side)), {"name": "fcos", "strides": [cell], "confidence": 0.75, "iou": 0.5},
                     Taxonomy(labels), {"model.onnx": file_record(folder / "model.onnx")}, licence="Apache-2.0")
    workbench.models.register(card, folder)


def free_port() -> int:
    with socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

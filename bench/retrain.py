"""What retraining costs beside the training itself, how fast it is asked for, and what kills leave behind.

The recipe is tests/doubles/recipes/small, which learns in NumPy, goes on from its checkpoint and sleeps between epochs
to take as long as it is told to; MLflow, the HTTP service and the workers are real processes. Three parts:

overhead  job to registered model, minus the same train.py by hand with the same arguments, in turns, medians: as a
          share of ten minutes, or of --minutes, which is then how long each training really takes
post      requests to POST /retrain, 50 at a time over connections of their own: 100 times the same one, then 100
          different ones; how many runs the same one becomes
kills     a training whose worker, and every third time whose own processes, are killed with SIGKILL at random moments,
          against one that was left alone; while_training: how many of them while a training ran

Prints one JSON line, last: overhead; overhead_s; worker_cpu (its share of a core while a training runs); post_ms_p50,
post_ms_p95; runs_of_100_posts; kills; identical (the same metrics and the same model to the last digit, one MLflow run
and one registered version each); orphans (processes of trainings that were left).
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from kill import free_port, say, worker

from workbench.config import Config
from workbench.formats.checkout import write_checkout
from workbench.jobs import JobStatus
from workbench.steps.keeper import MARK
from workbench.steps.training import stop_trainings
from workbench.supervise import Supervisor
from workbench.wiring import Workbench

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]
import parts_training  # noqa: E402

TEN_MINUTES_S = 600
EPOCHS = 10
WAIT_S = 300       # a job that takes this much longer than its training is stuck
START_S = 10       # MLflow goes on starting after it answers, with both cores
MOST_A_JOB = 4     # kills, then it may end
PARTS = ("overhead", "post", "kills")


@dataclass(frozen=True)
class Bench:
    """A workbench with one version of a small data set, and a git repository with the recipe."""

    workbench: Workbench
    version: str
    repository: Path
    commit: str

    def args(self, experiment: str, seconds: float) -> dict[str, Any]:
        """Arguments of a retrain job; its model is named as its experiment."""
        return {"version": self.version, "repository": str(self.repository), "commit": self.commit, "location": ".",
                "experiment": experiment, "register_as": experiment, "params": self.params(seconds)}

    def params(self, seconds: float) -> dict[str, float]:
        return {"epochs": EPOCHS, "pause_s": round(seconds / EPOCHS, 3), "threads": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append", help="may be given several times; all otherwise")
    parser.add_argument("--minutes", type=float, help="how long a training of `overhead` takes; 5 s otherwise")
    parser.add_argument("--rounds", type=int, default=3, help="trainings by job and by hand each")
    parser.add_argument("--posts", type=int, default=100)
    parser.add_argument("--at-once", type=int, default=50)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all that was started ends
    chosen = options.only or PARTS
    folder = Path(tempfile.mkdtemp(prefix="workbench-retrain-"))
    figures: dict[str, Any] = {}
    try:
        config = Config(home=folder / "home", mlflow_port=free_port(), service_port=free_port(), threads=1,
                        retrain_repositories=str(folder / "recipe"), retrain_queue=10 * options.posts)
        needed = ("mlflow", "service") if "post" in chosen else ("mlflow",)
        with Supervisor(config, parts=needed, on_line=say) as supervisor:
            supervisor.wait_ready()
            bench = set_up(folder, Workbench(config))
            if "overhead" in chosen:
                figures |= overhead(bench, folder, options.rounds, 60 * options.minutes if options.minutes else None)
            if "post" in chosen:
                figures |= post(bench, options.posts, options.at_once)
            if "kills" in chosen:
                figures |= kills(bench, options.kills, random.Random(options.seed))
            figures["orphans"] = figures.get("orphans", 0) + len(orphans(folder))
    finally:
        stop_trainings(folder / "home")
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(figures))
    sys.exit(0 if figures.get("identical", True) and not figures["orphans"]
             and figures.get("runs_of_100_posts", 1) == 1 else 1)


def set_up(folder: Path, workbench: Workbench) -> Bench:
    data = parts_training.Bench(folder, workbench.config.mlflow, "cells")
    data.parts |= {"store": workbench.datasets, "blobs": workbench.blobs}
    version = data.publish()
    repository = folder / "recipe"
    shutil.copytree(parts_training.RECIPES / "small", repository)
    subprocess.run(["git", "-C", repository, "init", "-q", "-b", "main"], check=True)
    return Bench(workbench, version, repository, parts_training.commit(repository))


def overhead(bench: Bench, folder: Path, rounds: int, whole_s: float | None) -> dict[str, Any]:
    seconds, workbench = whole_s or 5.0, bench.workbench
    data = folder / "by-hand"
    write_checkout(workbench.datasets.manifest(bench.version), workbench.blobs, data, bench.version)
    by_hand, by_job, cpu = [], [], []
    with worker(workbench) as process:
        _until(lambda: workbench.jobs.workers(), "a worker")
        _run(bench, "warm", 0.5)  # fetches the repository, imports what the worker needs
        for number in range(rounds):
            output = folder / f"output{number}"
            output.mkdir()
            arguments = {"data": data, "output": output, "name": "by-hand", "learning_rate": 0.1, "batch_size": 64,
                         "schedule": "cosine", "frozen": 0, "seed": 0, "mood": "good", **bench.params(seconds)}
            began = time.monotonic()
            subprocess.run([sys.executable, "train.py", *(text for name, value in arguments.items()
                                                          for text in (f"--{name}", str(value)))],
                           cwd=bench.repository, check=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
            by_hand.append(time.monotonic() - began)
            before, began = sum(psutil.Process(process.pid).cpu_times()[:2]), time.monotonic()
            _run(bench, f"overhead{number}", seconds)
            by_job.append(time.monotonic() - began)
            cpu.append((sum(psutil.Process(process.pid).cpu_times()[:2]) - before) / by_job[-1])
            say(f"by hand {by_hand[-1]:.2f} s, as a job {by_job[-1]:.2f} s")
    more = statistics.median(by_job) - statistics.median(by_hand)
    return {"overhead": round(more / (whole_s or TEN_MINUTES_S), 4), "overhead_s": round(more, 2),
            "by_hand_s": [round(one, 2) for one in by_hand], "by_job_s": [round(one, 2) for one in by_job],
            "worker_cpu": round(statistics.median(cpu), 3)}


def post(bench: Bench, count: int, at_once: int) -> dict[str, Any]:
    workbench = bench.workbench
    body = {"experiment_name": "posted", "git_uri": str(bench.repository), "MLproject_location": ".",
            "commit_hash": bench.commit, "dataset_repo": "cells", "model_name": "posted",
            "parameters": bench.params(0.5)}
    time.sleep(START_S)
    _send(workbench.config.service_port, [(body | {"experiment_name": "first"}, "first")], 1)
    same, ids = _send(workbench.config.service_port, [(body, "the same")] * count, at_once)
    other, others = _send(workbench.config.service_port, [
        (body | {"experiment_name": f"other {number}"}, f"other {number}") for number in range(count)], at_once)
    if len(set(others)) != count:
        raise RuntimeError(f"{count} different requests became {len(set(others))} jobs.")
    for status in workbench.jobs.list(10 * count, state="queued"):
        if status.id not in ids:
            workbench.jobs.cancel(status.id)
    with worker(workbench):
        for job_id in sorted(set(ids)):
            _done(workbench.jobs.wait(job_id, WAIT_S))
    runs = len(workbench.tracker.runs("posted"))
    took = sorted(same + other)
    return {"post_ms_p50": round(took[len(took) // 2], 1), "post_ms_p95": round(took[int(0.95 * (len(took) - 1))], 1),
            "post_ms_p95_same": round(sorted(same)[int(0.95 * (count - 1))], 1),
            "post_ms_p95_different": round(sorted(other)[int(0.95 * (count - 1))], 1), "runs_of_100_posts": runs}


def _send(port: int, requests: list[tuple[dict[str, Any], str]], at_once: int) -> tuple[list[float], list[str]]:
    """Milliseconds of each and the ids of their jobs; `at_once` are always under way."""
    left, took, ids, failed = list(reversed(requests)), [], [], []
    ready = threading.Barrier(min(at_once, len(requests)))

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
        connection.connect()
        ready.wait()
        while True:
            try:
                body, key = left.pop()
            except IndexError:
                return
            data, began = json.dumps(body), time.perf_counter()
            connection.request("POST", "/retrain", data, {"Content-Type": "application/json", "Idempotency-Key": key})
            answer = connection.getresponse()
            text = answer.read()
            took.append(1000 * (time.perf_counter() - began))
            if answer.status == 202:
                ids.append(json.loads(text)["job_id"])
            else:
                failed.append(f"{answer.status} {text[:300]!r}")

    clients = [threading.Thread(target=client, daemon=True) for _ in range(ready.parties)]
    for one in clients:
        one.start()
    for one in clients:
        one.join(WAIT_S)
    if failed or len(ids) != len(requests):
        raise RuntimeError(f"{len(ids)} of {len(requests)} requests were answered with 202; {failed[:3]}")
    return took, ids


def kills(bench: Bench, count: int, chance: random.Random) -> dict[str, Any]:
    workbench, seconds = bench.workbench, 4.0
    began = time.monotonic()
    with worker(workbench):
        # As cold as those that are killed.
        expected = _outcome(bench, _run(bench, "left-alone", seconds))
        takes = time.monotonic() - began
    say(f"left alone it takes {takes:.1f} s with the start of the worker")
    done, jobs, identical, left, hit, trainings = 0, 0, True, 0, 0, 0
    while done < count:
        name, jobs = f"disturbed{jobs}", jobs + 1
        job_id = workbench.jobs.submit("retrain", bench.args(name, seconds), person="bench")
        for _ in range(min(MOST_A_JOB, count - done)):
            with worker(workbench, kill=True) as process:
                began, found = time.monotonic(), []
                until = began + chance.uniform(0.1, 0.9) * takes
                if done % 2:
                    # By chance a worker mostly dies while it starts: half of them die while the training runs, or is
                    # scored and registered.
                    _until(lambda: workbench.jobs.get(job_id).is_over or orphans(workbench.config.home), "training")
                    until = time.monotonic() + chance.uniform(0, 1.3) * seconds
                while time.monotonic() < until and not workbench.jobs.get(job_id).is_over:
                    time.sleep(0.02)
                status, found = workbench.jobs.get(job_id), orphans(workbench.config.home)
                if status.is_over:
                    # The machine is quieter than when it was left alone.
                    takes = min(takes, time.monotonic() - began)
                    break
                process.send_signal(signal.SIGKILL)
                process.wait()
                done, hit = done + 1, hit + bool(found)
                if done % 3 == 1:
                    trainings += bool([one.send_signal(signal.SIGKILL) for one in orphans(workbench.config.home)])
            say(f"kill {done}: {status.state}, {'its training runs' if found else 'no training runs'}, "
                f"epoch {status.done} of {status.total}")
        with worker(workbench):
            found = _outcome(bench, _done(workbench.jobs.wait(job_id, WAIT_S)))
        left += len(orphans(workbench.config.home))
        identical = identical and found == expected
        say(f"job {jobs}: {'identical' if found == expected else f'DIFFERENT: {found}'}")
    return {"kills": done, "while_training": hit, "killed_trainings": trainings, "disturbed_jobs": jobs, "identical": identical,
            "orphans": left}


def _outcome(bench: Bench, status: JobStatus) -> dict[str, Any]:
    """All that must be the same however often it was killed."""
    workbench, experiment = bench.workbench, status.args["experiment"]
    card = workbench.models.card(status.result["model"])
    runs = workbench.tracker.runs(experiment)
    last = {name: workbench.tracker.history(status.result["run_id"], name) for name in ("train_loss", "val_loss")}
    return {"metrics": {name: value for name, value in status.result["metrics"].items()},
            "model": {name: one["sha256"] for name, one in card.files.items() if name != "weights.pt"},
            "epochs": {name: sorted(set(rows)) for name, rows in last.items()},
            "points": {name: len(rows) for name, rows in last.items()},
            "runs": len(runs), "run_states": [one["status"] for one in runs],
            "versions": [len(workbench.tracker.versions(experiment)),
                         sum(ref.startswith(f"{experiment}@") for ref in workbench.models.refs())]}


def orphans(folder: Path) -> list[psutil.Process]:
    """Processes that carry the mark of a training below a folder, whoever started them."""
    found = []
    for one in psutil.process_iter():
        try:
            marked = (Path("/proc") / str(one.pid) / "environ").read_bytes()
        except OSError:
            continue  # it has ended, or is somebody else's
        if f"{MARK}={folder.resolve()}/".encode() in marked:
            found.append(one)
    return found


def _run(bench: Bench, experiment: str, seconds: float) -> JobStatus:
    jobs = bench.workbench.jobs
    return _done(jobs.wait(jobs.submit("retrain", bench.args(experiment, seconds), person="bench"), WAIT_S + seconds))


def _done(status: JobStatus) -> JobStatus:
    if status.state != "done":
        raise RuntimeError(f"Job {status.id} is {status.state}: {status.error}")
    return status


def _until(is_so: Callable[[], object], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not is_so():
        if time.monotonic() > end:
            raise RuntimeError(f"There is no {what} after {WAIT_S} s.")
        time.sleep(0.05)


if __name__ == "__main__":
    main()

"""What a sweep of many small trainings takes: real processes, a real MLflow server, a real search with pruning.

The recipe (tests/doubles/recipes/small) learns in a second or two which cells of a picture lie in a box. Learning rate,
its schedule, batch size and frozen layers are searched for; then some of the complete trials are trained again by hand, one
after the other, with nothing around them.

Prints one JSON line, last: trials; parallel (at once); speedup (all trials by hand, one after the other and to their
end, against the sweep); overhead_s_per_trial (seconds of a place in which no training process ran, a trial); pruned;
seconds (of the sweep); by_hand_s (one training by hand, the median); complete, failed; best and best_at_random (val_loss of
the best trial, and of the median one of those that were drawn blindly); left (training processes found afterwards).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT / "tests"))

from parts import mlflow_server  # noqa: E402
from parts_training import RECIPES, Bench, commit  # noqa: E402

from workbench.adapters.optuna import OptunaSearch  # noqa: E402
from workbench.annotation import Annotation  # noqa: E402
from workbench.capacity import count_cores  # noqa: E402
from workbench.dataset import Frame, LabeledFrame, Manifest  # noqa: E402
from workbench.ports import Quiet  # noqa: E402
from workbench.steps.sweep import sweep  # noqa: E402
from workbench.steps.training import Training  # noqa: E402
from workbench.steps.trials import folder_of, read_trials  # noqa: E402
from workbench.taxonomy import Taxonomy  # noqa: E402

SPACE = {"learning_rate": {"low": 1e-4, "high": 10, "log": True}, "schedule": ["cosine", "step"],
         "batch_size": [16, 64, 256], "frozen": [0, 1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=20, help="of each trial")
    parser.add_argument("--frames", type=int, default=120, help="64 x 64 pixels each")
    parser.add_argument("--parallel", type=int, default=0, help="trials at once; 0: as many as cores and memory allow")
    parser.add_argument("--sampler", default="tpe")
    parser.add_argument("--pruner", default="median")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--by-hand", type=int, default=6, help="trainings by hand to compare with")
    options = parser.parse_args()
    # One core a training; by hand too, so that the two are the same program.
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="workbench-sweep-") as folder, mlflow_server(Path(folder) / "mlflow") as url:
        print(json.dumps(run(Path(folder), url, options)))


def run(folder: Path, url: str, options: argparse.Namespace) -> dict[str, Any]:
    bench = Bench(folder, url, "cells")
    shutil.copytree(RECIPES, bench.project / "models")
    subprocess.run(["git", "init", "-q", "-b", "main", bench.project], check=True)
    commit(bench.project)
    version = publish(bench, options.frames, options.seed)
    job = Quiet(id="bench")
    began = time.monotonic()
    found = sweep(version, space=SPACE, recipe="small", params={"epochs": options.epochs}, metric="val_loss",
                  lower_is_better=True, trials=options.trials, sampler=options.sampler, pruner=options.pruner,
                  seed=options.seed, at_once=options.parallel, open_search=OptunaSearch, job=job, cores=count_cores(),
                  **bench.parts)
    seconds = time.monotonic() - began
    print("\n".join(job.lines), file=sys.stderr)
    whole = bench.home / "sweeps" / "bench"
    trials, parallel = read_trials(whole), max(int(line.split()[0]) for line in job.lines if " at once with " in line)
    trainings = [Training(folder_of(whole, one.number)) for one in trials]
    # One that was pruned has no figure of its process, so it counts from its beginning to its end.
    busy = sum((training.read("usage.json") or {"wall_s": one.seconds})["wall_s"]
               for one, training in zip(trials, trainings))
    complete = [one for one in trials if one.state == "complete"]
    manifest = bench.parts["store"].manifest(version)
    hand = [by_hand(bench, manifest, version, {"epochs": options.epochs, **one.params}, folder / f"hand{one.number}")
            for one in complete[:: max(1, len(complete) // options.by_hand)][: options.by_hand]]
    blind = [one.value for one in complete if one.number < 10]
    return {"trials": len(trials), "parallel": parallel,
            "speedup": round(len(trials) * statistics.median(hand) / seconds, 2),
            "overhead_s_per_trial": round((parallel * seconds - busy) / len(trials), 2),
            "pruned": found.counts["pruned"], "seconds": round(seconds, 1), "by_hand_s": round(statistics.median(hand), 2),
            "complete": len(complete), "failed": found.counts["failed"], "best": round(found.value, 5),
            "best_at_random": round(statistics.median(blind), 5) if blind else None,
            "left": sum(len(one.processes()) for one in trainings)}


def publish(bench: Bench, count: int, seed: int) -> str:
    """A version of noisy pictures with boxes of two labels, which differ by their tone only."""
    chance, frames = np.random.default_rng(seed), []
    for number in range(count):
        pixels = chance.integers(60, 140, (64, 64, 3)).astype(np.uint8)
        drawn = []
        for _ in range(3):
            x, y, side = (int(one) for one in chance.integers((0, 0, 10), (44, 44, 20)))
            label, tone = (("cell", (150, 110, 90)), ("dot", (90, 120, 165)))[int(chance.integers(2))]
            pixels[y:y + side, x:x + side] = np.clip(np.array(tone) + chance.integers(-50, 50, (side, side, 3)), 0, 255)
            drawn.append(Annotation(label, (float(x), float(y), float(x + side), float(y + side)), source="human:ann"))
        made = bench.parts["blobs"].put(cv2.imencode(".png", pixels)[1].tobytes())
        frame = Frame(f"{number}.png", 64, 64, made.md5, sha256=made.sha256, size_bytes=made.size_bytes)
        frames.append(LabeledFrame(frame, tuple(drawn), ("train", "train", "val", "test")[number % 4], "ann"))
    return bench.parts["store"].publish(bench.dataset, Manifest(Taxonomy(("cell", "dot")), tuple(frames)), "bench",
                                        "ann <ann@example.org>").ref


def by_hand(bench: Bench, manifest: Manifest, version: str, params: dict[str, Any], folder: Path) -> float:
    """Seconds that `python train.py` takes with these parameters, as its MLproject writes it."""
    from workbench.recipe import read_recipe
    from workbench.steps.retrain import lay_out
    output = folder / "output"
    output.mkdir(parents=True)
    lay_out(manifest, bench.parts["blobs"], version, folder / "data")
    recipe = read_recipe(bench.project, "small")
    ours = {"data": str(folder / "data"), "output": str(output), "name": "hand"}
    command = recipe.command_line(recipe.arguments(params, ours))
    environment = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    began = time.monotonic()
    subprocess.run(["bash", "-c", command], cwd=bench.project / "models" / "small", env=environment, check=True)
    return time.monotonic() - began


if __name__ == "__main__":
    main()

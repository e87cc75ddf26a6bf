"""Facts: everything needed to run a training again, kept with its run in MLflow, and read back from there."""

from __future__ import annotations

import json
import platform
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

import psutil

from workbench.capacity import count_cores, processors
from workbench.errors import Invalid, NotFound
from workbench.ports import Tracker
from workbench.steps.environments import Environment
from workbench.steps.keeper import MIB
from workbench.steps.training import Training

# Folder of the run's artifacts.
FOLDER = "workbench"
FORMAT = 1
# What the facts must hold; values may be null.
KEYS = ("recipe", "repository", "commit", "location", "params", "dataset", "dataset_digest", "base_model", "base_sha256",
        "environment", "environment_digest", "seed", "limits", "experiment", "register_as", "primary", "lower_is_better",
        "machine", "python")


def keep(tracker: Tracker, run_id: str, training: Training, facts: dict[str, Any],
         environment: Environment) -> dict[str, str]:
    """Stores the facts with the run: workbench/facts.json, and the packages in workbench/environment.txt. Returns the
    main ones, for the run's tags."""
    facts = {"format": FORMAT, **facts, "environment": environment.choice, "environment_digest": environment.digest,
             "python": environment.version, "machine": machine()}
    folder = training.folder / "facts"
    folder.mkdir(exist_ok=True)
    (folder / "facts.json").write_text(json.dumps(facts, indent=1, sort_keys=True))
    (folder / "environment.txt").write_text(environment.packages)
    tracker.log_files(run_id, folder, FOLDER)
    shutil.rmtree(folder)
    return {
        "base_model_sha256": facts["base_sha256"] or "", "environment": environment.choice,
        "environment_digest": environment.digest, "python": environment.version,
        "seed": "" if facts["seed"] is None else str(facts["seed"]), "limits": json.dumps(facts["limits"]),
        "machine": json.dumps(facts["machine"])}


def keep_results(tracker: Tracker, run_id: str, training: Training, results: dict[str, Any]) -> None:
    """Stores what a later run is compared with, as workbench/results.json."""
    training.write("results.json", results)
    tracker.log_files(run_id, training.folder / "results.json", FOLDER)
    (training.folder / "results.json").unlink()


def read(tracker: Tracker, run_id: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """(facts, results, packages) of a finished run. Raises Invalid for a run that has no such, NotFound for none."""
    tracker.run(run_id)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            folder = tracker.artifacts(run_id, FOLDER, Path(scratch))
        except NotFound as error:
            raise Invalid(f"Run {run_id} keeps no facts to run it again from: it is no training of this workbench, or "
                          "older than they are.") from error
        try:
            facts = json.loads((folder / "facts.json").read_text())
            missing = [key for key in KEYS if key not in facts]
            if missing or facts.get("format") != FORMAT:
                raise Invalid(f"The facts of run {run_id} lack {', '.join(missing) or 'their format'}; it cannot be run "
                              "again from them.")
            packages = (folder / "environment.txt").read_text()
            if not (folder / "results.json").exists():
                raise Invalid(f"Run {run_id} has no results to compare with: it did not come to a good end.")
            return facts, json.loads((folder / "results.json").read_text()), packages
        except (OSError, ValueError, TypeError, AttributeError) as error:
            if isinstance(error, Invalid):
                raise
            raise Invalid(f"The facts of run {run_id} cannot be read: {error!r}.") from error


def machine() -> dict[str, Any]:
    """Where this runs, as far as numbers may depend on it."""
    cpu, *gpus = processors()
    return {"host": socket.gethostname(), "system": platform.platform(), "cpu": cpu, "cores": count_cores(),
            "memory_mb": psutil.virtual_memory().total // MIB, "gpus": gpus}

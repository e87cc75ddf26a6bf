"""A small data set, all the stores and a project with a recipe, in one temporary folder: for tests of the last steps."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from workbench.adapters.git_datasets import GitDatasets
from workbench.adapters.local_models import LocalModels
from workbench.adapters.mlflow import MlflowTracker
from workbench.adapters.onnxruntime import OnnxRuntime
from workbench.annotation import Annotation
from workbench.blobs import Blobs
from workbench.dataset import Frame, LabeledFrame, Manifest
from workbench.ports import Quiet
from workbench.recipe import git
from workbench.records import Records
from workbench.steps.retrain import Trained, retrain
from workbench.steps.training import Training
from workbench.taxonomy import Taxonomy

RECIPES = Path(__file__).resolve().parent / "doubles" / "recipes"
BOX = (8.0, 8.0, 40.0, 40.0)


def commit(project: Path) -> str:
    who = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", project, "add", "-A"], check=True)
    subprocess.run(["git", "-C", project, *who, "commit", "-qm", "recipe"], check=True)
    return git(project, "rev-parse", "HEAD").strip()


@dataclass
class Bench:
    """All that retrain needs, in one temporary folder, around one small data set."""

    folder: Path
    url: str
    dataset: str
    parts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        blobs = Blobs(str(self.folder / "blobs"))
        self.records = Records(f"sqlite:///{self.folder / 'records.sqlite'}")
        self.project = self.folder / "project"
        self.home = self.folder / "home of ann"  # a blank in the path has to survive MLflow's shell command
        self.parts = {
            "store": GitDatasets(self.folder / "datasets", blobs), "blobs": blobs, "tracker": MlflowTracker(self.url),
            "models": LocalModels(self.folder / "models"), "home": self.home, "project": self.project,
            "open_backend": lambda file: OnnxRuntime(file, threads=1), "person": "ann"}

    def publish(self, splits: tuple[str, ...] = ("train", "train", "val", "test"), label: str = "cell", shade: int = 0) -> str:
        """A version with a frame per split, each with one box at BOX. Returns its reference."""
        frames = []
        for number, split in enumerate(splits):
            pixels = np.full((64, 64, 3), 10 * number + shade, np.uint8)
            pixels[8:40, 8:40] = 200
            made = self.parts["blobs"].put(cv2.imencode(".png", pixels)[1].tobytes())
            frame = Frame(f"{shade}-{number}.png", 64, 64, made.md5, sha256=made.sha256, size_bytes=made.size_bytes)
            frames.append(LabeledFrame(frame, (Annotation(label=label, xyxy=BOX, source="human:ann"),), split, "ann"))
        manifest = Manifest(Taxonomy((label,)), tuple(frames))
        return self.parts["store"].publish(self.dataset, manifest, "test", "ann <ann@example.org>").ref

    def retrain(self, version: str, job: Any = None, **changed: Any) -> Trained:
        arguments = {"recipe": "tiny", "job": job or Quiet(id=f"job-{self.dataset}"), **self.parts, **changed}
        return retrain(version, **arguments)

    def training(self, job: str | None = None) -> Training:
        return Training(self.home / "trainings" / (job or f"job-{self.dataset}"))

    def run(self) -> dict[str, Any]:
        runs = [run for run in self.parts["tracker"].runs(self.dataset) if run["tags"].get("kind") == "training"]
        assert len(runs) == 1
        return runs[0]

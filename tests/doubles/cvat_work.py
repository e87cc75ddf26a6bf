"""A workbench whose data set is being worked on in the CVAT double: pixels, a first version, proposals of two models."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from doubles.cvat import READ_WRITE, CvatDouble
from workbench.adapters.cvat import Connection, CvatServer
from workbench.annotation import Annotation, machine_annotation_id
from workbench.config import Config
from workbench.dataset import Frame, LabeledFrame, Manifest
from workbench.run import propose
from workbench.taxonomy import Taxonomy
from workbench.wiring import Workbench

CELLS = Taxonomy(("RBC", "WBC"))


def workbench_on(double: CvatDouble, home: Path, frames: int = 6, job_size: int = 2, token: str = READ_WRITE,
                 **settings: object) -> Workbench:
    """Version 0.1.0 of "cells" with frames nobody looked at, all of them in CVAT, in jobs of `job_size`."""
    workbench = Workbench(Config(home=home, cvat_url=double.url, cvat_token=token, person="ada", **settings))
    connection = Connection(double.url, token, pause=lambda seconds: None)
    workbench.__dict__["cvat"] = CvatServer(connection, workbench.records.engine, job_size=job_size)
    labeled = [LabeledFrame(frame(workbench, number), split="train") for number in range(frames)]
    workbench.datasets.publish("cells", Manifest(CELLS, tuple(labeled)), "upload", "ada")
    workbench.cvat.open_task("cells", CELLS)
    workbench.cvat.add_frames("cells", [(one, workbench.blobs.path(one.frame.blob)) for one in labeled])
    return workbench


def frame(workbench: Workbench, number: int) -> Frame:
    out = io.BytesIO()
    Image.new("RGB", (320, 240), (number * 3 % 256, 80, 120)).save(out, "JPEG")
    made = workbench.blobs.put(out.getvalue())
    return Frame(f"{number:03}.jpg", 320, 240, made.md5, made.sha256, made.size_bytes)


def run(workbench: Workbench, run_id: str, model: str, boxes: dict[str, list[tuple[float, float]]]) -> None:
    """A machine run: frame name -> (left edge, confidence) of boxes 50 px wide."""
    read = workbench.cvat.read("cells", list(boxes))
    writes = [propose(read[name], run_id, f"model:{model}", tuple(
        Annotation("RBC", xyxy=(left, 20.0, left + 50, 70.0), source=f"model:{model}", confidence=confidence,
                   id=machine_annotation_id(run_id, name, index), attributes={"run_id": run_id})
        for index, (left, confidence) in enumerate(drawn))) for name, drawn in boxes.items()]
    assert workbench.cvat.write("cells", writes) == []


def accept(workbench: Workbench, *jobs: int, who: str = "worker1") -> None:
    """As a reviewer does it in CVAT."""
    for job in jobs:
        workbench.cvat.people("cells").set_job(job, "acceptance", "completed", who)

"""A workbench with something in it: a data set with two versions, models, jobs, runs and decisions, on real parts."""

from __future__ import annotations

import io
import json
import random
from dataclasses import replace
from pathlib import Path

import onnx
from onnx import TensorProto, helper
from PIL import Image, ImageDraw

from workbench import jobs as jobs_module
from workbench.annotation import Annotation
from workbench.config import Config
from workbench.dataset import Frame, LabeledFrame, Manifest
from workbench.inference.graph import file_record
from workbench.model import InputSpec, ModelCard
from workbench.ports import Quiet
from workbench.records import now
from workbench.run import propose, settle
from workbench.steps.evaluate import evaluate
from workbench.taxonomy import Taxonomy
from workbench.wiring import Workbench

LABELS = ("disc", "ring", "bar")
SIDE = 160


def picture(seed: int) -> tuple[bytes, tuple[tuple[str, tuple[float, float, float, float]], ...]]:
    """A JPEG with three drawn things, and (label, xyxy) of each; the same for the same seed."""
    dice = random.Random(seed)
    image = Image.new(
        "RGB", (SIDE * 2, SIDE), (dice.randrange(150, 230), dice.randrange(150, 230), dice.randrange(150, 230))
    )
    pen, things = ImageDraw.Draw(image), []
    for place, label in enumerate(dice.sample(LABELS, 3)):
        side = dice.randrange(36, 64)
        x, y = place * 104 + dice.randrange(4, 30), dice.randrange(4, SIDE - 70)
        box = (x, y, x + side, y + (side if label != "bar" else side // 3))
        colour = tuple(dice.randrange(20, 140) for _ in range(3))
        if label == "ring":
            pen.ellipse(box, outline=colour, width=7)
        else:
            (pen.ellipse if label == "disc" else pen.rectangle)(box, fill=colour)
        things.append((label, tuple(map(float, box))))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return out.getvalue(), tuple(things)


def labeled_frame(workbench: Workbench, seed: int, labelled: bool, split: str) -> LabeledFrame:
    data, things = picture(seed)
    made = workbench.blobs.put(data)
    frame = Frame(f"shelf/{seed:03d}.jpg", SIDE * 2, SIDE, made.md5, made.sha256, made.size_bytes)
    drawn = tuple(
        Annotation(label, xyxy, source="human:anna", id=f"{seed:03d}{index}".ljust(32, "0"))
        for index, (label, xyxy) in enumerate(things)
    )
    return LabeledFrame(frame, drawn if labelled else None, split)


def dataset(workbench: Workbench, name: str = "shapes", frames: int = 12, labelled: int = 6) -> None:
    """Publishes 0.1.0 with some labelled frames, then 0.2.0 with two more labelled and one box moved."""
    splits = ["train", "test", "val"]
    first = [labeled_frame(workbench, seed, seed < labelled, splits[seed % 3]) for seed in range(frames)]
    workbench.datasets.publish(name, Manifest(Taxonomy(LABELS), tuple(first)), "First upload", "anna")
    moved = first[0].annotations[0]
    x1, y1, x2, y2 = moved.xyxy
    second = [
        replace(first[0], annotations=(replace(moved, xyxy=(x1 + 3, y1, x2 + 9, y2)), *first[0].annotations[1:])),
        *first[1:],
    ]
    second[labelled] = labeled_frame(workbench, labelled, True, splits[labelled % 3])
    second[labelled + 1] = labeled_frame(workbench, labelled + 1, True, splits[(labelled + 1) % 3])
    workbench.datasets.publish(name, Manifest(Taxonomy(LABELS), tuple(second)), "Two more frames, one box moved", "ben")


def working_copy(workbench: Workbench, name: str = "shapes") -> None:
    """The working copy of the latest version; a machine run drew on two frames, a person accepted one of them."""
    manifest = workbench.datasets.manifest(workbench.datasets.versions(name)[0].ref)
    workbench.server.open_task(name, manifest.taxonomy)
    workbench.server.add_frames(name, [(one, workbench.blobs.path(one.frame.blob)) for one in manifest.frames])
    drawn = []
    for frame in workbench.server.read(name, workbench.server.frame_names(name, "new")[:3]).values():
        seed = int(Path(frame.frame.name).stem)
        boxes = tuple(
            Annotation(
                label, xyxy, source="model:shapes-detector@1", confidence=0.61 + index / 10, id=f"m{seed}{index}"
            )
            for index, (label, xyxy) in enumerate(picture(seed)[1])
        )
        drawn.append(propose(frame, "run-1", "model:shapes-detector@1", boxes))
    signed = replace(drawn[0], status="accepted", reviewed_by="anna", reviewed_at=now())
    drawn[0] = replace(signed, annotations=settle(signed, "anna"))
    assert workbench.server.write(name, drawn) == []
    begun = {"model": "shapes-detector@1", "statuses": ["new"], "confidence": None, "renames": {}}
    workbench.records.add("machine_runs", name, "run-1", "model:shapes-detector@1", begun, key="run-1")
    workbench.records.add(
        "machine_runs",
        name,
        "run-1",
        "model:shapes-detector@1",
        {"is_finished": True, "model": "shapes-detector@1", "frames": 3, "boxes": 9, "skipped": {}},
        key="run-1/finished",
    )
    workbench.records.add("reviews", name, drawn[0].frame.name, "anna", {"decision": "accepted"})


def tiny_detector(folder: Path, labels: int = len(LABELS), side: int = 64) -> Path:
    """An ONNX graph shaped as a YOLOX export that says the same whatever it sees: a box of each of its first three
    labels. Returns its file."""
    cells = (side // 8) ** 2 + (side // 16) ** 2 + (side // 32) ** 2
    table = [[0.0] * (5 + labels) for _ in range(cells)]
    for label, row in enumerate((27, 35, 60)):
        # Centre of its cell, three cells wide (exp(1.1)), certain, one label.
        table[row] = [0.5, 0.5, 1.1, 1.1, 0.9, *(0.9 if index == label else 0.05 for index in range(labels))]
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["images", "axes"], ["mean"], keepdims=1),
            helper.make_node("Reshape", ["mean", "flat"], ["flatmean"]),
            helper.make_node("Mul", ["flatmean", "zero"], ["nothing"]),
            helper.make_node("Add", ["table", "nothing"], ["output"]),
        ],
        "constant_yolox",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, side, side])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", cells, 5 + labels])],
        [
            helper.make_tensor("axes", TensorProto.INT64, [3], [1, 2, 3]),
            helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0]),
            helper.make_tensor("flat", TensorProto.INT64, [3], [-1, 1, 1]),
            helper.make_tensor(
                "table", TensorProto.FLOAT, [1, cells, 5 + labels], [value for row in table for value in row]
            ),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def model(
    workbench: Workbench,
    folder: Path,
    name: str = "shapes-detector",
    version: str = "1",
    labels: tuple[str, ...] = LABELS,
    **about: object,
) -> ModelCard:
    """Registers the tiny detector under a name."""
    file = tiny_detector(folder / f"{name}-{version}", len(labels))
    card = ModelCard(
        name,
        version,
        InputSpec((64, 64), "NCHW", "float32", "BGR"),
        {"name": "yolox", "confidence": 0.3, "iou": 0.45},
        Taxonomy(labels),
        {file.name: file_record(file)},
        licence="Apache-2.0",
        **about,
    )
    return workbench.models.register(card, file.parent)


def decisions(workbench: Workbench, name: str = "shapes") -> None:
    facts = {
        "promoted": True,
        "reason": "shapes-detector@1 scores map_50_95 0.4000 and is the first champion.",
        "version": f"{name}@0.1.0",
        "split": "test",
        "champion": None,
        "challenger": {"model": "shapes-detector@1", "map_50_95": 0.4, "map_50": 0.7, "per_class": {}},
    }
    workbench.records.add("promotions", name, "shapes-detector@1", "anna", facts)
    workbench.records.add("deployments", name, "shapes-detector@1", "anna", {"previous": None})
    workbench.records.add("uploads", name, f"{name}@0.1.0", "anna", {"added": 12})


def job(workbench: Workbench, job_id: str, kind: str, state: str, arguments: dict, **columns: object) -> str:
    """A job as a worker would have left it."""
    row = {
        "id": job_id,
        "kind": kind,
        "args": json.dumps(arguments),
        "person": "anna",
        "state": state,
        "done": 0,
        "total": 0,
        "note": "",
        "error": "",
        "created_at": now(),
        "started_at": now() if state != "queued" else "",
        "finished_at": now() if state in ("done", "failed", "cancelled") else "",
        **columns,
    }
    workbench.jobs.list(limit=1)
    with workbench.records.engine.begin() as connection:
        connection.execute(jobs_module.jobs.insert(), row)
    return job_id


def some_jobs(workbench: Workbench, name: str = "shapes") -> None:
    job(
        workbench,
        "up1",
        "upload",
        "done",
        {"dataset": name, "source": "/nowhere", "split": None},
        done=12,
        total=12,
        result=json.dumps({"version": f"{name}@0.1.0", "added": 12, "labeled": 6, "boxes": 18}),
    )
    job(
        workbench,
        "an1",
        "annotate",
        "running",
        {"dataset": name, "model": "shapes-detector@1"},
        done=2,
        total=5,
        note="shelf/010.jpg",
    )
    job(
        workbench,
        "re1",
        "retrain",
        "failed",
        {"dataset": name, "version": f"{name}@0.2.0", "recipe": "r", "params": {}},
        error="The training ended with exit code 1. Lower the learning rate.",
    )
    with workbench.records.engine.begin() as connection:
        connection.execute(
            jobs_module.items.insert(), {"job": "up1", "item": "shelf/<b>broken</b>.jpg", "reason": "is not an image"}
        )
        connection.execute(jobs_module.log.insert(), {"job": "up1", "at": now(), "text": "12 frames arrived"})


def evaluation(workbench: Workbench, name: str = "shapes") -> None:
    """A real evaluation of the tiny detector, with its run in the tracker."""
    evaluate(
        "shapes-detector@1",
        f"{name}@0.2.0",
        "test",
        models=workbench.models,
        store=workbench.datasets,
        blobs=workbench.blobs,
        open_backend=workbench.open_backend,
        tracker=workbench.tracker,
        job=Quiet(id="ev1"),
    )
    run = workbench.tracker.start_run(
        name, f"efficientnet_lite0_fcos on {name}@0.1.0", {"job": "re0", "person": "anna"}
    )
    workbench.tracker.log(run, metrics={"map_50_95": 0.4, "map_50": 0.7})
    workbench.tracker.finish_run(run, "FINISHED")


def fill(config: Config, folder: Path) -> Workbench:
    """Everything above; the annotation server and the tracker of the settings must answer."""
    workbench = Workbench(config)
    dataset(workbench)
    model(
        workbench,
        folder,
        metrics={"map_50_95": 0.4, "map_50": 0.7, "on": "shapes@0.1.0/test"},
        trained_on={"ref": "shapes@0.1.0"},
    )
    model(
        workbench, folder, version="2", metrics={"map_50_95": 0.47, "map_50": 0.76}, trained_on={"ref": "shapes@0.2.0"}
    )
    model(workbench, folder, name="street-yolox", labels=("disc", "lorry", "person"))
    working_copy(workbench)
    decisions(workbench)
    some_jobs(workbench)
    evaluation(workbench)
    return workbench

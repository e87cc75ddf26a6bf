"""Annotating a CVAT task: our batched job against CVAT's lambda path and the SDK's driver, with the same model on the
same images; then kills of that job, and of an upload.

The server is the double of tests/doubles/cvat.py, which waits on every call as long as a real CVAT took (COSTS below);
with --url and --token it is a real one. Every way runs in a process of its own.

ours     the step `annotate` as a worker calls it, over CvatServer, from opening the model to the last box; with --int8
         it runs YOLOX-Nano as the certified INT8 version that `quantize` makes of it here, the others its FP32 file
lambda   CVAT's batch call of a function, in CVAT's order: for each frame, one after the other, CVAT fetches the picture
         and posts it as base64, the function decodes and detects, CVAT converts its answer and, every 100 frames,
         stores. CVAT's own share is LAMBDA_FRAME_S, waited for; the function's is really done, with the model opened
         before. With --url it is the real POST /api/lambda/requests, if CVAT lists a function of this model.
sdk      cvat_sdk.auto_annotation.annotate_task itself; its function detects with our detector, opened before
kills    a real worker process is killed with SIGKILL while it replaces an earlier run beside people's boxes, another
         one goes on. Each task must end as that of an undisturbed run: drawings, runs, states, the job's result.
upload   a real worker is killed KILLS_OF_AN_UPLOAD times while it uploads; the double counts the files it received.

Prints one JSON line, last: vs_lambda and vs_sdk (how many times as fast ours is), rss_mb (ours, peak; rss_mb_small: of
--small frames), the same under "fast" for a model that takes no time, kills, identical, upload_sent_twice.
"""

from __future__ import annotations

import argparse
import base64
import copy
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]

from kill import worker  # noqa: E402

from doubles import graphs  # noqa: E402
from doubles.cvat import READ_WRITE, CvatDouble, cvat  # noqa: E402
from workbench.adapters.cvat.connection import LOGIN_TOKEN  # noqa: E402
from workbench.annotation import Annotation  # noqa: E402
from workbench.config import Config  # noqa: E402
from workbench.dataset import LabeledFrame  # noqa: E402
from workbench.errors import WorkbenchError  # noqa: E402
from workbench.formats.images import frame_of, read_file  # noqa: E402
from workbench.inference.known import card_for_yolox  # noqa: E402
from workbench.model import ModelCard  # noqa: E402
from workbench.ports import Quiet  # noqa: E402
from workbench.wiring import Workbench  # noqa: E402

DATA = PROJECT.parent / "shared" / "data"
PICTURES = (".jpg", ".jpeg", ".png", ".bmp")
ROUND_S = 300          # a job that takes longer than this is stuck
KILL_FRAMES, KILL_BATCH = 120, 20
KILLS_OF_AN_UPLOAD = 3
STARTING = 0.1         # share of kills that fall into the start of the worker, before it has the job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=DATA / "images" / "coco_val100", help="folder of pictures")
    parser.add_argument("--model", type=Path, help="card.json with its files beside it; default: YOLOX-Nano")
    parser.add_argument("--frames", type=int, default=1000, help="pictures are repeated to make as many; 0: no speed")
    parser.add_argument("--small", type=int, default=200, help="frames of the run whose memory is compared")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--upload", type=int, default=5000, metavar="N", help="frames of the upload that is killed")
    parser.add_argument("--int8", action="store_true", help="ours runs YOLOX-Nano's INT8 version, certified here")
    parser.add_argument("--only", choices=("model", "fast"), help="measure the speed with one of the two models only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", help="a real CVAT: speed only")
    parser.add_argument("--token", help="its token; default: the environment's WORKBENCH_TEST_CVAT_TOKEN")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.int8 and options.model:
        parser.error("--int8 is about YOLOX-Nano; leave --model out")
    if options.part:
        print(json.dumps(PARTS[options.part[0]](**json.loads(options.part[1]))))
        return
    figures: dict[str, Any] = {"server": options.url or "double"}
    with tempfile.TemporaryDirectory(prefix="workbench-cvat-") as scratch:
        folder = Path(scratch)
        if options.frames:
            for name, model in (("model", _model), ("fast", _fast)):
                if options.only in (None, name):
                    (folder / name).mkdir()
                    card, files = model(folder / name, options.model)
                    found = speed(folder / name, card, files, options, options.int8 and name == "model")
                    figures |= found if name == "model" or options.only else {"fast": found}
        if not options.url and options.kills:
            figures |= kills(folder, options.kills, random.Random(options.seed))
        if not options.url and options.upload:
            figures |= upload(folder, options.upload, random.Random(options.seed))
    print(json.dumps(figures))
    is_whole = figures.get("identical", 0) == figures.get("kills", 0) and not figures.get("upload_sent_twice")
    sys.exit(0 if is_whole else 1)


def speed(folder: Path, card: ModelCard, files: Path, options: argparse.Namespace, in_int8: bool) -> dict[str, Any]:
    """Fills two tasks, runs the three ways; the model's files lie in `files`."""
    token = options.token or os.environ.get("WORKBENCH_TEST_CVAT_TOKEN", "")
    with nullcontext() if options.url else cvat() as double:
        url, token = (double.url, READ_WRITE) if double else (options.url, token)
        config = Config(home=folder / "home", cvat_url=url, cvat_token=token)
        workbench = Workbench(config)
        workbench.models.register(card, files)
        mine = _certified(workbench, folder) if in_int8 else card
        name = f"bench-{uuid.uuid4().hex[:6]}"  # a real server may still hold what an interrupted run made
        try:
            for dataset, count in ((f"{name}-small", options.small), (name, options.frames)):
                _fill(workbench, dataset, card, options.images, count)
            workbench.plan_for(mine, workbench.models.folder(mine.ref))  # measured once on a machine, then remembered
            if double:
                double.cost_s = costs(double)
            asked = {"home": str(config.home), "url": url, "token": token, "model": card.ref}
            calls = len(double.journal) if double else 0
            small = _part("ours", dataset=f"{name}-small", **{**asked, "model": mine.ref})
            before = len(double.journal) if double else 0
            ours = _part("ours", dataset=name, **{**asked, "model": mine.ref})
            ours["calls"] = len(double.journal) - before if double else None
            _say(f"{mine.ref}: ours {ours} (small {small['rss_mb']} MB, {before - calls} calls)")
            sdk = _part("sdk", dataset=name, **asked)
            _say(f"{card.ref}: sdk {sdk}")
            slow = _part("real_lambda" if options.url else "simulated_lambda", dataset=name, **asked)
            _say(f"{card.ref}: lambda {slow}")
        finally:
            if options.url:
                for task in workbench.server.tasks():
                    workbench.server.delete_task(task.dataset)
    ways = {"ours": ours, "sdk": sdk, "lambda": slow}
    versus = {f"vs_{name}": round(ways[name]["seconds"] / ours["seconds"], 2) if "seconds" in ways[name] else None
              for name in ("lambda", "sdk")}
    return {**versus, "rss_mb": ours["rss_mb"], "rss_mb_small": small["rss_mb"], "frames": options.frames,
            "small": options.small, "model": mine.ref, "rival_model": card.ref, "boxes": ours["boxes"],
            "calls": ours["calls"],
            "images_per_s": round(options.frames / ours["seconds"], 1),
            "seconds": {name: way.get("seconds") for name, way in ways.items()},
            **({"lambda_skipped": slow["skipped"]} if "skipped" in slow else {})}


def ours(home: str, url: str, token: str, model: str, dataset: str) -> dict[str, Any]:
    workbench = Workbench(Config(home=Path(home), cvat_url=url, cvat_token=token))
    workbench.server.task(dataset)  # a worker has its libraries imported, as those of the other ways are
    started = time.perf_counter()
    report = workbench.job_kinds()["annotate"]({"dataset": dataset, "model": model}, Quiet(id=f"run-{dataset}"))
    seconds = time.perf_counter() - started
    if report["failed"] or report["skipped"] or report["frames"] != report["detected"]:
        raise RuntimeError(f"Not every frame was annotated: {report}")
    return {"seconds": round(seconds, 2), "boxes": report["boxes"], "rss_mb": _peak_mb()}


def sdk(home: str, url: str, token: str, model: str, dataset: str) -> dict[str, Any]:
    import cvat_sdk.auto_annotation as auto
    import numpy as np
    from cvat_sdk.core.client import AccessTokenCredentials, Client
    from cvat_sdk.core.client import Config as SdkConfig
    workbench = Workbench(Config(home=Path(home), cvat_url=url, cvat_token=token))
    with _detector(workbench, model) as detector, tempfile.TemporaryDirectory() as cache:
        client = Client(url, config=SdkConfig(cache_dir=cache))
        if LOGIN_TOKEN.fullmatch(token):
            client.api_client.set_default_header("Authorization", f"Token {token}")
        else:
            client.login(AccessTokenCredentials(token))

        class Function:
            spec = auto.DetectionFunctionSpec(
                labels=[auto.label_spec(label, index) for index, label in enumerate(detector.card.labels.labels)])
            boxes = 0

            def detect(self, context: Any, image: Any) -> list[Any]:
                found = detector.detect([np.asarray(image.convert("RGB"))])[0]
                self.boxes += len(found)
                return [auto.rectangle(int(class_id), [float(side) for side in xyxy])
                        for class_id, xyxy in zip(found.class_id, found.xyxy)]

        function, started = Function(), time.perf_counter()
        for task in _tasks(workbench, dataset):
            auto.annotate_task(client, task, function)
        return {"seconds": round(time.perf_counter() - started, 2), "boxes": function.boxes, "rss_mb": _peak_mb()}


def simulated_lambda(home: str, url: str, token: str, model: str, dataset: str) -> dict[str, Any]:
    """What CVAT does itself is waited for, as long as it took the real one; what the function does is done."""
    from workbench.inference.pixels import decode_image
    workbench = Workbench(Config(home=Path(home), cvat_url=url, cvat_token=token))
    read, boxes = workbench.server.read(dataset, workbench.server.frame_names(dataset)), 0
    with _detector(workbench, model) as detector:
        labels, started = detector.card.labels.labels, time.perf_counter()
        for name, working in read.items():
            time.sleep(LAMBDA_FRAME_S)
            body = json.dumps({"image": base64.b64encode(workbench.blobs.get(working.frame.blob)).decode()})
            found = detector.detect([decode_image(base64.b64decode(json.loads(body)["image"]), name)])[0]
            answer = json.dumps([
                {"label": labels[class_id], "confidence": str(confidence), "points": xyxy.tolist(), "type": "rectangle"}
                for class_id, confidence, xyxy in zip(found.class_id, found.confidence, found.xyxy)])
            boxes += len(json.loads(answer))
        return {"seconds": round(time.perf_counter() - started, 2), "boxes": boxes}


def real_lambda(home: str, url: str, token: str, model: str, dataset: str) -> dict[str, Any]:
    workbench = Workbench(Config(home=Path(home), cvat_url=url, cvat_token=token))
    call, seconds = workbench.server.connection.call, 0.0
    try:
        listed = call("GET", "/api/lambda/functions")
    except WorkbenchError as error:
        return {"skipped": f"CVAT reaches no gateway: {error}"}
    function = next((one["id"] for one in listed if model in (one.get("name"), one.get("description"), one["id"])
                     or model.replace("@", "-") in one["id"]), None)
    if function is None:
        return {"skipped": f"CVAT lists no function of {model}: {[one['id'] for one in listed]}"}
    for task in _tasks(workbench, dataset):
        asked = call("POST", "/api/lambda/requests", {"function": function, "task": task, "cleanup": False})["id"]
        while (found := call("GET", f"/api/lambda/requests/{asked}"))["status"] not in ("finished", "failed"):
            time.sleep(0.2)
        if found["status"] == "failed":
            return {"skipped": f"CVAT's request failed: {found['exc_info']}"}
        seconds += (datetime.fromisoformat(found["ended"]) - datetime.fromisoformat(found["started"])).total_seconds()
    return {"seconds": round(seconds, 2)}


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "ours": ours, "sdk": sdk, "simulated_lambda": simulated_lambda, "real_lambda": real_lambda}


def kills(folder: Path, count: int, chance: random.Random) -> dict[str, Any]:
    """One task a kill, all from the same state: an earlier run on every frame, people's boxes on every fifth."""
    began, base, moments = time.monotonic(), folder / "kills", Counter()
    with cvat() as double:
        config = Config(home=base / "start", cvat_url=double.url, cvat_token=READ_WRITE, blobs_url=str(base / "blobs"),
                        threads=1)
        workbench = Workbench(config)
        card, files = _fast(base, None)
        workbench.models.register(card, files)
        _fill(workbench, "bench", card, _drawn(base / "pictures", KILL_FRAMES, chance), KILL_FRAMES)
        workbench.job_kinds()["annotate"]({"dataset": "bench", "model": card.ref}, Quiet(id="earlier"))
        for name, one in list(workbench.server.read("bench", workbench.server.frame_names("bench")).items())[::5]:
            box = Annotation(card.labels.labels[0], (5, 5, 60, 60), source="human:ann", id=f"ann-{name}")
            workbench.server.write("bench", [replace(one, annotations=(*(one.annotations or ())[1:], box))])
        workbench.records.engine.dispose()
        state, identical, expected, takes = double.state, 0, None, 0.0
        double.cost_s = costs(double)
        for number in range(count + 1):
            double.state = copy.deepcopy(state)
            home = base / f"round{number}"
            shutil.copytree(config.home, home)
            mine = Workbench(replace(config, home=home))
            job = mine.jobs.submit("annotate", {"dataset": "bench", "model": card.ref, "batch": KILL_BATCH,
                                                "statuses": ["new", "annotated"]}, person="bench", key="bench")
            if number:  # the first is left alone
                with worker(mine, kill=True) as process:
                    if chance.random() < STARTING:
                        time.sleep(chance.random() * 2)
                    else:
                        _wait_for(mine, job, process)
                        time.sleep(chance.random() * takes)
                    status = mine.jobs.get(job)
                    is_running = status.state == "running"
                    moments[f"{status.done * 10 // KILL_FRAMES * 10} %" if is_running else status.state] += 1
            with worker(mine):
                found = _outcome(mine, double, job)
            status = mine.jobs.get(job)
            if not number:
                expected, takes = found, _seconds(status)
                _say(f"undisturbed: {takes:.1f} s, {len(found['drawn'])} drawings")
                continue
            identical += found == expected
            for part in expected if found != expected else ():
                if found[part] != expected[part]:
                    _say(f"DIFFERENT {part}: {str(expected[part])[:400]} / {str(found[part])[:400]}")
            mine.records.engine.dispose()
            shutil.rmtree(home)
            _say(f"kill {number}: {identical} identical, {time.monotonic() - began:.0f} s")
    return {"kills": count, "identical": identical, "kill_moments": dict(sorted(moments.items())),
            "kill_drawings": len(expected["drawn"]), "kills_s": round(time.monotonic() - began, 1)}


def _outcome(workbench: Workbench, double: CvatDouble, job: str) -> dict[str, Any]:
    """All that must be the same, without CVAT's own numbers of drawings."""
    status = workbench.jobs.wait(job, ROUND_S)
    if status.state != "done":
        raise RuntimeError(f"{status.state}: {status.error} {workbench.jobs.log_lines(job)[-3:]}")
    stored = [json.dumps({**one, "id": None, "job": number}, sort_keys=True)
              for number, records in double.state.records.items() for kind in records for one in records[kind]]
    read = workbench.server.read("bench", workbench.server.frame_names("bench"))
    return {"drawn": sorted(stored),
            "working": {name: [[a.to_json() for a in one.annotations or ()], [run.to_json() for run in one.runs],
                               one.status] for name, one in read.items()},
            "leased": workbench.records.leased("bench"),
            "runs": len(workbench.records.entries("machine_runs", "bench", job)),
            "result": {name: status.result[name] for name in ("frames", "boxes", "by_label", "failed", "skipped")}}


def upload(folder: Path, count: int, chance: random.Random) -> dict[str, Any]:
    pictures = _drawn(folder / "many", count, chance, size=(64, 48))
    with cvat() as double:
        workbench = Workbench(Config(home=folder / "upload", cvat_url=double.url, cvat_token=READ_WRITE, threads=1))
        double.cost_s = costs(double)
        began, killed_at = time.monotonic(), []
        job = workbench.jobs.submit("upload", {"dataset": "many", "source": str(pictures)}, person="bench", key="many")
        for goal in sorted(chance.random() * count for _ in range(KILLS_OF_AN_UPLOAD)):
            with worker(workbench, kill=True) as process:
                while len(double.state.received) <= goal and not workbench.jobs.get(job).is_over:
                    if process.poll() is not None or time.monotonic() - began > 2 * ROUND_S:
                        raise RuntimeError(f"The upload does not go on: {workbench.jobs.get(job)}")
                    time.sleep(0.02)
                time.sleep(chance.random() * 0.5)
                killed_at.append(len(double.state.received))
        with worker(workbench):
            status = workbench.jobs.wait(job, ROUND_S)
        if status.state != "done":
            raise RuntimeError(f"The upload ended {status.state}: {status.error}")
        received, tasks = Counter(double.state.received), double.state.tasks.values()
        there = len(workbench.server.frame_names("many"))
    sizes = [task["size"] for task in tasks]
    if there != count or len(received) != count or sum(sizes) != count:
        raise RuntimeError(f"{count} frames were to be there: {there} are, in tasks of {sizes}")
    return {"upload": count, "upload_sent_twice": received.total() - len(received), "upload_killed_at": killed_at,
            "upload_s": round(time.monotonic() - began, 1)}


# Seconds of a real CVAT 2.73.0 (no other users, on the 2 cores that also ran the client; medians of 3 to 5 calls of
# cvat-sdk's connection, November 2026): 300 frames of COCO in one task, 80 labels of five attributes, jobs of 100.
# A chunk is 72 pictures as they were uploaded, when it is asked for the first time.
COSTS = (
    ("GET", r"jobs\?", 0.054), ("GET", r"projects/\d+$", 0.030), ("GET", r"tasks/\d+$", 0.038),
    ("GET", r"tasks/\d+/data/meta", 0.050), ("GET", r"data/?\?.*type=chunk", 0.51))
# GET of the labels: 0.029 s of 3, 0.053 s of 80 with five attributes each.
LABELS_S, LABEL_S = 0.028, 0.0003
# GET of a job's annotations: 0.05 s without, 0.095 s with 720, 0.50 s with 3,408 shapes.
READ_S, READ_SHAPE_S = 0.05, 0.00012
# PATCH create: 0.08 s with 1, 0.13 s with 112, 0.50 s with 700 shapes of five attributes (0.43 KB each); without
# attributes (0.24 KB), as the SDK's driver sends them (its address ends in a slash), 0.19 s with 700, 0.36 s with
# 2,100, 0.89 s with 4,200.
WRITE_S, WRITE_BYTE_S, WRITE_BARE_BYTE_S = 0.07, 1.4e-6, 0.75e-6
# What CVAT itself takes per frame of a batch call, storing included: the request's duration over its frames, with a
# function that answers seven boxes at once. 0.047 s on an idle machine, 0.077 s when the costs above were measured.
LAMBDA_FRAME_S = 0.047
OTHER_S = 0.04         # calls of which a job makes a few


def costs(double: CvatDouble) -> Callable[[str, str, int], float]:
    """Seconds a call takes: of (method, path with query, bytes of the body)."""
    def cost_s(method: str, path: str, size: int) -> float:
        job = re.search(r"jobs/(\d+)/annotations", path)
        if method == "GET" and job:
            return READ_S + READ_SHAPE_S * len(double.state.records.get(int(job[1]), {"shapes": ()})["shapes"])
        if method == "GET" and urlsplit(path).path == "/api/labels":
            return LABELS_S + LABEL_S * len(double.state.labels)
        if method == "PATCH" and "/annotations" in path:
            return WRITE_S + size * (WRITE_BARE_BYTE_S if urlsplit(path).path.endswith("/") else WRITE_BYTE_S)
        known = (seconds for verb, pattern, seconds in COSTS if verb == method and re.search(pattern, path))
        return next(known, OTHER_S)
    return cost_s


def _model(folder: Path, card_file: Path | None) -> tuple[ModelCard, Path]:
    """The model asked for, else YOLOX-Nano, else the one that takes no time."""
    if card_file is not None:
        return ModelCard.from_json(json.loads(card_file.read_text())), card_file.parent
    onnx = DATA / "models" / "yolox_nano" / "yolox_nano_416.onnx"
    return (card_for_yolox(onnx, "yolox_nano"), onnx.parent) if onnx.exists() else _fast(folder, None)


def _certified(workbench: Workbench, folder: Path) -> ModelCard:
    """YOLOX-Nano's INT8 version, made, measured against the FP32 file and registered with its certificate."""
    from int8 import known_on_photographs, quantised
    case = known_on_photographs(workbench.open_backend, DATA / "images" / "coco_val100")[0]
    (folder / "int8").mkdir()
    made, report, _ = quantised(*case[:3], workbench.open_backend, folder / "int8", limits={"loss": 0.005})
    workbench.models.register(made.card, made.folder)
    workbench.certificates.add(report["facts"], "bench")
    return made.card


def _fast(folder: Path, _: Path | None) -> tuple[ModelCard, Path]:
    """A graph of one convolution that finds reddish and bluish places: seven boxes a frame, as a real model has."""
    card = graphs.red_finder(folder / "finder", side=128)
    return replace(card, decoder={**card.decoder, "confidence": 0.02, "max_detections": 7}), folder / "finder"


def _fill(workbench: Workbench, dataset: str, card: ModelCard, images: Path, count: int) -> None:
    sources = sorted(path for path in images.rglob("*") if path.suffix.lower() in PICTURES)
    if not sources:
        sys.exit(f"{images} holds no pictures")
    pictures = [(source, read_file(source)) for source in sources[:count]]
    stored = [(source.suffix.lower(), picture, workbench.blobs.put(picture.data)) for source, picture in pictures]

    def frames() -> Iterator[tuple[LabeledFrame, Path]]:
        for number in range(count):
            suffix, picture, made = stored[number % len(stored)]
            yield LabeledFrame(frame_of(f"{number:06d}{suffix}", picture, made)), workbench.blobs.path(made.md5)

    workbench.server.open_task(dataset, card.labels)
    workbench.server.add_frames(dataset, frames())


def _drawn(folder: Path, count: int, chance: random.Random, size: tuple[int, int] = (192, 144)) -> Path:
    """Pictures of coloured squares, no two alike."""
    from PIL import Image
    folder.mkdir(parents=True)
    for number in range(count):
        picture = Image.new("RGB", size, (number % 200, number // 200 % 200, 90))
        for _ in range(4):
            at = chance.randrange(size[0] - 20), chance.randrange(size[1] - 20)
            picture.paste(chance.choice([(250, 20, 20), (20, 20, 250)]), (*at, at[0] + 16, at[1] + 16))
        held = io.BytesIO()
        picture.save(held, "JPEG", quality=95)
        # A comment of its own (JPEG marker FE): pictures that look alike are still two files.
        data = held.getvalue()
        (folder / f"{number:06d}.jpg").write_bytes(data[:2] + b"\xff\xfe\x00\x08%06d" % number + data[2:])
    return folder


def _tasks(workbench: Workbench, dataset: str) -> list[int]:
    project = workbench.server.project(dataset)
    return sorted(one["id"] for one in workbench.server.connection.pages("/api/tasks", project_id=project))


@contextmanager
def _detector(workbench: Workbench, model: str) -> Iterator[Any]:
    """The model opened for one image after the other: one stream with all cores, which answers soonest."""
    from workbench.inference.detector import Detector
    card, folder = workbench.models.card(model), workbench.models.folder(model)
    with Detector(card, folder, lambda graph: workbench.open_backend(graph, streams=1)) as detector:
        yield detector


def _part(name: str, **asked: Any) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, "--part", name, json.dumps(asked)], stdout=subprocess.PIPE,
                          text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _wait_for(workbench: Workbench, job: str, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + ROUND_S
    while workbench.jobs.get(job).state == "queued":
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"The worker took no job; its log is {workbench.config.home / 'worker.log'}")
        time.sleep(0.02)


def _seconds(status: Any) -> float:
    return (datetime.fromisoformat(status.finished_at) - datetime.fromisoformat(status.started_at)).total_seconds()


def _peak_mb() -> float:
    # In KiB (proc(5)); getrusage's figure would begin with that of the process this one was forked from.
    return round(int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024, 1)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

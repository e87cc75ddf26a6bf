"""Loads POST /v1/predict with concurrent callers and compares its rate with the pipeline's own on the same images.

The service is a process of its own, as `workbench up` starts it; the callers are threads here, each with a connection
that it keeps, sending one image a request (--batch: more). Whoever is refused with 429 asks again. The pipeline's
rate is that of inference.pipeline.detect_frames with the same plan, in this process, while the service idles.

Prints one JSON line, last: images_per_s; latency_ms_p50 and _p95 of answered requests, from the last attempt's first
byte sent; pipeline_images_per_s and of_pipeline; rejected (429 answers); errors (answers that were neither, or of
another image).
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from socket import socket
from typing import Any

import cv2
import numpy as np

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]

from workbench.config import Config  # noqa: E402
from workbench.dataset import Frame  # noqa: E402
from workbench.inference.detector import Detector  # noqa: E402
from workbench.inference.pipeline import decode_image, detect_frames  # noqa: E402
from workbench.model import ModelCard  # noqa: E402
from workbench.supervise import parts  # noqa: E402
from workbench.wiring import Workbench  # noqa: E402

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
START_S = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder of images; without it 64 JPEGs of 1280 x 720 are made")
    parser.add_argument("--model", type=Path, help="card.json with its files beside it; without it a tiny graph")
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1, help="images a request")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--queue", type=int, default=128)
    parser.add_argument("--workers", type=int, default=1, help="service processes")
    parser.add_argument("--backend", default="openvino")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="workbench-predict-") as folder:
        print(json.dumps(run(Path(folder), options)))


def run(home: Path, options: argparse.Namespace) -> dict[str, Any]:
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = Config(
        home=home,
        service_port=port,
        backend=options.backend,
        predict_queue=options.queue,
        service_workers=options.workers,
    )
    workbench = Workbench(config)
    images = (
        [file.read_bytes() for file in sorted(options.images.iterdir()) if file.suffix.lower() in SUFFIXES]
        if (options.images)
        else list(made())
    )
    card, model = (
        (ModelCard.from_json(json.loads(options.model.read_bytes())), options.model.parent)
        if options.model
        else (finder(home / "graph"))
    )
    workbench.models.register(card, model)
    pipeline = pipeline_rate(workbench, card, images, options.seconds)
    print(f"pipeline alone: {pipeline:.1f} images/s", file=sys.stderr)
    with service(config):
        figures = load(config, card.ref, images, options)
    return {
        **figures,
        "pipeline_images_per_s": round(pipeline, 2),
        "of_pipeline": round(figures["images_per_s"] / pipeline, 3),
        "model": card.ref,
        "callers": options.callers,
        "images_a_request": options.batch,
        "workers": options.workers,
        "cores": os.cpu_count(),
    }


def made() -> Iterator[bytes]:
    for seed in range(64):
        small = np.random.default_rng(seed).integers(0, 255, (18, 32, 3), np.uint8)
        yield cv2.imencode(".jpg", cv2.resize(small, (1280, 720), interpolation=cv2.INTER_CUBIC))[1].tobytes()


def finder(folder: Path) -> tuple[ModelCard, Path]:
    from doubles import graphs

    return graphs.red_finder(folder, side=320), folder


def pipeline_rate(workbench: Workbench, card: ModelCard, images: list[bytes], seconds: float) -> float:
    """Images a second of the pipeline that annotate uses, with the plan that predict uses."""
    folder = workbench.models.folder(card.ref)
    plan = workbench.plan_for(card, folder)
    sizes = [decode_image(image, "image").shape for image in images]
    stop = time.monotonic() + seconds

    def frames() -> Iterator[tuple[int, Frame]]:
        for number in count():
            if time.monotonic() > stop:
                return
            at = number % len(images)
            yield at, Frame(str(at), sizes[at][1], sizes[at][0], "0" * 32, "0" * 64, len(images[at]))

    with Detector(card, folder, plan.opening(workbench.open_backend), batch=plan.batch) as detector:
        started = time.monotonic()
        done = sum(
            1 for _ in detect_frames(detector, frames(), lambda frame: images[int(frame.name)], batch=plan.batch)
        )
        return done / (time.monotonic() - started)


@contextmanager
def service(config: Config) -> Iterator[None]:
    part = parts.part("service")
    process = subprocess.Popen(part.argv(config), cwd=config.home, env=parts.environment(config) | part.env)
    try:
        end = time.monotonic() + START_S
        while True:
            try:
                urllib.request.urlopen(f"{config.service}/alive", timeout=5).read()
                break
            except (OSError, urllib.error.URLError):
                if time.monotonic() > end or process.poll() is not None:
                    raise SystemExit("The service did not start.") from None
                time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.wait(30)


def load(config: Config, ref: str, images: list[bytes], options: argparse.Namespace) -> dict[str, Any]:
    bodies = [body([images[(at + more) % len(images)] for more in range(options.batch)]) for at in range(len(images))]
    truth = [
        ask(http.client.HTTPConnection("127.0.0.1", config.service_port, timeout=120), ref, one)[1] for one in bodies
    ]
    stop = time.monotonic() + options.seconds
    latencies: list[float] = []
    rejected, errors = [], []

    def call(caller: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", config.service_port, timeout=120)
        for number in count(caller * 7919):
            while True:
                if time.monotonic() > stop:
                    return
                started = time.monotonic()
                code, found = ask(connection, ref, bodies[number % len(bodies)])
                if code != 429:
                    break
                rejected.append(1)
                time.sleep(0.02)  # sooner than told, so that the queue is really pushed
            if code == 200 and alike(found, truth[number % len(bodies)]):
                latencies.append(time.monotonic() - started)
            else:
                errors.append(code)

    threads = [threading.Thread(target=call, args=(caller,)) for caller in range(options.callers)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - started
    ordered = statistics.quantiles(latencies, n=20) if len(latencies) > 1 else [0.0] * 19
    return {
        "images_per_s": round(len(latencies) * options.batch / seconds, 2),
        "latency_ms_p50": round(ordered[9] * 1000, 1),
        "latency_ms_p95": round(ordered[18] * 1000, 1),
        "requests": len(latencies),
        "rejected": len(rejected),
        "errors": len(errors),
    }


def body(images: list[bytes]) -> bytes:
    start = b'--bench\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
    return b"".join(start + image + b"\r\n" for image in images) + b"--bench--\r\n"


def ask(connection: http.client.HTTPConnection, ref: str, content: bytes) -> tuple[int, list[Any]]:
    connection.request(
        "POST", f"/v1/predict?model={ref}", content, {"Content-Type": "multipart/form-data; boundary=bench"}
    )
    answer = connection.getresponse()
    read = json.loads(answer.read())
    return answer.status, [[one["label"], *one["xyxy"]] for image in read["images"] for one in image["objects"]] if (
        answer.status == 200
    ) else []


def alike(one: list[Any], other: list[Any]) -> bool:
    """Whether the most confident objects are the same; a batch of another size may move a box by a hair."""
    return all(a[0] == b[0] and max(abs(x - y) for x, y in zip(a[1:], b[1:])) < 1 for a, b in zip(one[:1], other[:1]))


if __name__ == "__main__":
    main()

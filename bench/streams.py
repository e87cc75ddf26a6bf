"""How many cameras one model serves, how fairly, what that costs beside the model, and what the false-alarm filter takes away.

200 simulated cameras go through the same threads, slots, tracker and filter as real ones (workbench.steps.watch.serve).
Each has a background, posters (static lookalikes), people and cars that cross, stop and hide each other, lookalikes that
appear for a moment, an insect on the lens (far too large), and some a flickering lamp, a shaking mast or drifting light;
where every object is, is known.

Load: the cameras send --overload times what the model can serve, for at least 20 frames a camera; every frame served is
letterboxed, run, decoded, tracked and filtered.
  fairness        least / most frames served of a camera
  latency_ms_p95  from a frame's arrival in its camera's slot to its tracks and events
  overhead        (CPU time of the process - CPU time of drawing the simulated frames - model) / model, where model =
                  frames served x CPU time of one bare Backend.run on ready tensors, of the mean of two runs of
                  --bare-seconds, one before and one after, with as many callers. Everything else counts as overhead:
                  camera threads, slots, letterbox, decoding of boxes, NMS, tracking, motion, filter. What a real camera
                  adds is decoding its video, which depends on the camera and is not in here.
  overhead_wall   bare runs a second / frames served a second - 1, with the drawing of simulated frames inside

Truth: the same cameras at 4 frames a second for --truth-seconds, every frame, with a detector that really finds the
simulated objects. An alarm is true when its box has IoU >= 0.3 with an object that moves there then.
  false_alarms_before  tracks without an object, when every track raises an alarm; false_alarms_after: events of the filter
  events_true          objects visible for 2.5 s or more; events_true_found: those with an event, events_true_found_before:
                       those with a track at all, which no filter can add to

Without --model the load runs a generated graph: a trunk of about the cost of YOLOX-nano (random weights, its result
weighs next to nothing) and a head of fixed filters that finds the simulated objects; the truth part runs that head alone.
With --model CARD the load runs that model; with --labels too, its own kinds of objects are cut out of the labelled pictures
and drawn, and it also does the truth part, on --truth-cameras of them. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
from simulated_cameras import HEIGHT, WIDTH, SimulatedSource, World, backgrounds, cut_sprites, drawn_sprites, finder

from workbench.boxes import iou
from workbench.config import Config
from workbench.errors import WorkbenchError
from workbench.inference.alarms import Event, Scene
from workbench.inference.cameras import Camera
from workbench.inference.detector import Detector
from workbench.inference.streams import Arrived, Streams
from workbench.model import ModelCard
from workbench.steps.watch import low_thresholds, serve, sure_scores
from workbench.wiring import Workbench

ROUNDS, TRUTH_FPS, TRUE_IOU, VISIBLE_S = 20, 4.0, 0.3, 2.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cameras", type=int, default=200)
    parser.add_argument("--images", type=Path, help="a folder of pictures as backgrounds")
    parser.add_argument("--labels", type=Path, help="COCO JSON of those pictures: its objects are cut out and drawn")
    parser.add_argument("--model", type=Path, help="card.json of a model, its files beside it")
    parser.add_argument("--overload", type=float, default=2.0, help="frames sent / frames that can be served")
    parser.add_argument("--seconds", type=float, default=120.0, help="the load ends then even before 20 frames a camera")
    parser.add_argument("--bare-seconds", type=float, default=6.0)
    parser.add_argument("--truth-seconds", type=float, default=20.0, help="simulated time of the truth part")
    parser.add_argument("--truth-cameras", type=int, help="default: all, 10 where a given model does the truth part")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.cameras < 1 or (options.labels and not (options.images and options.model)):
        parser.error("--cameras must be 1 or more; --labels needs --images and --model")
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as scratch:
        workbench = Workbench(Config.read(home=Path(scratch) / "home"))
        try:
            print(json.dumps(measure(options, workbench, Path(scratch))))
        except WorkbenchError as error:
            parser.exit(1, f"{error}\n")


def measure(options: argparse.Namespace, workbench: Workbench, scratch: Path) -> dict[str, Any]:
    found = finder(scratch / "finder", trunk=False)
    card, folder = (ModelCard.from_json(json.loads(options.model.read_text())), options.model.parent) if (
        options.model) else finder(scratch / "loaded", trunk=True)
    pictures = backgrounds(options.images, options.seed)
    sprites = drawn_sprites(found[0].labels)
    if options.labels:
        sprites = cut_sprites(options.images, options.labels, card.labels)
    worlds = [World(pictures, sprites, options.seed * 10_007 + number) for number in range(options.cameras)]
    result = load(options, workbench, card, folder, worlds)
    if options.labels:
        truth = alarms(options, workbench, card, folder, worlds[:options.truth_cameras or 10])
    else:
        truth = alarms(options, workbench, *found, worlds[:options.truth_cameras or options.cameras])
    truth["truth_by"] = "the model" if options.labels else "a graph of fixed filters that finds the simulated objects"
    return {"cameras": options.cameras, "model": card.ref if options.model else "generated, of YOLOX-nano's cost",
            "cores": os.cpu_count(), **result, **truth}


def load(options: argparse.Namespace, workbench: Workbench, card: ModelCard, folder: Path,
         worlds: list[World]) -> dict[str, Any]:
    backends: list[Any] = []

    def opened(onnx: Any) -> Any:
        backends.append(workbench.open_backend(onnx))
        return backends[-1]

    with Detector(card, folder, opened, **low_thresholds(card)) as detector:
        workers = detector.streams
        tensors = [detector.prepare(world.frame(1.0)).tensor[None] for world in worlds[:16]]
        bare(backends[-1], tensors, workers, 1.0)
        before = bare(backends[-1], tensors, workers, options.bare_seconds)
        rate = options.overload * before["a_second"] / len(worlds)
        cameras = [Camera(f"sim-{number}", f"simulated-{number}", rate=min(max(rate, 0.01), 120.0))
                   for number in range(len(worlds))]
        sources: list[SimulatedSource] = []

        def source(camera: Camera) -> SimulatedSource:
            number = int(camera.name.removeprefix("sim-"))
            sources.append(SimulatedSource(worlds[number], rate, is_live=True, phase=number / len(worlds)))
            return sources[-1]

        scenes = [Scene(camera, card.labels, sure_scores(card)) for camera in cameras]
        stop, counts = threading.Event(), {"boxes": 0, "events": 0, "latency": []}
        began = time.monotonic()

        def handle(frame: Arrived, events: list[Event]) -> None:
            counts["boxes"] += len(scenes[frame.index].tracks)
            counts["events"] += len(events)
            counts["latency"].append(time.monotonic() - frame.arrived)

        with Streams(cameras, source) as streams:
            def enough() -> None:
                served = sum(one.served for one in streams.status())
                if served >= ROUNDS * len(cameras) or time.monotonic() - began > options.seconds:
                    stop.set()

            cpu, wall = time.process_time(), time.perf_counter()
            serve(streams, detector, scenes, handle, stop=stop, each_s=0.5, say=enough)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            status = streams.status()
        after = bare(backends[-1], tensors, workers, options.bare_seconds)
        report = vars(detector.report)
    served = [one.served for one in status]
    model_s = (before["cpu_s"] + after["cpu_s"]) / 2
    drawing = sum(source.cpu_s for source in sources)
    model = sum(served) * model_s
    latency = sorted(counts["latency"])
    bare_a_second = (before["a_second"] + after["a_second"]) / 2
    return {
        "fairness": round(min(served) / max(max(served), 1), 3), "overhead": round((cpu - drawing - model) / model, 4),
        "latency_ms_p95": round(latency[int(0.95 * (len(latency) - 1))] * 1000, 1) if latency else None,
        "latency_ms_max": round(latency[-1] * 1000, 1) if latency else None,
        "overhead_wall": round(bare_a_second / (sum(served) / wall) - 1, 4),
        "model_ms": round(model_s * 1000, 3),
        "harness_ms": round((cpu - drawing - model) / max(sum(served), 1) * 1000, 3),
        "drawing_ms": round(drawing / max(sum(served), 1) * 1000, 3), "bare_ms_before_after": [
            round(before["cpu_s"] * 1000, 3), round(after["cpu_s"] * 1000, 3)],
        "frames_per_s": round(sum(served) / wall, 1), "sent_per_s": round(rate * len(worlds), 1),
        "served": [min(served), max(served)], "dropped": sum(one.dropped for one in status),
        "tracks_a_frame": round(counts["boxes"] / max(sum(served), 1), 2), "backend": report["library"],
        "precision": report["precision"], "streams": workers}


def bare(backend: Any, tensors: list[np.ndarray], callers: int, seconds: float) -> dict[str, float]:
    """CPU seconds of one run, and runs a second, of the backend alone."""
    until, runs = time.perf_counter() + seconds, [0] * callers

    def call(number: int) -> None:
        while time.perf_counter() < until:
            backend.run(tensors[(runs[number] + number) % len(tensors)])
            runs[number] += 1

    cpu, wall = time.process_time(), time.perf_counter()
    threads = [threading.Thread(target=call, args=(number,)) for number in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"cpu_s": (time.process_time() - cpu) / sum(runs), "a_second": sum(runs) / (time.perf_counter() - wall)}


def alarms(options: argparse.Namespace, workbench: Workbench, card: ModelCard, folder: Path,
           worlds: list[World]) -> dict[str, Any]:
    cameras = [Camera(f"sim-{number}", f"simulated-{number}", rate=TRUTH_FPS, full_speed=True, size=(0.0005, 0.12))
               for number in range(len(worlds))]
    scenes = [Scene(camera, card.labels, sure_scores(card)) for camera in cameras]
    plain = [Scene(camera, card.labels, sure_scores(card), filters=False) for camera in cameras]
    raised: dict[str, list[tuple[int, Event]]] = {"before": [], "after": []}
    with Detector(card, folder, workbench.open_backend, **low_thresholds(card)) as detector:
        class Both:
            """The unfiltered tracks see the very boxes that the filtered ones see."""

            def __init__(self, number: int) -> None:
                self._number = number

            def update(self, image: np.ndarray, found: Any, time: float, seconds: float) -> list[Event]:
                for name, scene in (("before", plain[self._number]), ("after", scenes[self._number])):
                    raised[name] += [(self._number, event) for event in scene.update(image, found, time, seconds)]
                return []

        with Streams(cameras, lambda camera: SimulatedSource(
                worlds[int(camera.name.removeprefix("sim-"))], TRUTH_FPS, is_live=False,
                seconds=options.truth_seconds)) as streams:
            serve(streams, detector, [Both(number) for number in range(len(worlds))], lambda frame, events: None,
                  stop=threading.Event())
            frames = sum(one.served for one in streams.status())
    real = {name: [_object(worlds[number], event) for number, event in told] for name, told in raised.items()}
    visible = {(number, one) for number, world in enumerate(worlds)
               for one, seconds in world.visible(options.truth_seconds, 1 / TRUTH_FPS).items() if seconds >= VISIBLE_S}
    seen = {name: {(number, one) for (number, _), one in zip(told, real[name]) if one is not None}
            for name, told in raised.items()}
    causes: dict[str, int] = {}
    for (number, event), one in zip(raised["after"], real["after"]):
        if one is None:
            cause = worlds[number].cause(event.time, event.xyxy)
            causes[cause] = causes.get(cause, 0) + 1
    return {"false_alarms_before": real["before"].count(None), "false_alarms_after": real["after"].count(None),
            "events_true": len(visible), "events_true_found": len(visible & seen["after"]),
            "events_true_found_before": len(visible & seen["before"]),
            "events": len(raised["after"]), "false_alarms_after_causes": causes, "truth_cameras": len(worlds),
            "truth_frames": frames, "truth_fps": TRUTH_FPS, "truth_frame": f"{WIDTH}x{HEIGHT}"}


def _object(world: World, event: Event) -> int | None:
    """The number of the moving object that an event is about."""
    truth = world.truth(event.time)
    if not truth:
        return None
    overlap = iou(np.array([event.xyxy]), np.array([xyxy for _, xyxy in truth]))[0]
    return truth[int(overlap.argmax())][0] if overlap.max() >= TRUE_IOU else None


if __name__ == "__main__":
    main()

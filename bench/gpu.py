"""Everything the GPU path needs, in one command on a machine with an NVIDIA card, with figures.

    pip install ".[gpu]" && python bench/gpu.py --images DIR [--labels COCO.json] [--model card.json] [--minutes 5]

build    the model's engine as FP32 and as INT8, from nothing and from the cache; first under tensorrt_rtx where it is
         installed, which builds without a card and so says nothing of running
bare     the opened graph fed with ready pixels: latency of one image, images a second for batches of 1 to 64, with and
         without CUDA graphs, with one stream and with two (double-buffered)
agree    boxes on the pictures against OpenVINO on the CPU, from the same graph, one by one
mAP      of FP32 and INT8, with --labels
pipeline images a second from files to boxes, as annotate jobs run

Without --model NanoDet-Plus of the shared data is taken. A model that is not quantised is quantised here by its largest
activations on some of the pictures (`workbench quantize` chooses better). Without a usable GPU the reason is printed
and the last line says "measured": false. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from workbench.adapters.onnxruntime import OnnxRuntime  # noqa: E402
from workbench.adapters.openvino import OpenVINO  # noqa: E402
from workbench.adapters.tensorrt import TensorRT, rtx_library  # noqa: E402
from workbench.annotation import Annotation  # noqa: E402
from workbench.boxes import Detections  # noqa: E402
from workbench.dataset import Frame  # noqa: E402
from workbench.errors import Invalid, Unavailable, WorkbenchError  # noqa: E402
from workbench.evaluation.matching import match  # noqa: E402
from workbench.evaluation.metrics import score  # noqa: E402
from workbench.inference.calibration import Ranges, observed  # noqa: E402
from workbench.inference.detector import Detector  # noqa: E402
from workbench.inference.engine import EngineOptions, build, int8_layers  # noqa: E402
from workbench.inference.graph import Graph, file_record, quantized_layers, read_graph  # noqa: E402
from workbench.inference.known import card_for_nanodet  # noqa: E402
from workbench.inference.pipeline import decode_image, detect_frames  # noqa: E402
from workbench.inference.quantize import is_quantized, plan, prepare, quantize  # noqa: E402
from workbench.inference.standard import dynamic_batch, pixels_inside  # noqa: E402
from workbench.model import ModelCard  # noqa: E402
from workbench.taxonomy import Taxonomy  # noqa: E402

SHARED = PROJECT.parent / "shared" / "data"
BATCHES = (1, 2, 4, 8, 16, 32, 64)
CALIBRATING, COMPARED = 32, 50
# Where float32 is summed in another order, boxes move by far less; INT8 kernels round differently (shown, not judged).
TOLERANCE_PX, TOLERANCE_CONFIDENCE = 1.0, 0.02
# Measurements that share the minutes: 2 precisions x (3 ways of one image + 7 batches + 2 ways of double buffering).
PARTS = 2 * (3 + len(BATCHES) + 2)


@dataclass(frozen=True)
class Case:
    """A model in its standard form with a free batch axis; its card says so, its one file lies in `folder`."""

    name: str
    card: ModelCard
    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / self.card.onnx


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=SHARED / "images/coco_val100", metavar="DIR", help="pictures")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="their labels, COCO JSON: measures mAP too")
    parser.add_argument("--model", type=Path, metavar="CARD", help="card.json of a detector, its files beside it")
    parser.add_argument("--minutes", type=float, default=5, help="for all measurements together, building not counted")
    parser.add_argument("--device", type=int, default=0, help="number of the GPU")
    options = parser.parse_args(arguments)
    found: dict[str, Any] = {"measured": False, "python": platform.python_version(), "machine": platform.machine()}
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        try:
            frames, paths = _pictures(options.images)
            cases = _cases(options.model, frames, paths, Path(folder))
            found |= {"model": cases[0].card.ref, "pictures": len(frames), "build_check": _build_check(cases)}
        except WorkbenchError as error:
            return _end({**found, "reason": str(error)}, 1)
        open_gpu = partial(TensorRT, engines=Path(folder) / "engines", device=options.device)
        try:
            found |= _engines(cases, open_gpu)
        except Unavailable as error:
            print(f"Nothing is measured: {error}")
            return _end({**found, "reason": str(error)}, 0)
        seconds = options.minutes * 60 / (PARTS + 6)
        try:
            truth = _truth(options.labels) if options.labels else None
            for case in cases:
                found[case.name] |= _bare(case, open_gpu, seconds)
                found[case.name]["agrees_with_cpu"] = _agreement(case, open_gpu, frames[:COMPARED], paths)
                found[case.name] |= _pipeline(case, open_gpu, frames, paths, seconds * 3, truth)
                print(f"{case.name}: {json.dumps(found[case.name])}", flush=True)
        except WorkbenchError as error:
            return _end({**found, "reason": str(error)}, 1)
        if len(cases) == 2:
            best = [max(found[case.name]["images_per_s"].values()) for case in cases]
            found["int8_speedup"] = round(best[1] / best[0], 3)
    return _end({**found, "measured": True}, 0)


def _end(found: dict[str, Any], status: int) -> int:
    print(json.dumps(found))
    return status


def _pictures(folder: Path) -> tuple[list[Frame], dict[str, Path]]:
    frames, paths = [], {}
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png")):
        name = path.relative_to(folder).as_posix()
        height, width = decode_image(path.read_bytes(), name).shape[:2]
        frames.append(Frame(name, width, height, "0" * 32))
        paths[name] = path
    if not frames:
        raise Unavailable(f"There are no pictures in {folder}. Name a folder with --images.")
    return frames, paths


def _cases(card_file: Path | None, frames: list[Frame], paths: dict[str, Path], folder: Path) -> list[Case]:
    """The model as FP32 and as INT8; only as INT8 when it is quantised already."""
    if card_file is not None:
        card, beside = ModelCard.from_json(json.loads(card_file.read_text())), card_file.parent
    else:
        onnx = SHARED / "models" / "nanodet_plus_m" / "nanodet_plus_m_416.onnx"
        card, beside = card_for_nanodet(onnx, "nanodet-plus-m", size=(416, 416)), onnx.parent
    graph, spec = pixels_inside(read_graph(beside / card.onnx)[1], card.input)
    freed = dynamic_batch(graph)
    card = replace(card, input=spec, quantization={}, sample={})
    if is_quantized(freed):
        return [_case("int8", card, freed, folder)]
    given = _case("fp32", card, freed, folder)
    try:
        ready = prepare(freed)
        planned, ranges = plan(ready), Ranges()
    except Invalid as error:
        print(f"Only FP32: {error}")
        return [given]
    tensors = [tensor for site in planned.sites for tensor in site]
    detector = Detector(card, given.folder, OnnxRuntime)
    with OnnxRuntime(Graph(given.file, observed(ready, tensors))) as backend:
        for frame in frames[:CALIBRATING]:
            outputs = backend.run(detector.prepare(_pixels(frame, paths)).tensor[None])
            ranges.see({tensor: outputs[tensor] for tensor in tensors}, frame.name)
    print(f"{card.ref}: {len(planned.layers)} layers quantised on {min(len(frames), CALIBRATING)} pictures", flush=True)
    return [given, _case("int8", card, quantize(ready, planned, ranges.of("minmax")), folder)]


def _case(name: str, card: ModelCard, graph: Any, folder: Path) -> Case:
    import onnx

    (folder / name).mkdir()
    onnx.save(graph, str(folder / name / card.onnx))
    return Case(name, replace(card, files={card.onnx: file_record(folder / name / card.onnx)}), folder / name)


def _pixels(frame: Frame, paths: dict[str, Path]) -> np.ndarray:
    return decode_image(paths[frame.name].read_bytes(), frame.name)


def _build_check(cases: list[Case]) -> dict[str, Any]:
    """Building under tensorrt_rtx, for one generation of cards; it needs none."""
    try:
        library = rtx_library()
    except Unavailable as error:
        return {"built": False, "reason": str(error)}
    found: dict[str, Any] = {"built": True, "library": f"tensorrt_rtx {library.__version__}", "target": "SM86"}
    for case in cases:
        model, started = read_graph(case.file)[1], time.perf_counter()
        built = build(library, case.file, model, EngineOptions(targets=("SM86",)))
        found[case.name] = {"seconds": round(time.perf_counter() - started, 2), "engine_bytes": len(built.engine),
                            "int8_layers": len(int8_layers(built.layers)), "quantised": len(quantized_layers(model))}
    print(f"build check (building is not running): {json.dumps(found)}", flush=True)
    return found


def _engines(cases: list[Case], open_gpu: Callable[..., TensorRT]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for case in cases:
        seconds = []
        for _ in range(2):  # from nothing, then from the cache
            started = time.perf_counter()
            with open_gpu(case.file) as backend:
                seconds.append((round(time.perf_counter() - started, 3), backend.from_cache))
                report, failure = backend.report, backend.graph_failure
        found |= {"device": report.device, "library": report.library}
        found[case.name] = {"precision": report.precision, "build_s": seconds[0][0], "cache_hit_s": seconds[1][0],
                            "cache_hit": seconds[1][1], "cuda_graph": failure or True}
        print(f"{case.name}: {found[case.name]}", flush=True)
    return found


def _bare(case: Case, open_gpu: Callable[..., TensorRT], seconds: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, given in (("graph", {"graphs": True}), ("no_graph", {"graphs": False})):
        with open_gpu(case.file, streams=1, **given) as backend:
            times = np.array(list(_times(backend, _noise(backend, 1), seconds))) * 1000
            found[f"latency_ms_{name}"] = {"p50": round(float(np.percentile(times, 50)), 3),
                                           "p95": round(float(np.percentile(times, 95)), 3), "runs": len(times)}
    with open_gpu(case.file) as backend:
        found["images_per_s"] = {str(batch): round(_rate(backend, batch, seconds), 1)
                                 for batch in BATCHES if batch == 1 or backend.batch_is_dynamic}
    batch = 8 if "8" in found["images_per_s"] else 1
    found["double_buffering"] = {"batch": batch}
    for streams in (1, 2):
        with open_gpu(case.file, streams=streams) as backend:
            found["double_buffering"][f"streams_{streams}"] = round(_rate(backend, batch, seconds), 1)
    return found


def _noise(backend: Any, batch: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (batch, *backend.input_shape[1:]), np.uint8)


def _times(backend: Any, batch: np.ndarray, seconds: float) -> Iterator[float]:
    """Seconds of each run until `seconds` are over; one run is left out first."""
    backend.run(batch)
    end = time.perf_counter() + seconds
    while (started := time.perf_counter()) < end:
        backend.run(batch)
        yield time.perf_counter() - started


def _rate(backend: Any, batch: int, seconds: float) -> float:
    """Images a second, fed by one thread more than there are streams, so that none waits for its next batch."""
    canvas = _noise(backend, batch)
    with ThreadPoolExecutor(backend.streams + 1) as pool:
        list(pool.map(backend.run, [canvas] * (backend.streams + 1)))
        started = time.perf_counter()
        runs = sum(pool.map(lambda _: sum(1 for _ in _times(backend, canvas, seconds)) + 1, range(backend.streams + 1)))
        return runs * batch / (time.perf_counter() - started)


def _agreement(case: Case, open_gpu: Callable[..., TensorRT], frames: list[Frame],
               paths: dict[str, Path]) -> dict[str, Any]:
    """Each box that either finds at the card's confidence, against its partner among what the other finds at half."""
    sure = case.card.decoder.get("confidence", 0.3)
    found = []
    for opened in (open_gpu, OpenVINO):
        with Detector(case.card, case.folder, opened, confidence=sure / 2, confidence_by_label={}) as detector:
            found.append([detector.detect([_pixels(frame, paths)])[0] for frame in frames])
    boxes, alone, shifts, scores = 0, 0, [0.0], [0.0]
    for gpu, cpu in zip(*found):
        pairs = [pair for pair in match(gpu.xyxy, gpu.class_id, cpu.xyxy, cpu.class_id) if pair.is_same_label]
        mine, theirs = {pair.one for pair in pairs}, {pair.other for pair in pairs}
        boxes += int((gpu.confidence >= sure).sum())
        alone += _alone(gpu, mine, sure) + _alone(cpu, theirs, sure)
        for pair in pairs:
            if max(gpu.confidence[pair.one], cpu.confidence[pair.other]) >= sure:
                shifts.append(float(np.abs(gpu.xyxy[pair.one] - cpu.xyxy[pair.other]).max()))
                scores.append(float(abs(gpu.confidence[pair.one] - cpu.confidence[pair.other])))
    return {"pictures": len(frames), "boxes": boxes, "without_partner": alone, "shift_px_max": round(max(shifts), 3),
            "confidence_max": round(max(scores), 4), "tolerance": [TOLERANCE_PX, TOLERANCE_CONFIDENCE],
            "within": alone == 0 and max(shifts) <= TOLERANCE_PX and max(scores) <= TOLERANCE_CONFIDENCE}


def _alone(found: Detections, paired: set[int], sure: float) -> int:
    return sum(index not in paired for index in np.nonzero(found.confidence >= sure)[0].tolist())


def _pipeline(case: Case, open_gpu: Callable[..., TensorRT], frames: list[Frame], paths: dict[str, Path],
              seconds: float, truth: tuple[Taxonomy, dict[str, list[Annotation]]] | None) -> dict[str, Any]:
    """Files to boxes; the pictures are gone through again until `seconds` are over."""
    found: dict[str, Any] = {}
    with Detector(case.card, case.folder, open_gpu) as detector:
        count, started = 0, time.perf_counter()
        while not count or time.perf_counter() - started < seconds:
            for _, one in detect_frames(detector, ((frame.name, frame) for frame in frames),
                                        lambda frame: paths[frame.name].read_bytes(), batch=8):
                if isinstance(one, WorkbenchError):
                    raise one
                count += 1
        found["pipeline_images_per_s"] = round(count / (time.perf_counter() - started), 1)
    if truth is not None:
        taxonomy, drawn = truth
        ids = case.card.labels.map_to(taxonomy)
        labelled = [frame for frame in frames if frame.name in drawn]
        with Detector(case.card, case.folder, open_gpu, confidence=0.01, confidence_by_label={}) as detector:
            boxes = {name: _annotations(case.card, one, ids) for name, one in detect_frames(
                detector, ((frame.name, frame) for frame in labelled), lambda frame: paths[frame.name].read_bytes())
                if isinstance(one, Detections)}
        scored = score({frame.name: drawn[frame.name] for frame in labelled}, boxes, taxonomy)
        found |= {"map_50_95": round(scored.map_50_95, 4), "map_50": round(scored.map_50, 4)}
    return found


def _annotations(card: ModelCard, found: Detections, ids: Any) -> list[Annotation]:
    labels = dict(ids.pairs)
    return [Annotation(labels[card.labels.labels[class_id]], tuple(map(float, xyxy)), confidence=float(confidence),
                       source=card.source)
            for xyxy, class_id, confidence in zip(found.xyxy, found.class_id, found.confidence)
            if card.labels.labels[class_id] in labels]


def _truth(file: Path) -> tuple[Taxonomy, dict[str, list[Annotation]]]:
    record = json.loads(file.read_text())
    labels = {one["id"]: one["name"] for one in record["categories"]}
    names = {one["id"]: one["file_name"] for one in record["images"]}
    drawn: dict[str, list[Annotation]] = {name: [] for name in names.values()}
    for one in record["annotations"]:
        left, top, width, height = one["bbox"]
        if min(width, height) > 0:
            drawn[names[one["image_id"]]].append(Annotation(
                labels[one["category_id"]], (left, top, left + width, top + height), source="human:labels",
                attributes={"iscrowd": True} if one.get("iscrowd") else {}))
    return Taxonomy(tuple(dict.fromkeys(labels.values()))), drawn


if __name__ == "__main__":
    sys.exit(main())

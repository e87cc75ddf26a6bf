"""Images a second of annotating a folder of 1280x720 JPEGs, end to end, against what the machine could do at most and
against two ways people annotate today, with the same weights on the same images in alternating rounds.

ours      read, decode, letterbox, infer, decode boxes, NMS: inference/pipeline.py as annotate jobs use it
bare      the opened graph fed with ready tensors, as many runs at once as ours: no file, no decoding, no boxes
decode    our decode_image of the same files, whole, on all cores and nothing else
cvat_sdk  the loop of cvat_sdk.auto_annotation.annotate_task: PIL image, DetectionFunction.detect, the driver's own
          validate_and_remap. Left out in its favour: CVAT's server, download and upload.
fiftyone  Dataset.apply_model with a fiftyone.Model, on a real mongod; reading and saving samples are part of it

The rivals run the model's own file one image a call with all cores, normalise in numpy, and decode boxes with our
(fast) functions: in ONNX Runtime with its default settings, as its documentation shows (vs_cvat_sdk, vs_fiftyone), and in OpenVINO through our adapter (vs_cvat_sdk_openvino, vs_fiftyone_openvino).

Last line: JSON; images_per_s, of_limit = images_per_s / min(bare, decode), of_shared_limit = images_per_s * (1 / bare +
1 / decode): what is left of the limit that decoding whole images and inference have on the same cores (decoding at a
fraction may exceed it), vs_cvat_sdk, vs_fiftyone, and what they are made of.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]

from workbench.boxes import Detections  # noqa: E402
from workbench.dataset import Frame  # noqa: E402
from workbench.errors import WorkbenchError  # noqa: E402
from workbench.inference.decode import decode  # noqa: E402
from workbench.inference.detector import Detector  # noqa: E402
from workbench.inference.known import card_for_nanodet  # noqa: E402
from workbench.inference.letterbox import letterbox  # noqa: E402
from workbench.inference.nms import nms  # noqa: E402
from workbench.inference.pipeline import detect_frames  # noqa: E402
from workbench.inference.pixels import decode_image  # noqa: E402
from workbench.inference.probe import Plan, plan_for  # noqa: E402
from workbench.inference.standard import gain_and_shift  # noqa: E402
from workbench.model import ModelCard  # noqa: E402

SHARED = PROJECT.parent / "shared" / "data"
SIZE = (1280, 720)
# Of JPEGs made here; about 100 kB a frame, as network cameras send them. A higher quality takes longer to decode.
QUALITY = 80


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=SHARED / "images" / "coco_val100", help="folder of pictures")
    parser.add_argument("--model", type=Path, help="card.json, its files beside it; default: NanoDet-Plus of shared data")
    parser.add_argument("--rival-model", type=Path, help="card.json of what the rivals run, where --model is an INT8 "
                        "version: the FP32 file it was made from; default: --model")
    parser.add_argument("--count", type=int, default=200, help="frames a round; pictures are repeated to make as many")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backend", choices=("openvino", "onnxruntime"), default="openvino")
    parser.add_argument("--only-ours", action="store_true", help="leave the rivals out")
    parser.add_argument("--memory", type=int, metavar="N", help="only annotate N frames and tell the peak memory")
    options = parser.parse_args()
    card, folder = _model(options.model)
    theirs, their_folder = _model(options.rival_model) if options.rival_model else (card, folder)
    if theirs != card and theirs.files[theirs.onnx]["sha256"] != card.quantization.get("from_sha256"):
        parser.error(f"{card.ref} was not made from {theirs.ref}: rivals must have the same weights")
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        files = _jpegs(options.images, scratch / "frames", min(options.memory or options.count, options.count))
        threads = os.cpu_count() or 1
        opener = _opener(options.backend, threads)
        plan = plan_for(card, folder, opener, scratch / "plans.json", cores=threads)
        detector = stack.enter_context(Detector(card, folder, plan.opening(opener), batch=plan.batch))
        facts = {**vars(detector.report), "model": card.ref, "rival_model": theirs.ref, "batch": plan.batch,
                 "streams": detector.streams, "cores": threads, "frame": list(SIZE), "jpeg_quality": QUALITY}
        if options.memory:
            print(json.dumps({**_memory(detector, files, options.memory, plan), **facts}))
            return
        ways: dict[str, Callable[[], Any]] = {
            "ours": lambda: _ours(detector, files, plan), "bare": lambda: _bare(detector, len(files), plan),
            "decode": lambda: _decode(files, threads)}
        ways["ours"]()
        rss = _peak_mb()
        if not options.only_ours:
            in_fiftyone = stack.enter_context(_FiftyOne(theirs, files, scratch / "mongo"))
            for name, written in (("", Written(theirs, their_folder / theirs.onnx, "onnxruntime")),
                                  ("_openvino", Written(theirs, their_folder / theirs.onnx, "openvino"))):
                ways[f"cvat_sdk{name}"] = partial(_cvat_sdk, written, files)
                ways[f"fiftyone{name}"] = partial(in_fiftyone, written)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(options.rounds):
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - started)
                print(f"round {number + 1}: {name} {len(files) / seconds[name][-1]:.1f} images/s", flush=True)
    speed = {name: len(files) / statistics.median(taken) for name, taken in seconds.items()}
    limit = min(speed["bare"], speed["decode"])
    rivals = [name for name in speed if name.startswith(("cvat_sdk", "fiftyone"))]
    print(json.dumps({
        "images_per_s": round(speed["ours"], 1), "of_limit": round(speed["ours"] / limit, 3),
        "of_shared_limit": round(speed["ours"] * (1 / speed["bare"] + 1 / speed["decode"]), 3),
        **{f"vs_{name}": round(speed["ours"] / speed[name], 2) for name in rivals},
        "bare_images_per_s": round(speed["bare"], 1), "decode_limit_images_per_s": round(speed["decode"], 1),
        **{f"{name}_images_per_s": round(speed[name], 1) for name in rivals},
        "rss_mb": rss, "images": len(files), "rounds": options.rounds, **facts}))


def _model(card_file: Path | None) -> tuple[ModelCard, Path]:
    if card_file is not None:
        return ModelCard.from_json(json.loads(card_file.read_text())), card_file.parent
    onnx = SHARED / "models" / "nanodet_plus_m" / "nanodet_plus_m_416.onnx"
    return card_for_nanodet(onnx, "nanodet-plus-m", size=(416, 416)), onnx.parent


def _opener(backend: str, threads: int) -> Callable[..., Any]:
    if backend == "openvino":
        from workbench.adapters.openvino import OpenVINO as Adapter
    else:
        from workbench.adapters.onnxruntime import OnnxRuntime as Adapter
    return lambda source, streams=0, batch=1: Adapter(source, threads=threads, streams=streams, batch=batch)


def _jpegs(images: Path, folder: Path, count: int) -> list[Path]:
    """`count` files of 1280x720: JPEGs of that size as they are, others fitted into it on grey; repeated as links."""
    folder.mkdir(parents=True)
    sources = sorted(path for path in images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".bmp"))
    if not sources:
        sys.exit(f"{images} holds no pictures")
    made: list[Path] = []
    for index in range(count):
        file = folder / f"{index:06d}.jpg"
        source = sources[index % len(sources)]
        if index >= len(sources):
            file.symlink_to(made[index % len(sources)])
        else:
            image = cv2.imread(str(source))
            if (image.shape[1], image.shape[0]) == SIZE and source.suffix.lower() in (".jpg", ".jpeg"):
                file.symlink_to(source.resolve())
            else:
                cv2.imwrite(str(file), letterbox(image, SIZE)[0], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
        made.append(file)
    return made


def _ours(detector: Detector, files: Sequence[Path], plan: Plan) -> int:
    frames = ((path, Frame(path.name, *SIZE, blob="0" * 32)) for path in files)
    folder, boxes = files[0].parent, 0
    stream = detect_frames(detector, frames, lambda frame: (folder / frame.name).read_bytes(), batch=plan.batch)
    for _, found in stream:
        if isinstance(found, WorkbenchError):
            raise found
        boxes += len(found)
    return boxes


def _bare(detector: Detector, count: int, plan: Plan) -> None:
    width, height = detector.card.input.size
    ready = np.random.default_rng(0).integers(0, 256, (plan.batch, height, width, 3), np.uint8)
    runs = iter(range(-(-count // plan.batch)))  # next() of one iterator is atomic

    def work() -> None:
        for _ in runs:
            detector.outputs(ready)

    _in_threads(work, detector.streams)


def _decode(files: Sequence[Path], threads: int) -> None:
    waiting = iter(list(files))

    def work() -> None:
        for path in waiting:
            decode_image(path.read_bytes(), path.name)

    _in_threads(work, threads)


def _in_threads(work: Callable[[], None], count: int) -> None:
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Written:
    """A detector as the documentation of a runtime has one write it: one image a call, default settings."""

    def __init__(self, card: ModelCard, onnx: Path, runtime: str) -> None:
        self.card = card
        gain, shift = gain_and_shift(card.input)
        self._gain, self._shift = gain, shift
        self._least = np.full(len(card.labels), card.decoder.get("confidence", 0.3), np.float32)
        if runtime == "onnxruntime":
            import onnxruntime
            session = onnxruntime.InferenceSession(str(onnx), providers=["CPUExecutionProvider"])
            names = [output.name for output in session.get_outputs()]
            self._run = lambda tensor: dict(zip(names, session.run(None, {session.get_inputs()[0].name: tensor})))
        else:
            from workbench.adapters.openvino import OpenVINO
            # Its plain compile_model() breaks NanoDet and computes in bfloat16; through the adapter it is right, with
            # all cores on one image, which is what compile_model() gives.
            backend = OpenVINO(onnx, streams=1)
            self._run = backend.run

    def __call__(self, image: np.ndarray) -> Detections:
        """(H, W, 3) uint8 RGB -> what the model finds."""
        spec = self.card.input
        canvas, box = letterbox(image, spec.size, spec.padding, spec.pad)
        tensor = canvas if spec.colour == "RGB" else canvas[:, :, ::-1]
        if spec.dtype == "float32":
            tensor = tensor.astype(np.float32) * self._gain - self._shift
        if spec.layout == "NCHW":
            tensor = tensor.transpose(2, 0, 1)
        found = decode(self.card, self._run(np.ascontiguousarray(tensor[None])), self._least)[0]
        boxes = box.to_image(found.xyxy)
        kept = nms(boxes, found.confidence, found.class_id, self.card.decoder.get("iou", 0.6))
        return Detections(boxes[kept], found.class_id[kept], found.confidence[kept])


def _cvat_sdk(written: Written, files: Sequence[Path]) -> None:
    """annotate_task of cvat_sdk/auto_annotation/driver.py without its client: the loop over samples is its own."""
    import logging

    import cvat_sdk.auto_annotation as auto
    import PIL.Image
    from cvat_sdk import models
    from cvat_sdk.auto_annotation import driver

    labels = written.card.labels.labels
    spec = auto.DetectionFunctionSpec(labels=[auto.label_spec(label, index) for index, label in enumerate(labels)])
    in_task = [models.Label(id=100 + index, name=label, type="rectangle", attributes=[], sublabels=[])
               for index, label in enumerate(labels)]

    def detect(context: Any, image: PIL.Image.Image) -> list[Any]:
        found = written(np.asarray(image.convert("RGB")))
        return [auto.rectangle(int(class_id), [float(side) for side in xyxy])
                for class_id, xyxy in zip(found.class_id, found.xyxy)]

    mapper = driver._AnnotationMapper(logging.getLogger("cvat"), spec.labels, in_task, allow_unmatched_labels=False,
                                      conv_mask_to_poly=False)
    shapes: list[Any] = []
    for index, path in enumerate(files):
        with path.open("rb") as file:  # TaskDataset reads a chunk's member likewise
            image = PIL.Image.open(file)
            image.load()
        context = driver._DetectionFunctionContextImpl(frame_name=path.name, conf_threshold=None)
        shapes += mapper.validate_and_remap(detect(context, image), index)[1]


class _FiftyOne:
    """A data set of the files in a real MongoDB; called, it applies the model to all of them."""

    def __init__(self, card: ModelCard, files: Sequence[Path], folder: Path) -> None:
        self._labels, self._files, self._folder, self._stack = card.labels.labels, files, folder, ExitStack()

    def __enter__(self) -> Callable[[Written], None]:
        from parts_mongo import mongod
        os.environ.update(FIFTYONE_DATABASE_URI=self._stack.enter_context(mongod(self._folder)),
                          FIFTYONE_DO_NOT_TRACK="true", FIFTYONE_DATABASE_VALIDATION="false")
        import fiftyone as fo
        from fiftyone.core.models import Model
        labels, size = self._labels, np.array([*SIZE, *SIZE], float)

        class Wrapped(Model):
            def __init__(self, written: Written) -> None:
                self._written = written

            @property
            def media_type(self) -> str:
                return "image"

            def predict(self, image: np.ndarray) -> Any:
                found = self._written(image)
                boxes = found.xyxy / size
                boxes[:, 2:] -= boxes[:, :2]
                return fo.Detections(detections=[
                    fo.Detection(label=labels[class_id], bounding_box=box.tolist(),
                                 confidence=float(confidence))
                    for class_id, box, confidence in zip(found.class_id, boxes, found.confidence)])

        fo.config.show_progress_bars = False
        dataset = fo.Dataset()
        dataset.add_samples([fo.Sample(filepath=str(path)) for path in self._files])
        return lambda written: dataset.apply_model(Wrapped(written), label_field="predictions", skip_failures=False)

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()


def _memory(detector: Detector, files: Sequence[Path], count: int, plan: Plan) -> dict[str, Any]:
    def endless() -> Iterator[tuple[int, Frame]]:
        for index in range(count):
            yield index, Frame(f"{index}.jpg", *SIZE, blob="0" * 32)

    started, marks, boxes, failed = time.perf_counter(), {}, 0, 0
    stream = detect_frames(detector, endless(), lambda frame: files[int(frame.name[:-4]) % len(files)].read_bytes(),
                           batch=plan.batch)
    for index, found in stream:
        failed += isinstance(found, WorkbenchError)
        boxes += 0 if isinstance(found, WorkbenchError) else len(found)
        if index + 1 in (100, 1000, 10_000, count):
            marks[index + 1] = _peak_mb()
    return {"peak_mb": _peak_mb(), "peak_mb_after_frames": marks, "frames": count, "boxes": boxes, "failed": failed,
            "images_per_s": round(count / (time.perf_counter() - started), 1)}


def _peak_mb() -> float:
    # Linux counts it in KiB (getrusage(2)).
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


if __name__ == "__main__":
    main()

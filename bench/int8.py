"""What INT8 gains and costs on this CPU: speed and mAP of FP32 and INT8 versions of detectors, made as `quantize` makes
them.

Without options: YOLOX-nano and NanoDet-Plus on the unlabelled photographs beside the project, labelled by the confident
boxes of the other FP32 detector ("labels": "consensus of ..."). --model adds a detector of one's own; without --images
and --labels it is measured on the labelled cells beside the project. With --images and --labels everything is measured
on those. Frames are split by --seed where the data set has no test split of its own: what calibrates is never measured.

Speed is that of the bare graph in its standard form, fed with ready pixels, one stream per thread; FP32 and INT8 take
turns and medians count. The last line is JSON: {"models": {name: {"speedup", "map_fp32", "map_int8", ...}}}.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from workbench.adapters.onnxruntime import OnnxRuntime
from workbench.adapters.openvino import OpenVINO
from workbench.annotation import Annotation
from workbench.blobs import digests
from workbench.boxes import xywh_to_xyxy
from workbench.dataset import Frame, LabeledFrame
from workbench.errors import Invalid
from workbench.formats import read_labeled_folder
from workbench.inference.known import card_for_nanodet, card_for_yolox
from workbench.inference.pixels import decode_image
from workbench.model import InputSpec, ModelCard
from workbench.ports import Quiet
from workbench.steps.certify import HeldOut, Opened, detect, throughput
from workbench.steps.quantize import build, choose
from workbench.taxonomy import Taxonomy

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
BACKENDS = {"openvino": OpenVINO, "onnxruntime": OnnxRuntime}
# A box that the other detector is this sure of stands for a label.
SURE = 0.4
ROUNDS, ROUND_S = 7, 0.7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, action="append", default=[], metavar="CARD", help="card.json of a "
                        "detector, its files beside it; may be repeated")
    parser.add_argument("--images", type=Path, metavar="DIR", help="pictures to calibrate and measure on")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="their labels, COCO JSON")
    parser.add_argument("--only", action="store_true", help="only the models given with --model")
    parser.add_argument("--frames", type=int, default=100, help="most frames that calibrate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backend", choices=sorted(BACKENDS), default="openvino")
    parser.add_argument("--map-loss", type=float, default=0.005,
                        help="what mAP may fall by before layers go back to float")
    options = parser.parse_args()

    def open_backend(onnx: Any) -> Any:
        return BACKENDS[options.backend](onnx, threads=options.threads)

    found = {}
    with tempfile.TemporaryDirectory(prefix="int8-") as folder:
        for model, calibrating, held_out, labels in _cases(options, open_backend):
            made, report, chosen = quantised(model, calibrating, held_out, open_backend, Path(folder), options.frames,
                                             options.seed, {"loss": options.map_loss, "speedup": 0.0})
            speeds, _ = throughput({"fp32": model, "int8": made}, open_backend, ROUNDS, ROUND_S)
            facts = report["facts"]
            found[model.card.name] = {
                "speedup": round(speeds["int8"] / speeds["fp32"], 3), "map_fp32": round(facts["fp32"]["map_50_95"], 4),
                "map_int8": round(facts["int8"]["map_50_95"], 4), "metric": facts["metric"], "loss": round(facts["loss"], 4),
                "loss_interval": [round(value, 4) for value in facts["loss_interval"]],
                "images_per_s": {name: round(value, 1) for name, value in speeds.items()}, "labels": labels,
                "calibrated_on": len(chosen), "measured_on": facts["frames"], "box_shift_px": facts.get("box_shift_px"),
                "ranges": made.card.quantization["ranges"], "agreement": report["agreement"],
                "float_layers": len(made.card.quantization["float_layers"]), "attempts": len(report["attempts"]),
                "precision": facts["precision"], "library": facts["library"], "passed": facts["passed"],
                "reasons": facts["reasons"]}
            print(f"{model.card.name}: {found[model.card.name]}", flush=True)
    print(json.dumps({"device": facts["device"], "threads": options.threads, "models": found}))


def quantised(model: Opened, calibrating: list[LabeledFrame], held_out: HeldOut, open_backend: Callable[[Any], Any],
              folder: Path, frames: int = 100, seed: int = 0, limits: dict[str, float] | None = None) -> tuple[
                  Opened, dict[str, Any], list[LabeledFrame]]:
    """The INT8 version as the step `quantize` makes it, its report, and the frames that calibrated."""
    job = Told(model.card.name)
    chosen, rest = choose(model, calibrating, held_out, frames, seed, job)
    return *build(model, held_out, chosen, rest, seed, open_backend, job, folder, limits), chosen


def known_models() -> list[Opened]:
    nano, plus = DATA / "models/yolox_nano", DATA / "models/nanodet_plus_m"
    return [Opened(card_for_yolox(nano / "yolox_nano_416.onnx", "yolox_nano"), nano),
            Opened(card_for_nanodet(plus / "nanodet_plus_m_416.onnx", "nanodet_plus_m", size=(416, 416)), plus)]


def known_on_photographs(open_backend: Callable[[Any], Any], pictures: Path,
                         seed: int = 0) -> list[tuple[Opened, list[LabeledFrame], HeldOut, str]]:
    """YOLOX-nano and NanoDet-Plus on unlabelled pictures, each against the sure boxes of the other: (model, frames to
    calibrate on, frames to measure on, where the labels come from)."""
    known = known_models()
    frames, paths = _unlabelled(pictures)
    calibrating, held_out = _split(frames, known[0].card.labels, paths, seed)
    cases = []
    for model in known:
        others = [one for one in known if one is not model]
        labelled = replace(held_out, frames=_consensus(others, held_out, open_backend))
        cases.append((model, calibrating, labelled, "consensus of " + ", ".join(one.card.name for one in others)))
    return cases


class Told(Quiet):
    """A Job that prints what it logs."""

    def log(self, text: str) -> None:
        print(f"{self.id}: {text}", flush=True)


def _cases(options: argparse.Namespace, open_backend: Callable[[Any], Any]) -> list[tuple[Opened, list, HeldOut, str]]:
    """(model, frames to calibrate on, frames to measure on, where the labels come from) of everything to measure."""
    own = [_own(file) for file in options.model]
    if options.images and options.labels:
        known = [] if options.only else known_models()
        taxonomy, frames, files = _coco(options.images, options.labels)
        return [(model, *_split(frames, taxonomy, files, options.seed), str(options.labels))
                for model in (*own, *known)]
    cases = []
    for model in own:
        if options.images:
            raise Invalid(f"{options.images}: the labels are missing; give them with --labels (COCO JSON).")
        taxonomy, frames = read_labeled_folder(DATA / "bccd")
        files = {path.name: path for path in (DATA / "bccd").rglob("*.jpg")}
        paths = {one.frame.name: files[Path(one.frame.name).name] for one in frames}
        held_out = HeldOut("bccd/test", tuple(one for one in frames if one.split == "test"), taxonomy, _reader(paths))
        cases.append((model, [one for one in frames if one.split != "test"], held_out, "people (bccd)"))
    if not options.only:
        cases += known_on_photographs(open_backend, options.images or DATA / "images/coco_val100", options.seed)
    return cases


def _own(file: Path) -> Opened:
    """A card of the model store, or one that a recipe wrote."""
    record = json.loads(file.read_text())
    spec = dict(record["input"])
    spec["padding"] = str(spec.get("padding", "topleft")).removeprefix("letterbox-")
    spec["pad"] = spec.pop("pad_value", spec.get("pad", 114))
    known = {field.name for field in fields(InputSpec)} | {"width", "height"}
    return Opened(ModelCard.from_json({"version": "1", **record, "input": {
        name: value for name, value in spec.items() if name in known}}), file.parent)


def _consensus(others: list[Opened], held_out: HeldOut, open_backend: Callable[[Any], Any]) -> tuple[LabeledFrame, ...]:
    """The frames labelled with what the others are sure of; a box that two of them draw stands twice."""
    drawn: dict[str, list[Annotation]] = {one.frame.name: [] for one in held_out.frames}
    for other in others:
        for name, found in detect(other, held_out, open_backend, Quiet()).items():
            sure = found[found.confidence >= SURE]
            labels = other.card.labels.labels
            drawn[name] += [Annotation(labels[class_id], tuple(map(float, xyxy)), source=other.card.source)
                            for xyxy, class_id in zip(sure.xyxy, sure.class_id)]
    return tuple(replace(one, annotations=tuple(drawn[one.frame.name])) for one in held_out.frames)


def _unlabelled(folder: Path) -> tuple[list[LabeledFrame], dict[str, Path]]:
    frames, paths = [], {}
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png")):
        name = path.relative_to(folder).as_posix()
        height, width = decode_image(path.read_bytes(), name).shape[:2]
        frames.append(LabeledFrame(Frame(name, width, height, digests(path.read_bytes()).md5)))
        paths[name] = path
    return frames, paths


def _coco(folder: Path, labels: Path) -> tuple[Taxonomy, list[LabeledFrame], dict[str, Path]]:
    record = json.loads(labels.read_text())
    names = {one["id"]: one["name"] for one in record["categories"]}
    drawn: dict[int, list[Annotation]] = {one["id"]: [] for one in record["images"]}
    for one in record["annotations"]:
        if min(one["bbox"][2:]) > 0:
            drawn[one["image_id"]].append(Annotation(
                names[one["category_id"]], tuple(xywh_to_xyxy(np.array([one["bbox"]]))[0].tolist()),
                source="human:labels",
                attributes={"iscrowd": True} if one.get("iscrowd") else {}))
    frames, paths = [], {}
    for image in record["images"]:
        path = folder / image["file_name"]
        if path.is_file():
            height, width = decode_image(path.read_bytes(), image["file_name"]).shape[:2]
            frames.append(LabeledFrame(Frame(image["file_name"], width, height, digests(path.read_bytes()).md5),
                                       tuple(drawn[image["id"]])))
            paths[image["file_name"]] = path
    return Taxonomy(tuple(dict.fromkeys(names.values()))), frames, paths


def _split(frames: list[LabeledFrame], taxonomy: Taxonomy, paths: dict[str, Path],
           seed: int) -> tuple[list[LabeledFrame], HeldOut]:
    """Two fifths calibrate, three fifths are measured on."""
    order = np.random.default_rng(seed).permutation(len(frames))
    cut = len(frames) * 2 // 5
    calibrating, measured = ([frames[index] for index in sorted(part)] for part in (order[:cut], order[cut:]))
    return calibrating, HeldOut("photographs/held out", tuple(measured), taxonomy, _reader(paths))


def _reader(paths: dict[str, Path]) -> Callable[[Frame], bytes]:
    return lambda frame: paths[frame.name].read_bytes()


if __name__ == "__main__":
    main()

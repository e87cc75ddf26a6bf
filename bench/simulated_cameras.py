"""Simulated cameras with known truth, and a graph that really finds what they show; for bench/streams.py."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from workbench.errors import Invalid
from workbench.inference.graph import file_record
from workbench.inference.pipeline import decode_image
from workbench.inference.video import Grabbed
from workbench.model import InputSpec, ModelCard
from workbench.taxonomy import Taxonomy

WIDTH, HEIGHT, MARGIN = 640, 360, 16
SIDE, STRIDES = 416, (8, 16, 32)
# A person is 3 x 6 cells of a level, a car 6 x 3.
CELLS = {"person": (3, 6), "car": (6, 3)}
SCALE = WIDTH / SIDE


@dataclass(frozen=True)
class Sprite:
    """Pixels (h, w, 3) of an object and its label; is_giant: far larger than the scene's objects."""

    label: str
    pixels: np.ndarray
    is_giant: bool = False


@dataclass(frozen=True)
class _Thing:
    """Something drawn from `start` to `end` s: at (x, y) of its centre, moving by (dx, dy) a second, except while it
    stands from `stop` on for `stands` s. kind: "object", "poster", "ghost", "insect"."""

    kind: str
    sprite: Sprite
    start: float
    end: float
    x: float
    y: float
    dx: float = 0.0
    dy: float = 0.0
    stop: float = 0.0
    stands: float = 0.0

    def xyxy(self, t: float) -> tuple[float, float, float, float]:
        t = min(t, self.stop) if t < self.stop + self.stands else t - self.stands
        height, width = self.sprite.pixels.shape[:2]
        x, y = self.x + self.dx * (t - self.start), self.y + self.dy * (t - self.start)
        return x - width / 2, y - height / 2, x + width / 2, y + height / 2


class World:
    """One camera's scene, a function of time; the same seed is the same scene."""

    def __init__(self, pictures: list[np.ndarray], sprites: list[Sprite], seed: int) -> None:
        rng = np.random.default_rng(seed)
        self._background = pictures[rng.integers(len(pictures))]
        usual = [one for one in sprites if not one.is_giant]
        giants = [one for one in sprites if one.is_giant]

        def pick(of: list[Sprite]) -> Sprite:
            return of[rng.integers(len(of))]

        def place() -> tuple[float, float]:
            return float(rng.uniform(60, WIDTH - 60)), float(rng.uniform(70, HEIGHT - 70))

        things = [_Thing("poster", pick(usual), -1e9, 1e9, *place()) for _ in range(2)]
        start = float(rng.uniform(2, 5))
        for _ in range(2):
            speed, is_right = float(rng.uniform(45, 110)), rng.random() < 0.5
            stands = float(rng.uniform(2, 4)) if rng.random() < 0.3 else 0.0
            travel = (WIDTH + 160) / speed
            things.append(_Thing(
                "object", pick(usual), start, start + travel + stands, -80.0 if is_right else WIDTH + 80.0, place()[1],
                speed if is_right else -speed, float(rng.uniform(-6, 6)), start + travel * 0.5, stands))
            start += float(rng.uniform(2, 7))
        for _ in range(3):
            begin = float(rng.uniform(2, 20))
            things.append(_Thing("ghost", pick(usual), begin, begin + float(rng.uniform(0.2, 0.7)), *place()))
        if giants and rng.random() < 0.2:
            begin = float(rng.uniform(2, 15))
            things.append(_Thing("insect", pick(giants), begin, begin + 5, 150.0, HEIGHT / 2, 70.0, 3.0))
        self._things = things
        self._lamp = (*place(), float(rng.uniform(0.7, 4))) if rng.random() < 0.25 else None
        self._shake = float(rng.uniform(2, 6)) if rng.random() < 0.2 else 0.0
        self._drift = float(rng.uniform(10, 25)) if rng.random() < 0.2 else 0.0
        self._noise = rng.integers(0, 8, (HEIGHT + 64, WIDTH + 64, 3), np.uint8)

    def frame(self, t: float) -> np.ndarray:
        """(HEIGHT, WIDTH, 3) uint8 RGB."""
        x, y = self._offset(t)
        image = self._background[MARGIN - y:MARGIN - y + HEIGHT, MARGIN - x:MARGIN - x + WIDTH].copy()
        for thing in self._things:
            if thing.start <= t < thing.end:
                _paste(image, thing.sprite.pixels, *(round(value + by) for value, by in
                                                     zip(thing.xyxy(t)[:2], (x, y))))
        if self._lamp is not None:
            lx, ly, pace = self._lamp
            if int(t * pace * 2) % 2:
                part = image[max(0, round(ly) - 60):round(ly) + 60, max(0, round(lx) - 60):round(lx) + 60]
                cv2.add(part, (35, 35, 35, 0), part)
        if self._drift:
            level = self._drift * (1 + np.sin(t / 3))
            cv2.add(image, (level, level, level, 0), image)
        row, column = int(t * 977) % 64, int(t * 613) % 64
        return cv2.add(image, self._noise[row:row + HEIGHT, column:column + WIDTH])

    def truth(self, t: float) -> list[tuple[int, tuple[float, float, float, float]]]:
        """(number, xyxy in the frame) of the moving objects of which half or more is in the frame at that time."""
        x, y = self._offset(t)
        found = []
        for number, thing in enumerate(self._things):
            if thing.kind != "object" or not thing.start <= t < thing.end:
                continue
            x1, y1, x2, y2 = (value + by for value, by in zip(thing.xyxy(t), (x, y, x, y)))
            inside = (max(x1, 0), max(y1, 0), min(x2, WIDTH), min(y2, HEIGHT))
            area = max(0, inside[2] - inside[0]) * max(0, inside[3] - inside[1])
            if area >= 0.5 * (x2 - x1) * (y2 - y1):
                found.append((number, inside))
        return found

    def visible(self, seconds: float, step: float) -> dict[int, float]:
        """Number of each moving object -> for how long it is visible."""
        shown: dict[int, float] = {}
        for t in np.arange(0, seconds, step):
            for number, _ in self.truth(float(t)):
                shown[number] = shown.get(number, 0) + step
        return shown

    def cause(self, t: float, xyxy: tuple[float, ...]) -> str:
        """What a false alarm's box is about: the kind of the thing nearest to it, "nothing" when none is near."""
        centre = np.array([xyxy[0] + xyxy[2], xyxy[1] + xyxy[3]]) / 2
        nearest, kind = 80.0, "nothing"
        for thing in self._things:
            if thing.start - 1 <= t < thing.end + 1:
                box = thing.xyxy(t)
                away = float(np.hypot(*(np.array([box[0] + box[2], box[1] + box[3]]) / 2 - centre)))
                if away < nearest:
                    nearest, kind = away, thing.kind
        return kind

    def _offset(self, t: float) -> tuple[int, int]:
        return round(self._shake * np.sin(t * 7.3)), round(self._shake * 0.6 * np.sin(t * 5.1 + 1))


class SimulatedSource:
    """A camera (workbench.inference.video.Source) that shows a World; drawing happens only when a frame is used.

    fps      frames a second; is_live: at its own pace, with the clock of the process; else as fast as they are taken
    seconds  the end; None: never
    cpu_s    CPU seconds spent on drawing so far
    """

    is_lazy = True

    def __init__(self, world: World, fps: float, *, is_live: bool, phase: float = 0.0,
                 seconds: float | None = None) -> None:
        self.is_live, self.cpu_s = is_live, 0.0
        self._world, self._fps, self._seconds, self._number = world, fps, seconds, 0
        self._began = time.monotonic() + phase / fps

    def __enter__(self) -> SimulatedSource:
        return self

    def __exit__(self, *exc_info: object) -> None:
        return None

    def grab(self) -> Grabbed | None:
        t = self._number / self._fps
        self._number += 1
        if self._seconds is not None and t >= self._seconds:
            return None
        if self.is_live and (early := self._began + t - time.monotonic()) > 0:
            time.sleep(early)
        return Grabbed(t, t, lambda: self._draw(t))

    def _draw(self, t: float) -> np.ndarray:
        began = time.thread_time()
        image = self._world.frame(t)
        self.cpu_s += time.thread_time() - began
        return image


def backgrounds(folder: Path | None, seed: int, most: int = 40) -> list[np.ndarray]:
    """Pictures larger than a frame by MARGIN on each side: of a folder, else made of soft blobs and edges."""
    size = (WIDTH + 2 * MARGIN, HEIGHT + 2 * MARGIN)
    if folder is not None:
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))[:most]
        if not files:
            raise Invalid(f"{folder} has no .jpg or .png pictures.")
        return [cv2.resize(decode_image(path.read_bytes(), path.name), size, interpolation=cv2.INTER_AREA)
                for path in files]
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(12):
        grey = cv2.resize(rng.uniform(40, 150, (9, 16)).astype(np.float32), size, interpolation=cv2.INTER_CUBIC)
        tint = rng.uniform(0.9, 1.1, 3).astype(np.float32)
        image = np.clip(grey[:, :, None] * tint, 0, 255).astype(np.uint8)
        for _ in range(25):
            x, y, level = rng.integers(size[0]), rng.integers(size[1]), int(rng.integers(40, 180))
            cv2.rectangle(image, (int(x), int(y)), (int(x + rng.integers(10, 120)), int(y + rng.integers(10, 90))),
                          (level, level, level), -1)
        made.append(image)
    return made


def drawn_sprites(labels: Taxonomy) -> list[Sprite]:
    """Shaded red (person) and blue (car) bodies: near, middle and, as giants, on the lens."""
    sprites, rng = [], np.random.default_rng(1)
    for label in labels.labels:
        across, down = CELLS[label]
        for stride in STRIDES:
            for _ in range(2):
                grow = rng.uniform(0.92, 1.08)
                width, height = (max(8, round(cells * stride * SCALE * grow)) for cells in (across, down))
                shade = np.linspace(1.0, 0.75, height)[:, None] * rng.uniform(0.9, 1.0, (1, width))
                colour = (235, 20, 20) if label == "person" else (20, 20, 235)
                sprites.append(Sprite(label, (shade[:, :, None] * colour).astype(np.uint8), stride == STRIDES[-1]))
    return sprites


def cut_sprites(folder: Path, labels_file: Path, known: Taxonomy, most: int = 60) -> list[Sprite]:
    """The largest labelled objects that the model knows, cut out of their pictures, 60 to 150 px high."""
    document = json.loads(labels_file.read_text())
    names = {one["id"]: one["name"] for one in document["categories"]}
    files = {path.name: path for path in folder.rglob("*") if path.is_file()}
    images = {one["id"]: files.get(Path(one["file_name"]).name) for one in document["images"]}
    boxes = [one for one in document["annotations"] if names.get(one["category_id"]) in known.labels
             and images.get(one["image_id"]) is not None and min(one["bbox"][2:]) >= 24]
    sprites = []
    for one in sorted(boxes, key=lambda one: -min(one["bbox"][2:]))[:most]:
        file = images[one["image_id"]]
        x, y, width, height = map(round, one["bbox"])
        pixels = decode_image(file.read_bytes(), file.name)[max(0, y):y + height, max(0, x):x + width]
        scale = min(150, max(60, height)) / height
        scale = min(scale, 220 / width)
        if min(pixels.shape[:2]) >= 8:
            size = (max(8, round(pixels.shape[1] * scale)), max(8, round(pixels.shape[0] * scale)))
            sprites.append(Sprite(names[one["category_id"]], cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)))
    if not sprites:
        raise Invalid(f"{labels_file} has no object of 24 px or more of a label that the model knows.")
    return sprites


def finder(folder: Path, trunk: bool) -> tuple[ModelCard, Path]:
    """A detector of the fcos family that finds the drawn sprites by fixed filters: colour, then bright inside and dark
    around at each level's scale. With `trunk`, depthwise separable convolutions of about YOLOX-nano's cost run before
    it, and their result is added with a weight of 1e-6."""
    labels = tuple(CELLS)
    nodes = [helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
             helper.make_node("Transpose", ["floats"], ["chw"], perm=[0, 3, 1, 2])]
    mix = np.array([[1, -0.5, -0.5], [-0.5, -0.5, 1]], np.float32).reshape(2, 3, 1, 1) / 255
    constants = {"mix": mix, "gain": np.float32(14), "bias": np.float32(-14 * 0.33), "twenty": np.float32(20),
                 "zero": np.float32(0), "ten": np.float32(10), "flat": np.array([0, 2, -1], np.int64),
                 "flat4": np.array([0, 4, -1], np.int64), "one": np.array([1], np.int64), "nil": np.array([0], np.int64),
                 "two": np.array([2], np.int64), "least": np.float32(0), "most": np.float32(1),
                 "person_sides": np.array([1.5, 3, 1.5, 3], np.float32).reshape(1, 4, 1),
                 "car_sides": np.array([3, 1.5, 3, 1.5], np.float32).reshape(1, 4, 1)}
    nodes += [helper.make_node("Conv", ["chw", "mix"], ["colours"]),
              helper.make_node("Clip", ["colours", "least", "most"], ["masks"])]
    # Inside, minus what lies one cell around it: an object of another size, or a wall, gives little.
    filters = np.zeros((2, 1, 9, 9), np.float32)
    for at, label in enumerate(labels):
        across, down = CELLS[label]
        inner, outer = np.zeros((2, 10, 10), np.float32)
        x, y = (10 - across) / 2, (10 - down) / 2
        _fill(inner, x, y, x + across, y + down)
        _fill(outer, x - 1, y - 1, x + across + 1, y + down + 1)
        whole = inner / inner.sum() - (outer - inner) / (outer - inner).sum()
        # Cells are looked at from their middle, so the even grid is averaged onto the odd one.
        filters[at, 0] = (whole[:9, :9] + whole[1:, :9] + whole[:9, 1:] + whole[1:, 1:]) / 4
    constants["filters"] = filters
    parts: dict[str, list[str]] = {"cls": [], "box": []}
    for stride in STRIDES:
        s = str(stride)
        nodes += [
            helper.make_node("AveragePool", ["masks"], ["pooled" + s], kernel_shape=[stride] * 2, strides=[stride] * 2),
            helper.make_node("Conv", ["pooled" + s, "filters"], ["like" + s], pads=[4] * 4, group=2),
            helper.make_node("Mul", ["like" + s, "gain"], ["scaled" + s]),
            helper.make_node("Add", ["scaled" + s, "bias"], ["logits" + s]),
            helper.make_node("Reshape", ["logits" + s, "flat"], ["cls" + s])]
        parts["cls"].append("cls" + s)
    nodes += [
        helper.make_node("Concat", parts["cls"], ["all"], axis=2),
        helper.make_node("Slice", ["all", "nil", "one", "one"], ["persons"]),
        helper.make_node("Slice", ["all", "one", "two", "one"], ["cars"]),
        helper.make_node("Sub", ["persons", "cars"], ["rather"]),
        helper.make_node("Mul", ["rather", "ten"], ["sharp"]),
        helper.make_node("Sigmoid", ["sharp"], ["is_person"]),
        helper.make_node("Sub", ["most", "is_person"], ["is_car"]),
        helper.make_node("Mul", ["is_person", "person_sides"], ["tall"]),
        helper.make_node("Mul", ["is_car", "car_sides"], ["broad"]),
        helper.make_node("Add", ["tall", "broad"], ["sides"]),
        helper.make_node("Transpose", ["sides"], ["bbox_regression"], perm=[0, 2, 1]),
        helper.make_node("Transpose", ["is_person"], ["columns"], perm=[0, 2, 1]),
        helper.make_node("Mul", ["columns", "zero"], ["nought"]),
        helper.make_node("Add", ["nought", "twenty"], ["bbox_ctrness"])]
    if trunk:
        _add_trunk(nodes, constants)
    else:
        nodes.append(helper.make_node("Transpose", ["all"], ["cls_logits"], perm=[0, 2, 1]))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    graph = helper.make_graph(
        nodes, "finder", [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", SIDE, SIDE, 3])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in
         ("cls_logits", "bbox_regression", "bbox_ctrness")],
        [numpy_helper.from_array(value, name) for name, value in constants.items()])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    decoder = {"name": "fcos", "strides": list(STRIDES), "confidence": 0.5, "iou": 0.4,
               "score": "sigmoid(cls)*sigmoid(ctr)"}
    return ModelCard("finder", "1", InputSpec(size=(SIDE, SIDE)), decoder, Taxonomy(labels),
                     {path.name: file_record(path)}, licence="Apache-2.0"), folder


def _add_trunk(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray]) -> None:
    """CSPDarknet-nano's widths (YOLOX, exps/default/yolox_nano.py: depth 0.33, width 0.25, depthwise) as a plain chain."""
    rng, last = np.random.default_rng(0), "chw"

    def conv(inputs: int, outputs: int, kernel: int, stride: int, group: int = 1) -> None:
        nonlocal last
        name = f"conv{len(nodes)}"
        weights = rng.normal(0, (2 / (inputs // group * kernel ** 2)) ** 0.5, (outputs, inputs // group, kernel, kernel))
        constants[name + "_w"] = weights.astype(np.float32)
        nodes.append(helper.make_node("Conv", [last, name + "_w"], [name], kernel_shape=[kernel] * 2,
                                      strides=[stride] * 2, pads=[kernel // 2] * 4, group=group))
        nodes.append(helper.make_node("Sigmoid", [name], [name + "_s"]))
        nodes.append(helper.make_node("Mul", [name, name + "_s"], [name + "_silu"]))
        last = name + "_silu"

    constants["scale"] = np.float32(1 / 255)
    nodes.append(helper.make_node("Mul", [last, "scale"], ["unit"]))
    last = "unit"
    conv(3, 16, 6, 2)
    nodes[-3].attribute[2].ints[:] = [2, 2, 2, 2]
    width = 16
    for wider, depth in TRUNK:
        conv(width, width, 3, 2, width)
        conv(width, wider, 1, 1)
        for _ in range(depth):
            conv(wider, wider, 3, 1, wider)
            conv(wider, wider, 1, 1)
        width = wider
    constants["hardly"] = np.float32(1e-6)
    nodes.extend([
        helper.make_node("ReduceMean", [last], ["mean"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Tanh", ["mean"], ["bounded"]),
        helper.make_node("Mul", ["bounded", "hardly"], ["weighed"]),
        helper.make_node("Unsqueeze", ["weighed", "last_axes"], ["spread"]),
        helper.make_node("Transpose", ["all"], ["logits"], perm=[0, 2, 1]),
        helper.make_node("Add", ["logits", "spread"], ["cls_logits"])])
    constants["last_axes"] = np.array([1, 2], np.int64)


# (channels, blocks) after each halving; tuned so that a run takes as long as YOLOX-nano's on OpenVINO.
TRUNK = ((32, 6), (64, 12), (128, 12), (256, 6))


def _fill(grid: np.ndarray, x1: float, y1: float, x2: float, y2: float) -> None:
    """Sets each cell to the share of it that the box covers."""
    columns = np.clip(np.minimum(x2, np.arange(len(grid)) + 1) - np.maximum(x1, np.arange(len(grid))), 0, 1)
    rows = np.clip(np.minimum(y2, np.arange(len(grid)) + 1) - np.maximum(y1, np.arange(len(grid))), 0, 1)
    grid[:] = rows[:, None] * columns[None, :]


def _paste(image: np.ndarray, sprite: np.ndarray, x: int, y: int) -> None:
    left, top, right, bottom = max(0, -x), max(0, -y), min(sprite.shape[1], WIDTH - x), min(sprite.shape[0], HEIGHT - y)
    if left < right and top < bottom:
        image[y + top:y + bottom, x + left:x + right] = sprite[top:bottom, left:right]

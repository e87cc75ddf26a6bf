"""Models that draw polygons or set tags: human work stays, runs are undone exactly; no INT8 without certificate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from doubles import graphs
from doubles.annotation_server import MemoryServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workbench.adapters.local_models import LocalModels
from workbench.adapters.onnxruntime import OnnxRuntime
from workbench.annotation import Annotation, is_same_drawing, machine_annotation_id
from workbench.blobs import Blobs
from workbench.certificates import Certificates
from workbench.dataset import Frame, LabeledFrame, Manifest
from workbench.errors import Invalid
from workbench.inference.graph import file_record
from workbench.ports import Quiet
from workbench.records import Records
from workbench.run import RunWrite, WorkingFrame, propose, settle, touch, undo
from workbench.steps.annotate import AnnotateReport, annotate, undo_run
from workbench.steps.evaluate import evaluate
from workbench.taxonomy import Taxonomy

RED, BLUE = (255, 0, 0), (0, 0, 255)
LABELS = Taxonomy(("red", "blue", "dark"))


@dataclass(frozen=True)
class Stores:
    folder: Path
    models: LocalModels
    blobs: Blobs
    frames: tuple[LabeledFrame, ...]
    certificates: Certificates


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stores]:
    """Three wide pictures: a red disc, a blue square and a red disc, nothing; a mask model, a tag model and a finder."""
    folder = tmp_path_factory.mktemp("shapes")
    models, blobs, frames = LocalModels(folder / "models"), Blobs(str(folder / "blobs")), []
    for make in (graphs.red_masks, graphs.red_tags, graphs.red_finder):
        models.register(make(folder / make.__name__), folder / make.__name__)
    for number in range(3):
        image = np.zeros((256, 512, 3), np.uint8)
        if number < 2:
            cv2.circle(image, (128, 128), 60, RED, -1)
        if number == 1:
            image[64:192, 288:480] = BLUE
        made = blobs.put(cv2.imencode(".png", image[:, :, ::-1])[1].tobytes())
        frames.append(LabeledFrame(Frame(f"f{number}.png", 512, 256, made.md5, made.sha256, made.size_bytes)))
    yield Stores(folder, models, blobs, tuple(frames), Certificates(Records("sqlite://"), folder / "key"))


@pytest.fixture
def server(stores: Stores) -> MemoryServer:
    return filled(stores)


@pytest.fixture
def records() -> Records:
    return Records("sqlite://")


def filled(stores: Stores) -> MemoryServer:
    server = MemoryServer()
    server.open_task("shapes", LABELS)
    server.add_frames("shapes", [(one, Path("unused")) for one in stores.frames])
    return server


def run(stores: Stores, server: Any, records: Any, model: str, run_id: str = "run1", **more: Any) -> AnnotateReport:
    return annotate(
        "shapes",
        model,
        run_id=run_id,
        server=server,
        models=stores.models,
        blobs=stores.blobs,
        records=records,
        open_backend=lambda path: OnnxRuntime(path, threads=1),
        certificates=stores.certificates,
        job=Quiet(),
        **more,
    )


def state(server: MemoryServer) -> dict[str, WorkingFrame]:
    return {
        name: replace(working, revision="")
        for name, working in server.read("shapes", server.frame_names("shapes")).items()
    }


def test_a_mask_model_draws_polygons_in_the_frame_s_pixels(
    stores: Stores, server: MemoryServer, records: Records
) -> None:
    report = run(stores, server, records, "masks@1")
    assert (report.task, report.frames, report.boxes, report.by_label) == ("polygons", 3, 3, {"blue": 1, "red": 2})
    frames = state(server)
    assert frames["f2.png"].annotations == ()
    square = next(a for a in frames["f1.png"].annotations if a.label == "blue")
    # The frame is halved on the canvas, and a cell of the mask is 8 px there: the edge lies within half a cell.
    np.testing.assert_allclose(square.xyxy, (288, 64, 480, 192), atol=9)
    polygon = np.array(square.polygon)
    np.testing.assert_allclose([*polygon.min(axis=0), *polygon.max(axis=0)], square.xyxy, atol=9)
    (disc,) = frames["f0.png"].annotations
    far = np.hypot(*(np.array(disc.polygon) - 128).T)
    assert len(disc.polygon) >= 8 and far.min() > 45 and far.max() < 72 and disc.source == "model:masks@1"


def test_a_tag_model_tags_frames_and_draws_nothing(stores: Stores, server: MemoryServer, records: Records) -> None:
    report = run(stores, server, records, "tags@1")
    assert (report.task, report.boxes) == ("tags", 3)
    tags = {name: [(a.label, a.xyxy, a.polygon) for a in frame.annotations] for name, frame in state(server).items()}
    assert tags == {"f0.png": [("red", None, None)], "f1.png": [("blue", None, None)], "f2.png": [("dark", None, None)]}


@pytest.mark.parametrize("model", ["masks@1", "tags@1"])
def test_runs_of_shapes_are_taken_back_exactly_and_a_repeat_changes_nothing(
    stores: Stores, server: MemoryServer, records: Records, model: str
) -> None:
    before = state(server)
    run(stores, server, records, model)
    drawn = state(server)
    run(stores, server, records, model)
    assert state(server) == drawn
    run(stores, server, records, model, run_id="run2", statuses=("new", "annotated"))
    assert all(touch(frame).human == () for frame in state(server).values())
    undo_run("shapes", "run2", server=server, records=records, job=Quiet())
    assert state(server) == drawn
    undo_run("shapes", "run1", server=server, records=records, job=Quiet())
    assert state(server) == before


def test_a_polygon_a_person_moved_and_a_tag_a_person_removed_stay_so(
    stores: Stores, server: MemoryServer, records: Records
) -> None:
    run(stores, server, records, "masks@1")
    working = server.read("shapes", ["f0.png"])["f0.png"]
    (disc,) = working.annotations
    moved = replace(disc, polygon=tuple((x + 3, y) for x, y in disc.polygon))
    server.write("shapes", [replace(working, annotations=(moved,))])
    run(stores, server, records, "masks@1", run_id="run2", statuses=("annotated",))
    assert state(server)["f0.png"].annotations == (moved,)
    run(stores, server, records, "tags@1", run_id="run3", statuses=("annotated",))
    working = server.read("shapes", ["f2.png"])["f2.png"]
    server.write("shapes", [replace(working, annotations=())])
    run(stores, server, records, "tags@1", run_id="run4", statuses=("annotated",))
    assert state(server)["f2.png"].annotations == () and moved in state(server)["f0.png"].annotations


class TestTiling:
    def test_small_things_in_a_large_frame_are_found_in_pieces(self, stores: Stores, records: Records) -> None:
        image = np.zeros((256, 512, 3), np.uint8)
        image[40:50, 300:310] = RED  # 10 px: 1.25 px of the finder's input of 64 px
        made = stores.blobs.put(cv2.imencode(".png", image[:, :, ::-1])[1].tobytes())
        servers = {}
        for tiling in (None, {"size": 64, "overlap": 0.25}):
            server = servers[str(tiling)] = MemoryServer()
            server.open_task("shapes", LABELS)
            server.add_frames("shapes", [(LabeledFrame(Frame("large.png", 512, 256, made.md5)), Path("unused"))])
            run(stores, server, records, "finder@1", run_id=f"run {tiling}", tiling=tiling)
        whole, pieces = (state(server)["large.png"].annotations for server in servers.values())
        assert whole == () and len(pieces) >= 1
        assert all(280 < (a.xyxy[0] + a.xyxy[2]) / 2 < 330 and 25 < (a.xyxy[1] + a.xyxy[3]) / 2 < 65 for a in pieces)
        facts = records.entries("machine_runs", "shapes", "run {'size': 64, 'overlap': 0.25}")[-1].facts
        assert facts["tiling"] == {"size": 64, "overlap": 0.25}

    @pytest.mark.parametrize(
        ("model", "tiling", "said"),
        [
            ("masks@1", {"size": 64}, "draws polygons; only models that draw boxes"),
            ("tags@1", {"size": 64}, "draws tags; only models that draw boxes"),
            ("finder@1", {"overlap": 0.2}, "Give its size"),
            ("finder@1", {"size": 64, "gap": 1}, "got size, gap"),
            ("finder@1", {"size": 2}, "32..8192"),
            ("finder@1", {"size": 64, "overlap": 1.5}, "overlap 1.5"),
        ],
    )
    def test_a_tiling_that_makes_no_sense_is_invalid_and_nothing_is_written(
        self, stores: Stores, server: MemoryServer, records: Records, model: str, tiling: dict[str, Any], said: str
    ) -> None:
        with pytest.raises(Invalid, match=said):
            run(stores, server, records, model, tiling=tiling)
        assert records.entries("machine_runs") == [] and all(one.annotations is None for one in state(server).values())


def test_a_quantised_graph_without_a_certificate_may_not_annotate(
    stores: Stores, server: MemoryServer, records: Records
) -> None:
    """Whatever its card says: the Q/DQ nodes are in the graph."""
    card = stores.models.card("finder@1")
    model = onnx.load(str(stores.models.folder("finder@1") / card.onnx))
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    for name, value in (("scale", np.float32(0.5)), ("zero_point", np.int8(0))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value), name))
    source, conv.input[0] = conv.input[0], "pooled_dq"
    at = list(model.graph.node).index(conv)
    model.graph.node.insert(at, onnx.helper.make_node("QuantizeLinear", [source, "scale", "zero_point"], ["pooled_q"]))
    model.graph.node.insert(
        at + 1, onnx.helper.make_node("DequantizeLinear", ["pooled_q", "scale", "zero_point"], ["pooled_dq"])
    )
    folder = stores.folder / "int8"
    folder.mkdir()
    onnx.save(model, str(folder / card.onnx))
    stores.models.register(replace(card, name="sly", files={card.onnx: file_record(folder / card.onnx)}), folder)
    with pytest.raises(Invalid, match="sly@1 is an INT8 model without a certificate"):
        run(stores, server, records, "sly@1")
    assert records.entries("machine_runs") == [] and all(one.annotations is None for one in state(server).values())


def test_evaluation_of_tags_needs_tags_and_of_regions_takes_boxes_too(stores: Stores) -> None:
    class Versions:
        """One version with a labelled box in its test split."""

        def version(self, ref: str) -> Any:
            return Version()

        def manifest(self, ref: str) -> Manifest:
            box = Annotation("red", (68, 68, 188, 188), source="human:ann")
            return Manifest(LABELS, (replace(stores.frames[0], annotations=(box,), split="test"),))

    @dataclass(frozen=True)
    class Version:
        digest: str = "0"

    parts = {
        "models": stores.models,
        "store": Versions(),
        "blobs": stores.blobs,
        "tracker": None,
        "job": Quiet(),
        "open_backend": lambda path: OnnxRuntime(path, threads=1),
    }
    with pytest.raises(Invalid, match="has no tagged frame in its test split, and tags@1 draws tags"):
        evaluate("tags@1", "shapes@0.1.0", "test", **parts)
    # Where people drew boxes only, of polygons the box around them is scored.
    assert evaluate("masks@1", "shapes@0.1.0", "test", **parts).metrics.map_50 == pytest.approx(1)


FRAME = Frame("a.jpg", 100, 80, "0" * 32)
SPOTS = ((10.0, 10.0), (50.0, 40.0), (12.0, 50.0))


def shape(kind: str, spot: tuple[float, float], label: str, **fields: Any) -> Annotation:
    """A polygon of 20 x 16 px with the box around it, the polygon alone, or a tag."""
    x, y = spot
    corners = ((x, y), (x + 20, y + 2), (x + 18, y + 16), (x + 2, y + 14))
    drawn = {"both": {"polygon": corners, "xyxy": (x, y, x + 20, y + 16)}, "polygon": {"polygon": corners}, "tag": {}}[
        kind
    ]
    return Annotation(label, **drawn, **fields)


KINDS = st.sampled_from(("both", "polygon", "tag"))
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(("run", "run", "undo", "draw", "move", "delete")),
        st.integers(0, 9),
        KINDS,
        st.sampled_from(SPOTS),
        st.sampled_from(("red", "blue")),
    ),
    max_size=12,
)


@dataclass
class Played:
    """A frame after events on it, and what people did, told apart from the rules that are being tested."""

    working: WorkingFrame = field(default_factory=lambda: WorkingFrame(FRAME))
    hands: dict[str, Annotation] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)
    count: int = 0

    def play(self, what: str, at: int, kind: str, spot: tuple[float, float], label: str) -> None:
        drawn = list(self.working.annotations or ())
        target = drawn[at % len(drawn)] if drawn else None
        self.count += 1
        if what == "run":
            name = f"run{self.count}"
            proposals = tuple(
                shape(
                    kind,
                    where,
                    label,
                    source="model:m@1",
                    confidence=0.8,
                    id=machine_annotation_id(name, FRAME.name, index),
                )
                for index, where in enumerate((spot, SPOTS[0]))
            )
            self.working = propose(self.working, name, "model:m@1", proposals)
        elif what == "undo" and (standing := [one.run_id for one in self.working.runs if not one.is_undone]):
            self.working = undo(self.working, standing[-1])
        elif what == "draw":
            self._keep(shape(kind, spot, label, id=f"hand{self.count}"), drawn)
        elif what == "move" and target is not None:
            moved = replace(target, label="dark")
            if target.polygon is not None:
                moved = replace(
                    target, polygon=tuple((x + 5, y) for x, y in target.polygon), attributes={"touched_by": "human:ann"}
                )
            self._keep(moved, [a for a in drawn if a.id != target.id])
        elif what == "delete" and target is not None:
            self.hands.pop(target.id, None)
            self.deleted.add(target.id)
            self.working = replace(self.working, annotations=tuple(a for a in drawn if a.id != target.id))

    def _keep(self, made: Annotation, others: list[Annotation]) -> None:
        self.hands[made.id] = made
        self.working = replace(self.working, annotations=(*others, made))

    def check(self) -> None:
        now = {a.id: a for a in self.working.annotations or ()}
        for key, left in self.hands.items():
            assert key in now and is_same_drawing(now[key], left)
        assert not self.deleted & now.keys(), "what a person deleted came back"
        assert set(self.hands) <= {a.id for a in touch(self.working).human}
        assert {a.id: a.xyxy for a in settle(self.working, "ann")} == {key: a.xyxy for key, a in now.items()}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(EVENTS, KINDS, st.sampled_from(SPOTS))
def test_no_history_changes_a_person_s_polygons_and_tags_and_the_last_run_is_undone_exactly(
    events: list[Any], kind: str, spot: tuple[float, float]
) -> None:
    played = Played()
    for event in events:
        played.play(*event)
        played.check()
    before = played.working
    last = (shape(kind, spot, "red", source="model:m@2", confidence=0.9, id="last0"),)
    after = propose(before, "last", "model:m@2", last)
    assert propose(after, "last", "model:m@2", last) == after
    stored = replace(after, runs=tuple(RunWrite.from_json(one.to_json()) for one in after.runs))
    restored = undo(stored, "last")
    by_id = [None if one.annotations is None else {a.id: a for a in one.annotations} for one in (restored, before)]
    assert by_id[0] == by_id[1] and (restored.status, restored.runs) == (before.status, before.runs)

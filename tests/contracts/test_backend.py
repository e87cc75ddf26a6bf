"""What every Backend promises (workbench.ports.Backend), run on each adapter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from doubles import graphs
from onnx import helper

from workbench.adapters.onnxruntime import OnnxRuntime
from workbench.adapters.openvino import OpenVINO
from workbench.errors import Invalid, NotFound
from workbench.ports import Backend

Open = Callable[[Path], Backend]


@pytest.fixture(params=[OpenVINO, OnnxRuntime], ids=["openvino", "onnxruntime"])
def open_graph(request: pytest.FixtureRequest) -> Open:
    return lambda path: request.param(path, threads=1)


def test_a_batch_gives_every_output_by_name_as_new_float32_arrays(open_graph: Open, tmp_path: Path) -> None:
    images = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    with open_graph(graphs.affine(tmp_path / "m.onnx")) as backend:
        assert isinstance(backend, Backend)
        first = backend.run(images)
        kept = {name: value.copy() for name, value in first.items()}
        backend.run(images + 100)
    assert list(first) == ["double", "next"] and {value.dtype for value in first.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(first["double"], images * 2.0)
    np.testing.assert_array_equal(first["next"], images + 1.0)
    # The second run did not write into the arrays of the first.
    assert all(np.array_equal(first[name], kept[name]) for name in kept)


def test_batches_of_one_and_of_many_give_the_same_numbers(open_graph: Open, tmp_path: Path) -> None:
    card = graphs.red_finder(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3)).astype(np.uint8)
    with open_graph(tmp_path / card.onnx) as backend:
        assert backend.batch_is_dynamic
        many = backend.run(images)
        single = [backend.run(image[None]) for image in images]
    for name, value in many.items():
        # Sums of 64 floats in another order: their last bits may differ.
        np.testing.assert_allclose(value, np.concatenate([one[name] for one in single]), rtol=1e-5, atol=1e-5)


def test_the_report_tells_what_really_runs(open_graph: Open, tmp_path: Path) -> None:
    with open_graph(graphs.affine(tmp_path / "m.onnx")) as backend:
        assert backend.report.backend in backend.report.library and backend.report.precision == "f32"
        assert backend.report.device and any(letter.isdigit() for letter in backend.report.library)


def test_the_input_is_described_with_its_free_sides(open_graph: Open, tmp_path: Path) -> None:
    with open_graph(graphs.affine(tmp_path / "free.onnx")) as backend:
        assert (backend.input_name, backend.input_shape, backend.batch_is_dynamic) == ("images", (None, 2, 2, 3), True)
    with open_graph(graphs.affine(tmp_path / "fixed.onnx", batch=2)) as backend:
        assert (backend.input_shape, backend.batch_is_dynamic) == ((2, 2, 2, 3), False)


@pytest.mark.parametrize("batch", [np.zeros((1, 2, 2, 3), np.float32), np.zeros((1, 3, 2, 2), np.uint8),
                                   np.zeros((2, 2, 3), np.uint8), np.zeros((0, 2, 2, 3), np.uint8)],
                         ids=["dtype", "shape", "axes", "empty"])
def test_a_batch_of_another_shape_or_dtype_is_invalid(open_graph: Open, tmp_path: Path, batch: np.ndarray) -> None:
    with open_graph(graphs.affine(tmp_path / "m.onnx")) as backend:
        with pytest.raises(Invalid, match="m.onnx takes uint8"):
            backend.run(batch)


@pytest.mark.parametrize(
    "content", [b"", b"this is no graph", b"\x89PNG\r\n\x1a\n" + bytes(100)], ids=["empty", "text", "png"]
)
def test_a_file_that_is_no_onnx_graph_is_invalid_and_named(open_graph: Open, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.onnx").write_bytes(content)
    with pytest.raises(Invalid, match="broken.onnx"):
        open_graph(tmp_path / "broken.onnx")


def test_a_truncated_graph_is_invalid_and_named(open_graph: Open, tmp_path: Path) -> None:
    path = tmp_path / graphs.red_finder(tmp_path).onnx
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(Invalid, match="model.onnx"):
        open_graph(path)


def test_a_missing_file_is_not_found(open_graph: Open, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="absent.onnx"):
        open_graph(tmp_path / "absent.onnx")


def test_an_operator_nobody_knows_is_invalid(open_graph: Open, tmp_path: Path) -> None:
    graphs.save(
        tmp_path / "odd.onnx", [helper.make_node("Conjure", ["x"], ["y"])], {"x": ([1, 4], "float32")}, ["y"], {}
    )
    with pytest.raises(Invalid, match="odd.onnx"):
        open_graph(tmp_path / "odd.onnx")


def test_a_graph_with_two_inputs_is_invalid(open_graph: Open, tmp_path: Path) -> None:
    graphs.save(tmp_path / "two.onnx", [helper.make_node("Add", ["a", "b"], ["y"])],
                {"a": ([1, 4], "float32"), "b": ([1, 4], "float32")}, ["y"], {})
    with pytest.raises(Invalid, match="2 inputs"):
        open_graph(tmp_path / "two.onnx")


def test_weights_in_a_file_beside_the_graph_are_read_and_those_elsewhere_refused(
    open_graph: Open, tmp_path: Path
) -> None:
    inside = tmp_path / "model"
    inside.mkdir()
    model = onnx.load(graphs.shuffled(tmp_path / "m.onnx", [0, 1, 2]))
    onnx.save(model, str(inside / "m.onnx"), save_as_external_data=True, location="m.bin", size_threshold=0)
    assert (inside / "m.bin").exists()
    with open_graph(inside / "m.onnx") as backend:
        assert backend.run(np.ones((1, 3, 4, 4), np.float32))["sum"][0, 0, 0, 0] == 111
    (inside / "m.bin").rename(tmp_path / "m.bin")
    for location in ("../m.bin", str(tmp_path / "m.bin"), "linked.bin"):
        if location == "linked.bin":
            (inside / location).symlink_to(tmp_path / "m.bin")
        model = onnx.load(str(inside / "m.onnx"), load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                entry.value = location if entry.key == "location" else entry.value
        (inside / "away.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(Invalid, match="only a file beside it"):
            open_graph(inside / "away.onnx")


def test_a_closed_backend_refuses_to_run(open_graph: Open, tmp_path: Path) -> None:
    with open_graph(graphs.affine(tmp_path / "m.onnx")) as backend:
        pass
    with pytest.raises(Invalid, match="closed"):
        backend.run(np.zeros((1, 2, 2, 3), np.uint8))


@pytest.mark.parametrize(
    "order", [[0, 3, 1, 4, 2, 5], [0, 2, 4, 1, 3, 5], [5, 4, 3, 2, 1, 0]], ids=["2 groups", "3 groups", "reversed"]
)
def test_shuffled_channels_reach_the_next_convolution_in_their_order(
    open_graph: Open, tmp_path: Path, order: list[int]
) -> None:
    """OpenVINO 2026.4.1 folds the permutation into the convolution the wrong way round unless it is kept from it."""
    images = np.broadcast_to(np.arange(6, dtype=np.float32).reshape(1, 6, 1, 1), (1, 6, 4, 4)).copy()
    with open_graph(graphs.shuffled(tmp_path / "m.onnx", order)) as backend:
        result = backend.run(images)["sum"]
    assert result[0, 0, 0, 0] == sum(channel * 10 ** place for place, channel in enumerate(order))


def test_openvino_refuses_a_permutation_it_would_compute_wrongly(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="onnxruntime"):
        OpenVINO(graphs.shuffled(tmp_path / "m.onnx", [1, 2, 0]))


@pytest.mark.parametrize("adapter", ["openvino.OpenVINO", "onnxruntime.OnnxRuntime"])
def test_opening_a_graph_leaves_nothing_in_the_home_folder_and_starts_no_telemetry(
    adapter: str, tmp_path: Path
) -> None:
    path, home = graphs.affine(tmp_path / "m.onnx"), tmp_path / "home"
    home.mkdir()
    module, name = adapter.split(".")
    script = (f"import sys; from pathlib import Path; from workbench.adapters.{module} import {name}; "
              f"{name}(Path({str(path)!r}), threads=1); "
              "print([name for name in sys.modules if name.startswith('openvino_telemetry')])")
    told = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "HOME": str(home)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() == "[]" and list(home.iterdir()) == []

"""What every Backend promises (workbench.ports.Backend), run on each adapter."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from doubles import graphs, quantized
from onnx import helper, numpy_helper

from workbench.adapters.onnxruntime import OnnxRuntime
from workbench.adapters.openvino import OpenVINO
from workbench.errors import Invalid, NotFound
from workbench.inference.graph import Graph, read_graph
from workbench.ports import Backend

Open = Callable[..., Backend]


@pytest.fixture(params=[OpenVINO, OnnxRuntime], ids=["openvino", "onnxruntime"])
def open_graph(request: pytest.FixtureRequest) -> Open:
    return lambda path, **more: request.param(path, **{"threads": 1, **more})


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


def test_views_and_arrays_that_may_not_be_written_are_taken(open_graph: Open, tmp_path: Path) -> None:
    images = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    locked = images.copy()
    locked.flags.writeable = False
    with open_graph(graphs.affine(tmp_path / "m.onnx")) as backend:
        for given in (locked, locked[:1], np.frombuffer(images.tobytes(), np.uint8).reshape(images.shape), images[::-1],
                      images.transpose(0, 2, 1, 3), np.broadcast_to(images[:1], (4, 2, 2, 3))):
            np.testing.assert_array_equal(backend.run(given)["double"], given * 2.0)


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


def test_a_graph_in_memory_is_opened_like_its_file(open_graph: Open, tmp_path: Path) -> None:
    path = graphs.affine(tmp_path / "m.onnx")
    model = read_graph(path)[1]
    path.unlink()
    with open_graph(Graph(path, model)) as backend:
        assert backend.run(np.ones((1, 2, 2, 3), np.uint8))["next"].max() == 2
        with pytest.raises(Invalid, match=str(path)):
            backend.run(np.ones((1, 3, 2, 2), np.uint8))


@pytest.mark.parametrize(("threads", "streams", "expected"), [(2, 0, 2), (2, 1, 1), (1, 3, 3)])
def test_it_tells_how_many_runs_go_at_once(
    open_graph: Open, tmp_path: Path, threads: int, streams: int, expected: int
) -> None:
    with open_graph(graphs.affine(tmp_path / "m.onnx"), threads=threads, streams=streams) as backend:
        assert backend.streams == expected


@pytest.mark.parametrize("streams", [1, 2])
def test_threads_that_run_at_once_each_get_their_own_numbers(open_graph: Open, tmp_path: Path, streams: int) -> None:
    wrong: list[object] = []
    with open_graph(graphs.affine(tmp_path / "m.onnx"), threads=2, streams=streams) as backend:
        def work(number: int) -> None:
            try:
                for count in (1, 2, 1, 3) * 25:  # the batch it is made for, and others
                    images = np.full((count, 2, 2, 3), number, np.uint8)
                    found = backend.run(images)
                    if found["double"].shape != images.shape or (found["double"] != 2 * number).any():
                        wrong.append(found)
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_closing_waits_for_runs_under_way_and_turns_away_the_next(open_graph: Open, tmp_path: Path) -> None:
    card = graphs.red_finder(tmp_path)
    ends: list[object] = []
    backend = open_graph(tmp_path / card.onnx, streams=2)
    backend.__enter__()
    started = threading.Barrier(5)

    def work() -> None:
        started.wait()
        try:
            while True:
                ends.append(backend.run(np.zeros((1, 64, 64, 3), np.uint8))["cls_logits"].shape)
        except Exception as error:
            ends.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    started.wait()
    while len(ends) < 8:
        pass
    backend.__exit__(None, None, None)
    for thread in threads:
        thread.join(timeout=60)
    errors = [one for one in ends if isinstance(one, Exception)]
    assert len(errors) == 4 and all(isinstance(one, Invalid) and "closed" in str(one) for one in errors)
    assert {one for one in ends if isinstance(one, tuple)} == {(1, 64, 2)}
    backend.__exit__(None, None, None)  # closing twice does nothing


def test_a_graph_made_for_a_batch_still_takes_others(open_graph: Open, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3)).astype(np.uint8)
    card = graphs.red_finder(tmp_path)
    with open_graph(tmp_path / card.onnx) as single, open_graph(tmp_path / card.onnx, batch=4) as many:
        assert many.batch_is_dynamic and many.input_shape == (None, 64, 64, 3)
        for count in (4, 1, 5):
            for name, value in many.run(images[:count]).items():
                np.testing.assert_allclose(value, single.run(images[:count])[name], rtol=1e-5, atol=1e-5)


def quantised(path: Path, kind: type, zero: int) -> Path:
    """doubles.quantized's convolution, its output quantised right after it: ONNX Runtime has int8 kernels only for
    that, and for a Relu in between only where the zero point is the lowest level."""
    model = onnx.load(quantized.convolution(path, kind=kind, zero=zero))
    next(node for node in model.graph.node if node.op_type == "Relu").op_type = "Identity"
    model.graph.output[0].name = "levels"
    model.graph.node.extend([helper.make_node("QuantizeLinear", ["found", "out_s", "out_z"], ["found_q"]),
                             helper.make_node("DequantizeLinear", ["found_q", "out_s", "out_z"], ["levels"])])
    model.graph.initializer.extend([numpy_helper.from_array(np.float32(0.5), "out_s"),
                                    numpy_helper.from_array(kind(zero), "out_z")])
    onnx.save(model, path)
    return path


def expected_convolution(path: Path, images: np.ndarray) -> np.ndarray:
    """Q/DQ and the convolution of doubles.quantized in numpy: int8 is exact, so the sums are."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    lowest, highest = np.iinfo(constants["z"].dtype).min, np.iinfo(constants["z"].dtype).max
    zero = int(constants["z"])
    values = (np.clip(np.rint(images / constants["s"]) + zero, lowest, highest) - zero) * constants["s"]
    weights = constants["w"] * constants["w_s"][:, None, None, None]
    padded = np.pad(values, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.einsum("nchwij,ocij->nohw", windows, weights)


@pytest.mark.parametrize(("kind", "zero"), [(np.int8, 0), (np.int8, 7), (np.uint8, 128)])
def test_a_quantised_graph_gives_its_own_numbers_and_says_int8(
    open_graph: Open, tmp_path: Path, kind: type, zero: int
) -> None:
    # Beyond +-12.8 the activations saturate.
    images = np.random.default_rng(1).normal(0, 6, (1, 3, 16, 16)).astype(np.float32)
    path = quantised(tmp_path / "q.onnx", kind, zero)
    with open_graph(path) as backend:
        assert backend.report.precision == "int8"
        found = backend.run(images)["levels"]
    levels = np.array([np.iinfo(kind).min, np.iinfo(kind).max]) - zero
    difference = np.abs(found - np.clip(expected_convolution(path, images), *levels * 0.5))
    # Half a level of the output, and where an input lies between two levels one of those times the largest weight.
    assert difference.max() <= 0.25 + 0.1 * 1.27 + 1e-3 and difference.mean() < 0.15
    assert (np.abs(found) > 1).mean() > 0.5 and (found % 0.5 == 0).all()


def test_a_graph_whose_quantised_values_are_computed_with_in_float_says_f32(open_graph: Open, tmp_path: Path) -> None:
    """Weights that stay float leave nothing for an int8 kernel to do, whatever the Q/DQ nodes promise."""
    rng = np.random.default_rng(0)
    nodes = [helper.make_node("QuantizeLinear", ["images", "s", "z"], ["x_q"]),
             helper.make_node("DequantizeLinear", ["x_q", "s", "z"], ["x"]),
             helper.make_node("Conv", ["x", "w"], ["found"])]
    path = graphs.save(tmp_path / "half.onnx", nodes, {"images": ([1, 3, 16, 16], "float32")}, ["found"],
                       {"s": np.float32(0.1), "z": np.int8(0), "w": rng.normal(size=(8, 3, 3, 3)).astype(np.float32)})
    with open_graph(path) as backend:
        assert backend.report.precision == "f32"
        assert np.isfinite(backend.run(rng.normal(size=(1, 3, 16, 16)).astype(np.float32))["found"]).all()


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

"""bench/gpu.py: what it says where there is no GPU, and, on doubles, that every part of it runs to its end. The figures
a double gives mean nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from doubles import graphs
from doubles.cuda import Gpu
from onnx import helper, numpy_helper

from workbench.inference.graph import file_record

SCRIPT = Path(__file__).resolve().parents[3] / "bench" / "gpu.py"


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A detector with a layer to quantise, three pictures with one red cell each, and the boxes it finds there."""
    card, weights = graphs.red_finder(tmp_path / "model"), np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1)
    model = onnx.load(tmp_path / "model" / card.onnx)
    pool = next(node for node in model.graph.node if node.op_type == "AveragePool")
    pool.input[0] = "same"
    model.graph.node.insert(2, helper.make_node("Conv", ["chw", "eye"], ["same"], name="first"))
    model.graph.initializer.append(numpy_helper.from_array(weights, "eye"))
    onnx.save(model, tmp_path / "model" / card.onnx)
    record = {**card.to_json(), "files": {card.onnx: file_record(tmp_path / "model" / card.onnx)}}
    (tmp_path / "model" / "card.json").write_text(json.dumps(record))
    (tmp_path / "pictures").mkdir()
    truth = {"categories": [{"id": 1, "name": "red"}], "images": [], "annotations": []}
    for number in range(1, 4):
        image = np.zeros((64, 64, 3), np.uint8)
        image[16:24, 8 * number:8 * number + 8] = (0, 0, 255)
        cv2.imwrite(str(tmp_path / "pictures" / f"{number}.png"), image)
        truth["images"].append({"id": number, "file_name": f"{number}.png", "width": 64, "height": 64})
        truth["annotations"].append(
            {"id": number, "image_id": number, "category_id": 1, "bbox": [8 * number - 4, 12, 16, 16]})
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    return ["--images", str(tmp_path / "pictures"), "--labels", str(tmp_path / "truth.json"),
            "--model", str(tmp_path / "model" / "card.json"), "--minutes", "0.01"]


@pytest.mark.skipif(importlib.util.find_spec("pycuda") is not None, reason="pycuda is installed here")
def test_without_a_gpu_it_says_so_and_still_checks_the_build(arguments: list[str]) -> None:
    told = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    last = json.loads(told.stdout.splitlines()[-1])
    assert last["measured"] is False and 'pip install ".[gpu]"' in last["reason"] and last["reason"] in told.stdout
    check = last["build_check"]
    if check["built"]:
        assert check["fp32"]["engine_bytes"] > 1000 and check["fp32"]["int8_layers"] == 0
        assert check["int8"]["int8_layers"] >= 1
    else:
        assert "tensorrt-rtx" in check["reason"]


def test_a_folder_without_pictures_ends_with_its_reason(tmp_path: Path) -> None:
    told = subprocess.run([sys.executable, str(SCRIPT), "--images", str(tmp_path)], capture_output=True, text=True,
                          check=False)
    last = json.loads(told.stdout.splitlines()[-1])
    assert told.returncode == 1 and last["measured"] is False and "--images" in last["reason"]


def test_every_part_runs_to_its_end_on_doubles(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    bench = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_gpu", bench)
    spec.loader.exec_module(bench)
    gpu = Gpu().install(monkeypatch)
    assert bench.main(arguments) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["measured"] and last["device"] == "double" and last["int8_speedup"] > 0
    for name in ("fp32", "int8"):
        part = last[name]
        assert part["cache_hit"] and part["precision"] == "f32" and part["cuda_graph"] is True
        assert set(part["images_per_s"]) == {"1", "2", "4", "8", "16", "32", "64"}
        assert part["latency_ms_graph"]["p50"] <= part["latency_ms_graph"]["p95"]
        assert part["latency_ms_no_graph"]["runs"] > 0
        assert part["double_buffering"]["streams_1"] > 0 and part["double_buffering"]["streams_2"] > 0
        assert part["agrees_with_cpu"]["boxes"] == 3 and part["agrees_with_cpu"]["without_partner"] == 0
        assert part["pipeline_images_per_s"] > 0 and 0 <= part["map_50_95"] <= part["map_50"] <= 1
    assert last["fp32"]["agrees_with_cpu"]["within"] and last["fp32"]["map_50"] == 1
    assert {what: count for what, count in gpu.live.items() if count} == {}

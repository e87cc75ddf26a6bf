"""Tests on a real card; without one they skip and say why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from doubles import graphs

from workbench.adapters.tensorrt import TensorRT
from workbench.errors import Unavailable


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine cache of this session; skips where no engine can be opened."""
    folder = tmp_path_factory.mktemp("gpu")
    try:
        with TensorRT(graphs.affine(folder / "m.onnx"), folder / "engines"):
            return folder / "engines"
    except Unavailable as error:
        pytest.skip(f"needs an NVIDIA GPU with TensorRT: {error}")


@pytest.fixture
def open_graph(engines: Path) -> Any:
    # How many threads of the CPU and which batch a graph is compiled for means nothing here.
    return lambda path, threads=1, batch=1, **options: TensorRT(path, engines, **options)

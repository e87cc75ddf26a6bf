"""What every test may ask for: the shared data, and the smallest real parts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("FIFTYONE_DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("OMP_NUM_THREADS", "2")

PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data beside the project; tests that read it skip without it, unless that is forbidden."""
    folder = PROJECT.parent / "shared"
    if not folder.is_dir():
        reason = f"{folder} is not there; it holds the labelled photographs and recordings this test reads"
        if os.environ.get("WORKBENCH_REQUIRE_SHARED"):
            pytest.fail(reason)
        pytest.skip(reason)
    return folder

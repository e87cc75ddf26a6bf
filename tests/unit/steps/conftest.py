"""One MLflow server for all tests of the steps; it takes longer to start than most of them run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from parts import mlflow_server


@pytest.fixture(scope="session")
def mlflow_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as url:
        yield url

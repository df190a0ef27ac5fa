"""An engine and a wheel of questions."""

from __future__ import annotations

from pathlib import Path

import pytest

from herdgraph.runtimes import Engine
from support.request_files import small_wheel


@pytest.fixture(scope="session")
def engine(chunked_bundle: Path) -> Engine:
    return Engine.load(chunked_bundle, threads=1)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_wheel(tmp_path_factory.mktemp("questions"))

"""The hollow device, or the reason why these tests are skipped."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.hollow_cuda.device import hollow_device
from support.hollow_cuda.libraries import UnavailableError


@pytest.fixture(scope="session", autouse=True)
def device() -> None:
    """Every test here needs onnxruntime-gpu in an environment of its own, and gcc."""
    try:
        hollow_device()
    except UnavailableError as reason:
        pytest.skip(str(reason))


@pytest.fixture
def weights() -> Iterator[Path]:
    """Where files without contents are read fastest: ONNX Runtime does read all of their zeros, 34 GB of Maverick's."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as directory:
        yield Path(directory)

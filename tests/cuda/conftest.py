"""The hollow device, or the reason why these tests are skipped."""

from __future__ import annotations

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

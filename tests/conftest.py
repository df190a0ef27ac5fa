"""What every test needs: quiet, deterministic libraries, one thread, and captures that are kept.

Files that take long come first, so that two workers of pytest-xdist end together.
"""

from __future__ import annotations

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers with threads of their own slow each other tenfold

import hypothesis
import pytest
import torch
from less_telling import LESS_TELLING
from PIL import ImageFile

from benchmarks.peers import let_torchvision_import
from support import capture_cache

torch.set_num_threads(1)
let_torchvision_import()
capture_cache.install()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background job, and in all that a test starts
    signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("nightly", deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

LONGEST_FIRST = (
    "test_ranks", "test_cli", "test_parity", "test_fuzz", "test_sharded_build", "test_sharded_faults", "test_calibrate",
    "test_replicas", "test_native_wheel", "test_nccl", "test_tensorrt_runner", "test_sharded_engine", "test_capture",
    "test_checkpoint_meta", "test_sharded_prefixes", "test_tensorrt_builder", "test_tensorrt_shards", "test_trainer",
    "test_sharded_transport", "test_page", "test_coverage", "test_tensorrt_ranks",
)
"""Files by the time that they take."""
MANY = 3000
"""Tests of a run of everything."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort files, the tests of a file staying together and in order; what tells less is slow."""
    for item in items:
        if item.nodeid.startswith(LESS_TELLING):
            item.add_marker(pytest.mark.slow)
    gone = [name for name in LESS_TELLING if not any(item.nodeid.startswith(name) for item in items)]
    if gone and len(items) > MANY:
        raise pytest.UsageError(f"tests/less_telling.py names what is not there: {gone}")
    order = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _cut_off_pictures_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # llama_models sets it when it is imported

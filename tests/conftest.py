"""What every test needs: quiet, deterministic libraries and a torchvision that imports beside a CPU torch."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from benchmarks.peers import let_torchvision_import

let_torchvision_import()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)

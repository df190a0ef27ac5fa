"""What every test needs: quiet, deterministic libraries and a torchvision that imports beside a CPU torch."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from PIL import ImageFile

from benchmarks.peers import let_torchvision_import

let_torchvision_import()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background job, and in all that a test starts
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _cut_off_pictures_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # llama_models sets it when it is imported

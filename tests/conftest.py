"""What every test needs: quiet, deterministic libraries and a torchvision that imports beside a CPU torch."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

# PyPI's torchvision is linked against a CUDA torch: beside a CPU build its native operators are missing and even its
# import fails while it registers fakes for them. transformers' image processor (our oracle) needs none of them.
_TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")
for _operator in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, _operator):
        _TORCHVISION.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)

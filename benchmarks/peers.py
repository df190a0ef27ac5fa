"""Peers that tests and benchmarks compare with, and what it takes to import them."""

from __future__ import annotations

import torch

_KEPT_ALIVE: list[torch.library.Library] = []


def let_torchvision_import() -> None:
    """Make PyPI's torchvision importable beside a CPU torch; transformers imports it whenever it is installed.

    The wheel is linked against a CUDA torch. Beside a CPU build its native operators are missing, and its import
    fails while it registers fakes for two of them. transformers' image processor needs none of them.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    _KEPT_ALIVE.append(library)
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

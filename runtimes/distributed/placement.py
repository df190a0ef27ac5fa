"""Which GPU a rank takes."""

from __future__ import annotations

import os


def gpu_of(rank: int) -> int:
    """The GPU of a rank: one per rank of this machine. Where a process sees one GPU only, as under Ray, that is 0."""
    if len(os.environ.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1:
        return 0
    return int(os.environ.get("LOCAL_RANK", rank))

"""A checkpoint as one rank sees it: slices under the names of the whole, read without the bytes of other ranks.

A rotated checkpoint (``rotated.py``) may read from it: rotations act along the width of the residual stream, shards
along heads, F, experts and vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

from ..config.shard_plan import ShardPlan
from . import Checkpoint
from .tensors.narrow import parts_of


def sharded(checkpoint: Checkpoint, plan: ShardPlan, rank: int) -> Checkpoint:
    """What a rank holds of a checkpoint; its configuration stays that of the whole model."""
    held = {name: plan.parts(checkpoint.config, name, rank) for name in checkpoint.sources}
    return replace(checkpoint, sources={
        name: parts_of(checkpoint.sources[name], parts) for name, parts in held.items() if parts is not None
    })

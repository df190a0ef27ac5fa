"""What a build will need, known before it starts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..files import free_bytes
from ..model.config import HerdConfig
from ..model.config.names import Shape, expected_tensors
from ..model.config.parameter_counts import model_size
from ..model.config.shard_plan import ShardPlan, shapes_of_rank
from ..model.quantization.calibration_check import hessian_shapes
from ..model.quantization.packed_sizes import packed_bytes
from ..model.quantization.recipes import EMBEDDING, HEAD, Recipe
from .weights.parallel import workers
from .weights.stream import BLOCK_BYTES

GRAPH_MEMORY = 600 << 20
"""Memory of the exporter itself: torch, onnx and a graph without weights (see docs/building.md)."""

GRAPH_BYTES = 4 << 20
"""More than the graphs without weights, and the manifest, take on disk."""


@dataclass(frozen=True)
class MemoryPlan:
    """What a build will need.

    Attributes:
        parameters: parameters of the checkpoint.
        bundle_bytes: size of the bundle's weights.
        rank_bytes: of each rank of a bundle that is split, without the processor's files.
        free_bytes: free space where it will be written, None where that is not known.
        peak_memory_bytes: estimated peak memory of the build; it does not grow with the number of layers or experts,
            but with the cores that work on a matrix each.
    """

    parameters: int
    bundle_bytes: int
    rank_bytes: list[int]
    free_bytes: int | None
    peak_memory_bytes: int


def memory_plan(
    config: HerdConfig, output: Path, recipe: Recipe, shards: ShardPlan | None = None, *, float_bytes: int = 4,
    packed: bool = False, by_hessians: bool = False,
) -> MemoryPlan:
    """Plan a build of a configuration by a precision recipe, for all ranks when it is split.

    Args:
        config: the model.
        output: where the bundle will be.
        recipe: precision.
        shards: how the decoder is split, None for a whole one.
        float_bytes: of an element of a weight that stays in floating point.
        packed: weights are written as our own CPU operators read them.
        by_hessians: weights are rounded by the Hessians of a calibration.
    """
    ranks = bytes_of_ranks(config, recipe, shards or ShardPlan(), float_bytes=float_bytes, packed=packed)
    shapes = expected_tensors(config)
    expert = max((math.prod(shape[1:]) for name, shape in shapes.items() if ".experts." in name), default=0)
    return MemoryPlan(
        parameters=model_size(config).total,
        bundle_bytes=round(sum(ranks)),
        rank_bytes=[round(count) for count in ranks] if shards else [],
        free_bytes=free_bytes(output),
        peak_memory_bytes=GRAPH_MEMORY + 2 * workers() * max(BLOCK_BYTES, 4 * expert)
        + (_hessian_memory(config) if by_hessians else 0),
    )


def _hessian_memory(config: HerdConfig) -> int:
    """Of the largest Hessian one factor is made at a time, in doubles; every core rounds by another one."""
    largest = max(math.prod(shape[-2:]) for shape in hessian_shapes(config).values())
    return (8 + 4 + 4 + 4 * workers()) * largest


def bytes_of_ranks(
    config: HerdConfig, recipe: Recipe, plan: ShardPlan, *, float_bytes: int = 4, packed: bool = False
) -> list[float]:
    """Bytes of the weights of every rank. Arguments as in ``memory_plan``."""
    stored = partial(recipe.stored_bytes, float_bytes=float_bytes, packed=packed)
    # Where a rank has all of a tied table, our own CPU operators look up the head's rows (passes/native/tied_table.py).
    once = packed and not recipe.fp8 and plan.pipeline == 1 and not plan.splits_vocabulary(config.text)
    mixing = packed_bytes(config.text.hidden_size, config.text.hidden_size, None) if recipe.rotated else 0
    shared = mixing if once else None
    return [_stored_bytes(config, plan, rank, stored, shared) for rank in range(plan.world)]


def _stored_bytes(
    config: HerdConfig, plan: ShardPlan, rank: int, stored: Callable[[str, Shape], float], shared: int | None
) -> float:
    """Bytes of the weights of a rank.

    A tied table is stored twice, to be looked up and as the head, unless both read one copy: then ``shared`` is what
    that takes beside it.
    """
    shapes = shapes_of_rank(plan, config, rank)
    total = sum(stored(name, shape) for name, shape in shapes.items())
    table, stage = shapes.get(EMBEDDING), plan.stage_of(rank)
    if config.text.tie_word_embeddings and table is not None:
        is_looked_up, is_last = stage == 0 and shared is None, stage == plan.pipeline - 1
        total += stored(HEAD, table) + (shared or 0) if is_last else 0
        total -= 0 if is_looked_up else stored(EMBEDDING, table)
    return total

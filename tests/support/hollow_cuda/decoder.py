"""Decoders lowered for CUDA without their weights, and calls of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import onnx_ir as ir
import torch

from herdgraph.export.graph import capture
from herdgraph.export.passes import KeepStage, SplitWidth
from herdgraph.export.passes.shard.partition import partition_at_collectives
from herdgraph.export.targets.options import PlanOptions
from herdgraph.export.targets.registry import target_of
from herdgraph.model.config import HerdConfig
from herdgraph.model.config.shard_plan import ShardPlan
from herdgraph.model.quantization.recipes import RECIPES, Caches

from .device import Call

BLOCK = 128
"""Tokens of a cache block: the least that Flash attention reads in place with heads of 128."""
WIDTH = 8
"""Blocks of a sequence that block tables have room for."""
SESSION = {"ep.cuda.fpa_intb_gemm": "1"}
PROVIDER = {"use_tf32": "0"}
"""What decoders are loaded with."""


@dataclass
class _Zeros:
    """A checkpoint of zeros, which is asked for small tensors only."""

    config: HerdConfig
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str, index: Any = None) -> torch.Tensor:
        values = torch.zeros(1).expand(self.shapes[name])
        return values if index is None else values[index]


class _Calibration:
    """Every layer has keys and values between -1 and 1; Hessians are not read, as no weight is."""

    def knows_hessian(self, name: str) -> bool:
        del name
        return True

    def hessian(self, name: str, expert: int | None) -> torch.Tensor:
        del name, expert
        return torch.empty(0)

    def required_kv_amax(self, layer: int, *, observer: str | None = None) -> tuple[float, float]:
        del layer, observer
        return 1.0, 1.0


def lowered(config: HerdConfig, recipe: str, caches: Caches = "float", *, tower: bool = False) -> ir.Model:
    """A decoder, or an image tower, as the target ``cuda`` writes it, whatever its size: no weight is read."""
    model = capture.capture_vision(config) if tower else capture.capture_decoder(config)
    return _lower(model, config, recipe, caches)


def lowered_rank(
    config: HerdConfig, plan: ShardPlan, rank: int, recipe: str, caches: Caches = "float",
) -> list[ir.Model]:
    """The partitions of a rank's part of a decoder, in the order in which they run; no weight is read."""
    model = capture.capture_decoder(config)
    for split in (KeepStage(plan, rank, config.text.num_layers), SplitWidth(plan, rank, config)):
        split(model)
    return [partition.model for partition in partition_at_collectives(_lower(model, config, recipe, caches))]


def _lower(model: ir.Model, config: HerdConfig, recipe: str, caches: Caches) -> ir.Model:
    target, precision = target_of("cuda", replace(RECIPES[recipe], caches=caches))
    shapes = {str(name): tuple(value.shape.numpy()) for name, value in model.graph.initializers.items() if value.shape}
    capture.bind_weights(model, _Zeros(config, shapes))
    target.lower(model, precision, PlanOptions(), _Calibration())  # type: ignore[arg-type]
    return model


def call(name: str, chunk: int, parts: Sequence[tuple[int, int]], *, record: bool = False) -> Call:
    """A call of a lowered decoder.

    Args:
        name: in the report.
        chunk: tokens of an attention chunk.
        parts: tokens that each sequence already holds, and tokens that it gets.
        record: as a graph, too.
    """
    new = [count for _, count in parts]
    tokens, sequences = sum(new), len(parts)
    held = {"global": [past for past, _ in parts], "chunked": [past % chunk if chunk else past for past, _ in parts]}
    table = [[row * WIDTH + column for column in range(WIDTH)] for row in range(sequences)]
    values: dict[str, Any] = {
        "input_ids": [3] * tokens,
        "positions": [past + place for past, count in parts for place in range(count)],
        "cumulative_lengths": [0, *accumulate(new)],
        "logit_rows": [end - 1 for end in accumulate(new)],
    }
    for kind, lengths in held.items():
        values |= {f"past_lengths.{kind}": lengths, f"block_table.{kind}": table,
                   f"attention_metadata.{kind}": [max(new), WIDTH * BLOCK]}
    dims = {"tokens": tokens, "sequences": sequences, "sequences_plus_1": sequences + 1, "rows": sequences,
            "image_tokens": 0, "block_tokens": BLOCK}
    dims |= {f"{kind}_{what}": count for kind in held
             for what, count in (("blocks", WIDTH), ("pool", WIDTH * sequences))}
    return Call(name, dims, values, record)

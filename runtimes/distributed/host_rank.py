"""A rank on processors: values between partitions lie in the host's memory, and collectives see them as arrays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.blocks import block_check
from ..bundle.manifest import WEIGHTS, Bundle
from ..executors.options import ExecutorOptions
from ..executors.ort.decoder import Run
from ..executors.ort.load import runner_of
from ..executors.ort.session import Values, create_sessions, ort_value, run_bound
from ..executors.ort.weights import ResidentWeights
from ..kv_cache.pool import free_cache_bytes
from .collectives import Array, Collectives
from .partition import CapturedCall, Step, run_once
from .rank_graph import RankGraph, graphs_of
from .stage import Shard, stage_texts

SIZES = 4
"""Batch sizes whose buffers between partitions are kept."""


class HostRankGraph(RankGraph):
    """See the module, and ``DecoderGraph``.

    Args:
        bundle: a sharded one.
        link: this rank's exchanges.
        options: how sessions are made.
    """

    def __init__(self, bundle: Bundle, link: Collectives, options: ExecutorOptions) -> None:
        graphs = graphs_of(bundle, link.rank)
        self.weights = _weights_of(graphs[0])
        sessions = create_sessions(graphs, self.weights, provider=bundle.manifest.provider, options=options)
        super().__init__(bundle, link, sessions, ("cpu", 0))
        self._buffers: dict[int, Values] = {}

    def override(self, weights: ResidentWeights) -> None:
        """See ``DecoderGraph``."""
        self.weights_of_partition = [weights.values(one.session) for one in self.partitions]

    def bind(self, inputs: Values, outputs: Values) -> Run:
        """See ``DecoderGraph``."""
        shape = tuple(inputs["input_ids"].shape())
        is_list = len(shape) == 1
        sequences = inputs["cumulative_lengths"].shape()[0] - 1 if is_list else shape[0]
        shape = (1, *shape) if is_list else shape
        if shape[0] * shape[1] > sequences:
            return partial(run_once, self.steps(inputs, outputs, shape, None))
        kept = self._buffers_of(sequences)
        return CapturedCall(self.steps(inputs, outputs | kept, shape, kept))

    def steps(self, values: Values, outputs: Values, shape: tuple[int, ...], kept: Values | None) -> Iterator[Step]:
        """See ``RankGraph``; at last logits go to rank 0."""
        yield from super().steps(values, outputs, shape, kept)
        if self.returns_logits:
            yield partial(self.return_logits, outputs["logits"].numpy())

    def run(self, session: Any, io: Any, values: tuple[Values, ...]) -> None:
        """See ``RankGraph``."""
        run_bound(session, io, values)

    def seen(self, value: Any) -> Array:
        """See ``RankGraph``."""
        array: Array = value.numpy()
        return array

    def empty(self, name: str, shape: tuple[int, ...]) -> Any:
        """See ``RankGraph``: all that is exchanged is in float32."""
        del name
        return ort_value(np.empty(shape, np.float32))

    def _buffers_of(self, batch: int) -> Values:
        """Values between partitions in calls of one token for each of so many sequences, which share them."""
        if batch not in self._buffers and len(self._buffers) == SIZES:
            del self._buffers[next(iter(self._buffers))]
        return self._buffers.setdefault(batch, {})


def load_host_rank(bundle: Bundle, link: Collectives, options: ExecutorOptions) -> Shard:
    """A rank's runner on ONNX Runtime.

    Args:
        bundle: a sharded one.
        link: this rank's exchanges.
        options: how sessions are made.
    """
    cache_bytes = _cache_bytes(link, options)
    graph = HostRankGraph(bundle, link, options)
    plan, config = graph.plan, bundle.manifest.config
    # As many batches as stages: large batches run in so many parts.
    stages = stage_texts(plan, config.text)
    runner = runner_of(graph, replace(config, text=stages[plan.stage_of(link.rank)]), batches=plan.pipeline,
                       check=block_check([bundle.block_hashes(graph.weights)]) if options.check_blocks else None,
                       cache_bytes=cache_bytes, stages=stages)
    return Shard(runner, graph)


def _cache_bytes(link: Collectives, options: ExecutorOptions) -> int:
    """What keys and values may use on every rank: as rank 0 says, which decides about the blocks of all.

    Ranks of one machine would each take half of what is free.
    """
    each = free_cache_bytes() // link.world if options.cache_bytes is None else options.cache_bytes
    count = np.array([each], np.int64)
    link.broadcast(count)
    return int(count[0])


def _weights_of(graph: Path) -> Path:
    """The one weight file of a rank's partitions, ``decoder.data`` beside ``decoder.00.onnx``."""
    return graph.with_suffix("").with_suffix(WEIGHTS)

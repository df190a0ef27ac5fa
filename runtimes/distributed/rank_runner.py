"""Runs what one rank holds of a decoder: partitions of its graph on ONNX Runtime, collectives between them.

A call runs the partitions in order. Every value that crosses from one partition to another lies in memory that ONNX
Runtime allocates once and that collectives work on as it is: a sum over the ranks replaces its own part. Calls that
come again (a token of a sequence, of a batch) are recorded with their bindings and replayed; all of one size share
these buffers, for calls never overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.blocks import block_check
from ..bundle.manifest import WEIGHTS, Bundle
from ..bundle.shards import CollectiveOp, PartitionEntry
from ..executors.options import ExecutorOptions
from ..executors.ort.decoder import Run
from ..executors.ort.load import runner_of
from ..executors.ort.session import Values, create_sessions, ort_value, run_bound
from ..executors.ort.weights import ResidentWeights
from .collectives import Collectives
from .stage import Shard, Stage

SIZES = 4
"""Batch sizes whose buffers between partitions are kept."""

Step = Callable[[], None]


@dataclass(frozen=True)
class Partition:
    """A part of the graph between two collectives, ready to run.

    Attributes:
        session: runs it.
        inputs: names, in order.
        outputs: names, in order.
        entry: what the manifest says: hidden states [B, T, D] that come from the stage before it, collectives after it.
    """

    session: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    entry: PartitionEntry

    @classmethod
    def of(cls, session: Any, entry: PartitionEntry) -> Partition:
        """A session with its entry."""
        items = session.get_inputs(), session.get_outputs()
        inputs, outputs = (tuple(item.name for item in side) for side in items)
        return cls(session, inputs, outputs, entry)

    @property
    def between(self) -> list[str]:
        """Names of what it receives, computes or exchanges; not of caches and logits, which belong to a sequence."""
        received = (exchange.value for exchange in self.entry.before)
        results = (exchange.result for exchange in self.entry.after if exchange.result)
        names = (*received, *self.outputs, *results)
        return [name for name in names if name != "logits" and not name.startswith("present.")]


class RankGraph(Stage):
    """A rank's partitions of the decoder with the collectives between them; see ``DecoderGraph``.

    Args:
        bundle: a sharded one.
        link: this rank's exchanges.
        options: how sessions are made.
    """

    def __init__(self, bundle: Bundle, link: Collectives, options: ExecutorOptions) -> None:
        shards = bundle.manifest.shards
        assert shards is not None, "a whole bundle has no ranks"
        entries = shards.ranks[link.rank].partitions
        graphs = [bundle.directory / entry.graph for entry in entries]
        self.path, self.weights = graphs[0], _weights_of(graphs[0])
        sessions = create_sessions(graphs, self.weights, provider=bundle.manifest.provider, options=options)
        super().__init__(link, shards.plan)
        self._width = bundle.manifest.config.text.hidden_size
        self._weights_of_partition: list[Values] = [{} for _ in sessions]
        self._partitions = [Partition.of(session, entry) for session, entry in zip(sessions, entries, strict=True)]
        self._last_use = {name: index for index, one in enumerate(self._partitions) for name in one.inputs}
        self._buffers: dict[int, Values] = {}

    def override(self, weights: ResidentWeights) -> None:
        """See ``DecoderGraph``."""
        self._weights_of_partition = [weights.values(one.session) for one in self._partitions]

    @property
    def inputs(self) -> list[Any]:
        """See ``DecoderGraph``."""
        return list({item.name: item for one in self._partitions for item in one.session.get_inputs()}.values())

    def bind(self, inputs: Values, outputs: Values) -> Run:
        """See ``DecoderGraph``."""
        shape = tuple(inputs["input_ids"].shape())
        is_list = len(shape) == 1
        sequences = inputs["cumulative_lengths"].shape()[0] - 1 if is_list else shape[0]
        shape = (1, *shape) if is_list else shape
        if shape[0] * shape[1] > sequences:
            return partial(_run_once, self._steps(inputs, outputs, shape, None))
        kept = self._buffers_of(sequences)
        return CapturedCall(self._steps(inputs, outputs | kept, shape, kept))

    def _buffers_of(self, batch: int) -> Values:
        """Values between partitions in calls of one token for each of so many sequences."""
        if batch not in self._buffers and len(self._buffers) == SIZES:
            del self._buffers[next(iter(self._buffers))]
        return self._buffers.setdefault(batch, {})

    def _steps(self, values: Values, outputs: Values, shape: tuple[int, ...], kept: Values | None) -> Iterator[Step]:
        """What a call does, step by step. Every step has to run before the next is asked for.

        Args:
            values: inputs of the graph; values between partitions are added, and dropped after their last use.
            outputs: caches, logits, and what else has its place already.
            shape: sequences, tokens.
            kept: takes values between partitions, None to let go of them.
        """
        for index, one in enumerate(self._partitions):
            # 1. Hidden states of the stage before.
            for exchange in one.entry.before:
                place = outputs.get(exchange.value) or _empty(*shape, self._width)
                values[exchange.value] = place
                yield partial(self.receive_hidden, place.numpy())
            # 2. The partition itself.
            io = _bound(one, values, outputs)
            weights = self._weights_of_partition[index]
            for name, weight in weights.items():
                io.bind_ortvalue_input(name, weight)
            yield partial(run_bound, one.session, io, ({name: values[name] for name in one.inputs}, weights, outputs))
            values |= zip(one.outputs, io.get_outputs(), strict=True)
            # 3. Collectives on what it gave.
            for exchange in one.entry.after:
                yield self._exchange(exchange, values, outputs)
            # 4. Buffers that the next call of this size uses again, and those that nobody needs any more.
            if kept is not None:
                kept |= {name: values[name] for name in one.between}
            for name in [name for name in values if self._last_use.get(name, -1) <= index]:
                del values[name]
        if self.returns_logits:
            yield partial(self.return_logits, outputs["logits"].numpy())

    def _exchange(self, exchange: CollectiveOp, values: Values, outputs: Values) -> Step:
        """The step that sends, sums or gathers an output of a partition; its result is a value for later ones."""
        value, array = values[exchange.value], values[exchange.value].numpy()
        if exchange.op == "send":
            return partial(self.send_hidden, array)
        if exchange.op == "all_reduce":
            values[exchange.result] = value
            return partial(self.link.all_reduce, array, array)
        *rows, columns = array.shape
        assert exchange.axis in (-1, len(rows)), "only logits are gathered, along the vocabulary"
        result = outputs.get(exchange.result) or _empty(*rows, columns * self.plan.width)
        values[exchange.result] = result
        return partial(self.link.all_gather, array, result.numpy())


def load_rank_graph(bundle: Bundle, link: Collectives, options: ExecutorOptions) -> Shard:
    """A rank's runner on ONNX Runtime.

    Args:
        bundle: a sharded one.
        link: this rank's exchanges.
        options: how sessions are made.
    """
    graph = RankGraph(bundle, link, options)
    plan, config = graph.plan, bundle.manifest.config
    # As many batches as stages: large batches run in so many parts.
    stages = [plan.local_text(config.text, stage * plan.width) for stage in range(plan.pipeline)]
    runner = runner_of(graph, replace(config, text=stages[plan.stage_of(link.rank)]), batches=plan.pipeline,
                       check=block_check([bundle.block_hashes(graph.weights)]) if options.check_blocks else None,
                       cache_bytes=options.cache_bytes, stages=stages)
    return Shard(runner, graph)


class CapturedCall:
    """Record and replay: the first call runs and records steps, later calls run the same steps on the same memory.

    Args:
        steps: makes a step after the one before has run.
    """

    def __init__(self, steps: Iterator[Step]) -> None:
        self._unrecorded, self._recorded = steps, list[Step]()

    def __call__(self) -> None:
        """Run every step."""
        for step in self._recorded:
            step()
        for step in self._unrecorded:
            step()
            self._recorded.append(step)


def _empty(*shape: int) -> Any:
    return ort_value(np.empty(shape, np.float32))


def _bound(partition: Partition, values: Values, outputs: Values) -> Any:
    """An ``IOBinding`` of a partition: outputs that have no place yet get one from ONNX Runtime."""
    io = partition.session.io_binding()
    for name in partition.inputs:
        io.bind_ortvalue_input(name, values[name])
    for name in partition.outputs:
        if name in outputs:
            io.bind_ortvalue_output(name, outputs[name])
        else:
            io.bind_output(name, "cpu")
    return io


def _run_once(steps: Iterator[Step]) -> None:
    for step in steps:
        step()


def _weights_of(graph: Path) -> Path:
    """The one weight file of a rank's partitions, ``decoder.data`` beside ``decoder.00.onnx``."""
    return graph.with_suffix("").with_suffix(WEIGHTS)

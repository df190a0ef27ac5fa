"""Runs what one rank holds of a decoder: partitions of its graph on ONNX Runtime, collectives between them.

A call runs the partitions in order. Every value that crosses from one partition to another lies in memory that ONNX
Runtime allocates once and that collectives work on as it is: a sum over the ranks replaces its own part. Calls that
come again (a token of a sequence, of a batch) are recorded with their bindings and replayed, for calls never overlap.

Where that memory is, and what collectives see of it, differs: ``host_rank.py``, ``cuda_rank.py``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from collections.abc import Sequence as Items
from functools import partial
from pathlib import Path
from typing import Any

from ..bundle.manifest import Bundle
from ..bundle.shards import CollectiveOp
from ..executors.ort.session import Values
from .collectives import Collectives
from .collectives import Values as Exchanged
from .partition import Partition, Step
from .stage import Stage, plan_of


def graphs_of(bundle: Bundle, rank: int) -> list[Path]:
    """Files of a rank's partitions, in order."""
    assert bundle.manifest.shards is not None, "a whole bundle has no ranks"
    return [bundle.directory / entry.graph for entry in bundle.manifest.shards.ranks[rank].partitions]


class RankGraph(Stage):
    """A rank's partitions of the decoder with the collectives between them.

    Args:
        bundle: a sharded one.
        link: this rank's exchanges.
        sessions: of the partitions, in order.
        device: where their values are, as ONNX Runtime calls it: kind and number.

    Attributes:
        path: of the first partition, for messages.
        partitions: in order.
        weights_of_partition: weights that partitions read instead of their own.
    """

    def __init__(self, bundle: Bundle, link: Collectives, sessions: Items[Any], device: tuple[str, int]) -> None:
        super().__init__(link, plan_of(bundle))
        shards = bundle.manifest.shards
        assert shards is not None
        entries = shards.ranks[link.rank].partitions
        self.path, self._device = graphs_of(bundle, link.rank)[0], device
        self.width = bundle.manifest.config.text.hidden_size
        self.partitions = [Partition.of(session, entry) for session, entry in zip(sessions, entries, strict=True)]
        self.weights_of_partition: list[Values] = [{} for _ in sessions]
        self._last_use = {name: index for index, one in enumerate(self.partitions) for name in one.inputs}

    @property
    def inputs(self) -> list[Any]:
        """See ``DecoderGraph``: what no partition and no exchange gives."""
        given = {name for one in self.partitions for name in one.given}
        return list({item.name: item for one in self.partitions for item in one.session.get_inputs()
                     if item.name not in given}.values())

    @abstractmethod
    def run(self, session: Any, io: Any, values: tuple[Values, ...]) -> None:
        """Run a partition on what is bound, which has to live until it has run."""

    @abstractmethod
    def seen(self, value: Any) -> Exchanged:
        """A value as collectives take it."""

    @abstractmethod
    def empty(self, name: str, shape: tuple[int, ...]) -> Any:
        """Room for a value that an exchange gives."""

    def steps(self, values: Values, outputs: Values, shape: tuple[int, ...], kept: Values | None) -> Iterator[Step]:
        """What a call does, step by step. Every step has to run before the next is asked for.

        Args:
            values: inputs of the graph; values between partitions are added, and dropped after their last use.
            outputs: caches, logits, and what else has its place already.
            shape: sequences, tokens.
            kept: takes values between partitions, None to let go of them.
        """
        for index, one in enumerate(self.partitions):
            # 1. Hidden states of the stage before.
            for exchange in one.entry.before:
                place = outputs.get(exchange.value) or self.empty(exchange.value, (*shape, self.width))
                values[exchange.value] = place
                yield partial(self.receive_hidden, self.seen(place))
            # 2. The partition itself.
            io = self._bound(one, values, outputs)
            weights = self.weights_of_partition[index]
            for name, weight in weights.items():
                io.bind_ortvalue_input(name, weight)
            yield partial(self.run, one.session, io, ({name: values[name] for name in one.inputs}, weights, outputs))
            values |= zip(one.outputs, io.get_outputs(), strict=True)
            # 3. Collectives on what it gave.
            for exchange in one.entry.after:
                yield self._exchange(exchange, values, outputs)
            # 4. Buffers that the next call of this size uses again, and those that nobody needs any more.
            if kept is not None:
                kept |= {name: values[name] for name in one.between}
            for name in [name for name in values if self._last_use.get(name, -1) <= index]:
                del values[name]

    def _bound(self, one: Partition, values: Values, outputs: Values) -> Any:
        """An ``IOBinding`` of a partition: outputs that have no place yet get one from ONNX Runtime."""
        io = one.session.io_binding()
        for name in one.inputs:
            io.bind_ortvalue_input(name, values[name])
        for name in one.outputs:
            if name in outputs:
                io.bind_ortvalue_output(name, outputs[name])
            else:
                io.bind_output(name, *self._device)
        return io

    def _exchange(self, exchange: CollectiveOp, values: Values, outputs: Values) -> Step:
        """The step that sends, sums or gathers an output of a partition; its result is a value for later ones."""
        value, seen = values[exchange.value], self.seen(values[exchange.value])
        if exchange.op == "send":
            return partial(self.send_hidden, seen)
        if exchange.op == "all_reduce":
            values[exchange.result] = value
            return partial(self.link.all_reduce, seen, seen)
        *rows, columns = seen.shape
        assert exchange.axis in (-1, len(rows)), "only logits are gathered, along the vocabulary"
        result = outputs.get(exchange.result) or self.empty(exchange.result, (*rows, columns * self.plan.width))
        values[exchange.result] = result
        return partial(self.link.all_gather, seen, self.seen(result))

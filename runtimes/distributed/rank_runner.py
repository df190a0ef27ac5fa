"""Runs what one rank holds of a decoder: pieces of its graph on ONNX Runtime, exchanges between them.

A call runs the pieces in order. Every value that crosses from one piece to another lies in memory that ONNX Runtime
allocates once and that exchanges work on as it is: a sum over the ranks replaces its own part. Calls that come again
(a token of a sequence, of a batch) keep their bindings; all of one size share these buffers, for calls never overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...model.config import HerdConfig
from ..bundle.manifest import WEIGHTS, Bundle
from ..bundle.shards import CollectiveOp, PartitionEntry
from ..executors.ort.decoder import DecoderRunner
from ..executors.ort.session import Memory, create_sessions
from ..kv_cache.memory import Buffer
from ..kv_cache.sequence import Features
from .collectives import Array, Collectives

SIZES = 4
"""Batch sizes whose buffers between pieces are remembered."""

Values = dict[str, Any]
"""``OrtValue`` by name."""
Step = Callable[[], None]


@dataclass(frozen=True)
class Partition:
    """A piece of the graph, and what is exchanged around it.

    Attributes:
        session: runs it.
        inputs: names, in order.
        outputs: names, in order.
        entry: what the manifest says: hidden states [B, T, D] that come from the stage before it, exchanges after it.
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
        """Values that it receives, makes or exchanges; caches and logits belong to a sequence."""
        received = (exchange.value for exchange in self.entry.before)
        results = (exchange.result for exchange in self.entry.after if exchange.result)
        names = (*received, *self.outputs, *results)
        return [name for name in names if name != "logits" and not name.startswith("present.")]


class ShardRunner(DecoderRunner):
    """One rank's part of the decoder behind the interface of the whole.

    Logits that it returns are filled on the ranks of the last stage; the first of them sends them to rank 0, which
    takes them by ``collect`` when it needs them.

    Args:
        bundle: a sharded one.
        link: this rank's exchanges.
        threads: threads of one operator.
        memory: as for ``Engine.load``.

    Attributes:
        before_send: called before hidden states go to the next stage.
    """

    def __init__(self, bundle: Bundle, link: Collectives, *, threads: int, memory: Memory = "fast") -> None:
        config, shards = bundle.manifest.config, bundle.manifest.shards
        assert shards is not None, "a whole bundle has no ranks"
        self.link, self.plan = link, shards.plan
        self.config: HerdConfig = replace(config, text=self.plan.local_text(config.text, link.rank))
        self.stage = self.plan.stage_of(link.rank)
        self.last = self.stage == self.plan.pipeline - 1
        self.before_send: Callable[[], None] = _nothing
        entries = shards.ranks[link.rank].pieces
        graphs = [bundle.directory / entry.graph for entry in entries]
        sessions = create_sessions(graphs, _weights_of(graphs[0]), threads=threads, memory=memory)
        self.pieces = [Partition.of(session, entry) for session, entry in zip(sessions, entries, strict=True)]
        inputs = {item.name: item for session in sessions for item in session.get_inputs()}
        self._init_cache_io(list(inputs.values()), graphs[0], batches=self.plan.pipeline)
        self._last_use = {name: index for index, piece in enumerate(self.pieces) for name in piece.inputs}
        self._buffers: dict[int, Values] = {}

    def bind(
        self, layers: Items[tuple[Buffer, Buffer]], input_ids: Features, past_lengths: Features, rows: Features,
        features: Features, logits: Features,
    ) -> Callable[[], None]:
        """A call over numpy memory; see ``DecoderRunner``."""
        inputs, outputs = self.values(layers, input_ids, past_lengths, rows, features, logits)
        if input_ids.shape[1] > 1:
            return partial(_run_once, self._steps(inputs, outputs, input_ids.shape, None))
        kept = self._buffers_of(len(input_ids))
        return CapturedCall(self._steps(inputs, outputs | kept, input_ids.shape, kept))

    def collect(self, logits: Array) -> None:
        """On rank 0 of a pipeline: take the logits of the oldest call whose logits were not taken."""
        self.link.receive(logits, self.plan.world - self.plan.width)

    def _buffers_of(self, batch: int) -> Values:
        """Values between pieces in calls of one token for each of so many sequences."""
        if batch not in self._buffers and len(self._buffers) == SIZES:
            del self._buffers[next(iter(self._buffers))]
        return self._buffers.setdefault(batch, {})

    def _steps(self, values: Values, outputs: Values, shape: tuple[int, ...], kept: Values | None) -> Iterator[Step]:
        """What a call does, step by step. Every step has to run before the next is asked for.

        Args:
            values: inputs of the graph; values between pieces are added, and dropped after their last use.
            outputs: caches, logits, and what else has its place already.
            shape: sequences, tokens.
            kept: takes values between pieces, None to let go of them.
        """
        for index, piece in enumerate(self.pieces):
            for exchange in piece.entry.before:
                place = outputs.get(exchange.value) or self._empty(*shape, self.config.text.hidden_size)
                values[exchange.value] = place
                yield partial(self.link.receive, place.numpy(), self.link.rank - self.plan.width)
            io = _bound(piece, values, outputs)
            yield partial(piece.session.run_with_iobinding, io)
            values |= zip(piece.outputs, io.get_outputs(), strict=True)
            for exchange in piece.entry.after:
                yield self._exchange(exchange, values, outputs)
            if kept is not None:
                kept |= {name: values[name] for name in piece.between}
            for name in [name for name in values if self._last_use.get(name, -1) <= index]:
                del values[name]
        if self.last and self.stage and self.link.rank == self.plan.world - self.plan.width:
            yield partial(self.link.send, outputs["logits"].numpy(), 0)

    def _exchange(self, exchange: CollectiveOp, values: Values, outputs: Values) -> Step:
        """What is done with a value after a piece."""
        value, array = values[exchange.value], values[exchange.value].numpy()
        if exchange.op == "send":
            return partial(self._send, array)
        if exchange.op == "all_reduce":
            values[exchange.result] = value
            return partial(self.link.all_reduce, array, array)
        *rows, columns = array.shape
        assert exchange.axis in (-1, len(rows)), "only logits are gathered, along the vocabulary"
        result = outputs.get(exchange.result) or self._empty(*rows, columns * self.plan.width)
        values[exchange.result] = result
        return partial(self.link.all_gather, array, result.numpy())

    def _send(self, hidden: Array) -> None:
        self.before_send()
        self.link.send(hidden, self.link.rank + self.plan.width)

    def _empty(self, *shape: int) -> Any:
        return self._value(np.empty(shape, np.float32))


class CapturedCall:
    """Steps that come again and again on the same memory.

    Args:
        steps: makes them while they run for the first time.
    """

    def __init__(self, steps: Iterator[Step]) -> None:
        self._new, self._known = steps, list[Step]()

    def __call__(self) -> None:
        """Run them."""
        for step in self._known:
            step()
        for step in self._new:
            step()
            self._known.append(step)


def _bound(piece: Partition, values: Values, outputs: Values) -> Any:
    """An ``IOBinding`` of a piece: outputs that have no place yet get one from ONNX Runtime."""
    io = piece.session.io_binding()
    for name in piece.inputs:
        io.bind_ortvalue_input(name, values[name])
    for name in piece.outputs:
        if name in outputs:
            io.bind_ortvalue_output(name, outputs[name])
        else:
            io.bind_output(name, "cpu")
    return io


def _run_once(steps: Iterator[Step]) -> None:
    for step in steps:
        step()


def _nothing() -> None:
    """Nobody waits for anything."""


def _weights_of(graph: Path) -> Path:
    """The one weight file of a rank's pieces, ``decoder.data`` beside ``decoder.00.onnx``."""
    return graph.with_suffix("").with_suffix(WEIGHTS)

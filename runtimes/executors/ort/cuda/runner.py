"""Runs a decoder of the target ``cuda``: prompts and tokens of any sequences in one call.

Inputs go to the device in one copy. Logits stay there: only rows that somebody asked for come back, and of greedy steps
only the most likely token. Calls of one token per sequence, which is what decoding is, are recorded as CUDA graphs, one
for every power of two of sequences and of columns of their block tables; rows that are left over are padding, and write
to a block that no sequence has.

One call runs at a time. Every call waits for its end, so memory that it used is free for the next one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from collections.abc import Sequence as Items
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from .....errors import HerdError
from .....model.config import HerdConfig, TextConfig
from ....kv_cache.paged import CachePools
from ....kv_cache.pool import BlockPool
from ...blocks import BlockRunner, PlacedStep, table_width
from ...runner import SHORTEST_CHUNK, Logits, Row, Step
from ..session import Values
from .graph import NOT_RECORDED, CudaGraph
from .inputs import CallInputs, CallSize
from .memory import CALL_TOKENS, ELEMENTS, DeviceBlocks

MOST_RECORDED = 64
"""Sequences in a call that is recorded; rows of logits for which there is room at any time."""
MOST_SEQUENCES = 256
"""Sequences in a call: the limit of the attention operator."""
NARROWEST = 16
"""Columns of the narrowest block table that is recorded: 2,048 tokens."""

TO_RECORD = 2
"""Calls of a size until it is recorded: ranks first find out how large what they exchange is."""


class _Call:
    """Calls of one size, bound.

    Args:
        runner: the decoder.
        inputs: of the calls.
        recording: number of the recorded CUDA graph.
    """

    def __init__(self, runner: CudaRunner, inputs: CallInputs, recording: int = NOT_RECORDED) -> None:
        self.inputs = inputs
        self.logits, self.best = runner.outputs(inputs.size.rows)
        given = {name: value for name, value in (("logits", self.logits), ("best", self.best))
                 if name in runner.graph.outputs}
        pasts, presents = runner.caches
        self.run = runner.graph.bind(inputs.values | pasts, given | presents, recording)


class CudaRunner(BlockRunner):
    """The decoder of a bundle on ONNX Runtime's CUDA provider.

    Args:
        graph: the decoder.
        config: the model; of a rank, what the rank holds of it.
        cache_bytes: that keys and values of all sequences may use.
        stages: of a rank, see ``CachePools.of``.

    Attributes:
        longest_chunk: many rows, so that every expert gets some of them.
        graph: see above.
        place: the GPU.
        reads_logits: whether somebody wants to know them here.
    """

    longest_chunk = CALL_TOKENS
    reads_logits = True

    def __init__(
        self, graph: CudaGraph, config: HerdConfig, cache_bytes: int, stages: Items[TextConfig] = ()
    ) -> None:
        self.graph, self.config, self.place = graph, config, graph.place
        place, given = graph.place, {item.name: item for item in graph.inputs}
        # A rank that does not begin with ids, or does not end with logits, is told of their number all the same.
        self._names, self.takes_features = frozenset(given) | {"input_ids", "logit_rows"}, "image_features" in given
        memory = DeviceBlocks(place, config.text, _element(given, config, graph.path))
        self.pools = CachePools.of(config.text, memory.block_bytes, cache_bytes, stages, memory)
        self._padding = _set_aside(self.pools.whole), _set_aside(self.pools.chunked)
        vocabulary = config.text.vocab_size
        self._logits = place.empty([MOST_RECORDED, vocabulary], np.float32)
        self._best = place.empty([MOST_RECORDED], np.int64)
        self._memory = place.empty([1 << 16], np.uint8)
        self._recorded: dict[CallSize, _Call] = {}
        self._running = threading.Lock()

    def compute(self, steps: Items[PlacedStep]) -> Logits:
        """Logits of all rows; see ``BlockRunner``."""
        rows = self.answers([step._replace(greedy=False) for step in steps])
        return np.stack(rows) if rows else np.zeros((0, self.config.text.vocab_size), np.float32)

    def answers(self, steps: Items[PlacedStep]) -> list[Row]:
        """What is wanted after the tokens, in one call where the operator takes so many; see ``BlockRunner``."""
        return [row for first in range(0, len(steps), MOST_SEQUENCES)
                for row in self._computed(steps[first : first + MOST_SEQUENCES])]

    def first_calls(self, sequences: int) -> Iterator[list[Step]]:
        """Calls that are recorded, and lengths of prompts for which mixtures of experts find out what is fast.

        Both go by a call's number of rows; a wider block table is recorded when it is first needed.
        """
        room = [pool.budget.most // pool.cost for pool in (self.pools.whole, self.pools.chunked) if pool.capacity]
        most = min(table_width(sequences), MOST_RECORDED, *room)
        for count in (1 << power for power in range(most.bit_length())):
            for _ in range(TO_RECORD):
                yield [Step(self.new_sequence(), [0], [0], greedy=True) for _ in range(count)]
        longest = min(self.longest_chunk, self.attention_chunk or self.longest_chunk, self.pools.most_tokens())
        for length in (1 << power for power in range(SHORTEST_CHUNK.bit_length() - 1, longest.bit_length())):
            yield [Step(self.new_sequence(), [0] * length, [length - 1], greedy=True)]

    def close(self) -> None:
        """Free the weights, keys and values; see ``Runner``."""
        if not self.closed:
            super().close()
            with self._running:
                self._recorded.clear()
                for pool in (self.pools.whole, self.pools.chunked):
                    pool.keys.clear()
                    pool.values.clear()
                del self.graph, self._memory, self._logits, self._best

    def outputs(self, rows: int) -> tuple[Any, Any]:
        """Where logits and best tokens of so many rows go."""
        place, vocabulary = self.place, self.config.text.vocab_size
        if rows > MOST_RECORDED:
            return place.empty([rows, vocabulary], np.float32), place.empty([rows], np.int64)
        return place.part(self._logits, 0, [rows, vocabulary], np.float32), place.part(self._best, 0, [rows], np.int64)

    # -- one call ----------------------------------------------------------------------------------------------------

    @property
    def caches(self) -> tuple[Values, Values]:
        """Keys and values of all layers, which are inputs and outputs of every call."""
        parts = {f"{layer}.{part}": value for layer in range(self.config.text.num_layers)
                 for part, value in zip(("key", "value"), self.pools.keys_and_values(layer), strict=True)}
        return ({f"past.{name}": value for name, value in parts.items()},
                {f"present.{name}": value for name, value in parts.items()})

    def _computed(self, steps: Items[PlacedStep]) -> list[Row]:
        with self._running:
            call = self._call_for(steps)
            call.inputs.write(steps, self.pools.chunk, self._padding)
            call.run()
            return self._fetched(call, [step for step in steps for _ in step.rows])

    def _call_for(self, steps: Items[PlacedStep]) -> _Call:
        columns = max(len(step.whole) for step in steps)
        if len(steps) <= MOST_RECORDED and all(map(_is_decoding, steps)):
            return self._recorded_call(self._bucket(len(steps), columns))
        chunked = max(len(step.chunked) for step in steps)
        size = CallSize(
            sum(len(step.token_ids) for step in steps), len(steps), max(1, sum(len(step.rows) for step in steps)),
            sum(len(step.features) for step in steps if step.features is not None),
            table_width(columns), table_width(chunked))
        inputs = CallInputs(self.place, size, self.config.text.hidden_size, self._names, self._room_for(size))
        chunk = self.pools.chunk or 1
        inputs.bound(max(len(step.token_ids) for step in steps),
                     max(step.past + len(step.token_ids) for step in steps),
                     max(step.past % chunk + len(step.token_ids) for step in steps))
        return _Call(self, inputs)

    def _bucket(self, sequences: int, columns: int) -> CallSize:
        """The size of the recorded call that so many sequences with so many blocks run in."""
        rows, tokens = table_width(sequences), self.pools.block_tokens
        return CallSize(rows, rows, rows, 0, max(NARROWEST, table_width(columns)), -(-self.pools.chunk // tokens))

    def _recorded_call(self, size: CallSize) -> _Call:
        if size not in self._recorded:
            inputs = CallInputs(self.place, size, self.config.text.hidden_size, self._names)
            inputs.bound(1, size.whole * self.pools.block_tokens, size.chunked * self.pools.block_tokens)
            self._recorded[size] = _Call(self, inputs, len(self._recorded))
        return self._recorded[size]

    def _room_for(self, size: CallSize) -> Any:
        """Memory for the inputs of a call that is not recorded; it only grows."""
        count = CallInputs.bytes_of(size, self.config.text.hidden_size)
        if count > self._memory.tensor_size_in_bytes():
            self._memory = self.place.empty([table_width(count)], np.uint8)
        return self._memory

    def _fetched(self, call: _Call, steps: Items[PlacedStep]) -> list[Row]:
        """What is wanted of rows, on the host; ``steps`` has the step of every row."""
        some = "best" in self.graph.outputs and any(step.greedy for step in steps)
        best = self.place.part(call.best, 0, [len(steps)], np.int64).numpy().tolist() if some else []
        tells = [some and step.greedy and best[row] not in step.never for row, step in enumerate(steps)]
        found: list[Row] = []
        for told, group in groupby(range(len(steps)), key=tells.__getitem__):
            places = list(group)
            found += [best[row] for row in places] if told else list(self._logits_of(call, places[0], len(places)))
        return found

    def _logits_of(self, call: _Call, first: int, count: int) -> Logits:
        vocabulary = self.config.text.vocab_size
        if not self.reads_logits:
            return np.empty((count, vocabulary), np.float32)
        found: Logits = self.place.part(call.logits, 4 * vocabulary * first, [count, vocabulary], np.float32).numpy()
        return found.copy() if self.place.kind == "cpu" else found


def _set_aside(pool: BlockPool) -> int:
    """A block that no sequence gets, and that counts in no budget."""
    if not pool.capacity:
        return 0
    block = pool.allocate()
    pool.budget.most -= pool.cost
    pool.budget.used -= pool.cost
    return block


def _is_decoding(step: PlacedStep) -> bool:
    return len(step.token_ids) == 1 and list(step.rows) == [0] and (step.features is None or not len(step.features))


def _element(inputs: dict[str, Any], config: HerdConfig, path: Path) -> str:
    """Type of keys and values, compared with what the configuration gives them."""
    text = config.text
    wanted = {f"past.{layer}.{part}" for layer in range(text.num_layers) for part in ("key", "value")}
    found = {name: item for name, item in inputs.items() if name.startswith("past.")}
    types = {item.type.removeprefix("tensor(").removesuffix(")") for item in found.values()}
    shapes = {tuple(item.shape[2:]) for item in found.values()}
    if found.keys() != wanted or len(types) != 1 or shapes != {(text.num_kv_heads, text.head_dim)} or \
            not types <= ELEMENTS.keys():
        raise HerdError(f"{path} takes {len(found)} caches of {sorted(types)} {sorted(shapes)}, the manifest's "
                        f"configuration gives {len(wanted)} of [{text.num_kv_heads}, {text.head_dim}]: rebuild the "
                        "bundle")
    return types.pop()

"""Runs a decoder over a list of tokens of any sequences: prefill chunks and single tokens in one call.

Keys and values lie in cache blocks (``kv_cache/pool.py``), whose arrays are bound once and for all: a call says in
block tables which of them belong to whom. A batch is what a call is told: sequences join and leave without being moved.
"""

from __future__ import annotations

import logging
import mmap
import threading
from collections import OrderedDict
from collections.abc import Sequence as Items
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ....errors import HerdError
from ....model.config import HerdConfig, TextConfig
from ...kv_cache.paged import CachePools
from ...kv_cache.pool import block_bytes, caches_of_block, free_cache_bytes
from ..blocks import BlockRunner, PlacedStep, table_width
from ..runner import Logits
from .decoder import DecoderGraph, Run, run_all
from .page_release import release
from .session import Values, ort_value
from .weights import SMALL, copy_in_parts

logger = logging.getLogger(__name__)

KEPT_BINDINGS = 16
"""Sizes of batches, by thread, whose arrays and bindings are kept for their next call."""

Array = np.ndarray[Any, Any]


class _Size(NamedTuple):
    """What decides about the shapes of a call."""

    tokens: int
    sequences: int
    rows: int
    image_tokens: int
    whole_blocks: int
    chunked_blocks: int


class _Arrays:
    """Arrays that a call of one size reads and writes, bound once.

    Args:
        runner: the decoder.
        size: of the call.
    """

    def __init__(self, runner: PagedRunner, size: _Size) -> None:
        width = runner.config.text.hidden_size
        self.input_ids, self.positions = (np.zeros(size.tokens, np.int64) for _ in range(2))
        self.cumulative_lengths = np.zeros(size.sequences + 1, np.int32)
        self.past_lengths = np.zeros(size.sequences, np.int32)
        self.logit_rows = np.zeros(size.rows, np.int64)
        self.features = np.zeros((size.image_tokens, width), np.float32)
        self.whole = np.zeros((size.sequences, size.whole_blocks), np.int32)
        self.chunked = np.zeros((size.sequences, size.chunked_blocks), np.int32)
        self.logits = np.zeros((size.rows, runner.config.text.vocab_size), np.float32)
        self.run = runner.bind({
            "input_ids": self.input_ids, "positions": self.positions, "cumulative_lengths": self.cumulative_lengths,
            "past_lengths": self.past_lengths, "logit_rows": self.logit_rows, "image_features": self.features,
            "block_table.global": self.whole, "block_table.chunked": self.chunked,
        }, self.logits)

    def fill(self, steps: Items[PlacedStep]) -> None:
        """Write what a call is to do."""
        first, row, image_row = 0, 0, 0
        for index, step in enumerate(steps):
            count, past = len(step.token_ids), step.past
            self.input_ids[first : first + count] = step.token_ids
            self.positions[first : first + count] = range(past, past + count)
            self.past_lengths[index], self.cumulative_lengths[index + 1] = past, first + count
            for target, table in ((self.whole, step.whole), (self.chunked, step.chunked)):
                used = min(len(table), target.shape[1])
                target[index, :used] = table[:used]
            for place in step.rows:
                self.logit_rows[row] = first + place
                row += 1
            if step.features is not None and len(step.features):
                self.features[image_row : image_row + len(step.features)] = step.features
                image_row += len(step.features)
            first += count


class PagedRunner(BlockRunner):
    """The decoder of a bundle on ONNX Runtime, with our own operators.

    Args:
        graph: the decoder.
        config: the model; of a rank, what the rank holds of it.
        cache_bytes: that keys and values of all sequences may use, None for half of the free memory.
        check: called after every call, before its result is used; raises when weights that it read were altered.
        stages: of a rank, see ``CachePools.of``.
    """

    pools: CachePools

    def __init__(
        self, graph: DecoderGraph, config: HerdConfig, *, cache_bytes: int | None = None, check: Run | None = None,
        stages: Items[TextConfig] = (),
    ) -> None:
        self.graph, self.config, self._check = graph, config, check
        given = {item.name: item for item in graph.inputs}
        self._inputs = frozenset(given)
        self.tables = sorted(name for name in given if name.startswith("block_table."))
        self.takes_features = "image_features" in given
        size = _block_bytes(given, config, graph)
        most = free_cache_bytes() if cache_bytes is None else cache_bytes
        self.pools = CachePools.of(config.text, size, most, stages)
        self._caches = {
            f"{layer}.{part}": ort_value(array) for layer in range(config.text.num_layers)
            for part, array in zip(("key", "value"), self.pools.keys_and_values(layer), strict=True)
        }
        self._kept: OrderedDict[tuple[int, _Size], _Arrays] = OrderedDict()
        self._keeping, self._stopped, self._called = threading.Lock(), threading.Event(), threading.Event()
        self._copying: threading.Thread | None = None

    def compute(self, steps: Items[PlacedStep]) -> Logits:
        """One call; see ``BlockRunner``."""
        arrays = self._arrays(_size_of(steps))
        arrays.fill(steps)
        arrays.run()
        self._called.set()
        return arrays.logits

    def copy_weights(self, data: Path) -> None:
        """Copy the weights into huge pages, where that pays, once the first call has its result: both would read memory
        at the same time, and the first token is waited for. Results stay the same bits.

        Args:
            data: the file that holds them.
        """
        count = data.stat().st_size
        if count >= SMALL and hasattr(mmap, "MADV_HUGEPAGE") and count < free_cache_bytes():
            self._copying = threading.Thread(target=self._copy, args=(data,), daemon=True, name="herdgraph-weights")
            self._copying.start()

    def _copy(self, data: Path) -> None:
        """Copy and go over to the copy, part by part; where that fails, the rest goes on being used as it is mapped."""
        try:
            self._called.wait()
            for weights in copy_in_parts(data):
                if self._stopped.is_set():
                    return
                with self._keeping:
                    self.graph.override(weights)
                    self._kept.clear()
                release({str(data.resolve())})  # pages of the mapping: nobody reads those that were copied any more
        except (HerdError, MemoryError, OSError) as error:
            logger.info("%s is used as it is mapped: %s", data, error)

    def wait_until_resident(self) -> None:
        """Wait for the copy of the weights; see ``Runner``."""
        self._called.set()
        if self._copying is not None:
            self._copying.join()

    def close(self) -> None:
        """Free the weights; see ``Runner``."""
        if not self.closed:
            super().close()
            self._stopped.set()
            self.wait_until_resident()
            self._kept.clear()
            del self.graph

    def bind(self, arrays: dict[str, Array], logits: Array) -> Run:
        """A call over the arrays' own memory: later writes to the arrays are what the next call reads."""
        inputs: Values = {name: ort_value(array) for name, array in arrays.items() if name in self._inputs}
        # A rank that does not begin with ids needs their number all the same.
        inputs.setdefault("input_ids", ort_value(arrays["input_ids"]))
        inputs |= {f"past.{name}": value for name, value in self._caches.items()}
        outputs = {"logits": ort_value(logits)} | {f"present.{name}": value for name, value in self._caches.items()}
        run = self.graph.bind(inputs, outputs)
        return run if self._check is None else partial(run_all, (run, self._check))

    def _arrays(self, size: _Size) -> _Arrays:
        """Arrays of a size for this thread alone; those of batches of single tokens are kept."""
        key = threading.get_ident(), size
        with self._keeping:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            made = _Arrays(self, size)
            if size.tokens == size.sequences:
                self._kept[key] = made
                if len(self._kept) > KEPT_BINDINGS:
                    self._kept.popitem(last=False)
            return made


def _size_of(steps: Items[PlacedStep]) -> _Size:
    return _Size(
        sum(len(step.token_ids) for step in steps), len(steps), sum(len(step.rows) for step in steps),
        sum(len(step.features) for step in steps if step.features is not None),
        table_width(max(len(step.whole) for step in steps)), table_width(max(len(step.chunked) for step in steps)),
    )


def _block_bytes(inputs: dict[str, Any], config: HerdConfig, graph: DecoderGraph) -> int:
    """Bytes of one layer's keys in a cache block, compared with what the configuration gives them."""
    text = config.text
    wanted = {f"past.{layer}.{part}" for layer in range(text.num_layers) for part in ("key", "value")}
    found = {name: item.shape for name, item in inputs.items() if name.startswith("past.")}
    if found.keys() != wanted:
        raise HerdError(f"{graph.path} takes {len(found)} caches, the manifest's configuration gives {len(wanted)}: "
                        "rebuild the bundle")
    sizes = {shape[1] for shape in found.values()}
    if len(sizes) != 1 or caches_of_block(size := next(iter(sizes)), text.num_kv_heads, text.head_dim) is None:
        wanted_sizes = [block_bytes(text.num_kv_heads, text.head_dim, kind) for kind in ("float", "float16", "int8")]
        raise HerdError(f"{graph.path} has cache blocks of {sorted(sizes)} bytes, the manifest's configuration gives "
                        f"one of {wanted_sizes}: rebuild the bundle")
    return int(size)

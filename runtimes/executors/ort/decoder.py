"""Runs the decoder graph: prompts in prefill chunks, then one token at a time, on buffers bound once.

Every cache buffer is bound both as ``past.*`` and as ``present.*``, so the graph appends in place. For decoding, the
inputs and outputs of a sequence are bound once; afterwards a token costs three scalar writes and one call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ....errors import HerdError
from ....model.config import HerdConfig
from ...kv_cache.batch import BatchedKVCache
from ...kv_cache.memory import Buffer, HostMemory
from ...kv_cache.sequence import Features, Sequence
from ..runner import Logits, Runner
from .session import Values, ort_value, run_bound
from .weights import ResidentWeights

Run = Callable[[], None]


class DecoderGraph(Protocol):
    """A decoder graph that is ready to run: one session, or a rank's partitions with collectives between them.

    Attributes:
        path: the file, for messages.
    """

    path: Path

    @property
    def inputs(self) -> Items[Any]:
        """ONNX Runtime's descriptions of the inputs: name, type, shape."""

    def bind(self, inputs: Values, outputs: Values) -> Run:
        """A call over fixed memory: what is written there later is what the next call reads."""

    def override(self, weights: ResidentWeights) -> None:
        """Let calls that are bound from now on read these weights."""


class SessionGraph:
    """A decoder graph in one session; see ``DecoderGraph``."""

    def __init__(self, path: Path, session: Any) -> None:
        self.path, self.session = path, session
        self._weights: Values = {}

    @property
    def inputs(self) -> Items[Any]:
        """See ``DecoderGraph``."""
        inputs: Items[Any] = self.session.get_inputs()
        return inputs

    def override(self, weights: ResidentWeights) -> None:
        """See ``DecoderGraph``."""
        self._weights = weights.values(self.session)

    def bind(self, inputs: Values, outputs: Values) -> Run:
        """See ``DecoderGraph``."""
        io = self.session.io_binding()
        inputs = inputs | self._weights
        for name, value in inputs.items():
            io.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            io.bind_ortvalue_output(name, value)
        return partial(run_bound, self.session, io, (inputs, outputs))


class DecodeBinding:
    """Inputs and outputs of calls that append one token to each of B sequences, as arrays the graph reads and writes.

    Args:
        runner: the decoder.
        layers: keys and values of the sequences.
        batch: B.
    """

    def __init__(self, runner: DecoderRunner, layers: Items[tuple[Buffer, Buffer]], batch: int = 1) -> None:
        config = runner.config.text
        self.input_ids = np.zeros((batch, 1), np.int64)
        self.past_lengths = np.zeros(batch, np.int64)
        self.logits = np.zeros((batch, 1, config.vocab_size), np.float32)
        no_features = np.zeros((0, config.hidden_size), np.float32)
        self.run = runner.bind(
            layers, self.input_ids, self.past_lengths, np.zeros(1, np.int64), no_features, self.logits
        )


class DecodeBatch:
    """Sequences side by side, bound once to the decoder.

    Args:
        runner: the decoder.
        sequences: in the order of the rows.
    """

    def __init__(self, runner: DecoderRunner, sequences: Items[Sequence]) -> None:
        self.cache = BatchedKVCache(runner.memory, runner.config.text, sequences)
        self._binding = DecodeBinding(runner, self.cache.layers, len(sequences))

    def run(self, token_ids: Items[int]) -> Logits:
        """Append one token to each sequence; float32 [B, vocabulary], valid until the next call."""
        binding, sequences = self._binding, self.cache.sequences
        binding.input_ids[:, 0] = token_ids
        binding.past_lengths[:] = [len(sequence) for sequence in sequences]
        binding.run()
        for sequence, token in zip(sequences, token_ids, strict=True):
            sequence.append([int(token)])
        return binding.logits[:, 0]


class DecoderRunner(Runner):
    """The decoder of a bundle on ONNX Runtime.

    Args:
        graph: the decoder.
        config: the model; of a rank, what the rank holds of it.
        batches: batches whose buffers and bindings are kept for their next call.
        check: called after every call, before its result is used; raises when weights that it read were altered.
    """

    def __init__(
        self, graph: DecoderGraph, config: HerdConfig, *, batches: int = 1, check: Run | None = None
    ) -> None:
        _check_caches(graph.inputs, config, graph.path)
        self.graph, self.config, self._check = graph, config, check
        self.memory = HostMemory(_cache_type(graph.inputs))
        self.takes_features = any(item.name == "image_features" for item in graph.inputs)
        self._batches: deque[DecodeBatch] = deque(maxlen=batches)

    def decode(self, sequence: Sequence, token_id: int) -> Logits:
        """Append one text token; see ``Runner``."""
        length = len(sequence)
        sequence.make_room(1)
        binding: DecodeBinding = sequence.binding(lambda: DecodeBinding(self, sequence.cache.layers))
        binding.input_ids[0, 0] = token_id
        binding.past_lengths[0] = length
        binding.run()
        sequence.append([token_id])
        return binding.logits[0, 0]

    def decode_batch(self, sequences: Items[Sequence], token_ids: Items[int]) -> Logits:
        """Append one text token to each of several sequences; see ``Runner``."""
        batch = next((known for known in self._batches if known.cache.holds(sequences)), None)
        if batch is None:
            batch = DecodeBatch(self, sequences)
            self._batches.appendleft(batch)
        return batch.run(token_ids)

    def close(self) -> None:
        """Free the weights; see ``Runner``."""
        if not self.closed:
            super().close()
            self._batches.clear()
            del self.graph

    def prefill_chunk(self, sequence: Sequence, token_ids: list[int], features: Features, rows: Features) -> Logits:
        """Compute a prefill chunk; see ``Runner``."""
        logits = np.empty((1, len(rows), self.config.text.vocab_size), np.float32)
        ids, lengths = np.asarray([token_ids], np.int64), np.asarray([len(sequence)], np.int64)
        self.bind(sequence.cache.layers, ids, lengths, rows, features, logits)()
        return logits[0]

    def bind(
        self, layers: Items[tuple[Buffer, Buffer]], input_ids: Features, past_lengths: Features, rows: Features,
        features: Features, logits: Features,
    ) -> Run:
        """A call over the arrays' own memory: later writes to the arrays are what the next call reads."""
        arrays = {"input_ids": input_ids, "past_lengths": past_lengths, "logit_rows": rows}
        if self.takes_features:
            arrays["image_features"] = np.ascontiguousarray(features)
        inputs, outputs = {name: ort_value(array) for name, array in arrays.items()}, {"logits": ort_value(logits)}
        for layer, buffers in enumerate(layers):
            for part, buffer in zip(("key", "value"), buffers, strict=True):
                inputs[f"past.{layer}.{part}"] = outputs[f"present.{layer}.{part}"] = ort_value(buffer)
        run = self.graph.bind(inputs, outputs)
        return run if self._check is None else partial(run_all, (run, self._check))


def run_all(calls: Items[Run]) -> None:
    """Run calls one after the other."""
    for call in calls:
        call()


def _cache_type(inputs: Items[Any]) -> type[np.generic]:
    """Element type of keys and values among a graph's inputs."""
    types = {item.type for item in inputs if item.name.startswith("past.")}
    return np.int8 if types == {"tensor(int8)"} else np.float32


def _check_caches(inputs: Items[Any], config: HerdConfig, graph: Path) -> None:
    """Compare the caches that a graph takes with those that the configuration gives it."""
    text = config.text
    wanted = {f"past.{layer}.{part}" for layer in range(text.num_layers) for part in ("key", "value")}
    found = {item.name: item.shape for item in inputs if item.name.startswith("past.")}
    if found.keys() != wanted:
        raise HerdError(f"{graph} takes {len(found)} caches, the manifest's configuration gives {len(wanted)}: "
                        "rebuild the bundle")
    for name, (_, heads, _, width) in found.items():
        if (heads, width) != (text.num_kv_heads, text.head_dim):
            raise HerdError(f"{graph} takes {heads} heads of {width} in {name}, the manifest's configuration gives "
                            f"{text.num_kv_heads} of {text.head_dim}: rebuild the bundle")

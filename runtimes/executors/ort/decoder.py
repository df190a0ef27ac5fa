"""Runs the decoder graph: pieces of a prompt, then one token at a time, on buffers bound once.

Every cache buffer is bound both as ``past.*`` and as ``present.*``, so the graph appends in place. For decoding, one
``IOBinding`` per sequence is built once; afterwards a token costs three scalar writes and one call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ....errors import HerdError
from ....model.config import HerdConfig
from ...kv_cache.batch import DecodeBatch
from ...kv_cache.memory import Buffer, HostMemory
from ...kv_cache.sequence import Features, Sequence
from ..runner import PREFILL_CHUNK, SCORES_BYTES, SHORTEST, Logits, Runner
from .session import Memory, create_session, load_onnxruntime

__all__ = ["PREFILL_CHUNK", "SCORES_BYTES", "SHORTEST", "DecodeBinding", "DecoderRunner", "Logits"]


class DecodeBinding:
    """Inputs and outputs of single-token calls for one sequence, as numpy arrays the graph reads and writes."""

    def __init__(self, runner: DecoderRunner, sequence: Sequence) -> None:
        config = runner.config.text
        self.input_ids = np.zeros((1, 1), np.int64)
        self.past_lengths = np.zeros(1, np.int64)
        self.logits = np.zeros((1, 1, config.vocab_size), np.float32)
        no_features = np.zeros((0, config.hidden_size), np.float32)
        self.run = runner.bind(
            sequence.buffers.layers, self.input_ids, self.past_lengths, np.zeros(1, np.int64), no_features, self.logits
        )


class DecoderRunner(Runner):
    """The decoder of a bundle on ONNX Runtime."""

    def __init__(self, graph: Path, config: HerdConfig, *, threads: int | None, memory: Memory = "fast") -> None:
        self.config = config
        self.session = create_session(graph, threads=threads, memory=memory)
        self._init_cache_io(self.session.get_inputs(), graph)

    def _init_cache_io(self, inputs: Items[Any], graph: Path, *, batches: int = 1) -> None:
        """Learn from a graph's inputs where caches live; remember so many batches."""
        _check_caches(inputs, self.config, graph)
        self._value = load_onnxruntime().OrtValue.ortvalue_from_numpy
        self.memory = HostMemory(_cache_type(inputs))
        self._batches: deque[DecodeBatch] = deque(maxlen=batches)
        self.takes_features = any(item.name == "image_features" for item in inputs)

    def decode(self, sequence: Sequence, token_id: int) -> Logits:
        """Append one text token; see ``Runner``."""
        length = len(sequence)
        sequence.reserve(length + 1)
        binding = sequence.binding
        if binding is None:
            binding = sequence.binding = DecodeBinding(self, sequence)
        binding.input_ids[0, 0] = token_id
        binding.past_lengths[0] = length
        binding.run()
        sequence.token_ids.append(token_id)
        return binding.logits[0, 0]

    def decode_batch(self, sequences: Items[Sequence], token_ids: Items[int]) -> Logits:
        """Append one text token to each of several sequences; see ``Runner``."""
        batch = next((known for known in self._batches if known.holds(sequences)), None)
        if batch is None:
            batch = DecodeBatch(self, sequences)
            self._batches.appendleft(batch)
        return batch.run(token_ids)

    def prefill_chunk(self, sequence: Sequence, piece: list[int], features: Features, rows: Features) -> Logits:
        """Append a piece; see ``Runner``."""
        logits = np.empty((1, len(rows), self.config.text.vocab_size), np.float32)
        ids, lengths = np.asarray([piece], np.int64), np.asarray([len(sequence)], np.int64)
        self.bind(sequence.buffers.layers, ids, lengths, rows, features, logits)()
        return logits[0]

    def bind(
        self, layers: Items[tuple[Buffer, Buffer]], input_ids: Features, past_lengths: Features, rows: Features,
        features: Features, logits: Features,
    ) -> Callable[[], None]:
        """A call over numpy memory: later writes to the arrays are what the next call reads."""
        io = self.session.io_binding()
        inputs, outputs = self.values(layers, input_ids, past_lengths, rows, features, logits)
        for name, value in inputs.items():
            io.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            io.bind_ortvalue_output(name, value)
        return partial(self.session.run_with_iobinding, io)

    def values(
        self, layers: Items[tuple[Buffer, Buffer]], input_ids: Features, past_lengths: Features, rows: Features,
        features: Features, logits: Features,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Inputs and outputs of the decoder by name; ``OrtValue`` over the arrays' own memory."""
        arrays = {"input_ids": input_ids, "past_lengths": past_lengths, "logit_rows": rows}
        if self.takes_features:
            arrays["image_features"] = np.ascontiguousarray(features)
        inputs, outputs = {name: self._value(array) for name, array in arrays.items()}, {"logits": self._value(logits)}
        for layer, buffers in enumerate(layers):
            for part, buffer in zip(("key", "value"), buffers, strict=True):
                inputs[f"past.{layer}.{part}"] = outputs[f"present.{layer}.{part}"] = self._value(buffer)
        return inputs, outputs


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

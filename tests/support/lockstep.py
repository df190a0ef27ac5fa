"""All ranks of a sharded bundle in one process, in lockstep: every partition in ONNX Runtime, collectives in numpy.

It reads nothing but the manifest, and knows nothing of how the graphs were made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from herdgraph.runtimes.bundle.manifest import Bundle
from herdgraph.runtimes.bundle.shards import CollectiveOp
from herdgraph.runtimes.native.library import library_path

BLOCKS = 65
"""Cache blocks of 64 tokens in every layer."""

Array = np.ndarray[Any, Any]
Values = dict[str, Array]


class Rank:
    """Sessions and caches of one rank; ``values`` is what it knows by name."""

    def __init__(self, bundle: Bundle, rank: int) -> None:
        shards = bundle.manifest.shards
        assert shards is not None
        self.entry = shards.ranks[rank]
        self.sessions = [_session(bundle.directory / partition.graph) for partition in self.entry.partitions]
        inputs = {item.name: item.shape for session in self.sessions for item in session.get_inputs()}
        self.caches = {name: np.zeros((BLOCKS, shape[1]), np.uint8)
                       for name, shape in inputs.items() if name.startswith("past.")}
        self.values: Values = {}

    def begin(self, **inputs: Array) -> None:
        """Forget all values but the inputs of a call and the caches."""
        self.values = inputs | self.caches

    def run(self, index: int) -> None:
        """Run a partition; what it appends goes back into the caches."""
        session = self.sessions[index]
        names = [item.name for item in session.get_outputs()]
        given = {item.name: np.ascontiguousarray(self.values[item.name]) for item in session.get_inputs()}
        for name, value in zip(names, session.run(names, given), strict=True):
            self.values[name] = value
            if name.startswith("present."):
                self.values[name.replace("present", "past")][...] = value


class Lockstep:
    """The ranks of a bundle, for one sequence."""

    def __init__(self, bundle: Bundle) -> None:
        assert bundle.manifest.shards is not None
        self.bundle, self.plan = bundle, bundle.manifest.shards.plan
        self.ranks = [Rank(bundle, rank) for rank in range(self.plan.world)]
        self.text, self.length = bundle.manifest.config.text, 0
        self.collectives = 0

    def append(self, token_ids: list[int], features: Array | None = None) -> Array:
        """Append tokens, which must not cross a multiple of the chunk; logits of all of them."""
        width, count = self.text.hidden_size, len(token_ids)
        table = np.arange(BLOCKS, dtype=np.int32)[::-1][None]
        inputs = {
            "input_ids": np.asarray(token_ids, np.int64), "past_lengths": np.asarray([self.length], np.int32),
            "positions": np.arange(self.length, self.length + count), "logit_rows": np.arange(count, dtype=np.int64),
            "cumulative_lengths": np.asarray([0, count], np.int32),
            "block_table.global": table, "block_table.chunked": table,
            "image_features": np.zeros((0, width), np.float32) if features is None else features,
        }
        for rank in self.ranks:
            rank.begin(**inputs)
        for stage in range(self.plan.pipeline):
            self._run_stage([self.ranks[stage * self.plan.width + place] for place in range(self.plan.width)], stage)
        self.length += len(token_ids)
        return self.ranks[-1].values["logits"]

    def _run_stage(self, ranks: list[Rank], stage: int) -> None:
        for index, partition in enumerate(ranks[0].entry.partitions):
            for exchange in partition.before:
                assert exchange.op == "recv"
                assert all(exchange.value in rank.values for rank in ranks), "sent by the stage before"
            for rank in ranks:
                rank.run(index)
            for exchange in partition.after:
                self._meet(ranks, exchange, stage)

    def _meet(self, ranks: list[Rank], exchange: CollectiveOp, stage: int) -> None:
        self.collectives += 1
        given = [rank.values[exchange.value] for rank in ranks]
        if exchange.op == "send":
            for place, value in enumerate(given):
                self.ranks[(stage + 1) * self.plan.width + place].values[exchange.value] = value
            return
        joined = sum(given) if exchange.op == "all_reduce" else np.concatenate(given, exchange.axis)
        for rank in ranks:
            rank.values[exchange.result] = joined

    def prefill(self, token_ids: list[int], features: Array | None = None) -> Array:
        """Append a prompt in prefill chunks that end at multiples of the attention chunk."""
        chunk = self.text.attention_chunk_size if any(self.text.chunked_layers) else 0
        image, found, used = self.bundle.manifest.config.image_token_id, [], 0
        while token_ids:
            length = chunk - self.length % chunk if chunk else len(token_ids)
            ids, token_ids = token_ids[:length], token_ids[length:]
            images = ids.count(image) if features is not None else 0
            found.append(self.append(ids, None if features is None else features[used : used + images]))
            used += images
        return np.concatenate(found)


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    options.register_custom_ops_library(str(library_path()))
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

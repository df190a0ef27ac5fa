"""Buffers of one sequence: they double, stop at the chunk, and forks do not share them."""

from __future__ import annotations

import numpy as np

from herdgraph.model.config.presets import TINY
from herdgraph.runtimes.kv_cache.buffers import KVBuffers


def _slots(buffers: KVBuffers) -> list[int]:
    return [key.shape[2] for key, _ in buffers.layers]


def test_buffers_grow_with_the_sequence_and_stop_at_the_chunk() -> None:
    buffers, chunk = KVBuffers(TINY.text), TINY.text.attention_chunk_size
    assert _slots(buffers) == [chunk, chunk, chunk, 256]
    assert not buffers.make_room(0, 256)
    assert buffers.make_room(0, 600)
    assert _slots(buffers) == [chunk, chunk, chunk, 1024]


def test_what_is_in_a_buffer_moves_with_it_and_not_with_its_fork() -> None:
    buffers = KVBuffers(TINY.text)
    buffers.layers[3][0][:, :, 200] = 7
    twin = buffers.fork(201)
    buffers.make_room(256, 300)
    assert (buffers.layers[3][0][:, :, 200] == 7).all()
    twin.layers[3][0][:, :, 200] = 8
    assert (buffers.layers[3][0][:, :, 200] == 7).all()
    assert not np.shares_memory(twin.layers[0][1], buffers.layers[0][1])

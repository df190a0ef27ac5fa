"""Sequences in paged caches as PagedAttention is fed with them, and what it should give, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .native_packing import rms_norm, rounded, up

FLOAT32, FLOAT16, INT8 = CACHES = (0, 1, 2)
NAMES = ["query", "key", "value", "key_cache", "value_cache", "cumulative", "past", "table", "cos", "sin",
         "temperature"]
EPSILON = 1e-5
BLOCK = 64
Part = tuple[int, int, int]
"""Some tokens of a sequence: its number, the position of the first, how many."""


@dataclass(frozen=True)
class Layer:
    """What a node is told."""

    heads: int = 4
    kv_heads: int = 2
    dims: int = 20
    chunk: int = 0
    cache: int = FLOAT32
    norm: bool = True
    rotated: bool = True
    tempered: bool = False
    packed: bool = True
    """Whether query, key and value are one input."""

    @property
    def block_bytes(self) -> int:
        width = up(self.dims, 16)
        scales = 4 * BLOCK if self.cache == INT8 else 0
        return self.kv_heads * (BLOCK * width * {FLOAT32: 4, FLOAT16: 2, INT8: 1}[self.cache] + scales)

    def attributes(self) -> dict[str, Any]:
        return {"num_heads": self.heads, "kv_num_heads": self.kv_heads, "chunk": self.chunk, "cache_type": self.cache,
                "norm_epsilon": EPSILON if self.norm else 0.0}

    def start(self, position: int) -> int:
        """The first position that a position sees."""
        return position // self.chunk * self.chunk if self.chunk else 0


@dataclass
class Case:
    """A layer's node, some sequences and the caches that they share."""

    layer: Layer
    run: Any
    lengths: list[int]
    seed: int = 0
    filling: int = 0
    """The byte that blocks hold before they are written."""
    rows: list[np.ndarray] = field(init=False)
    caches: list[np.ndarray] = field(init=False)
    table: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        random, layer = np.random.default_rng(self.seed), self.layer
        width = (layer.heads + 2 * layer.kv_heads) * layer.dims
        self.rows = [random.standard_normal((length, width)).astype(np.float32) for length in self.lengths]
        most = [min(length, layer.chunk) if layer.chunk else length for length in self.lengths]
        needed = [max(1, -(-length // BLOCK)) for length in most]
        self.caches = [np.full((sum(needed) + 2, layer.block_bytes), self.filling, np.uint8) for _ in range(2)]
        blocks = iter(random.permutation(len(self.caches[0])))
        self.table = np.full((len(needed), max(needed) + 1), -1, np.int32)
        for row, count in zip(self.table, needed, strict=True):
            row[:count] = [next(blocks) for _ in range(count)]

    def feed(self, parts: list[Part]) -> dict[str, np.ndarray]:
        """The inputs of one call."""
        layer = self.layer
        x = np.concatenate([self.rows[b][first : first + count] for b, first, count in parts])
        q, kv = layer.heads * layer.dims, layer.kv_heads * layer.dims
        fed = {"query": x} if layer.packed else {"query": x[:, :q], "key": x[:, q : q + kv], "value": x[:, q + kv :]}
        positions = np.concatenate([np.arange(first, first + count) for _, first, count in parts])
        if layer.rotated:
            angles = rotation(layer, positions)
            fed |= {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
        if layer.tempered:
            fed["temperature"] = temperature(positions).astype(np.float32)
        return {name: np.ascontiguousarray(array) for name, array in fed.items()} | {
            "key_cache": self.caches[0], "value_cache": self.caches[1], "table": self.table[[b for b, *_ in parts]],
            "cumulative": np.cumsum([0, *(count for *_, count in parts)]).astype(np.int32),
            "past": np.array([first for _, first, _ in parts], np.int32)}

    def step(self, parts: list[Part]) -> np.ndarray:
        """One call; the caches move on."""
        y, *self.caches = self.run(**self.feed(parts))
        return y

    def meant(self, part: Part) -> np.ndarray:
        """What some tokens of a sequence should give, all of it computed at once."""
        layer, (b, first, count) = self.layer, part
        x = self.rows[b][: first + count].astype(float).reshape(first + count, -1, layer.dims)
        q, k, v = x[:, : layer.heads], x[:, layer.heads : -layer.kv_heads], x[:, -layer.kv_heads :]
        if layer.rotated:
            q, k = (rotate(rows, rotation(layer, np.arange(len(x)))[:, None]) for rows in (q, k))
        if layer.norm:
            q, k = (rms_norm(rows, 1, EPSILON) for rows in (q, k))
        if layer.tempered:
            q = q * temperature(np.arange(len(x)))[:, None, None]
        mixing = hadamard(layer.dims) if layer.cache == INT8 else np.eye(layer.dims)
        k = stored(layer.cache, k @ mixing) @ mixing
        k, v = (rows.repeat(layer.heads // layer.kv_heads, 1) for rows in (k, stored(layer.cache, v)))
        return np.array([attended(q[t], k[layer.start(t) : t + 1], v[layer.start(t) : t + 1])
                         for t in range(first, first + count)])


def rotation(layer: Layer, positions: np.ndarray) -> np.ndarray:
    half = layer.dims // 2
    return positions[:, None] / 10000 ** (np.arange(half) / half)


def temperature(positions: np.ndarray) -> np.ndarray:
    return 1 + 0.1 * np.log(1 + np.floor((positions + 1) / 16))


def rotate(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def hadamard(dims: int) -> np.ndarray:
    """The transform of each 64 channels of a head, of fewer where the width is no multiple of it, of none below 8."""
    block, matrix = math.gcd(dims, 64), np.eye(1)
    if block < 8:
        return np.eye(dims)
    while len(matrix) < block:
        matrix = np.kron(matrix, [[1, 1], [1, -1]]) / 2**0.5
    return np.kron(np.eye(dims // block), matrix)


def stored(cache: int, x: np.ndarray) -> np.ndarray:
    if cache == INT8:
        return rounded(x)
    return x if cache == FLOAT32 else x.astype(np.float16).astype(float)


def attended(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    scores = np.einsum("hd,thd->ht", q, k) / q.shape[-1] ** 0.5
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return np.einsum("ht,thd->hd", weights / weights.sum(1, keepdims=True), v).reshape(-1)


def close(y: np.ndarray, want: np.ndarray, cache: int) -> bool:
    """To float32's precision; what is rounded for the cache may lie on an edge, and is worth a step there."""
    errors = np.abs(y - want) / np.abs(want).max()
    return bool(errors.max() < {FLOAT32: 1e-5, FLOAT16: 1e-3, INT8: 2e-2}[cache] and np.median(errors) < 1e-3)

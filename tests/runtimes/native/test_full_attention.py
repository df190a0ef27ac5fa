"""FullAttention against numpy in float64, on every unit: any sizes, rows alone and in company, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Node = Callable[..., Any]


def attention(qkv: np.ndarray, heads: int, cos: np.ndarray | None = None, sin: np.ndarray | None = None) -> np.ndarray:
    """What it should give, [B, T, H d]."""
    batch, tokens, width = qkv.shape
    parts = qkv.astype(float).reshape(batch, tokens, 3, heads, -1).transpose(2, 0, 3, 1, 4)
    turned = parts[:2] if cos is None or sin is None else [rotated(part, cos, sin) for part in parts[:2]]
    q, k, v = (*turned, parts[2])
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(1, 2).reshape(batch, tokens, width // 3)


def rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    even, odd = x[..., ::2], x[..., 1::2]
    return np.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(x.shape)


@pytest.mark.parametrize(("batch", "tokens", "heads", "dims"), [
    (1, 1, 1, 1), (2, 17, 2, 16), (1, 65, 3, 6), (1, 130, 1, 88),
])  # fmt: skip
def test_any_sizes(node: Node, batch: int, tokens: int, heads: int, dims: int) -> None:
    """The same numbers as in float64, with and without rotation; a picture's bits do not depend on the others."""
    random = np.random.default_rng(0)
    qkv = random.standard_normal((batch, tokens, 3 * heads * dims)).astype(np.float32)
    angles = random.standard_normal((tokens, dims // 2))
    tables = {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    for rotation in ({}, tables) if dims % 2 == 0 else ({},):
        run = node("FullAttention", {"num_heads": heads}, rotation, ["qkv", "cos", "sin"], threads=2)
        (y,) = run(qkv=qkv)
        np.testing.assert_allclose(y, attention(qkv, heads, **rotation), atol=1e-5)
        assert np.array_equal(run(qkv=qkv[-1:])[0], y[-1:])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_picture(node: Node, bad: float) -> None:
    random = np.random.default_rng(1)
    qkv = random.standard_normal((3, 70, 3 * 2 * 16)).astype(np.float32)
    run = node("FullAttention", {"num_heads": 2}, {}, ["qkv", "cos", "sin"])
    (clean,) = run(qkv=qkv)
    qkv[1, 66, 40] = bad  # a key of head 0
    (y,) = run(qkv=qkv)
    assert not np.isfinite(y[1, :, :16]).all()
    assert np.array_equal(y[[0, 2]], clean[[0, 2]])
    assert np.array_equal(y[1, :, 16:], clean[1, :, 16:])


def test_no_tokens(node: Node) -> None:
    run = node("FullAttention", {"num_heads": 2}, {}, ["qkv", "cos", "sin"])
    assert run(qkv=np.zeros((0, 5, 24), np.float32))[0].shape == (0, 5, 8)
    assert run(qkv=np.zeros((2, 0, 24), np.float32))[0].shape == (2, 0, 8)


@pytest.mark.parametrize(("shape", "heads", "tables"), [
    ((5, 24), 2, {}), ((1, 5, 25), 2, {}), ((1, 5, 24), 0, {}), ((1, 5, 24), 2, {"cos": (5, 2)}),
    ((1, 5, 24), 2, {"cos": (4, 2), "sin": (5, 2)}), ((1, 5, 18), 2, {"cos": (5, 1), "sin": (5, 1)}),
    ((1, 5, 3 * 600), 1, {}),
])  # fmt: skip
def test_wrong_sizes_are_refused(
    node: Node, shape: tuple[int, ...], heads: int, tables: dict[str, tuple[int, ...]],
) -> None:
    weights = {name: np.ones(size, np.float32) for name, size in tables.items()}
    run = node("FullAttention", {"num_heads": heads}, weights, ["qkv", "cos", "sin"])
    with pytest.raises(Exception, match="FullAttention: "):
        run(qkv=np.ones(shape, np.float32))

"""What operators compute, in float64 and in as few lines as it can be said."""

from __future__ import annotations

import numpy as np

from .graphs import Array


def error(found: Array, wanted: Array) -> float:
    """Relative error of all elements together; what is not finite never passes."""
    difference = np.linalg.norm(found.astype(np.float64) - wanted) / np.linalg.norm(wanted)
    return float(difference) if np.isfinite(found).all() else float("inf")


def routed_experts(x: Array, chosen: Array, gate_up: Array, down: Array) -> Array:
    """SwiGLU of each row x [N, D] in its chosen expert; gate_up [E, 2F, D] is gates, then ups; down [E, D, F]."""
    rows = []
    for row, expert in zip(x, chosen, strict=True):
        gate, up = np.split(gate_up[expert] @ row, 2)
        rows.append(down[expert] @ (gate / (1 + np.exp(-gate)) * up))
    return np.stack(rows)


def interleaved(gate_up: Array) -> Array:
    """Rows g0, u0, g1, u1, ... of rows g0, g1, ..., u0, u1, ...; axis 1."""
    experts, rows, *rest = gate_up.shape
    return gate_up.reshape(experts, 2, rows // 2, *rest).swapaxes(1, 2).reshape(gate_up.shape)


def attention(q: Array, k: Array, v: Array) -> Array:
    """Causal attention of the last tokens: q [S, H, K], k and v [L, G, K] of all L tokens so far."""
    tokens, length, group = len(q), len(k), q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("shk,lhk->hsl", q, k) / np.sqrt(q.shape[-1])
    seen = np.arange(length)[None] <= length - tokens + np.arange(tokens)[:, None]
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hsl,lhk->shk", weights / weights.sum(-1, keepdims=True), v)


def normed(x: Array) -> Array:
    """Root mean square 1 along the last axis."""
    return np.asarray(x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5))


def rotary_tables(positions: int, width: int) -> tuple[Array, Array]:
    """Cosines and sines [positions, width / 2] of Llama 4's angles, without their scaling."""
    half = width // 2
    angles = np.arange(positions)[:, None] / 500_000.0 ** (np.arange(half)[None] / half)
    return np.cos(angles), np.sin(angles)


def rotated(x: Array, positions: Array, cos: Array, sin: Array) -> Array:
    """Pairs of neighbors turned by their position's angles: x [S, H, K], cos and sin [P, K/2]."""
    cos, sin = cos[positions][:, None], sin[positions][:, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)


def quantized(w: Array, bits: int, block: int) -> tuple[Array, Array, Array]:
    """Codes (two to a byte for 4 bits), scales per block of the last axis, and what they stand for."""
    half = 2 ** (bits - 1)
    blocks = w.reshape(*w.shape[:-1], -1, block)
    scales = np.abs(blocks).max(-1, keepdims=True) / (half - 1)
    codes = np.clip(np.round(blocks / scales) + half, 0, 2 * half - 1)
    stored = codes.reshape(w.shape).astype(np.uint8)
    if bits == 4:
        stored = stored[..., 0::2] | (stored[..., 1::2] << 4)
    return stored, scales[..., 0], ((codes - half) * scales).reshape(w.shape)

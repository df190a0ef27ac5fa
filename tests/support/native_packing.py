"""Weights as the native operators read them (runtimes/native/src/kernels.h), packed by plain numpy, and what they mean.

An oracle that shares nothing with the export's own packing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FLOAT32, INT8, INT4, INT8_BLOCKS, BITS4, BITS5, BITS6 = FORMATS = (0, 1, 2, 3, 4, 5, 6)
MIXTURE_FORMATS = tuple(number for number in FORMATS if number != INT8_BLOCKS)


@dataclass(frozen=True)
class Packed:
    """One matrix [K, N]."""

    codes: np.ndarray
    """Bytes in tiles."""
    scales: np.ndarray | None
    """Per channel, of int8 only; as many as the tiles have."""
    weights: np.ndarray
    """The numbers that the codes stand for, float64 [K, N]."""


def up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def filled(w_KN: np.ndarray) -> np.ndarray:
    """Zeros up to a multiple of 64 inputs and 32 channels."""
    k, n = w_KN.shape
    return np.pad(w_KN, ((0, up(k, 64) - k), (0, up(n, 32) - n)))


def pack(number: int, w_KN: np.ndarray) -> Packed:
    """A matrix in one of FORMATS."""
    return _bits(number, w_KN) if number >= BITS4 else (_float32, _int8, _int4, _int8_blocks)[number](w_KN)


def _float32(w_KN: np.ndarray) -> Packed:
    w = filled(w_KN.astype(np.float32))
    tiles = w.reshape(len(w), -1, 32).transpose(1, 0, 2)
    return Packed(np.ascontiguousarray(tiles).view(np.uint8).reshape(-1), None, w_KN.astype(np.float32).astype(float))


def _int8(w_KN: np.ndarray) -> Packed:
    scales = (np.abs(w_KN).max(0) / 127).astype(np.float32)
    scales[scales == 0] = 1
    codes = np.rint(w_KN / scales).astype(int)
    whole = filled(codes) + 128
    tiles = whole.astype(np.uint8).reshape(len(whole) // 4, 4, -1, 32).transpose(2, 0, 3, 1)
    pad = whole.shape[1] - len(scales)
    return Packed(tiles.reshape(-1), np.pad(scales, (0, pad), constant_values=1), codes * scales.astype(float))


def _int4(w_KN: np.ndarray) -> Packed:
    w = filled(w_KN)
    k, n = w.shape
    blocks = w.reshape(k // 32, 32, n)
    low, high = np.minimum(blocks.min(1), 0), np.maximum(blocks.max(1), 0)
    scales = ((high - low) / 15).astype(np.float16).astype(float)
    scales[scales == 0] = 1
    zeros = np.clip(np.rint(-low / scales), 0, 15)
    codes = np.clip(np.rint(blocks / scales[:, None]) + zeros[:, None], 0, 15).astype(np.uint8)
    weights = ((codes - zeros[:, None]) * scales[:, None]).reshape(k, n)[: w_KN.shape[0], : w_KN.shape[1]]

    eights = codes.reshape(k // 64, 2, 4, 2, 4, n // 32, 32)  # record, block, i, half, input, tile, channel
    nibbles = (eights[:, :, :, 0] | eights[:, :, :, 1] << 4).transpose(4, 0, 1, 2, 5, 3)

    def per_block(values: np.ndarray, dtype: type) -> np.ndarray:
        tiles = values.reshape(k // 64, 2, n // 32, 32).transpose(2, 0, 1, 3).astype(dtype)
        return np.ascontiguousarray(tiles).view(np.uint8).reshape(n // 32, k // 64, -1)

    records = (nibbles.reshape(n // 32, k // 64, 1024), per_block(scales, np.float16), per_block(zeros, np.uint8))
    return Packed(np.concatenate(records, -1).reshape(-1), None, weights)


def _int8_blocks(w_KN: np.ndarray) -> Packed:
    w = filled(w_KN)
    k, n = w.shape
    blocks = w.reshape(k // 64, 64, n)
    scales = (np.abs(blocks).max(1) / 127).astype(np.float32)
    scales[scales == 0] = 1
    codes = np.rint(blocks / scales[:, None])
    weights = (codes * scales[:, None].astype(float)).reshape(k, n)[: w_KN.shape[0], : w_KN.shape[1]]
    fours = (codes + 128).astype(np.uint8).reshape(k // 64, 16, 4, n // 32, 32).transpose(3, 0, 1, 4, 2)
    tiled = np.ascontiguousarray(scales.reshape(k // 64, n // 32, 32).transpose(1, 0, 2)).view(np.uint8)
    records = (fours.reshape(n // 32, k // 64, -1), tiled.reshape(n // 32, k // 64, -1))
    return Packed(np.concatenate(records, -1).reshape(-1), None, weights)


def _bits(bits: int, w_KN: np.ndarray) -> Packed:
    """Formats 4 to 6: as many bits, in blocks of 64 inputs."""
    w, largest = filled(w_KN), 2**bits - 1
    k, n = w.shape
    blocks = w.reshape(k // 64, 64, n)
    low, high = np.minimum(blocks.min(1), 0), np.maximum(blocks.max(1), 0)
    scales = ((high - low) / largest).astype(np.float16).astype(float)
    scales[scales == 0] = 1
    zeros = np.clip(np.rint(-low / scales), 0, largest)
    codes = np.clip(np.rint(blocks / scales[:, None]) + zeros[:, None], 0, largest).astype(np.uint8)
    weights = ((codes - zeros[:, None]) * scales[:, None]).reshape(k, n)[: w_KN.shape[0], : w_KN.shape[1]]
    records = np.zeros((n // 32, k // 64, 256 * bits + 96), np.uint8)
    for j in range(64):
        i, half, e = j // 8, j // 4 % 2, j % 4
        code = codes[:, j].reshape(k // 64, n // 32, 32).transpose(1, 0, 2)
        records[:, :, (i * 32 + np.arange(32)) * 4 + e] |= (code & 15) << (4 * half)
        if bits > 4:
            place = (2 * i + half) * (bits - 4)
            records[:, :, 1024 + (place // 8 * 32 + np.arange(32)) * 4 + e] |= code >> 4 << place % 8

    def tiled(values: np.ndarray, dtype: type) -> np.ndarray:
        tiles = np.ascontiguousarray(values.reshape(k // 64, n // 32, 32).transpose(1, 0, 2).astype(dtype))
        return tiles.view(np.uint8).reshape(n // 32, k // 64, -1)

    records[:, :, 256 * bits :] = np.concatenate([tiled(scales, np.float16), tiled(zeros, np.uint8)], -1)
    return Packed(records.reshape(-1), None, weights)


def gate_up(w_D2F: np.ndarray) -> np.ndarray:
    """Columns of gate beside those of up, in turns of 16, as a mixture's first product wants them."""
    d, f2 = w_D2F.shape
    halves = np.pad(w_D2F.reshape(d, 2, f2 // 2), ((0, 0), (0, 0), (0, up(f2 // 2, 16) - f2 // 2)))
    return halves.reshape(d, 2, -1, 16).transpose(0, 2, 1, 3).reshape(d, -1)


def rounded(x: np.ndarray) -> np.ndarray:
    """Rows in 8 bits of their own, as products with integer weights and 8-bit caches see them."""
    scales = np.abs(x).max(-1, keepdims=True) / 127
    scales[scales == 0] = 1
    return np.rint(x / scales) * scales


def rounded_in_blocks(x: np.ndarray) -> np.ndarray:
    """The same, in blocks of 64 inputs."""
    width = x.shape[-1]
    blocks = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, up(width, 64) - width)]).reshape(*x.shape[:-1], -1, 64)
    return rounded(blocks).reshape(*x.shape[:-1], -1)[..., :width]


def layer_norm(x: np.ndarray, gain: np.ndarray, shift: np.ndarray, epsilon: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * gain + shift


def rms_norm(x: np.ndarray, gain: np.ndarray | float, epsilon: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * gain


def hadamard(size: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    return matrix / np.sqrt(size)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))

"""A checkpoint whose residual stream is rotated: the same function, without inputs that stand out.

Trained transformers carry a few residual channels that are tens of times larger than the rest, and a scale that
reaches them resolves the others badly. For any orthogonal R the model may as well compute in the basis R
(Ashkboos et al. 2024, "QuaRot"; SliceGPT):

    E' = E R        W_in' = W_in diag(g) R        W_out' = R^T W_out        norm(x R) = norm(x) R  once g is folded

where g is the weight of the norm before a product, which becomes one. A head that is tied to the table has weights of
its own then, or reads its inputs through R^T diag(g) R and keeps the table's. R mixes all channels, so that each looks
like a normal variable, at no cost when the model runs.

Attention adds values up, channel by channel. So each head may keep them in a basis of its own, too, R_h: caches hold
v R_h, and the output projection reads its inputs in it:

    W_v' = R_h^T W_v        W_o' = W_o R_h        for the rows of W_v and the columns of W_o of every head

The model computes the same function whatever R is; R is a product of signs, Hadamard matrices and,
for the odd factor of the width, one small random orthogonal matrix, so that applying it costs little.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from ..config import HerdConfig
from ..config.names import norm_before
from . import Checkpoint

_LARGEST_FACTOR = 64
_ROWS = 32
"""Rows that are rotated at once."""
_WIDE = 16
"""Products with factors from this size are made without exchanging axes."""
_SEED = 20260


@lru_cache
def hadamard(size: int) -> Tensor:
    """Orthogonal Hadamard matrix (Sylvester), float32 [size, size], symmetric; ``size`` is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix / math.sqrt(size)


@lru_cache
def head_rotation(head_dim: int) -> Tensor:
    """R_h, the basis of the values of a head: orthogonal, float32 [K, K]."""
    return Rotation(head_dim)(torch.eye(head_dim))


def power_of_two_in(width: int, limit: int) -> int:
    """The largest power of two that divides ``width``, at most ``limit``."""
    return math.gcd(width, limit)


@dataclass(frozen=True)
class Rotation:
    """R = diag(signs) (F1 x F2 x ...), a Kronecker product of small orthogonal matrices; rows are rotated as x R."""

    width: int

    @cached_property
    def signs(self) -> Tensor:
        """One sign per channel, seeded."""
        generator = torch.Generator().manual_seed(_SEED)
        return torch.randint(0, 2, (self.width,), generator=generator).mul(2).sub(1).float()

    @cached_property
    def factors(self) -> list[Tensor]:
        """Hadamard matrices of the power of two in the width, and a random one for the rest, small ones as one."""
        factors, rest = [], self.width
        while (size := power_of_two_in(rest, _LARGEST_FACTOR)) > 1:
            factors.append(hadamard(size))
            rest //= size
        if rest > 1:
            noise = torch.randn(rest, rest, generator=torch.Generator().manual_seed(_SEED))
            factors.append(torch.linalg.qr(noise)[0].contiguous())
        if len(factors) > 1 and len(factors[-1]) < _WIDE and len(factors[-2]) * len(factors[-1]) <= 2 * _LARGEST_FACTOR:
            factors[-2:] = [torch.kron(*factors[-2:])]
        return factors

    def __call__(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        """X diag(gain) R along the last axis, in float32; some rows at a time, which stay in the cache."""
        signs_D = self.signs if gain is None else self.signs * gain
        rows_ND = x.reshape(-1, self.width)
        y_ND = torch.from_numpy(np.empty(rows_ND.shape, np.float32))  # in huge pages, which torch does not ask for
        for part_ND, found_ND in zip(rows_ND.split(_ROWS), y_ND.split(_ROWS), strict=True):
            # What lies by columns is taken out of its matrix first: a page per row would be touched for every column.
            near_ND = part_ND if part_ND.stride(1) == 1 else part_ND.T.contiguous().T
            found_ND.copy_(self._mixed(torch.empty(part_ND.shape).copy_(near_ND).mul_(signs_D)))
        return y_ND.view(x.shape)

    def _mixed(self, y_ND: Tensor) -> Tensor:
        """Multiply by one factor after the other. Axes are exchanged only where products would be tiny."""
        after, shape = self.width, y_ND.shape
        for factor in self.factors:
            size, after = len(factor), after // len(factor)
            if after == 1:
                y_ND = y_ND.reshape(-1, size) @ factor
            elif min(size, after) >= _WIDE:
                y_ND = factor.T @ y_ND.reshape(-1, size, after)
            else:
                y_ND = (y_ND.reshape(-1, size, after).mT @ factor).mT
        return y_ND.reshape(shape)


class RotatedCheckpoint:
    """Reads another checkpoint's tensors in the rotated basis, one at a time and only when asked.

    Attributes:
        config: the model's, with a head of its own when it was tied: the final norm's weight moves into it.
        rotate: turns rows of the residual stream into this basis.
    """

    def __init__(self, source: Checkpoint) -> None:
        self.source = source
        self.config: HerdConfig = replace(source.config, text=replace(source.config.text, tie_word_embeddings=False))
        self.rotate = Rotation(self.config.text.hidden_size)
        self._kept = threading.local()

    def read(self, name: str, index: int | slice | None = None) -> Tensor:
        """A tensor, or one slice of its first axis, as ``Checkpoint.read``; float32 where it was rotated."""
        role = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if name.startswith("vision_model."):
            return self.source.read(name, index)
        if role.endswith("norm"):
            return torch.ones_like(self.source.read(name, index))
        if role == "gate_up_proj":
            return self._experts(name, index)
        if role == "embed_tokens" or ".experts." in name:
            return self.rotate(self.source.read(name, index))
        if role in ("v_proj", "o_proj", "down_proj", "linear_1"):
            whole = self._whole(name)
            return whole if index is None else whole[index]
        tied = role == "lm_head" and self.source.config.text.tie_word_embeddings
        weight = self.source.read("embed_tokens.weight" if tied else name, index)
        return self.rotate(weight, self._gain(name))

    @property
    def ties_head(self) -> bool:
        """Whether the head's weights are those of the table, but for the norm's."""
        return self.source.config.text.tie_word_embeddings

    def tied_head_inputs(self) -> Tensor:
        """M = R^T diag(g) R, [D, D]: the logits of a tied head are n M E'^T of what the last norm gives, n."""
        return self.rotate(self.rotate(torch.eye(self.rotate.width)).T, self._gain("lm_head.weight"))

    def rotate_heads(self, x: Tensor) -> Tensor:
        """The last axis, what all heads give, one after the other, in the basis of their values; float32."""
        basis_KK = head_rotation(self.config.text.head_dim)
        return (x.float().unflatten(-1, (-1, len(basis_KK))) @ basis_KK).flatten(-2)

    def _experts(self, name: str, index: int | slice | None) -> Tensor:
        """Inputs are the second axis of fused experts: [E, D, 2F], or [D, 2F] of one."""
        return self.rotate(self.source.read(name, index).mT, self._gain(name)).mT

    def _whole(self, name: str) -> Tensor:
        """A tensor whose rows mix; each thread keeps its last one, because it is read in pieces."""
        last: tuple[str, Tensor] | None = getattr(self._kept, "last", None)
        if last is None or last[0] != name:
            last = self._kept.last = name, self._mixed(name, self.source.read(name))
        return last[1]

    def _mixed(self, name: str, weight: Tensor) -> Tensor:
        if name.endswith("v_proj.weight"):
            return self.rotate(self.rotate_heads(weight.T).T, self._gain(name))
        return self.rotate((self.rotate_heads(weight) if name.endswith("o_proj.weight") else weight).T).T

    def _gain(self, name: str) -> Tensor:
        """The weight of the norm whose output a product reads, [D]."""
        norm = norm_before(name)
        assert norm is not None, name
        return self.source.read(norm).float()

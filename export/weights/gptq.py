"""Rounding that makes up for its own errors (Frantar et al. 2022, "GPTQ").

For the Hessian H = XᵀX of a product's inputs X, minimise  tr((W - Q)ᵀ H (W - Q))  one input after the other:
round row k of W [K, N], and let the rows that are not rounded yet take over what it did wrong on the data:

    U^T U = (H + d I)^-1,  U upper triangular        e = (w_k - q_k) / U_kk        w_j -= e U_kj   for j > k

d is a share of the mean of H's diagonal; it keeps inputs that the data hardly uses in check. Scales and zero points
of a block of inputs are fitted when its first one comes up, to the weights as they are by then.

Inputs lie before outputs here, [K, N]: what happens to an input is arithmetic on contiguous memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

DAMPING = 0.01
"""d, as a share of the mean of the diagonal."""
_LAZY = 256
"""Inputs after which the weights far behind take over errors: more at once are a product that the memory keeps up with.
A multiple of every block."""
_NEAR = 16
"""Inputs after which the rest of their block takes over errors: fewer passes over it than after every one."""
CHANNEL_BLOCK = 64
"""Inputs that are rounded together where a scale is a whole channel's."""
_SMALL = 128
"""Triangular matrices up to twice this size are inverted at once."""


class Rounder(Protocol):
    """Fits scales to blocks of weights and rounds by them."""

    @property
    def block(self) -> int:
        """Inputs that share a scale."""

    def fit(self, blocks: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scales and zero points [b, N] of blocks [b, K, N]; ``weight`` [b, K] says which errors matter."""

    def round(self, blocks: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """The nearest numbers that codes stand for, without their scale: codes less zero points, as float32."""


@dataclass(frozen=True)
class KnownScales:
    """The half of a ``Rounder`` whose scales are those of whole output channels, known beforehand.

    Attributes:
        scales_N: of output channels.
        block: inputs that are rounded before the rest learns of their errors; a matter of speed alone.
    """

    scales_N: Tensor
    block: int = CHANNEL_BLOCK

    def fit(self, blocks: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The scales, and zero points of 0, [b, N] for blocks [b, K, N]."""
        del weight
        scales_bN = self.scales_N.expand(len(blocks), -1)
        return scales_bN, torch.zeros_like(scales_bN)


def inverse_hessian_cholesky(hessian_KK: Tensor) -> Tensor:
    """U, with U^T U = (H + d I)^-1, float32 [K, K]; d lets inputs that were never seen count a little.

    With H + d I = R R^T for an upper triangular R, which is what Cholesky's factor is in the reverse order of inputs,
    U is the inverse of R: one factor instead of two, and no inverse of H.
    """
    h = hessian_KK.flip(0, 1).double()
    del hessian_KK  # the largest matrices of a build: who hands over the only reference has its memory back
    h.diagonal().add_(DAMPING * h.diagonal().mean().clamp(min=1e-12))
    in_place = h.mT  # symmetric, and by columns, as LAPACK wants it
    torch.linalg.cholesky(in_place, out=in_place)
    lower = in_place.float()
    del h, in_place
    _invert(lower)
    return lower.flip(0, 1)


def _invert(lower_KK: Tensor) -> None:
    """Turn a lower triangular matrix into its inverse, in place: halves by themselves, and what lies between them."""
    half = len(lower_KK) // 2
    if half < _SMALL:
        lower_KK.copy_(torch.linalg.solve_triangular(lower_KK, torch.eye(len(lower_KK)), upper=False))
        return
    first, below, second = lower_KK[:half, :half], lower_KK[half:, :half], lower_KK[half:, half:]
    _invert(first)
    _invert(second)
    below.copy_(second @ (below @ first)).neg_()


def gptq_quantize(weight_KN: Tensor, factor_KK: Tensor, rounder: Rounder) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize output channels.

    Args:
        weight_KN: weights, K a multiple of the block.
        factor_KK: of ``inverse_hessian_cholesky``.
        rounder: to a block format.

    Returns:
        Codes less zero points [b, block, N], scales [b, N] and zero points [b, N], all float32.
    """
    left, size = weight_KN.clone(), rounder.block
    codes, scales, zeros = [], [], []
    for begin in range(0, len(left), _LAZY):
        end, errors = begin + _LAZY, []
        for first in range(begin, min(end, len(left)), size):
            last = first + size
            block_BN, upper_BB = left[first:last], factor_KK[first:last, first:last]
            importance_B = upper_BB.diagonal().square().reciprocal()
            scale, zero = rounder.fit(block_BN[None], importance_B[None])
            found, errors_BN = _round_block(block_BN, upper_BB, scale, zero, rounder)
            left[last:end].addmm_(factor_KK[first:last, last:end].T, errors_BN, alpha=-1)
            errors.append(errors_BN)
            codes.append(found)
            scales.append(scale[0])
            zeros.append(zero[0])
        left[end:].addmm_(factor_KK[begin:end, end:].T, torch.cat(errors), alpha=-1)
    return torch.stack(codes), torch.stack(scales), torch.stack(zeros)


def _round_block(
    block_BN: Tensor, upper_BB: Tensor, scale: Tensor, zero: Tensor, rounder: Rounder
) -> tuple[Tensor, Tensor]:
    """Codes of one block, input by input, and the errors that later blocks take over; the block is used up."""
    codes_BN, errors_BN = torch.empty_like(block_BN), torch.empty_like(block_BN)
    for first in range(0, len(block_BN), _NEAR):
        end = min(first + _NEAR, len(block_BN))
        for k in range(first, end):
            codes_BN[k] = rounder.round(block_BN[None, k : k + 1], scale, zero)[0, 0]
            torch.sub(block_BN[k], codes_BN[k] * scale[0], out=errors_BN[k]).div_(upper_BB[k, k])
            block_BN[k + 1 : end].addr_(upper_BB[k, k + 1 : end], errors_BN[k], alpha=-1)
        block_BN[end:].addmm_(upper_BB[first:end, end:].T, errors_BN[first:end], alpha=-1)
    return codes_BN, errors_BN

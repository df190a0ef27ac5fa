"""Rounding that makes up for its own errors (Frantar et al. 2022, "GPTQ").

For the Hessian H = XᵀX of a product's inputs X, minimise  tr((W - Q) H (W - Q)ᵀ)  one input after
the other: round column k, and let the columns that are not rounded yet take over what it did wrong on the data:

    U^T U = (H + d I)^-1,  U upper triangular        e = (w_k - q_k) / U_kk        w_j -= e U_kj   for j > k

d is a share of the mean of H's diagonal; it keeps inputs that the data hardly uses in check. Scales and zero points
of a block are fitted when its first column comes up, to the weights as they are by then.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

DAMPING = 0.01
"""d, as a share of the mean of the diagonal."""
_SMALL = 128
"""Triangular matrices up to twice this size are inverted at once."""


class Rounder(Protocol):
    """Fits scales to blocks of weights and rounds by them."""

    @property
    def block(self) -> int:
        """Inputs that share a scale."""

    def fit(self, blocks: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scales and zero points [N, b] of blocks [N, b, K]; ``weight`` [b, K] says which errors matter."""

    def round(self, blocks: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """Nearest codes as float32."""


def inverse_hessian_cholesky(hessian_KK: Tensor) -> Tensor:
    """U, with U^T U = (H + d I)^-1, float32 [K, K]; d lets inputs that were never seen count a little.

    With H + d I = R R^T for an upper triangular R, which is what Cholesky's factor is in the reverse order of inputs,
    U is the inverse of R: one factor instead of two, and no inverse of H.
    """
    h = hessian_KK.flip(0, 1).double()
    h.diagonal().add_(DAMPING * h.diagonal().mean().clamp(min=1e-12))
    lower = torch.linalg.cholesky(h)
    del h
    lower = lower.float()
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


def gptq_quantize(rows_NK: Tensor, factor_KK: Tensor, rounder: Rounder) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize output channels.

    Args:
        rows_NK: weights, K a multiple of the block.
        factor_KK: of ``inverse_hessian_cholesky``.
        rounder: to a block format.

    Returns:
        Codes [N, b, block], scales [N, b] and zero points [N, b], all float32.
    """
    rows, size = rows_NK.clone(), rounder.block
    codes, scales, zeros = [], [], []
    for first in range(0, rows.shape[1], size):
        block, upper = rows[:, first : first + size], factor_KK[first : first + size]
        weight = upper[:, first : first + size].diagonal().square().reciprocal()
        scale, zero = (part[:, 0] for part in rounder.fit(block[:, None], weight[None]))
        found, errors = _round_block(block, upper[:, first : first + size], scale, zero, rounder)
        rows[:, first + size :] -= errors @ upper[:, first + size :]
        codes.append(found)
        scales.append(scale)
        zeros.append(zero)
    return torch.stack(codes, 1), torch.stack(scales, 1), torch.stack(zeros, 1)


def _round_block(
    block: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, rounder: Rounder
) -> tuple[Tensor, Tensor]:
    """Codes of one block [N, size], column by column, and the errors that later blocks take over."""
    codes, errors = torch.empty_like(block), torch.empty_like(block)
    for column in range(block.shape[1]):
        codes[:, column] = rounder.round(block[:, column, None], scale, zero)[:, 0]
        wrong = block[:, column] - (codes[:, column] - zero) * scale
        errors[:, column] = wrong / upper[column, column]
        block[:, column:] -= errors[:, column, None] * upper[column, column:]
    return codes, errors

"""Hessians XᵀX of the inputs X of matrix products: what GPTQ needs to know of the data.

    H = sum over tokens of  x^T x        [K, K], for the input x [K] of a weight [K, N]

X is taken without the weight of the norm before it (``model/quantization/hessian_basis.py``).

The error of a quantised product on the data is  tr((W - Q)^T H (W - Q)).  A routed expert's Hessian is that of its own
tokens, scaled by its score as in the model, and of a share of the tokens of all experts of its layer, which is what an
expert that saw few tokens is quantised by.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHARED_HESSIAN_WEIGHT = 0.05
"""Weight with which the Hessians of all experts of a layer are added to that of each."""


class HessianSums:
    """Adds up XᵀX by the name of the weight that X meets; experts are stacked, [E, K, K]."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, x: Tensor, *, expert: int | None = None, experts: int = 0) -> None:
        """Take in the rows of x [..., K]."""
        rows = x.reshape(-1, x.shape[-1]).float()
        size = rows.shape[1]
        if name not in self.sums:
            self.sums[name] = torch.zeros((experts, size, size) if expert is not None else (size, size))
        target = self.sums[name] if expert is None else self.sums[name][expert]
        target.addmm_(rows.T, rows)

    def finish(self) -> dict[str, Tensor]:
        """The sums as they are stored, to every expert's a share of its layer's added in place: once, at the end."""
        for total in self.sums.values():
            if total.ndim == 3:
                total.add_(total.sum(0), alpha=SHARED_HESSIAN_WEIGHT)
        return self.sums

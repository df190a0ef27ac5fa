"""Second moments of the inputs of matrix products: what GPTQ needs to know of the data.

    H = sum over tokens of  x^T x        [K, K], for the input x [K] of a weight [K, N]

The error of a quantised product on the data is  tr((W - Q)^T H (W - Q)).  A routed expert is seen by its own tokens
only, its input scaled by its score as in the model; one that saw few borrows a share of what all experts of its layer
saw.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHARED_HESSIAN_WEIGHT = 0.05
"""Share of the moments of all experts of a layer that each expert gets besides its own."""


class Moments:
    """Accumulates x^T x by the name of the weight that x meets; experts are stacked, [E, K, K]."""

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

    def tensors(self) -> dict[str, Tensor]:
        """The sums as they are stored, every expert's with its share of its layer's."""
        def shared(total: Tensor) -> Tensor:
            return total if total.ndim < 3 else total + SHARED_HESSIAN_WEIGHT * total.sum(0, keepdim=True)

        return {name: shared(total).contiguous() for name, total in self.sums.items()}

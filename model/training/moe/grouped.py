"""One seam for the products of experts: rows sorted by expert, each group times its own matrix.

    y[r] = x[r] W[e]      for the rows r of expert e,      offsets[e - 1] <= r < offsets[e]

Gradients:  dx[r] = dy[r] W[e]^T  is such a product again, and  dW[e] = x_e^T dy_e  sums over the rows of a group, zero
when it is empty. ``torch.nn.functional.grouped_mm`` computes all three. It refuses float64 and rows whose bytes are no
multiple of 16, and its backward refuses a gradient that was expanded (torch 2.13); a loop over experts serves the rest.

Shapes: R rows (tokens x chosen experts) sorted by expert, E experts, K inputs and N outputs of a product.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

_KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNMENT = 16


def offsets_of(counts_E: Tensor) -> Tensor:
    """Where each expert's rows end, int32 [E], as kernels want it."""
    return counts_E.cumsum(0).to(torch.int32)


def inverse(order_R: Tensor) -> Tensor:
    """The permutation that undoes another, int64 [R]."""
    return torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))


def groups(offsets_E: Tensor) -> list[slice]:
    """The rows of each expert; waits for the device."""
    ends = offsets_E.tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def grouped_product(x_RK: Tensor, weight_EKN: Tensor, offsets_E: Tensor) -> Tensor:
    """Rows times the matrix of their expert, [R, N], differentiable in both.

    Args:
        x_RK: rows sorted by expert.
        weight_EKN: a matrix per expert, of the same type.
        offsets_E: int32, where each expert's rows end; the last one is R.
    """
    if fits_kernel(x_RK, weight_EKN):
        return functional.grouped_mm(x_RK, weight_EKN, offs=offsets_E)
    return product_by_loop(x_RK, weight_EKN, offsets_E)


def grouped_gradient(x_RK: Tensor, dy_RN: Tensor, offsets_E: Tensor) -> Tensor:
    """The gradient of the weights of a ``grouped_product``, [E, K, N]: x_e^T dy_e."""
    if fits_kernel(x_RK, dy_RN):
        return functional.grouped_mm(x_RK.t(), dy_RN.contiguous(), offs=offsets_E)
    return torch.stack([x_RK[rows].t() @ dy_RN[rows] for rows in groups(offsets_E)])


def product_by_loop(x_RK: Tensor, weight_EKN: Tensor, offsets_E: Tensor) -> Tensor:
    """``grouped_product`` for every type and size, one matrix product per expert."""
    return torch.cat([x_RK[rows] @ weight_EKN[expert] for expert, rows in enumerate(groups(offsets_E))])


def fits_kernel(*operands: Tensor) -> bool:
    """Whether ``grouped_mm`` takes operands with these last axes."""
    return all(
        operand.dtype in _KERNEL_TYPES and operand.shape[-1] * operand.element_size() % _ALIGNMENT == 0
        for operand in operands
    )


def in_autocast(*operands: Tensor) -> tuple[Tensor, ...]:
    """Operands in the type of an active ``torch.autocast``, which knows nothing of grouped products."""
    device = operands[0].device.type
    if not torch.is_autocast_enabled(device):
        return operands
    return tuple(operand.to(torch.get_autocast_dtype(device)) for operand in operands)


class GroupedProduct(nn.Module):
    """The seam as a module, so that a product can be replaced by one in another precision."""

    def forward(self, x_RK: Tensor, weight_EKN: Tensor, offsets_E: Tensor) -> Tensor:
        """``grouped_product``, in the type of autocast where it is on."""
        x_RK, weight_EKN = in_autocast(x_RK, weight_EKN)
        return grouped_product(x_RK, weight_EKN, offsets_E)

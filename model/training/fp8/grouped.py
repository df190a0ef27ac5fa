"""The products of experts in FP8, forward and backward.

A number is rounded with a scale that maps the largest magnitude of its group to the format's largest value:

    s = 2^ceil(log2(amax / largest)),    q = cast(clamp(x / s, -largest, largest)),    x ~ s · q

Powers of two make x / s and every product of scales exact: the cast is the only rounding. The scale must not vary
along the axis that is summed over, so each of the three products of an expert rounds its operands along its own axis:

    y_e  = x_e w_e       x by row (E4M3),     w by column (E4M3)
    dx_e = dy_e w_e^T    dy by row (E5M2),    w by row (E4M3)
    dw_e = x_e^T dy_e    x by column (E4M3),  dy by column (E5M2), both within the expert's rows

Tensorwise, all scales of an expert's operand are equal. E4M3 has one bit of precision more, E5M2 the range that
gradients need (Micikevicius et al. 2022, arXiv 2209.05433). Sums are float32. What is not finite stays visible: it
becomes NaN and does not saturate. A CPU multiplies the rounded numbers s · q in float32 (``has_fp8_products``).

Shapes as in ``grouped.py``: R rows sorted by expert, E experts, K inputs, N outputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..moe.grouped import grouped_gradient, grouped_product, groups, in_autocast
from .amax_history import AmaxHistory
from .autocast import Fp8Options, active_recipe, has_fp8_products

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
_SMALLEST_SCALE = 2.0**-100
_ALIGNMENT = 16


class Rounded(NamedTuple):
    """FP8 codes and the float32 scales that they are to be multiplied by, broadcast over them."""

    codes: Tensor
    scale: Tensor

    def numbers(self) -> Tensor:
        """What they stand for, float32: exact, because scales are powers of two."""
        return self.codes.float() * self.scale


def rounded(x: Tensor, amax: Tensor, dtype: torch.dtype) -> Rounded:
    """Round to FP8, saturating.

    Args:
        x: any shape.
        amax: largest magnitudes, broadcast over ``x``; 0 is fine.
        dtype: E4M3 or E5M2.
    """
    largest = torch.finfo(dtype).max
    scale = power_of_two(amax.float() / largest)
    return Rounded((x.float() / scale).clamp(-largest, largest).to(dtype), scale)


def power_of_two(scale: Tensor) -> Tensor:
    """The smallest power of two that is not below positive values; NaN for what is not finite."""
    mantissa, exponent = torch.frexp(scale.clamp(min=_SMALLEST_SCALE))
    power = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    return torch.where(scale.isfinite(), power, torch.nan)


def fp8_grouped_product(x_RK: Tensor, weight_EKN: Tensor, offsets_E: Tensor, recipe: Fp8Options) -> Tensor:
    """``grouped_product`` with operands in FP8, in the backward pass too; [R, N] in the type of ``x_RK``."""
    return _Fp8Product.apply(x_RK, weight_EKN, offsets_E, recipe)  # type: ignore[no-untyped-call]


class _Fp8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RK: Tensor, weight_EKN: Tensor, offsets_E: Tensor, recipe: Fp8Options) -> Tensor:
        ctx.save_for_backward(x_RK, weight_EKN, offsets_E)
        ctx.recipe = recipe
        x = rounded(x_RK, _by_row(x_RK, offsets_E, recipe), FORWARD)
        weight = rounded(weight_EKN, _of_weight(weight_EKN, 1, recipe), FORWARD)
        return _scaled_grouped(x, weight, offsets_E, x_RK.dtype)

    @staticmethod
    def backward(ctx: Any, dy_RN: Tensor) -> tuple[Tensor | None, ...]:
        x_RK, weight_EKN, offsets_E = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = _input_gradient(dy_RN, weight_EKN, offsets_E, ctx.recipe).to(x_RK.dtype)
        if ctx.needs_input_grad[1]:
            exact = ctx.recipe.exact_weight_gradient
            dw = (grouped_gradient(x_RK, dy_RN.to(x_RK.dtype), offsets_E) if exact
                  else _weight_gradient(x_RK, dy_RN, offsets_E, ctx.recipe)).to(weight_EKN.dtype)
        return dx, dw, None, None


def _input_gradient(dy_RN: Tensor, weight_EKN: Tensor, offsets_E: Tensor, recipe: Fp8Options) -> Tensor:
    dy = rounded(dy_RN, _by_row(dy_RN, offsets_E, recipe), BACKWARD)
    codes, scale = rounded(weight_EKN, _of_weight(weight_EKN, 2, recipe), FORWARD)
    return _scaled_grouped(dy, Rounded(codes.mT, scale.mT), offsets_E, dy_RN.dtype)


def _weight_gradient(x_RK: Tensor, dy_RN: Tensor, offsets_E: Tensor, recipe: Fp8Options) -> Tensor:
    """As dw_e^T = dy_e^T x_e: GPU kernels with a scale per row take E5M2 on the left only."""
    rows_R = experts_of_rows(offsets_E, len(x_RK))
    amax_x_EK, amax_dy_EN = _by_column(x_RK, offsets_E, recipe), _by_column(dy_RN, offsets_E, recipe)
    x, dy = rounded(x_RK, amax_x_EK[rows_R], FORWARD), rounded(dy_RN, amax_dy_EN[rows_R], BACKWARD)
    if not has_fp8_products(x_RK.device):
        return grouped_gradient(x.numbers(), dy.numbers(), offsets_E)
    dw_EKN = x_RK.new_zeros(len(offsets_E), x_RK.shape[1], dy_RN.shape[1])
    for expert, rows in enumerate(groups(offsets_E)):
        if rows.stop > rows.start:  # the scale of a column is the same in all of an expert's rows
            left = Rounded(dy.codes[rows].t(), dy.scale[rows.start][:, None])
            dw_EKN[expert] = _scaled(left, Rounded(x.codes[rows], x.scale[rows.start][None]), x_RK.dtype).t()
    return dw_EKN


def _scaled_grouped(x: Rounded, weight: Rounded, offsets_E: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows [R, K], scales [R, 1], times the matrix of their expert [E, K, N], scales [E, 1, N]."""
    if not has_fp8_products(x.codes.device):
        return grouped_product(x.numbers(), weight.numbers(), offsets_E).to(dtype)
    if x.codes.is_cuda and x.codes.dtype == weight.codes.dtype == FORWARD:  # not run on hardware
        return torch._scaled_grouped_mm(
            x.codes, weight.codes.mT.contiguous().mT, x.scale[:, 0].contiguous(), weight.scale[:, 0].contiguous(),
            offs=offsets_E, out_dtype=torch.bfloat16,
        ).to(dtype)
    y_RN = torch.empty(len(x.codes), weight.codes.shape[-1], dtype=dtype, device=x.codes.device)
    for expert, rows in enumerate(groups(offsets_E)):
        if rows.stop > rows.start:
            right = Rounded(weight.codes[expert], weight.scale[expert])
            y_RN[rows] = _scaled(Rounded(x.codes[rows], x.scale[rows]), right, dtype)
    return y_RN


def _scaled(left: Rounded, right: Rounded, dtype: torch.dtype) -> Tensor:
    """[M, K] with scales [M, 1] times [K, N] with scales [1, N], laid out as GPU kernels demand it."""
    missing = -left.codes.shape[1] % _ALIGNMENT
    rows, columns = left.codes.contiguous(), right.codes.t().contiguous()
    if missing:  # code 0 is the number 0; pad knows no FP8
        rows, columns = (
            functional.pad(codes.view(torch.uint8), (0, missing)).view(codes.dtype) for codes in (rows, columns)
        )
    out = torch.bfloat16 if rows.is_cuda or dtype == torch.bfloat16 else torch.float32
    scales = left.scale.contiguous(), right.scale.contiguous()
    return torch._scaled_mm(rows, columns.t(), *scales, out_dtype=out).to(dtype)


def experts_of_rows(offsets_E: Tensor, rows: int) -> Tensor:
    """The expert of each row, int64 [R]."""
    return torch.searchsorted(offsets_E, torch.arange(rows, device=offsets_E.device, dtype=torch.int32), right=True)


def largest_of_experts(x_RK: Tensor, offsets_E: Tensor) -> Tensor:
    """The largest magnitude among each expert's rows, [E]; 0 for an expert without any."""
    amax_R = x_RK.detach().abs().amax(1)
    rows_R = experts_of_rows(offsets_E, len(x_RK))
    return amax_R.new_zeros(len(offsets_E)).scatter_reduce(0, rows_R, amax_R, "amax")


def _by_row(x_RK: Tensor, offsets_E: Tensor, recipe: Fp8Options) -> Tensor:
    """Largest magnitudes for scales along rows, [R, 1]."""
    if recipe.by_row:
        return x_RK.abs().amax(1, keepdim=True)
    return largest_of_experts(x_RK, offsets_E)[experts_of_rows(offsets_E, len(x_RK))][:, None]


def _by_column(x_RK: Tensor, offsets_E: Tensor, recipe: Fp8Options) -> Tensor:
    """Largest magnitudes for scales along the columns of each expert's rows, [E, K]."""
    shape = len(offsets_E), x_RK.shape[1]
    if not recipe.by_row:
        return largest_of_experts(x_RK, offsets_E)[:, None].expand(shape)
    rows_RK = experts_of_rows(offsets_E, len(x_RK))[:, None].expand_as(x_RK)
    return x_RK.new_zeros(shape).scatter_reduce(0, rows_RK, x_RK.abs(), "amax")


def _of_weight(weight_EKN: Tensor, summed: int, recipe: Fp8Options) -> Tensor:
    """Largest magnitudes of weights, 1 along the axis that the product sums over."""
    amax = weight_EKN.abs().amax(summed, keepdim=True)
    return amax if recipe.by_row else amax.amax((1, 2), keepdim=True).expand_as(amax)


class Fp8GroupedProduct(nn.Module):
    """A ``GroupedProduct`` that is FP8 inside of ``fp8_autocast`` and remembers how large its inputs were there."""

    def __init__(self, experts: int, window: int) -> None:
        super().__init__()
        self.history = AmaxHistory(window, experts)

    def forward(self, x_RK: Tensor, weight_EKN: Tensor, offsets_E: Tensor) -> Tensor:
        """See ``grouped_product``."""
        x_RK, weight_EKN = in_autocast(x_RK, weight_EKN)
        recipe = active_recipe()
        if recipe is None:
            return grouped_product(x_RK, weight_EKN, offsets_E)
        if self.training:
            self.history.record(largest_of_experts(x_RK, offsets_E))
        return fp8_grouped_product(x_RK, weight_EKN, offsets_E, recipe)

"""How products are rounded to FP8, and the context in which they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

import torch

Fp8Scaling = Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"]


@dataclass(frozen=True)
class Fp8Options:
    """One of torchao's recipes; experts follow it as far as it reaches.

    Attributes:
        name: ``tensorwise``: a scale per operand (of experts: per expert), the fastest; ``rowwise``: a scale per row of
            the left and per column of the right operand; ``rowwise_with_gw_hp``: the same with gradients of weights
            in high precision, the most exact.
    """

    name: Fp8Scaling = "tensorwise"

    @property
    def by_row(self) -> bool:
        """Whether rows and columns have scales of their own."""
        return self.name != "tensorwise"

    @property
    def exact_weight_gradient(self) -> bool:
        """Whether gradients of weights are computed in high precision."""
        return self.name == "rowwise_with_gw_hp"


_ACTIVE: ContextVar[Fp8Options | None] = ContextVar("fp8_recipe", default=None)


def active_recipe() -> Fp8Options | None:
    """The recipe of the innermost ``fp8_autocast`` of this thread, None outside."""
    return _ACTIVE.get()


@contextmanager
def fp8_autocast(recipe: Fp8Options | None) -> Iterator[None]:
    """Prepared products (``fp8.prepare_for_fp8``) are FP8 inside, and what they were outside. None switches it off.

    A backward pass follows the forward pass it belongs to, wherever it runs. Layers that are computed again in the
    backward pass need ``checkpoint(..., use_reentrant=False, context_fn=recompute_contexts)``.
    """
    token = _ACTIVE.set(recipe)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def has_fp8_products(device: torch.device) -> bool:
    """Whether a device multiplies FP8 operands faster than it multiplies the numbers that they stand for.

    A CPU does not (``torch._scaled_mm`` is a plain loop there). FP8 operands are float32 numbers and their products are
    float32 numbers too: 4 bits times 4, or 3. So float32 products of rounded operands, summed in float32, are what an
    FP8 kernel computes, up to the order of the sums.
    """
    return device.type == "cuda"


def recompute_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For activation checkpointing: nothing now, and the recipe of now when the layer is computed again."""
    return nullcontext(), fp8_autocast(active_recipe())

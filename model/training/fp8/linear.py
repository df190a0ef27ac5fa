"""FP8 training: which products, and how they switch.

Three products per linear layer,  y = x W^T,  dx = dy W,  dW = dy^T x,  are computed with operands rounded to FP8, with
scales taken from the operands themselves (torchao ``float8``, dynamic scaling). Parameters, their gradients, the
optimiser and everything between products stay as they are, and so do the parts where FP8 costs more than it gives:
router, norms, embedding, head, attention projections and the patch embedding.

    prepare_for_training(model)            # experts in groups
    prepare_for_fp8(model)                 # products that can be FP8
    with fp8_autocast(Fp8Options("rowwise")):
        loss = ...

Dense layers use torchao's products: tensorwise has E5M2 gradients, its rowwise recipes E4M3 throughout, with scales
rounded to powers of two; on a CPU torchao emulates them, see ``has_fp8_products``. Experts use ``grouped.py``.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ....errors import HerdError
from ...llama4.model import Llama4
from ..moe.experts import GroupedExperts, canonical_name
from .amax_history import AmaxHistory
from .autocast import Fp8Options, Fp8Scaling, active_recipe, fp8_autocast, has_fp8_products, recompute_contexts
from .grouped import Fp8GroupedProduct

__all__ = [
    "EXACT", "Fp8Linear", "Fp8Options", "fp8_autocast", "prepare_for_fp8", "recompute_contexts",
]

EXACT = ("router", "embed_tokens", "lm_head", "self_attn", "patch_embedding")
"""Parts of names whose products are never FP8."""

_ALIGNMENT = 16


class Fp8Linear(nn.Linear):
    """A linear layer that is FP8 inside of ``fp8_autocast`` and remembers how large its inputs were there."""

    def __init__(self, linear: nn.Linear, window: int) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.history = AmaxHistory(window).to(linear.weight.device)
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Any shape ending in the inputs."""
        recipe = active_recipe()
        if recipe is None or input.numel() == 0:
            return super().forward(input)
        if self.training:
            self.history.record(input.detach().abs().amax())
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))  # noqa: A001
        with torch.autocast(device, enabled=False):
            y = _torchao_product(input, self.weight, recipe.name)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def _torchao_product(x: Tensor, weight_NK: Tensor, recipe: Fp8Scaling) -> Tensor:
    """``Float8Linear`` of torchao without its module: one set of parameters must serve both precisions."""
    template = _template(recipe, not has_fp8_products(x.device))
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args  # noqa: PLC0415 - heavy

    return matmul_with_hp_or_float8_args.apply(x, weight_NK.t(), template.linear_mm_config, template.config)


@lru_cache
def _template(recipe: Fp8Scaling, emulate: bool) -> Any:
    """A layer without weights, whose settings are a recipe's; ``emulate``: products of rounded numbers in float32.

    Raises:
        HerdError: torchao is not installed.
    """
    for chatty in ("torchao", "torch.utils._pytree"):  # about kernels that other machines have
        logging.getLogger(chatty).setLevel(logging.ERROR)
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # noqa: PLC0415 - heavy
    except ImportError as error:
        raise HerdError("FP8 training needs torchao: pip install 'herdgraph[train]'") from error
    layer = nn.Linear(_ALIGNMENT, _ALIGNMENT, bias=False, device="meta")
    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
    return convert_to_float8_training(layer, config=config)


def prepare_for_fp8(model: Llama4, *, window: int = 16) -> list[str]:
    """Replace products, in place, by ones that ``fp8_autocast`` switches. Parameters stay the same objects and names.

    Args:
        model: prepared for training.
        window: forward passes that the histories of inputs reach back.

    Returns:
        Canonical names of the weights that are multiplied in FP8.
    """
    converted = []
    for name, part in list(model.named_modules()):
        if isinstance(part, GroupedExperts):
            _convert_experts(part, window)
            converted += [f"{canonical_name(name)}.{weight}" for weight in ("gate_up_proj", "down_proj")]
        elif type(part) is nn.Linear and _may_be_fp8(name, part):
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, Fp8Linear(part, window))
            converted.append(f"{canonical_name(name)}.weight")
    return converted


def _convert_experts(experts: GroupedExperts, window: int) -> None:
    count, device = experts.gate_up_proj.shape[0], experts.gate_up_proj.device
    experts.gate_up_product = Fp8GroupedProduct(count, window).to(device).train(experts.training)
    experts.down_product = Fp8GroupedProduct(count, window).to(device).train(experts.training)


def _may_be_fp8(name: str, linear: nn.Linear) -> bool:
    """Whether a layer is none of the exact parts and its sizes fit the kernels of GPUs."""
    aligned = linear.in_features % _ALIGNMENT == 0 and linear.out_features % _ALIGNMENT == 0
    return aligned and not set(EXACT) & set(name.split("."))

"""A model over ranks: tensor parallel inside of layers, experts dealt to their owners, FSDP2 around all of it.

FSDP2 averages gradients over the ranks among which it spreads a parameter. Ordinary parameters lie on all N data ranks:
the average is sum / N. An expert's gradient holds the rows of all expert ranks already, and is summed over replicas
only: it is divided by N as well. So every gradient is the mean over data ranks, on whatever arrangement.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from ....errors import HerdError
from ...config import HerdConfig, VisionConfig
from ...llama4.decoder import DecoderLayer
from ...llama4.model import Llama4
from ...llama4.vision import VisionLayer
from ..dtensor import local_tensor
from ..fp8.amax_history import AmaxHistory
from ..moe.experts import GroupedExperts
from .expert_parallel import AllToAll
from .ranks import ParallelOptions, Ranks, nearest_divisor
from .tensor_parallel import ExpertTensorParallelDispatch, share_layers


def shard(model: Llama4, ranks: Ranks) -> None:
    """Spread a model, equal on all ranks, in place.

    Args:
        model: prepared for training, and for FP8 if it is to be FP8.
        ranks: more than this one.

    Raises:
        HerdError: heads, widths or experts cannot be divided evenly.
    """
    require_divisible(model.config, ranks.parallel)
    if ranks.parallel.tensor > 1:
        share_layers(model, ranks.mesh["tensor"])
    if ranks.parallel.expert_parallel_size > 1:
        for part in model.modules():
            if isinstance(part, GroupedExperts):
                _deal_experts(part, ranks)
    for part in model.modules():
        if isinstance(part, DecoderLayer | VisionLayer):
            fully_shard(part, mesh=ranks.data_mesh)
    fully_shard(model, mesh=ranks.data_mesh)
    if model.vision is not None:
        _sync_vision_forward(model, ranks)


def require_divisible(config: HerdConfig, parallel: ParallelOptions) -> None:
    """Refuse what cannot be divided evenly.

    Raises:
        HerdError: names the first such number and the nearest choice that fits all.
    """
    shared = _shared_by_tensor(config)
    for name, value in shared.items():
        if value % parallel.tensor:
            fitting = nearest_divisor(math.gcd(*shared.values()), parallel.tensor)
            raise HerdError(f"{value} {name} cannot be shared by parallel.tensor={parallel.tensor} ranks: choose "
                            f"parallel.tensor={fitting}")
    experts = config.text.num_experts if config.text.moe_layers else 0
    if experts % parallel.expert_parallel_size or (parallel.expert > 1 and not experts):
        fitting = nearest_divisor(max(1, experts // parallel.tensor), parallel.expert)
        raise HerdError(f"{experts} experts cannot be dealt to parallel.expert={parallel.expert} x parallel.tensor="
                        f"{parallel.tensor} = {parallel.expert_parallel_size} ranks: choose parallel.expert={fitting}")


def _shared_by_tensor(config: HerdConfig) -> dict[str, int]:
    """Numbers that tensor ranks divide, by their names in messages."""
    text, layers = config.text, range(config.text.num_layers)
    found = {"attention heads": text.num_heads, "key/value heads": text.num_kv_heads}
    if text.moe_layers:
        found |= {"inner elements of the shared expert": text.expert_size, "experts": text.num_experts}
    if set(layers) - set(text.moe_layers):
        found["inner elements of dense layers"] = text.dense_size
    return found | (_shared_by_tower(config.vision) if config.vision else {})


def _shared_by_tower(vision: VisionConfig) -> dict[str, int]:
    return {
        "heads of the image tower": vision.num_heads, "inner elements of the image tower": vision.intermediate_size,
        "inner elements of the image adapter": vision.adapter_hidden_size,
    }


def _deal_experts(experts: GroupedExperts, ranks: Ranks) -> None:
    """Give each owner a contiguous range of experts, and let FP8 remember their inputs only."""
    expert_parallel_size, placements = ranks.mesh["expert", "tensor"], [Shard(0), Shard(0)]
    for name, weight in list(experts.named_parameters(recurse=False)):
        part = distribute_tensor(weight.detach(), expert_parallel_size, placements, src_data_rank=None)
        experts.register_parameter(name, nn.Parameter(part))
    share = len(local_tensor(experts.down_proj))
    first = share * (ranks.rank % ranks.parallel.expert_parallel_size)
    for history in experts.modules():
        if isinstance(history, AmaxHistory):
            history.seen = slice(first, first + share)
    if ranks.parallel.expert > 1:
        experts.dispatch = AllToAll(ranks.mesh.get_group("expert"))
    if ranks.parallel.tensor > 1:
        experts.dispatch = ExpertTensorParallelDispatch(experts.dispatch, ranks.mesh["tensor"], ranks.parallel.expert)
    spread = fully_shard(experts, mesh=ranks.mesh["replica"])
    spread.set_gradient_divide_factor(float(ranks.data_ranks))
    # gloo knows no scaled sum. For a single replica nothing is summed, and torch 2.13 would divide twice.
    spread.set_force_sum_reduction_for_comms(ranks.mesh["replica"].size() > 1)


def _sync_vision_forward(model: Llama4, ranks: Ranks) -> None:
    """Show a blank tile where a batch has no picture and another rank's has: the tower's parts are joined by all.

    No token takes its features, so its gradients are zero. When no rank has a picture, none runs the tower.
    """
    forward, vision = model.forward, model.config.vision
    assert vision is not None
    blank = torch.zeros(1, vision.num_channels, vision.image_size, vision.image_size)

    def together(input_ids_BT: Tensor, pixels_NCHW: Tensor | None = None, document_BT: Tensor | None = None) -> Any:
        seen = ranks.maximum(torch.tensor(int(pixels_NCHW is not None), device=input_ids_BT.device))
        if pixels_NCHW is None and seen:
            pixels_NCHW = blank.to(input_ids_BT.device)
        return forward(input_ids_BT, pixels_NCHW, document_BT)

    model.forward = together  # type: ignore[method-assign]

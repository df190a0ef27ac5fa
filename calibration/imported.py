"""Scales that others wrote: a checkpoint that carries FP8 scales becomes a calibration without any data.

compressed-tensors (vLLM) and ModelOpt store, beside each FP8 weight, the scale of its input, and those of keys and
values when they quantise the cache. A scale s stands for a largest magnitude of 448 s. Weights that meet the same input
(q, k and v; gate and up, of experts too) may have a scale each: the largest one holds for all. Weights that have none,
because their maker left them alone, stay in high precision.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import HerdError
from ..files import atomic_directory
from ..model.checkpoint import Checkpoint
from ..model.checkpoint.finite import require_magnitudes
from ..model.checkpoint.tensors.lazy import LazyTensor
from ..model.checkpoint.tensors.write import write_tensors
from ..model.config import HerdConfig
from ..model.config.names import expected_tensors
from ..model.quantization.calibration_file import DESCRIPTION, KV_AMAX, SCALES, description_without_data
from ..model.quantization.e4m3 import E4M3_MAX
from ..model.quantization.formats import Fp8Format
from ..model.quantization.recipes import RECIPES
from .recording import without_zeros
from .report import write_report

_EXPERT = re.compile(r"(.*\.experts)\.([0-9]{1,9})\.(gate|up|down)_proj\.weight")
OBSERVER = "imported"
_MOST_SCALES = 1 << 16
"""Scales of one input: no model has as many experts."""


def import_scales(checkpoint: Checkpoint, output: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Write a calibration of the scales in a checkpoint.

    Args:
        checkpoint: compressed-tensors or ModelOpt, with static scales.
        output: directory to create.
        overwrite: replace an existing calibration.

    Returns:
        The content of ``calibration.json``.

    Raises:
        HerdError: it has none, or nonsense.
    """
    amaxes = amaxes_of({name: _amax(name, scale) for name, scale in checkpoint.input_scales.items()},
                       checkpoint.config.text.num_experts)
    if not amaxes:
        raise HerdError(f"{checkpoint.directory} carries no scales of inputs (its activations are quantised while it "
                        "runs, or not at all): calibrate it with data instead")
    caches = {name: _amax(name, scale).max() for name, scale in checkpoint.cache_scales.items()}
    for name in {name.rsplit(".", 1)[0] for name in caches}:
        if all(f"{name}.{part}" in caches for part in ("k", "v")):
            amaxes[f"{name}.{KV_AMAX}"] = torch.stack([caches[f"{name}.{part}"] for part in ("k", "v")])
    parts = without_scales(checkpoint.config, amaxes)
    description = description_without_data(checkpoint, OBSERVER, amaxes, parts)
    with atomic_directory(output, overwrite=overwrite, mark=DESCRIPTION, inputs=[checkpoint.directory]) as directory:
        write_tensors({f"{OBSERVER}/{name}": without_zeros(amax) for name, amax in amaxes.items()}, directory / SCALES)
        (directory / DESCRIPTION).write_text(json.dumps(description, indent=1), encoding="utf-8")
        write_report(directory / "report.html", description)
    return description


def _amax(name: str, scale: LazyTensor) -> Tensor:
    """The largest magnitudes that stored scales stand for, 0 for an expert that saw nothing: one, or one for each."""
    if not 1 <= math.prod(scale.shape) <= _MOST_SCALES:
        raise HerdError(f"{name} has input or cache scales of shape {list(scale.shape)}: one, or one for each "
                        "expert, is read")
    amax = scale.read().float() * E4M3_MAX
    require_magnitudes(amax[amax != 0] if ".experts." in name else amax, f"the magnitude of the stored scale of {name}")
    return amax


def amaxes_of(found: Mapping[str, Tensor], experts: int) -> dict[str, Tensor]:
    """Largest magnitudes by the names of our weights: scalars, and [E] for experts, stored one by one or fused.

    Raises:
        HerdError: a number of scales that is neither one nor that of the experts, or one of an expert that is not
            there.
    """
    amaxes: dict[str, Tensor] = {}
    for name, amax in found.items():
        if match := _EXPERT.fullmatch(name):
            ours = f"{match[1]}.{'down_proj' if match[3] == 'down' else 'gate_up_proj'}"
            if int(match[2]) >= experts:
                raise HerdError(f"{name} has a scale of its input, but the model has {experts} experts: the checkpoint "
                                "is damaged")
            stacked = amaxes.setdefault(ours, torch.zeros(experts))
            stacked[int(match[2])] = torch.maximum(stacked[int(match[2])], amax.max())
        elif ".experts." in name:
            if amax.numel() not in (1, experts):
                raise HerdError(f"{name} has {amax.numel()} scales of inputs for {experts} experts: one, or one for "
                                "each, is read")
            amaxes[name] = amax.reshape(-1).expand(experts).clone()
        else:
            amaxes[name] = amax.max()
    return {name: _largest_of_one_input(name, amaxes) for name in amaxes}


def _largest_of_one_input(name: str, amaxes: Mapping[str, Tensor]) -> Tensor:
    """The largest magnitude among the weights that meet the same input as this one."""
    for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        if match := re.fullmatch(rf"(.*\.)({'|'.join(group)})\.weight", name):
            beside = [amaxes[other] for part in group if (other := f"{match[1]}{part}.weight") in amaxes]
            return torch.stack(beside).max()
    return amaxes[name]


def without_scales(config: HerdConfig, amaxes: Mapping[str, Tensor]) -> list[str]:
    """Weights that the FP8 recipe would store in FP8 and no scale is known for, as rules call them."""
    return [
        name.removesuffix(".weight") for name, shape in expected_tensors(config).items()
        if len(shape) > 1 and name.endswith(("_proj", ".weight")) and name not in amaxes
        and isinstance(RECIPES["fp8"].layout_of(name), Fp8Format)
    ]

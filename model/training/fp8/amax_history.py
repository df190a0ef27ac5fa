"""How large the inputs of FP8 products were in training: what a deployment starts from instead of a calibration.

Each product keeps the largest magnitudes of its last W inputs; the largest of the window is what its scale must cover.
``save_amaxes`` writes them as a calibration (``model/quantization/calibration_file.py``) under the observer
``trained``. Weights whose input was never FP8 are listed as parts in high precision, as they were in training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn

from ....errors import HerdError
from ....files import atomic_directory
from ...checkpoint import Checkpoint
from ...checkpoint.tensors.write import write_tensors
from ...config import HerdConfig
from ...config.names import expected_tensors
from ...quantization.calibration_file import DESCRIPTION, SCALES, description_without_data
from ..dtensor import full_tensor
from ..recompute import recomputing

OBSERVER = "trained"


class AmaxHistory(nn.Module):
    """The largest magnitudes of the last inputs, newest first: [W], or [W, E] for experts.

    Attributes:
        seen: which experts this rank computes; it records 0 for the others.
    """

    window: Tensor

    def __init__(self, window: int, *experts: int) -> None:
        super().__init__()
        self.seen: slice | EllipsisType = ...
        self.register_buffer("window", torch.zeros(window, *experts))

    @torch.no_grad()
    def record(self, amax: Tensor) -> None:
        """Add the newest, a scalar or one for each expert seen, and forget the oldest."""
        if not recomputing():
            newest = torch.zeros_like(self.window[0])
            newest[self.seen] = full_tensor(amax).to(newest.dtype)
            self.window.copy_(torch.cat((newest[None], self.window[:-1])))

    def amax(self) -> Tensor:
        """The largest of the window, a scalar or [E]; 0 where nothing was seen."""
        return self.window.amax(0)


@torch.no_grad()
def share_histories(model: nn.Module, largest: Callable[[Tensor], Tensor]) -> None:
    """Let every rank remember what any of them saw: a checkpoint keeps the memory of one.

    Args:
        model: prepared for FP8, or not.
        largest: the maximum of a tensor over ranks.
    """
    for part in model.modules():
        if isinstance(part, AmaxHistory):
            part.window.copy_(largest(part.window))


def trained_amaxes(model: nn.Module, largest: Callable[[Tensor], Tensor] = lambda amax: amax) -> dict[str, Tensor]:
    """Largest magnitudes of inputs by the canonical name of the weight they meet: scalars, and [E] for experts.

    An expert that saw nothing takes the largest of its layer. Products that saw nothing are left out.

    Args:
        model: prepared for FP8.
        largest: the maximum of a tensor over ranks.
    """
    found = {}
    for name, part in model.named_modules():
        if isinstance(part, AmaxHistory):
            amax = largest(part.amax()).cpu()
            if amax.max() > 0:
                found[_weight_of(name)] = torch.where(amax > 0, amax, amax.max())
    return found


def _weight_of(history: str) -> str:
    """The weight that meets the input of a history, by the name of its module."""
    owner = history.removesuffix(".history").removeprefix("decoder.").removeprefix("vision.")
    return f"{owner.removesuffix('_product')}_proj" if owner.endswith("_product") else f"{owner}.weight"


def save_amaxes(
    amaxes: Mapping[str, Tensor], path: Path, checkpoint: Checkpoint, *, overwrite: bool = False
) -> dict[str, Any]:
    """Write what ``trained_amaxes`` gave as a calibration of the checkpoint that was exported from the model.

    Args:
        amaxes: of all ranks; one rank writes them.
        path: directory to create.
        checkpoint: the exported model: the calibration fits no other.
        overwrite: replace an existing calibration.

    Returns:
        The content of ``calibration.json``.

    Raises:
        HerdError: no product was FP8 yet, or the directory cannot be written.
    """
    if not amaxes:
        raise HerdError("no product of this model was FP8 in training, so nothing is known of its inputs: train with "
                        "precision fp8, or write a calibration with `herdgraph calibrate`")
    parts = _without_magnitudes(checkpoint.config, amaxes)
    description = description_without_data(checkpoint, OBSERVER, amaxes, parts)
    with atomic_directory(path, overwrite=overwrite, mark=DESCRIPTION, inputs=[checkpoint.directory]) as directory:
        # Each a tensor of its own: safetensors refuses memory that is shared.
        write_tensors({f"{OBSERVER}/{name}": amax.float().clone() for name, amax in amaxes.items()}, directory / SCALES)
        (directory / DESCRIPTION).write_text(json.dumps(description, indent=1), encoding="utf-8")
    return description


def _without_magnitudes(config: HerdConfig, amaxes: Mapping[str, Tensor]) -> list[str]:
    """Weights whose input was never FP8, as a recipe's rules call them."""
    return [
        name.removesuffix(".weight") for name, shape in expected_tensors(config).items()
        if len(shape) > 1 and name.endswith(("_proj", ".weight")) and name not in amaxes
    ]

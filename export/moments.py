"""Reads the second moments that ``calibration/moments.py`` wrote, by the names that weights have in graphs."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import HerdError
from ..model.checkpoint import Checkpoint
from .recipes import Recipe

LARGEST = "largest_key_and_value"
_EXPERT = re.compile(r"(layers\.\d+\.feed_forward\.experts)/.*expert_(\d+)\.(gate_up_proj|down_proj)$")


class MomentsFile:
    """A calibration file; tensors are read one by one, when asked."""

    def __init__(self, path: Path, names: frozenset[str]) -> None:
        self.path, self._names = path, names

    @classmethod
    def open(cls, path: Path, fingerprint: str) -> MomentsFile:
        """Open a file and check that it was measured on a checkpoint.

        Raises:
            HerdError: not such a file, or another checkpoint's.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata, names = file.metadata() or {}, frozenset(file.keys())
        except (OSError, SafetensorError) as error:
            raise HerdError(f"{path} cannot be read as calibration ({error}): write it with `herdgraph calibrate`"
                            ) from error
        if metadata.get("fingerprint") != fingerprint:
            raise HerdError(f"{path} was measured on another checkpoint: write it again with `herdgraph calibrate`")
        return cls(path, names)

    def largest(self, layer: int) -> tuple[float, float] | None:
        """Largest magnitudes of a layer's keys, as they enter the cache, and values; None when not measured."""
        name = f"layers.{layer}.self_attn.{LARGEST}"
        if name not in self._names:
            return None
        with safe_open(self.path, "pt") as file:
            key, value = file.get_tensor(name).tolist()
        return key, value

    def of(self, weight: str) -> Tensor | None:
        """Moments [K, K] of the input of a weight, None when they were not measured.

        Args:
            weight: an initializer's name: a checkpoint's, one with ``.T``, several joined by ``+``, or an expert's.
        """
        expert = _EXPERT.match(weight)
        name = f"{expert[1]}.{expert[3]}" if expert else weight.split("+", maxsplit=1)[0].removesuffix(".T")
        if name not in self._names:
            return None
        with safe_open(self.path, "pt") as file:
            tensor: Tensor = file.get_slice(name)[int(expert[2])] if expert else file.get_tensor(name)
            return tensor.to(torch.float32)


def moments_for(recipe: Recipe, path: Path | None, checkpoint: Checkpoint) -> MomentsFile | None:
    """The calibration file that a build was given, checked.

    Raises:
        HerdError: the recipe needs one and none was given, or it is not one of this checkpoint.
    """
    if path is not None:
        return MomentsFile.open(path, checkpoint.fingerprint())
    if recipe.int8_caches:
        raise HerdError("8-bit keys and values need to know how large they get: pass --calibration FILE, written by "
                        "`herdgraph calibrate`")
    return None

"""FP8 weights and their scales.

value = stored · scale, with one scale for the tensor, for each output row ([out, 1] beside [out, in]), or, for fused
experts [E, in, out], any shape that broadcasts. Both spellings of a scale's name are read, each after the name of its
weight: ``q_proj.weight_scale`` beside ``q_proj.weight`` (compressed-tensors, ModelOpt, ``weight_scale_inv`` elsewhere,
which is multiplied too in spite of its name) and ``gate_up_proj_scale`` or ``gate_up_proj_weight_scale`` beside fused
experts ``gate_up_proj``. Scales of inputs, and of keys and values (``self_attn.k_scale``, ``k_proj.k_scale``,
``k_proj.output_scale``), describe no weight and are kept aside for calibration.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...errors import HerdError
from .base import shortened
from .finite import require_scales
from .tensors.lazy import Index, LazyTensor
from .tensors.views import Reshaped

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
"""Types that mean nothing without a scale."""
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Types whose numbers are the weights themselves."""
_CACHE_SCALE = re.compile(r"(.*?)\.(?:[kv]_proj\.)?([kv])_scale|(.*)\.([kv])_proj\.output_scale")
_OTHER_SCALE = re.compile(r".*\.(?:q|output)_scale")
_INPUT_SCALE = re.compile(r"(.*)(?:(?P<fused>_proj_)|\.)input_(?:scale|amax)")
_WEIGHT_SCALE = re.compile(r"(.*?)(?P<fused>_proj_weight)?_scale(?:_inv)?")

_log = logging.getLogger(__name__)

LazyTensors = dict[str, LazyTensor]


@dataclass(frozen=True)
class Scaled:
    """A quantised tensor with its scale: value = stored · scale, in float32.

    Attributes:
        source: what is stored.
        scale: of the same rank; axes of size 1 are shared.
    """

    source: LazyTensor
    scale: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:
        """What the product has."""
        return torch.float32

    def read(self, index: Index = None) -> Tensor:
        """Dequantise the wanted part."""
        # A slice keeps the axis and with it the alignment with the scale.
        place = slice(index, index + 1) if isinstance(index, int) else index
        scale = self.scale.read(place if self.scale.shape[0] > 1 else None)
        values = self.source.read(place).float() * scale.float()
        return values[0] if isinstance(index, int) else values


@dataclass(frozen=True)
class CheckedScale:
    """Scales of a weight that are looked at when they are read.

    Attributes:
        source: what is stored.
        name: of the weight.
    """

    source: LazyTensor
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:
        """As stored."""
        return self.source.dtype

    def read(self, index: Index = None) -> Tensor:
        """Read and check.

        Raises:
            HerdError: a scale is not a positive number.
        """
        scale = self.source.read(index)
        require_scales(scale.float(), f"a scale of {self.name}")
        return scale


def split_scales(stored: Mapping[str, LazyTensor]) -> tuple[LazyTensors, LazyTensors, LazyTensors, LazyTensors]:
    """Separate what lies beside each other in a checkpoint.

    Args:
        stored: all tensors by canonical name.

    Returns:
        Weights, weight scales and input scales, all by the name of the weight, and scales of caches as
        ``layers.0.self_attn.k``.
    """
    weights: LazyTensors = {}
    scales: LazyTensors = {}
    inputs: LazyTensors = {}
    caches: LazyTensors = {}
    for name, tensor in stored.items():
        if match := _INPUT_SCALE.fullmatch(name):
            inputs[match[1] + ("_proj" if match["fused"] else ".weight")] = tensor
        elif match := _CACHE_SCALE.fullmatch(name):
            caches[f"{match[1] or match[3]}.{match[2] or match[4]}"] = tensor
        elif _OTHER_SCALE.fullmatch(name):
            _log.info("left out: %s, a scale of no weight, input or cache", name)
        elif match := _WEIGHT_SCALE.fullmatch(name):
            scales[match[1] + ("_proj" if match["fused"] else "")] = tensor
        else:
            weights[name] = tensor
    return weights, scales, inputs, caches


def with_scales(directory: Path, weights: Mapping[str, LazyTensor], scales: Mapping[str, LazyTensor]) -> LazyTensors:
    """Dequantise every FP8 weight when it is read; other weights pass.

    Raises:
        HerdError: an FP8 weight without scale, a scale of an impossible shape or without weight, or integer weights.
    """
    orphan = next((name for name in scales if name not in weights), None)
    if orphan is not None:
        raise HerdError(f"{directory} has a scale for {shortened(orphan)}, but not the tensor: a shard is missing")
    return {name: _dequantised(directory, name, tensor, scales.get(name)) for name, tensor in weights.items()}


def _dequantised(directory: Path, name: str, tensor: LazyTensor, scale: LazyTensor | None) -> LazyTensor:
    if is_float8(tensor) and scale is None:
        raise HerdError(f"{directory}: {name} is FP8 and has no scale beside it: the checkpoint is incomplete")
    if not is_float8(tensor) and tensor.dtype not in FLOATS:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise HerdError(f"{directory}: {name} is stored as {kind}; floats and FP8 are supported: use such a checkpoint")
    return tensor if scale is None else scaled(directory, name, tensor, scale)


def is_float8(tensor: LazyTensor) -> bool:
    """Whether a tensor is stored in FP8 and means nothing without a scale."""
    return tensor.dtype in FLOAT8


def scaled(directory: Path, name: str, tensor: LazyTensor, scale: LazyTensor) -> LazyTensor:
    """A quantised tensor with its scale brought to the tensor's rank.

    Raises:
        HerdError: the scale does not fit.
    """
    shape = scale.shape if len(scale.shape) == len(tensor.shape) else _aligned(scale.shape, tensor.shape)
    if shape is None or any(s not in (1, t) for s, t in zip(shape, tensor.shape, strict=True)):
        raise HerdError(
            f"{directory}: the scale of {name} has shape {list(scale.shape)}, which does not fit {list(tensor.shape)}: "
            "one scale per tensor or per output channel is supported"
        )
    return Scaled(tensor, Reshaped(CheckedScale(scale, name), shape))


def _aligned(scale: tuple[int, ...], tensor: tuple[int, ...]) -> tuple[int, ...] | None:
    """A scalar is shared by all; a vector as long as the rows belongs to the rows (``nn.Linear``'s output)."""
    if scale in ((), (1,)):
        return (1,) * len(tensor)
    if scale == tensor[:1]:
        return (*scale, *(1,) * (len(tensor) - 1))
    return None

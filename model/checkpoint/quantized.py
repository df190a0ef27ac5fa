"""FP8 weights and their scales.

value = stored · scale, with one scale for the tensor, for each output row ([out, 1] beside [out, in]), or, for fused
experts [E, in, out], any shape that broadcasts. Scale files name it ``<tensor>_scale`` (compressed-tensors writes
``weight_scale``) or ``<tensor>_scale_inv``; both are multiplied. Scales of inputs are kept aside for calibration.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ...errors import HerdError
from .lazy import LazyTensor, Reshaped, Scaled

_WEIGHT_SCALES = ("_scale", "_scale_inv")
_INPUT_SCALES = ("input_scale", "input_amax")
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

Tensors = dict[str, LazyTensor]


def split_scales(stored: Mapping[str, LazyTensor]) -> tuple[Tensors, Tensors, Tensors]:
    """Separate weights, weight scales and input scales; scales are filed under their weight's name."""
    weights: Tensors = {}
    scales: Tensors = {}
    inputs: Tensors = {}
    for name, tensor in stored.items():
        owner, _, last = name.rpartition(".")
        suffix = next((end for end in reversed(_WEIGHT_SCALES) if name.endswith(end)), None)
        if last in _INPUT_SCALES:
            inputs[f"{owner}.weight"] = tensor
        elif suffix is not None:
            scales[name.removesuffix(suffix)] = tensor
        else:
            weights[name] = tensor
    return weights, scales, inputs


def with_scales(directory: Path, weights: Mapping[str, LazyTensor], scales: Mapping[str, LazyTensor]) -> Tensors:
    """Dequantise every FP8 weight when it is read; other weights pass.

    Raises:
        HerdError: an FP8 weight without scale, a scale of an impossible shape or without weight, or integer weights.
    """
    orphan = next((name for name in scales if name not in weights), None)
    if orphan is not None:
        raise HerdError(f"{directory} has a scale for {orphan}, but not the tensor: a shard is missing")
    result = {}
    for name, tensor in weights.items():
        if tensor.dtype in FLOAT8 and name not in scales:
            raise HerdError(f"{directory}: {name} is FP8 and has no scale beside it: the checkpoint is incomplete")
        if tensor.dtype not in (*FLOAT8, *_FLOATS):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise HerdError(f"{directory}: {name} is stored as {kind}; floats and FP8 are supported")
        result[name] = scaled(directory, name, tensor, scales[name]) if name in scales else tensor
    return result


def scaled(directory: Path, name: str, tensor: LazyTensor, scale: LazyTensor) -> LazyTensor:
    """A quantised tensor with its scale brought to the tensor's rank."""
    shape = scale.shape if len(scale.shape) == len(tensor.shape) else _aligned(scale.shape, tensor.shape)
    if shape is None or any(s not in (1, t) for s, t in zip(shape, tensor.shape, strict=True)):
        raise HerdError(
            f"{directory}: the scale of {name} has shape {list(scale.shape)}, which does not fit {list(tensor.shape)}: "
            "one scale per tensor or per output channel is supported"
        )
    return Scaled(tensor, Reshaped(scale, shape))


def _aligned(scale: tuple[int, ...], tensor: tuple[int, ...]) -> tuple[int, ...] | None:
    """A scalar is shared by all; a vector as long as the rows belongs to the rows (``nn.Linear``'s output)."""
    if scale in ((), (1,)):
        return (1,) * len(tensor)
    if scale == tensor[:1]:
        return (*scale, *(1,) * (len(tensor) - 1))
    return None

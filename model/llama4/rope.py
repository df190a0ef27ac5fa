"""Rotary position tables of the decoder (1-D) and of the image tower (2-D).

Decoder: pair i of a head of K elements turns by  p · f_i  at position p,  f_i = theta^(-2i / K). Llama 3 scaling
divides the slow pairs: wavelength w = 2 pi / f against the original context C,

    w < C / high_factor : f            w > C / low_factor : f / factor
    between             : a mixture, linear in C / w

Llama 4 Scout has low = high = 1, so the mixture is empty and the scaling is a hard cut (llama-models
``apply_scaling``). Angles are computed in float32 as the reference does: the models were trained with those numbers.

Image tower: a head of K elements has K/4 pairs that turn with the patch's column and K/4 with its row, both counted
from 1; the class token does not turn (llama-models ``vision/encoder.py``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..config import RopeScaling, TextConfig, VisionConfig


def inverse_frequencies(config: TextConfig) -> Tensor:
    """Radians per position for each pair of a head, float32 [head_dim / 2]."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponent)
    return _scaled(frequencies, config.rope_scaling) if config.rope_scaling else frequencies


def _scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    # Some copies of the base Scout carry factor 8 and high 4, which Meta corrected to 16 and 1 (llama-models #322).
    context, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * math.pi / frequencies
    scaled = torch.where(wavelength > context / low, frequencies / scaling.factor, frequencies)
    if high == low:
        return scaled  # the mixture would divide by high - low
    smooth = (context / wavelength - low) / (high - low)
    mixed = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    between = (wavelength <= context / low) & (wavelength >= context / high)
    return torch.where(between, mixed, scaled)


def image_tables(config: VisionConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every patch, row-major, class token last: float32 [patches + 1, head_dim / 2] each."""
    side, pairs = config.patches_per_side, config.hidden_size // config.num_heads // 4
    exponent = torch.arange(0, 2 * pairs, 2, dtype=torch.float32) / (2 * pairs)
    frequencies = 1.0 / (config.rope_theta**exponent)
    coordinate = torch.arange(1, side + 1, dtype=torch.float32)  # angle 0 is left to the class token
    column, row = coordinate.repeat(side), coordinate.repeat_interleave(side)
    angles = torch.cat((column[:, None] * frequencies, row[:, None] * frequencies), dim=-1)
    angles = torch.cat((angles, torch.zeros(1, 2 * pairs)))
    return angles.cos(), angles.sin()


class DecoderRotary(nn.Module):
    """Cosines and sines for absolute positions, shared by all layers that rotate."""

    inv_freq: Tensor

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inverse_frequencies(config), persistent=False)

    def forward(self, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (integers) to cosines and sines, float32 [B, T, head_dim / 2]."""
        angles = positions_BT[..., None].float() * self.inv_freq
        return angles.cos(), angles.sin()


class ImageRotary(nn.Module):
    """The image tower's tables as constants."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        cos, sin = image_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tiles: int) -> tuple[Tensor, Tensor]:
        """The tables repeated for a batch: [tiles, patches + 1, head_dim / 2] each."""
        return self.cos.expand(tiles, -1, -1), self.sin.expand(tiles, -1, -1)

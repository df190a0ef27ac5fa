"""Position embeddings of Meta's image encoder as its load hook leaves them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def resampled_positions(stored_PC: Tensor, side: int) -> Tensor:
    """What llama-models' load hook (``vision/encoder.py``) makes of ``positional_embedding``.

    The grid is sampled at (x / side, y / side) in a system where -1 and 1 are the outer edges of the corner pixels:
    half a pixel off the pixel centres, with zeros outside. It is not a copy.

    Args:
        stored_PC: class token first, then side · side positions, row-major.
        side: patches along one side.

    Returns:
        Positions row-major, class token last, in the stored type.
    """
    grid_CHW = stored_PC[1:].float().view(side, side, -1).permute(2, 0, 1)
    coordinate = torch.arange(side, dtype=torch.float32) / side * 2 - 1
    y, x = torch.meshgrid(coordinate, coordinate, indexing="ij")
    points = torch.stack((x, y), dim=-1).view(1, side * side, 1, 2)
    sampled = functional.grid_sample(grid_CHW[None], points, padding_mode="zeros", align_corners=False)
    return torch.cat((sampled[0, :, :, 0].T, stored_PC[:1].float())).to(stored_PC.dtype)

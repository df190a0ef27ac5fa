"""What the tower is trained on, in memory: all pictures with one name, and what EfficientNet-lite0 sees in them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from herdgraph.console import stderr
from herdgraph.files import atomic_file

from .config import IMAGE_SIZE
from .lite0 import load_lite0

PAIRS = ("pairs", "shape_names")
_BATCH = 64


@dataclass(frozen=True)
class NamedPictures:
    """Pictures with names, and what a teacher sees in them.

    Attributes:
        pixels_nHWC: uint8.
        name_n: which of the names is theirs.
        names: different ones, sorted.
        grid_nPC: float16, by place, places row by row.
        pooled_nC: float16, altogether.
    """

    pixels_nHWC: Tensor
    name_n: Tensor
    names: list[str]
    grid_nPC: Tensor
    pooled_nC: Tensor


def read_named(data: Path, files: tuple[str, ...] = PAIRS) -> tuple[Tensor, list[str]]:
    """Pictures and the name of each, of rows with one picture and its name.

    Args:
        data: directory of the rows.
        files: their names.
    """
    rows = [json.loads(line) for name in files for line in (data / f"{name}.jsonl").read_text("utf-8").splitlines()]
    pixels = np.empty((len(rows), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for index, row in enumerate(rows):
        with Image.open(data / row["content"][0]["image"]) as picture:
            pixels[index] = np.asarray(picture.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE)))
    return torch.from_numpy(pixels), [row["content"][1] for row in rows]


def load_named(data: Path, cache: Path) -> NamedPictures:
    """All that the tower is trained on; what the teacher sees is computed once and kept.

    Args:
        data: directory of the rows.
        cache: file for what the teacher sees.

    Raises:
        HerdError: the extra ``calf`` is not installed.
    """
    pixels, spoken = read_named(data)
    if not cache.is_file():
        grid, pooled = what_lite0_sees(pixels)
        with atomic_file(cache) as path:
            torch.save({"grid": grid, "pooled": pooled}, path)
    seen = torch.load(cache, weights_only=True)
    names = sorted(set(spoken))
    number = {name: index for index, name in enumerate(names)}
    return NamedPictures(pixels, torch.tensor([number[name] for name in spoken]), names, seen["grid"], seen["pooled"])


@torch.inference_mode()
def what_lite0_sees(pixels_nHWC: Tensor) -> tuple[Tensor, Tensor]:
    """Its features by place [n, 16, 320] and altogether [n, 1280], in float16."""
    network, grids, pools = load_lite0(), [], []
    batches = pixels_nHWC.split(_BATCH)
    for batch in track(batches, description="what EfficientNet-lite0 sees", console=stderr, transient=True):
        grid, pooled = network(batch.permute(0, 3, 1, 2).float() / 255)
        grids.append(grid.flatten(2).transpose(1, 2).half())
        pools.append(pooled.half())
    return torch.cat(grids), torch.cat(pools)

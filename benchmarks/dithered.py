"""A checkpoint whose weights lie on no grid, made of one whose weights were rounded to 16 values for every 32 inputs.

    python -m benchmarks.dithered CHECKPOINT OUTPUT

The only real language model that package registries carry is stored in Q4_1. Formats with blocks of 32 and more bits
hit such weights almost exactly, which says nothing about weights that were never rounded. So every weight is moved by
a random part of half a step of its block's grid: to where it might have been before. The result is a model of its own,
which other formats are then compared with; blocks that are on no such grid stay as they are.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from herdgraph.console import run_cli, stdout
from herdgraph.files import atomic_directory

BLOCK, VALUES = 32, 16
"""Inputs that share a grid, and how many points it has."""
_CLOSE = 1e-6
"""What is no step between two values, as a share of a block's largest."""


def dithered(weight: Tensor, generator: torch.Generator) -> Tensor:
    """A matrix [N, K], or experts [E, K, N], with every weight somewhere in its rounding interval."""
    inputs = 1 if weight.dim() == 3 else -1
    rows = weight.movedim(inputs, -1)
    if rows.shape[-1] % BLOCK:
        return weight
    blocks = rows.reshape(-1, BLOCK)
    moved = blocks + (torch.rand(blocks.shape, generator=generator) - 0.5) * steps_of(blocks)[:, None]
    return moved.reshape(rows.shape).movedim(-1, inputs).contiguous()


def steps_of(blocks: Tensor) -> Tensor:
    """The steps [b] of the grids of blocks [b, 32], 0 where there is none."""
    gaps = blocks.sort(-1).values.diff(dim=-1)
    apart = gaps > _CLOSE * blocks.abs().amax(-1, keepdim=True)
    steps = torch.where(apart, gaps, torch.inf).amin(-1)
    return torch.where((apart.sum(-1) < VALUES) & steps.isfinite(), steps, 0.0)


def write(checkpoint: Path, directory: Path) -> None:
    """Write all files of a checkpoint in Hugging Face layout, weights dithered; routers are left alone."""
    generator = torch.Generator().manual_seed(0)
    for path in sorted(checkpoint.iterdir()):
        if path.suffix != ".safetensors":
            shutil.copyfile(path, directory / path.name)
            continue
        tensors = {name: dithered(value, generator) if value.dim() > 1 and ".router." not in name else value
                   for name, value in load_file(path).items()}
        save_file(tensors, directory / path.name, metadata={"format": "pt"})


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    with atomic_directory(args.output, mark="config.json") as directory:
        write(args.checkpoint, directory)
    stdout.print(f"wrote {args.output}")


if __name__ == "__main__":
    run_cli(main)

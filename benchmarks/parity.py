"""Largest logit differences to transformers, with every odd part of the architecture switched.

    python -m benchmarks.parity [--json]

Tiny random float32 models with logits of order one (the tests' models, bound 1e-4). Columns: standard deviation of
the reference logits; the torch modules on a whole prompt of 70 tokens; the CPU bundle, 50 tokens prefilled and 20
decoded one by one. The last rows carry images.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from herdgraph.console import stderr
from herdgraph.export.pipeline import build_bundle
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config import HerdConfig
from herdgraph.model.config.presets import TINY
from herdgraph.model.llama4.model import Llama4
from herdgraph.runtimes import Engine

from .peers import let_torchvision_import
from .screen import show_tables

Case = tuple[list[int], torch.Tensor | None]


def cases(config: HerdConfig) -> Iterator[tuple[str, Case]]:
    """Prompts for one configuration: text alone, or with images of one and of several tiles."""
    from tests.support import herds

    if config.vision is None:
        yield "", (herds.tokens(70), None)
        return
    image = [config.image_token_id] * config.vision.tokens_per_tile
    for name, tiles in (("1 tile", [1]), ("5 tiles", [5]), ("3 images of 3, 1 and 2 tiles", [3, 1, 2])):
        ids = [token for count in tiles for token in (*herds.tokens(3), *(image * count))] + herds.tokens(30)
        yield name, (ids, torch.randn(sum(tiles), 3, 28, 28, generator=torch.Generator().manual_seed(0)))


def differences(ours: Llama4, engine: Engine, reference: torch.Tensor, case: Case) -> dict[str, float]:
    """Largest absolute logit differences of the torch modules and of the bundle."""
    ids, pixels = case
    with torch.inference_mode():
        eager = ours(torch.tensor([ids]), pixels)[0]
    sequence, split = engine.new_sequence(), len(ids) - 20
    found = [*engine.prefill(sequence, ids[:split], None if pixels is None else pixels.numpy(), all_positions=True)]
    found += [engine.decode(sequence, token) for token in ids[split:]]
    return {
        "std": float(reference.std()),
        "torch": float((eager - reference).abs().max()),
        "bundle": float(np.abs(np.stack(found) - reference.numpy()).max()),
    }


def measure(name: str, config: HerdConfig) -> Iterator[tuple[str, dict[str, float]]]:
    """Build one configuration and compare it on its prompts."""
    from tests.support import herds

    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        model = herds.save(config, directory / "checkpoint")
        with open_checkpoint(directory / "checkpoint") as checkpoint:
            ours = Llama4.from_checkpoint(checkpoint)
            build_bundle(checkpoint, directory / "bundle")
        engine = Engine.load(directory / "bundle", threads=1)
        for label, case in cases(config):
            yield f"{name} {label}".strip(), differences(ours, engine, herds.logits(model, *case), case)


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    let_torchvision_import()
    from tests.support import herds

    results: dict[str, dict[str, float]] = {}
    for name, config in {**herds.VARIANTS, "vision": TINY}.items():
        stderr.print(f"[dim]{name}[/dim]")
        results |= dict(measure(name, config))
    if args.json:
        print(json.dumps(results, indent=2))
        return
    title = "largest |logit difference| to transformers"
    grid = Table("model", "logit std", "torch modules", "CPU bundle", title=title)
    for name, row in results.items():
        grid.add_row(name, f"{row['std']:.2f}", f"{row['torch']:.1e}", f"{row['bundle']:.1e}")
    show_tables(grid)


if __name__ == "__main__":
    main()

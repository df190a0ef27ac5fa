"""Peak memory of building a bundle from a large random checkpoint.

    python -m benchmarks.build_memory [--gigabytes 2.2]

Writes a random bf16 checkpoint (16 experts in every layer) and builds it in a fresh process. Printed is the peak
resident memory of that process above what it needs with the libraries imported and no checkpoint opened.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from herdgraph.console import stderr, table
from herdgraph.model.checkpoint import open_checkpoint, save_checkpoint
from herdgraph.model.config import HerdConfig
from herdgraph.model.config.names import expected_tensors
from herdgraph.model.config.presets import TINY

from .memory import peak_megabytes


def configuration(gigabytes: float) -> HerdConfig:
    """A text model whose bf16 weights have about the given size."""
    layers = max(1, round(gigabytes / 0.178))
    text = replace(
        TINY.text, vocab_size=32768, hidden_size=1024, num_layers=layers, num_heads=8, num_kv_heads=2, head_dim=128,
        expert_size=1664, dense_size=3328, num_experts=16, moe_layers=tuple(range(layers)),
        rope_layers=tuple((i + 1) % 4 != 0 for i in range(layers)),
        chunked_layers=tuple((i + 1) % 4 != 0 for i in range(layers)), attention_chunk_size=8192,
    )
    return HerdConfig(text=text)


def random_tensors(config: HerdConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Seeded random weights, one tensor at a time."""
    generator = torch.Generator().manual_seed(0)
    for name, shape in expected_tensors(config).items():
        yield name, torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.03, generator=generator)


def build(checkpoint: Path, output: Path) -> dict[str, float]:
    """Build in this process; megabytes and seconds."""
    from herdgraph.export.pipeline import build_bundle

    baseline = peak_megabytes()
    started = time.perf_counter()
    with open_checkpoint(checkpoint) as source:
        bundle = build_bundle(source, output)
    peak = peak_megabytes()
    return {"seconds": time.perf_counter() - started, "baseline_mb": baseline, "peak_mb": peak,
            "above_baseline_mb": peak - baseline, "bundle_gb": bundle.bytes / 1e9}


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.2)
    parser.add_argument("--build", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.build:
        print(json.dumps(build(*args.build)))
        return
    Path(".cache").mkdir(exist_ok=True)  # large files: next to the repository, not in a small /tmp
    with tempfile.TemporaryDirectory(dir=".cache") as name:
        checkpoint = Path(name) / "checkpoint"
        config = configuration(args.gigabytes)
        stderr.print("[dim]writing a random checkpoint[/dim]")
        save_checkpoint(checkpoint, config, random_tensors(config))
        stored = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
        stderr.print("[dim]building[/dim]")
        command = [sys.executable, "-m", "benchmarks.build_memory", "--build", str(checkpoint), f"{name}/bundle"]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        figures = json.loads(output.splitlines()[-1])
        table("building a random checkpoint", {"checkpoint": f"{stored / 1e9:.2f} GB"} | {
            name: f"{value:.1f}" for name, value in figures.items()
        })


if __name__ == "__main__":
    main()

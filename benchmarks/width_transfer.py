"""Whether the best learning rate of a narrow model is that of a wide one, with and without ``optimizer.base_width``.

    python -m benchmarks.width_transfer WORK --data FILE ... [--widths 128 256 512] [--rates 1e-3 2e-3 ...]
        [--steps 150] [--seeds 0] [--plot FILE]

Text models (2 layers, 4 experts in each, as wide as the model; vocabulary of the calf) begin with random weights and
read the same 256 tokens in every step. By the rule, rates count for the narrowest; without it they count for all
matrices of every width. Measured is the loss on held-out text at the end.

A run that was measured before is read from WORK, so the command may be stopped and repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from rich.table import Table

from herdgraph.console import stderr
from herdgraph.errors import HerdError
from herdgraph.model.config import HerdConfig, to_hf
from herdgraph.model.training.optim import OptimizerOptions
from herdgraph.model.training.runs import PretrainOptions, pretrain
from herdgraph.model.training.train_options import TrainOptions

from .figures import sweeps
from .screen import show_tables
from .training import config_of

DIVERGED = 20.0
RULES = {True: "with base_width", False: "the same rate everywhere"}


def config_at(width: int) -> HerdConfig:
    """The model of a width."""
    rope = (True, False)
    return HerdConfig(text=replace(
        config_of(4).text, hidden_size=width, num_layers=2, num_heads=width // 32, num_kv_heads=width // 64,
        expert_size=width, dense_size=2 * width, moe_layers=(0, 1), rope_layers=rope, chunked_layers=rope))


def held_out_loss(work: Path, data: list[Path], width: int, rate: float, base: int | None, args: argparse.Namespace,
                  seed: int) -> float:
    """Train one model, or read what it came to."""
    output = work / f"{width}-{rate:g}-{base or 'plain'}-{args.steps}-{seed}"
    result = output / "result.json"
    if not result.exists():
        output.mkdir(parents=True, exist_ok=True)
        (output / "config.json").write_text(json.dumps(to_hf(config_at(width))), encoding="utf-8")
        result.write_text(json.dumps(_train(output, data, rate, base, args.steps, seed)), encoding="utf-8")
        stderr.print(f"width {width}, rate {rate:g}, base width {base}, seed {seed}: {result.read_text()}")
    return float(json.loads(result.read_text(encoding="utf-8")))


def _train(output: Path, data: list[Path], rate: float, base: int | None, steps: int, seed: int) -> float:
    try:
        progress = pretrain(PretrainOptions(
            checkpoint=output / "config.json", data=tuple(data), output=output / "run", rows=4, seq_len=64,
            held_out=0.05, held_out_batches=32, train=TrainOptions(steps=steps, seed=seed, log_every=50),
            optimizer=OptimizerOptions(learning_rate=rate, warmup=15, base_width=base),
        ))
    except HerdError as error:
        stderr.print(str(error))
        return DIVERGED
    return min(DIVERGED, progress.held_out[steps])


def main() -> None:
    """Parse the command line, run what is missing, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--rates", type=float, nargs="+", default=[2.0**power for power in range(-10, -4)])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(title=f"held-out loss after {args.steps} steps of 256 tokens, by learning rate")
    for column in ("", "width", *(f"{rate:.2g}" for rate in args.rates), "best"):
        table.add_column(column)
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for ruled, title in RULES.items():
        for width in args.widths:
            # The narrowest model is the same with the rule and without.
            base = args.widths[0] if ruled or width == args.widths[0] else None
            losses = [statistics.mean(held_out_loss(args.work, args.data, width, rate, base, args, seed)
                                      for seed in args.seeds) for rate in args.rates]
            best = args.rates[losses.index(min(losses))]
            table.add_row(title, str(width), *(f"{loss:.3f}" for loss in losses), f"{best:.2g}")
            panels.setdefault(title, {})[f"width {width}"] = list(zip(args.rates, losses, strict=True))
    show_tables(table)
    if args.plot:
        sweeps(args.plot, "learning rate", f"held-out loss after {args.steps} steps", panels)


if __name__ == "__main__":
    main()

"""Speed and memory of a training step, beside transformers' Llama 4 and torchtitan's mixture of experts.

    python -m benchmarks.training [--experts 16 128] [--threads 2] [--rows 4] [--length 256] [--rounds 3]
        [--only NAME ...]

A random text model (6 layers, width 256, experts of 256 in every layer), float32, forward, backward and AdamW, the same
tokens; ``training_contestants.py`` says who takes part. Each contestant runs in a fresh process, round by round in
turn; the share of the GEMM peak counts active parameters only, for all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec

import torch
from rich.table import Table

from herdgraph.model.config import HerdConfig
from herdgraph.model.config.presets import TINY
from herdgraph.model.training.metrics import flops_per_token, measured_peak

from .memory import peak_megabytes
from .screen import show_tables
from .training_contestants import CONTESTANTS, OURS

Rounds = dict[str, list[dict[str, float]]]
"""What was measured, by contestant, round by round."""


def config_of(experts: int) -> HerdConfig:
    """The model that is trained."""
    layers = 6
    rope = tuple((layer + 1) % 4 != 0 for layer in range(layers))
    return HerdConfig(text=replace(
        TINY.text, vocab_size=4096, hidden_size=256, num_layers=layers, num_heads=8, num_kv_heads=2, head_dim=32,
        expert_size=256, dense_size=512, num_experts=experts, moe_layers=tuple(range(layers)), rope_layers=rope,
        chunked_layers=rope, attention_chunk_size=128, rope_scaling=None,
    ))


def work(name: str, experts: int, args: argparse.Namespace) -> dict[str, float]:
    """Measure one contestant in this process: a median over steps, after those that warm up."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = config_of(experts)
    ids_BT = torch.randint(3, 4096, (args.rows, args.length))
    loss_of, optimizer = CONTESTANTS[name](config, ids_BT)
    times = []
    for _ in range(args.warmup + args.steps):
        started = time.perf_counter()
        loss_of().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - started)
    rate = ids_BT.numel() / statistics.median(times[args.warmup:])
    return {"rate": rate, "share": rate * flops_per_token(config, args.length) / measured_peak(),
            "peak": peak_megabytes(), "first": times[0]}


def measured(experts: int, args: argparse.Namespace) -> Rounds:
    """All contestants in turn, each round in a fresh process."""
    sizes = [f"--{name}={getattr(args, name)}" for name in ("threads", "rows", "length", "warmup", "steps")]
    rounds: Rounds = {name: [] for name in args.only}
    for _ in range(args.rounds):
        for name, found in rounds.items():
            command = [sys.executable, "-m", "benchmarks.training", "--worker", name, str(experts), *sizes]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    return rounds


def add_rows(table: Table, experts: int, rounds: Rounds) -> None:
    """A row for every contestant: medians over rounds, and how much faster than it ours was in the same round."""
    for name, found in rounds.items():
        median = {key: statistics.median(row[key] for row in found) for key in found[0]}
        ratios = [ours["rate"] / theirs["rate"] for ours, theirs in zip(rounds.get(OURS, found), found, strict=True)]
        table.add_row(str(experts), name, f"{median['rate']:.0f}", f"{median['share']:.2f}",
                      f"{median['peak'] / 1e3:.2f} GB", f"{median['first']:.1f} s",
                      f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 128])
    for name, default in (("threads", 2), ("rows", 4), ("length", 256), ("rounds", 3), ("warmup", 2), ("steps", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), default=[
        name for name in CONTESTANTS if "torchtitan" not in name or find_spec("torchtitan")])
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(work(args.worker[0], int(args.worker[1]), args)))
        return
    table = Table(title=f"training step, {args.threads} thread(s), {args.rows} x {args.length} tokens")
    for column in ("experts", "", "tokens/s", "of GEMM peak", "peak memory", "first step", "herdgraph / this"):
        table.add_column(column)
    for experts in args.experts:
        add_rows(table, experts, measured(experts, args))
    show_tables(table)


if __name__ == "__main__":
    main()

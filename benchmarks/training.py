"""Speed and memory of a training step beside transformers' Llama 4, which computes every expert on every token.

    python -m benchmarks.training [--experts 16 128] [--threads 2] [--rows 4] [--length 256] [--rounds 5]

A random text model (6 layers, width 256, experts of 256 in every layer), float32, forward, backward and AdamW, the same
tokens. Each contestant runs in a fresh process, round by round in turn; the share of the GEMM peak counts active
parameters only, for both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import torch
from rich.table import Table

from herdgraph.model.config import HerdConfig, to_hf
from herdgraph.model.config.presets import TINY
from herdgraph.model.llama4.model import Llama4
from herdgraph.model.training.data import Batch
from herdgraph.model.training.metrics import flops_per_token, measured_peak
from herdgraph.model.training.moe.experts import prepare_for_training
from herdgraph.model.training.objective import NextToken
from herdgraph.model.training.optim import OptimizerOptions, optimizer_for

from .memory import peak_megabytes
from .peers import let_torchvision_import
from .screen import show_tables

CONTESTANTS = ("herdgraph", "transformers")


def config_of(experts: int) -> HerdConfig:
    """The model that is trained."""
    layers = 6
    rope = tuple((layer + 1) % 4 != 0 for layer in range(layers))
    return HerdConfig(text=replace(
        TINY.text, vocab_size=4096, hidden_size=256, num_layers=layers, num_heads=8, num_kv_heads=2, head_dim=32,
        expert_size=256, dense_size=512, num_experts=experts, moe_layers=tuple(range(layers)), rope_layers=rope,
        chunked_layers=rope, attention_chunk_size=128, rope_scaling=None,
    ))


def step_of(name: str, config: HerdConfig, ids_BT: torch.Tensor):
    """A function that makes one training step and returns its loss."""
    labels_BT = torch.cat([ids_BT[:, 1:], torch.full((len(ids_BT), 1), -100)], 1)
    if name == "herdgraph":
        model = prepare_for_training(Llama4(config)).train()
        batch, objective = Batch(ids_BT, labels_BT, torch.zeros_like(ids_BT), None), NextToken()
        optimizer = optimizer_for(model, OptimizerOptions())

        def loss_of() -> torch.Tensor:
            return objective(model, batch, 0)[0] / (labels_BT != -100).sum()
    else:
        let_torchvision_import()
        from transformers import Llama4ForCausalLM, Llama4TextConfig

        raw = {key: value for key, value in to_hf(config).items() if key not in ("architectures", "model_type")}
        model = Llama4ForCausalLM(Llama4TextConfig(**raw)).float().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)

        def loss_of() -> torch.Tensor:
            return model(ids_BT, labels=ids_BT, use_cache=False).loss

    def step() -> float:
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


def work(name: str, experts: int, args: argparse.Namespace) -> dict[str, float]:
    """Measure one contestant in this process."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = config_of(experts)
    ids_BT = torch.randint(3, 4096, (args.rows, args.length))
    step = step_of(name, config, ids_BT)
    step()
    times = []
    for _ in range(args.steps):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    rate = ids_BT.numel() / statistics.median(times)
    return {"rate": rate, "share": rate * flops_per_token(config, args.length) / measured_peak(),
            "peak": peak_megabytes()}


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 128])
    for name, default in (("threads", 2), ("rows", 4), ("length", 256), ("rounds", 3), ("steps", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(work(args.worker[0], int(args.worker[1]), args)))
        return
    table = Table(title=f"training step, {args.threads} thread(s), {args.rows} x {args.length} tokens")
    for column in ("experts", "", "tokens/s", "of GEMM peak", "peak memory", "herdgraph / transformers"):
        table.add_column(column)
    sizes = [f"--{name}={getattr(args, name)}" for name in ("threads", "rows", "length", "steps")]
    for experts in args.experts:
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
        for _ in range(args.rounds):
            for name in CONTESTANTS:
                command = [sys.executable, "-m", "benchmarks.training", "--worker", name, str(experts), *sizes]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                rounds[name].append(json.loads(done.stdout.splitlines()[-1]))
        ratio = statistics.median(ours["rate"] / theirs["rate"] for ours, theirs in zip(*rounds.values(), strict=True))
        for name, found in rounds.items():
            median = {key: statistics.median(row[key] for row in found) for key in found[0]}
            table.add_row(str(experts), name, f"{median['rate']:.0f}", f"{median['share']:.2f}",
                          f"{median['peak'] / 1e3:.2f} GB", f"{ratio:.1f}" if name == "herdgraph" else "")
    show_tables(table)


if __name__ == "__main__":
    main()

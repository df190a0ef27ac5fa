"""TensorRT-RTX plans built here, without a GPU: seconds, sizes, memory, and how many products are proved FP8.

    python -m benchmarks.plans [--checkpoint .cache/demo/checkpoint] [--sm 89,120] [--only tiny|model|layer]

tiny    a herd of four layers with an image tower
model   SmolLM2 in Llama 4 form: prompts and tokens in one plan, keys and values in FP8
layer   one layer of Scout's size, 16 experts of 5120 x 8192: with its weights, and with weights as inputs

Each is built in a fresh process. Memory is its largest resident size.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from herdgraph.calibration.calibrate import Options, calibrate
from herdgraph.calibration.samples import read_samples
from herdgraph.calibration.windows import Data, Window, data_of
from herdgraph.export.pipeline import build_bundle
from herdgraph.export.targets.options import PlanOptions
from herdgraph.files import size
from herdgraph.model.checkpoint import open_checkpoint, save_checkpoint
from herdgraph.model.config import HerdConfig
from herdgraph.model.config.presets import SCOUT, TINY
from herdgraph.model.quantization.recipes import RECIPES

from .memory import peak_megabytes
from .models import tensors

LAYER = HerdConfig(text=replace(
    SCOUT.text, num_layers=1, vocab_size=1024, moe_layers=(0,), rope_layers=(True,), chunked_layers=(True,),
    bos_token_id=1, eos_token_ids=(2,), pad_token_id=0, max_position_embeddings=1 << 17,
))
MODELS = {"tiny": TINY, "layer": LAYER}


def random_data(config: HerdConfig) -> Data:
    """Windows of random tokens, and of random tiles for models that see."""
    generator = torch.Generator().manual_seed(0)
    windows = [Window(torch.randint(3, 490, (64,), generator=generator).tolist()) for _ in range(4)]
    if config.vision:
        side, channels = config.vision.image_size, config.vision.num_channels
        pixels = torch.randn(1, channels, side, side, generator=generator).numpy()
        windows.append(Window([config.image_token_id] * config.vision.tokens_per_tile + [5], pixels))
    return Data(windows, [])


def prepare(name: str, checkpoint: Path, directory: Path) -> tuple[Path, Path]:
    """A checkpoint and its calibration."""
    source = checkpoint if name == "model" else directory / "checkpoint"
    if name != "model":
        save_checkpoint(source, MODELS[name], tensors(MODELS[name]))
    with open_checkpoint(source) as opened:
        data = data_of(opened, read_samples([], images=False), most_tokens=4096) if name == "model" else random_data(
            opened.config)
        calibrate(opened, directory / "calibration", Data(data.measured, []), Options(hessians=False))
    return source, directory / "calibration"


def build(source: Path, calibration: Path, output: Path, sm: str) -> dict[str, Any]:
    """Build one bundle in this process."""
    started = time.perf_counter()
    with open_checkpoint(source) as checkpoint:
        recipe, options = replace(RECIPES["fp8"], caches="fp8"), PlanOptions(sm=tuple(sm.split(",")), context=8192)
        bundle = build_bundle(checkpoint, output, target="tensorrt-rtx", recipe=recipe, calibration=calibration,
                              options=options)
    plans = bundle.manifest.plans
    return {
        "seconds": time.perf_counter() - started, "peak": 1e6 * peak_megabytes(),
        "bytes": {role: bundle.manifest.files[f"{role}.plan"].bytes for role in plans}, "plans": plans,
    }


def in_fresh_process(*arguments: str) -> dict[str, Any]:
    """Run this module's worker and read what it prints."""
    command = [sys.executable, "-m", "benchmarks.plans", "--worker", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "the worker failed")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path(".cache/demo/checkpoint"))
    parser.add_argument("--sm", default="89,120")
    parser.add_argument("--only", choices=["tiny", "model", "layer"], nargs="+", default=["tiny", "model", "layer"])
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(build(*map(Path, args.worker), args.sm)))
        return
    table = Table(title=f"FP8 plans for SM {args.sm}, built without a GPU")
    for column in ("", "plan", "seconds", "plan size", "peak memory", "FP8 products proved", "SM"):
        table.add_column(column)
    for name in args.only:
        with tempfile.TemporaryDirectory(dir=".cache" if Path(".cache").is_dir() else None) as directory:
            source, calibration = prepare(name, args.checkpoint, Path(directory))
            found = in_fresh_process(str(source), str(calibration), str(Path(directory) / "bundle"), "--sm", args.sm)
        for role, plan in found["plans"].items():
            table.add_row(name, role, f"{found['seconds']:.1f}", size(found["bytes"][role]), size(found["peak"]),
                          f"{plan['fp8_products']} of {plan['fp8_intended']}, {plan['products']} in all",
                          ", ".join(plan["sm"]))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()

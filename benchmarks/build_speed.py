"""How long a build takes by recipe: seconds per billion parameters, peak memory, and what a plain copy would take.

    python -m benchmarks.build_speed [CHECKPOINT] [--target cpu] [--recipes int8 int4] [--experts 2] [--threads 2]

Without a checkpoint it writes a layer of Scout at its real widths with a small vocabulary: with two of its experts
0.5 B parameters, with all 16 of them 2.3 B. ``int8-gptq`` and ``int4-gptq`` round by the Hessians of a calibration on
random tokens, which is measured first; ``fp8`` goes by its scales and Hessians, too.

Every build runs in a process of its own. "processor" adds up the seconds of all cores, which on a busy machine says
more than those on the clock. "above imports" is the peak resident memory less that with the libraries imported. "copy"
is what reading the checkpoint and writing as many bytes as the bundle has take just before; the page cache helps both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from herdgraph.calibration.calibrate import Options, calibrate
from herdgraph.calibration.windows import Data, Window
from herdgraph.console import stderr, table
from herdgraph.model.checkpoint import open_checkpoint, save_checkpoint
from herdgraph.model.config import HerdConfig
from herdgraph.model.config.parameter_counts import model_size

from .memory import peak_megabytes
from .models import MODELS, tensors

RECIPES = {"cpu": ("fp32", "int8", "int4", "int8-gptq", "int4-gptq", "fp8"),
           "cuda": ("bf16", "int8", "int4", "int8-gptq", "int4-gptq")}
CALIBRATED = {"int8-gptq": "int8", "int4-gptq": "int4", "fp8": "fp8"}
"""Recipes of builds that read the calibration, by what they are called here."""
_PIECE = 8 << 20


def part_of_scout(experts: int) -> HerdConfig:
    """A layer of Scout with some of its experts and a small vocabulary."""
    text = replace(MODELS["scout-slice"].text, vocab_size=8192, num_layers=1, num_experts=experts, moe_layers=(0,),
                   rope_layers=(True,), chunked_layers=(True,))
    return HerdConfig(text=text)


def calibrated(checkpoint: Path, output: Path) -> dict[str, float]:
    """Calibrate with Hessians on random tokens, in this process."""
    baseline, started = peak_megabytes(), time.perf_counter()
    windows = torch.randint(0, 8000, (2, 256), generator=torch.Generator().manual_seed(0)).tolist()
    with open_checkpoint(checkpoint) as source:
        calibrate(source, output, Data([Window(ids) for ids in windows], []), Options())
    return _figures(started, baseline)


def build(checkpoint: Path, output: Path, target: str, recipe: str, calibration: Path | None) -> dict[str, float]:
    """Build in this process."""
    from herdgraph.export.pipeline import plan_build

    baseline, started = peak_megabytes(), time.perf_counter()
    with open_checkpoint(checkpoint) as source:
        plan = plan_build(source, output, target=target, recipe=recipe, calibration=calibration)
        expected = plan.expected_seconds()
        planned = time.perf_counter() - started
        bundle = plan.run()
    return _figures(started, baseline) | {"expected": expected, "to expect": planned, "bundle_bytes": bundle.bytes}


def _figures(started: float, baseline: float) -> dict[str, float]:
    return {"seconds": time.perf_counter() - started, "processor": time.process_time(),
            "above imports": peak_megabytes() - baseline}


def copy_seconds(checkpoint: Path, size: int, output: Path) -> float:
    """Seconds to read a checkpoint and to write so many bytes."""
    started, buffer = time.perf_counter(), bytearray(_PIECE)
    for path in checkpoint.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    with output.open("wb", buffering=0) as file:
        for _ in range(size // _PIECE):
            file.write(buffer)
    seconds = time.perf_counter() - started
    output.unlink()
    return seconds


def in_a_process(threads: int, *arguments: object) -> dict[str, float]:
    """Figures of a run of this file in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.build_speed", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(
    checkpoint: Path, work: Path, target: str, recipe: str, threads: int, calibration: Path,
) -> dict[str, Any]:
    """A row of the table."""
    with open_checkpoint(checkpoint) as source:
        billions = model_size(source.config).total / 1e9
    path = calibration if recipe in CALIBRATED else "-"
    name = CALIBRATED.get(recipe, recipe)
    found = in_a_process(threads, "--build", checkpoint, work / "bundle", target, name, path)
    size = int(found["bundle_bytes"])
    copy = copy_seconds(checkpoint, size, work / "copy")
    subprocess.run(["rm", "-r", str(work / "bundle")], check=True)
    return {
        "recipe": recipe, "bundle GB": size / 1e9, "seconds": found["seconds"],
        "seconds per billion": found["seconds"] / billions,
        "processor seconds per billion": found["processor"] / billions, "MB above imports": found["above imports"],
        "times a copy": found["seconds"] / copy, "expected / found": found["expected"] / found["seconds"],
        "seconds to expect": found["to expect"],
    }


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--target", choices=RECIPES, default="cpu")
    parser.add_argument("--recipes", nargs="+", help="default: all of the target")
    parser.add_argument("--experts", type=int, default=2, help="of the layer that is written")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--build", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--calibrate", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.build:
        checkpoint, output, target, recipe, calibration = args.build
        path = None if calibration == "-" else Path(calibration)
        print(json.dumps(build(Path(checkpoint), Path(output), target, recipe, path)))
    elif args.calibrate:
        print(json.dumps(calibrated(*args.calibrate)))
    else:
        recipes = args.recipes or RECIPES[args.target]
        _measure_all(args.checkpoint, args.target, recipes, args.experts, args.threads)


def _measure_all(checkpoint: Path | None, target: str, recipes: Sequence[str], experts: int, threads: int) -> None:
    Path(".cache").mkdir(exist_ok=True)  # large files: next to the repository, not in a small /tmp
    with tempfile.TemporaryDirectory(dir=".cache") as name:
        work = Path(name)
        if checkpoint is None:
            checkpoint, config = work / "checkpoint", part_of_scout(experts)
            stderr.print("[dim]writing a random checkpoint[/dim]")
            save_checkpoint(checkpoint, config, tensors(config))
        if not CALIBRATED.keys().isdisjoint(recipes):
            found = in_a_process(threads, "--calibrate", checkpoint, work / "calibration")
            table("calibrating", {name: f"{value:.0f}" for name, value in found.items()})
        for recipe in recipes:
            row = measured(checkpoint, work, target, recipe, threads, work / "calibration")
            table("building", {name: str(value)[:6] for name, value in row.items()})


if __name__ == "__main__":
    main()

"""What splitting costs and gives on one machine: two ranks of one thread beside one process of two threads.

    python -m benchmarks.sharded WORK_DIR [--models scout-mini maverick-mini] [--recipe int8] [--plans tp=2 ep=2 pp=2]
                                 [--prompt 512] [--new 32] [--batch 8] [--repeats 3] [--json FILE]

Both have the same weights and threads. Exchanges are those of rank 0, waiting for the other rank included. Memory is
what each rank's process holds with one sequence, less the 66 MB of Python with ONNX Runtime, beside what the planner
says of the fullest rank. What builds is imported late, so that it is not in these figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from herdgraph.console import table
from herdgraph.model.config import HerdConfig
from herdgraph.model.config.shard_plan import ShardPlan
from herdgraph.runtimes import Engine
from herdgraph.runtimes.distributed.collectives import Spent
from herdgraph.runtimes.distributed.front_end import ShardedRunner

from .memory import resident_megabytes

BARE = 66
"""Megabytes of a process that has imported herdgraph's runtime and onnxruntime, and loaded nothing."""


@dataclass(frozen=True)
class Result:
    """What one contestant did.

    Attributes:
        prefill: tokens per second of a prompt.
        decode: tokens per second of one sequence.
        batch_decode: tokens per second of all sequences of a batch.
        exchanges: per decoded token.
        exchange_ms: milliseconds in them per decoded token.
        megabytes: of every rank's process.
    """

    prefill: float
    decode: float
    batch_decode: float
    exchanges: float
    exchange_ms: float
    megabytes: list[float]


def measure(bundle: Path, threads: int, args: argparse.Namespace) -> Result:
    """Measure a bundle in this process."""
    with Engine.load(bundle, threads=threads) as engine:
        vocabulary = engine.config.text.vocab_size
        ids = np.random.default_rng(0).integers(0, vocabulary, args.prompt).tolist()
        prompts = [_seconds(lambda: engine.prefill(engine.new_sequence(), ids)) for _ in range(args.repeats + 1)][1:]
        sequence = engine.new_sequence()
        engine.prefill(sequence, ids)
        spent = _spent(engine)
        before = asdict(spent)
        singles = [_seconds(lambda: _decode(engine, [sequence], args.new)) for _ in range(args.repeats)]
        megabytes = [resident_megabytes() - BARE, *_other_megabytes(engine)]
        tokens = args.repeats * args.new
        together = [sequence, *(sequence.fork() for _ in range(args.batch - 1))]
        counted = spent.count - before["count"], spent.seconds - before["seconds"]
        _decode(engine, together, 1)
        batches = [_seconds(lambda: _decode(engine, together, args.new)) for _ in range(args.repeats)]
        return Result(
            args.prompt / statistics.median(prompts), args.new / statistics.median(singles),
            args.batch * args.new / statistics.median(batches), counted[0] / tokens, 1e3 * counted[1] / tokens,
            megabytes,
        )


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _decode(engine: Engine, sequences: list[Any], tokens: int) -> None:
    for token in range(tokens):
        if len(sequences) == 1:
            engine.decode(sequences[0], token + 5)
        else:
            engine.decode_batch(sequences, [token + 5] * len(sequences))


def _spent(engine: Engine) -> Spent:
    return engine._decoder.link.spent if isinstance(engine._decoder, ShardedRunner) else Spent()


def _other_megabytes(engine: Engine) -> list[float]:
    runner = engine._decoder
    if not isinstance(runner, ShardedRunner) or runner.processes is None:
        return []
    return [resident_megabytes(process.pid) - BARE for process in runner.processes.started.values()]


def planned_megabytes(config: HerdConfig, plan: ShardPlan, recipe: str, context: int, batch: int) -> float:
    """What the planner says of the rank that holds most."""
    from herdgraph.export.planner.memory import Workload, fullest_rank
    from herdgraph.export.planner.storage import Storage

    return sum(fullest_rank(config, plan, Storage.on(recipe, None, cpu=True), Workload(context, batch)).values()) / 1e6


def build(name: str, plans: list[str], recipe: str, directory: Path) -> dict[str, Path]:
    """The whole bundle of a model and its sharded ones, by plan; what is there already is kept."""
    from herdgraph.export.pipeline import build_bundle
    from herdgraph.model.checkpoint import open_checkpoint

    from .models import write

    write(name, directory / name)
    bundles = {plan: directory / f"{name}-{recipe}-{plan}" for plan in ("whole", *plans)}
    with open_checkpoint(directory / name) as checkpoint:
        for plan, bundle in bundles.items():
            if not bundle.exists():
                build_bundle(checkpoint, bundle, recipe=recipe,
                             shards=None if plan == "whole" else ShardPlan.parse(plan))
    return bundles


def in_fresh_process(bundle: Path, threads: int, args: argparse.Namespace) -> Result:
    """Measure where nothing has run before."""
    order = [sys.executable, "-m", "benchmarks.sharded", str(bundle), "--measure", str(threads), *(
        f"--{name}={getattr(args, name)}" for name in ("prompt", "new", "batch", "repeats"))]
    done = subprocess.run(order, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return Result(**json.loads(done.stdout.splitlines()[-1]))


def compare(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Print a table of one model."""
    from .models import MODELS

    found: dict[str, Any] = {}
    for plan, bundle in build(name, args.plans, args.recipe, args.directory).items():
        ranks = 1 if plan == "whole" else ShardPlan.parse(plan).world
        result = in_fresh_process(bundle, max(1, args.cores // ranks), args)
        shards = ShardPlan() if plan == "whole" else ShardPlan.parse(plan)
        planned = planned_megabytes(MODELS[name], shards, args.recipe, args.prompt + args.repeats * args.new, 1)
        found[plan] = asdict(result) | {"planned_megabytes": planned}
    whole = found["whole"]
    table(f"{name}, {args.recipe}, prompt {args.prompt}, batch {args.batch}", {
        plan: f"prefill {row['prefill']:7.1f} ({row['prefill'] / whole['prefill']:.2f})  "
              f"decode {row['decode']:6.1f} ({row['decode'] / whole['decode']:.2f})  "
              f"together {row['batch_decode']:6.1f} ({row['batch_decode'] / whole['batch_decode']:.2f}) tokens/s  "
              f"{row['exchanges']:.0f} exchanges, {row['exchange_ms']:.2f} ms per token  "
              f"{', '.join(f'{value:.0f}' for value in row['megabytes'])} MB, planned {row['planned_megabytes']:.0f}"
        for plan, row in found.items()
    })
    return found


def main() -> None:
    """Parse the command line and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--models", nargs="+", default=["scout-mini", "maverick-mini"])
    parser.add_argument("--recipe", default="int8")
    parser.add_argument("--plans", nargs="+", default=["tp=2", "ep=2", "pp=2"])
    parser.add_argument("--cores", type=int, default=2, help="threads of all ranks together")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--measure", type=int, metavar="THREADS", help="measure one bundle here and print JSON")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(asdict(measure(args.directory, args.measure, args))))
        return
    found = {name: compare(name, args) for name in args.models}
    if args.json:
        args.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()

"""What a token costs at long context, and how much memory its past takes.

    python -m benchmarks.long_context BUNDLE ... [--threads 1] [--contexts 512 8192 65536 1000000] [--real]
                                      [--plot FILE]

Without ``--real`` the past is random numbers in the caches, because reading them takes as long whatever they mean;
with it the past is computed, token by token of a random prompt, which takes minutes from 64k on.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from herdgraph.console import size, stderr
from herdgraph.runtimes import Engine, Sequence

from .figures import lines

STEPS = 16


def with_past(engine: Engine, tokens: int, *, real: bool) -> tuple[Sequence, float]:
    """A sequence that holds so many tokens, and the seconds it took to compute them."""
    sequence, ids = engine.new_sequence(), np.random.default_rng(0).integers(3, 1000, tokens).tolist()
    if real:
        started = time.perf_counter()
        engine.prefill(sequence, ids)
        return sequence, time.perf_counter() - started
    sequence.make_room(tokens + STEPS + 1)
    random = np.random.default_rng(1)
    for buffers in sequence.cache.layers:
        for buffer in buffers:
            block = random.normal(size=(1 << 16)).astype(np.float32)
            flat = buffer.reshape(-1)
            flat[:] = np.resize(block if buffer.dtype == np.float32 else (20 * block).astype(np.int8), flat.shape)
    sequence.append(ids)
    return sequence, 0.0


def seconds_per_token(engine: Engine, sequence: Sequence) -> float:
    """Median over ``STEPS`` tokens, after one to warm up."""
    engine.decode(sequence, 5)
    times = []
    for token in range(STEPS - 1):
        started = time.perf_counter()
        engine.decode(sequence, token + 5)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure(bundle: Path, args: argparse.Namespace) -> list[tuple[float, float]]:
    """Print a table of one bundle; contexts and milliseconds per token."""
    engine = Engine.load(bundle, threads=args.threads)
    columns = ("context", "ms per token", "ratio", "keys and values", "local layers", "prefill")
    table = Table(*columns, title=str(bundle))
    found: list[tuple[float, float]] = []
    config = engine.config.text
    for context in args.contexts:
        stderr.print(f"[dim]{context} tokens[/dim]")
        sequence, prefill = with_past(engine, context, real=args.real)
        found.append((context, 1e3 * seconds_per_token(engine, sequence)))
        local = sum(k.nbytes + v.nbytes for i, (k, v) in enumerate(sequence.cache.layers) if config.chunk_of(i))
        table.add_row(
            f"{context:,}", f"{found[-1][1]:.2f}", f"{found[-1][1] / found[0][1]:.2f}", size(sequence.cache.nbytes),
            size(local),
            f"{context / prefill:.0f} tokens/s" if prefill else "-",
        )
    Console(width=110).print(table)
    return found


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 8192, 65536, 1000000])
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    found = {bundle.name: measure(bundle, args) for bundle in args.bundles}
    if args.plot:
        lines(args.plot, "Time per token over its context", "tokens before", "ms per token", found)


if __name__ == "__main__":
    main()

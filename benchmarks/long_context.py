"""What a token costs at long context, and how much memory its past takes.

    python -m benchmarks.long_context BUNDLE ... [--threads 1] [--contexts 512 8192 65536 1000000] [--real]
                                      [--plot FILE]

Without ``--real`` every cache block of the past is a copy of one that was computed, because reading them takes as long
whatever they mean; with it the past is computed, of a random prompt, which takes minutes from 32k on. Bundles of target
``cpu``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
from rich.table import Table

from herdgraph.console import fail, run_cli, size, stderr
from herdgraph.runtimes import Engine, Sequence
from herdgraph.runtimes.kv_cache.paged import BlockTable, PagedCache

from .figures import lines
from .screen import show_tables

STEPS = 16


def with_past(engine: Engine, tokens: int, *, real: bool) -> tuple[Sequence, float]:
    """A sequence that holds so many tokens, and the seconds it took to compute them."""
    sequence, ids = engine.new_sequence(), np.random.default_rng(0).integers(3, 1000, tokens).tolist()
    if not real:
        pretend(engine, sequence, ids)
        return sequence, 0.0
    started = time.perf_counter()
    engine.prefill(sequence, ids)
    return sequence, time.perf_counter() - started


def pretend(engine: Engine, sequence: Sequence, ids: list[int]) -> None:
    """Let a sequence hold tokens that were never computed: their cache blocks are copies of one that was."""
    computed = engine.new_sequence()
    engine.prefill(computed, ids[:64])
    chunk = sequence.cache.pools.chunk or len(ids)
    for first in range(0, len(ids), chunk):  # blocks of chunked layers are released where a chunk ends
        part = ids[first : first + chunk]
        sequence.make_room(len(part))
        sequence.append(part)
    for table, source in zip(_tables(sequence), _tables(computed), strict=True):
        for block in table.numbers:
            table.pool.copy(int(source.numbers[0]), int(block))


def _tables(sequence: Sequence) -> list[BlockTable]:
    """Of the kinds of layers that the model has."""
    return [table for table in (sequence.cache.whole, sequence.cache.chunked) if table.pool.capacity]


def held(table: BlockTable) -> int:
    """Bytes of a table's blocks."""
    return len(table.numbers) * table.pool.cost


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
    if not isinstance(engine.new_sequence().cache, PagedCache):
        fail(f"{bundle} has no cache blocks: build it with --target cpu")
    engine.wait_until_resident()
    columns = ("context", "ms per token", "ratio", "keys and values", "chunked layers", "prefill")
    table = Table(*columns, title=str(bundle))
    found: list[tuple[float, float]] = []
    for context in args.contexts:
        stderr.print(f"[dim]{context} tokens[/dim]")
        sequence, prefill = with_past(engine, context, real=args.real)
        found.append((context, 1e3 * seconds_per_token(engine, sequence)))
        cache = sequence.cache
        table.add_row(
            f"{context:,}", f"{found[-1][1]:.2f}", f"{found[-1][1] / found[0][1]:.2f}",
            size(held(cache.whole) + held(cache.chunked)), size(held(cache.chunked)),
            f"{context / prefill:.0f} tokens/s" if prefill else "-",
        )
    show_tables(table)
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
    run_cli(main)

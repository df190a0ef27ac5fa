"""Rank 0 of test_cuda_ranks.py, which starts the others: cuda_ranks_worker.py OUTPUT BUNDLE..."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from herdgraph.runtimes import Engine
from support.plan_ranks_worker import drive, tokens


def main() -> None:
    output, *bundles = sys.argv[1:]
    for bundle in bundles:
        with Engine.load(bundle, threads=1, timeout=20, cache_bytes=16 << 20) as engine:
            sequence = engine.new_sequence()
            engine.prefill(sequence, tokens(5))
            told = engine.runner.decode_greedy(sequence, 7)
            best = np.argmax(told) if np.ndim(told) else told
            np.savez(Path(output) / f"{Path(bundle).name}.npz", *drive(engine), best=best)
            print(type(engine.runner.link).__name__, np.ndim(told), flush=True)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()

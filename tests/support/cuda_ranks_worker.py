"""Rank 0 of test_cuda_ranks.py, which starts the others: cuda_ranks_worker.py OUTPUT BUNDLE..."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from herdgraph.runtimes import Engine
from support.plan_ranks_worker import drive, tokens


def pictures(engine: Engine) -> list[np.ndarray]:
    """Logits of a prompt with two tiles, and of one that goes on with another; nothing of models that see none."""
    if (vision := engine.config.vision) is None:
        return []
    tiles = np.random.default_rng(0).normal(size=(3, 3, vision.image_size, vision.image_size)).astype(np.float32)
    image, sequence = [engine.config.image_token_id] * vision.tokens_per_tile, engine.new_sequence()
    return [engine.prefill(sequence, [7, *image, 8, *image, 9], tiles[:2], all_positions=True),
            engine.prefill(sequence, [*image, 11], tiles[2:], all_positions=True)]


def main() -> None:
    output, *bundles = sys.argv[1:]
    for bundle in bundles:
        with Engine.load(bundle, threads=1, timeout=20, cache_bytes=16 << 20) as engine:
            sequence = engine.new_sequence()
            engine.prefill(sequence, tokens(5))
            told = engine.runner.decode_greedy(sequence, 7)
            best = np.argmax(told) if np.ndim(told) else told
            found = [*drive(engine), *pictures(engine)]
            np.savez(Path(output) / f"{Path(bundle).name}.npz", *found, best=best)
            print(type(engine.runner.link).__name__, np.ndim(told), flush=True)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()

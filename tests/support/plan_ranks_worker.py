"""Rank 0 of test_tensorrt_ranks.py, which starts the others: plan_ranks_worker.py BUNDLE OUTPUT BEHAVIOUR."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import numpy as np

from herdgraph.errors import HerdError
from herdgraph.runtimes import Engine

CHUNK = 16


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 490, count).tolist()


def drive(engine: Engine) -> list[np.ndarray]:
    """Logits of prompts and tokens across chunks, of batches, and of what was forked and cut off."""
    sequence = engine.new_sequence()
    found = [engine.prefill(sequence, tokens(2 * CHUNK + 5), all_positions=True)]
    found += [engine.decode(sequence, token).copy() for token in tokens(CHUNK, seed=1)]
    twin = sequence.fork()
    engine.truncate(sequence, 20)
    found.append(engine.prefill(sequence, tokens(7, seed=2), all_positions=True))
    found.append(engine.decode(twin, 7).copy())
    batch = [engine.new_sequence() for _ in range(9)]  # a pipeline of two stages runs it in two parts
    found += [engine.prefill(one, tokens(3 + 2 * place, seed=place)).copy() for place, one in enumerate(batch)]
    found += [engine.decode_batch(batch, tokens(9, seed=step)).copy() for step in range(3)]
    return found


def refused(engine: Engine) -> None:
    """Print what is said of calls that the plans were not built for; the engine goes on."""
    for call in (lambda: engine.prefill(engine.new_sequence(), tokens(300)),
                 lambda: engine.decode_batch([engine.new_sequence() for _ in range(20)], tokens(20))):
        try:
            call()
        except HerdError as error:
            print(error, flush=True)


def kill_a_rank(engine: Engine) -> str:
    """What is said when rank 1 is killed in the middle of tokens."""
    assert engine._decoder.processes  # type: ignore[attr-defined]
    process = engine._decoder.processes.started[1]  # type: ignore[attr-defined]
    sequence = engine.new_sequence()
    engine.prefill(sequence, tokens(5))
    threading.Timer(0.2, os.kill, (process.pid, signal.SIGKILL)).start()
    began = time.monotonic()
    try:
        while time.monotonic() - began < 20:
            engine.decode(sequence, 5)
            engine.truncate(sequence, 5)
    except HerdError as error:
        return f"{time.monotonic() - began:.1f} s: {error}"
    return "nothing"


def main() -> None:
    bundle, output, behaviour = sys.argv[1:]
    with Engine.load(bundle, threads=1, timeout=10) as engine:
        if behaviour == "kill":
            print(kill_a_rank(engine), flush=True)
            return
        refused(engine)
        np.savez(output, *drive(engine))
        print(type(engine._decoder.link).__name__, flush=True)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()

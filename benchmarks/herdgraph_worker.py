"""Measures a bundle for ``benchmarks.compare``; a worker as ``contest.py`` describes."""

from __future__ import annotations

import numpy as np

from herdgraph.runtimes import Engine

from .contest import Task, Times, measure, serve


class BundleRunner:
    """An engine as a ``Runner``."""

    def __init__(self, task: Task) -> None:
        self._engine = Engine.load(task.model, threads=task.threads)

    def prefill(self, tokens: list[int]) -> np.ndarray:
        """Read a prompt into a new sequence."""
        self._engine.wait_until_resident()
        self._prompt = self._engine.new_sequence()
        return self._engine.prefill(self._prompt, tokens)

    def fork(self, count: int) -> None:
        """Copy the prompt's sequence."""
        self._sequences = [self._prompt.fork() for _ in range(count)]

    def step(self, tokens: list[int]) -> np.ndarray:
        """Decode alone or as a batch."""
        if len(tokens) == 1:
            return self._engine.decode(self._sequences[0], tokens[0])
        return self._engine.decode_batch(self._sequences, tokens)

    def save_logits(self, tokens: list[int], path: str) -> None:
        """Prefill with the logits of all positions."""
        np.save(path, self._engine.prefill(self._engine.new_sequence(), tokens, all_positions=True))


def work(task: Task) -> Times:
    """Measure one bundle."""
    return measure(lambda: BundleRunner(task), task)


if __name__ == "__main__":
    serve(work)

"""One task, measured in the same way for whoever runs it. Standard library only: any Python can import it.

A worker is a module run in a process of its own (``python -m benchmarks.NAME``): it reads a ``Task`` as JSON from
standard input, measures a ``Runner`` and prints ``Times`` as JSON. All runners get the same tokens, and every
measurement begins with one pass that is not timed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from .memory import peak_megabytes

SECONDS = 2.0
"""A measurement is repeated until this much time has been measured, so that fast runners are not measured briefly."""


@dataclass(frozen=True)
class Task:
    """What to run.

    Attributes:
        model: file or directory.
        variant: what the worker does with it, in its own words: a number format, for example.
        threads: for everything.
        prompt: token ids that are prefilled.
        steps: token ids of each decoding step, one per sequence of the batch; the first step is not timed.
        probe: token ids whose logits tell whether all compute the same function; empty for none.
        logits: file for them, float32 [tokens, vocabulary] in numpy's format.
    """

    model: str
    variant: str
    threads: int
    prompt: list[int]
    steps: list[list[int]]
    probe: list[int]
    logits: str


@dataclass(frozen=True)
class Times:
    """Seconds of each repetition.

    Attributes:
        load: until the model can be used.
        prefill: of the whole prompt.
        decode: of all timed steps with one sequence.
        batch: of all timed steps with all sequences.
        peak_mb: largest resident memory, 10^6 bytes.
    """

    load: float
    prefill: list[float]
    decode: list[float]
    batch: list[float]
    peak_mb: float


class Runner(Protocol):
    """A loaded model with the sequences that it continues."""

    def prefill(self, tokens: list[int]) -> object:
        """Forget all, read a prompt and compute the logits of its last token."""

    def fork(self, count: int) -> object:
        """Continue the last prompt, and only it, as this many independent sequences."""

    def step(self, tokens: list[int]) -> object:
        """Append one token to each sequence and compute their logits."""

    def save_logits(self, tokens: list[int], path: str) -> object:
        """Write the logits of every token of a prompt."""


def measure(load: Callable[[], Runner], task: Task) -> Times:
    """Load a runner and time it."""
    started = time.perf_counter()
    runner = load()
    loaded = time.perf_counter() - started
    if task.probe:
        runner.save_logits(task.probe, task.logits)
    runner.prefill(task.prompt)
    prefill = _repeated(lambda: _seconds(lambda: runner.prefill(task.prompt)))
    decode = _repeated(lambda: _decode(runner, [row[:1] for row in task.steps]))
    batch = _repeated(lambda: _decode(runner, task.steps)) if len(task.steps[0]) > 1 else []
    return Times(loaded, prefill, decode, batch, peak_megabytes())


def _repeated(run: Callable[[], float]) -> list[float]:
    times: list[float] = []
    while sum(times) < SECONDS:
        times.append(run())
    return times


def _decode(runner: Runner, steps: list[list[int]]) -> float:
    runner.fork(len(steps[0]))
    runner.step(steps[0])  # buffers grow and are bound here
    return _seconds(lambda: [runner.step(row) for row in steps[1:]])


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def serve(work: Callable[[Task], Times]) -> None:
    """Be a worker: task in, times out."""
    task = Task(**json.load(sys.stdin))
    print(json.dumps(asdict(work(task))))


def times_of(output: str) -> Times:
    """What a worker printed; libraries may have printed lines before."""
    fields: dict[str, Any] = json.loads(output.splitlines()[-1])
    return Times(**fields)

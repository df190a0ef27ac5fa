"""How long the steps of a scheduler take while a long prompt is read beside answers: what makes gaps between tokens.

    python -m benchmarks.scheduling BUNDLE [--streams 3] [--tokens 4096] [--threads 1] [--steps] [--json]

Streams generate for a while, then a prompt comes. Every step is timed in the scheduler's own thread, so neither HTTP
nor a client adds to it; as every step brings every stream forward, its time is the gap between two of their tokens.
Times are CPU seconds of that thread, for the scheduler's own clock too, so they do not see what else runs on the
machine: take one thread. Ratios are to the median step of the streams alone. *Outside* is the share of what is not the
model.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import numpy as np
from rich.table import Table

from herdgraph.console import emit_json, run_cli, stdout
from herdgraph.model.processing import PreparedPrompt

from .desk import Desk

ALONE = 32
"""Steps of the streams alone."""


@dataclass(frozen=True)
class StepTime:
    """One step.

    Attributes:
        seconds: all of it.
        outside: of them, outside of the model.
        prompt: tokens of the prompt that it computed.
    """

    seconds: float
    outside: float
    prompt: int


def steps(desk: Desk, streams: int, tokens: int) -> tuple[list[StepTime], list[StepTime]]:
    """Steps of the streams alone, and while the prompt is read."""
    random = np.random.default_rng(0)

    def ids(count: int) -> list[int]:
        return random.integers(3, desk.engine.config.text.vocab_size * 9 // 10, count).tolist()

    for _ in range(streams):
        desk.ask(PreparedPrompt(ids(32)), tokens)
    desk.run_until_all_decode()
    alone = [_timed(desk) for _ in range(ALONE)]
    answer = desk.ask(PreparedPrompt(ids(tokens)), 1)
    beside = []
    while not answer.usage.completion_tokens:
        beside.append(_timed(desk))
    for active in desk.scheduler.requests:
        active.cancelled = True
    desk.run()
    return alone, beside


def _timed(desk: Desk) -> StepTime:
    """One step."""
    spent, prompts = [0.0], [0]
    planner = desk.scheduler._planner
    record = type(planner).record

    def noted(self, rows: int, prompt: int, seconds: float) -> None:  # type: ignore[no-untyped-def]
        spent[0], prompts[0] = seconds, prompt
        record(self, rows, prompt, seconds)

    with mock.patch.object(type(planner), "record", noted):
        started = time.thread_time()
        desk.scheduler.step()
        seconds = time.thread_time() - started
    return StepTime(seconds, seconds - spent[0], prompts[0])


def summary(alone: Sequence[StepTime], beside: Sequence[StepTime]) -> dict[str, float]:
    """What is shown."""
    times, gaps = np.array([one.seconds for one in alone]), np.array([one.seconds for one in beside])
    median = float(np.median(times))
    return {"step_ms": 1e3 * median, "alone_p95": float(np.percentile(times, 95)) / median,
            "p50": float(np.percentile(gaps, 50)) / median, "p95": float(np.percentile(gaps, 95)) / median,
            "most": float(gaps.max()) / median,
            "prompt_tokens_per_step": float(np.mean([one.prompt for one in beside])),
            "prompt_tokens_per_s": sum(one.prompt for one in beside) / float(gaps.sum()),
            "outside": sum(one.outside for one in beside) / float(gaps.sum())}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--streams", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", action="store_true", help="print every step")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    desk = Desk.of(options.bundle, options.threads)
    desk.engine.wait_until_resident()
    with mock.patch("time.perf_counter", time.thread_time):
        alone, beside = steps(desk, options.streams, options.tokens)
    found = summary(alone, beside)
    if options.json:
        emit_json(found | {"steps": [asdict(one) for one in (*alone, *beside)]})
        return
    if options.steps:
        for one in (*alone, *beside):
            stdout.print(f"{1e3 * one.seconds:8.1f} ms, {1e3 * one.outside:5.1f} outside, {one.prompt:4} of the prompt")
    shown = Table(*found)
    shown.add_row(*(f"{value:.2f}" for value in found.values()))
    stdout.print(shown)


if __name__ == "__main__":
    run_cli(main)

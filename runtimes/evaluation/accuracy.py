"""Answers of a bundle to the questions of a task: accuracy with its standard error, and differences of two bundles.

A multiple-choice question is answered by the continuation of the largest log-likelihood, for some tasks divided by
the characters of its text (without the blank before it). Where there is one continuation, as in LAMBADA, an answer is
right when every token of it is the most likely one.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import asdict, dataclass
from typing import Any, Protocol, Self

from ...errors import HerdError
from ...model.config import HerdConfig
from ...model.processing import Tokenizer
from .likelihood import EncodedPair, LogLikelihood, check_pair, encode_pair
from .questions import Question, Task


class Scores(Protocol):
    """What scores groups of pairs: ``Scorer``, or another model in its place."""

    def score(
        self, groups: Items[Items[EncodedPair]], on_group: Callable[[], object] = ...,
    ) -> list[list[LogLikelihood]]:
        """See ``Scorer.score``."""


@dataclass(frozen=True)
class Answer:
    """To one question.

    Attributes:
        question: its number.
        likelihoods: log-likelihood of every choice.
        chosen: the choice; where there is one continuation, 0 for what is wanted and -1 for anything else.
        right: whether that is right.
    """

    question: int
    likelihoods: list[float]
    chosen: int
    right: bool


@dataclass(frozen=True)
class TaskResult:
    """A bundle's answers to a task.

    Attributes:
        task: its name.
        answers: in the order of the questions.
        perplexity: of the continuation that is wanted, per continuation; None for multiple choice.
        seconds: that all took.
    """

    task: str
    answers: list[Answer]
    perplexity: float | None
    seconds: float

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return statistics.fmean(answer.right for answer in self.answers)

    @property
    def standard_error(self) -> float:
        """Of the accuracy: other questions of the kind would move it by as much."""
        return _standard_error([answer.right for answer in self.answers])

    @property
    def questions_per_second(self) -> float:
        """How fast they were answered."""
        return len(self.answers) / max(self.seconds, 1e-9)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """What ``to_json`` gave."""
        return cls(**{**content, "answers": [Answer(**answer) for answer in content["answers"]]})


@dataclass(frozen=True)
class Difference:
    """Of two bundles on the same questions.

    Attributes:
        accuracy: of the first less that of the second.
        standard_error: of that difference, question by question: far less than those of the accuracies.
        changed: answers that are not the same, right or wrong.
    """

    accuracy: float
    standard_error: float
    changed: int

    @classmethod
    def between(cls, one: TaskResult, other: TaskResult) -> Difference:
        """Compare two results.

        Raises:
            HerdError: they are about different questions.
        """
        if [answer.question for answer in one.answers] != [answer.question for answer in other.answers]:
            raise HerdError(f"the two results of {one.task} are about different questions: answer the same ones")
        pairs = list(zip(one.answers, other.answers, strict=True))
        changes = [a.right - b.right for a, b in pairs]
        return cls(statistics.fmean(changes), _standard_error(changes), sum(a.chosen != b.chosen for a, b in pairs))


@dataclass(frozen=True)
class EncodedTask:
    """A task in a model's tokens.

    Attributes:
        task: its questions.
        groups: their choices.
    """

    task: Task
    groups: list[list[EncodedPair]]

    @classmethod
    def of(cls, task: Task, tokenizer: Tokenizer, config: HerdConfig) -> EncodedTask:
        """Encode a task.

        Raises:
            HerdError: a question is longer than the context, or cannot be spelt.
        """
        groups = []
        for question in task.questions:
            group = [encode_pair(tokenizer, *pair) for pair in question.pairs]
            for pair in group:
                check_pair(config, pair, f"question {question.number} of {task.name}")
            groups.append(group)
        return cls(task, groups)


def evaluate(encoded: EncodedTask, scorer: Scores, on_question: Callable[[], object] = lambda: None) -> TaskResult:
    """Answer the questions of a task.

    Args:
        encoded: the task.
        scorer: of the model.
        on_question: called after each, for progress.
    """
    task, started = encoded.task, time.perf_counter()
    scores = scorer.score(encoded.groups, on_question)
    seconds = time.perf_counter() - started
    answers = [_answer(task, *pair) for pair in zip(task.questions, scores, strict=True)]
    wanted = [found[0].total for question, found in zip(task.questions, scores, strict=True) if question.label is None]
    perplexity = math.exp(min(-statistics.fmean(wanted), 700.0)) if wanted else None
    return TaskResult(task.name, answers, perplexity, seconds)


def average(results: Items[TaskResult]) -> tuple[float, float]:
    """Mean accuracy of several tasks, each counting the same, and its standard error."""
    return statistics.fmean(result.accuracy for result in results), _of_mean([one.standard_error for one in results])


def average_difference(found: Items[Difference]) -> Difference:
    """Mean difference over several tasks, and all answers that changed."""
    return Difference(statistics.fmean(one.accuracy for one in found), _of_mean([one.standard_error for one in found]),
                      sum(one.changed for one in found))


def _answer(task: Task, question: Question, found: Items[LogLikelihood]) -> Answer:
    totals = [score.total for score in found]
    if question.label is None:
        return Answer(question.number, totals, found[0].greedy - 1, found[0].greedy)
    lengths = [max(1, len(text.strip())) if task.per_character else 1 for _, text in question.pairs]
    scaled = [total / length for total, length in zip(totals, lengths, strict=True)]
    chosen = scaled.index(max(scaled))
    return Answer(question.number, totals, chosen, chosen == question.label)


def _standard_error(values: Items[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _of_mean(errors: Items[float]) -> float:
    return math.hypot(*errors) / len(errors)

"""Accuracies, standard errors and paired differences by hand, and a task answered by an engine."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from herdgraph.errors import HerdError
from herdgraph.runtimes import Engine
from herdgraph.runtimes.evaluation.accuracy import (
    Answer,
    Difference,
    EncodedTask,
    TaskResult,
    average,
    average_difference,
    evaluate,
)
from herdgraph.runtimes.evaluation.likelihood import EncodedPair, LogLikelihood, Scorer
from herdgraph.runtimes.evaluation.questions import Question, Task, TaskFiles


class _Told:
    """Gives log-likelihoods that were told."""

    def __init__(self, totals: Sequence[Sequence[float]], greedy: Sequence[bool] = ()) -> None:
        self._found = [[LogLikelihood(total, True) for total in group] for group in totals]
        for group, is_greedy in zip(self._found, greedy, strict=False):
            group[0].greedy = is_greedy

    def score(self, groups: Sequence[Sequence[EncodedPair]], on_group: Any = None) -> list[list[LogLikelihood]]:
        assert len(groups) == len(self._found)
        return self._found


def _encoded(questions: list[Question], *, per_character: bool = False) -> EncodedTask:
    return EncodedTask(Task("animals", questions, per_character),
                       [[EncodedPair([3, 4], 1)] * len(question.pairs) for question in questions])


def _result(right: Sequence[bool], chosen: Sequence[int] | None = None) -> TaskResult:
    return TaskResult("animals", [Answer(number, [], (chosen or [0] * len(right))[number], is_right)
                                  for number, is_right in enumerate(right)], None, 2.0)


def test_the_likeliest_choice_is_the_answer() -> None:
    question = Question(5, [("Q", " ox"), ("Q", " elephants")], 1)
    raw = evaluate(_encoded([question]), _Told([[-2.0, -6.0]]))
    assert raw.answers == [Answer(5, [-2.0, -6.0], 0, False)]
    scaled = evaluate(_encoded([question], per_character=True), _Told([[-2.0, -6.0]]))
    assert scaled.answers == [Answer(5, [-2.0, -6.0], 1, True)], "-2/2 characters are less than -6/9"


def test_one_continuation_is_right_when_it_is_greedy() -> None:
    questions = [Question(number, [("Q", " moon")], None) for number in range(2)]
    found = evaluate(_encoded(questions), _Told([[-1.0], [-3.0]], [True, False]))
    assert [(answer.chosen, answer.right) for answer in found.answers] == [(0, True), (-1, False)]
    assert found.perplexity == pytest.approx(math.exp(2.0))


def test_accuracy_and_its_standard_error_by_hand() -> None:
    found = _result([True, True, True, False])
    assert (found.accuracy, found.questions_per_second) == (0.75, 2.0)
    assert found.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert _result([True]).standard_error == 0


def test_a_difference_is_paired() -> None:
    one, other = _result([True, True, False, False], [0, 1, 2, 0]), _result([True, False, False, False], [0, 2, 1, 0])
    found = Difference.between(one, other)
    assert (found.accuracy, found.changed) == (0.25, 2)
    assert found.standard_error == pytest.approx(0.25), "of 0, 1, 0, 0"
    assert Difference.between(one, one) == Difference(0.0, 0.0, 0)
    with pytest.raises(HerdError, match="about different questions"):
        Difference.between(one, _result([True]))


def test_means_of_tasks_count_each_task_the_same() -> None:
    results = [_result([True, False]), _result([True] * 8)]
    assert average(results) == (0.75, pytest.approx(results[0].standard_error / 2))
    assert average_difference([Difference(0.1, 0.03, 2), Difference(-0.2, 0.04, 5)]) == Difference(
        pytest.approx(-0.05), pytest.approx(0.025), 7)


def test_results_are_kept_as_json() -> None:
    found = _result([True, False])
    assert TaskResult.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_a_task_answered_by_an_engine(engine: Engine, wheel: Path) -> None:
    """Answers do not depend on how many are asked at once."""
    tokenizer, files, asked = engine.processor.tokenizer, TaskFiles(wheel), []
    whole = EncodedTask.of(files.read("animals"), tokenizer, engine.config)
    found = evaluate(whole, Scorer(engine), lambda: asked.append(None))
    assert len(asked) == len(found.answers) == 6
    one = EncodedTask(Task("animals", whole.task.questions[3:4], True), whole.groups[3:4])
    assert evaluate(one, Scorer(engine)).answers[0].likelihoods == pytest.approx(found.answers[3].likelihoods, abs=1e-4)


def test_a_question_that_is_longer_than_the_context(engine: Engine) -> None:
    context = engine.config.text.max_position_embeddings
    task = Task("long", [Question(3, [("x" * context, " y")], None)], False)
    with pytest.raises(HerdError, match=f"question 3 of long has {context + 2} tokens, the model's context is"):
        EncodedTask.of(task, engine.processor.tokenizer, engine.config)

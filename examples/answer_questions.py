"""A small application: questions about one document, answered one by one, as JSON lines with a confidence.

    python examples/answer_questions.py BUNDLE document.txt questions.txt > answers.jsonl

The document is read once: every question goes on from a fork of the same sequence.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from herdgraph import Engine, HerdError, Sequence

INSTRUCTION = "Answer in one short sentence from the document alone:\n\n"


@dataclass(frozen=True)
class Answer:
    """One line of the output; ``confidence`` is the geometric mean of the tokens' probabilities."""

    question: str
    answer: str
    confidence: float
    seconds: float


def read_document(engine: Engine, document: str) -> Sequence:
    """A sequence that holds everything up to the question."""
    sequence = engine.new_sequence()
    engine.generate(messages(document, "?"), sequence=sequence, max_new_tokens=1)
    return sequence


def messages(document: str, question: str) -> list[dict[str, str]]:
    """The conversation; what does not change comes first, so that it is computed once."""
    return [{"role": "system", "content": INSTRUCTION + document}, {"role": "user", "content": question}]


def answers(engine: Engine, document: str, questions: list[str]) -> Iterator[Answer]:
    """Answers in the order of the questions."""
    read = read_document(engine, document)
    for question in questions:
        result = engine.generate(
            messages(document, question), sequence=read.fork(), max_new_tokens=64, temperature=0, logprobs=0)
        mean = sum(token.logprob for token in result.logprobs) / len(result.logprobs)
        seconds = result.timings.prefill_seconds + result.timings.decode_seconds
        yield Answer(question, result.text.strip(), round(math.exp(mean), 3), round(seconds, 3))


def main() -> None:
    """Read the arguments, answer, and tell errors in one line."""
    bundle, document, questions = sys.argv[1:]
    lines = [line for line in Path(questions).read_text(encoding="utf-8").splitlines() if line.strip()]
    try:
        with Engine.load(bundle) as engine:
            for answer in answers(engine, Path(document).read_text(encoding="utf-8"), lines):
                print(json.dumps(asdict(answer), ensure_ascii=False), flush=True)
    except HerdError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

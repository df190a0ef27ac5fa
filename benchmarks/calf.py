"""What the calf sees: right captions of pictures that it was not shown, by the torch model and by what is built of it.

    python -m benchmarks.calf [WORK] [--checkpoint DIR] [--every 1] [--threads 1]

WORK is where ``examples/calf/make_data.py`` put its data (.cache/calf). Measured are, greedy and to the last letter,

* ``as drawn``: trained emoji, the drawing that views were made of;
* ``other vendor``: trained emoji as Twitter draws them, the honest hard set;
* ``held out``: emoji of which no picture was trained; their names occur in the text. Asked for the kind as well.

A name counts as right also when it is one of the emoji's other names (``or alias``). Bundles are built and, for FP8,
calibrated on training captions; each generates its own text.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.table import Table

from examples.calf import CALF
from herdgraph.console import stderr
from herdgraph.model.processing import PromptProcessor
from herdgraph.model.training.runs.start import open_model
from herdgraph.runtimes import Engine

from .screen import show_tables

SETS = {"seen": "as drawn", "other_vendor": "other vendor", "held_out": "held out"}
KIND = "What kind of thing is this?"
LONGEST = 24
"""Tokens of an answer."""


@dataclass(frozen=True)
class Question:
    """One picture with a question and its right answers."""

    picture: Path
    text: str
    answer: str
    aliases: frozenset[str]
    category: str


@dataclass(frozen=True)
class Accuracy:
    """Shares of right answers; by category with the number of questions."""

    right: float
    with_aliases: float
    kind: float
    by_category: dict[str, tuple[float, int]]


Say = Callable[[Question, str], str]
"""Looks at a question's picture and answers a text."""


def questions(data: Path, name: str) -> list[Question]:
    """The questions of a set: what it is."""
    found = []
    for line in (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        user, assistant = row["messages"]
        picture, question = user["content"]
        aliases = frozenset(f"{article}{alias}." for alias in row["aliases"] for article in ("A ", "An ", "The ", ""))
        found.append(Question(data / picture["image"], question["text"], assistant["content"], aliases,
                              row["category"]))
    return found


def ask(engine: Engine, question: Question, text: str) -> str:
    """What a bundle says."""
    return engine.generate(_messages(question, text), max_new_tokens=LONGEST).text


def _messages(question: Question, text: str) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": str(question.picture)}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def speakers(checkpoint: Path, work: Path, threads: int) -> Iterator[tuple[str, Say]]:
    """The torch model and bundles of three recipes, one after the other."""
    yield "torch, float32", Greedy(checkpoint)
    calibration = work / "calibration"
    if not (calibration / "calibration.json").exists():
        herdgraph("calibrate", checkpoint, "-o", calibration, "--data", work / "data" / "train.jsonl")
    for recipe in ("fp32", "int8", "fp8"):
        directory = work / f"bundle-{recipe}"
        measured = ["--calibration", calibration] if recipe == "fp8" else []
        herdgraph("build", checkpoint, "-o", directory, "--recipe", recipe, "--overwrite", *measured)
        engine = Engine.load(directory, threads=threads)
        yield f"CPU bundle, {recipe}", partial(ask, engine)


def herdgraph(*arguments: object) -> None:
    """Run the command line."""
    subprocess.run([sys.executable, "-m", "herdgraph", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


class Greedy:
    """The torch model, asked as a bundle is: the whole text again for every token."""

    def __init__(self, checkpoint: Path) -> None:
        self.model = open_model(checkpoint).eval()
        self.processor = PromptProcessor(checkpoint, self.model.config)

    @torch.no_grad()
    def __call__(self, question: Question, text: str) -> str:
        """What it says."""
        prepared = self.processor.prepare(_messages(question, text))
        ids, pixels = list(prepared.token_ids), torch.from_numpy(prepared.pixel_values)
        said: list[int] = []
        features = self.model.vision(pixels)
        while len(said) < LONGEST:
            logits, _ = self.model.decoder(torch.tensor([ids + said]), features)
            token = int(logits[0, -1].argmax())
            if token in self.processor.tokenizer.stop_ids:
                break
            said.append(token)
        return self.processor.tokenizer.decode(said)


def evaluate(say: Say, asked: list[Question], title: str) -> Accuracy:
    """Ask all questions."""
    right, alias, kind = 0, 0, 0
    by_category: Counter[str] = Counter()
    for question in track(asked, description=title, console=stderr, transient=True):
        said = say(question, question.text)
        right += said == question.answer
        alias += said in question.aliases
        by_category[question.category] += said == question.answer or said in question.aliases
        kind += say(question, KIND) == f"It belongs to {question.category}."
    count = len(asked)
    sizes = Counter(question.category for question in asked)
    return Accuracy(right / count, (right + alias) / count, kind / count,
                    {category: (by_category[category] / size, size) for category, size in sizes.items()})


def report(found: dict[tuple[str, str], Accuracy], sizes: dict[str, int]) -> None:
    """Tables."""
    table = Table(title="right answers of the calf")
    for column in ("", "pictures", "asked", "name", "name or alias", "kind"):
        table.add_column(column)
    for (speaker, name), accuracy in found.items():
        table.add_row(speaker, SETS[name], str(sizes[name]), *(f"{100 * share:.1f} %" for share in (
            accuracy.right, accuracy.with_aliases, accuracy.kind)))
    show_tables(table)
    table = Table(title="names by category, CPU bundle, fp32")
    for column in ("category", *SETS.values()):
        table.add_column(column)
    by_set = {name: found["CPU bundle, fp32", name].by_category for name in SETS}
    for category in sorted(by_set["seen"]):
        shares = (by_set[name].get(category) for name in SETS)
        table.add_row(category, *("" if share is None else f"{100 * share[0]:.0f} % of {share[1]}" for share in shares))
    show_tables(table)


def main() -> None:
    """Parse the command line, ask everybody everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="?", default=Path(".cache/calf"))
    parser.add_argument("--checkpoint", type=Path, default=CALF)
    parser.add_argument("--every", type=int, default=1, help="ask about every n-th picture only")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    asked = {name: questions(args.work / "data", name)[:: args.every] for name in SETS}
    found = {(speaker, name): evaluate(say, asked[name], f"{speaker}: {SETS[name]}")
             for speaker, say in speakers(args.checkpoint, args.work, args.threads) for name in SETS}
    report(found, {name: len(rows) for name, rows in asked.items()})


if __name__ == "__main__":
    main()

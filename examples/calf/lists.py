"""Lists in words, with marks behind what was asked for: what ``clip_questions.py`` needs, learned from text.

    Which came first: a cat? Or a dog?     0: a sun. 1: a dog? 2: a tree. 3: a cat? 4: a sun. ...

A clip teaches a mark or two in a hundred tokens of pictures and names; a list teaches one in ten tokens. A whole run on
clips without marks did not teach to look at what was asked for, nor did 800 steps on clips with marks; 800 steps on
lists did (docs/calf.md). What they name is drawn by lot.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

from .captions import Row, conversation, write_rows
from .clip_questions import begins, listed, which_first

LINES = 10
ASKED = 0.45
"""Share of the lines that name what was asked for."""
SHAPES = 0.3
"""Share of the lists that name shapes."""


def write_lists(
    directory: Path, things: Sequence[str], shapes: Sequence[str], *, lists: int = 10000, seed: int = 0
) -> dict[str, int]:
    """Write ``lists.jsonl``.

    Args:
        directory: of the data.
        things: names with their articles.
        shapes: the same, of shapes: some have a color or a form in common.
        lists: rows.
        seed: of what is drawn.
    """
    return {"lists": write_rows(directory / "lists.jsonl", _rows(things, shapes, lists, seed))}


def _rows(things: Sequence[str], shapes: Sequence[str], count: int, seed: int) -> Iterator[Row]:
    for number in range(count):
        random = Random(f"{seed} list {number}")
        names = shapes if random.random() < SHAPES else things
        asked = random.sample(names, random.choice((1, 2, 2)))
        question = which_first(*asked) if len(asked) > 1 else begins(*asked)
        yield {"key": f"list-{number}",
               **conversation((), [(question, listed(_drawn(random, names, asked), asked))])}


def _drawn(random: Random, names: Sequence[str], asked: Sequence[str]) -> list[str]:
    """Names by lot, none of them twice in a row."""
    drawn: list[str] = []
    while len(drawn) < LINES:
        name = random.choice(asked if random.random() < ASKED else names)
        if name not in drawn[-1:]:
            drawn.append(name)
    return drawn

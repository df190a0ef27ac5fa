"""Questions about shapes: easy-vqa (Victor Zhou, MIT), with its own split into pictures to train and to test on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from random import Random

from .captions import Row, conversation, write_rows
from .extras import needed

LICENCE = "easy-vqa, Copyright Victor Zhou, MIT, https://github.com/vzhou842/easy-VQA"
SHAPES = ("circle", "rectangle", "triangle")
TURNS = 5
"""Questions on a picture in training: as many as fit into one attention chunk, behind it."""

Asked = list[tuple[str, str]]


def write_shapes(directory: Path, seed: int = 0) -> dict[str, int]:
    """Write ``shapes.jsonl`` and ``shape_names.jsonl`` to train on and ``shapes_test.jsonl``, one question a row.

    Raises:
        HerdError: the package is not installed.
    """
    rows: dict[str, list[Row]] = {"shapes": [], "shape_names": [], "shapes_test": []}
    for number, picture, asked in _pictures("train"):
        Random(f"{seed} {number}").shuffle(asked)
        rows["shapes"] += [{"key": f"shape-{number}-{turn}", **conversation(picture, asked[turn:turn + TURNS])}
                           for turn in range(0, len(asked), TURNS)]
        if name := _name(asked):
            rows["shape_names"].append({"key": f"shape-{number}-name", "content": [picture, name]})
    rows["shapes_test"] = [{"key": f"shape-test-{number}-{turn}", **conversation(picture, [question])}
                           for number, picture, asked in _pictures("test") for turn, question in enumerate(asked)]
    return {name: write_rows(directory / f"{name}.jsonl", found) for name, found in rows.items()}


def _pictures(split: str) -> Iterator[tuple[int, Row, Asked]]:
    """Number, picture and questions of every picture of a split."""
    package = needed("easy_vqa")
    paths = getattr(package, f"get_{split}_image_paths")()
    questions = sorted(zip(*getattr(package, f"get_{split}_questions")(), strict=True), key=lambda row: row[2])
    for number, several in groupby(questions, key=lambda row: row[2]):
        yield number, {"image": str(Path(paths[number]).resolve())}, [(text, answer) for text, answer, _ in several]


def _name(asked: Asked) -> str | None:
    """What is to be seen, such as "red circle", if the answers tell both."""
    answers = {answer for _, answer in asked} - {"yes", "no"}
    shapes = [answer for answer in answers if answer in SHAPES]
    colours = [answer for answer in answers if answer not in SHAPES]
    return f"{colours[0]} {shapes[0]}" if shapes and colours else None

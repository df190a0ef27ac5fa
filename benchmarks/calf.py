"""What the calf sees of pictures it was not shown: right answers, by the torch model and by what is built of it.

    python -m benchmarks.calf [WORK] [--checkpoint DIR] [--every 10] [--threads 1]

WORK is where ``examples/calf/train.py`` works (.cache/calf). An answer is right when greedy decoding gives it to the
last letter. Of answers that list every second of a clip first (``examples/calf/clip_questions.py``), only
the conclusion counts with bundles:

* ``as drawn``: trained emoji, the drawing that views were made of; and the ``kind`` of thing they are;
* ``other vendor``: trained emoji as Twitter draws them, who was never trained: the honest hard set;
* ``never shown``: emoji of which no vendor's picture was trained, though their names occur in the text;
* ``shapes``: the official test questions of easy-vqa, beside the share of its most common answer;
* ``new clips``: animations of trained clips joined anew, by other frames where they have others: which came first (of
  two), what is to be seen at a second, how many were joined; ``first, later``: which came first where neither is seen
  at second 0 (elsewhere who names what is at second 0 is right, and needs no order);
* ``clips``: the same of joined animations that are in no trained clip, which is harder.

The torch model is asked everything, and has to be right in every word: it does not generate, which is a pass for each
answer instead of one for each word. Bundles generate; they are asked all about clips and every n-th question about
pictures. The FP8 twin is calibrated on training captions.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.table import Table

from examples.calf.clip_questions import conclusion
from herdgraph.console import stderr
from herdgraph.model.config import read_config
from herdgraph.model.data.records import frame_parts, record_of
from herdgraph.model.processing.frames import frames_at
from herdgraph.model.training.data import Encoder
from herdgraph.model.training.exact_match import exact_matches
from herdgraph.model.training.runs.start import open_model
from herdgraph.runtimes import Engine

from .screen import show_tables

NAMED = {"seen": "as drawn", "other_vendor": "other vendor", "held_out": "never shown, as drawn",
         "other_held_out": "never shown, other vendor"}
CLIPS = {"clips_new": "new clips", "clips_test": "clips"}
KIND = "What kind of thing is this?"
LONGEST = 96
"""Tokens of an answer."""

Row = dict[str, Any]
Answers = Callable[[Sequence[Row]], list[bool]]
"""Whether each question was answered right."""


def question_sets(data: Path) -> dict[str, list[Row]]:
    """The questions by what they ask."""
    found = {}
    for name, title in NAMED.items():
        rows = read_rows(data / f"{name}.jsonl")
        found[title] = rows
        found[f"{title}: kind"] = [asked_for_kind(row) for row in rows]
    found["shapes"] = read_rows(data / "shapes_test.jsonl")
    for name, title in CLIPS.items():
        clips = read_rows(data / f"{name}.jsonl")
        for kind in ("first", "when", "count"):
            found[f"{title}: {kind}"] = [row for row in clips if row["kind"] == kind]
        found[f"{title}: first, later"] = [row for row in found[f"{title}: first"] if not answered_at_0(row)]
    return found


def answered_at_0(row: Row) -> bool:
    """Whether the right answer is what is to be seen at second 0, which can be named without looking any further."""
    answer = row["messages"][-1]["content"]
    at_0 = re.split(r"[.?] ", answer)[0].removeprefix("0: ")
    return conclusion(answer).lower() == f"{at_0}.".lower()


def read_rows(path: Path) -> list[Row]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def asked_for_kind(row: Row) -> Row:
    """The same picture with another question."""
    picture = row["messages"][0]["content"][0]
    return {**row, "messages": [{"role": "user", "content": [picture, {"text": KIND}]},
                                {"role": "assistant", "content": f"It belongs to {row['category']}."}]}


def torch_answers(checkpoint: Path, data: Path) -> Answers:
    """The torch model, in one pass for each answer."""
    model = open_model(checkpoint)
    encoder = Encoder(checkpoint, read_config(checkpoint), max_tokens=512)

    def answers(rows: Sequence[Row]) -> list[bool]:
        records = (record_of(row, key="", origin="", resolve=lambda name: data / name) for row in rows)
        return exact_matches(model, [encoder(record) for record in records])

    return answers


def bundle_answers(engine: Engine, data: Path, rows: Sequence[Row]) -> list[bool]:
    """Whether a bundle, which generates token by token, answers each question right: of a list, its conclusion."""
    found = []
    for row in track(rows, description="asking", console=stderr, transient=True):
        asked, wanted = row["messages"]
        message = {"role": "user", "content": list(_parts(asked["content"], data))}
        said = engine.generate([message], max_new_tokens=LONGEST).text
        found.append(conclusion(said) == conclusion(wanted["content"]))
    return found


def _parts(content: Sequence[Row], data: Path) -> Iterator[Row]:
    """Parts of a message; frames of a video stand in it as pictures behind their times, as they do in a prompt."""
    for part in content:
        if "video" in part:
            for piece in frame_parts(frames_at([data / name for name in part["video"]], part["fps"])):
                yield ({"type": "text", "text": piece} if isinstance(piece, str)
                       else {"type": "image", "image": str(piece.source.picture)})
        elif "image" in part:
            yield {"type": "image", "image": str(data / part["image"])}
        else:
            yield {"type": "text", **part}


def bundles(checkpoint: Path, work: Path, threads: int) -> Iterator[tuple[str, Answers]]:
    """Bundles of three recipes, built and loaded one after the other."""
    calibration, data = work / "calibration", work / "data"
    if not (calibration / "calibration.json").exists():
        herdgraph("calibrate", checkpoint, "-o", calibration, "--data", data / "train.jsonl")
    for recipe in ("fp32", "int8", "fp8"):
        directory = work / f"bundle-{recipe}"
        measured = ["--calibration", calibration] if recipe == "fp8" else []
        herdgraph("build", checkpoint, "-o", directory, "--recipe", recipe, "--overwrite", *measured)
        yield f"CPU bundle, {recipe}", partial(bundle_answers, Engine.load(directory, threads=threads), data)


def herdgraph(*arguments: object) -> None:
    """Run the command line."""
    subprocess.run([sys.executable, "-m", "herdgraph", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def easiest(rows: Sequence[Row]) -> float:
    """The share of questions that the most common answer answers, or what is to be seen at second 0."""
    answers = Counter(conclusion(row["messages"][-1]["content"]) for row in rows)
    return max(answers.most_common(1)[0][1], sum(map(answered_at_0, rows))) / len(rows)


def share(right: Sequence[bool]) -> str:
    """For a table."""
    return f"{100 * sum(right) / max(1, len(right)):.1f} % of {len(right)}"


def main() -> None:
    """Parse the command line, ask everybody everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="?", default=Path(".cache/calf"))
    parser.add_argument("--checkpoint", type=Path, help="default: the calf that was made in WORK")
    parser.add_argument("--every", type=int, default=10, help="ask bundles every n-th question only; 0: no bundles")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    checkpoint = args.checkpoint or args.work / "calf" / "model"
    torch.set_num_threads(args.threads)
    data, sets, clips = args.work / "data", question_sets(args.work / "data"), tuple(CLIPS.values())
    answers = torch_answers(checkpoint, data)
    columns = {"most common, or at second 0": {title: f"{100 * easiest(rows):.1f} %" for title, rows in sets.items()},
               "torch, every word": {title: share(answers(rows)) for title, rows in sets.items()}}
    for speaker, say in bundles(checkpoint, args.work, args.threads) if args.every else ():
        columns[speaker] = {title: share(say(rows if title.startswith(clips) else rows[:: args.every]))
                            for title, rows in sets.items()}
    table = Table(title="right answers of the calf")
    for column in ("", *columns):
        table.add_column(column)
    for title in sets:
        table.add_row(title, *(column[title] for column in columns.values()))
    show_tables(table)


if __name__ == "__main__":
    main()

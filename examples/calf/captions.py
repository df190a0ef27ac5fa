"""The calf's data: emoji with captions, questions and answers, and prose, as JSON lines.

``train.jsonl``         captions, conversations and pairs of pictures, from several views of every trained drawing
``views.jsonl``         the same from further views, for the decoder, which learns few pictures by heart
``pairs.jsonl``         the pictures of ``train.jsonl``, each with its name alone: what the image tower learns to see by
``text.jsonl``          what all emoji are called and belong to, those without pictures included, and pages of prose
``seen.jsonl``          to evaluate on: trained emoji, as the first vendor drew them
``held_out.jsonl``      to evaluate on: emoji of which no picture was trained, though their names occur in the text
``other_vendor.jsonl``  to evaluate on: trained emoji as a vendor draws them who was never trained, the honest hard set
``other_held_out.jsonl``  the same of emoji of which no vendor's picture was trained

A row to evaluate on is a conversation with the expected answer as its last message, and the ``name``, ``aliases`` and
``category`` beside it. A view is the drawing turned, shrunk, moved, tinted and on a ground of another colour: never
mirrored, for arrows and hands would change their names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image, ImageEnhance

from herdgraph.errors import HerdError
from herdgraph.files import atomic_directory
from herdgraph.model.processing.pictures import load_image

from .emoji import LICENCES, SIDE, Emoji
from .vendors import LICENCES as MORE_LICENCES

Row = dict[str, Any]

HELD_OUT = 0.152
"""Share of emoji without pictures in training: 280 of Google's."""
PAGE = 600
"""Characters of a page of prose, at least."""

CAPTIONS = (
    "A picture of {a}, {category}.", "This is {a}.", "Here you see {a}. It belongs to {category}.",
    "{A}, from {category}.",
)
QUESTIONS = (
    ("What do you see?", "I see {a}."),
    ("What kind of thing is this?", "It belongs to {category}."),
    ("Describe the picture.", "A picture of {a}, {category}."), ("Is this {a}?", "Yes, it is {a}."),
    ("Is this {b}?", "No, it is {a}."),
)
FACTS = ("{A} belongs to {category}.", "{A} is a kind of {kind}.")
_EVALUATED = ("What is this?", "{A}.")


def write_calf_data(
    directory: Path, drawn: Mapping[str, Sequence[Emoji]], other: Sequence[Emoji], *, other_vendor: str = "twitter",
    prose: Mapping[str, str] | None = None, views: int = 2, more_views: int = 2, held_out: float = HELD_OUT,
    seed: int = 0, overwrite: bool = False,
) -> dict[str, int]:
    """Write the files above, with pictures in ``pictures/``.

    Args:
        directory: to create.
        drawn: emoji to train on and to hold out, by vendor; the first vendor has all of them.
        other: drawings of a vendor that is not trained on.
        other_vendor: its name.
        prose: texts by name.
        views: pictures of every trained drawing.
        more_views: pictures more, for the decoder; the tower draws views of its own.
        held_out: share of emoji without pictures in training.
        seed: of views and templates.
        overwrite: replace a directory that was written by this function.

    Returns:
        How many emoji and rows there are; ``counts.json`` holds the same.

    Raises:
        HerdError: nothing is left to train on or to evaluate on, or the directory cannot be written.
    """
    first, *_ = drawn
    trained = [emoji for emoji in drawn[first] if not emoji.is_held_out(held_out)]
    unseen = [emoji for emoji in drawn[first] if emoji.is_held_out(held_out)]
    kept = {vendor: [emoji for emoji in several if not emoji.is_held_out(held_out)]
            for vendor, several in drawn.items()}
    hard, hardest = ([emoji for emoji in other if emoji.code in {known.code for known in several}]
                     for several in (trained, unseen))
    if not trained or not unseen or not hard:
        raise HerdError(f"{len(trained)} trained, {len(unseen)} held-out and {len(hard)} emoji of another vendor: each "
                        "needs some, change the share that is held out")
    # The other vendor's own names are not used: one thing has one name.
    names = {emoji.code: emoji for emoji in drawn[first]}
    hard, hardest = ([replace(names[emoji.code], picture=emoji.picture) for emoji in several]
                     for several in (hard, hardest))
    with atomic_directory(directory, overwrite=overwrite, mark="counts.json") as temporary:
        (temporary / "pictures").mkdir()
        rows, more = ([row for vendor, several in kept.items()
                       for row in _training_rows(several, vendor, numbers, seed, temporary)]
                      for numbers in (range(views), range(views, views + more_views)))
        written: dict[str, Iterable[Row]] = {
            "train": rows, "views": more, "pairs": _pairs(rows, trained),
            "text": (*_facts(drawn[first]), *_pages(prose or {})),
            "seen": _evaluated(trained, "drawn", temporary),
            "held_out": _evaluated(unseen, "drawn", temporary),
            "other_vendor": _evaluated(hard, other_vendor, temporary),
            "other_held_out": _evaluated(hardest, other_vendor, temporary),
        }
        counts = {"emoji_trained": len(trained), "emoji_held_out": len(unseen)}
        for name, made in written.items():
            counts[name] = write_rows(temporary / f"{name}.jsonl", made)
        (temporary / "LICENCES").write_text("\n".join({**LICENCES, **MORE_LICENCES}.values()) + "\n",
                                            encoding="utf-8")
        (temporary / "counts.json").write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
    return counts


def view(picture: Path, random: Random | None = None) -> Image.Image:
    """A drawing on white, or, with a source of chance, a view of it."""
    if random is None:
        return load_image(picture)
    with Image.open(picture) as image:
        drawing = image.convert("RGBA")
    side = round(SIDE * random.uniform(0.7, 1))
    drawing = drawing.rotate(random.uniform(-12, 12), Image.Resampling.BICUBIC).resize((side, side))
    ground = Image.new("RGB", (SIDE, SIDE), tuple(random.randint(150, 255) for _ in range(3)))
    ground.paste(drawing, (random.randint(0, SIDE - side), random.randint(0, SIDE - side)), drawing)
    ground = ImageEnhance.Color(ground).enhance(random.uniform(0.6, 1.3))
    return ImageEnhance.Brightness(ground).enhance(random.uniform(0.8, 1.15))


def _training_rows(
    emoji: Sequence[Emoji], vendor: str, numbers: Iterable[int], seed: int, directory: Path
) -> Iterator[Row]:
    """One row per view, by its number. The next view of two emoji is a pair of pictures now and then."""
    for number in numbers:
        for index, shown in enumerate(emoji):
            random = Random(f"{seed} {number} {vendor} {shown.code}")
            another = emoji[(index + random.randrange(1, max(2, len(emoji)))) % len(emoji)]
            key = f"{shown.code}-{vendor.replace('-', '_')}{number}"
            image = view(shown.picture, random if number else None)
            make = random.choices((_caption, _questions, _interleaved, _side_by_side), (20, 70, 5, 5))[0]
            yield make(random, key, image, shown, another, directory) | {"key": key}


def _pairs(rows: Iterable[Row], emoji: Iterable[Emoji]) -> Iterator[Row]:
    """Name and picture of all rows but those whose picture shows two emoji."""
    names = {shown.code: shown.name for shown in emoji}
    for row in rows:
        picture = next(part for part in row.get("content") or row["messages"][0]["content"] if "image" in part)
        if Path(picture["image"]).stem == row["key"]:
            yield {"key": f"{row['key']}-name", "content": [picture, names[row["key"].rpartition("-")[0]]]}


def _caption(random: Random, key: str, image: Image.Image, shown: Emoji, _: Emoji, directory: Path) -> Row:
    return {"content": [_saved(image, key, directory), _filled(random.choice(CAPTIONS), shown)]}


def _questions(random: Random, key: str, image: Image.Image, shown: Emoji, another: Emoji, directory: Path) -> Row:
    """Its name, and one question more: a second turn costs less than a second picture."""
    asked = [_EVALUATED, random.choice(QUESTIONS)]
    random.shuffle(asked)
    return conversation(_saved(image, key, directory), [
        (_filled(question, shown, another), _filled(answer, shown)) for question, answer in asked])


def _interleaved(random: Random, key: str, image: Image.Image, shown: Emoji, another: Emoji, directory: Path) -> Row:
    """Two pictures, each with its caption behind it."""
    second = _saved(view(another.picture, random), f"{key}-b", directory)
    return {"content": [_saved(image, key, directory), f"First, {shown.phrase}.", second, f"Then, {another.phrase}."]}


def _side_by_side(random: Random, key: str, image: Image.Image, shown: Emoji, another: Emoji, directory: Path) -> Row:
    """Two drawings in one picture, which has two tiles and a global one."""
    both = Image.new("RGB", (2 * SIDE, SIDE))
    both.paste(image, (0, 0))
    both.paste(view(another.picture, random), (SIDE, 0))
    answer = f"{_capital(shown.phrase)} on the left and {another.phrase} on the right."
    asked = ("What is on the left, and what on the right?", answer)
    return conversation(_saved(both, f"{key}-both", directory), [asked])


def _evaluated(emoji: Iterable[Emoji], vendor: str, directory: Path) -> Iterator[Row]:
    question, answer = _EVALUATED
    for shown in emoji:
        picture = _saved(view(shown.picture), f"{shown.code}-{vendor}", directory)
        yield {
            "key": f"{shown.code}-{vendor}", "name": shown.name, "aliases": list(shown.aliases),
            "category": shown.category, **conversation(picture, [(question, _filled(answer, shown))]),
        }


def _facts(emoji: Iterable[Emoji]) -> Iterator[Row]:
    for known in emoji:
        also = [f"{_capital(known.phrase)} is also called {alias}." for alias in known.aliases]
        yield {"key": f"{known.code}-facts", "text": " ".join([*(_filled(fact, known) for fact in FACTS), *also])}


def _pages(prose: Mapping[str, str]) -> Iterator[Row]:
    for name, text in prose.items():
        for number, page in enumerate(re.finditer(rf"(?s).{{{PAGE}}}\S*\s*|.+", text)):
            if page[0].strip():
                yield {"key": f"{name}-{number}", "text": page[0].strip()}


def conversation(seen: Row | Sequence[Row], asked: Iterable[tuple[str, str]]) -> Row:
    """What is seen, then questions with their answers."""
    shown = [seen] if isinstance(seen, Mapping) else list(seen)
    turns = []
    for question, answer in asked:
        turns += [{"role": "user", "content": [*shown, {"text": question}]}, {"role": "assistant", "content": answer}]
        shown = []
    return {"messages": turns}


def _filled(template: str, shown: Emoji, another: Emoji | None = None) -> str:
    return template.format(a=shown.phrase, A=_capital(shown.phrase), b=(another or shown).phrase,
                           category=shown.category, kind=shown.kind)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _saved(image: Image.Image, name: str, directory: Path) -> Row:
    path = Path("pictures") / f"{name}.png"
    image.save(directory / path, compress_level=1)
    return {"image": str(path)}


def write_rows(path: Path, rows: Iterable[Row]) -> int:
    """JSON lines; how many."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count

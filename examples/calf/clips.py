"""Videos with questions: animated emoji, one after the other.

The npm package ``@lobehub/fluent-emoji-anim-1`` (drawings by Microsoft, MIT) holds moving emoji. Their names tell the
thing and not the motion, so that a question about one of them alone could be answered from any frame. Joined, they
have an order and times: which came first, what is to be seen at some second, how many there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from random import Random

from PIL import Image, ImageSequence

from .captions import Row, conversation, write_rows
from .emoji import SIDE, Emoji, chance
from .npm import fetch_package

VERSION = "1.0.0"
LICENCE = "Fluent Emoji (animated), Copyright Microsoft, MIT, https://github.com/microsoft/fluentui-emoji"
FRAMES = (0, 8, 16)
"""Which frames of an animation are used; they play at some 24 in a second."""
MOST = 3
"""Animations in one clip."""
NUMBERS = ("One.", "Two.", "Three.")


def fetch_animations(cache: Path) -> Path:
    """The package in a cache directory, fetched when it is not there (165 MB).

    Raises:
        HerdError: there is no npm, no network or no such package.
    """
    target = cache / f"fluent-emoji-anim-{VERSION}"
    return fetch_package(f"@lobehub/fluent-emoji-anim-1@{VERSION}", target, ("assets/", "package.json"), "package.json")


def write_clips(
    directory: Path, emoji: Sequence[Emoji], package: Path, *, animations: int = 360, clips: int = 3000,
    asked: int = 600, held_out: float = 0.2, seed: int = 0,
) -> dict[str, int]:
    """Write ``clips.jsonl`` and, of animations that are in none of its clips, ``clips_test.jsonl``.

    Args:
        directory: of the data; frames go to ``pictures/``.
        emoji: those that may occur: their drawings are trained on.
        package: of ``fetch_animations``.
        animations: how many are used, for decoding one takes 0.1 s.
        clips: rows to train on.
        asked: rows to evaluate on.
        held_out: share of the animations that is evaluated on.
        seed: of what is joined and asked.
    """
    moving = [one for one in emoji if _path(package, one).is_file()]
    moving = sorted(moving, key=lambda one: chance(f"clip {one.code}"))[:animations]
    count = max(MOST + 1, round(held_out * len(moving)))
    frames = {one.code: _frames(one, package, directory) for one in moving}
    made = {"clips": (moving[count:], clips), "clips_test": (moving[:count], asked)}
    return {name: write_rows(directory / f"{name}.jsonl", _rows(name, several, frames, rows, seed))
            for name, (several, rows) in made.items()}


def _rows(
    name: str, emoji: Sequence[Emoji], frames: dict[str, list[str]], count: int, seed: int
) -> Iterator[Row]:
    for number in range(count):
        random = Random(f"{seed} {name} {number}")
        shown = random.sample(emoji, random.randint(1, MOST))
        lengths = [random.randint(1, 2) for _ in shown]
        video = [random.choice(frames[one.code]) for one, length in zip(shown, lengths, strict=True)
                 for _ in range(length)]
        kind, question = _question(random, shown, lengths)
        yield {"key": f"{name}-{number}", "kind": kind,
               **conversation({"video": video, "fps": 1}, [question])}


def _question(random: Random, shown: Sequence[Emoji], lengths: Sequence[int]) -> tuple[str, tuple[str, str]]:
    """The kind of a question, and the question with its answer."""
    at_second = list(chain.from_iterable([one] * length for one, length in zip(shown, lengths, strict=True)))
    kind = random.choice(("first", "when", "count")) if len(shown) > 1 else random.choice(("when", "count"))
    if kind == "first":
        a, b = random.sample(range(len(shown)), 2)
        return kind, (f"Which came first, {shown[a].phrase} or {shown[b].phrase}?", _sentence(shown[min(a, b)]))
    if kind == "when":
        second = random.randrange(len(at_second))
        return kind, (f"What is at second {second}?", _sentence(at_second[second]))
    return kind, ("How many clips are joined?", NUMBERS[len(shown) - 1])


def _sentence(emoji: Emoji) -> str:
    return f"{emoji.phrase[:1].upper()}{emoji.phrase[1:]}."


def _frames(emoji: Emoji, package: Path, directory: Path) -> list[str]:
    """Names of an emoji's frames as pictures on white."""
    names = []
    with Image.open(_path(package, emoji)) as animation:
        for number, frame in enumerate(ImageSequence.Iterator(animation)):
            if number in FRAMES:
                names.append(f"pictures/{emoji.code}-frame{number}.png")
                small = frame.convert("RGBA").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
                ground = Image.new("RGBA", small.size, "white")
                ground.alpha_composite(small)
                ground.convert("RGB").save(directory / names[-1], compress_level=1)
            if number == FRAMES[-1]:
                break
    return names


def _path(package: Path, emoji: Emoji) -> Path:
    return package / "assets" / f"{emoji.code}.webp"

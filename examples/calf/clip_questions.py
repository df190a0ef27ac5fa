"""What is asked of a clip: which of two came first, what is to be seen at some second, how many scenes there are.

A question alone teaches little: for long a calf learned to name any of the frames, and nothing of their times. Asked
what is at each second, it is told the name of every frame right behind its number, and binds them soon.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from random import Random

NUMBERS = ("One.", "Two.", "Three.")
FEW = 3
"""Seconds behind which there is room in an attention chunk for a question and the list."""

Question = tuple[str, str]
"""With its answer."""


@dataclass(frozen=True)
class Scene:
    """What can be joined: a thing, with its article, and pictures of it."""

    phrase: str
    pictures: tuple[str, ...]


@dataclass(frozen=True)
class Clip:
    """Scenes one after the other, and how many seconds each of them lasts."""

    scenes: Sequence[Scene]
    lengths: Sequence[int]

    @property
    def at_second(self) -> list[Scene]:
        """What is to be seen."""
        return list(chain.from_iterable([scene] * length
                                        for scene, length in zip(self.scenes, self.lengths, strict=True)))


def one_question(random: Random, clip: Clip) -> dict[str, Question]:
    """A question by its kind, to evaluate on."""
    kind = random.choice(("first", "when", "count")) if len(clip.scenes) > 1 else random.choice(("when", "count"))
    return {kind: _ASKED[kind](random, clip)}


def several_questions(random: Random, clip: Clip) -> dict[str, Question]:
    """Questions by their kinds, to train on: one, what is at each second, or both where there is room.

    The list comes last: no answer is to be read in it.
    """
    kinds = ["when", "count"]
    if len(clip.scenes) > 1:
        kinds += ["first", "begins"]
    chosen = [random.choice(kinds), "list"]
    if len(clip.at_second) > FEW:
        chosen = [random.choice(chosen)]
    return {kind: _ASKED[kind](random, clip) for kind in chosen}


def _first(random: Random, clip: Clip) -> Question:
    a, b = random.sample(range(len(clip.scenes)), 2)
    shown = [scene.phrase for scene in clip.scenes]
    return f"Which came first, {shown[a]} or {shown[b]}?", _sentence(shown[min(a, b)])


def _when(random: Random, clip: Clip) -> Question:
    second = random.randrange(len(clip.at_second))
    return f"What is at second {second}?", _sentence(clip.at_second[second].phrase)


def _count(_: Random, clip: Clip) -> Question:
    return "How many clips are joined?", NUMBERS[len(clip.scenes) - 1]


def _begins(random: Random, clip: Clip) -> Question:
    number = random.randrange(len(clip.scenes))
    return f"When does {clip.scenes[number].phrase} begin?", f"At second {sum(clip.lengths[:number])}."


def _list(_: Random, clip: Clip) -> Question:
    listed = (f"{second}: {scene.phrase}." for second, scene in enumerate(clip.at_second))
    return "What is at each second?", " ".join(listed)


def _sentence(phrase: str) -> str:
    return f"{phrase[:1].upper()}{phrase[1:]}."


_ASKED = {"first": _first, "when": _when, "count": _count, "begins": _begins, "list": _list}

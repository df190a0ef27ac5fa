"""What is asked of a clip: which of two came first, what is to be seen at some second, how many scenes there are.

A question alone teaches little: for long a calf learned to name any of the frames, and nothing of their times. Told the
name of every frame right behind its number, it binds them soon. So a question that needs several frames is answered
aloud: a list of what is at each second, which says "again" where it is what was there a second before, and then the
conclusion (a chain of thought, Wei et al. 2022, arXiv 2201.11903).

    0: a dog. 1: a dog again. 2: a cat. Two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from random import Random

NUMBERS = ("One.", "Two.", "Three.")
ALOUD_ALONE = 0.6
"""Share of the rows to train on whose only question is answered aloud."""

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
    """Questions by their kinds, to train on: one that is answered aloud, or that one behind a question for a name.

    The question for a name never comes second: its answer could be read in the list. Nor is it always there: a calf for
    which it always came first took every first question for it, and answered with a name.
    """
    aloud = ["count", "first", "first", "begins", "list"] if len(clip.scenes) > 1 else ["count", "list"]
    kinds = [random.choice(aloud)]
    if random.random() > ALOUD_ALONE:
        kinds.insert(0, "when")
    return {kind: _ASKED[kind](random, clip) for kind in kinds}


def conclusion(answer: str) -> str:
    """What is said behind the list, if an answer has one: all that counts as right or wrong."""
    return answer.rpartition(". ")[2] if answer.startswith("0: ") else answer


def _first(random: Random, clip: Clip) -> Question:
    a, b = random.sample(range(len(clip.scenes)), 2)
    shown = [scene.phrase for scene in clip.scenes]
    return f"Which came first, {shown[a]} or {shown[b]}?", f"{_listed(clip)} {_sentence(shown[min(a, b)])}"


def _when(random: Random, clip: Clip) -> Question:
    second = random.randrange(len(clip.at_second))
    return f"What is at second {second}?", _sentence(clip.at_second[second].phrase)


def _count(_: Random, clip: Clip) -> Question:
    return "How many clips are joined?", f"{_listed(clip)} {NUMBERS[len(clip.scenes) - 1]}"


def _begins(random: Random, clip: Clip) -> Question:
    number = random.randrange(len(clip.scenes))
    begin = f"At second {sum(clip.lengths[:number])}."
    return f"When does {clip.scenes[number].phrase} begin?", f"{_listed(clip)} {begin}"


def _list(_: Random, clip: Clip) -> Question:
    return "What is at each second?", _listed(clip)


def _listed(clip: Clip) -> str:
    """What is at each second, and whether it was there before."""
    names = [scene.phrase for scene in clip.at_second]
    marks = ["", *(" again" * (now == before) for before, now in pairwise(names))]
    return " ".join(f"{second}: {name}{mark}." for second, (name, mark) in enumerate(zip(names, marks, strict=True)))


def _sentence(phrase: str) -> str:
    return f"{phrase[:1].upper()}{phrase[1:]}."


_ASKED = {"first": _first, "when": _when, "count": _count, "begins": _begins, "list": _list}

"""What is asked of a clip: which of two came first, what is to be seen at some second, how many scenes there are.

A question alone teaches little: for long a calf learned to name any of the frames, and nothing of their times. Told the
name of every frame right behind its number, it binds them soon. So a question that needs several frames is answered
aloud: a list of what is at each second, which says "again" where it is what was there a second before, and then what
follows from it, a step at a time (a chain of thought, Wei et al. 2022, arXiv 2201.11903).

    How many clips are joined?             0: a dog. 1: a dog again. 2: a cat. Two.

Where something asked for is looked for, the list ends as soon as it is seen, and what follows is what was just said. A
calf of this size copies what it has read before it compares: so both the question and the list put a question mark
behind what is asked for, and to see it is to read on as the question did (Olsson et al. 2022, arXiv 2209.11895).

    Which came first: a cat? Or a dog?     0: a sun. 1: a dog? A dog.

Asked without that mark, behind a whole list or where the list just ends, it said what is at second 0, which is right in
four of five.
"""

from __future__ import annotations

import re
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

    def begin(self, scene: int) -> int:
        """The second at which a scene is seen first, by its number."""
        return sum(self.lengths[:scene])


def which_first(one: str, other: str) -> str:
    """A question for one of two things."""
    return f"Which came first: {one}? Or {other}?"


def begins(thing: str) -> str:
    """A question for a thing's first second."""
    return f"When does it begin: {thing}?"


def listed(names: Sequence[str], asked: Sequence[str] = ()) -> str:
    """What is at each second, whether it was there a second before, and whether it was asked for."""
    again = ["", *(" again" * (now == before) for before, now in pairwise(names))]
    return " ".join(f"{second}: {name}{again[second]}{'?' if name in asked else '.'}"
                    for second, name in enumerate(names))


def one_question(random: Random, clip: Clip) -> dict[str, Question]:
    """A question by its kind, to evaluate on."""
    kind = random.choice(("first", "when", "count")) if len(clip.scenes) > 1 else random.choice(("when", "count"))
    return {kind: _KINDS[kind](random, clip)}


def several_questions(random: Random, clip: Clip) -> dict[str, Question]:
    """Questions by their kinds, to train on: one that is answered aloud, or that one behind a question for a name.

    The question for a name never comes second: its answer could be read in the list. Nor is it always there: a calf for
    which it always came first took every first question for it, and answered with a name.
    """
    aloud = ["count", "first", "first", "begins", "list"] if len(clip.scenes) > 1 else ["count", "list"]
    kinds = [random.choice(aloud)]
    if random.random() > ALOUD_ALONE:
        kinds.insert(0, "when")
    return {kind: (_KINDS | {"first": _first_to_learn})[kind](random, clip) for kind in kinds}


def conclusion(answer: str) -> str:
    """What is said behind the list, if an answer has one: all that counts as right or wrong."""
    return re.split(r"[.?] ", answer)[-1] if answer.startswith("0: ") else answer


def _first(random: Random, clip: Clip) -> Question:
    return _which_first(clip, *random.sample(range(len(clip.scenes)), 2))


def _first_to_learn(random: Random, clip: Clip) -> Question:
    """Twice as often about scenes behind the first, if there are two: or nobody learns to look any further."""
    last = len(clip.scenes) - 1
    first = random.choices(range(last), [1 + bool(scene) for scene in range(last)])[0]
    both = [first, random.randint(first + 1, last)]
    random.shuffle(both)
    return _which_first(clip, *both)


def _which_first(clip: Clip, a: int, b: int) -> Question:
    shown, first = [scene.phrase for scene in clip.scenes], min(a, b)
    return which_first(shown[a], shown[b]), f"{_listed_to(clip, first)} {_sentence(shown[first])}"


def _when(random: Random, clip: Clip) -> Question:
    second = random.randrange(len(clip.at_second))
    return f"What is at second {second}?", _sentence(clip.at_second[second].phrase)


def _count(_: Random, clip: Clip) -> Question:
    return "How many clips are joined?", f"{listed(_names(clip))} {NUMBERS[len(clip.scenes) - 1]}"


def _begins(random: Random, clip: Clip) -> Question:
    number = random.randrange(len(clip.scenes))
    return begins(clip.scenes[number].phrase), f"{_listed_to(clip, number)} At second {clip.begin(number)}."


def _list(_: Random, clip: Clip) -> Question:
    return "What is at each second?", listed(_names(clip))


def _listed_to(clip: Clip, scene: int) -> str:
    """The list as far as a scene that is asked for."""
    return listed(_names(clip)[:clip.begin(scene) + 1], [clip.scenes[scene].phrase])


def _names(clip: Clip) -> list[str]:
    return [scene.phrase for scene in clip.at_second]


def _sentence(phrase: str) -> str:
    return f"{_capital(phrase)}."


def _capital(phrase: str) -> str:
    return f"{phrase[:1].upper()}{phrase[1:]}"


_KINDS = {"first": _first, "when": _when, "count": _count, "begins": _begins, "list": _list}

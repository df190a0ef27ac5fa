"""Guesses of a smaller model with the same tokenizer."""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from pathlib import Path
from weakref import WeakKeyDictionary

from ...errors import HerdError
from ..engine import Engine
from ..executors.runner import Step
from ..kv_cache.sequence import Sequence
from .choice import Choice
from .speculation import Drafter, PromptLookup


class DraftModel:
    """A smaller engine that goes ahead of the one that decides.

    Args:
        engine: with the same vocabulary.
        vocabulary: of the model that decides.

    Raises:
        HerdError: the vocabularies differ.
    """

    def __init__(self, engine: Engine, vocabulary: int) -> None:
        size = engine.config.text.vocab_size
        if size != vocabulary:
            raise HerdError(f"the draft model has a vocabulary of {size}, the model has one of {vocabulary}: a draft "
                            "needs the same tokenizer")
        self._engine = engine
        self._sequences: WeakKeyDictionary[Choice, Sequence] = WeakKeyDictionary()
        self.seconds = 0.0

    def guess(self, choices: Items[Choice], counts: Items[int]) -> list[list[int]]:
        """Its own most likely next tokens; see ``Drafter``."""
        started = time.perf_counter()
        guesses: list[list[int]] = [[] for _ in choices]
        for index, (choice, count) in enumerate(zip(choices, counts, strict=True)):
            if count:
                guesses[index].append(self._caught_up(choice))
        for place in range(1, max(counts, default=0)):
            going = [index for index, count in enumerate(counts) if count > place]
            steps = [Step(self._sequences[choices[index]], guesses[index][-1:], [0]) for index in going]
            for index, row_V in zip(going, self._engine.runner.step(steps), strict=True):
                guesses[index].append(int(row_V.argmax()))
        made = sum(map(len, guesses))
        if made:
            self.seconds += 0.2 * ((time.perf_counter() - started) / made - self.seconds)
        return guesses

    def _caught_up(self, choice: Choice) -> int:
        """Let the draft's sequence see what the answer has become; its most likely next token."""
        if choice not in self._sequences:
            self._sequences[choice] = self._engine.new_sequence()
        sequence, wanted = self._sequences[choice], choice.token_ids
        limit = min(len(sequence), len(wanted) - 1)
        same = next((at for at in range(limit) if sequence.token_ids[at] != wanted[at]), limit)
        self._engine.truncate(sequence, same)
        return int(self._engine.prefill(sequence, wanted[same:]).argmax())


def drafter_of(how: str, engine: Engine, *, threads: int | None = None) -> Drafter | None:
    """How next tokens are guessed, by its name.

    Args:
        how: ``lookup``, ``none``, or the path of a smaller bundle.
        engine: decides.
        threads: of one operator of the smaller one.

    Raises:
        HerdError: not a bundle, or one with another vocabulary.
    """
    if how == "none":
        return None
    if how == "lookup":
        return PromptLookup()
    return DraftModel(Engine.load(Path(how), threads=threads), engine.config.text.vocab_size)

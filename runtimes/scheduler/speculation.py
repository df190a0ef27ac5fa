"""Speculative decoding: guess some next tokens, and let one call of the model verify them all.

Guesses come from the text itself (``PromptLookup``) or from a smaller model (``draft_model.py``). A guess is a single
token, not a distribution, so the rule of rejection sampling (Leviathan et al. 2023) becomes: draw from the model's own
distribution as always, and go on while what was drawn is what was guessed. The answer is the same, draw by draw, as
without speculation; only the number of calls differs.

Whether it pays is measured. With a the share of guesses that hold, k guesses bring 1 + a + a^2 + ... + a^k tokens in
a call over k more rows. ``CallCost`` knows what calls over so many rows took, and ``best_count`` takes the k with the
most tokens per second, which may be none.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Protocol
from weakref import WeakKeyDictionary

from .choice import Choice
from .cost import CallCost
from .lookup import NGramIndex

MOST_GUESSES = 8
_OPTIMISM = 0.7
_RETRY = 48
"""After so many tokens without guesses a request tries again."""


class Drafter(Protocol):
    """Guesses the next tokens of answers."""

    def guess(self, choices: Items[Choice], counts: Items[int]) -> list[list[int]]:
        """At most so many next tokens of each answer."""

    @property
    def seconds(self) -> float:
        """Seconds that a guessed token takes."""


class PromptLookup:
    """Guesses that a text goes on as it did where its last few tokens stood before (Saxena 2023)."""

    seconds = 0.0

    def __init__(self) -> None:
        self._indices: WeakKeyDictionary[Choice, NGramIndex] = WeakKeyDictionary()

    def guess(self, choices: Items[Choice], counts: Items[int]) -> list[list[int]]:
        """See ``Drafter``."""
        return [self._index_of(choice).following(choice.token_ids, count) if count else []
                for choice, count in zip(choices, counts, strict=True)]

    def _index_of(self, choice: Choice) -> NGramIndex:
        return self._indices.setdefault(choice, NGramIndex())


class Acceptance:
    """How often the guesses for one answer hold.

    Attributes:
        share: of them, a running mean, which begins with some optimism.
        idle: tokens since the last guess.
    """

    def __init__(self) -> None:
        self.share, self.idle = _OPTIMISM, 0

    def record(self, guessed: int, held: int) -> None:
        """Note what became of some guesses; those after the first that failed say nothing."""
        self.idle = 0 if guessed else self.idle + 1
        for index in range(min(guessed, held + 1)):
            self.share += 0.1 * ((index < held) - self.share)
        if self.idle >= _RETRY:
            self.share, self.idle = max(self.share, _OPTIMISM), 0


def best_count(share: float, rows: int, cost: CallCost, drafting: float, most: int) -> int:
    """How many guesses bring the most tokens per second.

    Args:
        share: of guesses that hold.
        rows: of the call without them.
        cost: of calls.
        drafting: seconds that a guess takes.
        most: guesses.
    """
    if not cost.of(rows):
        return 0  # what a call costs without guesses comes first

    def speed(count: int) -> float:
        tokens = sum(share**index for index in range(count + 1))
        return tokens / (cost.of(rows + count) + count * drafting)

    return max(range(most + 1), key=speed)


class Speculation:
    """Decides how much is guessed for whom, and learns from what became of it.

    Args:
        drafter: guesses.
        cost: of calls.

    Attributes:
        drafts: calls that verified guesses, by answers.
        guessed: tokens.
        held: of them, those that became part of an answer.
        held_at: the same by their place among the guesses of a call.
    """

    def __init__(self, drafter: Drafter, cost: CallCost) -> None:
        self._drafter, self._cost = drafter, cost
        self._acceptance: WeakKeyDictionary[Choice, Acceptance] = WeakKeyDictionary()
        self.drafts = self.guessed = self.held = 0
        self.held_at = [0] * MOST_GUESSES

    def draft(self, choices: Items[Choice]) -> None:
        """Give answers that wait for their next token the guesses that the next call verifies."""
        counts = [self._count(choice, len(choices)) for choice in choices]
        for choice, guesses in zip(choices, self._drafter.guess(choices, counts), strict=True):
            choice.draft = guesses

    def _count(self, choice: Choice, rows: int) -> int:
        most = min(MOST_GUESSES, choice.request.stop.max_new_tokens - choice.generated - 1)
        return best_count(self._of(choice).share, rows, self._cost, self._drafter.seconds, max(0, most))

    def _of(self, choice: Choice) -> Acceptance:
        return self._acceptance.setdefault(choice, Acceptance())

    def record(self, choice: Choice, guessed: int, held: int) -> None:
        """Note what became of an answer's guesses."""
        self._of(choice).record(guessed, held)
        self.drafts += guessed > 0
        self.guessed += guessed
        self.held += held
        self.held_at[:held] = [count + 1 for count in self.held_at[:held]]

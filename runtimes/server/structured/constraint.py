"""The state of a grammar within one answer."""

from __future__ import annotations

import numpy as np
from llguidance import LLMatcher

from ....errors import HerdError
from ...scheduler import RequestError
from .masks import Array, Mask, Masks


class TokenConstraint:
    """What may come next after the tokens so far; see ``scheduler.Constraint``.

    The mask of the next token depends on the tokens before it alone: ``prepare`` has it computed in another thread
    while the model computes the logits. Whoever needs one at once, as the verifier of guesses does, computes it itself.

    Args:
        matcher: the grammar's state, which becomes this object's own.
        masks: computes them beside the forward pass.
        stop_ids: tokens that end an answer; the mask allows them where the grammar may end.
    """

    def __init__(self, matcher: LLMatcher, masks: Masks, stop_ids: frozenset[int]) -> None:
        self._matcher, self._masks, self._stop_ids = matcher, masks, stop_ids
        self._mask: Mask | None = None
        self._ended = False

    def prepare(self) -> None:
        """Begin to compute what may come next."""
        if self._mask is None:
            self._mask = self._masks.ask(self._matcher)

    def apply(self, logits_V: np.ndarray) -> None:
        """Set the logits of what may not come next to minus infinity, in place.

        Args:
            logits_V: a row, which may be longer than the tokenizer's vocabulary: the rest is not allowed either.

        Raises:
            RequestError: the grammar became too complex at this place.
        """
        np.copyto(logits_V, -np.inf, where=~self.allowed(logits_V.shape[0]))

    def allowed(self, size: int) -> Array:
        """Whether each token may come next, bool [size].

        Raises:
            RequestError: the grammar became too complex at this place.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8) if self._mask is None \
            else self._mask().view(np.uint8)
        self._require_sound()
        return np.unpackbits(bits, count=size, bitorder="little").view(bool)

    def allows(self, token_id: int) -> bool:
        """Whether one token may come next; quicker than all of them."""
        self._settle()
        if self._matcher.is_stopped():
            return token_id in self._stop_ids
        return bool(self._matcher.validate_tokens([token_id]))

    def accept(self, token_id: int) -> None:
        """Go on by a token that was chosen.

        Raises:
            HerdError: the grammar does not allow it.
            RequestError: it became too complex.
        """
        if self._ended:
            return
        self._settle()
        self._mask = None
        self._ended = token_id in self._stop_ids
        if not self._matcher.consume_token(token_id):
            self._require_sound()
            raise HerdError(f"token {token_id} does not continue what the grammar allows")

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end of the turn may follow."""
        self._settle()
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def fork(self) -> TokenConstraint:
        """The same state for another answer to the same prompt."""
        self._settle()
        copy = TokenConstraint(self._matcher.deep_copy(), self._masks, self._stop_ids)
        copy._mask, copy._ended = self._mask, self._ended
        return copy

    def _settle(self) -> None:
        """A matcher is used by one thread at a time."""
        if self._mask is not None:
            self._mask()

    def _require_sound(self) -> None:
        if self._matcher.is_error():
            raise RequestError(f"the grammar cannot go on: {first_line(self._matcher.get_error())}")


def first_line(text: str) -> str:
    """The reason in an error of the library, without its drawing of the place."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reasons = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (reasons or lines or ["unknown reason"])[0][:300]

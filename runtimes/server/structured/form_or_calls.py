"""An answer of a form, or calls of tools in its place."""

from __future__ import annotations

import numpy as np

from ....errors import HerdError
from .constraint import TokenConstraint


class FormOrCalls:
    """What may come next where a form of the answer was asked for and tools may be called.

    An object of the form can be the same text as a call of JSON. What begins as a call is one: the form is left to
    answers that begin otherwise, which is also how ``LeadingCallParser`` tells them apart. Both ways are open until the
    answer's first tokens decide.

    Args:
        form: what the answer is where it is no call.
        no_calls: texts that do not begin with a call.
        calls: calls from the first token on.
    """

    def __init__(self, form: TokenConstraint, no_calls: TokenConstraint, calls: TokenConstraint) -> None:
        self._ways: list[tuple[TokenConstraint, ...]] = [(form, no_calls), (calls,)]

    def prepare(self) -> None:
        """Begin to compute what may come next."""
        for constraint in self._constraints():
            constraint.prepare()

    def apply(self, logits_V: np.ndarray) -> None:
        """Set the logits of what may not come next to minus infinity, in place.

        Raises:
            RequestError: a grammar became too complex at this place.
        """
        size = logits_V.shape[0]
        allowed = [np.logical_and.reduce([constraint.allowed(size) for constraint in way]) for way in self._ways]
        np.copyto(logits_V, -np.inf, where=~np.logical_or.reduce(allowed))

    def accept(self, token_id: int) -> None:
        """Go on by a token that was chosen.

        Raises:
            HerdError: neither way goes on by it.
        """
        if len(self._ways) > 1:
            self._decide(token_id)
        for constraint in self._constraints():
            constraint.accept(token_id)

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end of the turn may follow."""
        return len(self._ways) == 1 and all(constraint.is_complete for constraint in self._ways[0])

    def fork(self) -> FormOrCalls:
        """The same state for another answer to the same prompt."""
        copy = FormOrCalls.__new__(FormOrCalls)
        copy._ways = [tuple(constraint.fork() for constraint in way) for way in self._ways]
        return copy

    def _decide(self, token_id: int) -> None:
        """Leave ways that a token does not go on; a text that can no longer become a call needs no watching."""
        open_ways = [way for way in self._ways if all(constraint.allows(token_id) for constraint in way)]
        if not open_ways:
            raise HerdError(f"token {token_id} continues neither the answer's form nor a call")
        self._ways = open_ways if len(open_ways) > 1 else [open_ways[0][:1]]

    def _constraints(self) -> list[TokenConstraint]:
        return [constraint for way in self._ways for constraint in way]

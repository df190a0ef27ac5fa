"""What changes logits before a token is chosen: biases, bans and penalties for what was said already.

Order: bans, bias, repetition penalty (over prompt and answer), frequency and presence penalty (over the answer alone):

    logit_v -= frequency_penalty * count_v + presence_penalty * [count_v > 0]

as OpenAI defines them. What a token may not be at all is minus infinity afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items
from typing import Any

import numpy as np

from .sampling import Sampling

Array = np.ndarray[Any, Any]


class Penalties:
    """The changes to one answer's logits; remembers what was said.

    Args:
        options: how tokens are chosen.
        prompt_ids: the prompt.
        never: tokens that are never chosen.
    """

    def __init__(self, options: Sampling, prompt_ids: Iterable[int], never: Iterable[int] = ()) -> None:
        self._options, self._never = options, np.array(sorted(never), np.int64)
        self._seen = set(prompt_ids) if options.repetition_penalty != 1.0 else set()
        self._counts: dict[int, int] = {}
        self._said: list[int] = []
        self._allowed = np.array(sorted(options.allowed_token_ids or ()), np.int64)
        self._biased = np.array(list(options.logit_bias), np.int64)
        self._bias = np.array(list(options.logit_bias.values()), np.float32)

    def count(self, token_id: int) -> None:
        """Remember a token of the answer."""
        options = self._options
        if options.repetition_penalty != 1.0:
            self._seen.add(token_id)
        if options.frequency_penalty or options.presence_penalty:
            self._counts[token_id] = self._counts.get(token_id, 0) + 1
        if options.bad_words:
            self._said.append(token_id)

    def apply(self, logits_V: Array, forbidden: Iterable[int] = ()) -> Array:
        """The changed logits, float32 [vocabulary]; a copy, which the caller may write to.

        Args:
            logits_V: float32 [vocabulary]; not modified.
            forbidden: further tokens that may not be chosen now.
        """
        options, logits_V = self._options, logits_V.copy()
        if options.repetition_penalty != 1.0:
            _penalize(logits_V, self._seen, options.repetition_penalty)
        if self._counts:
            ids, counts = (np.fromiter(values, np.int64) for values in (self._counts, self._counts.values()))
            logits_V[ids] -= (options.frequency_penalty * counts + options.presence_penalty).astype(np.float32)
        logits_V[self._biased] += self._bias
        self._ban(logits_V, forbidden)
        return logits_V

    def _ban(self, logits_V: Array, forbidden: Iterable[int]) -> None:
        if len(self._allowed):
            kept = logits_V[self._allowed]
            logits_V[:] = -np.inf
            logits_V[self._allowed] = kept
        logits_V[self._never] = -np.inf
        for token in forbidden:
            logits_V[token] = -np.inf
        for word in self._options.bad_words:
            if _ends_with(self._said, word[:-1]):
                logits_V[word[-1]] = -np.inf


def _penalize(logits_V: Array, seen: Iterable[int], penalty: float) -> None:
    ids = np.fromiter(seen, np.int64)
    values = logits_V[ids]
    logits_V[ids] = np.where(values > 0, values / penalty, values * penalty)


def _ends_with(tokens: Items[int], ending: Items[int]) -> bool:
    return not ending or list(tokens[-len(ending) :]) == list(ending)

"""A model of random logits under a constraint, which knows no words and so finds every hole of a grammar."""

from __future__ import annotations

import numpy as np

from herdgraph.model.processing import Tokenizer
from herdgraph.runtimes.server.structured import TokenConstraint

CLOSING = '"]})@'


class RandomModel:
    """Draws answers at temperature 1; what closes a text or a list becomes likelier as an answer grows.

    Args:
        tokenizer: of the answers.
        vocab_size: of the logits.
        seed: of the random numbers.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, seed: int) -> None:
        self._tokenizer, self._random = tokenizer, np.random.default_rng(seed)
        texts = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]
        self._closing = np.zeros(vocab_size, np.float32)
        self._closing[[token for token, text in enumerate(texts) if set(CLOSING) & set(text)]] = 1
        self._closing[list(tokenizer.stop_ids)] = 2

    def answer(self, constraint: TokenConstraint, begin: str = "", most: int = 400) -> str | None:
        """An answer's text, which goes on from a given beginning; None when it has no end within so many tokens."""
        ids = self._tokenizer.encode(begin)
        for token in ids:
            constraint.accept(token)
        while not constraint.is_complete:
            constraint.prepare()
            logits_V = self._random.normal(size=self._closing.shape[0]).astype(np.float32)
            logits_V += self._closing * (3 + max(0, len(ids) - 40))
            constraint.apply(logits_V)
            token = int(np.argmax(logits_V + self._random.gumbel(size=logits_V.shape)))
            constraint.accept(token)
            if token in self._tokenizer.stop_ids:
                break
            ids.append(token)
            if len(ids) == most:
                return None
        return self._tokenizer.decode(ids)

"""From logits to a token: greedy or drawn, with the filters that users know.

Order, as in transformers: penalties (``penalties.py``), temperature, top-k, top-p, min-p, draw.

* top-p (Holtzman et al. 2020): the fewest most likely tokens whose probabilities add up to at least p;
* min-p: tokens at least ``min_p`` times as likely as the most likely one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from numbers import Integral, Real
from typing import Any

import numpy as np

from ...errors import HerdError, shown
from ...model.processing import GenerationDefaults

Array = np.ndarray[Any, Any]

MOST_LOGPROBS = 100
"""Alternatives that are reported for one token; other servers stop at 20."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. The default is greedy: the most likely token, always the same.

    Attributes:
        temperature: 0 for greedy, otherwise logits are divided by it.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens up to this probability; 1 keeps all.
        min_p: keep tokens at least this likely relative to the most likely one; 0 keeps all.
        repetition_penalty: above 1 discourages tokens that occurred (Keskar et al. 2019): their logits are divided by
            it when positive, multiplied when negative; 1 changes nothing.
        presence_penalty: is subtracted from the logits of tokens that the answer has already.
        frequency_penalty: the same, times their number.
        logit_bias: is added to the logits of these tokens.
        allowed_token_ids: only these may be chosen; None allows all.
        bad_words: token sequences that are not completed.
        seed: of the random draws; None draws differently every time.
        logprobs: number of alternatives to report per token; None for no log-probabilities at all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    seed: int | None = None
    logprobs: int | None = None

    @classmethod
    def of(cls, defaults: GenerationDefaults, **options: Any) -> Sampling:
        """What was asked for; where an option is None, what the checkpoint's authors recommend."""
        recommended = asdict(defaults)
        given = {name: recommended.get(name) if value is None else value for name, value in options.items()}
        return cls(**{name: value for name, value in given.items() if value is not None})

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is all that has to be known: nothing changes logits, nothing reports them."""
        return replace(self, seed=None, top_k=0, top_p=1.0, min_p=0.0) == Sampling()

    def __post_init__(self) -> None:
        # Between 0 and the bound float32 cannot divide by it, and nothing else is chosen than at 0.
        self._require("temperature", Real, lambda t: t == 0 or 1e-6 <= t <= 1e6, "0, or within 1e-6 and 1e6")
        self._require("top_k", Integral, lambda k: k >= 0, "a whole number, 0 or more")
        self._require("top_p", Real, lambda p: 0 < p <= 1, "above 0 and at most 1")
        self._require("min_p", Real, lambda p: 0 <= p <= 1, "within 0 and 1")
        self._require("repetition_penalty", Real, lambda r: 1e-6 <= r <= 1e6, "within 1e-6 and 1e6")
        for name in ("presence_penalty", "frequency_penalty"):
            self._require(name, Real, lambda penalty: -2 <= penalty <= 2, "within -2 and 2")
        if self.seed is not None:
            self._require("seed", Integral, lambda seed: seed >= 0, "a whole number, 0 or more")
        if self.logprobs is not None:
            self._require("logprobs", Integral, lambda n: 0 <= n <= MOST_LOGPROBS,
                          f"a whole number within 0 and {MOST_LOGPROBS}")

    def _require(self, name: str, kind: type, valid: Callable[[Any], bool], wanted: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, kind) or not valid(value):
            raise HerdError(f"{name} is {shown(value)}, it must be {wanted}")


@dataclass(frozen=True)
class Candidate:
    """A token with its text and its natural log-probability."""

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class TokenLogprob(Candidate):
    """The token that was chosen, and ``top``, the most likely ones before any filter, the likeliest first."""

    top: tuple[Candidate, ...] = ()


class Sampler:
    """Draws tokens for one generation; holds its random state."""

    def __init__(self, options: Sampling) -> None:
        self.options = options
        self._random = np.random.default_rng(options.seed)

    def __call__(self, logits_V: Array) -> int:
        """Choose a token.

        Args:
            logits_V: float32 [vocabulary]; not modified.

        Raises:
            HerdError: the largest logit is not a finite number.
        """
        options = self.options
        if not np.isfinite(peak := logits_V.max()):  # NaN anywhere makes the maximum NaN
            raise HerdError(f"the largest logit is {peak}: the model's weights or its calibration are broken; compare "
                            "the bundle with its checkpoint by 'herdgraph verify', then build it again")
        if options.temperature == 0:
            return int(logits_V.argmax())
        candidates, logits = _top_k(logits_V, options.top_k)
        probabilities = softmax(logits / options.temperature)
        kept = np.arange(len(probabilities)) if options.top_p == 1 else _nucleus(probabilities, options.top_p)
        if options.min_p > 0:
            kept = kept[probabilities[kept] >= options.min_p * probabilities.max()]
        bounds = np.cumsum(probabilities[kept], dtype=np.float64)
        drawn = np.searchsorted(bounds, self._random.random() * bounds[-1], side="right")
        return int(candidates[kept[min(int(drawn), len(kept) - 1)]])

    def logprob(self, logits_V: Array, token_id: int, text_of: Callable[[int], str]) -> TokenLogprob:
        """Log-probability of a token under the unfiltered distribution, and of the most likely ones.

        Args:
            logits_V: float32 [vocabulary].
            token_id: the token that was chosen.
            text_of: text of a token.
        """
        logprobs = log_softmax(logits_V)
        best = map(int, _most_likely(logprobs, self.options.logprobs or 0))
        top = tuple(Candidate(token, text_of(token), float(logprobs[token])) for token in best)
        return TokenLogprob(token_id, text_of(token_id), float(logprobs[token_id]), top)


def softmax(logits: Array) -> Array:
    """Probabilities along the last axis."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def log_softmax(logits: Array) -> Array:
    """Natural log-probabilities along the last axis, in float64."""
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _nucleus(probabilities: Array, top_p: float) -> Array:
    """Indices of the fewest most likely tokens that add up to ``top_p``, the most likely first.

    They are nearly always among the first few hundred, so a vocabulary of 200,000 is not sorted to find them.
    """
    for count in (256, 4096, len(probabilities)):
        order = _most_likely(probabilities, count)
        sums = np.cumsum(probabilities[order])
        if sums[-1] >= top_p or count >= len(probabilities):
            break
    return order[sums - probabilities[order] < top_p]


def _most_likely(values: Array, count: int) -> Array:
    """Indices of the largest values, largest first; equal ones in the order of their indices."""
    if 0 < count < len(values):
        some = np.sort(np.argpartition(-values, count - 1)[:count])
        return some[np.argsort(-values[some], kind="stable")]
    return np.argsort(-values, kind="stable") if count else np.zeros(0, np.int64)


def _top_k(logits_V: Array, k: int) -> tuple[Array, Array]:
    """Ids and logits of the k largest (all when k is 0), unsorted."""
    if not 0 < k < len(logits_V):
        return np.arange(len(logits_V)), logits_V
    ids = np.argpartition(-logits_V, k - 1)[:k]
    return ids, logits_V[ids]

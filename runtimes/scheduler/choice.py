"""One answer in the making: its tokens, what of them the model has seen, and how the next one is chosen."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import replace
from typing import Any

import numpy as np

from ...model.processing import StreamDecoder, Tokenizer
from ..executors.runner import Row
from ..generation.penalties import Penalties
from ..generation.sampling import Sampler, TokenLogprob
from ..generation.stop_strings import StopStrings
from ..kv_cache.prefix_cache import PrefixKeys
from ..kv_cache.sequence import Sequence
from .request import Constraint, Delta, FinishReason, GenerationRequest, RequestError

Array = np.ndarray[Any, Any]


class Choice:
    """One of the answers to a request.

    Args:
        index: its number.
        request: what was asked for.
        tokenizer: turns tokens into text; None gives no text.
        keys: of the blocks of its prompt.

    Attributes:
        token_ids: prompt and answer.
        keys: of the full blocks of them.
        sequence: what the model has seen of them; None while it waits.
        published: blocks of the sequence that are in the prefix cache.
        finish_reason: set when it has ended.
        draft: tokens that the next call is to verify.
    """

    def __init__(self, index: int, request: GenerationRequest, tokenizer: Tokenizer | None, keys: PrefixKeys) -> None:
        sampling = request.sampling
        seed = None if sampling.seed is None else sampling.seed + index
        self.index, self.request, self.keys = index, request, keys
        self.token_ids = list(request.prompt.token_ids)
        self.sequence: Sequence | None = None
        self.published = 0
        self.finish_reason: FinishReason | None = None
        self.draft: list[int] = []
        self._tokenizer = tokenizer
        self._decoder = None if tokenizer is None else StreamDecoder(tokenizer, skip_special=not request.shows_special)
        self._sampler = Sampler(replace(sampling, seed=seed))
        self._penalties = Penalties(sampling, request.prompt.token_ids, request.never)
        self._stop_strings = StopStrings(request.stop.strings, keep=request.stop.keeps_string)
        self._constraint: Constraint | None = request.constraint
        if request.constraint is not None and index:
            self._constraint = request.constraint.fork()

    @property
    def seen(self) -> int:
        """Tokens that the model has seen."""
        return 0 if self.sequence is None else len(self.sequence)

    @property
    def pending(self) -> int:
        """Tokens that it has not seen yet."""
        return len(self.token_ids) - self.seen

    @property
    def generated(self) -> int:
        """Tokens of the answer."""
        return len(self.token_ids) - len(self.request.prompt.token_ids)

    @property
    def is_decoding(self) -> bool:
        """Whether all but its last token were seen, so that one row of a call brings it forward."""
        return self.generated > 0 and self.pending == 1

    @property
    def takes_best(self) -> bool:
        """Whether the most likely token is the next one, whatever its logits are."""
        return (self._constraint is None and self.generated >= self.request.stop.min_tokens
                and self._sampler.options.is_greedy and self.request.prompt_logprobs is None)

    def prepare(self) -> None:
        """Begin to compute what the next token may be, beside the call of the model that ``accept`` follows."""
        if self._constraint is not None:
            self._constraint.prepare()

    def accept(self, row: Row) -> Delta:
        """Choose the next token.

        Args:
            row: after the last token; logits are not modified.

        Raises:
            HerdError: the logits are no numbers.
            RequestError: no token is left that the request allows.
        """
        if isinstance(row, int):
            self.token_ids.append(row)
            return self._grown(row, ())
        token = self._chosen(row)
        return self._grown(token, self._logprob(row, token))

    def _chosen(self, logits_V: Array) -> int:
        stop = self.request.stop
        forbidden = stop.ids if self.generated < stop.min_tokens else ()
        adjusted = self._penalties.apply(logits_V, forbidden)
        if self._constraint is not None:
            self._constraint.apply(adjusted)
        if self._constraint is not None or self._sampler.options.allowed_token_ids is not None:
            self._require_a_choice(adjusted)
        token = self._sampler(adjusted)
        self._penalties.count(token)
        self.token_ids.append(token)
        return token

    def _require_a_choice(self, logits_V: Array) -> None:
        if logits_V.max() == -np.inf:
            raise RequestError("no token may come next: what the answer's form or allowed_token_ids allow, others "
                               "forbid (bad_words, min_tokens): change one of them")

    def _logprob(self, logits_V: Array, token: int) -> tuple[TokenLogprob, ...]:
        if self._sampler.options.logprobs is None:
            return ()
        return (self._sampler.logprob(logits_V, token, self._text_of),)

    def _grown(self, token: int, logprobs: tuple[TokenLogprob, ...]) -> Delta:
        """What is shown after a token, and whether it was the last."""
        stop = self.request.stop
        reason: str | int | None = None
        if token in stop.ids:
            self.finish_reason, text, reason = "stop", self._rest(), self._reason(token)
        else:
            text = self._fed(token)
            if self._stop_strings.met is not None:
                self.finish_reason, reason = "stop", self._stop_strings.met
            elif self._is_complete(token):
                self.finish_reason, text = "stop", text + self._rest()
            elif self.generated >= stop.max_new_tokens:
                self.finish_reason, text = "length", text + self._rest()
        return Delta(self.index, text, (token,), logprobs, self.finish_reason, reason)

    def _reason(self, token: int) -> int | None:
        """A stop token that the request named; the model's own end of turn is none."""
        return None if self._tokenizer is not None and token in self._tokenizer.stop_ids else token

    def _is_complete(self, token: int) -> bool:
        """Go on with the constraint; whether nothing may follow."""
        if self._constraint is None:
            return False
        self._constraint.accept(token)
        return self._constraint.is_complete

    def _fed(self, token: int) -> str:
        return "" if self._decoder is None else self._stop_strings.feed(self._decoder.feed(token))[0]

    def _rest(self) -> str:
        """Text that was held back because it could have been the beginning of a character or of a stop string."""
        if self._decoder is None:
            return ""
        text, stopped = self._stop_strings.feed(self._decoder.flush())
        return text if stopped else text + self._stop_strings.flush()

    def prompt_logprobs(self, logits_RV: Items[Any], first: int) -> list[TokenLogprob | None]:
        """Log-probabilities of the prompt's tokens ``first`` + 1 and following, by the rows before them."""
        following = self.request.prompt.token_ids[first + 1 : first + 1 + len(logits_RV)]
        sampler = Sampler(replace(self._sampler.options, logprobs=self.request.prompt_logprobs))
        return [sampler.logprob(row_V, token, self._text_of)
                for row_V, token in zip(logits_RV[: len(following)], following, strict=True)]

    def _text_of(self, token: int) -> str:
        return "" if self._tokenizer is None else self._tokenizer.decode([token], skip_special=False)

    def release(self) -> None:
        """Give the keys and values back; what was generated stays."""
        if self.sequence is not None:
            self.sequence.truncate(0)
        self.sequence, self.published, self.draft = None, 0, []


def rows_of(choice: Choice, tokens: int) -> Items[int]:
    """Which rows of a call over the next tokens are wanted: after the last one, or all for a prompt's logprobs."""
    if choice.draft:
        return range(tokens)
    last = choice.pending == tokens
    if choice.request.prompt_logprobs is not None and choice.generated == 0:
        return range(tokens)
    return [tokens - 1] if last else []



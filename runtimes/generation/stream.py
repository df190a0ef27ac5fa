"""The generation loop: choose, stop, decode to text, one token at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from ...model.processing import StreamDecoder, Tokenizer
from .penalties import Penalties
from .sampling import Array, Sampler, Sampling, TokenLogprob
from .stop_strings import StopRule, StopStrings


@dataclass
class Timings:
    """Where the time of a generation went, in seconds."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that were in the sequence already and were not computed again."""
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    """Image features and prompt, until the first logits."""
    decode_seconds: float = 0.0

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens computed per second."""
        return (self.prompt_tokens - self.cached_tokens) / max(self.prefill_seconds, 1e-9)

    @property
    def decode_tokens_per_second(self) -> float:
        """New tokens per second after the first, which comes out of the prefill."""
        return max(self.new_tokens - 1, 0) / max(self.decode_seconds, 1e-9)


@dataclass
class Generation:
    """What a generation gave.

    Attributes:
        text: the new text, without stop token or stop string.
        token_ids: the new tokens, the stop token included.
        finish_reason: ``stop`` (a stop token or stop string) or ``length``.
        timings: see ``Timings``.
        logprobs: one entry per token when ``Sampling.logprobs`` was set.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    timings: Timings = field(default_factory=Timings)
    logprobs: list[TokenLogprob] = field(default_factory=list)


class TextStream:
    """Text deltas as they are generated; ``result`` is complete once the iteration ends.

    Args:
        prefill: runs the prompt; returns the logits after it, and how many of its tokens were cached.
        decode: appends a token, returns the next logits, which may be overwritten by the next call; or, where nothing
            but the most likely token is asked for (``Sampling.is_greedy``), that token.
        tokenizer: turns tokens into text.
        prompt_ids: the whole prompt.
        sampling: how tokens are chosen.
        stop: when to end.
        never: tokens that are not chosen, since they mean nothing in an answer.
    """

    def __init__(
        self, prefill: Callable[[], tuple[Array, int]], decode: Callable[[int], Array | int], *,
        tokenizer: Tokenizer, prompt_ids: Items[int], sampling: Sampling, stop: StopRule, never: Items[int] = (),
    ) -> None:
        self._prefill, self._decode = prefill, decode
        self._tokenizer, self._decoder = tokenizer, StreamDecoder(tokenizer)
        self._penalties, self._sampler, self._stop = Penalties(sampling, prompt_ids, never), Sampler(sampling), stop
        self._stop_strings = StopStrings(stop.strings)
        self.result = Generation(timings=Timings(prompt_tokens=len(prompt_ids)))

    def __iter__(self) -> Iterator[str]:
        """Yield non-empty text deltas, none of which ends inside a character."""
        timings, started = self.result.timings, time.perf_counter()
        logits, timings.cached_tokens = self._prefill()
        prefilled = time.perf_counter()
        timings.prefill_seconds = prefilled - started
        for delta in self._deltas(logits):
            self.result.text += delta
            timings.decode_seconds = time.perf_counter() - prefilled
            if delta:
                yield delta
        timings.decode_seconds = time.perf_counter() - prefilled

    def _deltas(self, row: Array | int) -> Iterator[str]:
        result = self.result
        while True:
            token = self._choose(row)
            if token in self._stop.ids:
                result.finish_reason = "stop"
                break
            text, stopped = self._stop_strings.feed(self._decoder.feed(token))
            yield text
            if stopped:
                result.finish_reason = "stop"
                return
            if len(result.token_ids) >= self._stop.max_new_tokens:
                break
            row = self._decode(token)
        text, stopped = self._stop_strings.feed(self._decoder.flush())
        yield text
        if stopped:
            result.finish_reason = "stop"
        else:
            yield self._stop_strings.flush()

    def _choose(self, row: Array | int) -> int:
        token = row if isinstance(row, int) else self._chosen(row)
        self.result.token_ids.append(token)
        self.result.timings.new_tokens += 1
        return token

    def _chosen(self, logits: Array) -> int:
        token = self._sampler(self._penalties.apply(logits))
        if self._sampler.options.logprobs is not None:
            self.result.logprobs.append(self._sampler.logprob(logits, token, self._text_of))
        self._penalties.count(token)
        return token

    def _text_of(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special=False)

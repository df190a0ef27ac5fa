"""The generation loop: choose, stop, decode to text, one token at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from ...errors import HerdError
from ...model.processing import StreamDecoder, Tokenizer
from ..executors.runner import Logits
from .sampling import Sampler, Sampling, TokenLogprob


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


@dataclass(frozen=True)
class StopRule:
    """When to end: after these ids, before these strings, or at this many tokens."""

    max_new_tokens: int
    ids: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise HerdError(f"max_new_tokens is {self.max_new_tokens}, it must be at least 1")
        if "" in self.strings:
            raise HerdError("a stop string is empty, give at least one character")


class StopStrings:
    """Holds text back while it may be the beginning of a stop string."""

    def __init__(self, strings: Items[str]) -> None:
        self._strings = strings
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Text that is safe to show, and whether a stop string was met (it and what follows are dropped)."""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._strings) if at >= 0]
        if found:
            return self._held[: min(found)], True
        keep = max((self._overlap(stop) for stop in self._strings), default=0)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        return shown, False

    def flush(self) -> str:
        """What is still held back."""
        held, self._held = self._held, ""
        return held

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        sizes = range(min(len(stop) - 1, len(self._held)), 0, -1)
        return next((size for size in sizes if self._held.endswith(stop[:size])), 0)


class TextStream:
    """Pieces of text as they are generated; ``result`` is complete once the iteration ends.

    Args:
        first_logits: runs the prompt; returns the logits after it and the timings so far.
        decode: appends a token, returns the next logits.
        tokenizer: turns tokens into text; None leaves the text empty.
        seen: prompt tokens, for the repetition penalty.
        sampling: how tokens are chosen.
        stop: when to end.
    """

    def __init__(
        self, first_logits: Callable[[], tuple[Logits, Timings]], decode: Callable[[int], Logits], *,
        tokenizer: Tokenizer, seen: Items[int], sampling: Sampling, stop: StopRule,
    ) -> None:
        self._first_logits, self._decode = first_logits, decode
        self._decoder = StreamDecoder(tokenizer)
        self._seen, self._sampler, self._stop = list(seen), Sampler(sampling), stop
        self._guard = StopStrings(stop.strings)
        self.result = Generation()

    def __iter__(self) -> Iterator[str]:
        """Yield non-empty pieces of text, none of which ends inside a character."""
        logits, self.result.timings = self._first_logits()
        started = time.perf_counter()
        for piece in self._pieces(logits):
            self.result.text += piece
            self.result.timings.decode_seconds = time.perf_counter() - started
            if piece:
                yield piece
        self.result.timings.decode_seconds = time.perf_counter() - started

    def _pieces(self, logits: Logits) -> Iterator[str]:
        result = self.result
        while True:
            token = self._choose(logits)
            if token in self._stop.ids:
                result.finish_reason = "stop"
                break
            text, stopped = self._guard.feed(self._decoder.feed(token))
            yield text
            if stopped:
                result.finish_reason = "stop"
                return
            if len(result.token_ids) >= self._stop.max_new_tokens:
                break
            logits = self._decode(token)
        text, stopped = self._guard.feed(self._decoder.flush())
        yield text
        if stopped:
            result.finish_reason = "stop"
        else:
            yield self._guard.flush()

    def _choose(self, logits: Logits) -> int:
        token = self._sampler(logits, self._seen)
        if self._sampler.options.logprobs is not None:
            self.result.logprobs.append(self._sampler.logprob(logits, token))
        self._seen.append(token)
        self.result.token_ids.append(token)
        self.result.timings.new_tokens += 1
        return token

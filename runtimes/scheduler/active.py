"""A request that was taken: its answers in the making, its pictures, and how urgent it is."""

from __future__ import annotations

import time

from ...model.config import HerdConfig
from ...model.processing import Tokenizer
from ..kv_cache.pool import BLOCK_TOKENS
from .answer import Answer
from .choice import Choice
from .pictures import Pictures
from .request import Delta, GenerationRequest

AGEING_SECONDS = 30.0
"""A request that has waited so long is as urgent as a new one of the next better priority."""


class ActiveRequest:
    """One request from the queue to its last token.

    Args:
        request: what was asked for.
        answer: takes what is generated.
        config: the model.
        tokenizer: turns tokens into text, None where the bundle has none.
        block_tokens: tokens of a cache block.

    Attributes:
        choices: answers that were begun; the others begin as copies of the first, after the prompt.
        urgency: the smallest number goes first. All grow older at the same pace, so it never changes.
        has_begun: whether some of its tokens were computed.
        cancelled: whether nobody waits for the answer any more.
    """

    def __init__(
        self, request: GenerationRequest, answer: Answer, config: HerdConfig, tokenizer: Tokenizer | None,
        block_tokens: int = BLOCK_TOKENS,
    ) -> None:
        self.request, self.answer, self._tokenizer = request, answer, tokenizer
        self.pictures = Pictures(request.prompt, config, request.salt, block_tokens)
        self.arrived, self.has_begun = time.monotonic(), False
        self.urgency = request.priority + self.arrived / AGEING_SECONDS
        self.cancelled, self._failed = False, False
        self.choices = [self._choice(0)]
        answer.usage.prompt_tokens = len(request.prompt.token_ids)

    def _choice(self, index: int) -> Choice:
        keys = self.pictures.keys()
        keys.extend(self.request.prompt.token_ids)
        return Choice(index, self.request, self._tokenizer, keys)

    def fork(self) -> list[Choice]:
        """The other answers, which go on after the same prompt; nothing of it is computed or copied."""
        first = self.choices[0]
        assert first.sequence is not None, "the prompt was computed just now"
        for index in range(1, self.request.choices):
            twin = self._choice(index)
            twin.sequence, twin.published = first.sequence.fork(), first.published
            self.choices.append(twin)
        return self.choices[1:]

    @property
    def is_over(self) -> bool:
        """Whether every answer has ended."""
        begun = self._failed or len(self.choices) == self.request.choices
        return begun and all(choice.finish_reason for choice in self.choices)

    def begin(self, cached_tokens: int) -> None:
        """Note that the first of its tokens is computed now."""
        if not self.has_begun:
            self.has_begun = True
            self.answer.usage.queue_seconds = time.monotonic() - self.arrived
            self.answer.usage.cached_tokens = cached_tokens

    def put(self, delta: Delta) -> None:
        """Pass on what an answer has grown by."""
        usage, now = self.answer.usage, time.monotonic() - self.arrived
        usage.completion_tokens += len(delta.token_ids)
        usage.first_token_seconds = usage.first_token_seconds or now
        usage.total_seconds = now
        self.answer.put(delta)

    def fail(self, reason: str, *, request_is_wrong: bool = False) -> None:
        """End every answer that has not ended."""
        self._failed = True
        for index in range(self.request.choices):
            choice = self.choices[index] if index < len(self.choices) else None
            if choice is None or choice.finish_reason is None:
                self.answer.put(Delta(index, finish_reason="error", error=reason, request_is_wrong=request_is_wrong))
            if choice is not None:
                choice.finish_reason = choice.finish_reason or "error"
                choice.release()

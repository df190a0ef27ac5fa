"""What the scheduler is asked for, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, Self

import numpy as np

from ...errors import HerdError
from ...model.processing import PreparedPrompt
from ..generation import Sampling, StopRule, TokenLogprob

FinishReason = Literal["stop", "length", "error"]


class OverloadedError(HerdError):
    """The queue is full, or the engine is going down.

    Args:
        message: what is full.
        retry_after: seconds after which asking again makes sense.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RequestError(HerdError):
    """What a request asks for turned out to be impossible while it was answered."""


class Constraint(Protocol):
    """What an answer may be: the state of a grammar after the tokens so far."""

    def prepare(self) -> None:
        """Begin to compute what may come next, beside the forward pass; ``apply`` waits for it."""

    def apply(self, logits_V: np.ndarray) -> None:
        """Set the logits of what may not come next to minus infinity, in place."""

    def accept(self, token_id: int) -> None:
        """Go on by a token that was chosen."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow."""

    def fork(self) -> Self:
        """The same state for another answer to the same prompt."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One prompt, and how its answers are to be chosen.

    Attributes:
        request_id: for logs.
        prompt: its tokens and image tiles.
        sampling: how tokens are chosen; answer i draws with ``seed + i``.
        stop: when an answer ends.
        choices: number of answers.
        constraint: what an answer may be, None for anything.
        prompt_logprobs: report the prompt's own tokens with so many alternatives each, None for not at all.
        priority: requests with a smaller number go first.
        salt: requests share cached prefixes only where it is equal.
        never: tokens that are not chosen, since they mean nothing in an answer.
        shows_special: whether an answer's text has its control tokens, all but the one that ends it.
    """

    request_id: str
    prompt: PreparedPrompt
    sampling: Sampling
    stop: StopRule
    choices: int = 1
    constraint: Constraint | None = None
    prompt_logprobs: int | None = None
    priority: int = 0
    salt: bytes = b""
    never: tuple[int, ...] = ()
    shows_special: bool = False


@dataclass(frozen=True)
class Delta:
    """What one answer has grown by.

    Attributes:
        choice: number of the answer.
        text: text that is certain now, perhaps empty.
        token_ids: new tokens, the stop token included.
        logprobs: one per token where ``Sampling.logprobs`` was set.
        finish_reason: set in an answer's last delta.
        stop_reason: the stop string or the token that ended it; None for the model's own end of turn.
        error: what went wrong where ``finish_reason`` is ``error``.
        request_is_wrong: whether the request is to blame for that.
    """

    choice: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str = ""
    request_is_wrong: bool = False


@dataclass
class Usage:
    """What a request has cost so far, in tokens and seconds.

    Attributes:
        prompt_tokens: of the prompt, image tokens included.
        cached_tokens: of them, taken from the prefix cache.
        completion_tokens: of all answers.
        accepted_tokens: of them, guessed by speculation.
        preemptions: how often its answers gave their memory away.
        queue_seconds: until the first of its tokens was computed.
        first_token_seconds: until its first token, from the beginning.
        total_seconds: until the last.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    queue_seconds: float = 0.0
    first_token_seconds: float = 0.0
    total_seconds: float = 0.0

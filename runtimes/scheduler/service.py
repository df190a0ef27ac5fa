"""The scheduler in a thread of its own, for servers and for applications with many requests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from ..engine import Engine
from .request import Delta, GenerationRequest, PromptLogprobs, Usage


@dataclass(frozen=True)
class ServiceOptions:
    """Limits of a service.

    Attributes:
        sequences: most answers that are generated at the same time.
        step_tokens: most tokens in one call of the model.
        step_seconds: that a call may take while answers are being generated; prompts are cut accordingly.
        queued_requests: most requests that wait.
        queued_tokens: most tokens of their prompts.
    """

    sequences: int = 64
    step_tokens: int = 512
    step_seconds: float = 0.25
    queued_requests: int = 256
    queued_tokens: int = 1 << 20


class Answer:
    """The answers to a request as they are generated: ``async for delta in answer``, or ``for delta in answer``.

    Attributes:
        usage: grows with them.
        prompt_logprobs: complete before the first delta.
    """

    usage: Usage
    prompt_logprobs: PromptLogprobs

    def __aiter__(self) -> AsyncIterator[Delta]:
        raise NotImplementedError

    def cancel(self) -> None:
        """End the request, wherever it is; nothing happens when it has ended already."""
        raise NotImplementedError


class Service:
    """Runs requests on an engine. The thread that it starts is the only one that runs the model.

    Args:
        engine: loaded.
        options: limits.
    """

    def __init__(self, engine: Engine, options: ServiceOptions | None = None) -> None:
        self.engine, self.options = engine, options or ServiceOptions()

    def submit(self, request: GenerationRequest) -> Answer:
        """Queue a request.

        Raises:
            OverloadedError: the queue is full, or the service is going down.
            HerdError: the request can never run: it is longer than the context, or than all cache memory.
        """
        raise NotImplementedError

    def drain(self, timeout: float) -> None:
        """Take no more requests, and wait until those that are there have ended; after ``timeout`` end them."""
        raise NotImplementedError

"""Where the scheduler puts what it generates, and where one reader takes it out, at its own pace."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import replace

from ..generation import TokenLogprob
from .request import Delta, Usage


class Answer:
    """The answers to a request as they are generated: ``async for delta in answer``, or ``for delta in answer``.

    A reader who is slow finds the deltas of one answer joined: what waits is bounded by the answer itself, and nobody
    else is delayed.

    Args:
        choices: number of answers.
        cancel: ends the request.

    Attributes:
        usage: grows with them.
        prompt_logprobs: of the prompt's tokens where they were asked for, complete before the first delta; the first
            token has none.
    """

    def __init__(self, choices: int, cancel: Callable[[Answer], None]) -> None:
        self.usage = Usage()
        self.prompt_logprobs: list[TokenLogprob | None] = []
        self._open, self._cancel = choices, cancel
        self._waiting: deque[Delta] = deque()
        self._changed = threading.Condition()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: asyncio.Event | None = None

    def cancel(self) -> None:
        """End the request, wherever it is; nothing happens when it has ended already."""
        self._cancel(self)

    def put(self, delta: Delta) -> None:
        """Add what an answer has grown by; ``wake`` tells readers in event loops."""
        with self._changed:
            last = self._waiting[-1] if self._waiting else None
            if last is not None and last.choice == delta.choice and last.finish_reason is None:
                self._waiting[-1] = _joined(last, delta)
            else:
                self._waiting.append(delta)
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Delta]:
        """Deltas until every answer has ended."""
        while self._open:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
            yield from self._taken()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """The same, for one reader in an event loop."""
        self._wake = asyncio.Event()
        with self._changed:
            self._loop = asyncio.get_running_loop()
        while self._open:
            if not self._waiting:
                await self._wake.wait()
            self._wake.clear()
            for delta in self._taken():
                yield delta

    def _taken(self) -> Iterator[Delta]:
        while self._waiting:
            with self._changed:
                delta = self._waiting.popleft()
            self._open -= delta.finish_reason is not None
            yield delta


def wake(answers: Iterable[Answer]) -> None:
    """Tell readers in event loops what their answers have grown by, each loop once.

    An event loop that is woken wants the interpreter's lock: it gets it while the model computes, not between answers.
    """
    waiting: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
    for answer in answers:
        if answer._waiting and answer._loop is not None and answer._wake is not None:
            waiting.setdefault(answer._loop, []).append(answer._wake)
    for loop, events in waiting.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(_set_all, events)


def _set_all(events: Iterable[asyncio.Event]) -> None:
    for event in events:
        event.set()


def _joined(first: Delta, second: Delta) -> Delta:
    return replace(second, text=first.text + second.text, token_ids=first.token_ids + second.token_ids,
                   logprobs=first.logprobs + second.logprobs)

"""An answer as it comes from a server, with the same face as one that is generated here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from ..generation import Generation
from .pieces import Piece, pieces_of, tell_usage


class RemoteStream:
    """Text deltas; ``result`` is complete once the iteration ends.

    Times are those that the client sees: until the first token, and from there. ``token_ids`` stay empty where the
    server does not tell them, and log-probabilities have ``UNKNOWN_TOKEN``; where it does not tell the usage either,
    a delta counts as a token.

    Args:
        events: asks the server; its events.
    """

    def __init__(self, events: Callable[[], Iterator[dict[str, Any]]]) -> None:
        self._events = events
        self.result = Generation(finish_reason="stop")

    def __iter__(self) -> Iterator[str]:
        """Yield non-empty text deltas; leaving the iteration closes the connection."""
        timings, started = self.result.timings, time.perf_counter()
        first = 0.0
        for event in self._events():
            for piece in pieces_of(event):
                if not first and (piece.text or piece.token_ids):
                    first = time.perf_counter()
                    timings.prefill_seconds = first - started
                self._grow(piece)
                timings.decode_seconds = time.perf_counter() - first if first else 0.0
                if piece.text:
                    yield piece.text
            tell_usage(event, timings)

    def _grow(self, piece: Piece) -> None:
        result = self.result
        result.text += piece.text
        result.token_ids += piece.token_ids
        result.logprobs += piece.logprobs
        result.finish_reason = piece.finish_reason or result.finish_reason
        result.timings.new_tokens += len(piece.token_ids) or bool(piece.text)

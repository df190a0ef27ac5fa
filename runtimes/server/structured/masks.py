"""Masks of several answers, computed together in another thread while the model computes their logits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par

Array = np.ndarray[Any, Any]
Mask = Callable[[], Array]
"""Waits for a mask: bits of the vocabulary, int32 [words]."""


class Masks:
    """Computes what is asked for until its thread wakes in one go.

    To hand work to another thread and to wait for it costs some 0.3 ms, ten times the median mask: the answers of one
    call of the model share it.

    Args:
        vocab_size: of the masks.
        threads: one of them is taken per batch; it holds the interpreter's lock hardly ever.
    """

    def __init__(self, vocab_size: int, threads: ThreadPoolExecutor) -> None:
        self._vocab_size, self._threads, self._executor = vocab_size, threads, LLExecutor(num_threads=2)
        self._lock = threading.Lock()
        self._asked: list[LLMatcher] = []
        self._batch: Future[Array] | None = None

    def ask(self, matcher: LLMatcher) -> Mask:
        """Begin to compute what a grammar allows next; nobody else may use the matcher until the mask is there."""
        with self._lock:
            row = len(self._asked)
            self._asked.append(matcher)
            batch = self._batch = self._batch or self._threads.submit(self._computed)
        return lambda: batch.result()[row]

    def _computed(self) -> Array:
        with self._lock:
            asked, self._asked, self._batch = self._asked, [], None
        bits_BW = allocate_token_bitmask(len(asked), self._vocab_size)
        fill_next_token_bitmask_par(self._executor, [(matcher, row) for row, matcher in enumerate(asked)], bits_BW)
        return bits_BW

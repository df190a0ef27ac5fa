"""Calls of replicas, with responses that end when they are canceled."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest

from herdgraph.errors import HerdError
from herdgraph.runtimes.server.calls import Calls


class _Response:
    """Raises once it is canceled, as a response of Ray Serve does."""

    def __init__(self) -> None:
        self.asked, self._released = Event(), Event()

    def result(self) -> str:
        self.asked.set()
        assert self._released.wait(30)
        raise RuntimeError("canceled")

    def cancel(self) -> None:
        self._released.set()


def test_ending_cancels_and_waits() -> None:
    calls, responses = Calls(), [_Response() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(calls.result, lambda one=one: one) for one in responses]
        assert all(one.asked.wait(30) for one in responses)
        calls.end()
        assert [str(one.exception()) for one in waiting] == ["the cluster was closed before the answer was there"] * 4


def test_a_call_that_begins_while_they_end_is_refused_and_not_waited_for() -> None:
    calls = Calls()

    def call() -> _Response:
        calls._ended = True
        return _Response()

    with pytest.raises(HerdError, match="closed"):
        calls.result(call)
    with pytest.raises(HerdError, match="closed"):
        calls.result(lambda: pytest.fail("it was called"))


def test_an_error_of_a_call_is_its_own() -> None:
    def call() -> None:
        raise ValueError("mine")

    calls = Calls()
    with pytest.raises(ValueError, match="mine"):
        calls.result(call)
    calls.end()  # nobody waits

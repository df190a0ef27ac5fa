"""Calls of replicas that threads of this process wait for.

Ray ends the whole process when a thread asks it for something after its end, so the calls end first: ``Calls.end``
cancels them and returns when nobody waits any more.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from threading import Condition
from typing import Any

from ...errors import HerdError

_PATIENCE = 10.0
"""Seconds for a call that was cancelled to come back."""


class Calls:
    """Counts who waits; safe to use from several threads."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._responses: list[Any] = []
        self._waiting = 0
        self._ended = False

    def result(self, call: Callable[[], Any]) -> Any:
        """What ``call`` comes to, which returns a response of a Ray Serve handle.

        Raises:
            HerdError: the calls were ended, before or meanwhile.
        """
        with self._changed:
            self._refuse_after_the_end()
            self._waiting += 1
        response = None
        try:
            response = call()
            with self._changed:
                self._refuse_after_the_end()
                self._responses.append(response)
            return response.result()
        except BaseException:
            self._refuse_after_the_end()
            raise
        finally:
            with self._changed:
                self._responses = [one for one in self._responses if one is not response]
                self._waiting -= 1
                self._changed.notify_all()

    def end(self) -> None:
        """Cancel every call and wait until nobody waits for one; further ones are refused."""
        with self._changed:
            self._ended = True
            for response in self._responses:
                with suppress(Exception):  # it has just ended
                    response.cancel()
            self._changed.wait_for(lambda: not self._waiting, _PATIENCE)

    def _refuse_after_the_end(self) -> None:
        if self._ended:
            raise HerdError("the cluster was closed before the answer was there")

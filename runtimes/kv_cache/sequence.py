"""One sequence of tokens and what the model remembers of it; nobody else writes its state."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Items
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, Self

import numpy as np

from ...errors import HerdError

Features = np.ndarray[Any, Any]


def _never() -> bool:
    return False


class SequenceCache(Protocol):
    """Keys and values of one sequence, in buffers of its own (``KVBuffers``) or in shared blocks (``PagedCache``)."""

    def make_room(self, first: int, end: int) -> bool:
        """Let positions ``first`` to ``end`` - 1 be written; True when what an executor has bound has moved.

        Raises:
            HerdError: there is no room.
        """

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` positions."""

    def fork(self, length: int) -> Self:
        """The same first ``length`` positions for another sequence."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it refers to."""

    @property
    def element_bytes(self) -> float:
        """Bytes that an element of keys or values takes, what fills up and scales included."""


class Sequence:
    """Tokens that a model has seen, with their keys and values. Made by ``Engine.new_sequence``.

    Its properties are read-only. Whoever runs the model calls ``make_room`` before a step and ``append`` after it.

    Args:
        cache: its keys and values.
        width: of image features.
        token_ids: whose keys and values the cache holds already.
    """

    def __init__(self, cache: SequenceCache, width: int, token_ids: Iterable[int] = ()) -> None:
        self._token_ids = list(token_ids)
        self._features: Features = np.zeros((0, width), np.float32)
        self._tile_digests: list[bytes] = []
        self._cache, self._written = cache, len(self._token_ids)
        self._binding: Any = None
        self._in_use, self._version, self._stopped = threading.Lock(), 0, _never

    def __len__(self) -> int:
        return len(self._token_ids)

    @property
    def token_ids(self) -> Items[int]:
        """Every token so far, image tokens included."""
        return self._token_ids

    @property
    def version(self) -> int:
        """Number of changes so far: who remembers it sees whether somebody else used the sequence."""
        return self._version

    @property
    def features(self) -> Features:
        """The image features behind the image tokens, in order, float32 [image tokens, width]."""
        return self._features

    @property
    def tile_digests(self) -> Items[bytes]:
        """Content hash of every tile so far; equal ids do not mean equal pictures."""
        return self._tile_digests

    @property
    def cache(self) -> Any:
        """Keys and values: a ``SequenceCache`` of the kind that the executor works with."""
        return self._cache

    @property
    def written(self) -> int:
        """Length after the last tokens were appended: what the cache of chunked layers holds ends there."""
        return self._written

    # -- growing and shrinking -----------------------------------------------------------------------------------

    def make_room(self, tokens: int) -> None:
        """Let ``tokens`` more be written.

        Raises:
            HerdError: there is no room for their keys and values.
        """
        if self._cache.make_room(len(self), len(self) + tokens):
            self._binding = None

    def append(self, token_ids: Iterable[int]) -> None:
        """Count tokens whose keys and values are in the cache now."""
        self._token_ids.extend(token_ids)
        self._written = len(self._token_ids)
        self._version += 1

    def append_images(self, features: Features, tiles: Iterable[Features]) -> None:
        """Remember the features that filled the image tokens that were appended, and which pixels they came from."""
        self._features = np.concatenate((self._features, features))
        self._tile_digests.extend(map(tile_digest, tiles))

    def truncate(self, length: int) -> None:
        """Forget all but the first tokens; the next tokens overwrite what was forgotten."""
        del self._token_ids[length:]
        self._cache.truncate(length)
        self._version += 1

    def truncate_images(self, image_tokens: int, tiles: int) -> None:
        """Forget the features of all but the first image tokens, and the hashes of all but the first tiles."""
        self._features = self._features[:image_tokens]
        del self._tile_digests[tiles:]

    @contextmanager
    def stopped_by(self, stopped: Callable[[], bool]) -> Iterator[None]:
        """Let prompts on this sequence end early: ``stopped`` is asked between two prefill chunks.

        The chunks that were computed stay, so that the same prompt goes on there; the call raises ``StoppedError``.
        """
        before, self._stopped = self._stopped, stopped
        try:
            yield
        finally:
            self._stopped = before

    @property
    def is_stopped(self) -> bool:
        """Whether a prompt that is being computed is to end."""
        return self._stopped()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Held while a step runs on the sequence.

        Raises:
            HerdError: another thread is running one.
        """
        if not self._in_use.acquire(blocking=False):
            raise HerdError("two threads used one sequence at the same time: give each its own, or fork it")
        try:
            yield
        finally:
            self._in_use.release()

    def fork(self) -> Self:
        """An independent sequence with the same past, which is not computed again."""
        with self.exclusive():
            return self._copy()

    def _copy(self) -> Self:
        twin = type(self).__new__(type(self))
        twin._token_ids = self._token_ids.copy()
        twin._features = self._features
        twin._tile_digests = self._tile_digests.copy()
        twin._cache, twin._written = self._cache.fork(len(self)), self._written
        twin._binding = None
        twin._in_use, twin._version, twin._stopped = threading.Lock(), 0, _never
        return twin

    # -- who uses the cache --------------------------------------------------------------------------------------

    def cache_moved(self) -> None:
        """Let what was bound to the cache be made again."""
        self._binding = None

    def binding(self, make: Callable[[], Any]) -> Any:
        """What an executor made to run on the cache; made again after it has moved."""
        if self._binding is None:
            self._binding = make()
        return self._binding


@contextmanager
def exclusive(sequences: Iterable[Sequence]) -> Iterator[None]:
    """All of several sequences; see ``Sequence.exclusive``."""
    with ExitStack() as stack:
        for sequence in sequences:
            stack.enter_context(sequence.exclusive())
        yield


def tile_digest(tile: np.ndarray[Any, Any]) -> bytes:
    """What tells the pixels of one image tile apart from others'."""
    return hashlib.sha256(np.ascontiguousarray(tile).data).digest()

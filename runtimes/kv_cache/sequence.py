"""One sequence of tokens and what the model remembers of it; nobody else writes its state."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Items
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import numpy as np

from ...errors import HerdError
from ...model.config import TextConfig
from .buffers import KVBuffers
from .memory import Buffer, CacheMemory

Features = np.ndarray[Any, Any]


def _never() -> bool:
    return False


class Sequence:
    """Tokens that a model has seen, with their key/value buffers. Made by ``Engine.new_sequence``.

    Its properties are read-only. Whoever runs the model calls ``reserve`` before a step and ``append`` after it.

    Args:
        config: the decoder.
        memory: where the buffers live, None for the host's memory.
    """

    def __init__(self, config: TextConfig, memory: CacheMemory | None = None) -> None:
        self._token_ids: list[int] = []
        self._features: Features = np.zeros((0, config.hidden_size), np.float32)
        self._tile_digests: list[bytes] = []
        self._buffers = KVBuffers(config, memory)
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
    def buffers(self) -> KVBuffers:
        """Keys and values."""
        return self._buffers

    # -- growing and shrinking -----------------------------------------------------------------------------------

    def reserve(self, tokens: int) -> None:
        """Make room for a total of ``tokens``."""
        if self._buffers.reserve(tokens):
            self._binding = None

    def append(self, token_ids: Iterable[int]) -> None:
        """Count tokens whose keys and values are in the buffers now."""
        self._token_ids.extend(token_ids)
        self._version += 1

    def append_images(self, features: Features, tiles: Iterable[Features]) -> None:
        """Remember the features that filled the image tokens that were appended, and which pixels they came from."""
        self._features = np.concatenate((self._features, features))
        self._tile_digests.extend(map(tile_digest, tiles))

    def truncate(self, length: int) -> None:
        """Forget all but the first tokens. Buffers stay: the next tokens overwrite what was forgotten."""
        del self._token_ids[length:]
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
        """An independent sequence with the same past: the shared prefix is copied, not computed again."""
        with self.exclusive():
            return self._copy()

    def _copy(self) -> Self:
        twin = type(self).__new__(type(self))
        twin._token_ids = self._token_ids.copy()
        twin._features = self._features
        twin._tile_digests = self._tile_digests.copy()
        twin._buffers = self._buffers.copy()
        twin._binding = None
        twin._in_use, twin._version, twin._stopped = threading.Lock(), 0, _never
        return twin

    # -- buffers and who uses them -------------------------------------------------------------------------------

    def move_layer(self, layer: int, buffers: tuple[Buffer, Buffer]) -> None:
        """Go on in other buffers of one layer, into which its keys and values were copied; the old ones are free."""
        self._buffers.move_layer(layer, buffers)
        self._binding = None

    def binding(self, make: Callable[[], Any]) -> Any:
        """What an executor made to run on these buffers; made again after they have moved."""
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

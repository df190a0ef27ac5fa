"""One request on a sequence: the part of its prompt that is new, then one token at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from ...errors import HerdError
from ...model.config import HerdConfig
from ...model.processing import PreparedPrompt
from ..kv_cache.sequence import Sequence
from .prefix import shared_prefix
from .sampling import Array


class Model(Protocol):
    """What computes a prompt: an engine, which says more of these methods."""

    @property
    def config(self) -> HerdConfig:
        """The model's configuration."""

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Forget all but the first tokens."""

    def prefill(
        self, sequence: Sequence, token_ids: list[int], pixel_values: np.ndarray[Any, Any] | None = None
    ) -> Array:
        """Append tokens and images; logits of the last token."""


class Request:
    """What a stream runs on its sequence; nobody else may move the sequence between two steps.

    Args:
        model: computes the prompt.
        step: appends a token that the model chose; what it gives is valid until the next call.
        sequence: grows.
        prompt: comes first.
    """

    def __init__(
        self, model: Model, step: Callable[[Sequence, int], Array | int], sequence: Sequence, prompt: PreparedPrompt
    ) -> None:
        self._model, self._step, self._sequence, self._prompt = model, step, sequence, prompt
        self._version = -1

    def prefill(self) -> tuple[Array, int]:
        """Logits after the prompt, and how many of its tokens the sequence held already."""
        sequence, prompt = self._sequence, self._prompt
        shared = shared_prefix(sequence, prompt, self._model.config)
        self._model.truncate(sequence, shared)
        tiles = None if prompt.pixel_values is None else prompt.pixel_values[len(sequence.tile_digests) :]
        logits = self._model.prefill(sequence, prompt.token_ids[shared:], tiles)
        self._version = sequence.version
        return logits, shared

    def decode(self, token_id: int) -> Array | int:
        """Append a token that was chosen; its logits, valid until the next call, or the most likely next token."""
        if self._sequence.version != self._version:
            raise HerdError("the sequence was used by somebody else while this stream ran: give each stream its own")
        row = self._step(self._sequence, token_id)
        self._version = self._sequence.version
        return row

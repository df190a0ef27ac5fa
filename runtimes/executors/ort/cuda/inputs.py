"""What a call is told: arrays on the host that lie side by side, as they do on the device, and go there in one copy."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any, NamedTuple

import numpy as np

from ...blocks import PlacedStep
from ..session import ort_value
from .views import Place

_ALIGNMENT = 256
"""Of every array on the device, in bytes."""
_Layout = dict[str, tuple[tuple[int, ...], type[np.generic]]]


class CallSize(NamedTuple):
    """What decides about the shapes of a call. ``whole`` and ``chunked`` are columns of the block tables."""

    tokens: int
    sequences: int
    rows: int
    image_tokens: int
    whole: int
    chunked: int

    def layout(self, hidden: int) -> _Layout:
        """Shapes and types of all arrays."""
        tokens, sequences = (self.tokens,), (self.sequences,)
        return {
            "input_ids": (tokens, np.int64), "positions": (tokens, np.int64), "logit_rows": ((self.rows,), np.int64),
            "cumulative_lengths": ((self.sequences + 1,), np.int32), "past_lengths.global": (sequences, np.int32),
            "past_lengths.chunked": (sequences, np.int32),
            "block_table.global": ((self.sequences, self.whole), np.int32),
            "block_table.chunked": ((self.sequences, self.chunked), np.int32),
            "image_features": ((self.image_tokens, hidden), np.float32),
        }


class CallInputs:
    """The inputs of calls of one size.

    Args:
        place: the device.
        size: of the calls.
        hidden: width of image features.
        names: inputs that the graph has.
        memory: uint8 on the device that they may lie in; None for memory of their own.

    Attributes:
        values: what is bound, by name.
    """

    def __init__(
        self, place: Place, size: CallSize, hidden: int, names: frozenset[str], memory: Any | None = None
    ) -> None:
        layout = {name: entry for name, entry in size.layout(hidden).items() if name in names}
        self.size, offsets, end = size, {}, 0
        for name, (shape, dtype) in layout.items():
            offsets[name] = end
            end += _aligned_bytes(shape, dtype)
        self._host = np.zeros(max(end, _ALIGNMENT), np.uint8)
        memory = place.empty([len(self._host)], np.uint8) if memory is None else memory
        self._device = place.part(memory, 0, [len(self._host)])
        self._arrays = {name: self._on_host(offsets[name], *entry) for name, entry in layout.items()}
        self._bounds = {name: np.zeros(2, np.int32) for name in names if name.startswith("attention_metadata.")}
        self.values = {name: place.part(memory, offsets[name], *entry) for name, entry in layout.items()}
        self.values |= {name: ort_value(array) for name, array in self._bounds.items()}

    @staticmethod
    def bytes_of(size: CallSize, hidden: int) -> int:
        """No fewer bytes than the inputs of a call take on the device."""
        return sum(_aligned_bytes(shape, dtype) for shape, dtype in size.layout(hidden).values())

    def _on_host(self, offset: int, shape: tuple[int, ...], dtype: type[np.generic]) -> Any:
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self._host[offset : offset + count].view(dtype).reshape(shape)

    def bound(self, new: int, whole: int, chunked: int) -> None:
        """Say that no sequence gets more new tokens than that, nor has more in all, or in its chunk."""
        for name, most in (("attention_metadata.global", whole), ("attention_metadata.chunked", chunked)):
            if name in self._bounds:
                self._bounds[name][:] = new, most

    def write(self, steps: Items[PlacedStep], chunk: int, padding: tuple[int, int]) -> None:
        """Write what a call is to do, and send it.

        Args:
            steps: each for one sequence; where there are fewer than sequences, the rest is padding.
            chunk: tokens of an attention chunk, 0 without.
            padding: a block of either kind that no sequence has.
        """
        found: dict[str, Any] = {name: self._arrays.get(name) for name in self.size.layout(0)}
        self._host[:] = 0
        for name, block in zip(("block_table.global", "block_table.chunked"), padding, strict=True):
            if found[name] is not None:
                found[name][:] = block
        first, rows, features = 0, list[int](), list[Any]()
        for index, step in enumerate(steps):
            count, past = len(step.token_ids), step.past
            found["input_ids"][first : first + count] = step.token_ids
            if found["positions"] is not None:
                found["positions"][first : first + count] = range(past, past + count)
            self._write_past(index, step, past % chunk if chunk else 0)
            rows += [first + place for place in step.rows]
            features += [] if step.features is None else [step.features]
            first += count
            found["cumulative_lengths"][index + 1] = first
        self._write_padding(len(steps), first, rows)
        if found["image_features"] is not None and features:
            found["image_features"][:] = np.concatenate(features)
        self._device.update_inplace(self._host)

    def _write_past(self, index: int, step: PlacedStep, of_chunk: int) -> None:
        for kind, length, table in (("global", step.past, step.whole), ("chunked", of_chunk, step.chunked)):
            if f"past_lengths.{kind}" in self._arrays:
                row = self._arrays[f"block_table.{kind}"][index]
                used = min(len(table), len(row))
                self._arrays[f"past_lengths.{kind}"][index], row[:used] = length, table[:used]

    def _write_padding(self, steps: int, tokens: int, rows: list[int]) -> None:
        others, last = self.size.sequences - steps, self.size.tokens - 1
        self._arrays["cumulative_lengths"][steps + 1 :] = range(tokens + 1, tokens + 1 + others)
        self._arrays["logit_rows"][:] = [*rows, *(min(tokens + row, last) for row in range(self.size.rows - len(rows)))]


def _aligned_bytes(shape: tuple[int, ...], dtype: type[np.generic]) -> int:
    """Bytes of an array and of the gap behind it."""
    return -(-int(np.prod(shape)) * np.dtype(dtype).itemsize // _ALIGNMENT) * _ALIGNMENT

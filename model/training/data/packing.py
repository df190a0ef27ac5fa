"""Several samples in one row, as if each were alone.

    row        a a a a b b b c c c c c . .       three samples and padding
    document   0 0 0 0 1 1 1 2 2 2 2 2 -1 -1     attention stays inside of equal numbers; positions begin anew with each
    label      a a a - b b - c c c c - - -       the next token; - is -100 and not learned

The last token of a sample has no successor to learn, nor has any token before one of a picture or a masked turn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ....errors import HerdError
from .encode import Array, Encoded

IGNORED = -100
"""A label that is not learned (``torch.nn.functional.cross_entropy``'s default)."""
PADDING = -1
"""The document of padding."""


@dataclass(frozen=True)
class Batch:
    """What a training step takes.

    Attributes:
        input_ids_BT: int64.
        labels_BT: int64, the token to predict at each place, ``IGNORED`` where nothing is learned.
        document_BT: int64, numbers the samples of a row from 0; ``PADDING`` behind them.
        pixels_NCHW: float32, tiles in the order of their image tokens in the batch; None without pictures.
    """

    input_ids_BT: Tensor
    labels_BT: Tensor
    document_BT: Tensor
    pixels_NCHW: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device."""
        pixels = None if self.pixels_NCHW is None else self.pixels_NCHW.to(device)
        return Batch(self.input_ids_BT.to(device), self.labels_BT.to(device), self.document_BT.to(device), pixels)


class Rows:
    """The rows of one batch while they are filled, first fit.

    The batch is complete at the first sample that fits in none of its rows. So the samples of a batch are always the
    next ones of the stream, and a number is enough to say where a stream stands (see ``loader``).

    Args:
        count: rows of the batch, B.
        length: tokens of a row, T.
    """

    def __init__(self, count: int, length: int) -> None:
        self._length = length
        self._rows: list[list[Encoded]] = [[] for _ in range(count)]
        self._room = [length] * count

    def __bool__(self) -> bool:
        return any(self._rows)

    def place(self, sample: Encoded) -> bool:
        """Put a sample in the first row that has room; False when none has.

        Raises:
            HerdError: it fits in no row, even an empty one.
        """
        if len(sample) > self._length:
            raise HerdError(f"sample {sample.key} has {len(sample)} tokens, a row has {self._length}: cut it or make "
                            "the rows longer")
        for row, room in enumerate(self._room):
            if len(sample) <= room:
                self._rows[row].append(sample)
                self._room[row] -= len(sample)
                return True
        return False

    def batch(self, pad_id: int) -> Batch:
        """The tensors of the rows.

        Args:
            pad_id: token behind the samples of a row.
        """
        shape = (len(self._rows), self._length)
        ids_BT, labels_BT = np.full(shape, pad_id, np.int64), np.full(shape, IGNORED, np.int64)
        document_BT = np.full(shape, PADDING, np.int64)
        for row, samples in enumerate(self._rows):
            start = 0
            for number, sample in enumerate(samples):
                end = start + len(sample)
                ids_BT[row, start:end], document_BT[row, start:end] = sample.ids_T, number
                labels_BT[row, start : end - 1] = _labels(sample)
                start = end
        tiles = [s.tiles_NCHW for samples in self._rows for s in samples if s.tiles_NCHW is not None]
        pixels = torch.from_numpy(np.concatenate(tiles)) if tiles else None
        return Batch(torch.from_numpy(ids_BT), torch.from_numpy(labels_BT), torch.from_numpy(document_BT), pixels)


def _labels(sample: Encoded) -> Array:
    """The successor of every token but the last."""
    return np.where(sample.learned_T[1:], sample.ids_T[1:], IGNORED)

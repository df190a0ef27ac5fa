"""Samples as windows of tokens and tiles: what is measured, and what is held out to evaluate the result."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..errors import HerdError
from ..model.checkpoint import Checkpoint
from ..model.data import Record
from ..model.processing import PreparedPrompt, PromptProcessor

WINDOW = 512
"""Tokens of plain text that are read together."""
SHORTEST = 16


@dataclass(frozen=True)
class Window:
    """Tokens read from position 0, and the tiles that fill their image tokens.

    Attributes:
        token_ids: with image tokens where features go.
        pixels: float32 [tiles, 3, side, side], None without pictures.
    """

    token_ids: list[int]
    pixels: np.ndarray[Any, Any] | None = None


@dataclass(frozen=True)
class Data:
    """Windows to measure, and others to evaluate on.

    Attributes:
        measured: windows whose statistics are taken.
        held_out: windows that no scale sees.
    """

    measured: list[Window]
    held_out: list[Window]

    @property
    def tokens(self) -> int:
        """Tokens that are measured."""
        return _tokens(self.measured)

    def digest(self) -> str:
        """SHA-256 of all token ids and pixels, in order, and of which are measured."""
        found = hashlib.sha256(str(len(self.measured)).encode())
        for window in (*self.measured, *self.held_out):
            found.update(np.asarray([len(window.token_ids), *window.token_ids], np.int64).tobytes())
            if window.pixels is not None:
                found.update(np.ascontiguousarray(window.pixels).tobytes())
        return found.hexdigest()


def windows_of(
    samples: Iterable[Record], prepare: Callable[[Record], PreparedPrompt], encode: Callable[[str], list[int]],
    *, context: int, most_tokens: int,
) -> list[Window]:
    """Windows of samples: plain texts joined and cut, everything else for itself.

    Args:
        samples: in order.
        prepare: tokens and tiles of a sample that is not plain text.
        encode: tokens of plain text.
        context: longest window of plain text.
        most_tokens: stop when that many are there; the last sample that is not plain text may go beyond.
    """
    windows: list[Window] = []
    text: list[int] = []
    for sample in samples:
        room = most_tokens - len(text) - _tokens(windows)
        if room <= 0:
            break
        if sample.is_plain_text:
            text += encode(sample.completion())[:room]
        else:
            prompt = prepare(sample)
            windows.append(Window(prompt.token_ids, prompt.pixel_values))
    length = min(WINDOW, context)
    pieces = [text[first : first + length] for first in range(0, len(text), length)]
    return [Window(piece) for piece in pieces if len(piece) >= SHORTEST] + windows


def _tokens(windows: list[Window]) -> int:
    return sum(len(window.token_ids) for window in windows)


def data_of(
    checkpoint: Checkpoint, samples: Iterable[Record], *, most_tokens: int = 1 << 16, held_out: float = 0.15
) -> Data:
    """Read samples with a checkpoint's own tokenizer and image processor.

    Args:
        checkpoint: brings them.
        samples: texts, chats, pictures.
        most_tokens: enough; the rest is not read.
        held_out: share of the windows, spread evenly, that are evaluated on and not measured.

    Raises:
        HerdError: no tokenizer, no usable data, a picture that cannot be read.
    """
    processor = PromptProcessor(checkpoint.directory, checkpoint.config)

    windows = windows_of(samples, partial(_prepared, processor), processor.tokenizer.encode, most_tokens=most_tokens,
                         context=checkpoint.config.text.max_position_embeddings)
    if not windows:
        raise HerdError(f"the data has fewer than {SHORTEST} tokens: give more text or pictures")
    return split(windows, held_out)


def _prepared(processor: PromptProcessor, sample: Record) -> PreparedPrompt:
    """Tokens and tiles of a sample with pictures or of a conversation."""
    try:
        if sample.turns:
            return processor.prepare([turn.message() for turn in sample.turns], tools=sample.tools or None)
        return processor.prepare(sample.completion(), images=[picture.source for picture in sample.pictures])
    except HerdError as error:
        raise HerdError(f"{sample.origin}: {error}") from error


def split(windows: list[Window], share: float) -> Data:
    """Hold back a share of the windows, spread evenly, of those with pictures and of those without."""
    seeing = [index for index, window in enumerate(windows) if window.pixels is not None]
    reading = [index for index, window in enumerate(windows) if window.pixels is None]
    held_out = {*_spread(seeing, share), *_spread(reading, share)}
    return Data([window for at, window in enumerate(windows) if at not in held_out],
                [window for at, window in enumerate(windows) if at in held_out])


def _spread(places: list[int], share: float) -> list[int]:
    """A share of the places, at least one of them and never all, spread evenly; none of a single place."""
    if len(places) < 2 or share <= 0:
        return []
    count = min(max(round(share * len(places)), 1), len(places) - 1)
    return [places[round((index + 1) * len(places) / (count + 1)) - 1] for index in range(count)]

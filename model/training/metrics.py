"""What a run says of itself: a line for people, TensorBoard for later, and rates beside what the machine can do."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ...errors import HerdError
from ..config import HerdConfig
from ..config.parameter_counts import model_size

_SMALLEST, _LARGEST = 128, 1024
"""Rows and columns of the matrices that a peak is measured with."""
_LONG_ENOUGH = 0.02
_BUDGET = 0.5
_TRIALS = 5


def flops_per_token(config: HerdConfig, length: int) -> float:
    """Floating-point operations of one training step per token: 6 per active parameter, and attention.

    Attention costs 2 products of 2 · visible · heads · head_dim operations forward and twice that backward; half of the
    positions are visible on average (Chowdhery et al. 2022, appendix B).
    """
    text = config.text
    visible = sum(min(length, text.chunk_of(layer) or length) / 2 for layer in range(text.num_layers))
    table = text.vocab_size * text.hidden_size  # looking a row up is no product
    return 6 * (model_size(config).active - table) + 12 * visible * text.num_heads * text.head_dim


@cache
def measured_peak(dtype: torch.dtype = torch.float32) -> float:
    """Floating-point operations per second of a large matrix product on this machine: the best of some.

    Products grow until one takes long enough to be timed: a CPU without instructions for bfloat16 emulates them, and
    would need a minute for the largest.
    """
    size, seconds = _SMALLEST, _product_seconds(_SMALLEST, dtype)
    while size < _LARGEST and seconds < _LONG_ENOUGH:
        size *= 2
        seconds = _product_seconds(size, dtype)
    trials = 1 + int(_BUDGET / seconds)
    return 2 * size**3 / min([seconds, *(_product_seconds(size, dtype) for _ in range(min(trials, _TRIALS)))])


def _product_seconds(size: int, dtype: torch.dtype) -> float:
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    started = time.perf_counter()
    a @ b
    return time.perf_counter() - started


class RunLog:
    """Writes scalars to TensorBoard event files and to ``metrics.jsonl``.

    Args:
        directory: of the run; None writes nothing.

    Raises:
        HerdError: the directory cannot be written.
    """

    def __init__(self, directory: Path | None) -> None:
        self._writer: Any = None
        self._lines: Any = None
        if directory is None:
            return
        with _told(directory):
            directory.mkdir(parents=True, exist_ok=True)
            self._lines = (directory / "metrics.jsonl").open("a", encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:  # a run without TensorBoard still has its lines
            return
        self._writer = SummaryWriter(str(directory / "tensorboard"))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record the values of a step.

        Raises:
            HerdError: they cannot be written.
        """
        if self._lines is not None:
            with _told(Path(self._lines.name)):
                self._lines.write(json.dumps({"step": step, **values}) + "\n")
                self._lines.flush()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in filter(None, (self._lines, self._writer)):
            with suppress(OSError):  # what could not be written has been told
                file.close()


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HerdError(f"{path} cannot be written ({error.strerror}): make room or choose another output; the run "
                        "goes on from its last checkpoint") from error

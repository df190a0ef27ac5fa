"""How a training run says where it stands: lines for files and pipes, and what it is about to do."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import click

from ..console import NoteHandler, stderr
from ..foreign_text import printable

PATIENCE = 10.0
"""Seconds without a line, after which a step gets one though it is not its turn."""


@dataclass
class StepLines:
    """Progress as lines, for output that is not a terminal.

    Attributes:
        steps: of the whole run.
        every: steps between lines; the first and the last step get one as well, and steps that take long.
    """

    steps: int
    every: int
    _first: int = 0
    _started: float = 0.0
    _shown: float = 0.0

    def show(self, step: int, record: dict[str, float]) -> None:
        """Print the line of a step, if it is one that gets a line."""
        now = time.monotonic()
        if not self._first:
            self._first, self._started = step, now
        if step % self.every and step not in (self._first, self.steps) and now - self._shown < PATIENCE:
            return
        self._shown = now
        click.echo(f"step {step}/{self.steps}  loss {record['loss']:.4f}  {record['tokens_per_second']:.0f} tokens/s"
                   f"{self._end(step, now)}", err=True)

    def _end(self, step: int, now: float) -> str:
        """When the last step will be made, as far as the steps after the first one tell."""
        if step == self._first:
            return ""
        left = (now - self._started) / (step - self._first) * (self.steps - step)
        return f"  ends {time.strftime('%H:%M:%S', time.localtime(time.time() + left))}, in {left:.0f} s"


class _Told(logging.Handler):
    """What the package logs, as lines for people."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record; also from the handler of a signal, which may come while another line is printed."""
        try:
            warns = record.levelno >= logging.WARNING
            text = printable(" ".join(record.getMessage().split()))
            stderr.print(f"{'warning: ' * warns}{text}",  # above a progress bar
                         style="yellow" if warns else None, soft_wrap=True, markup=False, highlight=False)
        except Exception:
            self.handleError(record)


def _not_ours(record: logging.LogRecord) -> bool:
    return not record.name.startswith("herdgraph")


@contextmanager
def told(*, quiet: bool) -> Iterator[None]:
    """Print on standard error what the package logs about the run, not only its warnings.

    Args:
        quiet: print warnings only, as on the ranks that do not speak.
    """
    logger, handler = logging.getLogger("herdgraph"), _Told()
    # Handlers of the root that people read would say the same again; other subclasses (files, pytest) keep the record.
    others = [other for other in logging.getLogger().handlers if type(other) in (logging.StreamHandler, NoteHandler)]
    before = logger.level
    if before <= logging.WARNING:  # else `herdgraph -q` wants errors only
        logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.addHandler(handler)
    for other in others:
        other.addFilter(_not_ours)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)
        for other in others:
            other.removeFilter(_not_ours)

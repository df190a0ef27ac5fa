"""Progress for files and pipes, a line now and then: ``writing weights: 40 %, about 3 min left``."""

from __future__ import annotations

import time
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress, Task, TaskID

from .foreign_text import printable

PATIENCE = 20.0
"""Seconds without a line; where much has been done, a tenth of the time since the start."""


class ProgressLines(Progress):
    """What ``rich`` knows as a progress display, as lines on standard error."""

    def __init__(self) -> None:
        super().__init__(console=Console(quiet=True), disable=True, get_time=time.monotonic)
        self._began = self._told = time.monotonic()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """See ``rich``."""
        super().update(task_id, **changes)
        self._tell(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """See ``rich``."""
        super().advance(task_id, advance)
        self._tell(task_id)

    def _tell(self, task_id: TaskID) -> None:
        now = time.monotonic()
        with self._lock:
            if now - self._told < max(PATIENCE, (now - self._began) / 10):
                return
            self._told = now
            click.echo(_line(self._tasks[task_id]), err=True)


def duration(seconds: float) -> str:
    """Seconds for people, as they are guessed."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _line(task: Task) -> str:
    description = printable(task.description.strip())
    if not task.total:
        return description
    done = min(1.0, task.completed / task.total)
    left = f", about {duration((task.elapsed or 0.0) * (1 - done) / done)} left" if done else ""
    return f"{description}: {100 * done:.0f} %{left}"

"""What every command line shares: one-line errors, clean interruption, tables, JSON."""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.table import Table

from .errors import HerdError

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)


class HerdGroup(click.Group):
    """A command group whose ``HerdError`` are one red line and exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a subcommand with errors for people."""
        return guarded(lambda: super(HerdGroup, self).invoke(ctx))


class HerdCommand(click.Command):
    """A single command with the same manners."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command with errors for people."""
        return guarded(lambda: super(HerdCommand, self).invoke(ctx))


def guarded(run: Any) -> Any:
    """Call ``run``; a ``HerdError`` or running out of memory ends the process with one line."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return run()
    except HerdError as error:
        fail(str(error))
    except MemoryError:
        fail("out of memory: close other programs or use a smaller model")
    except KeyboardInterrupt:
        fail("interrupted; nothing incomplete was left behind", status=130)


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    """Turn SIGTERM into an exception, so that temporary files are removed on the way out."""
    raise KeyboardInterrupt


def fail(message: str, *, status: int = 1) -> NoReturn:
    """Print one line to standard error and exit."""
    click.secho(f"error: {' '.join(message.split())}", fg="red", err=True)
    sys.exit(status)


def emit_json(value: Any) -> None:
    """Print one JSON document to standard output."""
    click.echo(json.dumps(value, indent=2))


def table(title: str, rows: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> None:
    """Print a two-column table to standard output."""
    grid = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rows.items() if isinstance(rows, Mapping) else rows:
        grid.add_row(f"[bold]{name}[/bold]", str(value))
    stdout.print(grid)


def size(count: float) -> str:
    """Bytes for people, decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def quantity(count: float) -> str:
    """A count for people: 1.5 k, 239.0 M, 108.6 B."""
    for unit in ("", " k", " M"):
        if count < 1000:
            return f"{count:.0f}{unit}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.2f} B"

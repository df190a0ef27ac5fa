"""Tables of benchmarks: as wide as a terminal, and as wide as they need to be in a file."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from herdgraph.console import stdout

WIDE = 200
"""Columns of a file, where nothing has to fit a window."""


def show_tables(*tables: Table) -> None:
    """Print tables to standard output."""
    console = stdout if stdout.is_terminal else Console(width=WIDE, highlight=False)
    console.print(*tables)

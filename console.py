"""What every command line shares: one-line errors, clean interruption, tables, JSON."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.progress import Progress, ProgressColumn

from .errors import HerdError
from .files import size

__all__ = [
    "HerdCommand",
    "HerdGroup",
    "emit_json",
    "fail",
    "print_error",
    "print_warning",
    "progress",
    "quantity",
    "size",
    "stderr",
    "stdout",
    "succeed",
    "table",
]

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)

_OUT_OF_MEMORY = re.compile(r"can't allocate memory|not enough memory|failed to allocate|bad_alloc", re.IGNORECASE)
"""How torch and ONNX Runtime say it, in exceptions of no particular class."""

_REQUIREMENT = re.compile(r"""([\w.-]+).*; extra == ["']([\w-]+)["']""")
"""A package and the extra that brings it, in a distribution's metadata."""


class Interrupted(BaseException):
    """A signal asked the process to end. No ``Exception``, so that nothing on the way out takes it for an error."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class HerdCommand(click.Command):
    """A command whose errors are one red line, with exit status 1, or 2 for wrong usage."""

    def invoke(self, context: click.Context) -> Any:
        """Run; a missing package of an extra is an error for people, any other missing module a defect."""
        try:
            return super().invoke(context)
        except ModuleNotFoundError as error:
            raise _missing_extra(error, context.command_path) or error from error

    def main(self, *args: Any, **options: Any) -> Any:
        """Parse and run with errors for people."""
        return run_cli(lambda: super(HerdCommand, self).main(*args, **{**options, "standalone_mode": False}))


class HerdGroup(HerdCommand, click.Group):
    """A command group with the same manners."""


def _missing_extra(error: ModuleNotFoundError, command: str) -> HerdError | None:
    """The error that names the extra to install, None when no extra brings the missing module.

    What each extra brings is read from the metadata of the installed herdgraph, that is from pyproject.toml. Of several
    extras the one that is called like the command is named, or else the first.
    """
    try:
        requirements = importlib.metadata.requires("herdgraph") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout that was not installed
        return None
    found = [match.groups() for text in requirements if (match := _REQUIREMENT.match(text))]
    module = (error.name or "").replace("_", "-")
    # A distribution is called like its module, with a suffix in some: cuda-bindings, tensorrt-rtx-cu13.
    named = [pair for pair in found if pair[0] == module]
    named = named or [pair for pair in found if pair[0].startswith(f"{module}-")]
    if not named:
        return None
    package, extra = next((pair for pair in named if pair[1] in command.split()), named[0])
    return HerdError(f"`{command}` needs the package {package}: pip install 'herdgraph[{extra}]'")


def run_cli(run: Callable[[], Any]) -> Any:
    """Call ``run``; what is wrong with an input, the environment or the usage ends the process with one line."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    _received.clear()
    try:
        with _signals_unwind():
            result = run()
        sys.stdout.flush()
        return result
    except Interrupted as error:
        _fail_interrupted(error, error.number)
    except Exception as error:
        if _received:  # a library took the interruption for a failure of its own
            _fail_interrupted(error, _received[0])
        _fail(error)


def _fail(error: Exception) -> NoReturn:
    """End with one line, or raise what is a defect."""
    if isinstance(error, HerdError):
        fail(str(error))
    if isinstance(error, click.ClickException):
        _fail_usage(error)
    if isinstance(error, OSError):
        _discard_output()
        fail(f"{error.filename or 'input or output'} failed: {error.strerror or error}")
    if not isinstance(error, MemoryError) and not _OUT_OF_MEMORY.search(str(error)):
        raise error
    fail("out of memory: close other programs or use a smaller model")


def _fail_interrupted(error: BaseException, number: int) -> NoReturn:
    fail("; ".join(("interrupted", *getattr(error, "__notes__", ()))), status=128 + number)


def _fail_usage(error: click.ClickException) -> NoReturn:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        sys.exit(error.exit_code)
    context = getattr(error, "ctx", None)
    hint = f" See {context.command_path} --help." if context else ""
    fail(error.format_message() + hint, status=error.exit_code)


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_received: list[int] = []
"""Signals that asked this process to end."""


@contextmanager
def _signals_unwind() -> Iterator[None]:
    """Let signals unwind the stack, so that temporary files are removed; what the caller ignores stays ignored."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, _frame: FrameType | None) -> NoReturn:
    for further in _SIGNALS:  # the way out is short, and a second signal must not cut it
        signal.signal(further, signal.SIG_IGN)
    _received.append(number)
    raise Interrupted(number)


def _discard_output() -> None:
    """Point a standard output that takes nothing more to nowhere, or Python complains when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _echo(text: str, *, err: bool) -> None:
    """Print text with its style on a terminal, without where NO_COLOR is set, which rich heeds and click does not."""
    click.echo(text, err=err, color=False if os.environ.get("NO_COLOR") else None)


def print_error(message: str) -> None:
    """Print one red line to standard error, however long."""
    _echo(click.style(f"error: {' '.join(message.split())}", fg="red"), err=True)


def print_warning(message: str) -> None:
    """Print one yellow line to standard error, however long."""
    _echo(click.style(f"warning: {' '.join(message.split())}", fg="yellow"), err=True)


def fail(message: str, *, status: int = 1) -> NoReturn:
    """Print one line to standard error and exit."""
    print_error(message)
    sys.exit(status)


def succeed(verb: str, what: str) -> None:
    """Say in one line on standard error what was made."""
    _echo(f"{click.style(verb, fg='green')} {what}", err=True)


def progress(*columns: str | ProgressColumn, quiet: bool = False) -> Progress:
    """A progress display that vanishes; where there is no terminal it would leave empty lines, and is not shown."""
    return Progress(*columns, console=stderr, disable=quiet or not stderr.is_terminal, transient=True)


def emit_json(value: Any) -> None:
    """Print one JSON document to standard output."""
    click.echo(json.dumps(value, indent=2))


def table(title: str, rows: Mapping[str, Any] | Iterable[tuple[str, Any]], *, err: bool = False) -> None:
    """Print names and values in two columns, every value whole and as it is.

    Args:
        title: printed above.
        rows: by name.
        err: print to standard error instead of standard output.
    """
    rows = list(rows.items() if isinstance(rows, Mapping) else rows)
    width = max((len(name) for name, _ in rows), default=0)
    _echo(click.style(title, italic=True), err=err)
    for name, value in rows:
        _echo(f"{click.style(name.ljust(width), bold=True)}  {value}", err=err)


def quantity(count: float) -> str:
    """A count for people: 1.5 k, 239.0 M, 108.6 B."""
    for unit in ("", " k", " M"):
        if count < 1000:
            return f"{count:.0f}{unit}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.2f} B"

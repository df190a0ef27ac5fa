"""What every command line shares: one-line errors, clean interruption, tables, JSON."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.progress import Progress, ProgressColumn

from .errors import HerdError
from .files import size
from .foreign_text import printable
from .interruption import Interrupted, received, signals_unwind
from .options import similar_options
from .progress_lines import ProgressLines, duration

__all__ = [
    "HerdCommand",
    "HerdGroup",
    "duration",
    "emit_json",
    "fail",
    "print_error",
    "print_warning",
    "progress",
    "quantity",
    "set_verbosity",
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


class HerdCommand(click.Command):
    """A command whose errors are one red line, with exit status 1, or 2 for wrong usage."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        """Parse; an option that does not exist is told with those that may be meant."""
        try:
            return super().parse_args(context, args)
        except click.NoSuchOption as error:
            known = [name for param in self.get_params(context) for name in param.opts if name.startswith("--")]
            meant = similar_options(error.option_name, known)
            message = _unknown_option(error.option_name, meant)
            raise click.NoSuchOption(error.option_name, message, ctx=context) from error

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

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands with their first sentence, however long: click cuts it at the end of the line."""
        names = self.list_commands(context)
        found = [(name, command) for name in names if (command := self.get_command(context, name))]
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.get_short_help_str(limit=1000)) for name, command in found])


def _unknown_option(name: str, meant: list[str]) -> str:
    hint = f" Did you mean {' or '.join(meant)}?" if 0 < len(meant) <= 3 else ""
    return f"No such option '{name}'.{hint}"


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
    handler = NoteHandler()
    handler.setFormatter(PrintableLines("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        with signals_unwind():
            result = run()
        sys.stdout.flush()
        return result
    except Interrupted as error:
        _fail_interrupted(error, error.number)
    except Exception as error:
        if received:  # a library took the interruption for a failure of its own
            _fail_interrupted(error, received[0])
        _fail(error)


class NoteHandler(logging.StreamHandler[Any]):
    """Shows the log on standard error: what herdgraph warns of as ``print_warning`` does, the rest as log lines."""

    def emit(self, record: logging.LogRecord) -> None:
        """Show one record."""
        if record.levelno == logging.WARNING and record.name.partition(".")[0] == __package__:
            print_warning(record.getMessage())
        else:
            super().emit(record)


class PrintableLines(logging.Formatter):
    """Log lines, which quote what others wrote."""

    def format(self, record: logging.LogRecord) -> str:
        """The lines of a record; what a terminal would act on is escaped."""
        return "\n".join(map(printable, super().format(record).split("\n")))


def set_verbosity(level: int) -> None:
    """What of herdgraph's own log is shown, and whether warnings are: a level of ``logging``."""
    logging.getLogger(__package__).setLevel(level)


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


def _discard_output() -> None:
    """Point a standard output that takes nothing more to nowhere, or Python complains when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _echo(text: str, *, err: bool) -> None:
    """Print text with its style on a terminal, without where NO_COLOR is set, which rich heeds and click does not."""
    click.echo(text, err=err, color=False if os.environ.get("NO_COLOR") else None)


def _one_line(message: str) -> str:
    return printable(" ".join(message.split()))


def print_error(message: str) -> None:
    """Print one red line to standard error, however long."""
    _echo(click.style(f"error: {_one_line(message)}", fg="red"), err=True)


def print_warning(message: str) -> None:
    """Print one yellow line to standard error, however long; nothing where only errors are wanted."""
    if logging.getLogger(__package__).isEnabledFor(logging.WARNING):
        _echo(click.style(f"warning: {_one_line(message)}", fg="yellow"), err=True)


def fail(message: str, *, status: int = 1) -> NoReturn:
    """Print one line to standard error and exit."""
    print_error(message)
    sys.exit(status)


def succeed(verb: str, what: str) -> None:
    """Say in one line on standard error what was made."""
    _echo(f"{click.style(verb, fg='green')} {printable(what)}", err=True)


def progress(*columns: str | ProgressColumn, quiet: bool = False) -> Progress:
    """A progress display that vanishes; lines where there is no terminal."""
    if not quiet and not stderr.is_terminal:
        return ProgressLines()
    console = Console(quiet=True) if quiet else stderr  # rich before 14.3 ends a disabled display with a line, too
    return Progress(*columns, console=console, disable=quiet, transient=True)


def emit_json(value: Any) -> None:
    """Print one JSON document to standard output."""
    click.echo(json.dumps(value, indent=2))


def table(title: str, rows: Mapping[str, Any] | Iterable[tuple[str, Any]], *, err: bool = False) -> None:
    """Print names and values in two columns, every value whole; what a terminal would act on is escaped.

    Args:
        title: printed above.
        rows: by name.
        err: print to standard error instead of standard output.
    """
    pairs = rows.items() if isinstance(rows, Mapping) else rows
    shown = [(printable(name), printable(value)) for name, value in pairs]
    width = max((len(name) for name, _ in shown), default=0)
    _echo(click.style(printable(title), italic=True), err=err)
    for name, value in shown:
        _echo(f"{click.style(name.ljust(width), bold=True)}  {value}", err=err)


def quantity(count: float) -> str:
    """A count for people: 1.5 k, 239.0 M, 108.6 B."""
    for unit in ("", " k", " M"):
        if count < 1000:
            return f"{count:.0f}{unit}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.2f} B"

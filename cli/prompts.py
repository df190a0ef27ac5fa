"""Where prompts come from: the command line, files, standard input."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from ..errors import HerdError
from ..options import PATH

_WAYS = "give PROMPT, -p PROMPT, -f FILE, or - for standard input"

prompt_option = click.option("-p", "--prompt", "options", multiple=True, metavar="PROMPT",
                             help="What to say, as an option; - reads standard input.")
file_option = click.option("-f", "--file", "files", type=PATH, multiple=True,
                           help="UTF-8 file with what to say; - reads standard input.")


def read_prompts(arguments: Sequence[str], options: Sequence[str], files: Sequence[Path]) -> list[str]:
    """Prompts from arguments, options and files, in this order.

    Raises:
        click.UsageError: there is none, or standard input is to be read twice.
        HerdError: a file cannot be read, or is not UTF-8.
    """
    texts = [*arguments, *options]
    if not texts and not files:
        raise click.UsageError(f"No prompt was given: {_WAYS}.", click.get_current_context(silent=True))
    if [*texts, *map(str, files)].count("-") > 1:
        raise click.UsageError("Standard input can be read once.", click.get_current_context(silent=True))
    return [*(_read_input() if text == "-" else text for text in texts), *map(_read_file, files)]


def read_prompt(argument: str | None, options: Sequence[str], files: Sequence[Path]) -> str:
    """The only prompt.

    Raises:
        click.UsageError: there is none, or more than one.
        HerdError: as ``read_prompts``.
    """
    arguments = [] if argument is None else [argument]
    if (count := len(arguments) + len(options) + len(files)) > 1:
        raise click.UsageError(f"{count} prompts were given, one is needed: {_WAYS}.",
                               click.get_current_context(silent=True))
    return read_prompts(arguments, options, files)[0]


def _read_file(path: Path) -> str:
    from ..reading import read_text

    return _read_input() if str(path) == "-" else _without_last_newline(read_text(path))


def _read_input() -> str:
    content = sys.stdin.buffer.read()
    try:
        return _without_last_newline(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise HerdError(f"standard input is not UTF-8 text (byte {error.start})") from error


def _without_last_newline(text: str) -> str:
    """Without the end of the last line, which editors and ``echo`` write and nobody means."""
    return text.removesuffix("\n").removesuffix("\r")

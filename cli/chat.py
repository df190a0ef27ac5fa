"""The chat command: a conversation on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console import HerdCommand, print_error, stderr
from ..errors import HerdError
from ..options import PATH
from .chat_input import message_reader
from .chat_options import ChatOptions
from .chat_session import ChatSession
from .options import SAMPLING, answer_options, checked_sampling, device_option
from .source import Source, source_options

if TYPE_CHECKING:
    from ..runtimes.executors.options import Memory


@click.command(cls=HerdCommand)
@click.argument("bundle", required=False, type=PATH)
@source_options
@answer_options
@device_option
def chat(
    bundle: Path | None, images: tuple[Path, ...], url: str | None, model: str | None, api_key_file: Path | None,
    raw: bool, system: str | None, threads: int | None, memory: Memory, device: str | None, **sampling: Any,
) -> None:
    """Talk with BUNDLE, or with the server at --url.

    /help lists what else can be said. On a terminal Ctrl-C stops an answer, Ctrl-D ends the chat, Alt-Enter begins a
    new line. --image belongs to the first message; with --raw every message continues one text.
    """
    given = checked_sampling(sampling)
    source = Source(bundle=bundle, url=url, model=model, api_key_file=api_key_file, threads=threads, memory=memory,
                    device=device)
    session = ChatSession(source.open(images=images, system=system, raw=raw), system=system, raw=raw,
                          options=ChatOptions(_settable(), given))
    for image in images:
        session.attach(str(image))
    stderr.print("[dim]/help lists the commands[/dim]")
    read = message_reader()
    while (message := read()) not in (None, "/quit", "/exit"):
        try:
            session.handle(message or "")
        except HerdError as error:
            print_error(str(error))


def _settable() -> list[click.Option]:
    """The sampling options of this command."""
    command = click.get_current_context().command
    return [option for option in command.params if isinstance(option, click.Option) and option.name in SAMPLING]

"""The chat command: a conversation on the terminal."""

from __future__ import annotations

import re
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console import HerdCommand, print_error, stderr
from ..errors import HerdError
from .answers import load_engine, print_stream, user_turn
from .options import PATH, sampling_options

if TYPE_CHECKING:
    from ..runtimes import Engine
    from ..runtimes.engine import Memory


@click.command(cls=HerdCommand)
@click.argument("bundle", type=PATH)
@click.option("--system", help="System message.")
@sampling_options
def chat(bundle: Path, system: str | None, threads: int | None, memory: Memory, **sampling: Any) -> None:
    """Talk with BUNDLE.

    /image FILE attaches a picture to the next message, /reset forgets, /quit ends.
    """
    engine = load_engine(bundle, threads, memory, sampling)
    session = ChatSession(engine, system, sampling)
    if isinstance(sys.stdin, TextIOWrapper):  # bytes that are not text are refused with their message
        sys.stdin.reconfigure(errors="surrogateescape")
    stderr.print("[dim]/image FILE, /reset, /quit[/dim]")
    while (line := _read_line()) is not None:
        try:
            session.handle(line)
        except HerdError as error:
            print_error(str(error))


class ChatSession:
    """What was said on the terminal, and the pictures that go with the next message.

    Args:
        engine: answers.
        system: system message, None for none.
        sampling: options of ``Engine.stream``.

    Raises:
        HerdError: the bundle has no tokenizer or chat template, or the system message is not text.
    """

    def __init__(self, engine: Engine, system: str | None, sampling: dict[str, Any]) -> None:
        self._engine, self._sampling = engine, sampling
        self._opening = [{"role": "system", "content": system}] if system else []
        self._sequence = engine.new_sequence()
        self._forget()
        engine.processor.template.encode([*self._opening, user_turn("Hello", ())], engine.processor.tokenizer)

    def handle(self, line: str) -> None:
        """Do what a line says, or answer it.

        Raises:
            HerdError: it cannot be done; the conversation stays as it was.
        """
        word, _, rest = line.partition(" ")
        if word == "/reset":
            self._forget()
        elif word == "/image":
            self._attach(rest.strip())
        elif re.fullmatch(r"/\w+", word):
            raise HerdError(f"there is no command {word}: use /image FILE, /reset or /quit")
        elif line:
            self._answer(line)

    def _forget(self) -> None:
        self._messages: list[dict[str, Any]] = list(self._opening)
        self._images: list[Any] = []

    def _attach(self, name: str) -> None:
        from ..model.processing.pictures import load_image

        if not name:
            raise HerdError("/image needs the name of a file: /image FILE")
        assert self._engine.processor.image_processor, "models without images were refused"
        self._images.append(load_image(name))

    def _answer(self, line: str) -> None:
        """Answer a message; one that cannot be answered is taken back."""
        messages = [*self._messages, user_turn(line, self._images)]
        stream = self._engine.stream(messages, sequence=self._sequence, **self._sampling)
        print_stream(stream)
        self._messages = [*messages, {"role": "assistant", "content": stream.result.text}]
        self._images = []


def _read_line() -> str | None:
    """One line from the user, None to end."""
    try:
        line = input("> ").strip()
    except EOFError:
        return None
    return None if line in ("/quit", "/exit") else line

"""The keyboard of a chat: lines with history and pasted paragraphs on a terminal, plain lines from a pipe."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO, TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

Reader = Callable[[], str | None]
"""Gives the next message, None at the end."""

_PROMPT = "> "


def is_terminal() -> bool:
    """Whether somebody sits at both ends."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def message_reader() -> Reader:
    """What reads messages here; an empty one is nothing said."""
    if is_terminal():
        return _terminal_reader()
    if isinstance(sys.stdin, TextIOWrapper):  # bytes that are not text are refused with their message
        sys.stdin.reconfigure(errors="surrogateescape")
    return _read_line


@contextmanager
def stopped_by_interrupt() -> Iterator[threading.Event]:
    """On a terminal Ctrl-C sets an event instead of ending the program; elsewhere nothing changes.

    Nothing is torn out of the middle of a computation: whoever generates looks at the event between two tokens, and
    between two chunks of a long prompt.
    """
    pressed = threading.Event()
    if not is_terminal():
        yield pressed
        return
    before = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def first_word(text: str) -> tuple[str, str]:
    """A word in the shell's spelling, quotes and escaped blanks resolved, and the rest as it is.

    A quotation without an end is no quotation: the whole text is the word.
    """
    source = StringIO(text)
    words = shlex.shlex(source, posix=True)
    words.whitespace_split, words.commenters = True, ""
    try:
        word = words.get_token() or ""
    except ValueError:
        return text, ""
    return word, source.read().strip()


def _read_line() -> str | None:
    try:
        return input(_PROMPT).strip()
    except EOFError:
        return None


def _terminal_reader() -> Reader:
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession(
        _PROMPT, history=_history(), key_bindings=_keys(), multiline=True, enable_suspend=True)

    def read() -> str | None:
        try:
            return session.prompt(handle_sigint=False).strip()
        except EOFError:
            return None

    return read


def _keys() -> KeyBindings:
    """Enter sends, Alt-Enter begins a new line, Ctrl-C clears; a pasted text stays one message."""
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def _clear(event: KeyPressEvent) -> None:
        event.current_buffer.reset()

    return keys


def _history() -> History:
    """Earlier messages, readable by their author alone; where they cannot be kept, those of this chat."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = state / "herdgraph" / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))

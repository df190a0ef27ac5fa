"""The exceptions that are meant for people."""

from __future__ import annotations


class HerdError(Exception):
    """A wrong input or environment, told in one line: what was wrong, both values, what to do.

    Command lines print the message without a traceback and exit with status 1; applications may show it as it is.
    Anything else that escapes is a defect of herdgraph.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split("\n")))  # whatever a library or a stranger put into it


class TooLongError(HerdError):
    """A prompt has more tokens than the context, or cannot have fewer."""


class StoppedError(HerdError):
    """Somebody stopped a prompt before all of it was computed; see ``Sequence.stopped_by``."""


def shown(value: object, most: int = 60) -> str:
    """A value as messages show it: its representation in one line, cut if it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= most else f"{text[:most]}…"

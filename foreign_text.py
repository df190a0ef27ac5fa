"""Text that others wrote, on its way to a terminal, which would act on some of its characters.

Names of tensors, manifests, file names and errors about them are shown with such characters escaped. An answer of a
model keeps its lines and its alphabet, and loses only what a terminal obeys.
"""

from __future__ import annotations

_REPLACEMENT = 0xFFFD
_OBEYED = {*range(0x20), 0x7F, *range(0x80, 0xA0)} - {ord("\n"), ord("\t")}
"""Control characters of ASCII and Latin-1: ESC begins a sequence, and so does 0x9B alone."""
_HARMLESS = dict.fromkeys((*_OBEYED, *range(0xD800, 0xE000)), _REPLACEMENT)


def printable(text: object) -> str:
    r"""One line of text in which what has no picture of its own is escaped as in Python: ``\x1b``, ``\n``, ``\ud800``.

    Directions of writing are escaped, too: they would make a name look like another.
    """
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in shown)


def harmless(text: str) -> str:
    """Running text without control characters but newline and tab, and without half characters."""
    return text.translate(_HARMLESS)

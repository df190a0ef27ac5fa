"""A part of a page that is made from the code: written between two marks, or compared with what is there."""

from __future__ import annotations

import sys
from pathlib import Path


def write_or_check(page: Path, begin: str, end: str, content: str) -> None:
    """Put content between two marks of a page; with ``--check`` on the command line end with 1 where it differs."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(begin)
    wanted = before + begin + content + end + rest.split(end)[1]
    if "--check" not in sys.argv:
        page.write_text(wanted, encoding="utf-8")
    elif text != wanted:
        sys.exit(f"{page.name} is not what the code says: run python tools/{Path(sys.argv[0]).name}")

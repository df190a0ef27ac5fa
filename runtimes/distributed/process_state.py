"""Whether processes of this machine live, and run."""

from __future__ import annotations

from pathlib import Path


def alive(pid: int) -> bool:
    """Whether a process runs or is stopped; one that has ended and was not waited for is not alive."""
    return _state(pid) not in "ZX"


def is_stopped(pid: int) -> bool:
    """Whether a process waits for a signal to go on."""
    return _state(pid) in "Tt"


def _state(pid: int) -> str:
    """The letter that Linux has for it; that of a process that is gone where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return "X"
    return text.rpartition(")")[2].split()[0]

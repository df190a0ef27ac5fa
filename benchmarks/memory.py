"""Memory of a process."""

from __future__ import annotations

from pathlib import Path


def peak_megabytes(process: int | str = "self") -> float:
    """Largest resident memory of a process so far, 10^6 bytes.

    Not ``getrusage``: its figure begins with what the parent process had.
    """
    return _megabytes("VmHWM", process)


def resident_megabytes(process: int | str = "self") -> float:
    """Resident memory of a process now, 10^6 bytes."""
    return _megabytes("VmRSS", process)


def _megabytes(field: str, process: int | str) -> float:
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6

"""Peak memory of a process."""

from __future__ import annotations

from pathlib import Path


def peak_megabytes(process: int | str = "self") -> float:
    """Largest resident memory of a process so far (``VmHWM``), 10^6 bytes.

    Not ``getrusage``: its figure begins with what the parent process had.
    """
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    kibibytes = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return kibibytes * 1024 / 1e6

"""The ranks that rank 0 has started: how they ended, and how they are ended."""

from __future__ import annotations

import signal
import subprocess
from contextlib import suppress
from typing import IO

from ...errors import HerdError
from .collectives import Collectives
from .process_state import alive

EXIT_REPORTED = 3
"""Exit status of a rank that has told the others why it ends."""
_LAST_WORDS = 300


class Processes:
    """The ranks that rank 0 has started.

    Args:
        started: by rank.
        errors: what each wrote to standard error.
    """

    def __init__(self, started: dict[int, subprocess.Popen[bytes]], errors: dict[int, IO[bytes]]) -> None:
        self.started, self._errors = started, errors

    def exit_report(self) -> str:
        """How ranks ended that did not say why themselves; empty when none did."""
        for process in self.started.values():
            if not alive(process.pid):  # its last threads may still be ending, and only then it says how
                with suppress(subprocess.TimeoutExpired):
                    process.wait(1.0)
        ended = {rank: code for rank, process in self.started.items()
                 if (code := process.poll()) not in (None, 0, EXIT_REPORTED)}
        return "; ".join(f"rank {rank} (process {self.started[rank].pid}) {self._how(rank, code)}"
                         for rank, code in ended.items())

    def _how(self, rank: int, code: int) -> str:
        if code < 0:
            name = signal.Signals(-code).name
            return f"was killed by {name}" + (", perhaps for lack of memory" if code == -signal.SIGKILL else "")
        self._errors[rank].seek(0)
        lines = self._errors[rank].read().decode(errors="replace").strip().splitlines()
        return f"ended with status {code}" + (f": {lines[-1][:_LAST_WORDS]}" if lines else "")

    def stop(self, grace: float) -> None:
        """Wait for them to end by themselves, then end them."""
        for process in self.started.values():
            try:
                process.wait(grace)
            except subprocess.TimeoutExpired:
                grace = 0
                process.kill()  # a stopped process would not hear anything gentler
                process.wait()
        for file in self._errors.values():
            file.close()


def abandon(error: BaseException, link: Collectives, processes: Processes | None) -> str:
    """Let the other ranks end after a failure; what is known of it."""
    reason = str(error) if isinstance(error, HerdError) else f"rank 0 was interrupted by {type(error).__name__}"
    link.fail(reason)
    exit_report = processes.exit_report() if processes else ""
    if processes:
        processes.stop(0.0)
    link.close()
    return exit_report or reason

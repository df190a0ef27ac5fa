"""Questions to libraries that may be broken, each in a process of its own: a crash there is an answer here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

SECONDS = 60.0
"""After which a probe is given up; a driver that hangs answers never."""


def run_probe(script: str, *arguments: str, seconds: float = SECONDS) -> dict[str, Any]:
    """What a script of this folder prints, a JSON document; of one that fails ``{"problem": why}``.

    Args:
        script: name of the file, which imports nothing of herdgraph.
        arguments: for it.
        seconds: that it may take.
    """
    command = [sys.executable, "-P", str(Path(__file__).with_name(script)), *arguments]
    try:
        # What libraries print goes nowhere: it would stand between the lines of a table.
        done = subprocess.run(command, capture_output=True, timeout=seconds, check=False, stdin=subprocess.DEVNULL,  # noqa: S603
                              env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})
    except subprocess.TimeoutExpired:
        return {"problem": f"no answer within {seconds:.0f} seconds"}
    except OSError as error:
        return {"problem": f"no process could be started: {error.strerror}"}
    lines = done.stdout.decode(errors="replace").splitlines()
    try:
        answer = json.loads(lines[-1])
    except (IndexError, ValueError):
        answer = None
    return answer if isinstance(answer, dict) else {"problem": _ended(done.returncode, done.stderr)}


def _ended(status: int, errors: bytes) -> str:
    """Why a probe that printed nothing ended."""
    if status < 0:
        return f"crashed ({signal.Signals(-status).name})"
    lines = errors.decode(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else f"ended with status {status}"

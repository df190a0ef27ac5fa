"""Processes that tests start."""

from __future__ import annotations

import os
from pathlib import Path


def worker_environment() -> dict[str, str]:
    """The environment of a program in this folder: it imports ``support``, and computes with one thread."""
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}

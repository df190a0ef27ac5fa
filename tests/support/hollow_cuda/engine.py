"""Engines on the hollow device: code that runs there, and what it did to the device."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent
from types import MappingProxyType
from typing import Any

import herdgraph

from .device import LONGEST, hollow_device
from .libraries import UnavailableError
from .report import Report, reports

PACKAGES = ("msgspec", "jinja2", "tokenizers", "tiktoken", "PIL")
"""That the runtime needs beside onnxruntime-gpu."""
PATHS = os.pathsep.join((str(Path(__file__).with_name("site")), str(Path(herdgraph.__file__).parents[1])))
"""Where a process on the device finds the device, and us."""


def run_engine(
    code: str, *arguments: Any, environment: Mapping[str, str] = MappingProxyType({})
) -> tuple[list[Any], dict[str, Report]]:
    """What code prints, one JSON value a line, and what happened on the device of its own process, by its marks.

    Args:
        code: finds ``Engine``, ``mark`` and ``ARGUMENTS``.
        arguments: JSON.
        environment: beside what the device needs.

    Raises:
        UnavailableError: there is no hollow device here, or its Python lacks a package.
    """
    python, libraries = hollow_device()
    needs = "; ".join(f"import {name}" for name in PACKAGES)
    if subprocess.run([python, "-c", needs], capture_output=True, check=False).returncode:
        raise UnavailableError(f"{python} lacks one of {', '.join(PACKAGES)}: `make test-cuda` installs them")
    with tempfile.TemporaryDirectory() as scratch:
        script, log = Path(scratch, "script.py"), Path(scratch, "log")
        log.touch()  # there is none where nothing reached the device
        script.write_text(f"ARGUMENTS = {list(arguments)!r}\n{dedent(code)}")
        done = subprocess.run(
            [python, Path(__file__).with_name("engine_worker.py"), script], capture_output=True, text=True, check=False,
            timeout=LONGEST, env=os.environ | environment | {
                "HOLLOW_CUDA_LOG": str(log), "HOLLOW_CUDA_LIBRARIES": str(libraries), "PYTHONPATH": PATHS})
        if done.returncode:
            raise RuntimeError(f"the engine's process ended with {done.returncode}:\n{done.stderr[-4000:]}")
        return [json.loads(line) for line in done.stdout.splitlines()], reports(log)

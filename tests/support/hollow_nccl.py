"""Compiles the hollow NCCL, and lets processes find it; see ``hollow_nccl.c``."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_suffix(".c")
NAME = "libnccl.so.2"


def compiled(directory: Path) -> Path:
    """The library in a folder of its own; a test that asks for it is skipped without gcc."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("the hollow NCCL is compiled with gcc, which is not installed")
    library = directory / NAME
    command = [compiler, "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", f"-Wl,-soname,{NAME}",
               str(SOURCE), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


def environment(library: Path, fault: str = "", version: str = "") -> dict[str, str]:
    """What a process is given that is to find the library first, and perhaps to fail."""
    found = {"LD_LIBRARY_PATH": str(library.parent), "HOLLOW_NCCL_DIR": str(library.parent)}
    return found | {f"HOLLOW_NCCL_{name}": value for name, value in (("FAULT", fault), ("VERSION", version)) if value}

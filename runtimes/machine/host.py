"""The computer itself: operating system, processor with its instruction sets, cores, memory, and Python."""

from __future__ import annotations

import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

SETS = ("avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16",
        "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2")
"""Instruction sets that decide how fast products are, as Linux calls them."""
_CPU_INFO = Path("/proc/cpuinfo")
_MEMORY_INFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class Host:
    """A computer.

    Attributes:
        system: operating system and its release.
        architecture: as the system calls it, for example ``x86_64``.
        processor: its name, as far as the system tells.
        instruction_sets: those of ``SETS`` that it has; empty where the system does not tell.
        cores: logical ones that this process may use.
        memory: bytes in all; 0 where the system does not tell.
        available: bytes that new programs may use now; 0 where the system does not tell.
        python: version and implementation.
        executable: the interpreter.
    """

    system: str
    architecture: str
    processor: str
    instruction_sets: tuple[str, ...]
    cores: int
    memory: int
    available: int
    python: str
    executable: str


def this_host() -> Host:
    """The computer that this process runs on."""
    name, sets = parse_cpu_info(_text(_CPU_INFO))
    memory, available = parse_memory_info(_text(_MEMORY_INFO))
    return Host(
        f"{platform.system()} {platform.release()}", platform.machine(), name or platform.processor() or "not told",
        sets, _cores(), memory, available, f"{platform.python_version()} ({platform.python_implementation()})",
        sys.executable,
    )


def parse_cpu_info(text: str) -> tuple[str, tuple[str, ...]]:
    """Name and instruction sets of the first processor in Linux's ``/proc/cpuinfo``, on x86 and Arm."""
    name = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    found = set(flags[1].split()) if flags else set()
    return name[1].strip() if name else "", tuple(each for each in SETS if each in found)


def parse_memory_info(text: str) -> tuple[int, int]:
    """Bytes in all and available, of Linux's ``/proc/meminfo``."""
    found = {name: int(kilobytes) << 10 for name, kilobytes in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    return found.get("MemTotal", 0), found.get("MemAvailable", 0)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

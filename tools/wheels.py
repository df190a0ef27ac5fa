"""Build the wheel of every target, and the one for any machine, into dist/.

    python tools/wheels.py

Each library is looked at: the right machine, no C++ library, and nothing newer than glibc 2.28.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parents[1]
MACHINES = {
    "manylinux_2_28_x86_64": ("ELF", 62), "manylinux_2_28_aarch64": ("ELF", 183),
    "macosx_11_0_arm64": ("Mach-O", 0x0100000C), "win_amd64": ("PE", 0x8664),
}  # fmt: skip
"""By the wheel's tag, the format of the library and the machine's number in its header."""
TRIPLES = ("x86_64-linux-gnu.2.28", "aarch64-linux-gnu.2.28", "aarch64-macos.11.0", "x86_64-windows-gnu")


def build(variables: dict[str, str]) -> Path:
    """The wheel that pip builds under some environment variables."""
    before = set((ROOT / "dist").glob("*.whl"))
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--quiet", "-w", "dist"]
    subprocess.run(command, cwd=ROOT, env=os.environ | variables, check=True)
    (built,) = set((ROOT / "dist").glob("*.whl")) - before
    return built


def machine(library: bytes) -> tuple[str, int]:
    """Format and machine of a library."""
    if library[:4] == b"\x7fELF":
        return "ELF", struct.unpack_from("<H", library, 18)[0]
    if library[:4] == b"\xcf\xfa\xed\xfe":
        return "Mach-O", struct.unpack_from("<I", library, 4)[0]
    return "PE", struct.unpack_from("<H", library, struct.unpack_from("<I", library, 60)[0] + 4)[0]


def check(wheel: Path) -> None:
    """The library of a wheel is for the machine that the tag names, and needs nothing that it may lack."""
    tag = wheel.stem.split("-")[-1]
    with ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if "/native/lib/" in name]
        libraries = [archive.read(name) for name in names]
    if tag == "any":
        assert not names, names
        return
    (library,) = libraries
    assert machine(library) == MACHINES[tag], f"{wheel.name}: {machine(library)}"
    assert not re.search(rb"libstdc\+\+|libc\+\+|libgcc", library), f"{wheel.name} needs a C++ library"
    needed = {tuple(map(int, found.split(b"."))) for found in re.findall(rb"GLIBC_([\d.]+)", library)}
    assert max(needed, default=(0,)) <= (2, 28), f"{wheel.name} needs glibc {max(needed)}"


def main() -> None:
    """Build and check all of them."""
    for old in (ROOT / "dist").glob("*.whl"):
        old.unlink()
    for variables in ({"HERDGRAPH_NATIVE": "0"}, *({"HERDGRAPH_TARGET": triple} for triple in TRIPLES)):
        start = time.perf_counter()
        wheel = build(variables)
        check(wheel)
        print(f"{wheel.name}  {wheel.stat().st_size // 1000} kB  {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()

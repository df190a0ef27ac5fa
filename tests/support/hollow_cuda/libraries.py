"""Builds the libraries that stand in for NVIDIA's: what src/ defines, and an empty function for all else.

The CUDA provider of onnxruntime-gpu takes its runtime and cuBLAS from shared libraries. Which symbols it takes is read
from the wheel that is installed, so that another release needs no edit here unless it looks at a new function's result.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path

SOURCES = Path(__file__).with_name("src")
OWN = {
    "libcudart.so.13": ("device.c", "memory.c", "streams.c", "launches.c"),
    "libcublas.so.13": ("cublas.c",),
    "libcublasLt.so.13": ("cublas_lt.c",),
    "libcurand.so.10": (),
    "libcuda.so.1": (),
}
"""What src/ has for each library that the provider names."""


class UnavailableError(Exception):
    """Why there is no hollow device on this machine, in one line."""


def build(provider: Path, include: Path) -> Path:
    """A directory with the libraries that a provider needs, built once for each wheel and each state of src/.

    Args:
        provider: ``libonnxruntime_providers_cuda.so``.
        include: headers of the CUDA runtime.

    Raises:
        UnavailableError: a tool is missing.
    """
    for tool in ("gcc", "nm"):
        if shutil.which(tool) is None:
            raise UnavailableError(f"{tool} is not installed")
    target = Path(tempfile.gettempdir()) / f"hollow-cuda-{os.getuid()}-{_key(provider, include)}"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=tempfile.gettempdir()) as scratch:
            needed = _needed(provider)
            for library in OWN:
                _compile(library, needed[library], include, Path(scratch))
            built = Path(scratch, "built")
            built.mkdir()
            for library in OWN:
                Path(scratch, library).rename(built / library)
            try:
                built.rename(target)
            except OSError:  # another process was faster
                if not target.exists():
                    raise
    return target


def _key(provider: Path, include: Path) -> str:
    """Of a wheel by its size and time, of our sources and of this file by content."""
    state = provider.stat()
    digest = hashlib.sha256(f"{provider} {state.st_size} {state.st_mtime_ns} {include}".encode())
    for path in [*sorted(SOURCES.iterdir()), Path(__file__)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _needed(provider: Path) -> dict[str, set[str]]:
    """Symbols that the provider takes from each library: versioned by its name, those of the driver unversioned."""
    needed: dict[str, set[str]] = defaultdict(set)
    for line in _run("nm", "-D", "--undefined-only", provider).splitlines():
        symbol, _, version = line.split()[-1].partition("@")
        if version in OWN:
            needed[version].add(symbol)
        elif not version and symbol.startswith("cu") and symbol[2:3].isupper():
            needed["libcuda.so.1"].add(symbol)
    return needed


def _compile(library: str, needed: set[str], include: Path, scratch: Path) -> None:
    objects = []
    for source in OWN[library]:
        objects.append(scratch / f"{library}.{source}.o")
        _run("gcc", "-std=gnu11", "-O1", "-Wall", "-Werror", "-fPIC", "-I", include, "-c", SOURCES / source,
             "-o", objects[-1])
    ours = {line.split()[-1] for path in objects for line in _run("nm", "--defined-only", path).splitlines()}
    rest = scratch / f"{library}.rest.c"
    rest.write_text("int nothing;\n" + "".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(needed - ours)))
    versions = []
    if library != "libcuda.so.1":
        script = scratch / f"{library}.map"
        script.write_text(f"{library} {{ global: *; }};\n")
        versions = [f"-Wl,--version-script={script}"]
    _run("gcc", "-shared", "-fPIC", "-o", scratch / library, f"-Wl,-soname,{library}", *versions, rest, *objects)


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr}")
    return done.stdout

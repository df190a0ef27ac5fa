"""Compile the operators with zig, which is a wheel on PyPI, for this machine or for another one.

    python -m herdgraph.runtimes.native.compile [TARGET]

The library for this machine is put where it is loaded from, that for another one into a folder below. The kernels are
compiled once per instruction set ("unit") and chosen when the library is loaded. The build backend runs this file
before anything is installed, so it needs the standard library alone.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent / "src"
FOLDER = Path(__file__).parent / "lib"
ZIG_REQUIREMENT = "ziglang>=0.17,<0.18"
INTERFACE = 2
"""Raised with every change of an operator's inputs, attributes or formats; the loader asks the library for it."""
FLAGS = (
    "-O3", "-g0", "-std=c++17", "-fPIC", "-Wall", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti",
    "-fno-threadsafe-statics", "-nostdlib++",  # zig would build the C++ library first, which takes a minute
    "-ffp-contract=off", "-fno-math-errno", f"-DINTERFACE={INTERFACE}",
)  # fmt: skip
UNITS = {
    "x86_64": {"baseline": "x86_64", "avx2": "x86_64_v3", "avx512vnni": "x86_64_v4+avx512vnni"},
    "aarch64": {"neon": "baseline", "dotprod": "baseline+dotprod"},
}
"""Per architecture, the units and the processors that they are compiled for; the first one runs everywhere."""


class CompileError(Exception):
    """The library cannot be compiled here; one line says why."""


@dataclass(frozen=True)
class Target:
    """A machine that libraries are compiled for."""

    triple: str
    """What zig calls it. It is always given: zig's default is the very processor that it runs on."""
    library: str
    """The name of the library's file."""
    wheel_tag: str
    """The platform tag of a wheel with the library."""

    @property
    def units(self) -> dict[str, str]:
        """The instruction sets that the library has, and zig's name for a processor with each."""
        return UNITS[self.triple.split("-", maxsplit=1)[0]]


TARGETS = {
    target.triple: target
    for target in (
        Target("x86_64-linux-gnu.2.28", "libherdgraph.so", "manylinux_2_28_x86_64"),
        Target("aarch64-linux-gnu.2.28", "libherdgraph.so", "manylinux_2_28_aarch64"),
        Target("aarch64-macos.11.0", "libherdgraph.dylib", "macosx_11_0_arm64"),
        Target("x86_64-windows-gnu", "herdgraph.dll", "win_amd64"),
    )
}


def this_machine() -> Target | None:
    """The target that runs here, if there is one."""
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    system = {"darwin": "macos", "win32": "windows"}.get(sys.platform, sys.platform)
    return next((target for target in TARGETS.values() if target.triple.startswith(f"{machine}-{system}")), None)


def find_target(triple: str) -> Target:
    """The target with a triple.

    Raises:
        CompileError: there is none.
    """
    if triple not in TARGETS:
        raise CompileError(f"no target {triple!r}: choose one of {', '.join(TARGETS)}")
    return TARGETS[triple]


def built_library() -> Path | None:
    """Where a library for this machine lies, whether it is there or not; None for a machine without units."""
    target = this_machine()
    return FOLDER / target.library if target else None


def folder_of(target: Target) -> Path:
    """Where the library for a target is put by hand: other machines' must not take the place of the one that runs."""
    return FOLDER if target == this_machine() else FOLDER / target.triple


def is_outdated(library: Path) -> bool:
    """Whether a library is missing or older than its sources."""
    sources = [Path(__file__), *SOURCES.iterdir()]
    return not library.exists() or library.stat().st_mtime < max(path.stat().st_mtime for path in sources)


def compile_library(target: Target, folder: Path = FOLDER) -> Path:
    """Compile the library into a folder; returns its path.

    It appears there complete: a process that has the previous one open keeps it.

    Raises:
        CompileError: zig is not installed, sources are missing, or the compiler failed.
    """
    if not importlib.util.find_spec("ziglang"):
        raise CompileError(f"no compiler: pip install '{ZIG_REQUIREMENT}'")
    if not SOURCES.is_dir():
        raise CompileError(f"{SOURCES} is missing: this installation has no sources of the operators")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Compiled beside its place, so that the last step is a renaming; Windows leaves a .pdb and a .lib behind.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".compile-") as name, _cache() as cache:
            built = _compile(target, Path(name), cache)
            return built.replace(folder / target.library)
    except OSError as error:
        raise CompileError(f"{folder} cannot be written: {error.strerror or error}") from error


def _compile(target: Target, directory: Path, cache: Path) -> Path:
    """Objects side by side, as many as there are processors, then the library."""
    plain = next(iter(target.units.values()))
    jobs = [(name, processor, "unit.cpp", f"-DUNIT={name}") for name, processor in target.units.items()]
    jobs += [(path.stem, plain, path.name, "-DNDEBUG") for path in SOURCES.glob("*.cpp") if path.name != "unit.cpp"]
    objects = [directory / f"{name}.o" for name, *_ in jobs]

    def compile_one(job: tuple[str, str, str, str], out: Path) -> None:
        _, processor, source, define = job
        _zig(target, cache, *FLAGS, f"-mcpu={processor}", define, "-c", SOURCES / source, "-o", out)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, jobs, objects))
    library = directory / target.library
    name = [f"-Wl,-install_name,@rpath/{target.library}"] if "macos" in target.triple else []  # else the path here
    _zig(target, cache, f"-mcpu={plain}", "-shared", "-s", "-nostdlib++", *name, *objects, "-lm", "-o", library)
    return library


def _zig(target: Target, cache: Path, *arguments: str | Path) -> None:
    """Run the compiler; what it says about a failure is shown, and named in one line."""
    command = [sys.executable, "-m", "ziglang", "c++", "-target", target.triple, *arguments]
    caches = {"ZIG_LOCAL_CACHE_DIR": str(cache), "ZIG_GLOBAL_CACHE_DIR": str(cache)}
    done = subprocess.run(command, env=os.environ | caches, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,  # noqa: S603
                          text=True, errors="replace", check=False)
    sys.stderr.write(done.stdout)
    if done.returncode:
        made = next((Path(part).stem for part in reversed(arguments)), "library")
        raise CompileError(f"zig failed on {made} for {target.triple} with status {done.returncode}: see above")


@contextmanager
def _cache() -> Iterator[Path]:
    """Zig's cache: kept in a checkout, for it saves time; else temporary, for a home may be read-only."""
    checkout = Path(__file__).parents[2]
    if (checkout / "pyproject.toml").exists() and os.access(checkout, os.W_OK):
        yield checkout / ".cache" / "zig"
        return
    with tempfile.TemporaryDirectory(prefix="herdgraph-zig-", ignore_cleanup_errors=True) as name:
        yield Path(name)


def main() -> None:
    """Compile for a target, or for this machine."""
    try:
        target = find_target(sys.argv[1]) if len(sys.argv) > 1 else this_machine()
        if target is None:
            raise CompileError(f"no target is {sys.platform} on {platform.machine()}: name one of {', '.join(TARGETS)}")
        print(compile_library(target, folder_of(target)))
    except CompileError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()

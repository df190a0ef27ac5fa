"""kernels_check.cpp on every unit: as it is, with sanitizers, and on emulated processors.

All slow, for each compiles a program (`make test-native`). What needs a tool that is not there is skipped: the units
themselves are tested through the operators in any case.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from herdgraph.runtimes.native import compile as native_compile

TARGET = native_compile.this_machine()
ARCHITECTURE = TARGET.triple.split("-", maxsplit=1)[0] if TARGET else ""
CHECK = Path(__file__).with_name("kernels_check.cpp")
EMULATED_VNNI = Path(__file__).with_name("emulated_vnni.h")
CACHE = Path(__file__).parents[3] / ".cache" / "zig"
FEATURES = {"baseline": set(), "avx2": {"avx2", "fma", "f16c"}, "avx512vnni": {"avx512_vnni", "avx512vl"},
            "neon": set(), "dotprod": {"asimddp"}}
UBSAN = ("-O1", "-g", "-fsanitize=undefined", "-fno-sanitize-recover=all")

pytestmark = pytest.mark.slow


def compiled(directory: Path, triple: str, unit: str, *flags: str | Path, processor: str = "") -> Path:
    """The driver with one unit, by zig; the last flag of a kind wins."""
    if not importlib.util.find_spec("ziglang"):
        pytest.skip("ziglang is not installed")
    processor = processor or native_compile.UNITS[triple.split("-", maxsplit=1)[0]][unit]
    zig = [sys.executable, "-m", "ziglang", "c++", "-target", triple, f"-mcpu={processor}"]
    caches = {"ZIG_LOCAL_CACHE_DIR": str(CACHE), "ZIG_GLOBAL_CACHE_DIR": str(CACHE)}
    return built(directory, unit, [*zig, *native_compile.FLAGS, *map(str, flags)], caches)


def built(directory: Path, unit: str, compiler: list[str], variables: dict[str, str] | None = None) -> Path:
    program = directory / "kernels_check"
    sources = [f"-I{native_compile.SOURCES}", f"-DUNIT={unit}", CHECK, native_compile.SOURCES / "unit.cpp"]
    done = subprocess.run([*compiler, *sources, "-o", program, "-lm"], env=os.environ | (variables or {}),
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return program


def passes(unit: str, command: list[str | Path], rounds: int) -> None:
    """Run it with two seeds."""
    for seed in (1, 2):
        done = subprocess.run([*command, str(rounds), str(seed)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.fullmatch(rf"{unit}: \d{{5,}} checks, 0 failures\n", done.stdout)


def skip_unless_run_here(unit: str) -> None:
    """Other processors' units are tested in qemu, or not at all."""
    flags = Path("/proc/cpuinfo")
    if flags.exists() and not FEATURES[unit] <= set(flags.read_text().split()):
        pytest.skip(f"this processor has no {unit}")


@pytest.mark.parametrize("unit", native_compile.UNITS.get(ARCHITECTURE, ()))
@pytest.mark.parametrize("flags", [(), UBSAN], ids=["as it is", "ubsan"])
def test_units_of_this_machine(unit: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    assert TARGET
    skip_unless_run_here(unit)
    passes(unit, [compiled(tmp_path, TARGET.triple, unit, *flags)], 100)


@pytest.mark.parametrize("unit", native_compile.UNITS.get(ARCHITECTURE, ()))
def test_units_under_address_sanitizer(unit: str, tmp_path: Path) -> None:
    """By Debian's clang, for zig brings no runtime of the sanitizer."""
    skip_unless_run_here(unit)
    clang = next((found for name in ("clang++-19", "clang++-20", "clang++-21") if (found := shutil.which(name))), None)
    if not clang:
        pytest.skip("clang++-19 is not installed: apt-get install clang-19")
    march = {"baseline": "x86-64", "avx2": "x86-64-v3", "avx512vnni": "x86-64-v4", "neon": "armv8-a",
             "dotprod": "armv8.2-a+dotprod"}[unit]
    extra = ["-mavx512vnni"] if unit == "avx512vnni" else []
    command = [clang, "-O1", "-g", "-std=c++17", "-fno-exceptions", "-fno-rtti", "-ffp-contract=off", f"-march={march}",
               *extra, "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    passes(unit, [built(tmp_path, unit, command)], 40)


@pytest.mark.parametrize(("unit", "processor"), [("neon", "cortex-a53"), ("neon", "max"), ("dotprod", "max")])
def test_arm_units_in_qemu(unit: str, processor: str, tmp_path: Path) -> None:
    qemu = shutil.which("qemu-aarch64-static")
    if not qemu:
        pytest.skip("qemu-aarch64-static is not installed: apt-get install qemu-user-static")
    passes(unit, [qemu, "-cpu", processor, compiled(tmp_path, "aarch64-linux-musl", unit, "-static")], 40)


@pytest.mark.skipif(ARCHITECTURE != "x86_64", reason="not an x86-64 machine")
def test_source_of_the_avx512_unit(tmp_path: Path) -> None:
    """With its one instruction spelled out; see emulated_vnni.h."""
    skip_unless_run_here("avx2")
    assert TARGET
    flags = ("-include", EMULATED_VNNI, "-Wno-psabi")
    passes("avx512vnni", [compiled(tmp_path, TARGET.triple, "avx512vnni", *flags, processor="x86_64_v3")], 40)

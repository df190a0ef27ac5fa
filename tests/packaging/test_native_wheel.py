"""Wheels with compiled operators, and installations where they cannot be compiled."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import pytest

from herdgraph.runtimes.native import compile as native_compile

Pip = Callable[..., "subprocess.CompletedProcess[str]"]
BuildWheel = Callable[..., Path]
TARGET = native_compile.this_machine()
pytestmark = pytest.mark.skipif(TARGET is None, reason="no operators for this machine")


def test_wheel_has_the_library_and_the_tag_of_its_platform(wheel: Path, native_wheel: Path, tmp_path: Path) -> None:
    assert TARGET
    assert native_wheel.name == wheel.name.replace("-any.whl", f"-{TARGET.wheel_tag}.whl")
    library = f"herdgraph/runtimes/native/lib/{TARGET.library}"
    with ZipFile(wheel) as pure, ZipFile(native_wheel) as native:
        assert set(native.namelist()) - set(pure.namelist()) == {library}
        about = next(name for name in native.namelist() if name.endswith("/WHEEL"))
        assert f"Root-Is-Purelib: false\nTag: py3-none-{TARGET.wheel_tag}\n" in native.read(about).decode()
        assert "Root-Is-Purelib: true\nTag: py3-none-any\n" in pure.read(about).decode().replace("\r", "")
        path = native.extract(library, tmp_path)
    unit = ctypes.CDLL(path).herdgraph_unit
    unit.restype = ctypes.c_char_p
    assert unit().decode() in TARGET.units


def test_wheel_installs_and_names_its_unit(native_wheel: Path, tmp_path: Path) -> None:
    """What pip's own reading of names, tags and records says about it."""
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", tmp_path, native_wheel]
    subprocess.run(command, check=True)
    code = "from herdgraph.runtimes.native.library import library_path, unit; print(library_path()); print(unit())"
    environment = {"PYTHONPATH": f"{tmp_path}:{sysconfig.get_path('purelib')}", "PATH": ""}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True,
                           check=True).stdout.splitlines()
    assert TARGET
    assert Path(shown[0]).is_relative_to(tmp_path)
    assert shown[1] in TARGET.units


@pytest.fixture
def without_ziglang(tmp_path: Path) -> str:
    """A PYTHONPATH on which the compiler is not to be had."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name == 'ziglang' else find(name, package)\n")
    return f"{tmp_path}:{':'.join(path for path in sys.path if 'site-packages' in path)}"


def test_without_a_compiler_the_wheel_is_for_any_machine(pip: Pip, without_ziglang: str, tmp_path: Path) -> None:
    done = pip("wheel", ".", "-w", tmp_path, "-v", PYTHONPATH=without_ziglang)
    assert done.returncode == 0
    assert [path.name.split("-", 2)[2] for path in tmp_path.glob("*.whl")] == ["py3-none-any.whl"]
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if "native operators" in line]
    assert lines == [f"herdgraph: no native operators, bundles will run on the runtime's own: no compiler: pip install"
                     f" '{native_compile.ZIG_REQUIREMENT}'"]


def test_a_target_asked_for_by_name_is_not_left_out(pip: Pip, tmp_path: Path) -> None:
    done = pip("wheel", ".", "-w", tmp_path, HERDGRAPH_TARGET="riscv64-linux")
    assert done.returncode != 0
    assert "error: no target 'riscv64-linux': choose one of x86_64-" in done.stdout + done.stderr
    assert not list(tmp_path.glob("*.whl"))


@pytest.mark.slow
@pytest.mark.parametrize("triple", native_compile.TARGETS)
def test_wheels_for_other_machines(build_wheel: BuildWheel, triple: str, tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, HERDGRAPH_TARGET=triple)
    assert wheel.name.endswith(f"-py3-none-{native_compile.TARGETS[triple].wheel_tag}.whl")


@pytest.mark.usefixtures("native_wheel")  # which filled the compiler's cache
def test_editable_install_compiles_only_what_is_outdated(source: Path, pip: Pip, tmp_path: Path) -> None:
    """Of the copy; the second time nothing is compiled."""
    assert TARGET
    library = source / "runtimes" / "native" / "lib" / TARGET.library
    stamps = []
    for _ in range(2):
        done = pip("install", "-e", ".", "--target", tmp_path / "site", "--upgrade")
        assert done.returncode == 0, done.stdout + done.stderr
        stamps.append(library.stat().st_mtime_ns)
    assert stamps[0] == stamps[1]

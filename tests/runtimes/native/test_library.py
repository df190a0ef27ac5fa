"""The library that is loaded is this machine's and this version's."""

from __future__ import annotations

import _ctypes
from pathlib import Path

import pytest

from herdgraph.errors import HerdError
from herdgraph.runtimes.native import compile as native_compile
from herdgraph.runtimes.native import library


def test_the_built_library_has_the_interface(built_library: Path) -> None:
    assert library.library_path() == built_library
    assert library.unit() in native_compile.UNITS["x86_64"] | native_compile.UNITS["aarch64"]


def test_another_versions_library_is_refused(built_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = native_compile.INTERFACE
    monkeypatch.setattr(native_compile, "INTERFACE", 999)
    with pytest.raises(HerdError, match=rf"{built_library} has version {version} of the operators, "
                                        r"this herdgraph needs 999: compile it again with python -m herdgraph\."):
        library.library_path()


def test_a_library_without_a_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_compile, "built_library", lambda: Path(_ctypes.__file__))
    with pytest.raises(HerdError, match=r"has version 0 of the operators, this herdgraph needs \d+: compile it again"):
        library.library_path()


def test_what_is_no_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libherdgraph.so").write_text("text")
    monkeypatch.setattr(native_compile, "built_library", lambda: tmp_path / "libherdgraph.so")
    with pytest.raises(HerdError, match=r"libherdgraph\.so cannot be loaded \(.*\): compile it again"):
        library.library_path()


@pytest.mark.parametrize("triple", native_compile.TARGETS)
def test_libraries_for_other_machines_lie_elsewhere(
    triple: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compile_library(target: native_compile.Target, folder: Path) -> Path:
        return folder / target.library

    monkeypatch.setattr(native_compile, "compile_library", compile_library)
    monkeypatch.setattr("sys.argv", ["compile", triple])
    native_compile.main()
    made, target = Path(capsys.readouterr().out.strip()), native_compile.TARGETS[triple]
    here = target == native_compile.this_machine()
    assert (made == native_compile.built_library()) == here
    assert made.parent == native_compile.FOLDER / ("" if here else triple)

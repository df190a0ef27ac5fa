"""What is installed is read from metadata: versions against ranges, extras, and which onnxruntime lies on top."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from herdgraph.runtimes.machine.cuda_checks import package_objection
from herdgraph.runtimes.machine.onnxruntime_package import find_onnxruntime
from herdgraph.runtimes.machine.packages import Requirement, allows, extras, importable, release


@pytest.mark.parametrize(("bounds", "version", "allowed"), [
    (">=1.24.1,<2", "1.32.0", True), (">=1.24.1,<2", "1.24.0", False), (">=1.24.1,<2", "2.0.0", False),
    ("==2.13.*", "2.13.0+cu130", True), ("==2.13.*", "2.12.9", False), ("==1.7.1.116", "1.7.1.116", True),
    (">=1.31,<1.33", "1.33.0", False), (">=13,<14", "13.5.37", True), (">=2.1", "2.1.0", True), ("", "1", True),
    ("~=1.2", "9", True),
])
def test_ranges(bounds: str, version: str, *, allowed: bool) -> None:
    assert allows(bounds, version) is allowed


def test_release_numbers() -> None:
    assert (release("2.13.0+cu130"), release("1.0rc1"), release("unknown")) == ((2, 13, 0), (1, 0), ())


def test_problems_of_requirements() -> None:
    assert Requirement("numpy", ">=2.1").problem is None
    assert Requirement("herdgraph-nowhere", ">=1").problem == "herdgraph-nowhere is not installed"
    assert "is installed, <1 is needed" in str(Requirement("numpy", "<1").problem)


def test_extras_are_those_of_the_checkout() -> None:
    found = extras()
    assert {"cpu", "gpu", "build", "train", "serve", "cluster", "tensorrt", "tensorrt-rtx"} <= set(found)
    assert found["build"].problems == ()
    assert "torch" in found["build"].installed
    assert found["gpu"].cure == "pip install 'herdgraph[gpu]'"


def _install(site: Path, name: str, version: str) -> None:
    """Metadata of a package, and the files that both packages of onnxruntime have."""
    metadata = site / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (site / "onnxruntime" / "capi").mkdir(parents=True, exist_ok=True)
    (site / "onnxruntime" / "__init__.py").touch()
    cuda = "cuda_version = '13.0'\n" if name.endswith("gpu") else ""
    (site / "onnxruntime" / "capi" / "build_and_package_info.py").write_text(
        f"package_name = '{name}'\n__version__ = '{version}'\n{cuda}")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    return tmp_path


def test_no_onnxruntime(site: Path) -> None:
    found = find_onnxruntime()
    assert (found.installed, found.package, found.directory, found.clash) == ({}, None, None, None)
    assert not importable("onnxruntime")


def test_onnxruntime_for_gpus(site: Path) -> None:
    _install(site, "onnxruntime-gpu", "1.31.1")
    found = find_onnxruntime()
    assert (found.package, found.version, found.cuda) == ("onnxruntime-gpu", "1.31.1", (13, 0))
    assert found.clash is None


@pytest.mark.parametrize("last", ["onnxruntime", "onnxruntime-gpu"])
def test_the_package_that_came_last_lies_on_top(site: Path, last: str) -> None:
    for name in sorted(("onnxruntime", "onnxruntime-gpu"), key=lambda name: name == last):
        _install(site, name, "1.31.1")
    found = find_onnxruntime()
    assert found.package == last
    assert f"overwrite each other's files, those of {last} are there now" in str(found.clash)
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in str(found.clash)


def test_a_package_behind_the_other_on_the_search_path_is_no_clash(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a newer onnxruntime-gpu lies in a folder of PYTHONPATH, before the machine's own onnxruntime."""
    _install(site / "first", "onnxruntime-gpu", "1.31.1")
    _install(site / "second", "onnxruntime", "1.30.0")
    monkeypatch.setattr(sys, "path", [str(site / "first"), str(site / "second")])
    found = find_onnxruntime()
    assert (found.installed, found.clash) == ({"onnxruntime-gpu": "1.31.1"}, None)


def test_files_that_are_gone(site: Path) -> None:
    _install(site, "onnxruntime-gpu", "1.31.1")
    shutil.rmtree(site / "onnxruntime")
    found = find_onnxruntime()
    assert (found.installed, found.directory) == ({"onnxruntime-gpu": "1.31.1"}, None)
    assert "its files are gone" in str(package_objection(found))

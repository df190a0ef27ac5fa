"""What the wheel holds, and that `python -m build` does not start a build of ours by surprise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
NOT_INSTALLED = (".ci", "benchmarks", "deploy", "docs", "examples", "tests", "tools")
"""Folders of the repository that belong to the checkout alone."""


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path, source_files: list[Path]) -> None:
    """Every module and data file of the tree, and no test, benchmark, example or cache."""
    with ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    installed = [path for path in source_files if path.parts[0] not in NOT_INSTALLED]
    expected = {path for path in installed if path.parent != Path() or path.suffix == ".py" or path.name == "py.typed"}
    assert found == {f"herdgraph/{path.as_posix()}" for path in expected}
    assert {"herdgraph/build.py", "herdgraph/py.typed", "herdgraph/runtimes/engine.py"} <= found


def test_wheel_is_small(wheel: Path) -> None:
    """An edge box downloads the runtime and no demo: the checkpoint of the calf alone is more than 2 MB."""
    assert wheel.stat().st_size < 2_000_000


def test_wheel_installs_the_command_and_the_licence(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        about = {name.partition(".dist-info/")[2]: archive.read(name).decode() for name in archive.namelist()
                 if ".dist-info/" in name}
    assert "herdgraph = herdgraph.cli:main" in about["entry_points.txt"]
    assert "Apache License" in about["licenses/LICENSE"]
    assert "Requires-Python: >=3.11" in about["METADATA"]


@pytest.mark.parametrize("arguments", [[], ["--version"], ["--wheel", "--outdir", "dist"], ["."]])
def test_python_m_build_names_what_was_found(arguments: list[str]) -> None:
    """In the root of a checkout our build.py hides PyPA's builder of the same name."""
    command = [sys.executable, "-m", "build", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: `python -m build` finds herdgraph's own build.py here: run `pip wheel .")
    assert done.stderr.count("\n") == 1

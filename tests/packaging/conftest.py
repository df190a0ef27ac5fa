"""The wheels, built once from a copy of the files that git knows, so that the tree stays as it is."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
Pip = Callable[..., "subprocess.CompletedProcess[str]"]
BuildWheel = Callable[..., Path]


@pytest.fixture(scope="session")
def source_files() -> list[Path]:
    """Every file of the tree that git tracks or would add, relative to the root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="session")
def source(source_files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, in a path with spaces; it shares the compiler's cache."""
    directory = tmp_path_factory.mktemp("a copy") / "of the source"
    directory.mkdir()
    (ROOT / ".cache").mkdir(exist_ok=True)
    (directory / ".cache").symlink_to(ROOT / ".cache")
    for name in source_files:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, directory / name)
    return directory


@pytest.fixture(scope="session")
def pip(source: Path) -> Pip:
    """Runs pip in the copy, without isolation, under some environment variables."""

    def run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pip", *arguments, "--no-deps", "--no-build-isolation"]
        variables = os.environ | variables
        return subprocess.run(command, cwd=source, env=variables, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="session")
def build_wheel(pip: Pip) -> BuildWheel:
    """Builds into a directory under some environment variables; returns the wheel."""

    def build(directory: Path, **variables: str) -> Path:
        done = pip("wheel", ".", "-w", directory, **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        (found,) = directory.glob("*.whl")
        return found

    return build


@pytest.fixture(scope="session")
def wheel(build_wheel: BuildWheel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel for any machine."""
    return build_wheel(tmp_path_factory.mktemp("pure"), HERDGRAPH_NATIVE="0")


@pytest.fixture(scope="session")
def native_wheel(build_wheel: BuildWheel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that `pip wheel .` builds here, in an environment without a compiler of the system or a home."""
    if not importlib.util.find_spec("ziglang"):
        pytest.skip("ziglang is not installed")
    return build_wheel(tmp_path_factory.mktemp("native"), PATH="/nonexistent", HOME="/nonexistent")

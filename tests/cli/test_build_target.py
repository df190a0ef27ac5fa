"""The build command's target: our own operators where they are installed, unless somebody asks for another."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from herdgraph import build
from herdgraph.cli import main
from support import herds


def _dry_run(tmp_path: Path, *arguments: str) -> Result:
    herds.save(herds.variant(), tmp_path / "checkpoint")
    return CliRunner().invoke(main, ["build", str(tmp_path / "checkpoint"), "-o", str(tmp_path / "b"), "--dry-run",
                                     *arguments])


@pytest.mark.parametrize(("library", "arguments", "target", "told"), [
    (Path("library.so"), [], "cpu,", False),
    (None, [], "cpu-stock,", True),
    (None, ["--target", "cpu"], "cpu,", False),
    (Path("library.so"), ["--target", "cpu-stock"], "cpu-stock,", False),
])
def test_target(
    library: Path | None, arguments: list[str], target: str, told: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "library_path", lambda: library)
    done = _dry_run(tmp_path, *arguments)
    assert done.exit_code == 0, done.output
    words = done.output.split()
    assert words[words.index("target") + 1] == target
    assert ("own CPU operators are not installed here: building for cpu-stock" in " ".join(words)) == told

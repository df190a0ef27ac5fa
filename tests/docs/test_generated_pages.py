"""Pages that are made from the code say what the code says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("tool", ["structure.py", "passes_table.py"])
def test_page_is_up_to_date(tool: str) -> None:
    command = [sys.executable, ROOT / "tools" / tool, "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = "model|export|runtimes|calibration|cli|tests|benchmarks|examples|tools|docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_paths_in_pages_exist(page: Path) -> None:
    """A path of this repository that a page names in code is there."""
    named = re.findall(rf"`((?:{FOLDERS})/[\w/.-]+)", page.read_text(encoding="utf-8"))
    assert [path for path in named if not (ROOT / path.rstrip("./")).exists()] == []


def test_links_in_the_readme_exist() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []

"""Pages that are made from the code say what the code says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from support import graphs

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("tool", ["structure.py", "passes_table.py", "memory_table.py"])
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


def test_the_example_of_a_pass_works() -> None:
    """The pass and the test that docs/add-a-pass-or-target.md shows, run as they stand there."""
    text = (ROOT / "docs" / "add-a-pass-or-target.md").read_text(encoding="utf-8")
    a_pass, its_test = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    package = {"__package__": "herdgraph.export.passes.layout", "np": np, "graphs": graphs}
    exec(compile(a_pass, "add-a-pass-or-target.md", "exec"), package)
    exec(compile(its_test, "add-a-pass-or-target.md", "exec"), package)
    package["test_squares_become_products"]()

"""Write docs/structure.md: every package and module with the first sentence of its docstring.

    python tools/structure.py [--check]

With ``--check`` nothing is written; the exit status is 1 when the page is not what the code says.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "structure.md"
ORDER = ("", "cli", "model", "export", "calibration", "runtimes", "benchmarks", "examples", "tools")
HEAD = """\
# Where everything is

The repository root is the import package `herdgraph`. This page is made of the modules' own docstrings
(`python tools/structure.py`; a test compares).

A module imports only what its package's row allows; `tests/test_layers.py` computes the import graph, in-function and
type-checking imports included, and fails on any other arrow and on any circle.

| package | may import |
|---|---|
| `errors.py`, `files.py`, `console.py` | nothing of ours but one another, in this order |
| `model/` | `errors`, `files` |
| `runtimes/` | of `model/` only `config` and `processing`: it never loads torch |
| `calibration/` | `model/` |
| `export/` | `model/`, `runtimes/` |
| `build.py`, `cli/` | all of these |

"""


def first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring, on one line."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())
    end = text.find(". ")
    return (text if end < 0 else text[: end + 1]).replace("|", "\\|")


def page() -> str:
    """The whole page."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "*.py"], cwd=ROOT, capture_output=True,
                            text=True, check=True).stdout.splitlines()
    folders: dict[str, list[Path]] = defaultdict(list)
    for name in sorted(set(listed)):
        if (ROOT / name).exists() and name.split("/")[0] != "tests":
            folders["/".join(name.split("/")[:-1])].append(ROOT / name)
    parts = [HEAD]
    for folder in sorted(folders, key=lambda name: (ORDER.index(name.split("/")[0]), name)):
        parts.append(section(folder, folders[folder]))
    return "".join(parts)


def section(folder: str, files: list[Path]) -> str:
    """One folder: its own docstring and a row for every module."""
    about = [path for path in files if path.name == "__init__.py"]
    rows = [path for path in files if path.name != "__init__.py"]
    title = f"## {folder}/\n\n" if folder else "## The root\n\n"
    text = title + "".join(f"{first_sentence(path)}\n\n" for path in about)
    if rows:
        text += "| file | what it is |\n|---|---|\n"
        text += "".join(f"| `{path.name}` | {first_sentence(path)} |\n" for path in rows) + "\n"
    return text


def main() -> None:
    """Write the page, or compare it."""
    text = page().rstrip("\n") + "\n"
    if "--check" not in sys.argv:
        PAGE.write_text(text, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != text:
        sys.exit("docs/structure.md is not what the modules say: run python tools/structure.py")


if __name__ == "__main__":
    main()

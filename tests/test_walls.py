"""The walls between the rooms."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "onnx", "onnx_ir", "onnxscript", "transformers", "safetensors"}


@pytest.mark.parametrize("module", [
    "herdgraph", "herdgraph.runtimes", "herdgraph.model.config", "herdgraph.model.processing",
    "herdgraph.model.config.parameter_counts", "herdgraph.cli",
])
def test_light_modules_import_nothing_heavy(module: str) -> None:
    code = f"import {module}, sys; print(*sorted({HEAVY!r} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert found == []


def _rooms_imported_by(path: Path) -> set[str]:
    """Modules of this project that a file imports, as dotted paths from the root."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            found.add(".".join((*base, *(node.module or "").split("."))).strip("."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("herdgraph."):
            found.add(str(node.module).removeprefix("herdgraph."))
    return found


ALLOWED = {
    "model": ("model", "errors", "files"),
    "export": ("export", "model", "runtimes.bundle", "runtimes.shards", "errors", "files", ""),
    "runtimes": ("runtimes", "model.config", "model.facts", "model.names", "model.processing", "model.shard_plan",
                 "errors", "files"),
}


@pytest.mark.parametrize("room", ALLOWED)
def test_no_arrow_leaves_a_room_but_through_its_doors(room: str) -> None:
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        for imported in _rooms_imported_by(path):
            allowed = any(imported == door or imported.startswith(f"{door}.") for door in ALLOWED[room])
            assert allowed, f"{path.relative_to(ROOT)} imports {imported}"

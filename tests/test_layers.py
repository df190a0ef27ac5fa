"""The layering: which package may import which, no circle between modules, and folders that never load torch.

Every import counts: at the top of a module, inside a function, and under ``TYPE_CHECKING``.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GROUND = ("errors", "files", "reading", "options", "console", "plotting")
MODEL_WITHOUT_TORCH = ("model.config", "model.processing")

ALLOWED: dict[str, tuple[str, ...]] = {
    "errors": (),
    "files": ("errors",),
    "reading": ("errors",),
    "foreign_text": (),
    "interruption": (),
    "options": (),
    "progress_lines": ("foreign_text",),
    "console": ("errors", "files", "foreign_text", "interruption", "options", "progress_lines"),
    "plotting": (),
    "model": ("model", "errors", "files", "reading"),
    "runtimes": ("runtimes", *MODEL_WITHOUT_TORCH, "errors", "files", "reading"),
    "calibration": ("calibration", "model", "", *GROUND),
    "export": ("export", "model", "runtimes", "", "errors", "files", "reading"),
    "build": ("export", "model", "runtimes", *GROUND),
    "cli": ("cli", "build", "export", "calibration", "runtimes", "model", "", "foreign_text", *GROUND),
    "__main__": ("cli",),
    "lm_eval_model": ("runtimes", "errors"),
    "": ("runtimes", "errors"),
}
"""What each package or top-level module may import: prefixes of modules; "" is the package's own ``__init__``."""

INSIDE_MODEL: dict[str, tuple[str, ...]] = {
    "model.config": (),
    "model.processing": ("model.config",),
    "model.checkpoint": ("model.config",),
    "model.quantization": ("model.config", "model.checkpoint"),
    "model.llama4": ("model.config", "model.checkpoint"),
    "model.data": ("model.config", "model.processing"),
    "model.upcycle": ("model.config", "model.checkpoint", "model.processing", "model.llama4"),
    "model.training": tuple(f"model.{name}" for name in (
        "config", "processing", "checkpoint", "quantization", "llama4", "data", "upcycle")),
}
"""What each folder of ``model/`` may import of the others."""

TORCH_FREE = (*GROUND, "cli", "build", "export.inspection", "runtimes", *MODEL_WITHOUT_TORCH)
HEAVY = {"torch", "onnx", "onnx_ir", "onnxscript", "transformers", "safetensors", "torchao", "gguf"}


@cache
def modules() -> dict[str, Path]:
    """All modules of the package by their dotted path from the root."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "*.py"], cwd=ROOT, capture_output=True,
                            text=True, check=True).stdout.splitlines()
    names = {path.removesuffix(".py").replace("/", ".").removesuffix("__init__").removesuffix("."): ROOT / path
             for path in listed if path.split("/")[0] not in ("tests", "benchmarks", "examples", "tools", "docs")}
    return {name: path for name, path in names.items() if path.exists()}


def imported_names(name: str) -> Iterator[str]:
    """Every ``from x import y`` of a module as ``x.y``, relative to the root; other packages are left out."""
    path = modules()[name]
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base: tuple[str, ...] = package[: len(package) - node.level + 1]
        elif (node.module or "").split(".")[0] == "herdgraph":
            base = ()
        else:
            continue
        parts = (*base, *(part for part in (node.module or "").split(".") if part and part != "herdgraph"))
        yield from (".".join((*parts, alias.name)) for alias in node.names)


@cache
def arrows() -> dict[str, frozenset[str]]:
    """The modules that each module imports."""
    return {name: frozenset(found if found in modules() else found.rpartition(".")[0] for found in imported_names(name))
            - {name} for name in modules()}


def below(name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a module is one of some packages or lies in one."""
    return any(name == prefix or (prefix and name.startswith(f"{prefix}.")) for prefix in prefixes)


def test_the_graph_is_the_real_one() -> None:
    """The parser finds what is known to be there, so that the tests below cannot pass on nothing."""
    assert len(modules()) > 200
    assert "runtimes.engine" in arrows()["runtimes"]
    assert "errors" in arrows()["files"]
    assert sum(map(len, arrows().values())) > 800


def test_imports_form_no_circle() -> None:
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, "circle: " + " -> ".join((*trail[trail.index(name):], name))
        if name not in done:
            for other in sorted(arrows().get(name, ())):
                visit(other, (*trail, name))
            done.add(name)

    for name in modules():
        visit(name, ())


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_only_what_lies_below(package: str) -> None:
    ours = [name for name in modules() if name.split(".")[0] == package]
    assert ours
    wrong = [f"{name} imports {other or 'herdgraph'}" for name in ours for other in arrows()[name]
             if not below(other, ALLOWED[package])]
    assert wrong == []


def test_every_module_has_a_layer() -> None:
    assert {name.split(".")[0] for name in modules()} == set(ALLOWED)
    folders = {".".join(name.split(".")[:2]) for name in modules() if name.startswith("model.")}
    assert folders == set(INSIDE_MODEL)


@pytest.mark.parametrize("folder", INSIDE_MODEL)
def test_folders_of_model_import_only_what_lies_below(folder: str) -> None:
    wrong = [f"{name} imports {other}" for name in modules() if below(name, (folder,)) for other in arrows()[name]
             if other.startswith("model") and not below(other, (folder, *INSIDE_MODEL[folder]))]
    assert wrong == []


def test_torch_free_folders_load_nothing_heavy() -> None:
    """In one process: every module of these folders is imported, and none of the heavy packages came along."""
    names = [f"herdgraph.{name}" for name in sorted(modules()) if below(name, TORCH_FREE)]
    assert len(names) > 60
    code = ("import importlib, sys\n"
            f"for name in {names!r}:\n    importlib.import_module(name)\n"
            f"print(*sorted({HEAVY!r} & set(sys.modules)))")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert found == []


@cache
def defined_in(place: Path) -> frozenset[str]:
    """What a module or package of ours has to import: modules, and names that its top level binds."""
    path = place.with_suffix(".py") if place.with_suffix(".py").exists() else place / "__init__.py"
    below_it = {other.stem for other in place.glob("*")} if place.is_dir() else set[str]()
    if not path.exists():
        return frozenset(below_it)
    text = path.read_text(encoding="utf-8")
    bound = {name for node in ast.walk(ast.parse(text)) for name in _bound_by(node)}
    return frozenset(below_it | bound | set(re.findall(r'"(\w+)"', text) if "__getattr__" in bound else ()))


def _bound_by(node: ast.AST) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    return [node.id] if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else []


def _imported_from_us(file: str) -> Iterator[tuple[Path, str]]:
    """Every ``from place import name`` of a file whose place is ours."""
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        base = (ROOT / file).parents[node.level - 1] if node.level else ROOT
        parts = (node.module or "").split(".")
        if node.level or parts[0] in ("herdgraph", "tests", "benchmarks", "examples"):
            place = base.joinpath(*(part for part in parts if part not in ("", "herdgraph")))
            yield from ((place, alias.name) for alias in node.names)


def test_benchmarks_examples_and_tools_import_what_exists() -> None:
    """They are not run by the suite, so that a move or another name could break them unseen."""
    listed = subprocess.run(["git", "ls-files", "benchmarks/*.py", "examples/*.py", "tools/*.py"], cwd=ROOT,
                            capture_output=True, text=True, check=True).stdout.splitlines()
    found = [(file, place, name) for file in listed for place, name in _imported_from_us(file)]
    assert len(found) > 500
    assert [f"{file}: {name} of {place.relative_to(ROOT)}" for file, place, name in found
            if name not in defined_in(place)] == []

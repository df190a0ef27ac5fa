"""Who takes part in ``benchmarks.compare``: bundles of ours and other runtimes, with the files they need.

Files are made in ``.cache/bench`` when they are missing or were made of other weights or by other code.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from herdgraph.console import stderr
from herdgraph.errors import HerdError

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache" / "bench"
OPPONENTS = ("transformers", "llama.cpp", "openvino")
KINDS = ("Q8_0", "Q4_0")


@dataclass(frozen=True)
class Contestant:
    """Who is measured.

    Attributes:
        name: as printed.
        ours: a bundle of ours.
        python: interpreter of the worker.
        worker: module of the worker.
        model: file or directory that it loads.
        variant: passed to the worker.
    """

    name: str
    ours: bool
    python: str
    worker: str
    model: Path
    variant: str = ""


def ours(checkpoint: Path, recipes: Iterable[str]) -> list[Contestant]:
    """Bundles of a checkpoint, built when there is none of today's code; ``int8+int8`` has 8-bit caches."""
    found = []
    for recipe in recipes:
        bundle, (precision, _, kv) = CACHE / f"{checkpoint.name}-{recipe}", recipe.partition("+")
        command = [sys.executable, "build.py", str(checkpoint), "-o", str(bundle), "--recipe", precision, "--overwrite",
                   *(["--kv", kv] if kv else [])]
        _make(bundle, command, [checkpoint, ROOT / "export", ROOT / "model"])
        found.append(Contestant(f"herdgraph {recipe}", True, sys.executable, "herdgraph_worker", bundle))
    return found


def transformers(checkpoint: Path, *, bf16: bool) -> list[Contestant]:
    """Transformers in one or two number formats."""
    return [
        Contestant(f"transformers {name}", False, sys.executable, "transformers_worker", checkpoint, dtype)
        for name, dtype in [("fp32", "float32"), ("bf16", "bfloat16")][: 2 if bf16 else 1]
    ]


def llama_cpp(checkpoint: Path, python: str) -> list[Contestant]:
    """llama.cpp in two number formats; flash attention is decided by ``faster_variant``."""
    return [Contestant(f"llama.cpp {kind}", False, python, "llama_cpp_worker", gguf_file(checkpoint, kind))
            for kind in KINDS]


def llama_builds(checkpoint: Path, builds: Iterable[str]) -> list[Contestant]:
    """Builds of llama.cpp or its forks, given as NAME=DIRECTORY, in two number formats."""
    found = []
    for build in builds:
        name, _, directory = build.partition("=")
        found += [Contestant(f"{name} {kind}", False, sys.executable, "llama_bench_worker", gguf_file(checkpoint, kind),
                             str(Path(directory).resolve())) for kind in KINDS]
    return found


def check_llama_build(build: str) -> None:
    """Refuse what is no NAME=DIRECTORY of a build, before minutes go by."""
    _, _, directory = build.partition("=")
    if not (Path(directory) / "bin" / "llama-bench").is_file():
        raise HerdError(f"--llama-build {build}: there is no bin/llama-bench in {directory or 'it'}")


def gguf_file(checkpoint: Path, kind: str) -> Path:
    """The checkpoint's weights for llama.cpp, made when there is no such file of today's code."""
    file = CACHE / f"{checkpoint.name}-{kind}.gguf"
    command = [sys.executable, "-m", "benchmarks.gguf_export", str(checkpoint), str(file), "--kind", kind]
    _make(file, command, [checkpoint, ROOT / "benchmarks" / "gguf_export.py"])
    return file


def _make(target: Path, command: list[str], sources: list[Path]) -> None:
    """Run a command unless its sources are those that the target was made of."""
    stamp, mark = _stamp(sources), target.with_name(f"{target.name}.stamp")
    if target.exists() and mark.exists() and mark.read_text(encoding="utf-8") == stamp:
        return
    stderr.print(f"[dim]making {target.name}[/dim]")
    CACHE.mkdir(parents=True, exist_ok=True)
    mark.unlink(missing_ok=True)
    made = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    if made.returncode:
        raise HerdError(f"making {target} failed: {last_line(made.stderr)}")
    mark.write_text(stamp, encoding="utf-8")


def _stamp(sources: list[Path]) -> str:
    """A hash that changes with code, and with size and date of weights."""
    digest = hashlib.sha256()
    for source in sources:
        for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
            if path.is_file() and "__pycache__" not in path.parts:
                stat = path.stat()
                content = path.read_bytes() if path.suffix == ".py" else f"{stat.st_size} {stat.st_mtime_ns}".encode()
                digest.update(str(path.relative_to(source.parent)).encode() + content)
    return digest.hexdigest()


def has_module(python: str, module: str) -> bool:
    """Whether an interpreter can import a module."""
    if python == sys.executable:
        return importlib.util.find_spec(module) is not None
    command = [python, "-c", f"import {module}"]
    try:
        return subprocess.run(command, check=False, capture_output=True, cwd=ROOT).returncode == 0
    except OSError:
        return False


def opponents(args: argparse.Namespace) -> tuple[list[Contestant], list[str]]:
    """Opponents that are here and can run the model, and a note on each of the others."""
    found: list[Contestant] = []
    notes = []
    found += llama_builds(args.checkpoint, args.llama_build)
    for name in args.opponents:
        try:
            found += _opponent(name, args)
        except HerdError as error:
            notes.append(f"{name}: {error}")
    return found, notes


def _opponent(name: str, args: argparse.Namespace) -> list[Contestant]:
    python, module = {
        "transformers": (sys.executable, "transformers"), "llama.cpp": (args.llama_python, "llama_cpp"),
        "openvino": (sys.executable, "openvino"),
    }[name]
    if not has_module(python, module):
        raise HerdError("not installed" + ("; --llama-python names a Python that has it" * (name == "llama.cpp")))
    if name == "openvino":
        raise HerdError("installed, but there is no worker for it")
    return transformers(args.checkpoint, bf16=args.bf16) if name == "transformers" else llama_cpp(
        args.checkpoint, args.llama_python)


def interleaved(ours: list[Contestant], theirs: list[Contestant]) -> list[Contestant]:
    """One of ours, one of theirs, and so on."""
    return [contestant for pair in zip_longest(ours, theirs) for contestant in pair if contestant]


def last_line(text: str) -> str:
    """What a failed process said last."""
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it said nothing"

"""Build backend: setuptools', which gets a compiled library and an editable install that others can follow.

Wheels: zig, a wheel on PyPI, compiles the native operators into them, and their tags say which machines load them.
``HERDGRAPH_TARGET=aarch64-macos.11.0`` makes one for another machine. ``HERDGRAPH_NATIVE=0``, a missing or a failing
compiler make the wheel for any machine, which runs on the runtime's own operators.

Editable installs: setuptools would install an import hook, because the package ``herdgraph`` is the root of the
checkout, and mypy, pyright and editors do not run hooks. Here the checkout gets a link ``.editable/herdgraph`` to
itself, and the environment a ``.pth`` file that names the directory of the link.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import setuptools.build_meta
from setuptools.build_meta import (  # the rest of the backend
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable", "build_sdist", "build_wheel", "get_requires_for_build_editable", "get_requires_for_build_sdist",
    "get_requires_for_build_wheel", "prepare_metadata_for_build_wheel",
]  # fmt: skip

_COMPILE = Path("runtimes/native/compile.py")
_WHEEL = "Wheel-Version: 1.0\nGenerator: herdgraph\nRoot-Is-Purelib: {pure}\nTag: {tag}\n"


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """What setuptools needs, and the compiler where there are operators for the machine."""
    return [*setuptools.build_meta.get_requires_for_build_wheel(config_settings), *_compiler()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """The same."""
    return [*setuptools.build_meta.get_requires_for_build_editable(config_settings), *_compiler()]


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """Setuptools' wheel, with the library if it can be compiled; returns its name (PEP 517)."""
    with tempfile.TemporaryDirectory() as directory:  # other wheels that lie in wheel_directory stay there
        pure = Path(directory) / setuptools.build_meta.build_wheel(directory, config_settings, metadata_directory)
        compiled = _compiled(Path(directory))
        return _moved(_with_library(pure, *compiled) if compiled else pure, wheel_directory)


def _moved(wheel: Path, directory: str) -> str:
    """The name of a wheel that goes where the caller wants it."""
    shutil.move(wheel, Path(directory) / wheel.name)
    return wheel.name


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """Write a wheel that holds the path of this checkout, whose library is compiled; returns its name (PEP 660)."""
    _compiled(None)
    link = Path(".editable/herdgraph").absolute()
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to("..", target_is_directory=True)
    with tempfile.TemporaryDirectory() as directory:
        info = Path(directory) / prepare_metadata_for_build_wheel(directory, config_settings)
        found = [path for path in info.rglob("*") if path.is_file()]
        files = {path.relative_to(directory).as_posix(): path.read_bytes() for path in found}
    files |= {f"{info.name}/WHEEL": b"", "herdgraph.pth": f"{link.parent}\n".encode()}
    name = f"{info.name.removesuffix('.dist-info')}-py3-none-any.whl"
    _write_wheel(Path(wheel_directory) / name, files)
    return name


def _compile_module() -> ModuleType:
    """The package's own compiler; the package itself cannot be imported before it is installed."""
    spec = importlib.util.spec_from_file_location("herdgraph_compile", _COMPILE.absolute())
    assert spec
    assert spec.loader
    module = sys.modules["herdgraph_compile"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compiler() -> list[str]:
    """The requirement that brings the compiler, where it is wanted."""
    compile_ = _compile_module()
    wanted = os.environ.get("HERDGRAPH_NATIVE") != "0" and ("HERDGRAPH_TARGET" in os.environ or compile_.this_machine())
    return [compile_.ZIG_REQUIREMENT] if wanted else []


def _compiled(folder: Path | None) -> tuple[Path, str] | None:
    """The library and the platform tag of the machine that it is for; without a folder, the checkout's own one.

    None where it is not wanted or cannot be had, unless a target was asked for by name.
    """
    compile_ = _compile_module()
    triple = os.environ.get("HERDGRAPH_TARGET")
    if os.environ.get("HERDGRAPH_NATIVE") == "0":
        return None
    try:
        target = compile_.find_target(triple) if triple and folder else compile_.this_machine()
        if target is None:
            raise compile_.CompileError("this machine has no operators of its own")
        library = (folder or compile_.FOLDER) / target.library
        if folder or compile_.is_outdated(library):
            compile_.compile_library(target, library.parent)
    except compile_.CompileError as error:
        if triple:
            raise SystemExit(f"error: {error}") from None
        print(f"herdgraph: no native operators, bundles will run on the runtime's own: {error}", file=sys.stderr)
        return None
    return library, target.wheel_tag


def _with_library(pure: Path, library: Path, tag: str) -> Path:
    """The wheel again, with the library in it, under the name for its platform."""
    with zipfile.ZipFile(pure) as wheel:
        files = {name: wheel.read(name) for name in wheel.namelist() if not name.endswith("/")}
    files[f"herdgraph/{_COMPILE.parent.as_posix()}/lib/{library.name}"] = library.read_bytes()
    path = pure.with_name(pure.name.replace("-any.whl", f"-{tag}.whl"))
    _write_wheel(path, files)
    return path


def _write_wheel(path: Path, files: dict[str, bytes]) -> None:
    """A wheel of some files; WHEEL says what the name says, and RECORD lists the rest."""
    tag = "-".join(path.stem.split("-")[-3:])
    info = next(name for name in files if name.endswith(".dist-info/METADATA")).removesuffix("/METADATA")
    files[f"{info}/WHEEL"] = _WHEEL.format(pure=str(tag == "py3-none-any").lower(), tag=tag).encode()
    files.pop(f"{info}/RECORD", None)
    files[f"{info}/RECORD"] = _record(files, f"{info}/RECORD")
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name)  # the same bytes at any time
            entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            wheel.writestr(entry, content)


def _record(files: dict[str, bytes], own: str) -> bytes:
    """Names, hashes and sizes of a wheel's files."""
    lines = []
    for path, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        lines.append(f"{path},sha256={digest},{len(content)}")
    return "\n".join([*lines, f"{own},,"]).encode()

"""Build backend: setuptools', but an editable install is a path that type checkers and editors can follow.

Setuptools would install an import hook, because the package ``herdgraph`` is the root of the checkout, and mypy,
pyright and editors do not run hooks. Here the checkout gets a link ``.editable/herdgraph`` to itself, and the
environment a ``.pth`` file that names the directory of the link.
"""

from __future__ import annotations

import base64
import hashlib
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from setuptools.build_meta import (  # the rest of the backend
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable", "build_sdist", "build_wheel", "get_requires_for_build_sdist", "get_requires_for_build_wheel",
    "prepare_metadata_for_build_wheel",
]

_WHEEL = b"Wheel-Version: 1.0\nGenerator: herdgraph\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """Write a wheel that holds the path of this checkout; returns its name (PEP 660)."""
    link = Path(".editable/herdgraph").absolute()
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to("..", target_is_directory=True)
    with tempfile.TemporaryDirectory() as directory:
        info = Path(directory) / prepare_metadata_for_build_wheel(directory, config_settings)
        found = [path for path in info.rglob("*") if path.is_file()]
        files = {path.relative_to(directory).as_posix(): path.read_bytes() for path in found}
    files |= {f"{info.name}/WHEEL": _WHEEL, "herdgraph.pth": f"{link.parent}\n".encode()}
    files[f"{info.name}/RECORD"] = _record(files, f"{info.name}/RECORD")
    name = f"{info.name.removesuffix('.dist-info')}-py3-none-any.whl"
    with zipfile.ZipFile(Path(wheel_directory) / name, "w") as wheel:
        for path, content in files.items():
            wheel.writestr(path, content)
    return name


def _record(files: dict[str, bytes], own: str) -> bytes:
    """Names, hashes and sizes of a wheel's files."""
    lines = []
    for path, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        lines.append(f"{path},sha256={digest},{len(content)}")
    return "\n".join([*lines, f"{own},,"]).encode()

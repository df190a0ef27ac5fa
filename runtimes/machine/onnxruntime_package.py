"""Which onnxruntime is here: two packages, for CPUs and for GPUs, have the same files, and overwrite each other's."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from .packages import release

CPU_PACKAGE, GPU_PACKAGE = "onnxruntime", "onnxruntime-gpu"
_FACTS = re.compile(r"^(\w+)\s*=\s*['\"]([^'\"]*)['\"]", re.MULTILINE)


@dataclass(frozen=True)
class OnnxRuntime:
    """The onnxruntime that Python would import.

    Attributes:
        installed: version by package, of the two, as far as their files lie where Python looks first.
        package: the one whose files are there, which is the one that was installed last; None when there are none.
        version: of these files.
        cuda: version of CUDA that they were built with, None for CPUs.
        directory: where they lie.
    """

    installed: dict[str, str]
    package: str | None = None
    version: str | None = None
    cuda: tuple[int, ...] | None = None
    directory: Path | None = None

    @property
    def clash(self) -> str | None:
        """What is wrong when both packages are installed, with the cure; None when they are not."""
        if len(self.installed) < 2:
            return None
        both = " and ".join(f"{name} {version}" for name, version in self.installed.items())
        return (f"{both} are both installed and overwrite each other's files, those of {self.package or 'neither'} are "
                f"there now: pip uninstall -y {CPU_PACKAGE} {GPU_PACKAGE}, then install one of "
                "'herdgraph[cpu]' and 'herdgraph[gpu]'")


def find_onnxruntime() -> OnnxRuntime:
    """The onnxruntime of this interpreter, looked up without importing it."""
    directory = _directory()
    installed = {name: version for name in (CPU_PACKAGE, GPU_PACKAGE) if (version := _version(name, directory))}
    if directory is None:
        return OnnxRuntime(installed)
    facts = _facts(directory / "capi" / "build_and_package_info.py")
    cuda = release(facts.get("cuda_version", "")) or None
    return OnnxRuntime(installed, facts.get("package_name"), facts.get("__version__"), cuda, directory)


def _directory() -> Path | None:
    try:
        spec = importlib.util.find_spec("onnxruntime")
    except (ImportError, ValueError):
        return None
    return Path(spec.origin).parent if spec and spec.origin else None


def _version(name: str, directory: Path | None) -> str | None:
    """The version of a package, None where it is not installed or lies behind the other one on the search path."""
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    lies = Path(str(found.locate_file("onnxruntime")))
    return found.version if directory is None or lies.resolve() == directory.resolve() else None


def _facts(path: Path) -> dict[str, str]:
    """What the package's own file says of how it was built."""
    try:
        return dict(_FACTS.findall(path.read_text(encoding="utf-8")))
    except OSError:
        return {}

"""All that is known of this machine, as one value."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import HerdError
from ..native.library import library_path, unit
from .cuda_checks import CudaFacts, find_cuda_facts
from .host import Host, this_host
from .packages import Extra, extras, version_of
from .providers import Providers, find_providers

OPTIONAL = ("torch", "ray", "nvidia-nccl-cu13", "nvidia-nccl-cu12", "tensorrt-cu13-libs", "tensorrt-rtx-cu13-libs")
"""Packages that are worth naming whoever brought them."""


@dataclass(frozen=True)
class Operators:
    """Our own operators for CPUs.

    Attributes:
        library: where they lie, None where they are not compiled.
        unit: the instruction set that they use here, for example ``avx2``.
        problem: why the library cannot be loaded.
    """

    library: Path | None = None
    unit: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Machine:
    """A machine.

    Attributes:
        host: the computer.
        cuda: NVIDIA's driver and libraries, and the onnxruntime package.
        providers: execution providers that were tried.
        operators: our own.
        extras: which are complete.
        packages: versions of optional packages.
    """

    host: Host
    cuda: CudaFacts
    providers: Providers
    operators: Operators
    extras: dict[str, Extra]
    packages: dict[str, str]

    def lacks(self, extra: str) -> list[str]:
        """What an extra of herdgraph lacks here, in one line with its cure; empty when it is complete."""
        found = self.extras.get(extra)
        return [f"{', '.join(found.problems)}: {found.cure}"] if found and found.problems else []

    @property
    def warnings(self) -> list[str]:
        """What is wrong, whatever is to be run."""
        return [text for text in (self.cuda.onnxruntime.clash, self.operators.problem) if text]

    def to_json(self) -> dict[str, Any]:
        """For ``herdgraph doctor --json``."""
        parts: dict[str, Any] = asdict(self)
        return {**_plain(parts), "warnings": self.warnings}


def this_machine() -> Machine:
    """Look at everything; takes a second or two, for onnxruntime is started once."""
    versions = {name: version for name in OPTIONAL if (version := version_of(name))}
    return Machine(this_host(), find_cuda_facts(), find_providers(), find_operators(), extras(), versions)


def find_operators() -> Operators:
    """Our operators, loaded to see which instruction set they choose."""
    path = library_path()
    try:
        return Operators(path, unit())
    except HerdError as error:
        return Operators(path, problem=str(error))


def _plain(value: Any) -> Any:
    """A value that JSON has."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value

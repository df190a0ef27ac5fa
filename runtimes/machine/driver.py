"""The NVIDIA driver and the GPUs that it sees, asked through its own library; no package is needed."""

from __future__ import annotations

from dataclasses import dataclass

from .probe import run_probe


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        index: as in ``cuda:0``.
        name: the driver's.
        sm: compute capability without its point, for example ``90``.
        memory: bytes.
    """

    index: int
    name: str
    sm: str
    memory: int


@dataclass(frozen=True)
class Driver:
    """The driver.

    Attributes:
        cuda: newest version of CUDA that it speaks; None when its library cannot be loaded.
        release: of the kernel's module, such as 580.159.04, where the system tells.
        gpus: those that it sees.
        problem: why it stopped answering, in its own or the system's words.
    """

    cuda: tuple[int, ...] | None = None
    release: str | None = None
    gpus: tuple[Gpu, ...] = ()
    problem: str | None = None


def find_driver() -> Driver:
    """Ask the driver, in a process of its own."""
    found = run_probe("probe_driver.py")
    cuda = tuple(found["cuda"]) if found.get("cuda") else None
    return Driver(cuda, found.get("release"), tuple(Gpu(**gpu) for gpu in found.get("gpus", ())), found.get("problem"))

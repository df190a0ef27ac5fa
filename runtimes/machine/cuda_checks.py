"""Whether ONNX Runtime's CUDA provider can compute on a GPU of this machine, and in one line why not.

``herdgraph doctor`` shows all objections; ``check_cuda`` raises the first, before a session is made: onnxruntime itself
would log to standard error and compute on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ...errors import HerdError
from .driver import Driver, Gpu, find_driver
from .libraries import CUDA_13, Library, find_libraries
from .onnxruntime_package import GPU_PACKAGE, OnnxRuntime, find_onnxruntime

KERNELS = ("75", "80", "86", "89", "90a", "120a")
"""Architectures that the wheels of onnxruntime-gpu on PyPI hold code for (1.31.1, cuobjdump). There is no PTX, which a
driver could compile for others; code for an architecture with an ``a`` runs on exactly that one."""
CUDA = (13, 0)
"""Version of CUDA that these wheels are built with."""
DRIVER = "580"
"""First release of the driver that speaks it."""
_CURE = "pip install 'herdgraph[gpu]'"


@dataclass(frozen=True)
class CudaFacts:
    """What decides whether CUDA works.

    Attributes:
        driver: with its GPUs.
        onnxruntime: that would be imported.
        libraries: of CUDA, by name.
    """

    driver: Driver
    onnxruntime: OnnxRuntime
    libraries: dict[str, Library] = field(default_factory=dict)


def find_cuda_facts() -> CudaFacts:
    """The facts of this machine."""
    return CudaFacts(find_driver(), find_onnxruntime(), find_libraries())


def check_cuda(device: int = 0, facts: CudaFacts | None = None) -> Gpu:
    """The GPU that ``cuda:DEVICE`` is.

    Args:
        device: number of the GPU.
        facts: of this machine unless they are given.

    Raises:
        HerdError: no driver, an old one, no such GPU, a GPU without kernels, or a package that is missing, wrong or
            overwritten by another.
    """
    facts = facts or find_cuda_facts()
    if objections := cuda_objections(facts, device):
        raise HerdError(objections[0])
    return facts.driver.gpus[device]


def cuda_objections(facts: CudaFacts, device: int = 0) -> list[str]:
    """Everything that keeps the CUDA provider from a GPU, what only new hardware cures first; empty when it works."""
    needed = facts.onnxruntime.cuda or CUDA
    found = (driver_objection(facts.driver, needed), gpu_objection(facts.driver, device),
             kernel_objection(facts, device), package_objection(facts.onnxruntime), library_objection(facts))
    return [objection for objection in found if objection]


def driver_objection(driver: Driver, needed: tuple[int, ...] = CUDA) -> str | None:
    """No driver, or one that is older than the CUDA that is needed; None for a good one."""
    if driver.cuda is None:
        return (f"there is no NVIDIA driver here ({driver.problem}): install release {DRIVER} or newer on a machine "
                "with an NVIDIA GPU, or use a bundle for a CPU")
    if driver.cuda[0] < needed[0]:
        release = f" (release {driver.release})" if driver.release else ""
        return (f"the NVIDIA driver{release} speaks CUDA {_dotted(driver.cuda)}, CUDA {_dotted(needed)} is needed: "
                f"update it to release {DRIVER} or newer")
    return None


def gpu_objection(driver: Driver, device: int = 0) -> str | None:
    """The driver sees no GPU, or fewer; None when the GPU is there or no driver was there to ask."""
    if driver.cuda is None or device < len(driver.gpus):
        return None
    if not driver.gpus:
        words = driver.problem or "it lists none"
        return f"the NVIDIA driver finds no GPU ({words}): see nvidia-smi, or use a bundle for a CPU"
    return f"there is no cuda:{device}: the NVIDIA driver sees {len(driver.gpus)} GPUs, cuda:0 is the first"


def kernel_objection(facts: CudaFacts, device: int = 0) -> str | None:
    """A GPU for which onnxruntime has no kernels; None for others and where there is no such GPU."""
    if device >= len(facts.driver.gpus) or has_kernels(facts.driver.gpus[device].sm):
        return None
    gpu, version = facts.driver.gpus[device], facts.onnxruntime.version
    *others, last = (each.rstrip("a") for each in KERNELS)
    return (f"cuda:{device} ({gpu.name}) is SM {gpu.sm}, {GPU_PACKAGE}{f' {version}' if version else ''} of PyPI has "
            f"kernels for SM {', '.join(others)} and {last} only: use another GPU, or an {GPU_PACKAGE} built for it")


def has_kernels(sm: str) -> bool:
    """Whether code for a compute capability is in the wheels: its own, or an older one's of the same generation."""
    return any(kernel[:-1] == sm if kernel.endswith("a") else kernel[:-1] == sm[:-1] and kernel[-1] <= sm[-1]
               for kernel in KERNELS)


def package_objection(package: OnnxRuntime) -> str | None:
    """No onnxruntime for GPUs, the one for CPUs in its place, or both over one another; None for the right one."""
    if package.clash:
        return (f"{package.clash.partition(':')[0]}: pip uninstall -y onnxruntime onnxruntime-gpu, then {_CURE}")
    if package.package == GPU_PACKAGE:
        return None
    if package.directory is None and package.installed:
        return (f"{', '.join(package.installed)} is installed and its files are gone, as happens when one of two "
                "onnxruntimes is removed: pip install --force-reinstall 'herdgraph[gpu]'")
    if package.directory is None:
        return f"{GPU_PACKAGE} is not installed: {_CURE}"
    return (f"onnxruntime {package.version or ''} is installed, which computes on CPUs only, {GPU_PACKAGE} is needed: "
            f"pip uninstall -y onnxruntime, then {_CURE}")


def library_objection(facts: CudaFacts) -> str | None:
    """Libraries of CUDA that cannot be loaded; None when all can, or when their package is not here to need them."""
    if facts.onnxruntime.package != GPU_PACKAGE:
        return None
    broken = {name: found for name in CUDA_13 if (found := facts.libraries.get(name, Library(name))).problem
              or not found.path}
    if not broken:
        return None
    packages = ", ".join(dict.fromkeys(CUDA_13[name] for name in broken))
    reason = next((each.problem for each in broken.values() if each.problem), "not found")
    return f"{', '.join(broken)} of {packages} cannot be loaded ({reason}): {_CURE}"


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))

"""From a bundle's plans to what runs them, refused by name when they are not for this machine. Not run on hardware."""

from __future__ import annotations

from functools import partial
from typing import Any

from ....errors import HerdError
from ...bundle.manifest import Bundle
from ..options import ExecutorOptions
from ..vision import VisionRunner
from .device import DeviceExecutor, load_package
from .runner import PlanRunner


def load_plans(bundle: Bundle, _: ExecutorOptions) -> tuple[PlanRunner, VisionRunner | None]:
    """Runners of a bundle's decoder and image plans, on the first GPU. The options are for executors on the CPU.

    Raises:
        HerdError: the package, the driver or the GPU is missing, or the plans are for another version or GPU.
    """
    config = bundle.manifest.config
    package = load_package(bundle.manifest.provider)
    for role, plan in bundle.manifest.plans.items():
        check_version(role, plan, package.__name__, package.__version__)
    chunks = tuple(config.text.chunk_of(layer) for layer in range(config.text.num_layers))
    decoder = DeviceExecutor(bundle.graph("decoder"), package=package, chunks=chunks)
    for role, plan in bundle.manifest.plans.items():
        check_device(role, plan, decoder.cuda.compute_capability)
    vision = None
    if config.vision:
        tower = DeviceExecutor(bundle.graph("vision"), package=package)
        vision = VisionRunner(partial(tower.run_simple, "pixel_values", output="image_features"), config)
    return PlanRunner(decoder, config), vision


def check_version(role: str, plan: dict[str, Any], package: str, version: str) -> None:
    """Plans run on the version that built them.

    Raises:
        HerdError: names both versions.
    """
    if (built := plan.get("tensorrt")) != version:
        raise HerdError(f"the {role} plan was built by TensorRT {built}, {package} {version} is installed here: "
                        f"install {built} or rebuild the bundle")


def check_device(role: str, plan: dict[str, Any], compute_capability: str) -> None:
    """Plans run on the GPUs that they were compiled for.

    Raises:
        HerdError: names both.
    """
    targets = plan.get("sm")
    if targets is not None and compute_capability not in targets:
        raise HerdError(f"the {role} plan is for SM {', '.join(targets)}, this GPU is SM {compute_capability}: rebuild "
                        f"the bundle with --sm {compute_capability}")

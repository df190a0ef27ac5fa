"""From a bundle's plans to what runs them, refused by name when they are not for this machine. Not run on hardware."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from ....errors import HerdError
from ...bundle.manifest import Bundle
from ..options import ExecutorOptions
from ..vision import VisionRunner
from .cuda import Cuda
from .device import DeviceExecutor, load_package
from .runner import PlanRunner


def load_plans(bundle: Bundle, options: ExecutorOptions) -> tuple[PlanRunner, VisionRunner | None]:
    """Runners of a bundle's decoder and image plans, on the first GPU. The options are for executors on the CPU.

    Raises:
        HerdError: the package, the driver or the GPU is missing, or the plans are for another version or GPU.
    """
    cuda = Cuda()
    text = bundle.manifest.config.text
    chunks = tuple(text.chunk_of(layer) for layer in range(text.num_layers))
    decoder = load_plan(bundle, "decoder", bundle.graph("decoder"), cuda, chunks)
    return PlanRunner(decoder, bundle.manifest.config), load_vision_plan(bundle, options)


def load_vision_plan(bundle: Bundle, _: ExecutorOptions) -> VisionRunner | None:
    """The image tower, on the first GPU; None for models that read text only."""
    if not bundle.manifest.config.vision:
        return None
    tower = load_plan(bundle, "vision", bundle.graph("vision"), Cuda())
    return VisionRunner(partial(tower.run_simple, "pixel_values", output="image_features"), bundle.manifest.config)


def load_plan(bundle: Bundle, role: str, path: Path, cuda: Cuda, chunks: tuple[int, ...] = ()) -> DeviceExecutor:
    """One plan of a bundle.

    Args:
        bundle: it is of.
        role: its name among the manifest's ``plans``.
        path: its file.
        cuda: the GPU.
        chunks: attention chunk of each of its layers.

    Raises:
        HerdError: as ``load_plans``.
    """
    package, plan = load_package(bundle.manifest.provider), bundle.manifest.plans[role]
    check_version(role, plan, package.__name__, package.__version__)
    check_device(role, plan, cuda.compute_capability)
    return DeviceExecutor(path, package=package, cuda=cuda, chunks=chunks)


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

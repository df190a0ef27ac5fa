"""Checkpoint in, bundle out: capture, lower, stream weights, write the manifest, rename.

Memory is bounded by the graphs (under 2 GB for the largest herd member) plus a few weight blocks; nothing of the
output is visible until it is complete.
"""

from __future__ import annotations

import shutil
from importlib import metadata
from pathlib import Path

from .. import __version__
from ..files import atomic_directory, require_room
from ..model.checkpoint import Checkpoint
from ..model.config.shard_plan import ShardPlan
from ..model.quantization.calibration_file import calibration_for
from ..model.quantization.recipes import Recipe
from ..runtimes.bundle.manifest import PROCESSOR, Bundle, Manifest, describe_files, write_manifest
from .job import BuildResult, Job, Progress, active_bytes, weight_bytes
from .sharded_build import check_shards, write_shards
from .targets.registry import Target, target_of
from .targets.tensorrt.plans import PlanOptions, builder_of

__all__ = ["Progress", "active_bytes", "build_bundle", "weight_bytes"]

_TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "tensorrt-rtx-cu13", "tensorrt")


def build_bundle(
    checkpoint: Checkpoint, output: Path, *, target: str = "cpu", recipe: str | Recipe = "fp32",
    calibration: Path | None = None, plans: PlanOptions | None = None, shards: ShardPlan | None = None,
    overwrite: bool = False, progress: Progress | None = None,
) -> Bundle:
    """Build a bundle.

    Args:
        checkpoint: an open checkpoint.
        output: directory to create.
        target: name of the lowering.
        recipe: precision recipe: the name of one of the target, or one of your own.
        calibration: a directory written by ``herdgraph calibrate``: FP8 scales, magnitudes of 8-bit caches, and the
            Hessians by which 4-bit weights are rounded.
        plans: what TensorRT plans are built for.
        shards: how the decoder is split over ranks, None for a whole one.
        overwrite: replace an existing output.
        progress: hooks for a display.

    Raises:
        HerdError: unknown target or recipe, a calibration that is missing or another's, a plan that the model cannot be
            split by, the output exists or cannot be written, or there is too little room.
    """
    (lowering, precision), progress = target_of(target, recipe), progress or Progress()
    if shards is not None:
        check_shards(shards, checkpoint.config, lowering)
    plans = plans or PlanOptions()
    build = builder_of(target, precision, plans) if lowering.kind == "plan" else None
    measured = calibration_for(precision, calibration, checkpoint)
    if measured is not None:
        precision = precision.with_high_precision(measured.kept)
    job = Job(checkpoint, lowering, precision, measured, plans, build, progress)
    with atomic_directory(output, overwrite=overwrite, inputs=[checkpoint.directory]) as directory:
        made = _write_whole(job, directory, output) if shards is None else write_shards(job, directory, output, shards)
        _carry(checkpoint, directory / PROCESSOR)
        progress.stage("hashing")
        executor, provider = _execution(lowering)
        write_manifest(directory, Manifest(
            target=target, executor=executor, provider=provider, recipe=precision.name, config=checkpoint.config,
            graphs=made.graphs, active_bytes=made.active_bytes, plans=made.plans, shards=made.shards,
            files=describe_files(directory), toolchain=_toolchain(),
            source={"checkpoint": checkpoint.directory.name, "fingerprint": checkpoint.fingerprint()},
        ))
    return Bundle.open(output, verify=False)


def _execution(lowering: Target) -> tuple[str, str]:
    """Executor and provider of a target's graphs, as ``Manifest`` names them."""
    if lowering.kind == "plan":
        return "tensorrt", lowering.name.replace("-", "_")
    return "onnxruntime", "CPUExecutionProvider"


def _write_whole(job: Job, directory: Path, output: Path) -> BuildResult:
    made = BuildResult()
    models = {role: job.lowered(role, job.captured(role)) for role in job.roles}
    total = sum(weight_bytes(model) for model in models.values())
    job.progress.weights(total)
    require_room(output, total, "the bundle")
    for role, model in models.items():
        job.write(model, directory, role, made)
    made.active_bytes = active_bytes(models["decoder"], job.checkpoint.config.text)
    return made


def _carry(checkpoint: Checkpoint, directory: Path) -> None:
    directory.mkdir()
    for path in checkpoint.processor_files():
        shutil.copyfile(path, directory / path.name)


def _toolchain() -> dict[str, str]:
    versions = {"herdgraph": __version__}
    for tool in _TOOLS:
        try:
            versions[tool] = metadata.version(tool)
        except metadata.PackageNotFoundError:
            continue
    return versions

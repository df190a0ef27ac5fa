"""Checkpoint in, bundle out: plan, capture, lower, stream weights, write the manifest, rename.

Memory is bounded by the graphs (under 2 GB for the largest herd member) plus a few weight blocks; nothing of the
output is visible until it is complete.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import HerdError
from ..files import atomic_directory, check_output, require_room
from ..model.checkpoint import Checkpoint
from ..model.config.shard_plan import ShardPlan
from ..model.quantization.calibration_check import calibration_for
from ..model.quantization.recipes import Recipe
from ..runtimes.bundle.blocks import write_block_hashes
from ..runtimes.bundle.manifest import (
    MANIFEST,
    PROCESSOR,
    WEIGHTS,
    Bundle,
    Manifest,
    describe_files,
    write_manifest,
)
from .allocation import allocated
from .job import BuildProgress, BuildResult, Job, active_bytes, weight_bytes
from .memory_plan import GRAPH_BYTES, MemoryPlan, memory_plan
from .processor_files import check_processor_files, copy_processor_files
from .sharded_build import check_shards, write_shards
from .targets.options import PlanOptions
from .targets.registry import target_of
from .time_plan import expected_seconds

logger = logging.getLogger(__name__)

__all__ = ["BuildPlan", "BuildProgress", "PlanOptions", "active_bytes", "build_bundle", "plan_build", "weight_bytes"]

_TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "tensorrt-rtx-cu13", "tensorrt")


@dataclass(frozen=True)
class BuildPlan:
    """A build that has been checked and sized, and has written nothing yet.

    Attributes:
        job: what is built of what.
        output: directory to create.
        shards: how the decoder is split over ranks, None for a whole one.
        overwrite: replace an existing output.
        memory: what the build will need.
        refusal: why the output cannot be written as things are; None where it can.
    """

    job: Job
    output: Path
    shards: ShardPlan | None
    overwrite: bool
    memory: MemoryPlan
    refusal: HerdError | None

    def expected_seconds(self) -> float:
        """Seconds that the build will take on this machine as it is now; finding it out takes a few."""
        return expected_seconds(self.job, self.output, self.memory.bundle_bytes)

    def run(self, progress: BuildProgress | None = None) -> Bundle:
        """Build the bundle.

        Args:
            progress: hooks for a display.

        Raises:
            HerdError: the refusal, a weight that is not finite, which is found before anything else is done, or the
                output turned out to be unwritable or too small; nothing is left behind.
        """
        if self.refusal is not None:
            raise self.refusal
        job = replace(self.job, progress=progress or BuildProgress())
        inputs = [job.checkpoint.directory]
        with atomic_directory(self.output, overwrite=self.overwrite, inputs=inputs) as directory:
            job.progress.stage("checking weights")
            job.checkpoint.check_weights(job.progress.checked)
            if self.shards is None:
                made = _write_whole(job, directory, self.output)
            else:
                made = write_shards(job, directory, self.output, self.shards)
            copy_processor_files(job.checkpoint, directory / PROCESSOR)
            job.progress.stage("hashing")
            for weights in sorted(directory.rglob(f"*{WEIGHTS}")):
                write_block_hashes(weights)
            write_manifest(directory, _manifest(job, made, directory))
        return Bundle.open(self.output, verify=False)


def plan_build(
    checkpoint: Checkpoint, output: Path, *, target: str = "cpu", recipe: str | Recipe | None = None,
    calibration: Path | None = None, options: PlanOptions | None = None, shards: ShardPlan | None = None,
    overwrite: bool = False, bits: float | None = None,
) -> BuildPlan:
    """Check and size a build; every check of a build is made here, once.

    Args:
        checkpoint: an open checkpoint.
        output: directory to create.
        target: name of the lowering.
        recipe: precision recipe: the name of one of the target, None for its first, or one of your own.
        calibration: a directory written by ``herdgraph calibrate``: FP8 scales, magnitudes of 8-bit caches, and the
            Hessians by which weights are rounded.
        options: what TensorRT plans are built for.
        shards: how the decoder is split over ranks, None for a whole one.
        overwrite: replace an existing output.
        bits: per parameter, of the whole bundle: recipe int4 then chooses what keeps 8 bits; None for the recipe's own
            choice.

    Raises:
        HerdError: unknown target or recipe, a calibration that is missing or another's, processor files that cannot be
            used, a plan that the model cannot be split by, or a size that cannot be met. An output that cannot be
            written is a ``refusal`` of the plan instead.
    """
    # 1. what is asked for, and whether this machine can build it
    lowering, precision = target_of(target, recipe)
    options = options or PlanOptions()
    writer = lowering.plan_writer(precision, options)
    # 2. whether calibration and split fit the checkpoint, and what it carries can be used
    measured = calibration_for(precision, calibration, checkpoint)
    if measured is not None:
        precision = measured.applied_to(precision)
    chosen: dict[str, int] = {}
    if bits is not None:
        precision, chosen = allocated(checkpoint.config, lowering, precision, measured, bits)
    if precision.uses_hessians and measured is None:
        logger.warning("%s without Hessians costs perplexity (+22 %% instead of +3 %% on a small model): write them "
                       "with `herdgraph calibrate` and pass --calibration", precision.name)
    if shards is not None:
        check_shards(shards, checkpoint.config, lowering)
    check_processor_files(checkpoint)
    # 3. what it needs, and whether there is room
    memory = memory_plan(checkpoint.config, output, precision, shards, float_bytes=lowering.float_bytes,
                         packed=lowering.packs_weights,
                         by_hessians=measured is not None and measured.has_hessians and bool(precision.rules))
    job = Job(checkpoint, lowering, precision, measured, options, writer, bits=chosen)
    refusal = _refusal(checkpoint, output, memory, overwrite=overwrite)
    return BuildPlan(job, output, shards, overwrite, memory, refusal)


def build_bundle(
    checkpoint: Checkpoint, output: Path, *, progress: BuildProgress | None = None, **request: Any
) -> Bundle:
    """Plan and run in one call; ``request`` holds the options of ``plan_build``."""
    return plan_build(checkpoint, output, **request).run(progress)


def _refusal(checkpoint: Checkpoint, output: Path, memory: MemoryPlan, *, overwrite: bool) -> HerdError | None:
    """Why the output cannot be written, known before the time that a capture takes."""
    try:
        check_output(output, overwrite=overwrite, mark=MANIFEST, inputs=[checkpoint.directory])
        copied = sum(path.stat().st_size for path in checkpoint.processor_files())
        require_room(output, memory.bundle_bytes + copied + GRAPH_BYTES, "the bundle")
    except HerdError as error:
        return error
    return None


def _manifest(job: Job, made: BuildResult, directory: Path) -> Manifest:
    checkpoint, target = job.checkpoint, job.target
    return Manifest(
        target=target.name, executor=target.executor, provider=target.provider, recipe=job.recipe.name,
        bits=job.bits, config=checkpoint.config, graphs=made.graphs, active_bytes=made.active_bytes, plans=made.plans,
        shards=made.shards, files=describe_files(directory), toolchain=_toolchain(),
        source={"checkpoint": checkpoint.directory.name, "fingerprint": checkpoint.fingerprint()},
    )


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


def _toolchain() -> dict[str, str]:
    versions = {"herdgraph": __version__}
    for tool in _TOOLS:
        try:
            versions[tool] = metadata.version(tool)
        except metadata.PackageNotFoundError:
            continue
    return versions

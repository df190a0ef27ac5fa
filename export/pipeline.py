"""Checkpoint in, bundle out: capture, lower, stream weights, write the manifest, rename.

Memory is bounded by the graphs (under 2 GB for the largest herd member) plus a few weight blocks; nothing of the
output is visible until it is complete.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import onnx_ir as ir

from .. import __version__
from ..files import atomic_directory, require_room
from ..model.checkpoint import Checkpoint
from ..model.config import TextConfig
from ..runtimes.bundle import PROCESSOR, Bundle, Manifest, describe_files, write_manifest
from .calibration_file import CalibrationFile, calibration_for
from .capture import bind_weights, capture_decoder, capture_vision
from .passes import LowerRoutedExperts
from .plans import PlanOptions, builder_of, write_plan
from .recipes import Recipe
from .rotation import RotatedCheckpoint
from .targets import Target, target_of
from .weights import initializers, stream

logger = logging.getLogger(__name__)

_TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "tensorrt-rtx-cu13", "tensorrt")


@dataclass(frozen=True)
class Progress:
    """Hooks for a progress display.

    Attributes:
        stage: called with the name of each step.
        weights: called with the bytes of all weights once they are known.
        written: called with the bytes of every weight that was written.
    """

    stage: Callable[[str], None] = lambda _: None
    weights: Callable[[int], None] = lambda _: None
    written: Callable[[int], None] = lambda _: None


def build_bundle(
    checkpoint: Checkpoint, output: Path, *, target: str = "cpu", recipe: str | Recipe = "fp32",
    calibration: Path | None = None, plans: PlanOptions | None = None, overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Build a bundle.

    Args:
        checkpoint: an open checkpoint.
        output: directory to create.
        target: name of the lowering.
        recipe: precision recipe: the name of one of the target, or one of your own.
        calibration: a directory written by ``herdgraph calibrate``: FP8 scales, magnitudes of 8-bit caches, and second
            moments by which 4-bit weights are rounded.
        plans: what TensorRT plans are built for.
        overwrite: replace an existing output.
        progress: hooks for a display.

    Raises:
        HerdError: unknown target or recipe, a calibration that is missing or another's, the output exists or cannot be
            written, or there is too little room.
    """
    (lowering, precision), progress = target_of(target, recipe), progress or Progress()
    plans = plans or PlanOptions()
    build = builder_of(target, precision, plans) if lowering.kind == "plan" else None
    measured = calibration_for(precision, calibration, checkpoint)
    if measured is not None:
        precision = precision.keeping(measured.kept)
    with atomic_directory(output, overwrite=overwrite, inputs=[checkpoint.directory]) as directory:
        graphs, made = {}, {}
        models = dict(_lowered(checkpoint, lowering, precision, measured, plans, progress))
        total = sum(weight_bytes(model) for model in models.values())
        progress.weights(total)
        require_room(output, total, "the bundle")
        for role, model in models.items():
            progress.stage(f"writing {role} weights")
            if build is not None:
                config = checkpoint.config
                graphs[role], made[role] = write_plan(model, directory, role, config, plans, build, progress.written)
                continue
            stream(model, directory, f"{role}.data", progress.written)
            ir.save(model, directory / f"{role}.onnx")
            graphs[role] = f"{role}.onnx"
        _carry(checkpoint, directory / PROCESSOR)
        progress.stage("hashing")
        write_manifest(directory, Manifest(
            target=target, recipe=precision.name, config=checkpoint.config, graphs=graphs,
            active_bytes=active_bytes(models["decoder"], checkpoint.config.text),
            plans=made, files=describe_files(directory), toolchain=_toolchain(),
            source={"checkpoint": checkpoint.directory.name, "fingerprint": checkpoint.fingerprint()},
        ))
    return Bundle.open(output, verify=False)


def _lowered(
    checkpoint: Checkpoint, target: Target, recipe: Recipe, measured: CalibrationFile | None, plans: PlanOptions,
    progress: Progress,
) -> Iterator[tuple[str, ir.Model]]:
    source = RotatedCheckpoint(checkpoint) if recipe.rotated else checkpoint
    captures = {"decoder": capture_decoder, "vision": capture_vision}
    if checkpoint.config.vision is None:
        del captures["vision"]
    for role, capture in captures.items():
        progress.stage(f"capturing {role}")
        model = capture(source.config)
        bind_weights(model, source)
        progress.stage(f"lowering {role} for {target.name} {recipe.name}")
        target.lower(model, recipe, measured, experts=plans.experts if target.kind == "plan" else LowerRoutedExperts)
        logger.info("%s graph: %d nodes", role, sum(1 for _ in model.graph.all_nodes()))
        yield role, model


def weight_bytes(model: ir.Model) -> int:
    """Bytes of the distinct weights of a lowered model."""
    distinct = {id(value.const_value): value.const_value.nbytes for value in initializers(model) if value.const_value}
    return sum(distinct.values())


def active_bytes(decoder: ir.Model, config: TextConfig) -> int:
    """Bytes of weights that one decoded token reads: all but the embedding table and the experts not chosen."""
    table = decoder.graph.initializers.get("embed_tokens.weight")
    routed = sum(value.const_value.nbytes for value in initializers(decoder)
                 if value.const_value is not None and ".experts" in str(value.name))
    rest = weight_bytes(decoder) - routed - (table.const_value.nbytes if table and table.const_value else 0)
    return rest + (routed * config.top_k // config.num_experts if routed else 0)


def _carry(checkpoint: Checkpoint, directory: Path) -> None:
    directory.mkdir()
    for path in checkpoint.carried_files():
        shutil.copyfile(path, directory / path.name)


def _toolchain() -> dict[str, str]:
    versions = {"herdgraph": __version__}
    for tool in _TOOLS:
        try:
            versions[tool] = metadata.version(tool)
        except metadata.PackageNotFoundError:
            continue
    return versions

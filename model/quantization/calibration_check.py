"""What a calibration holds is checked before a build begins: names, shapes, and that magnitudes are positive numbers.

Scales are few and are read. Hessians can have gigabytes: their names and shapes are compared here, their numbers when a
weight is rounded by them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from ...errors import HerdError
from ..checkpoint import Checkpoint
from ..checkpoint.base import shortened
from ..checkpoint.finite import require_finite, require_magnitudes
from ..checkpoint.rotated import RotatedCheckpoint
from ..checkpoint.tensors.header import read_header
from ..checkpoint.tensors.lazy import FileTensor
from ..config import HerdConfig
from ..config.names import Shape, expected_tensors
from .calibration_file import (
    HESSIANS,
    INPUT_ENERGY,
    KV_AMAX,
    RESIDUAL_SHARE,
    ROTATED_VALUE_AMAX,
    SCALES,
    CalibrationFile,
)
from .formats import Fp8Format
from .recipes import Recipe, Rule, needs_hessian

_NO_MAGNITUDES = (INPUT_ENERGY, RESIDUAL_SHARE)
"""What is no largest magnitude and may be 0."""


def calibration_for(recipe: Recipe, path: Path | None, checkpoint: Checkpoint) -> CalibrationFile | None:
    """The calibration that a build was given, checked, its Hessians in the basis that the recipe computes in.

    Raises:
        HerdError: the recipe needs one and none was given, or it is not one of this checkpoint, or holds what cannot
            have been measured on it.
    """
    if path is not None:
        found = CalibrationFile.open(path, checkpoint.fingerprint())
        check_measurements(found.path, found.high_precision_parts, checkpoint.config)
        _require_measured(found, found.applied_to(recipe), checkpoint.config)
        return replace(found, source=RotatedCheckpoint(checkpoint) if recipe.rotated else checkpoint)
    if needs := recipe.needs_calibration:
        raise HerdError(f"{needs} need to know how large they get: pass --calibration DIRECTORY, written by "
                        "`herdgraph calibrate`")
    return None


def _require_measured(calibration: CalibrationFile, recipe: Recipe, config: HerdConfig) -> None:
    """Refuse a calibration without something that the recipe uses, before the time that a capture takes."""
    scales = calibration.path / SCALES
    measured = read_header(scales).keys() if scales.exists() else ()
    wanted = {name: calibration.observer for name, shape in expected_tensors(config).items()
              if isinstance(recipe.layout_of_tensor(name, shape), Fp8Format)}
    if recipe.measured_caches:
        observer = "max" if recipe.caches == "int8" else calibration.observer
        measured_of_caches = (KV_AMAX, ROTATED_VALUE_AMAX) if recipe.rotated else (KV_AMAX,)
        wanted |= {f"layers.{layer}.self_attn.{name}": observer
                   for layer in range(config.text.num_layers) for name in measured_of_caches}
    if recipe.uses_hessians and not calibration.has_hessians:
        raise HerdError(f"{calibration.path} has no Hessians, by which weights of 4 bits are rounded: write it again "
                        "with `herdgraph calibrate`, without --no-hessians")
    absent = next((name for name, observer in wanted.items() if f"{observer}/{name}" not in measured), None)
    if absent is not None:
        raise HerdError(f"{calibration.path} says nothing of {absent} by observer {wanted[absent]!r}: write it again "
                        "with `herdgraph calibrate`")


def check_measurements(directory: Path, high_precision_parts: Iterable[str], config: HerdConfig) -> None:
    """Compare the files of a calibration with the model that it was measured on.

    Args:
        directory: of the calibration.
        high_precision_parts: of its ``calibration.json``.
        config: the model.

    Raises:
        HerdError: a part that no tensor belongs to, or a tensor of another name, shape or range than was measured.
    """
    shapes = expected_tensors(config)
    for part in high_precision_parts:
        if not any(Rule(part, None).applies(name) for name in shapes):
            raise HerdError(f"{directory} leaves {shortened(part)!r} in high precision, and no tensor of the model "
                            "belongs to it: write it again with `herdgraph calibrate`")
    if (path := directory / SCALES).exists():
        known = _scale_shapes(shapes, config)
        for name, tensor in read_header(path).items():
            _check_scale(path, name, tensor, known)
    known = shapes | {"lm_head.weight": (config.text.vocab_size, config.text.hidden_size)}  # a tied one is the table
    for path in sorted(directory.glob(f"{HESSIANS}/*.safetensors")):
        for name, tensor in read_header(path).items():
            _check_shape(path, name, tensor, known.get(name) and _hessian_shape(known[name]))


def _check_scale(path: Path, name: str, tensor: FileTensor, known: Mapping[str, Shape]) -> None:
    observer, _, of = name.partition("/")
    _check_shape(path, name, tensor, known.get(name if observer in _NO_MAGNITUDES else of))
    what = f"{shortened(name)} in {path}"
    if observer == RESIDUAL_SHARE:
        if not 0 <= (share := float(tensor.read())) <= 1:
            raise HerdError(f"{what} is {share:g}, a share is within 0 and 1: write it again with `herdgraph "
                            "calibrate`")
    elif observer == INPUT_ENERGY:
        require_finite(tensor.read(), what)
    else:
        require_magnitudes(tensor.read(), what)


def _check_shape(path: Path, name: str, tensor: FileTensor, shape: Shape | None) -> None:
    if shape is None:
        raise HerdError(f"{path} holds {shortened(name)}, which is no input of the model: write it again with "
                        "`herdgraph calibrate`")
    if tensor.shape != shape or not tensor.dtype.is_floating_point:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise HerdError(f"{shortened(name)} in {path} has shape {list(tensor.shape)} and type {kind}, the model needs "
                        f"{list(shape)} of floats: write it again with `herdgraph calibrate`")


def _scale_shapes(shapes: Mapping[str, Shape], config: HerdConfig) -> dict[str, Shape]:
    """Shapes of everything that a calibration may know, by name without the observer: [], or [E] of experts."""
    matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1}
    return {
        **{name: shape[:1] if len(shape) == 3 else () for name, shape in matrices.items()},
        **{f"{INPUT_ENERGY}/{name}": shape[1:2] for name, shape in matrices.items()},
        **{f"layers.{layer}.self_attn.{name}": shape for layer in range(config.text.num_layers)
           for name, shape in ((KV_AMAX, (2,)), (ROTATED_VALUE_AMAX, ()))},
        **{f"{RESIDUAL_SHARE}/layers.{layer}.{sublayer}": () for layer in range(config.text.num_layers)
           for sublayer in ("self_attn", "feed_forward")},
    }


def hessian_bytes(config: HerdConfig) -> int:
    """Bytes of the Hessians of a model."""
    return sum(4 * math.prod(shape) for shape in hessian_shapes(config).values())


def hessian_shapes(config: HerdConfig, layer: int | None = None) -> dict[str, Shape]:
    """Shapes of the Hessians of a model, or of one of its layers, by the name of the weight."""
    part = "" if layer is None else f"layers.{layer}."
    shapes = {name: _hessian_shape(shape) for name, shape in expected_tensors(config).items()
              if name.startswith(part) and needs_hessian(name)}
    return {name: shape for name, shape in shapes.items() if shape is not None}


def _hessian_shape(shape: Shape) -> Shape | None:
    """[K, K] of a weight [N, K], [E, K, K] of experts [E, K, N]; None for what is no matrix."""
    if len(shape) == 3:
        return (shape[0], shape[1], shape[1])
    return (shape[1], shape[1]) if len(shape) == 2 else None

"""A target's pipeline for people: the passes in order, and what each does."""

from __future__ import annotations

import inspect
from pathlib import Path

from ...model.quantization.calibration_file import CalibrationFile
from ...model.quantization.recipes import Recipe
from .options import PlanOptions
from .target import Target

_UNREAD = CalibrationFile(Path(), {}, "max")
"""Passes only read a calibration when they run."""


def described_passes(target: Target, recipe: Recipe, options: PlanOptions | None = None) -> list[tuple[str, str]]:
    """Name and purpose of every pass, in order.

    Args:
        target: the lowering.
        recipe: precision.
        options: what plans are built for, which decides how experts are lowered.
    """
    passes = target.pipeline(recipe, options or PlanOptions(), _UNREAD)
    return [(type(each).__name__, (inspect.getdoc(type(each)) or "").split("\n\n")[0].replace("\n", " "))
            for each in passes]

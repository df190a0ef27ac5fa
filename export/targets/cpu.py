"""Target ``cpu``: graphs for ONNX Runtime's CPU provider with our own operators (docs/native.md)."""

from __future__ import annotations

from onnx_ir.passes import InPlacePass

from ...model.quantization.calibration_file import CalibrationFile
from ...model.quantization.recipes import LADDER, Recipe
from ..passes import (
    FoldWeightTransposes,
    JoinMatMuls,
    LowerFullAttention,
    LowerMixtures,
    LowerPagedAttention,
    LowerProjects,
    LowerRoutedExperts,
    LowerTiedTable,
    PackTokens,
    Tidy,
)
from .options import PlanOptions
from .target import Target, precision_passes


class CpuTarget(Target):
    """Tokens of several sequences in one list, caches in blocks, four operators per layer; a tied table stored once."""

    @property
    def packs_weights(self) -> bool:
        """See ``Target``."""
        return True

    @property
    def ladder(self) -> tuple[Recipe, ...]:
        """See ``Target``."""
        return tuple(map(self.stored, LADDER.values()))

    def pipeline(
        self, recipe: Recipe, options: PlanOptions, calibration: CalibrationFile | None = None
    ) -> list[InPlacePass]:
        """See ``Target``."""
        del options
        return [
            PackTokens(),
            FoldWeightTransposes(),
            # FP8 products are emulated with standard operators, experts included.
            *([] if recipe.fp8 else [LowerMixtures(recipe, calibration)]),
            JoinMatMuls(),
            LowerPagedAttention(recipe.caches),
            *([] if recipe.fp8 else [LowerFullAttention()]),
            LowerRoutedExperts(),
            *([] if recipe.fp8 else [LowerTiedTable(recipe, calibration), LowerProjects(recipe, calibration)]),
            *precision_passes(recipe, calibration),
            Tidy(),
        ]


CPU = CpuTarget("cpu", "ONNX Runtime on a CPU with our own operators: packed weights, paged caches",
                "onnxruntime", "CPUExecutionProvider")
"""What a canonical graph is lowered to."""

"""Target ``cpu-stock``: graphs for ONNX Runtime's CPU provider with the operators that it brings along."""

from __future__ import annotations

from onnx_ir.passes import InPlacePass

from ...model.quantization.calibration_file import CalibrationFile
from ...model.quantization.recipes import Recipe
from ..passes import FoldWeightTransposes, JoinMatMuls, LowerCachedAttention, LowerRoutedExperts, QuantizeCaches, Tidy
from .options import PlanOptions
from .target import Target, precision_passes


class CpuStockTarget(Target):
    """Only routed experts run, and caches are appended in place."""

    def pipeline(
        self, recipe: Recipe, options: PlanOptions, calibration: CalibrationFile | None = None
    ) -> list[InPlacePass]:
        """See ``Target``."""
        del options
        return [
            FoldWeightTransposes(),
            JoinMatMuls(),
            LowerCachedAttention(),
            LowerRoutedExperts(),
            *precision_passes(recipe, calibration, caches=QuantizeCaches),
            Tidy(),
        ]


CPU_STOCK = CpuStockTarget("cpu-stock", "ONNX Runtime on a CPU with its own operators, for machines without ours",
                           "onnxruntime", "CPUExecutionProvider")

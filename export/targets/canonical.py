"""Target ``canonical``: the captured graph as it is, with the function bodies of herdgraph's operators."""

from __future__ import annotations

from onnx_ir.passes import InPlacePass

from ...model.quantization.calibration_file import CalibrationFile
from ...model.quantization.recipes import Recipe
from .options import PlanOptions
from .target import Target, precision_passes


class CanonicalTarget(Target):
    """Not lowered: any ONNX runtime can execute it, slowly. Every lowering is tested against it."""

    @property
    def is_lowered(self) -> bool:
        """See ``Target``."""
        return False

    def pipeline(
        self, recipe: Recipe, options: PlanOptions, calibration: CalibrationFile | None = None
    ) -> list[InPlacePass]:
        """See ``Target``."""
        del options
        return [*precision_passes(recipe, calibration)]


CANONICAL = CanonicalTarget("canonical", "the unlowered graph with its function bodies, for any ONNX runtime; slow, "
                            "the oracle", "onnxruntime", "CPUExecutionProvider")

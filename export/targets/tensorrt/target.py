"""Targets ``tensorrt-rtx`` and ``tensorrt``: plans, compiled from graphs in bfloat16.

Experts, by profile:

===========  =============  ==================================================================================
profile      experts        why
===========  =============  ==================================================================================
``both``     dense-masked   one plan for prompts and tokens; every expert runs on every token, which costs
                            arithmetic in prompts and reads all experts for a token: safe, the default
``decode``   gathered       a token reads its own experts only; copies them, so for small batches
``prefill``  unrolled       exact arithmetic: each expert on its own rows, at least one
===========  =============  ==================================================================================

Where TensorRT has a fused mixture of experts for the GPU (SM 100 to 119, target ``tensorrt`` only), it takes the place
of all three in recipes without FP8. A bundle holds one plan of the decoder: for a cluster that gives prompts and tokens
to different GPUs, build two. With ``decode`` a prompt is read token by token, and pictures cannot be.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import InPlacePass

from ....model.quantization.calibration_file import CalibrationFile
from ....model.quantization.recipes import Recipe
from ...passes import (
    ComputeIn,
    FoldWeightTransposes,
    JoinMatMuls,
    LowerCollectives,
    LowerExpertsDense,
    LowerExpertsFused,
    LowerExpertsGathered,
    LowerExpertsUnrolled,
    LowerExplicitAttention,
    QuantizeCachesFp8,
    Tidy,
)
from ..options import PlanOptions
from ..target import Target, WritePlan, precision_passes
from .builder import Profile, build_plan, check_targets, load_tensorrt_rtx
from .enterprise import build_plan_here, has_fused_experts, load_tensorrt
from .plans import described, write_plan

EXPERTS: dict[str, Callable[[], InPlacePass]] = {
    "both": LowerExpertsDense, "decode": LowerExpertsGathered, "prefill": LowerExpertsUnrolled,
}


class TensorRtRtxTarget(Target):
    """Plans for several GPUs, built without one."""

    @property
    def float_bytes(self) -> int:
        """See ``Target``."""
        return 2

    def pipeline(
        self, recipe: Recipe, options: PlanOptions, calibration: CalibrationFile | None = None
    ) -> list[InPlacePass]:
        """See ``Target``."""
        return [
            FoldWeightTransposes(),
            JoinMatMuls(),
            LowerExplicitAttention(),
            LowerCollectives(),
            self.experts(recipe, options),
            *precision_passes(recipe, calibration, caches=QuantizeCachesFp8),
            Tidy(),
            ComputeIn(ir.DataType.BFLOAT16),
        ]

    def experts(self, recipe: Recipe, options: PlanOptions) -> InPlacePass:
        """The lowering of routed experts."""
        del recipe
        return EXPERTS[options.profile]()

    def plan_writer(self, recipe: Recipe, options: PlanOptions) -> WritePlan | None:
        """See ``Target``."""
        check_targets(options.sm, fp8=recipe.fp8)
        load_tensorrt_rtx()

        def build(onnx: Path, plan: Path, profiles: list[Profile]) -> dict[str, Any]:
            return described(build_plan(onnx, plan, sm=options.sm, profiles=profiles,
                                        allow_fallback=options.allow_fallback))

        return partial(write_plan, options=options, build=build)


class TensorRtTarget(TensorRtRtxTarget):
    """Plans for the GPU of this machine."""

    def experts(self, recipe: Recipe, options: PlanOptions) -> InPlacePass:
        """The lowering of routed experts: TensorRT's own where it has one for this GPU and precision."""
        return LowerExpertsFused() if not recipe.fp8 and has_fused_experts() else super().experts(recipe, options)

    def plan_writer(self, recipe: Recipe, options: PlanOptions) -> WritePlan | None:
        """See ``Target``."""
        del recipe
        trt = load_tensorrt()

        def build(onnx: Path, plan: Path, profiles: list[Profile]) -> dict[str, Any]:
            build_plan_here(onnx, plan, profiles=profiles)
            return {"tensorrt": trt.__version__}

        return partial(write_plan, options=options, build=build)


TENSORRT_RTX = TensorRtRtxTarget("tensorrt-rtx", "TensorRT-RTX plans for several GPUs, built without one",
                                 "tensorrt", "tensorrt_rtx")
TENSORRT = TensorRtTarget("tensorrt", "TensorRT plans for the GPU of this machine; not run on hardware",
                          "tensorrt", "tensorrt")

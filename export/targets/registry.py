"""Targets: what a canonical graph is lowered to. A target is a name, a list of passes and the recipes it knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, common

from ...errors import HerdError
from ...model.llama4.operators import DOMAIN
from ...model.quantization.calibration_file import CalibrationFile
from ...model.quantization.recipes import RECIPES, Caches, Recipe
from ..graph.functions import is_collective
from ..passes import (
    FoldWeightTransposes,
    JoinMatMuls,
    LowerCachedAttention,
    LowerCollectives,
    LowerExplicitAttention,
    LowerRoutedExperts,
    QuantizeCaches,
    QuantizeCachesFp8,
    QuantizeFp8,
    QuantizeMatMuls,
    RotateHidden,
)
from .precision import PRECISIONS


@dataclass(frozen=True)
class Target:
    """A lowering.

    Attributes:
        name: as given on the command line and stored in the manifest.
        purpose: one line for people.
        passes: pass classes, applied in order.
        recipes: names of the precision recipes it can build.
        caches: how keys and values may be stored.
        kind: ``graph`` for ONNX Runtime, ``plan`` for what TensorRT compiles.
    """

    name: str
    purpose: str
    passes: tuple[type[InPlacePass], ...]
    recipes: tuple[str, ...]
    caches: tuple[Caches, ...] = ("float",)
    kind: Literal["graph", "plan"] = "graph"

    def lower(
        self, model: ir.Model, recipe: Recipe, calibration: CalibrationFile | None = None, *,
        experts: type[InPlacePass] = LowerRoutedExperts,
    ) -> None:
        """Apply the passes in place, then the recipe, then remove what they left behind.

        Args:
            model: canonical, its weights bound.
            recipe: precision.
            calibration: for recipes that need one.
            experts: the lowering of routed experts.

        Raises:
            HerdError: a herdgraph operator has no lowering here (a defect of the target).
        """
        for rewrite in self.passes:
            rewrite()(model)
        if self.passes:
            experts()(model)
        if recipe.rotated:
            RotateHidden()(model)
        QuantizeMatMuls(recipe, calibration)(model)
        if recipe.needs_calibration:
            assert calibration is not None, "build_bundle refuses such a recipe without calibration"
            QuantizeFp8(recipe, calibration)(model)
            if recipe.caches != "float":
                {"int8": QuantizeCaches, "fp8": QuantizeCachesFp8}[recipe.caches](calibration)(model)
        if self.passes:
            for tidy in (common.CommonSubexpressionEliminationPass(), common.RemoveUnusedNodesPass(),
                         common.RemoveUnusedFunctionsPass(), common.RemoveUnusedOpsetsPass()):
                tidy(model)
            left = sorted({node.op_type for node in model.graph.all_nodes()
                           if node.domain == DOMAIN and not is_collective(node)})
            if left:
                raise HerdError(f"target {self.name} does not lower {', '.join(left)}: report this as a defect")


_TENSORRT = (FoldWeightTransposes, JoinMatMuls, LowerExplicitAttention, LowerCollectives)

TARGETS = {
    target.name: target
    for target in (
        Target("cpu", "ONNX Runtime on a CPU: only routed experts run, caches are appended in place",
               (FoldWeightTransposes, JoinMatMuls, LowerCachedAttention), *PRECISIONS["cpu"]),
        Target("tensorrt-rtx", "TensorRT-RTX plans for several GPUs, built without one",
               _TENSORRT, *PRECISIONS["tensorrt-rtx"], "plan"),
        Target("tensorrt", "TensorRT plans for the GPU of this machine; not run on hardware",
               _TENSORRT, *PRECISIONS["tensorrt"], "plan"),
        Target("canonical", "the unlowered graph with its function bodies, for any ONNX runtime; slow, the oracle", (),
               *PRECISIONS["canonical"]),
    )
}


def target_of(name: str, recipe: str | Recipe) -> tuple[Target, Recipe]:
    """A target and a recipe by name, checked against each other; a recipe of your own is taken as it is.

    Raises:
        HerdError: no such target or recipe, or the target does not know the recipe.
    """
    if name not in TARGETS:
        raise HerdError(f"no target is called {name!r}: choose one of {', '.join(TARGETS)}")
    target = TARGETS[name]
    if isinstance(recipe, Recipe):
        if recipe.caches not in target.caches:
            raise HerdError(f"target {name} cannot store keys and values as {recipe.caches}: choose one of "
                            f"{', '.join(target.caches)}")
        return target, recipe
    if recipe not in target.recipes:
        raise HerdError(f"target {name} has no recipe {recipe!r}: choose one of {', '.join(target.recipes)}")
    return target, RECIPES[recipe]

"""Targets: what a canonical graph is lowered to. A target is a name, a list of passes and the recipes it knows."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, common

from ..errors import HerdError
from ..model.operators import DOMAIN
from .moments import MomentsFile
from .passes import (
    FoldWeightTransposes,
    JoinMatMuls,
    LowerCachedAttention,
    LowerRoutedExperts,
    QuantizeCaches,
    QuantizeMatMuls,
    RotateHidden,
)
from .recipes import RECIPES, Recipe


@dataclass(frozen=True)
class Target:
    """A lowering.

    Attributes:
        name: as given on the command line and stored in the manifest.
        purpose: one line for people.
        passes: pass classes, applied in order.
        recipes: names of the precision recipes it can build.
    """

    name: str
    purpose: str
    passes: tuple[type[InPlacePass], ...]
    recipes: tuple[str, ...]

    def lower(self, model: ir.Model, recipe: Recipe, moments: MomentsFile | None = None) -> None:
        """Apply the passes in place, then the recipe, then remove what they left behind.

        Raises:
            HerdError: a herdgraph operator has no lowering here (a defect of the target).
        """
        for rewrite in self.passes:
            rewrite()(model)
        if recipe.rotated:
            RotateHidden()(model)
        QuantizeMatMuls(recipe, moments)(model)
        if recipe.int8_caches:
            assert moments is not None, "build_bundle refuses 8-bit caches without calibration"
            QuantizeCaches(moments)(model)
        if self.passes:
            for tidy in (common.CommonSubexpressionEliminationPass(), common.RemoveUnusedNodesPass(),
                         common.RemoveUnusedFunctionsPass(), common.RemoveUnusedOpsetsPass()):
                tidy(model)
            left = sorted({node.op_type for node in model.graph.all_nodes() if node.domain == DOMAIN})
            if left:
                raise HerdError(f"target {self.name} does not lower {', '.join(left)}: report this as a defect")


TARGETS = {
    target.name: target
    for target in (
        Target("cpu", "ONNX Runtime on a CPU: only routed experts run, caches are appended in place",
               (FoldWeightTransposes, JoinMatMuls, LowerRoutedExperts, LowerCachedAttention),
               ("fp32", "int8", "int4")),
        Target("canonical", "the unlowered graph with its function bodies, for any ONNX runtime; slow, the oracle", (),
               ("fp32",)),
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
        return target, recipe
    if recipe not in target.recipes:
        raise HerdError(f"target {name} has no recipe {recipe!r}: choose one of {', '.join(target.recipes)}")
    return target, RECIPES[recipe]

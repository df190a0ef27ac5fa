"""What a target is: a name, the passes that lower a canonical graph to it, and what runs or compiles the result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import InPlacePass

from ...errors import HerdError
from ...model.config import HerdConfig
from ...model.llama4.operators import DOMAIN
from ...model.quantization.calibration_file import CalibrationFile
from ...model.quantization.recipes import RECIPES, Caches, Recipe
from ..graph.functions import is_collective
from ..passes import QuantizeFp8, QuantizeMatMuls, QuantizeTable, RotateHidden
from ..passes.quantize._caches import CachesPass
from .options import PlanOptions
from .precision import PRECISIONS

WritePlan = Callable[[ir.Model, Path, str, HerdConfig, Callable[[int], None]], tuple[str, dict[str, Any]]]
"""Compiles a lowered graph: model, directory, role, configuration, and a hook that is called with the bytes of every
weight. Returns the file's name and what the manifest is to say of it."""


@dataclass(frozen=True)
class Target(ABC):
    """A lowering.

    Attributes:
        name: as given on the command line and stored in the manifest.
        purpose: one line for people.
        executor: what runs the result (``runtimes/executors/load.py``).
        provider: what the executor runs it with.
    """

    name: str
    purpose: str
    executor: str
    provider: str

    @property
    def recipes(self) -> tuple[str, ...]:
        """Names of the precision recipes that it can build."""
        return PRECISIONS[self.name].recipes

    @property
    def caches(self) -> tuple[Caches, ...]:
        """How it can store keys and values."""
        return PRECISIONS[self.name].caches

    @property
    def token_scales(self) -> bool:
        """Whether 8-bit keys and values have a scale per token, which needs no calibration."""
        return PRECISIONS[self.name].token_scales

    @property
    def is_lowered(self) -> bool:
        """Whether the result is free of herdgraph's own operators; only such graphs can be split over ranks."""
        return True

    @property
    def packs_weights(self) -> bool:
        """Whether weights are written as operators of ours read them."""
        return False

    @property
    def float_bytes(self) -> int:
        """Bytes of an element of a weight that stays in floating point."""
        return 4

    @property
    def ladder(self) -> tuple[Recipe, ...]:
        """Recipes between whose formats a size in bits chooses, the fewest bits first."""
        few = RECIPES["int4"]
        everything = tuple(rule for rule in few.rules if rule.part not in ("lm_head", "self_attn"))
        return self.stored(replace(few, rules=everything)), self.stored(RECIPES["int8"])

    def stored(self, recipe: Recipe) -> Recipe:
        """A recipe in the formats that the target has."""
        return replace(recipe, token_scales=self.token_scales)

    @abstractmethod
    def pipeline(
        self, recipe: Recipe, options: PlanOptions, calibration: CalibrationFile | None = None
    ) -> list[InPlacePass]:
        """All passes, in order, from the canonical graph with its weights bound to what is written.

        Args:
            recipe: precision.
            options: what plans are built for.
            calibration: for recipes that need one.
        """

    def plan_writer(self, recipe: Recipe, options: PlanOptions) -> WritePlan | None:
        """What compiles lowered graphs to plans, None where graphs are run as they are.

        Raises:
            HerdError: a package is missing, or the options ask for what cannot be built here.
        """
        del recipe, options
        return None

    def lower(
        self, model: ir.Model, recipe: Recipe, options: PlanOptions, calibration: CalibrationFile | None = None
    ) -> None:
        """Apply the pipeline in place. Arguments as in ``pipeline``.

        Raises:
            HerdError: a herdgraph operator has no lowering here (a defect of the target).
        """
        for rewrite in self.pipeline(recipe, options, calibration):
            rewrite(model)
        left = sorted({node.op_type for node in model.graph.all_nodes()
                       if node.domain == DOMAIN and not is_collective(node)})
        if left and self.is_lowered:
            raise HerdError(f"target {self.name} does not lower {', '.join(left)}: report this as a defect")


def precision_passes(
    recipe: Recipe, calibration: CalibrationFile | None, caches: type[CachesPass] | None = None
) -> Sequence[InPlacePass]:
    """The passes that store weights, activations and caches as a recipe says.

    Args:
        recipe: precision.
        calibration: for recipes that need one.
        caches: stores keys and values in the 8 bits of the target, None where it has none.
    """
    rotate = [RotateHidden()] if recipe.rotated else []
    weights: list[InPlacePass] = [QuantizeMatMuls(recipe, calibration)] if recipe.rules else []
    weights += [QuantizeTable(recipe)] if recipe.embedding_layout else []
    if not recipe.needs_calibration:
        return [*rotate, *weights]
    assert calibration is not None, "plan_build refuses such a recipe without calibration"
    fp8 = [QuantizeFp8(recipe, calibration)] if recipe.fp8 else []
    kv = [caches(calibration)] if caches is not None and recipe.measured_caches else []
    return [*rotate, *weights, *fp8, *kv]

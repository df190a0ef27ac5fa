"""What a build was asked for, and its steps: capture, lower, write."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..model.checkpoint import Checkpoint
from ..model.checkpoint.rotated import RotatedCheckpoint
from ..model.config import HerdConfig, TextConfig
from ..model.quantization.calibration_file import CalibrationFile
from ..model.quantization.recipes import Recipe
from ..runtimes.bundle.shards import Shards
from .graph.capture import bind_weights, capture_decoder, capture_vision
from .passes import LowerRoutedExperts
from .targets.registry import Target
from .targets.tensorrt.plans import Build, PlanOptions, write_plan
from .weights.origin import origin_of
from .weights.stream import initializers, stream

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Hooks for a progress display.

    Attributes:
        stage: called with the name of each step.
        weights: called with the bytes of all weights once they are known; again when they are known better.
        written: called with the bytes of every weight that was written.
    """

    stage: Callable[[str], None] = lambda _: None
    weights: Callable[[int], None] = lambda _: None
    written: Callable[[int], None] = lambda _: None


@dataclass
class BuildResult:
    """What has been written of a bundle, as its manifest will say; attributes as of ``Manifest``."""

    graphs: dict[str, str] = field(default_factory=dict)
    plans: dict[str, Any] = field(default_factory=dict)
    active_bytes: int = 0
    shards: Shards | None = None


@dataclass(frozen=True)
class Job:
    """A build.

    Attributes:
        checkpoint: the whole model.
        target: the lowering.
        recipe: precision.
        calibration: for recipes that need one.
        plans: what TensorRT plans are built for.
        build: builds them; None for targets that run graphs.
        progress: hooks for a display.
    """

    checkpoint: Checkpoint
    target: Target
    recipe: Recipe
    calibration: CalibrationFile | None
    plans: PlanOptions
    build: Build | None
    progress: Progress

    @property
    def config(self) -> HerdConfig:
        """The model as it is captured."""
        return self._source(self.checkpoint).config

    @property
    def roles(self) -> tuple[str, ...]:
        """Graphs of the model."""
        return ("decoder", "vision") if self.checkpoint.config.vision else ("decoder",)

    def captured(self, role: str) -> ir.Model:
        """A canonical graph of the whole model, its weights unbound."""
        self.progress.stage(f"capturing {role}")
        return {"decoder": capture_decoder, "vision": capture_vision}[role](self.config)

    def lowered(
        self, what: str, model: ir.Model, checkpoint: Checkpoint | None = None,
        calibration: CalibrationFile | None = None,
    ) -> ir.Model:
        """A captured graph with its weights, lowered in place.

        Args:
            what: is lowered, for the display.
            model: canonical.
            checkpoint: where weights are read, None for the whole one.
            calibration: for these weights, None for the whole model's.
        """
        bind_weights(model, self._source(checkpoint or self.checkpoint))
        self.progress.stage(f"lowering {what} for {self.target.name} {self.recipe.name}")
        experts = LowerRoutedExperts if self.build is None else self.plans.experts
        self.target.lower(model, self.recipe, calibration or self.calibration, experts=experts)
        logger.info("%s graph: %d nodes", what, sum(1 for _ in model.graph.all_nodes()))
        return model

    def write(self, model: ir.Model, directory: Path, role: str, made: BuildResult) -> None:
        """Write a lowered graph with its weights, or its plan."""
        self.progress.stage(f"writing {role} weights")
        if self.build is None:
            stream(model, directory, f"{role}.data", self.progress.written)
            ir.save(model, directory / f"{role}.onnx")
            made.graphs[role] = f"{role}.onnx"
        else:
            made.graphs[role], made.plans[role] = self.write_plan(model, directory, role)

    def write_plan(self, model: ir.Model, directory: Path, role: str) -> tuple[str, dict[str, Any]]:
        """As of ``plans.write_plan``."""
        assert self.build is not None, "graphs have no plans"
        return write_plan(model, directory, role, self.checkpoint.config, self.plans, self.build, self.progress.written)

    def _source(self, checkpoint: Checkpoint) -> Checkpoint | RotatedCheckpoint:
        return RotatedCheckpoint(checkpoint) if self.recipe.rotated else checkpoint


def weight_bytes(model: ir.Model) -> int:
    """Bytes of the distinct weights of a lowered model."""
    distinct = {id(value.const_value): value.const_value.nbytes for value in initializers(model) if value.const_value}
    return sum(distinct.values())


def active_bytes(decoder: ir.Model, config: TextConfig) -> int:
    """Bytes of weights that one decoded token reads: all but the embedding table and the experts not chosen."""
    table = decoder.graph.initializers.get("embed_tokens.weight")
    routed = sum(value.const_value.nbytes for value in initializers(decoder)
                 if value.const_value is not None and ".experts." in origin_of(value.const_value).name)
    rest = weight_bytes(decoder) - routed - (table.const_value.nbytes if table and table.const_value else 0)
    return rest + (routed * config.top_k // config.num_experts if routed else 0)

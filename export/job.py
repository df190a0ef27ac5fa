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
from ..model.quantization.recipes import Recipe, is_table
from ..runtimes.bundle.shards import Shards
from .graph.capture import bind_weights, capture_decoder, capture_vision
from .metadata import describe_graph
from .targets.options import PlanOptions
from .targets.target import Target, WritePlan
from .weights.exposed import expose_weights
from .weights.origin import origin_of
from .weights.writer import initializers, stream

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildProgress:
    """Hooks for a progress display.

    Attributes:
        stage: called with the name of each step.
        weights: called with the bytes of all weights once they are known; again when they are known better.
        written: called with the bytes of every weight that was written.
        checked: called with the bytes of the checkpoint's weights that were checked so far, and of all.
    """

    stage: Callable[[str], None] = lambda _: None
    weights: Callable[[int], None] = lambda _: None
    written: Callable[[int], None] = lambda _: None
    checked: Callable[[int, int], None] = lambda done, total: None


@dataclass
class BuildResult:
    """What has been written of a bundle so far; the attributes go into the manifest, see ``Manifest``."""

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
        options: what TensorRT plans are built for.
        write_plan: compiles lowered graphs; None for targets that run them.
        progress: hooks for a display.
        bits: of the weights of every part of the model, where a size decides them.
    """

    checkpoint: Checkpoint
    target: Target
    recipe: Recipe
    calibration: CalibrationFile | None
    options: PlanOptions
    write_plan: WritePlan | None
    progress: BuildProgress = field(default_factory=BuildProgress)
    bits: dict[str, int] = field(default_factory=dict)

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
        self.target.lower(model, self.recipe, self.options, calibration or self.calibration)
        logger.info("%s graph: %d nodes", what, sum(1 for _ in model.graph.all_nodes()))
        return model

    def write(self, model: ir.Model, directory: Path, role: str, made: BuildResult) -> None:
        """Write a lowered graph with its weights, or its plan."""
        self.progress.stage(f"writing {role} weights")
        if self.write_plan is None:
            stream(model, directory, f"{role}.data", self.progress.written)
            self.describe(model, role)
            ir.save(model, directory / f"{role}.onnx")
            made.graphs[role] = f"{role}.onnx"
        else:
            made.graphs[role], made.plans[role] = self.compiled(self.write_plan, model, directory, role)

    def describe(self, model: ir.Model, role: str) -> None:
        """Let a graph say what a loader needs that knows nothing of bundles."""
        describe_graph(model, role, self.checkpoint, target=self.target.name, recipe=self.recipe.name)
        if self.target.packs_weights:
            expose_weights(model)

    def compiled(self, write: WritePlan, model: ir.Model, directory: Path, role: str) -> tuple[str, dict[str, Any]]:
        """Write the plan of a lowered graph; its file name, and what the manifest is to say of it."""
        return write(model, directory, role, self.checkpoint.config, self.progress.written)

    def _source(self, checkpoint: Checkpoint) -> Checkpoint | RotatedCheckpoint:
        return RotatedCheckpoint(checkpoint) if self.recipe.rotated else checkpoint


def _is_looked_up(value: ir.Value) -> bool:
    """Whether nothing but rows of a table are read of an initializer; a tied table is the head as well."""
    assert value.const_value is not None
    return is_table(origin_of(value.const_value).name) and all(user.op_type == "Gather" for user, _ in value.uses())


def weight_bytes(model: ir.Model) -> int:
    """Bytes of the distinct weights of a lowered model."""
    distinct = {id(value.const_value): value.const_value.nbytes for value in initializers(model) if value.const_value}
    return sum(distinct.values())


def active_bytes(decoder: ir.Model, config: TextConfig) -> int:
    """Bytes of weights that one decoded token reads: all but the embedding table and the experts not chosen."""
    table = sum(value.const_value.nbytes for value in decoder.graph.initializers.values()
                if value.const_value is not None and _is_looked_up(value))
    routed = sum(value.const_value.nbytes for value in initializers(decoder)
                 if value.const_value is not None and ".experts." in origin_of(value.const_value).name)
    rest = weight_bytes(decoder) - routed - table
    return rest + (routed * config.top_k // config.num_experts if routed else 0)

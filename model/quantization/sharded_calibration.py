"""A calibration as one rank's graph asks for it: its layers and experts counted from 0, its share of the inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..config import HerdConfig
from ..config.shard_plan import ShardPlan
from .calibration_file import CalibrationFile, stored_name


@dataclass(frozen=True)
class RankCalibration(CalibrationFile):
    """What was measured on the whole model, for the weights and caches of a rank.

    Attributes:
        plan: how the model is split.
        config: the whole model.
        rank: whose part is asked for.
    """

    plan: ShardPlan
    config: HerdConfig
    rank: int

    @classmethod
    def of(cls, whole: CalibrationFile, plan: ShardPlan, config: HerdConfig, rank: int) -> RankCalibration:
        """The part of a rank."""
        return cls(whole.path, whole.description, whole.observer, plan, config, rank)

    def kv_amax(self, layer: int, *, observer: str | None = None) -> tuple[float, float] | None:
        """Largest magnitudes of a layer's keys and values, the layer counted from the stage's first."""
        first = self.plan.layers_of(self.plan.stage_of(self.rank), self.config.text.num_layers).start
        return super().kv_amax(first + layer, observer=observer)

    def input_amax(self, weight: str) -> Tensor:
        """As of the whole; experts are the rank's own."""
        name, expert = stored_name(weight)
        found = super().input_amax(name)
        own = found[self._experts.start : self._experts.stop] if found.ndim else found
        return own if expert is None else own[expert]

    def centre(self, weight: str) -> Tensor | None:
        """The part of the centre whose inputs the rank's weight meets."""
        found = super().centre(weight)
        return None if found is None else found[self._inputs(weight)]

    def moments(self, weight: str) -> Tensor | None:
        """Second moments among the inputs that the rank's weight meets."""
        name, expert = stored_name(weight)
        found = self.moments_of(name, None if expert is None else self._experts[expert])
        return None if found is None else found[self._inputs(weight)][:, self._inputs(weight)]

    @property
    def _experts(self) -> range:
        return self.plan.experts_of(self.rank, self.config.text.num_experts)

    def _inputs(self, weight: str) -> Any:
        """Where the rank's inputs of a weight are among those of the whole: the second axis of any stored weight."""
        parts = self.plan.parts(self.config, stored_name(weight)[0], self.rank) or {}
        return slice(parts[1][0].start, parts[1][0].stop) if 1 in parts else slice(None)

"""A calibration as one rank's graph asks for it: its layers and experts counted from 0, its share of the inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..config import HerdConfig
from ..config.shard_plan import ShardPlan
from .calibration_file import CalibrationFile


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
        return cls(whole.path, whole.description, whole.observer, plan, config, rank, source=whole.source)

    def kv_amax(self, layer: int, *, observer: str | None = None) -> tuple[float, float] | None:
        """Largest magnitudes of a layer's keys and values, the layer counted from the stage's first."""
        first = self.plan.layers_of(self.plan.stage_of(self.rank), self.config.text.num_layers).start
        return super().kv_amax(first + layer, observer=observer)

    def input_amax(self, name: str) -> Tensor:
        """Largest magnitude of the input of a weight: a scalar, or [e] for the experts of the rank."""
        found = super().input_amax(name)
        return found[self._experts.start : self._experts.stop] if found.ndim else found

    def _energy(self, name: str) -> Tensor | None:
        found = super()._energy(name)
        return None if found is None else found[self._inputs(name)]

    def hessian(self, name: str, expert: int | None = None) -> Tensor | None:
        """The Hessian of those inputs that the rank's part of a weight meets; experts count from the rank's first."""
        found = super().hessian(name, None if expert is None else self._experts[expert])
        return None if found is None else found[self._inputs(name)][:, self._inputs(name)]

    @property
    def _experts(self) -> range:
        return self.plan.experts_of(self.rank, self.config.text.num_experts)

    def _inputs(self, name: str) -> Any:
        """Where the rank's inputs of a weight are among those of the whole: the second axis of any stored weight."""
        parts = self.plan.parts(self.config, name, self.rank) or {}
        return slice(parts[1][0].start, parts[1][0].stop) if 1 in parts else slice(None)

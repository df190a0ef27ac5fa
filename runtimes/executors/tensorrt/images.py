"""Runs the image plan, remembering features as ``VisionRunner`` does. Not run on hardware."""

from __future__ import annotations

from typing import Any

import numpy as np

from ....model.config import HerdConfig
from ...kv_cache.sequence import Features
from ..ort.vision import VisionRunner
from .device import DeviceExecutor


class PlanVisionRunner(VisionRunner):
    """The image tower of a bundle as a plan.

    Args:
        executor: holds the image plan.
        config: the model.
    """

    def __init__(self, executor: DeviceExecutor, config: HerdConfig) -> None:
        self._prepare(config)
        self.executor = executor

    def run(self, pixel_values: np.ndarray[Any, Any]) -> Features:
        """Tiles to features in one call."""
        return self.executor.run_simple("pixel_values", np.ascontiguousarray(pixel_values), "image_features")

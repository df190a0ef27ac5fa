"""Runs TensorRT plans. The host's part is tested on a CPU; ``cuda.py`` and ``device.py`` were not run on hardware."""

from .executor import Call, Executor, Limits, choose_profile
from .runner import PlanRunner

__all__ = ["Call", "Executor", "Limits", "PlanRunner", "choose_profile"]

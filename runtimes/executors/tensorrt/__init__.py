"""Runs TensorRT plans. All is tested on imitations of CUDA and TensorRT, and nothing was run on hardware."""

from .executor import Call, Executor, Limits, choose_profile
from .runner import PlanRunner

__all__ = ["Call", "Executor", "Limits", "PlanRunner", "choose_profile"]

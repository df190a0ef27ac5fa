"""TensorRT plans: built, read and checked without a GPU. ``builder`` needs ``tensorrt_rtx``; the rest only bytes."""

from .check import Check, Row, check_plan
from .plan import Gemm, Plan, PlanGraph, PlanTensor

__all__ = ["Check", "Gemm", "Plan", "PlanGraph", "PlanTensor", "Row", "check_plan"]

"""GPUs that TensorRT-RTX compiles plans for, by compute capability. Torch-free."""

from __future__ import annotations

RTX_FP8_SM = ("89", "120", "121")
"""With FP8 arithmetic."""
RTX_OLD_SM = ("75", "80", "86")
"""Without."""
RTX_SM = (*RTX_OLD_SM, *RTX_FP8_SM)

"""Layers that run twice: activation checkpointing computes them again inside of the backward pass."""

from __future__ import annotations

import torch


def recomputing() -> bool:
    """Whether a backward pass is running in this thread, so that what is seen now was seen before.

    What counts or remembers asks this; what computes must not: both runs have to be the same operations.
    """
    return torch._C._current_graph_task_id() != -1

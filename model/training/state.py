"""The state of a training run: everything that the next step depends on, and what checkpoints save."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..llama4.model import Llama4
from .data import Loader
from .objective import Objective
from .optim import AveragedWeights
from .parallel.ranks import Ranks


@dataclass
class TrainProgress:
    """Where a run stands, and what it measured.

    Attributes:
        step: steps done.
        tokens: labelled tokens seen, over all ranks.
        losses: mean loss per token of every step.
        held_out: held-out losses by step.
    """

    step: int = 0
    tokens: int = 0
    losses: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainState:
    """What a step changes; the objects stay the same, their contents change.

    Attributes:
        model: prepared for training.
        optimizer: its state of every parameter.
        average: averaged weights, None when none are kept.
        loader: batches of this rank, and where it stands.
        objective: what is minimised.
        ranks: this process among others.
        progress: where the run stands.
    """

    model: Llama4
    optimizer: torch.optim.Optimizer
    average: AveragedWeights | None
    loader: Loader
    objective: Objective
    ranks: Ranks
    progress: TrainProgress = field(default_factory=TrainProgress)

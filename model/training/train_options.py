"""How long a run trains, in which precision, and what it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...errors import HerdError


@dataclass(frozen=True)
class TrainOptions:
    """The training loop.

    Attributes:
        steps: optimizer steps of the run.
        accumulate: batches per step and rank.
        precision: of matrix products: fp32, bf16 by autocast, or fp8 in attention and feed-forwards and bf16 elsewhere.
        recompute: compute each layer again in the backward pass instead of keeping its activations.
        log_every: steps between log lines and records.
        evaluate_every: steps between held-out losses, 0 for the end only.
        save_every: steps between checkpoints, 0 for none by steps.
        save_minutes: minutes between checkpoints, which a killed run loses at most; 0 for none by time. There is always
            one at the end.
        seed: of new weights and of the order of samples.
    """

    steps: int = 1000
    accumulate: int = 1
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    recompute: bool = False
    log_every: int = 10
    evaluate_every: int = 0
    save_every: int = 0
    save_minutes: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {"steps": 0, "accumulate": 1, "log_every": 1, "evaluate_every": 0, "save_every": 0, "save_minutes": 0,
                  "seed": 0}
        for name, least in bounds.items():
            if not (value := getattr(self, name)) >= least:
                raise HerdError(f"train.{name} is {value}, it must be at least {least}")

"""A weight of the soft targets that keeps both terms of the loss alive, whatever their scales become in training.

Shapes: N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .weightings import Signals, Weighting, require_share


@dataclass
class LossRatioBalance(Weighting):
    """One weight for all tokens, so that the soft term makes up ``share`` of the gradient's size.

    The size of a token's gradient is taken as its L1 norm in the logits. For cross-entropy that is 2 (1 - q(y)),
    exactly. For T² KL it is 2 T · TV(p, q), at most  2 T min(1, sqrt(D / 2))  by Pinsker's inequality: a bound that
    costs no look at the vocabulary and serves the other divergences and sparse teachers too. With running means G_s
    and G_h,

        a G_s / (a G_s + (1 - a) G_h) = share    gives    a = share G_h / (share G_h + (1 - share) G_s)

    Attributes:
        share: of the soft term.
        decay: of the running means, per batch.
        reduce: sums a tensor over the ranks, so that all of them weigh alike (``Ranks.sum_tensor``).
        soft: running mean of the soft term's gradient, 0 before the first batch.
        hard: the same of the hard term's.
        batches: seen so far.
    """

    share: float = 0.5
    decay: float = 0.99
    reduce: Callable[[Tensor], Tensor] = field(default=lambda tensor: tensor, repr=False)
    soft: float = 0.0
    hard: float = 0.0
    batches: int = 0

    def __post_init__(self) -> None:
        require_share("share", self.share)
        require_share("decay", self.decay)

    def observe(self, signals: Signals) -> None:
        """Move the running means; the first batch sets them."""
        soft_N, hard_N = gradient_sizes(signals)
        totals = torch.stack((soft_N.sum(), hard_N.sum(), torch.tensor(float(len(soft_N)), device=soft_N.device)))
        soft, hard, count = self.reduce(totals.double()).tolist()
        if not count or not math.isfinite(soft + hard):
            return
        self.batches += 1
        # A mean over fewer batches than the decay looks back on would still be full of the zero it began with.
        new = max(1 - self.decay, 1 / self.batches)
        self.soft += new * (soft / count - self.soft)
        self.hard += new * (hard / count - self.hard)

    def __call__(self, signals: Signals) -> Tensor:
        """See ``Weighting``."""
        return torch.full_like(signals.divergence_N, self.weight)

    @property
    def weight(self) -> float:
        """The weight that the running means ask for."""
        total = self.share * self.hard + (1 - self.share) * self.soft
        return self.share * self.hard / total if total else self.share

    def state_dict(self) -> dict[str, Any]:
        """See ``Weighting``."""
        return {"soft": self.soft, "hard": self.hard, "batches": self.batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``Weighting``."""
        self.soft, self.hard, self.batches = float(state["soft"]), float(state["hard"]), int(state["batches"])


def gradient_sizes(signals: Signals) -> tuple[Tensor, Tensor]:
    """L1 norms of both terms' gradients in the logits, [N] each: a bound of the soft one's, the hard one's exactly."""
    # An estimate from drawn ids may be below zero.
    distance_N = (signals.divergence_N.clamp(min=0) / 2).sqrt().clamp(max=1)
    return 2 * signals.temperature * distance_N, -2 * torch.expm1(signals.student_label_N)

"""How much each token listens to the teacher and how much to its label.

They choose the a_t of  a_t · T² · KL(p_t || q_t) + (1 - a_t) · CE(y_t, q_t),  where p is the teacher's distribution, q
the student's and y the label.

Meta wrote that Llama 4 Maverick was codistilled with "a novel distillation loss function that dynamically weights the
soft and hard targets through training", and **never published it**: no equation, no schedule, no temperature. The one
here, ``Responsibility``, is herdgraph's own. It takes the label for a draw from a mixture: with chance w from the
teacher, else from what the student believes by now,

    y ~ w p + (1 - w) q,        a = P(the teacher drew y | y) = w p(y) / (w p(y) + (1 - w) q(y))

Averaged over such labels, the target a p + (1 - a) y is the mixture itself: the weights look at the label, and yet do
not bend what is learned. Early q knows nothing, and nearly all labels are the teacher's. Where the teacher is sure of
something else than what stands there, the label counts from the first step on. The better the student becomes, the
more labels it explains itself: soft early, hard late, without a schedule.

Measured (docs/distillation.md), it does no better than the best fixed weight: the default is fixed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ....errors import HerdError


class Signals(NamedTuple):
    """What is known of N tokens when their weights are chosen; float32, without gradients.

    Attributes:
        teacher_label_N: log p(y) at temperature 1.
        student_label_N: log q(y) at temperature 1.
        step: optimizer steps done.
    """

    teacher_label_N: Tensor
    student_label_N: Tensor
    step: int = 0


class Weighting(ABC):
    """Weights of the soft targets."""

    @abstractmethod
    def __call__(self, signals: Signals) -> Tensor:
        """a_t of every token, [N] within 0..1."""


@dataclass(frozen=True)
class Fixed(Weighting):
    """The same for all tokens, always; 0 is plain next-token training, 1 is pure distillation (Hinton et al. 2015)."""

    weight: float = 0.7

    def __post_init__(self) -> None:
        _require_share(self.weight)

    def __call__(self, signals: Signals) -> Tensor:
        """See ``Weighting``."""
        return torch.full_like(signals.student_label_N, self.weight)


@dataclass(frozen=True)
class Schedule(Weighting):
    """The same for all tokens, in phase with the learning rate (Peng et al. 2024, arXiv 2410.16215).

    A large rate cannot average the noise of labels away, which soft targets are without; a small one can, and labels
    are without the teacher's errors.

    Attributes:
        weight: at the highest learning rate.
        factor: what the learning rate is at a step, as a share of the highest.
    """

    weight: float
    factor: Callable[[int], float]

    def __post_init__(self) -> None:
        _require_share(self.weight)

    def __call__(self, signals: Signals) -> Tensor:
        """See ``Weighting``."""
        return torch.full_like(signals.student_label_N, self.weight * self.factor(signals.step))


@dataclass(frozen=True)
class Responsibility(Weighting):
    """The chance that the teacher drew the label, and not the student.

    Attributes:
        prior: w, the same before the label is seen.
    """

    prior: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.prior < 1:
            raise HerdError(f"prior is {self.prior}, it must be between 0 and 1: for the limits use a fixed weight")

    def __call__(self, signals: Signals) -> Tensor:
        """See ``Weighting``."""
        odds = math.log(self.prior / (1 - self.prior))
        return torch.sigmoid(signals.teacher_label_N - signals.student_label_N + odds)


def _require_share(weight: float) -> None:
    if not 0 <= weight <= 1:
        raise HerdError(f"weight is {weight}, it must be within 0 and 1")

"""How much each token listens to the teacher and how much to its label.

They choose the a_t of  a_t · T² · D(p_t || q_t) + (1 - a_t) · CE(y_t, q_t),  where p is the teacher's distribution, q
the student's and y the label. H is an entropy, V the vocabulary, N tokens.

Meta wrote that Llama 4 Maverick was codistilled with "a novel distillation loss function that dynamically weights the
soft and hard targets through training", and **never published it**: no equation, no schedule, no temperature. What
follows is put together from the literature, and the combination ``dynamic`` is herdgraph's own, not Meta's.

====================== ================================= ============================================================
class                  a_t                               why
====================== ================================= ============================================================
``Fixed``              a                                 the usual baseline (Hinton et al. 2015)
``Schedule``           from a_0 to a_1 over the steps    the teacher helps most early (annealing distillation)
``TeacherConfidence``  a_max p_t(y)^g                    labels where the teacher is wrong
``TeacherCertainty``   a_max (1 - H(p_t) / ln V)^g       labels where the teacher is flat
``WeightedSoftLabels`` a_max (1 - exp(-CE_s / CE_t))     labels where the student is better than the teacher already
                                                         (Zhou et al. 2021, arXiv 2102.00650)
``LossRatioBalance``   one a for all (``balance.py``)    both terms keep their share of the gradient
``Combined``           of several, above a floor         a token must pass all of them
====================== ================================= ============================================================

CE_s = -log q(y) and CE_t = -log p(y) at temperature 1. Weights never carry a gradient.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ....errors import HerdError


class Signals(NamedTuple):
    """What is known of N tokens when their weights are chosen; float32, without gradients.

    Attributes:
        teacher_label_N: log p(y) at temperature 1.
        student_label_N: log q(y) at temperature 1.
        teacher_entropy_N: H(p) at temperature 1, nats.
        divergence_N: D at the temperature of the loss, without T².
        temperature: T.
        vocabulary: V.
        step: optimiser steps done.
    """

    teacher_label_N: Tensor
    student_label_N: Tensor
    teacher_entropy_N: Tensor
    divergence_N: Tensor
    temperature: float
    vocabulary: int
    step: int


class Weighting(ABC):
    """Weights of the soft targets."""

    @abstractmethod
    def __call__(self, signals: Signals) -> Tensor:
        """a_t of every token, [N] within 0..1."""

    def observe(self, signals: Signals) -> None:  # noqa: B027
        """Learn from a batch that is trained on, before it is weighted. Most kinds have nothing to learn."""

    def state_dict(self) -> dict[str, Any]:
        """What was learned, as plain numbers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Restore what ``state_dict`` gave."""


@dataclass(frozen=True)
class Fixed(Weighting):
    """The same for all tokens, always; 0 is plain next-token training, 1 is pure distillation."""

    weight: float = 0.5

    def __post_init__(self) -> None:
        require_share("weight", self.weight)

    def __call__(self, signals: Signals) -> Tensor:
        """See ``Weighting``."""
        return torch.full_like(signals.divergence_N, self.weight)


@dataclass(frozen=True)
class Schedule(Weighting):
    """From ``start`` to ``end`` over ``steps``, then constant; ``cosine`` leaves and arrives slowly."""

    start: float
    end: float
    steps: int
    shape: Literal["linear", "cosine"] = "cosine"

    def __post_init__(self) -> None:
        require_share("start", self.start)
        require_share("end", self.end)
        if self.steps < 1:
            raise HerdError(f"a schedule takes {self.steps} steps, at least 1 is needed")

    def __call__(self, signals: Signals) -> Tensor:
        """See ``Weighting``."""
        return torch.full_like(signals.divergence_N, self.at(signals.step))

    def at(self, step: int) -> float:
        """The weight after so many steps."""
        done = min(1.0, max(0.0, step / self.steps))
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done


@dataclass(frozen=True)
class TeacherConfidence(Weighting):
    """What the teacher gives the label: high where it is right and sure."""

    maximum: float = 1.0
    power: float = 1.0

    def __post_init__(self) -> None:
        require_share("maximum", self.maximum)

    def __call__(self, signals: Signals) -> Tensor:
        """See ``Weighting``."""
        return self.maximum * torch.exp(self.power * signals.teacher_label_N)


@dataclass(frozen=True)
class TeacherCertainty(Weighting):
    """How far the teacher is from knowing nothing, whatever the label is."""

    maximum: float = 1.0
    power: float = 1.0

    def __post_init__(self) -> None:
        require_share("maximum", self.maximum)

    def __call__(self, signals: Signals) -> Tensor:
        """See ``Weighting``."""
        certainty_N = 1 - signals.teacher_entropy_N / math.log(signals.vocabulary)
        return self.maximum * certainty_N.clamp(0, 1) ** self.power


@dataclass(frozen=True)
class WeightedSoftLabels(Weighting):
    """Near 1 while the student is far worse than the teacher on the label; 1 - 1/e where they are equal; then to 0.

    Soft labels lower the variance of a student and raise its bias. The ratio says token by token which of both matters
    now (Zhou et al. 2021; as in their code, both cross-entropies are at temperature 1).
    """

    maximum: float = 1.0

    def __post_init__(self) -> None:
        require_share("maximum", self.maximum)

    def __call__(self, signals: Signals) -> Tensor:
        """See ``Weighting``."""
        ratio_N = -signals.student_label_N / (-signals.teacher_label_N).clamp(min=1e-7)
        return self.maximum * -torch.expm1(-ratio_N)


@dataclass(frozen=True)
class Combined(Weighting):
    """Several weightings, multiplied or the smallest of them, but never below a floor.

    The floor keeps the teacher in the game where all others turn it off, early on above all.
    """

    parts: tuple[Weighting, ...]
    rule: Literal["product", "min"] = "product"
    floor: Weighting = field(default_factory=lambda: Fixed(0.0))

    def __post_init__(self) -> None:
        if not self.parts:
            raise HerdError("a combined weighting has no parts: give at least one")

    def __call__(self, signals: Signals) -> Tensor:
        """See ``Weighting``."""
        weights_PN = torch.stack([part(signals) for part in self.parts])
        joined_N = weights_PN.prod(0) if self.rule == "product" else weights_PN.amin(0)
        return torch.maximum(joined_N, self.floor(signals))

    def observe(self, signals: Signals) -> None:
        """See ``Weighting``."""
        for part in self.parts:
            part.observe(signals)

    def state_dict(self) -> dict[str, Any]:
        """See ``Weighting``."""
        return {str(at): part.state_dict() for at, part in enumerate(self.parts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``Weighting``."""
        for at, part in enumerate(self.parts):
            part.load_state_dict(state[str(at)])


def dynamic(steps: int) -> Weighting:
    """Weighted soft labels where the teacher can be believed, above a floor that fades over the run."""
    return Combined((TeacherConfidence(power=0.5), WeightedSoftLabels()), "product", Schedule(0.5, 0.1, steps))


def require_share(name: str, value: float) -> None:
    """Refuse what is no share.

    Raises:
        HerdError: below 0 or above 1.
    """
    if not 0 <= value <= 1:
        raise HerdError(f"{name} is {value}, it must be within 0 and 1")

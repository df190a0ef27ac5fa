"""How far a student's distribution q over the next token is from its teacher's p.

Shapes: N tokens, V vocabulary, S ids that the sum runs over (see ``targets.py``).

======== ================================================= =======================================================
name     D(p, q)                                           what it asks of the student
======== ================================================= =======================================================
forward  KL(p || q) = sum p log(p / q)                     mass wherever the teacher has some (Hinton et al. 2015)
reverse  KL(q || p)                                        no mass where the teacher has none (MiniLLM, 2306.08543)
js       b KL(p || m) + (1-b) KL(q || m), m = b p+(1-b) q  something between, bounded (GKD, arXiv 2306.13649)
skew     KL(p || l p + (1-l) q)                            as forward, at most -ln l (DistiLLM, arXiv 2402.03898)
======== ================================================= =======================================================

All work in float32 on log-probabilities. Gradients reach the student only. At temperature T they shrink by
about 1/T²; the loss makes up for it with a factor T², once, not these classes (Hinton et al. 2015, section 2).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ....errors import HerdError
from .targets import Targets


@dataclass(frozen=True)
class Divergence(ABC):
    """A sum over ids of a function of both log-probabilities."""

    name: ClassVar[str]

    def __call__(self, logits_NV: Tensor, targets: Targets, temperature: float = 1.0) -> Tensor:
        """The divergence of every token.

        Args:
            logits_NV: the student's, any floating type.
            targets: the teacher's.
            temperature: both distributions are softmax(logits / temperature).

        Returns:
            float32 [N], nats; at least 0 but for rounding and for estimates from ``SampledTargets``.

        Raises:
            HerdError: the targets are for another vocabulary or temperature.
        """
        logp_NS, logq_NS, measure_NS = targets.pair(logits_NV.float(), temperature)
        terms_NS = self.terms(logp_NS, logq_NS)
        return (terms_NS if measure_NS is None else terms_NS * measure_NS).sum(-1)

    @abstractmethod
    def terms(self, logp_NS: Tensor, logq_NS: Tensor) -> Tensor:
        """What each id adds to the sum."""


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(p || q); its gradient in the logits is (q - p) / T."""

    name = "forward"

    def terms(self, logp_NS: Tensor, logq_NS: Tensor) -> Tensor:
        """See ``Divergence``."""
        return kl_terms(logp_NS, logq_NS)


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(q || p)."""

    name = "reverse"

    def terms(self, logp_NS: Tensor, logq_NS: Tensor) -> Tensor:
        """See ``Divergence``."""
        return kl_terms(logq_NS, logp_NS)


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """Both distributions against their mixture; symmetric and at most ln 2 at ``beta`` 1/2.

    Attributes:
        beta: share of the teacher, inside of 0..1. Divided by it, the limit 0 is the forward KL; divided by 1 - beta,
            the limit 1 is the reverse KL.
    """

    name = "js"
    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise HerdError(f"beta is {self.beta}, it must be between 0 and 1: for the limits use the forward or the "
                            "reverse KL")

    def terms(self, logp_NS: Tensor, logq_NS: Tensor) -> Tensor:
        """See ``Divergence``."""
        logm_NS = mixture(logp_NS, logq_NS, self.beta)
        return self.beta * kl_terms(logp_NS, logm_NS) + (1 - self.beta) * kl_terms(logq_NS, logm_NS)


@dataclass(frozen=True)
class SkewKL(Divergence):
    """The forward KL to a student that was helped by a share of the teacher.

    Attributes:
        skew: that share, 0 for the forward KL; DistiLLM uses 0.1.
    """

    name = "skew"
    skew: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.skew < 1:
            raise HerdError(f"skew is {self.skew}, it must be at least 0 and below 1")

    def terms(self, logp_NS: Tensor, logq_NS: Tensor) -> Tensor:
        """See ``Divergence``."""
        return kl_terms(logp_NS, mixture(logp_NS, logq_NS, self.skew) if self.skew else logq_NS)


def kl_terms(logp: Tensor, logq: Tensor) -> Tensor:
    """Elementwise p log(p / q); torch's argument order is the other way round."""
    return functional.kl_div(logq, logp, reduction="none", log_target=True)


def mixture(logp: Tensor, logq: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q)."""
    return torch.logaddexp(logp + math.log(share), logq + math.log1p(-share))


DIVERGENCES: dict[str, type[Divergence]] = {kind.name: kind for kind in (ForwardKL, ReverseKL, JensenShannon, SkewKL)}
"""By name, for options of recipes."""

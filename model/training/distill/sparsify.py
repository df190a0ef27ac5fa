"""From a teacher's logits to the few ids worth keeping of each token.

Shapes: N tokens, V vocabulary, K kept ids.

The field's numbers: K = 64 of 202,048 ids is 384 bytes a token with int32 ids and bfloat16 log-probabilities; about 50
draws do as well in pretraining (RS-KD, Anshumann et al., arXiv 2503.16870).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ....errors import HerdError
from .chunks import rows_for
from .targets import SampledTargets, SparseTargets, TopKTargets, join, log_softmax


@dataclass(frozen=True, kw_only=True)
class Sparsifier(ABC):
    """Keeps K ids of every token, at a temperature.

    Attributes:
        k: ids per token.
        temperature: of the distillation that will use them.
    """

    k: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.k < 1 or self.temperature <= 0:
            raise HerdError(f"{self.k} ids at temperature {self.temperature} cannot be kept: both must be above 0")

    def __call__(self, logits_NV: Tensor, labels_N: Tensor) -> SparseTargets:
        """Targets of N tokens; ``labels_N`` are ids of the vocabulary.

        Raises:
            HerdError: the K best ids of fewer are wanted.
        """
        rows = rows_for(logits_NV.shape[-1])
        parts = [self.keep(*piece) for piece in zip(logits_NV.split(rows), labels_N.split(rows), strict=True)]
        joined = join(parts)
        assert isinstance(joined, SparseTargets)
        return joined

    @abstractmethod
    def keep(self, logits_NV: Tensor, labels_N: Tensor) -> SparseTargets:
        """As ``__call__``, for rows that fit in memory a few times."""

    def _common(self, logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Log-probabilities at the temperature, and the fields that both kinds share."""
        logp_NV = log_softmax(logits_NV)
        found = {
            "label_logprob_N": logp_NV.gather(-1, labels_N[:, None])[:, 0],
            "entropy_N": -(logp_NV.exp() * logp_NV).sum(-1),
            "logsumexp_N": (logits_NV.float() / self.temperature).logsumexp(-1),
        }
        return logp_NV if self.temperature == 1 else log_softmax(logits_NV, self.temperature), found


@dataclass(frozen=True, kw_only=True)
class TopK(Sparsifier):
    """The K best ids and the mass of the others."""

    def keep(self, logits_NV: Tensor, labels_N: Tensor) -> TopKTargets:
        """See ``Sparsifier``."""
        if self.k > logits_NV.shape[-1]:
            raise HerdError(f"{self.k} best ids cannot be kept of a vocabulary of {logits_NV.shape[-1]}: keep fewer")
        logp_NV, common = self._common(logits_NV, labels_N)
        logprobs_NK, index_NK = logp_NV.topk(self.k, dim=-1)
        tail_N = logp_NV.scatter(-1, index_NK, -torch.inf).logsumexp(-1).exp()
        return TopKTargets(ids_NK=index_NK.int(), logprobs_NK=logprobs_NK, tail_N=tail_N, **common,
                           size=logits_NV.shape[-1], temperature=self.temperature)


@dataclass(frozen=True, kw_only=True)
class Sample(Sparsifier):
    """K draws, with replacement, from  p^t / sum p^t.

    Attributes:
        power: t; 1 draws from the teacher itself and needs no weights, less looks further into the tail.
        generator: of the draws, None for torch's own.
    """

    power: float = 1.0
    generator: torch.Generator | None = None

    def keep(self, logits_NV: Tensor, labels_N: Tensor) -> SampledTargets:
        """See ``Sparsifier``."""
        logp_NV, common = self._common(logits_NV, labels_N)
        proposal_NV = logp_NV if self.power == 1 else log_softmax(logp_NV * self.power)
        index_NK = proposal_NV.exp().multinomial(self.k, replacement=True, generator=self.generator)
        return SampledTargets(
            ids_NK=index_NK.int(), logprobs_NK=logp_NV.gather(-1, index_NK), top_N=logp_NV.argmax(-1).int(), **common,
            log_proposal_NK=None if self.power == 1 else proposal_NV.gather(-1, index_NK),
            size=logits_NV.shape[-1], temperature=self.temperature,
        )

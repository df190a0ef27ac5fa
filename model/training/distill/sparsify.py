"""From a teacher's logits to the few ids worth keeping of each token.

Shapes: N tokens, V vocabulary, K kept ids.

The field's number: K = 64 of 202,048 ids is 384 bytes a token with int32 ids and bfloat16 log-probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ....errors import HerdError
from .chunks import rows_for
from .targets import TopKTargets, join, log_softmax


@dataclass(frozen=True, kw_only=True)
class TopK:
    """Keeps the K best ids of every token and the mass of the others, at a temperature.

    Attributes:
        k: ids per token.
        temperature: of the distillation that will use them.
    """

    k: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.k < 1 or self.temperature <= 0:
            raise HerdError(f"{self.k} ids at temperature {self.temperature} cannot be kept: both must be above 0")

    def __call__(self, logits_NV: Tensor, labels_N: Tensor) -> TopKTargets:
        """Targets of N tokens; ``labels_N`` are ids of the vocabulary.

        Raises:
            HerdError: the K best ids of fewer are wanted.
        """
        if self.k > logits_NV.shape[-1]:
            raise HerdError(f"{self.k} best ids cannot be kept of a vocabulary of {logits_NV.shape[-1]}: keep fewer")
        rows = rows_for(logits_NV.shape[-1])
        return join([self._keep(*piece) for piece in zip(logits_NV.split(rows), labels_N.split(rows), strict=True)])

    def _keep(self, logits_NV: Tensor, labels_N: Tensor) -> TopKTargets:
        """As ``__call__``, for rows that fit in memory a few times."""
        plain_NV = log_softmax(logits_NV)
        logp_NV = plain_NV if self.temperature == 1 else log_softmax(logits_NV, self.temperature)
        logprobs_NK, index_NK = logp_NV.topk(self.k, dim=-1)
        return TopKTargets(
            ids_NK=index_NK.int(), logprobs_NK=logprobs_NK,
            tail_N=logp_NV.scatter(-1, index_NK, -torch.inf).logsumexp(-1).exp(),
            logsumexp_N=(logits_NV.float() / self.temperature).logsumexp(-1),
            label_logprob_N=plain_NV.gather(-1, labels_N[:, None])[:, 0],
            entropy_N=-(plain_NV.exp() * plain_NV).sum(-1), size=logits_NV.shape[-1], temperature=self.temperature)
